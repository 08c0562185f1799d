"""A long ingest that was interrupted goes on from its checkpoint, and ends as if nothing had happened."""

from __future__ import annotations

import copy
import itertools
import sys
import threading
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from families import build
from helpers import assert_near, cap_share, session_logits

import tieredkv
from tieredkv.cache import context_digests, correcting, unfinished
from tieredkv.cache.unfinished import Mark
from tieredkv.errors import SessionError, VideoError
from tieredkv.session import checkpoint as checkpoints
from tieredkv.session.beside import checkpoint_path, remove_leftover
from tieredkv.session.checkpoint import FLOOR_S, SHARE, Checkpoint, is_due
from tieredkv.session.session_file import cache_tensors
from tieredkv.storage import atomic, block_file
from tieredkv.video.frames import ArraySource

QUESTION = "what is it ?"
FAMILIES = ["qwen2_5_vl", "qwen3_vl", "qwen3_5", "llava_onevision", "video_llama_3", "minicpmv4_6", "gemma4", "lfm3_vl"]


class Interruption(Exception):
    """What stops an ingest in these tests."""


@pytest.fixture
def often(monkeypatch):
    """A checkpoint after every call of the model."""
    monkeypatch.setattr(checkpoints, "is_due", lambda *seconds: True)


@pytest.fixture
def film():
    """41 frames, some of them alike."""
    frames = np.random.default_rng(5).integers(0, 256, (41, 60, 90, 3), dtype=np.uint8)
    frames[11:17] = frames[11]
    return frames


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "film.tkv.checkpoint"


def options(processor, **changes):
    return {"gpu_kv_gb": 1, "fps": 4, "processor": processor, "prefill_chunk": 37, "encode_batch": 24, **changes}


@contextmanager
def interrupted_after(number: int, error: type[BaseException] = Interruption):
    """The ingest ends with an error after this many checkpoints."""
    write, written = Checkpoint.write, []

    def writing(self, *args):
        write(self, *args)
        written.append(1)
        if len(written) == number:
            raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoint, "write", writing)
        yield


def begin(model, film, folder, number=2, **given) -> None:
    """An ingest that is interrupted after `number` checkpoints."""
    with interrupted_after(number), pytest.raises(Interruption):
        tieredkv.open_session(model, film, checkpoint=folder, **given)
    assert (folder / "state").exists()


def contents(session) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in cache_tensors(session._cached.cache).items()}


def differences(session, expected: dict[str, torch.Tensor]) -> set[str]:
    now = contents(session)
    assert now.keys() == expected.keys()
    return {name for name in expected if not torch.equal(now[name], expected[name])}


def decoded_frames(monkeypatch) -> list[int]:
    """The number of each frame that is decoded from now on."""
    frames, seen = ArraySource._picture, []

    def picture(self, index):
        if sys._getframe(1).f_code.co_name == "frames":
            seen.append(index)
        return frames(self, index)

    monkeypatch.setattr(ArraySource, "_picture", picture)
    return seen


# ---- the result


@pytest.mark.parametrize(("name", "number"), [*((name, 3) for name in FAMILIES), ("qwen2_5_vl", 1), ("qwen3_5", 1)])
def test_the_result_equals_that_of_an_ingest_without_interruption(name, number, often, film, folder):
    """Every family in the middle; after the first checkpoint, one without and one with layers that do not grow."""
    model, processor = build(name)
    given = options(processor)
    with tieredkv.open_session(model, film, **given) as session:
        expected, facts = contents(session), (session.video, session._ingested.facts, session.ingest_stats.frames)
        logits = session_logits(session, QUESTION, 4)
    begin(model, film, folder, number, **given)
    with tieredkv.open_session(model, film, checkpoint=folder, **given) as session:
        assert differences(session, expected) == set()
        assert (session.video, session._ingested.facts, session.ingest_stats.frames) == facts
        assert torch.equal(session_logits(session, QUESTION, 4), logits)


