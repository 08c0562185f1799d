"""Sessions whose cache exceeds host_kv_gb: on disk, with the same answers; saved, loaded, refused, killed."""

from __future__ import annotations

import gc
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import assert_near, pressed, session_logits, tier_options

import tieredkv
from tieredkv.api import new_session
from tieredkv.errors import BudgetError, OutputError, SessionError, TieredKVError
from tieredkv.memory import disk_tier, limits
from tieredkv.memory.units import GIB
from tieredkv.models.kv_shape import model_shape
from tieredkv.planning.disk_plan import least_bytes
from tieredkv.planning.sizes import host_bytes
from tieredkv.session import checkpoint, on_disk
from tieredkv.session.checkpoint import Checkpoint
from tieredkv.video.sampling import Sampling

STAR, MOON = "what colour was the star ?", "follow the moon for 4 ?"
LONG = " ".join(["what", "colour", "was", "the", "star", "?"] * 60)
TIGHT = {"chunk_tokens": 8, "recent_window": 16, "theta": 0.4}
FRAMES = 560
TOKENS = 2 * FRAMES + 40


@pytest.fixture(scope="module")
def film():
    return np.random.default_rng(3).integers(0, 256, (FRAMES, 56, 56, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where temporary files go."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(on_disk, "temporary_folder", lambda: folder)
    return folder


@pytest.fixture
def sizes(video_model):
    """`sizes(bits)`: the least `host_kv_gb` with which the film's cache is in memory, and on disk."""

    def of(bits):
        shape, tiers = model_shape(video_model.config, video_model.dtype), tieredkv.TierConfig(chunk_tokens=8)
        of_them = host_bytes(shape, tiers, TOKENS, bits), least_bytes(shape, tiers, TOKENS, bits)
        return SimpleNamespace(memory=of_them[0] / GIB, disk=of_them[1] / GIB)

    return of


@pytest.fixture
def opened(video_model, processor, film, folder, sizes):
    """`opened(bits, on_disk)`: a session, with half as much again as the least host memory if it is on disk."""
    sessions = []

    def open_one(bits=16, on_disk=True, **options):
        host = sizes(bits).disk * 1.5 if on_disk else None
        options = {"host_kv_gb": host, "host_kv_bits": bits, **TIGHT, **pressed(video_model, TOKENS, 0.3), **options}
        sessions.append(tieredkv.open_session(video_model, film, processor=processor, fps=4, **tier_options(**options)))
        return sessions[-1]

    yield open_one
    for session in sessions:
        session.close()


def is_on_disk(session):
    return session._cached.cache.device_tier.disk is not None


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_answers_are_those_of_the_same_cache_in_memory(opened, bits):
    """To the bit."""
    in_memory, disk = opened(bits, on_disk=False), opened(bits)
    assert not is_on_disk(in_memory)
    assert is_on_disk(disk)
    for question in (STAR, MOON, LONG, STAR):
        assert torch.equal(session_logits(disk, question, 8), session_logits(in_memory, question, 8))


@pytest.mark.parametrize("bits", [16, 4])
def test_a_conversation_is_that_of_the_same_cache_in_memory(opened, sizes, bits):
    in_memory, disk = opened(bits, on_disk=False), opened(bits, host_kv_gb=sizes(bits).memory * 0.9)
    assert is_on_disk(disk)
    for question in (STAR, LONG, MOON):
        answers = [session.chat(question, max_new_tokens=6) for session in (disk, in_memory)]
        assert answers[0].token_ids == answers[1].token_ids
        assert answers[0].evidence.moments == answers[1].evidence.moments


def test_what_a_conversation_keeps_gives_way_on_disk_too(opened):
    disk, in_memory = opened(), opened(on_disk=False)
    for question in (STAR, LONG, MOON):
        answers = [session.chat(question, max_new_tokens=6) for session in (disk, in_memory)]
        assert answers[0].token_ids == answers[1].token_ids
    assert disk._conversation.nbytes == 0
    assert in_memory._conversation.nbytes > 0


def test_host_memory_stays_within_its_limit(opened):
    disk = opened()
    for question in (STAR, LONG, STAR):
        assert 0 < disk.ask(question, max_new_tokens=4).stats.kv_host_bytes <= disk.tiers.host_kv_gb * GIB


def test_what_was_read_is_counted(opened):
    disk, in_memory = opened(), opened(on_disk=False)
    first, second = (disk.ask(STAR, max_new_tokens=8).stats for _ in range(2))
    assert first.disk_read_bytes > second.disk_read_bytes > 0
    assert 0 <= first.disk_hit_rate < second.disk_hit_rate < 1
    stats = in_memory.ask(STAR, max_new_tokens=8).stats
    assert (stats.disk_read_bytes, stats.disk_hit_rate) == (0, None)
    assert second.as_dict()["disk_read_bytes"] == second.disk_read_bytes


# ---- files


def files(*folders):
    return sorted(path.name for folder in folders for path in Path(folder).rglob("*") if path.is_file())


def descriptors(folder):
    """Open files, nameless ones too, of a folder."""
    links = Path("/proc/self/fd").iterdir()
    return [target for link in links if (target := os.path.realpath(link)).startswith(f"{folder}{os.sep}")]


def test_closing_closes_every_file(opened, folder):
    session = opened()
    assert descriptors(folder)
    session.ask(STAR, max_new_tokens=2)
    assert not files(folder)
    session.close()
    assert not descriptors(folder)


def test_the_file_is_beside_the_session_that_is_to_be_saved(video_model, processor, film, folder, sizes, tmp_path):
    options = {"host_kv_gb": sizes(16).disk * 1.5, "host_kv_bits": 16, **TIGHT, **pressed(video_model, TOKENS, 0.3)}
    own = tmp_path / "own"
    own.mkdir()
    with new_session(video_model, processor=processor, **tier_options(**options)) as session:
        session.ingest(film, Sampling(fps=4), save_to=own / "a.tkv")
        assert descriptors(own)
        assert not descriptors(folder)


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_a_saved_session_is_that_of_the_same_cache_in_memory(opened, bits, tmp_path, video_model, processor, sizes):
    """Wherever it is loaded: both files give the same answers on disk and in memory."""
    in_memory, disk = opened(bits, on_disk=False), opened(bits)
    answers = None
    for session, name in ((in_memory, "memory.tkv"), (disk, "disk.tkv")):
        session.save(tmp_path / name)
        for host in (None, sizes(bits).disk * 1.5):
            with tieredkv.load_session(tmp_path / name, video_model, processor=processor, host_kv_gb=host) as loaded:
                assert is_on_disk(loaded) == (host is not None)
                got = [session_logits(loaded, question, 6) for question in (STAR, LONG, MOON)]
                answers = answers or got
                assert all(torch.equal(*pair) for pair in zip(got, answers, strict=True))
    assert files(tmp_path) == ["disk.tkv", "memory.tkv"]


@pytest.fixture
def saved(opened, tmp_path, once):
    """The file of a session, and an answer of it."""
    if not once:
        session = opened(8)
        session.save(tmp_path / "a.tkv")
        session_logits(session, MOON, 2)
        once.extend(((tmp_path / "a.tkv").read_bytes(), session_logits(session, STAR, 6)))
        session.close()
    (tmp_path / "a.tkv").write_bytes(once[0])
    return tmp_path / "a.tkv", once[1]


@pytest.fixture(scope="module")
def once():
    """The bytes of that file and the answer, after the first test that needs them."""
    return []


@pytest.fixture
def load(video_model, processor, sizes):
    return lambda path: tieredkv.load_session(path, video_model, processor=processor, host_kv_gb=sizes(8).disk * 1.5)


def test_a_loaded_session_can_be_saved_again(saved, load, tmp_path):
    path, answer = saved
    with load(path) as session:
        session.ask(LONG, max_new_tokens=2)
        session.save(tmp_path / "b.tkv")
    assert (tmp_path / "b.tkv").stat().st_size == path.stat().st_size
    with load(tmp_path / "b.tkv") as session:
        assert torch.equal(session_logits(session, STAR, 6), answer)


def test_closing_a_loaded_session_closes_its_file(saved, load):
    path, _ = saved
    with load(path) as session:
        assert str(path) in descriptors(path.parent)
        session.ask(STAR, max_new_tokens=2)
    del session
    gc.collect()
    assert str(path) not in descriptors(path.parent)


@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("change", [lambda size: size // 2, lambda size: size - 1])
def test_a_shortened_session_file_is_an_error(saved, load, change, asked):
    path, _ = saved
    with load(path) as session:
        if asked:
            session.ask(STAR, max_new_tokens=2)
        os.truncate(path, change(path.stat().st_size))
        with pytest.raises(SessionError, match="was changed while it was in use"):
            session.ask(STAR, max_new_tokens=2)


def test_a_session_file_that_changes_during_an_answer_is_an_error(saved, load):
    """Found at the next read, before what was read is used."""
    path, _ = saved
    with load(path) as session:
        session.ask(STAR, max_new_tokens=2)

        def change(*_):
            with path.open("r+b") as file:
                file.seek(path.stat().st_size // 2)
                file.write(b"changed")
            os.utime(path, ns=(1, 1))
            return False

        with pytest.raises(SessionError, match="was changed while it was in use"):
            session.ask(MOON, max_new_tokens=8, stopping_criteria=[change])


def test_a_damaged_session_file_is_an_error(saved, load):
    path, _ = saved
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 3)
        file.write(b"damage")
    with load(path) as session, pytest.raises(SessionError, match="does not match its checksum"):
        session.ask(STAR, max_new_tokens=2)


@pytest.mark.parametrize("bits", [16, 4])
def test_an_ingest_that_was_interrupted_goes_on_on_disk(opened, bits, monkeypatch, tmp_path, folder, film):
    """With the answers of one that was not. The checkpoint needs no copy of the records in memory."""
    with opened(bits, prefill_chunk=256) as whole:
        answer = session_logits(whole, STAR, 4)
    monkeypatch.setattr(checkpoint, "is_due", lambda *seconds: True)
    write, written = Checkpoint.write, []

    def writing(self, *args):
        write(self, *args)
        written.append(1)
        if len(written) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Checkpoint, "write", writing)
        opened(bits, prefill_chunk=256, checkpoint=tmp_path / "film.checkpoint")
    assert not descriptors(folder)
    with opened(bits, prefill_chunk=256, checkpoint=tmp_path / "film.checkpoint") as session:
        assert session.ingest_stats.frames == len(film)
        assert torch.equal(session_logits(session, STAR, 4), answer)


# ---- what is refused


def test_less_than_the_least_is_refused_with_the_least_that_works(opened, sizes):
    with pytest.raises(BudgetError, match=r"the cache of [\d,]+ tokens needs .* the smallest that works is") as refused:
        opened(host_kv_gb=sizes(16).disk * 0.5)
    least = float(re.search(r"the smallest that works is ([\d.e-]+)", str(refused.value))[1])
    assert is_on_disk(opened(host_kv_gb=least))


def test_a_disk_without_room_is_refused_with_the_arithmetic(opened, folder, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(BudgetError, match=rf"host_kv_gb allows .*; or .* of disk, 1000 B free in {folder}: "):
        opened()
    assert not descriptors(folder)


def test_a_disk_without_room_for_cache_and_file_is_refused(video_model, processor, film, sizes, tmp_path, monkeypatch):
    options = {"host_kv_gb": sizes(16).disk * 1.5, "host_kv_bits": 16, **TIGHT, **pressed(video_model, TOKENS, 0.3)}
    free = int(1.5 * sizes(16).memory * GIB)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    with (
        new_session(video_model, processor=processor, **tier_options(**options)) as session,
        pytest.raises(SessionError, match=r"a\.tkv needs .* of disk"),
    ):
        session.ingest(film, Sampling(fps=4), save_to=tmp_path / "a.tkv")


def test_without_host_kv_gb_a_refusal_names_the_disk_as_a_way(opened, sizes, monkeypatch):
    monkeypatch.setattr(limits, "available_host_bytes", lambda: int(sizes(16).memory * GIB))
    with pytest.raises(BudgetError, match=r"host_kv_gb=[\d.e-]+ to keep the rest on disk"):
        opened(on_disk=False)


def test_a_disk_that_fills_during_the_ingest_is_one_sentence(opened, folder, monkeypatch):
    written, pwrite = [0], os.pwrite

    def full(descriptor, data, offset):
        written[0] += len(data)
        if written[0] > 200_000:
            raise OSError(28, os.strerror(28))
        return pwrite(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OutputError, match=rf"^keys and values .* disk of {folder}: No space left on device\. [^.]*\.$"):
        opened()
    monkeypatch.undo()
    gc.collect()
    assert not descriptors(folder)
    assert not files(folder)


def test_a_read_that_fails_is_one_sentence_and_the_session_goes_on(opened, folder, monkeypatch):
    session = opened()
    first = session_logits(session, STAR, 4)  # may still find tokens on the device, and read the past in other blocks
    answer = session_logits(session, STAR, 4)
    assert_near(first, answer)

    def fail(*_):
        raise OSError(5, os.strerror(5))

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", fail)
        with pytest.raises(TieredKVError, match=rf"disk of {folder} could not be read: Input/output error"):
            session.ask(MOON, max_new_tokens=4)
    assert torch.equal(session_logits(session, STAR, 4), answer)


# ---- kills

PROGRAM = """
import os, sys, numpy as np, torch
from pathlib import Path
from dataclasses import replace
import tieredkv
from tieredkv.memory import disk, disk_tier
from tieredkv.session import checkpoint, on_disk
from tieredkv.session.checkpoint import Checkpoint
from tieredkv.video.sampling import Sampling
from tieredkv.tiny.model import build_model, build_processor
folder, host = Path(sys.argv[1]), float(sys.argv[2])
on_disk.temporary_folder = lambda: folder
torch.manual_seed(1)
model, processor = build_model().eval(), build_processor()
model.generation_config.eos_token_id = None
film = np.random.default_rng(3).integers(0, 256, (560, 56, 56, 3), dtype=np.uint8)

def pause(*_):
    print(os.getpid(), flush=True)
    sys.stdin.read()

for when in ("ingest", "decoding"):  # each in a process of its own, forked after the slow imports
    if not os.fork():
        break
    os.wait()
else:
    sys.exit()
if when == "ingest":
    disk.TemporaryRecords.write = pause
session = tieredkv.open_session(model, film, processor=processor, fps=4, gpu_kv_gb=0.001, host_kv_gb=host,
                                host_kv_bits=16, chunk_tokens=8)
assert session._cached.cache.device_tier.disk is not None
session.ask("what colour was the star ?", max_new_tokens=4, stopping_criteria=[pause])
"""


@pytest.mark.subprocess
def test_a_kill_during_ingest_or_an_answer_leaves_no_file(folder, sizes):
    host = str(sizes(16).disk * 1.5)
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(folder), host],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        for _ in range(2):
            os.kill(int(process.stdout.readline()), signal.SIGKILL)
    assert process.returncode == 0
    assert not files(folder)


def test_the_system_s_folder_is_on_a_disk(tmp_path, monkeypatch):
    mounts = tmp_path / "mounts"
    mounts.write_text(f"disk / ext4 rw 0 0\ntmpfs {tmp_path} tmpfs rw 0 0\n")
    monkeypatch.setattr(disk_tier, "MOUNTS", mounts)
    monkeypatch.setattr(disk_tier.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.delenv("TMPDIR", raising=False)
    assert disk_tier.temporary_folder() == Path("/var/tmp")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert disk_tier.temporary_folder() == tmp_path
