"""Sessions whose host tier has 8 or 4 bits: saved, loaded, checkpointed and asked."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import pressed, session_logits, tier_options

import tieredkv
from tieredkv.codecs import codec_for
from tieredkv.errors import SessionError
from tieredkv.session import checkpoint as checkpoints
from tieredkv.session.checkpoint import Checkpoint
from tieredkv.session.session_file import cache_tensors
from tieredkv.storage import header, tensor_file

STAR, MOON = "what colour was the star ?", "follow the moon for 4 ?"
BITS = pytest.mark.parametrize("bits", [8, 4])


class Interruption(Exception):
    """What stops an ingest in these tests."""


@pytest.fixture
def options(video_model, processor):
    """`options(bits)`: of sessions with much less room on the device than the video takes."""

    def options(bits, **changes):
        given = {
            **pressed(video_model, 280, 0.6),
            "processor": processor,
            "fps": 4,
            "chunk_tokens": 8,
            "prefill_chunk": 40,
            "recent_window": 16,
            "theta": 0.4,
            "host_kv_bits": bits,
        }
        return tier_options(**given, **changes)

    return options


@pytest.fixture
def packed_early(monkeypatch):
    """Caches are packed from 96 tokens on, not only at the end of these short videos."""
    for module in ("cache.tiered_cache", "memory.host", "planning.sizes"):
        monkeypatch.setattr(f"tieredkv.{module}.FIT_TOKENS", 96)


def bits_of(session):
    """Bits of every layer's host tier."""
    return {layer.host.codec.bits for layer in session._cached.cache.tiered_layers}


@BITS
@pytest.mark.parametrize("early", [True, False], ids=["in the ingest", "at its end"])
def test_a_loaded_session_answers_bit_for_bit_like_the_saved_one(
    bits, early, video_model, processor, frames, options, tmp_path, request
):
    if early:
        request.getfixturevalue("packed_early")
    with tieredkv.open_session(video_model, frames, **options(bits)) as session:
        session.save(tmp_path / "film")
        answers = [session_logits(session, question, 6) for question in (STAR, MOON)]
        stats = session.ask(STAR, max_new_tokens=2).stats
    with tieredkv.load_session(tmp_path / "film", video_model, processor=processor) as session:
        assert bits_of(session) == {bits}
        for question, logits in zip((STAR, MOON), answers, strict=True):
            assert torch.equal(session_logits(session, question, 6), logits)
        assert session.ask(STAR, max_new_tokens=2).stats.kv_host_bytes == stats.kv_host_bytes


@BITS
def test_no_answer_depends_on_an_earlier_question(bits, packed_early, video_model, frames, options):
    with tieredkv.open_session(video_model, frames, **options(bits)) as session:
        alone = session_logits(session, MOON, 6)
    with tieredkv.open_session(video_model, frames, **options(bits)) as session:
        session.ask(STAR, max_new_tokens=12)
        session.chat(" ".join([STAR] * 20), max_new_tokens=3)
        assert torch.equal(session_logits(session, MOON, 6), alone)


@BITS
def test_saving_again_writes_the_same(bits, packed_early, video_model, processor, frames, options, tmp_path):
    with tieredkv.open_session(video_model, frames, **options(bits)) as session:
        session.save(tmp_path / "first")
        session.ask(MOON, max_new_tokens=5)
        session.save(tmp_path / "second")
    with tieredkv.load_session(tmp_path / "first", video_model, processor=processor) as session:
        session.ask(STAR, max_new_tokens=5)
        session.save(tmp_path / "third")
    first, *others = (tensor_file.read(tmp_path / name) for name in ("first", "second", "third"))
    for other in others:
        assert other.names == first.names
        for name in first.names:
            assert torch.equal(other.tensor(name), first.tensor(name)), name