@pytest.mark.parametrize("digest", ["sketch", "minmax"])
@pytest.mark.parametrize("share", [0.65, 0.9])
def test_resident_tokens_and_fitted_digests_are_as_they_were(share, digest, often, film, folder, monkeypatch):
    """A cap that keeps some tokens on the device, and digests that are fitted while the prompt grows."""
    monkeypatch.setattr(context_digests, "FIT_TOKENS", 48)
    model, processor = build("qwen2_5_vl")
    policy = next(each for each in tieredkv.POLICIES.values() if each.digest == digest)
    given = options(processor, gpu_kv_gb=cap_share(model, 170, share), chunk_tokens=4, prefill_chunk=16, policy=policy)
    with tieredkv.open_session(model, film, **given) as session:
        expected, stats, peak = contents(session), session.ingest_stats, session._cached.cache.ledger.peak_bytes
        logits = session_logits(session, QUESTION, 4)
    assert stats.streamed_bytes > 0
    begin(model, film, folder, 5, **given)
    with tieredkv.open_session(model, film, checkpoint=folder, **given) as session:
        assert differences(session, expected) == set()
        assert session.ingest_stats.streamed_bytes == stats.streamed_bytes
        assert session._cached.cache.ledger.peak_bytes == peak
        assert torch.equal(session_logits(session, QUESTION, 4), logits)


def test_corrections_of_predicted_queries_are_as_they_were(often, film, folder, monkeypatch):
    """Fitted before the interruption, and not again before the context is four times as long."""
    monkeypatch.setattr(correcting, "LEAST_TOKENS", 30)
    model, processor = build("qwen2_5_vl")
    given = options(processor, ahead=True, budget_ratio=0.5)
    with tieredkv.open_session(model, film, **given) as session:
        expected = contents(session)
    assert any(name.endswith(".ahead.up") for name in expected)
    begin(model, film, folder, 2, **given)
    with tieredkv.open_session(model, film, checkpoint=folder, **given) as session:
        assert differences(session, expected) == set()


def test_an_ingest_may_be_interrupted_many_times(often, film, folder):
    model, processor = build("qwen3_5")
    given = options(processor)
    with tieredkv.open_session(model, film, **given) as session:
        expected = contents(session)
    for _ in range(3):
        begin(model, film, folder, 1, **given)
    with tieredkv.open_session(model, film, checkpoint=folder, **given) as session:
        assert differences(session, expected) == set()


def test_a_family_that_leaves_out_what_does_not_change_sees_the_frame_before(often, film, folder):
    model, processor = build("video_llama_3")
    film = film[:16]
    film[:, :, 30:] = film[0, :, 30:]
    given = options(processor, prefill_chunk=20, encode_batch=12)
    with tieredkv.open_session(model, film, **given) as session:
        expected, grid = contents(session), session.video
    assert len(set(grid.lengths)) > 1
    for number in (1, 2):
        begin(model, film, folder, number, **given)
    with tieredkv.open_session(model, film, checkpoint=folder, **given) as session:
        assert session.video == grid
        assert differences(session, expected) == set()


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava_onevision", "gemma4"])
def test_a_checkpoint_may_hold_the_whole_video(name, often, film, folder):
    """The last one before a session is saved, to which a disk may be too full."""
    model, processor = build(name)
    given = options(processor)
    with tieredkv.open_session(model, film, checkpoint=folder, **given) as session:
        expected = contents(session)
    with tieredkv.open_session(model, film, checkpoint=folder, **given) as session:
        assert differences(session, expected) == set()


def test_frames_that_are_cached_are_not_decoded_again(often, film, folder, monkeypatch):
    model, processor = build("qwen2_5_vl")
    begin(model, film, folder, 3, **options(processor))
    seen = decoded_frames(monkeypatch)
    with tieredkv.open_session(model, film, checkpoint=folder, **options(processor)) as session:
        assert session.ingest_stats.frames == 41
    assert min(seen) > 10
    assert seen == list(range(min(seen), 41))