@BITS
def test_a_conversation_goes_on_as_if_nothing_were_kept_of_it(
    bits, packed_early, video_model, processor, frames, options, tmp_path
):
    """What is kept of earlier turns is put back as it was stored."""
    with tieredkv.open_session(video_model, frames, **options(bits)) as session:
        session.save(tmp_path / "film")
        session.chat(STAR, max_new_tokens=4)
        kept = session._conversation.kept.passage
        answer = session.chat(MOON, max_new_tokens=8)
        cache = session._cached.cache
        kept.append_to(cache)
        for layer, fields in zip(cache.tiered_layers, kept.layers, strict=True):
            for now, then in zip(layer.host.stored(kept.begin, kept.stop), fields, strict=True):
                assert torch.equal(now, then)
        assert kept.nbytes == kept.nbytes_of(cache, kept.begin)
    with tieredkv.load_session(tmp_path / "film", video_model, processor=processor) as session:
        session.chat(STAR, max_new_tokens=4)
        assert session.chat(MOON, max_new_tokens=8).token_ids == answer.token_ids


def test_files_shrink_with_the_bits(video_model, frames, options, tmp_path):
    sizes = {}
    for bits in (16, 8, 4):
        with tieredkv.open_session(video_model, frames, **options(bits)) as session:
            session.save(tmp_path / str(bits))
            layers = session._cached.cache.tiered_layers
        stored = tensor_file.read(tmp_path / str(bits))
        sizes[bits] = sum(stored.tensor(name).nbytes for name in stored.names if name.endswith(".kv"))
        assert stored.manifest["host"]["bits"] == bits
        head_dim = stored.manifest["host"]["head_dim"]
        records = stored.tensor("layers.000.kv").view(torch.uint8)
        assert records.shape[2] == codec_for(bits, 8, head_dim, torch.float32).chunk_bytes
        assert len(layers) * records.nbytes == sizes[bits]
    assert sizes[16] > 3 * sizes[8] > 4 * sizes[4]


@pytest.mark.parametrize("given", [16, 4])
def test_other_bits_than_the_files_are_refused(given, video_model, processor, frames, options, tmp_path):
    with tieredkv.open_session(video_model, frames, **options(8)) as session:
        session.save(tmp_path / "film")
    with pytest.raises(SessionError, match=f"saved in 8 bits: host_kv_bits={given} needs the video ingested again"):
        tieredkv.load_session(tmp_path / "film", video_model, processor=processor, host_kv_bits=given)
    with tieredkv.load_session(tmp_path / "film", video_model, processor=processor, host_kv_bits=8) as session:
        assert bits_of(session) == {8}


def test_a_loaded_session_keeps_its_bits_whatever_it_would_have_by_default(
    video_model, processor, frames, options, tmp_path
):
    with tieredkv.open_session(
        video_model, frames, **{**options(None), "gpu_kv_gb": 1, "budget_ratio": None}
    ) as session:
        assert bits_of(session) == {16}
        session.save(tmp_path / "film")
    small = pressed(video_model, 280, 0.6)
    with tieredkv.load_session(tmp_path / "film", video_model, processor=processor, **small) as session:
        session.ask(STAR, max_new_tokens=3)
        assert bits_of(session) == {16}


# ---- checkpoints


def interrupted(model, film, folder, number, **given):
    """An ingest that ends after `number` checkpoints, one after every call of the model."""
    write, written = Checkpoint.write, []

    def writing(self, *args):
        write(self, *args)
        written.append(1)
        if len(written) == number:
            raise Interruption

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "is_due", lambda *seconds: True)
        patch.setattr(Checkpoint, "write", writing)
        with pytest.raises(Interruption):
            tieredkv.open_session(model, film, checkpoint=folder, **given)


@BITS
@pytest.mark.parametrize("share", [0.6, 4.0], ids=["partly resident", "resident"])
@pytest.mark.parametrize("number", [1, 2, 3, 5])
def test_a_checkpoint_before_or_after_packing_is_continued_to_the_bit(
    number, share, bits, packed_early, video_model, frames, options, tmp_path, monkeypatch
):
    monkeypatch.setattr("tieredkv.planning.prefill_plan.STAGING_TOKENS", 32)
    given = options(bits) | pressed(video_model, 280, share)
    with tieredkv.open_session(video_model, frames, **given) as session:
        expected = {name: part.clone() for name, part in cache_tensors(session._cached.cache).items()}
        streamed = session.ingest_stats.streamed_bytes
        assert (streamed > 0) == (share < 1)
    interrupted(video_model, frames, tmp_path / "kept", number, **given)
    with tieredkv.open_session(video_model, frames, checkpoint=tmp_path / "kept", **given) as session:
        now = cache_tensors(session._cached.cache)
        assert now.keys() == expected.keys()
        assert {name for name in now if not torch.equal(now[name], expected[name])} == set()
        assert session.ingest_stats.streamed_bytes == streamed