def test_another_cap_or_chunk_of_prefill_continues_with_the_same_answers(often, film, folder):
    """After it ran out of memory, say."""
    model, processor = build("qwen2_5_vl")
    with tieredkv.open_session(model, film, **options(processor)) as session:
        logits = session_logits(session, QUESTION, 4)
    begin(model, film, folder, **options(processor))
    changed = options(processor, gpu_kv_gb=0.5, prefill_chunk=20, encode_batch=8, policy="quest")
    with tieredkv.open_session(model, film, checkpoint=folder, **changed) as session:
        assert_near(session_logits(session, QUESTION, 4), logits)


# ---- what is refused


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"fps": 2}, r"with other settings \(fps was 4, is 2\)"),
        ({"max_frames": 20}, r"with other settings \(max_frames was None, is 20\)"),
        ({"start": 1.0}, r"with other settings \(start was 0\.0, is 1\.0\)"),
        ({"positions": "stock"}, r"with other settings \(positions was 'published', is 'stock'\)"),
        ({"system": "Be brief."}, r"with other settings \(the system prompt differs\)"),
        ({"chunk_tokens": 16}, "in chunks of 8 tokens, and chunk_tokens=16 was given"),
    ],
    ids=["fps", "max_frames", "start", "positions", "system", "chunk_tokens"],
)
def test_other_settings_are_refused_by_name(changes, difference, often, film, folder):
    model, processor = build("qwen2_5_vl")
    processor = copy.copy(processor)
    processor.chat_template = (
        "{{ messages[0].content if messages[0].role == 'system' }}"
        + processor.chat_template.replace(
            "{% for part in message['content'] %}", "{% for part in message['content'] if part is mapping %}"
        )
    )
    begin(model, film, folder, **options(processor))
    with pytest.raises(
        SessionError, match=rf"an ingest was begun {difference}: .*or remove .*checkpoint to start over"
    ):
        tieredkv.open_session(model, film, checkpoint=folder, **options(processor, **changes))
    assert (folder / "state").exists()


def test_another_film_is_refused(often, film, folder):
    model, processor = build("qwen2_5_vl")
    begin(model, film, folder, **options(processor))
    film[40] += 1
    with pytest.raises(SessionError, match="an ingest was begun for another video"):
        tieredkv.open_session(model, film, checkpoint=folder, **options(processor))


def test_another_model_is_refused(often, film, folder):
    model, processor = build("qwen2_5_vl")
    begin(model, film, folder, **options(processor))
    other = copy.deepcopy(model)
    with torch.no_grad():
        next(other.model.language_model.parameters())[0, 0] += 1
    with pytest.raises(SessionError, match=r"begun with another model \(the model's weights differ\)"):
        tieredkv.open_session(other, film, checkpoint=folder, **options(processor))


def test_a_checkpoint_in_use_is_refused(often, film, folder):
    model, processor = build("qwen2_5_vl")
    with (
        tieredkv.open_session(model, film, checkpoint=folder, **options(processor)),
        pytest.raises(SessionError, match=r"checkpoint is in use by another process: wait until it ends"),
    ):
        tieredkv.open_session(model, film, checkpoint=folder, **options(processor))
    with tieredkv.open_session(model, film, checkpoint=folder, **options(processor)):
        pass


# ---- damage