def test_a_checkpoint_of_other_bits_is_refused(packed_early, video_model, frames, options, tmp_path):
    interrupted(video_model, frames, tmp_path / "kept", 5, **options(8))
    with pytest.raises(SessionError, match="begun in 8 bits, and host_kv_bits=4 was given"):
        tieredkv.open_session(video_model, frames, checkpoint=tmp_path / "kept", **options(4))


# ---- files of format 1


@pytest.fixture
def of_format_1(tmp_path):
    """`of_format_1(path)`: rewrite a session of 16 bits as it was written before records."""

    def rewrite(path):
        stored = tensor_file.read(path)
        manifest = {name: value for name, value in stored.manifest.items() if name != "host"}
        manifest["tiers"] = {name: value for name, value in manifest["tiers"].items() if name != "host_kv_bits"}
        host, chunk = stored.manifest["host"], manifest["tiers"]["chunk_tokens"]
        tensors = {name: stored.tensor(name).clone() for name in stored.names}
        for name in (name for name in tensors if name.endswith(".kv")):
            words = tensors[name].view(getattr(torch, host["dtype"]))
            tensors[name] = words.unflatten(2, (2, chunk, host["head_dim"])).contiguous()
        old = tmp_path / "old"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tensor_file, "FORMAT_VERSION", 1)
            tensor_file.write(old, manifest, tensors)
        return old

    return rewrite


def test_files_of_format_1_still_load_mapped_as_they_are(
    of_format_1, video_model, processor, frames, options, tmp_path
):
    with tieredkv.open_session(video_model, frames, **options(16)) as session:
        session.save(tmp_path / "film")
        session_logits(session, MOON, 2)  # the first question still finds tokens on the device
        answer = session_logits(session, STAR, 6)
    old = of_format_1(tmp_path / "film")
    assert header.read(old).manifest["tiers"].keys() & {"host_kv_bits"} == set()
    assert tensor_file.read(old).tensor("layers.000.kv").ndim == 5
    with tieredkv.load_session(old, video_model, processor=processor) as session:
        cache = session._cached.cache
        mapped = [layer.host.records.data_ptr() for layer in cache.tiered_layers]
        assert bits_of(session) == {16}
        assert torch.equal(session_logits(session, STAR, 6), answer)
        assert mapped == [layer.host.records.data_ptr() for layer in cache.tiered_layers]
        session.save(tmp_path / "new")
    new, first = tensor_file.read(tmp_path / "new"), tensor_file.read(tmp_path / "film")
    for name in first.names:
        assert torch.equal(new.tensor(name), first.tensor(name)), name
    with pytest.raises(SessionError, match="saved in 16 bits: host_kv_bits=8 needs the video ingested again"):
        tieredkv.load_session(old, video_model, processor=processor, host_kv_bits=8)


def test_new_files_are_refused_by_code_of_format_1(video_model, frames, options, tmp_path, monkeypatch):
    with tieredkv.open_session(video_model, frames, **options(16)) as session:
        session.save(tmp_path / "film")
    start = (tmp_path / "film").read_bytes()
    length = int.from_bytes(start[:8], "little")
    metadata = json.loads(json.loads(start[8 : 8 + length])["__metadata__"][header.KEY])
    assert metadata["format_version"] == 2
    monkeypatch.setattr(header, "FORMAT_VERSION", 1)
    with pytest.raises(SessionError, match=r"written by a newer tieredkv \(format 2\): update"):
        header.read(tmp_path / "film")