def flip(file, place: float) -> None:
    content = bytearray(file.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: flip(folder / "cache", 0.1),
        lambda folder: flip(folder / "cache", 0.9),
        lambda folder: flip(folder / "state", 0.01),
        lambda folder: flip(folder / "state", 0.7),
        lambda folder: (folder / "cache").write_bytes((folder / "cache").read_bytes()[:-1]),
        lambda folder: (folder / "cache").unlink(),
        lambda folder: (folder / "state").write_bytes(b""),
    ],
    ids=["cache", "end of the cache", "header", "state", "cut short", "no cache", "empty"],
)
def test_a_damaged_checkpoint_is_reported_and_not_used(damage, often, film, folder):
    model, processor = build("qwen3_5")
    given = options(processor)
    with tieredkv.open_session(model, film, **given) as session:
        expected = contents(session)
    begin(model, film, folder, **given)
    damage(folder)
    with pytest.warns(UserWarning, match="checkpoint/.*ingested from its beginning"):
        session = tieredkv.open_session(model, film, checkpoint=folder, **given)
    with session:
        assert differences(session, expected) == set()
        session.save(folder.parent / "film.tkv")
    assert sorted(file.name for file in folder.parent.iterdir()) == ["film.tkv"]


def test_what_an_interrupted_write_left_is_overwritten(often, film, folder):
    model, processor = build("qwen2_5_vl")
    given = options(processor)
    with tieredkv.open_session(model, film, **given) as session:
        expected = contents(session)
    begin(model, film, folder, 2, **given)
    whole = (folder / "cache").read_bytes()
    with (folder / "cache").open("ab") as file:
        file.write(b"half a block")
    begin(model, film, folder, 1, **given)
    assert (folder / "cache").read_bytes().startswith(whole)
    with tieredkv.open_session(model, film, checkpoint=folder, **given) as session:
        assert differences(session, expected) == set()


# ---- when it is written, and what it costs


@pytest.mark.parametrize("disk", [0.001, 0.01, 0.03, 0.1, 1.0])
def test_checkpoints_take_a_small_share_of_the_time(disk):
    """disk: seconds to write what a second of ingest adds."""
    now = since = spent = rate = 0.0
    checkpoints_written, first = 0, 0.0
    while now < 3600:
        now, since = now + 1, since + 1
        if is_due(now, since, spent, rate * since):
            write = 0.2 + disk * since
            rate, spent, now, since = write / since, spent + write, now + write, 0.0
            first, checkpoints_written = first or write, checkpoints_written + 1
    assert spent <= SHARE * now + first
    assert checkpoints_written >= 1
    if disk <= 0.01:
        assert checkpoints_written > 60
    assert checkpoints_written <= 3600 / FLOOR_S


def test_a_short_ingest_writes_nothing(film, folder):
    model, processor = build("qwen2_5_vl")
    with tieredkv.open_session(model, film, checkpoint=folder, **options(processor)):
        assert [file.name for file in folder.iterdir()] == ["lock"]
    assert not folder.exists()


def test_only_what_is_new_is_written_and_nothing_is_copied_for_it(often, film, folder, monkeypatch):
    model, processor = build("qwen2_5_vl")
    append, sizes, shared = block_file.append, [], []

    def appending(path, end, tensors):
        hosts = {layer.host.records.untyped_storage().data_ptr() for layer in caches[-1].tiered_layers}
        shared.extend(tensor.untyped_storage().data_ptr() in hosts for tensor in tensors[::2])
        block = append(path, end, tensors)
        sizes.append(block.nbytes)
        return block

    caches, parts = [], unfinished.parts

    def recorded(cache, since):
        caches.append(cache)
        return parts(cache, since)

    monkeypatch.setattr(block_file, "append", appending)
    monkeypatch.setattr(unfinished, "parts", recorded)
    with tieredkv.open_session(model, film, checkpoint=folder, **options(processor)) as session:
        host_bytes = session._cached.cache.host_bytes
    assert len(sizes) > 3
    assert sum(sizes) <= host_bytes
    assert all(shared)


def test_a_mark_of_nothing_covers_nothing():
    assert Mark().of_layer(3).chunks == 0


def test_an_error_between_two_calls_leaves_a_last_checkpoint(film, folder, monkeypatch):
    """Here a film that ends too early, long after the last checkpoint."""
    model, processor = build("qwen2_5_vl")
    calls, frames = itertools.count(1), ArraySource.frames
    later = threading.Event()

    def first(*seconds):
        call = next(calls)
        if call == 3:
            later.set()
        return call == 1

    def cut(self, *args):
        yield from itertools.islice(frames(self, *args), 38)
        assert later.wait(60)  # calls after the first checkpoint
        raise VideoError("cut short")

    monkeypatch.setattr(checkpoints, "is_due", first)

    monkeypatch.setattr(ArraySource, "frames", cut)
    with pytest.raises(VideoError):
        tieredkv.open_session(model, film, checkpoint=folder, **options(processor, prefill_chunk=16))
    checkpoint = Checkpoint(folder)
    begun = checkpoint.begun()
    checkpoint.close()
    assert begun is not None
    assert len(begun.blocks) == 2


@pytest.mark.parametrize("layer", [1, 3])
def test_after_an_error_in_a_call_it_goes_on_from_whole_calls(layer, often, film, folder, monkeypatch):
    """In the first layer and the last; here digests are to be fitted."""
    monkeypatch.setattr(context_digests, "FIT_TOKENS", 48)
    model, processor = build("qwen2_5_vl")
    given = options(processor, prefill_chunk=16, chunk_tokens=4)
    with tieredkv.open_session(model, film, **given) as session:
        expected = contents(session)
    update, fitted = context_digests.ContextDigests.update, []

    def failing(self, fit=False, new=None):
        if self._host.length >= 48:
            fitted.append(1)
            if len(fitted) == layer:
                raise MemoryError
        update(self, fit, new)

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(context_digests.ContextDigests, "update", failing)
        tieredkv.open_session(model, film, checkpoint=folder, **given)
    with tieredkv.open_session(model, film, checkpoint=folder, **given) as session:
        assert differences(session, expected) == set()


# ---- the disk


def test_without_room_on_the_disk_the_ingest_goes_on_without_checkpoints(often, film, folder, monkeypatch):
    model, processor = build("qwen2_5_vl")
    usage = atomic.shutil.disk_usage(folder.parent)._replace(free=1000)
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda _: usage)
    with pytest.warns(UserWarning, match="of disk, .* free in .*The ingest goes on without checkpoints"):
        session = tieredkv.open_session(model, film, checkpoint=folder, **options(processor))
    with session:
        assert [file.name for file in folder.iterdir()] == ["lock"]


def test_a_disk_that_fails_ends_the_checkpoints_and_not_the_ingest(often, film, folder, monkeypatch):
    model, processor = build("qwen2_5_vl")
    write, calls = block_file._write, []

    def failing(file, part):
        calls.append(1)
        if len(calls) > 12:
            raise OSError(28, "No space left on device")
        return write(file, part)

    given = options(processor)
    with tieredkv.open_session(model, film, **given) as session:
        expected = contents(session)
    monkeypatch.setattr(block_file, "_write", failing)
    with pytest.warns(UserWarning, match="cache could not be written: No space left") as warned:
        session = tieredkv.open_session(model, film, checkpoint=folder, **given)
    assert len(warned) == 1
    with session:
        assert differences(session, expected) == set()
    monkeypatch.setattr(block_file, "_write", write)
    with tieredkv.open_session(model, film, checkpoint=folder, **given) as session:
        assert differences(session, expected) == set()


# ---- beside a session file


def test_a_leftover_is_removed_unless_it_is_in_use(tmp_path):
    path = checkpoint_path(tmp_path / "film.tkv")
    assert path.name == "film.tkv.checkpoint"
    remove_leftover(path)
    checkpoint = Checkpoint(path)
    (path / "state").write_bytes(b"what a killed process left")
    remove_leftover(path)
    assert (path / "state").exists()
    checkpoint.close()
    remove_leftover(path)
    assert not path.exists()
