"""Records in a file: the same as in memory, whatever is written, opened and read; and what goes wrong."""

import errno
import os
import resource
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tieredkv.errors import OutputError, TieredKVError
from tieredkv.memory import disk_reads
from tieredkv.memory.arena import MemoryArena
from tieredkv.memory.disk import DiskArena
from tieredkv.memory.disk_reads import Readers

HEADS, BYTES = 3, 16


@pytest.fixture
def readers():
    readers = Readers()
    yield readers
    readers.close()


def records(chunks, seed=0):
    return torch.randint(
        0, 256, (HEADS, chunks, BYTES), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def arena_of(tmp_path, readers, content=None, memory_bytes=0):
    arena = DiskArena.temporary(tmp_path, HEADS, BYTES, readers, memory_bytes)
    if content is not None:
        arena.reserve(content.shape[1])
        arena.write(0, content)
    return arena


def all_of(arena, chunks):
    heads, numbers = torch.meshgrid(torch.arange(HEADS), torch.arange(chunks), indexing="ij")
    return arena.fetch(heads.flatten(), numbers.flatten()).view(HEADS, chunks, BYTES)


def test_what_was_written_is_read_staged_and_fetched(tmp_path, readers):
    content = records(50)
    arena = arena_of(tmp_path, readers, content, memory_bytes=2_000)
    assert torch.equal(arena.read(3, 50), content[:, 3:])
    staged = torch.empty((HEADS, 20, BYTES), dtype=torch.uint8)
    arena.stage(10, 30, staged)
    assert torch.equal(staged, content[:, 10:30])
    assert torch.equal(all_of(arena, 50), content)
    arena.close()


def test_rows_of_a_larger_buffer_are_staged(tmp_path, readers):
    content = records(8)
    arena = arena_of(tmp_path, readers, content)
    target = torch.zeros((HEADS, 10, BYTES), dtype=torch.uint8)
    arena.stage(2, 8, target[:, 1:7])
    assert torch.equal(target[:, 1:7], content[:, 2:])
    assert not target[:, [0, 7, 8, 9]].any()


def test_reads_larger_than_a_piece_are_whole(tmp_path, readers, monkeypatch):
    monkeypatch.setattr(disk_reads, "PIECE", 5 * BYTES)
    monkeypatch.setattr("tieredkv.memory.disk.PIECE", 5 * BYTES)
    content = records(64)
    arena = arena_of(tmp_path, readers, content, memory_bytes=3_000)
    assert torch.equal(arena.read(0, 64), content)
    assert torch.equal(all_of(arena, 64), content)


def test_growing_keeps_what_was_written(tmp_path, readers):
    first, more = records(7, 1), records(9, 2)
    arena = arena_of(tmp_path, readers, first)
    arena.reserve(16)
    arena.write(7, more)
    assert arena.capacity == 16
    assert torch.equal(arena.read(0, 16), torch.cat((first, more), dim=1))
    assert torch.equal(all_of(arena, 16), torch.cat((first, more), dim=1))


def test_records_used_before_are_not_read_again(tmp_path, readers):
    arena = arena_of(tmp_path, readers, records(50), memory_bytes=100_000)
    all_of(arena, 50)
    read, heads = readers.counts.read_bytes, torch.tensor([0, 2, 2])
    arena.fetch(heads, torch.tensor([1, 7, 7]))
    assert (readers.counts.read_bytes, readers.counts.hits, readers.counts.misses) == (read, 3, HEADS * 50)


def test_a_record_asked_for_twice_is_read_once(tmp_path, readers):
    content = records(10)
    arena = arena_of(tmp_path, readers, content)
    out = arena.fetch(torch.tensor([1, 1, 0]), torch.tensor([4, 4, 4]))
    assert torch.equal(out, content[[1, 1, 0], 4])
    assert readers.counts.read_bytes == 2 * BYTES


def test_neighbours_are_one_read(tmp_path, readers, monkeypatch):
    arena, reads = arena_of(tmp_path, readers, records(20)), []
    monkeypatch.setattr(readers, "read", lambda file, these: reads.extend((len(r.target), r.offset) for r in these))
    arena.fetch(torch.tensor([0, 1, 1, 1, 0]), torch.tensor([5, 9, 8, 10, 2]))
    assert reads == [(BYTES, 2 * BYTES), (BYTES, 5 * BYTES), (3 * BYTES, (20 + 8) * BYTES)]


def test_sequential_reads_do_not_displace_recent_records(tmp_path, readers):
    arena = arena_of(tmp_path, readers, records(200), memory_bytes=5_000)
    index = torch.zeros(5, dtype=torch.int64), torch.arange(5)
    arena.fetch(*index)
    arena.read(0, 200)
    arena.fetch(*index)
    assert readers.counts.hits == 5


def test_an_open_chunk_is_read_with_what_was_put_into_it(tmp_path, readers):
    arena = arena_of(tmp_path, readers, records(4))
    arena.reserve(6)
    arena.open(4)[:, 3] = 9
    assert (arena.read(4, 5)[:, 0, 3] == 9).all()
    assert (arena.fetch(torch.tensor([2]), torch.tensor([4]))[0, 3] == 9).all()
    arena.open(5)[:, 1] = 8
    assert (arena.read(4, 6)[:, 0, 3] == 9).all()
    assert (arena.read(5, 6)[:, 0, 1] == 8).all()


def test_a_chunk_opened_again_has_its_contents(tmp_path, readers):
    content = records(4)
    arena = arena_of(tmp_path, readers, content, memory_bytes=10_000)
    all_of(arena, 4)
    opened = arena.open(2)
    assert torch.equal(opened, content[:, 2])
    opened[:, 0] = 77
    assert (all_of(arena, 4)[:, 2, 0] == 77).all()
    arena.open(3)
    assert (all_of(arena, 4)[:, 2, 0] == 77).all()


def test_after_a_freeze_the_file_is_not_written(tmp_path, readers, monkeypatch):
    content, more = records(6, 1), records(3, 2)
    arena = arena_of(tmp_path, readers, content, memory_bytes=5_000)
    arena.freeze(4)
    monkeypatch.setattr(os, "pwrite", None)
    assert torch.equal(arena.read(0, 5), content[:, :5])
    arena.reserve(8)
    arena.write(5, more)
    arena.open(4)[:] = 1
    expected = torch.cat((content[:, :4], torch.ones_like(content[:, :1]), more), dim=1)
    assert torch.equal(arena.read(0, 8), expected)
    assert torch.equal(all_of(arena, 8), expected)


def test_frozen_chunks_can_be_written_over(tmp_path, readers):
    content = records(6, 1)
    arena = arena_of(tmp_path, readers, content, memory_bytes=5_000)
    arena.freeze(6)
    all_of(arena, 6)
    arena.write(2, content[:, :4])
    assert torch.equal(all_of(arena, 6), content[:, [0, 1, 0, 1, 2, 3]])


def test_a_shrunk_arena_keeps_the_chunks_that_remain(tmp_path, readers):
    content = records(6)
    arena = arena_of(tmp_path, readers, content)
    arena.freeze(3)
    arena.open(3)[:] = content[:, 3]
    arena.shrink(4)
    assert arena.capacity == 4
    assert torch.equal(arena.read(0, 4), content[:, :4])


@pytest.mark.parametrize("reserved", [(6, 9), (9,), (12,)])
def test_the_whole_is_mapped_with_what_is_in_memory(tmp_path, readers, reserved):
    content = records(9)
    arena = arena_of(tmp_path, readers)
    for chunks in reserved:
        arena.reserve(chunks)
    arena.write(0, content[:, :7])
    arena.freeze(7)
    arena.write(7, content[:, 7:])
    arena.shrink(9)
    whole = arena.whole()
    assert whole.is_contiguous()
    assert torch.equal(whole[:, :9], content)
    whole[:] = 0
    assert torch.equal(arena.read(0, 9), content)
    arena.close()
    assert not whole.any()


def test_the_whole_of_a_stored_tensor_is_mapped(tmp_path, readers):
    content, path = records(300), tmp_path / "file"
    path.write_bytes(bytes(5_001) + content.numpy().tobytes())
    arena = DiskArena.stored(FileOfTest(path), tmp_path, 5_001, tuple(content.shape), 299, readers, 0)
    arena.open(299)[:] = 3
    assert torch.equal(arena.whole()[:, :299], content[:, :299])
    assert (arena.whole()[:, 299] == 3).all()


def test_less_memory_leaves_less_for_recent_records(tmp_path, readers):
    content = records(200)
    arena = arena_of(tmp_path, readers, content, memory_bytes=9_000)
    all_of(arena, 200)
    assert 5_000 < arena.nbytes <= 9_000
    arena.set_memory(5_000)
    assert torch.equal(all_of(arena, 200), content)
    assert 2_000 < arena.nbytes <= 5_000
    arena.set_memory(0)
    assert torch.equal(all_of(arena, 200), content)
    assert arena.nbytes == 0


def test_chunks_in_memory_take_from_that_of_recent_records(tmp_path, readers):
    content = records(200)
    arena = arena_of(tmp_path, readers, content, memory_bytes=9_000)
    all_of(arena, 200)
    arena.freeze(200)
    arena.reserve(300)
    all_of(arena, 200)
    assert 4_800 < arena.nbytes <= 9_000
    arena.reserve(500)
    assert torch.equal(all_of(arena, 200), content)
    assert arena.nbytes == HEADS * 300 * BYTES


steps = st.one_of(
    st.tuples(st.just("write"), st.integers(0, 20), st.integers(1, 6)),
    st.tuples(st.just("open"), st.integers(0, 20), st.integers(0, BYTES - 1)),
    st.tuples(st.just("freeze"), st.integers(0, 20), st.just(0)),
    st.tuples(st.just("fetch"), st.integers(0, 20), st.integers(1, 6)),
)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2_500), st.lists(steps, max_size=20))
def test_it_holds_what_an_arena_in_memory_holds(tmp_path_factory, memory_bytes, steps):
    """After any writes at the end of a prompt that may be cut before."""
    readers = Readers()
    arena, memory, length = (
        arena_of(tmp_path_factory.mktemp("arena"), readers, None, memory_bytes),
        MemoryArena(HEADS, BYTES),
        0,
    )
    for number, (what, at, many) in enumerate(steps):
        at = min(at, length)
        if what == "write":
            for each in (arena, memory):
                each.reserve(at + many)
                each.write(at, records(many, number))
            length = at + many
        elif what == "open":
            for each in (arena, memory):
                each.reserve(at + 1)
                opened = each.open(at)
                if at == length:
                    opened[:] = 0
                opened[:, many] = number
            length = at + 1
        elif what == "freeze":
            arena.freeze(at)
            length = at + (at < length)
        elif length:
            heads, chunks = torch.arange(many) % HEADS, (at + 3 * torch.arange(many)) % length
            assert torch.equal(arena.fetch(heads, chunks), memory.fetch(heads, chunks))
        assert torch.equal(arena.read(0, length), memory.read(0, length))
    assert torch.equal(all_of(arena, length), memory.records[:, :length])
    arena.close()
    readers.close()


def test_earlier_chunks_are_read_while_later_ones_are_written(tmp_path, readers):
    content, failures = records(400), []
    arena = arena_of(tmp_path, readers)
    arena.reserve(400)
    arena.write(0, content[:, :10])

    def write():
        for chunk in range(10, 400):
            arena.open(chunk)[:] = content[:, chunk]

    def read():
        while writer.is_alive():
            if not torch.equal(arena.read(0, 10), content[:, :10]):
                failures.append(1)

    writer = threading.Thread(target=write)
    writer.start()
    read()
    writer.join()
    assert not failures
    assert torch.equal(arena.read(0, 400), content)


# ---- what a file is to others


def test_a_stored_tensor_is_read_and_never_written(tmp_path, readers):
    content, path = records(5), tmp_path / "file"
    path.write_bytes(b"header" + content.numpy().tobytes() + b"end")
    arena = DiskArena.stored(FileOfTest(path), tmp_path, 6, tuple(content.shape), 3, readers, 10_000)
    assert torch.equal(arena.read(0, 5)[:, :4], content[:, :4])
    arena.open(3)[:] = 1
    arena.write(4, content[:, :1])
    arena.reserve(7)
    assert arena.capacity == 7
    assert (all_of(arena, 4)[:, 3] == 1).all()
    assert path.read_bytes() == b"header" + content.numpy().tobytes() + b"end"


class FileOfTest:
    def __init__(self, path):
        self.descriptor, self.closed = os.open(path, os.O_RDONLY), False

    def check(self):
        pass

    def unreadable(self, reason):
        return TieredKVError(f"test: {reason}")

    def close(self):
        if not self.closed:
            os.close(self.descriptor)
            self.closed = True


def test_a_shortened_file_is_an_error(tmp_path, readers):
    content, path = records(50), tmp_path / "file"
    path.write_bytes(content.numpy().tobytes())
    arena = DiskArena.stored(FileOfTest(path), tmp_path, 0, tuple(content.shape), 50, readers, 10_000)
    os.truncate(path, 1_000)
    with pytest.raises(TieredKVError, match="ends too early"):
        arena.read(0, 50)
    with pytest.raises(TieredKVError, match="ends too early"):
        all_of(arena, 50)


def test_an_unreadable_file_is_an_error_with_its_reason(tmp_path, readers, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    arena = arena_of(tmp_path, readers, records(50))
    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(TieredKVError, match=r"disk of .* could not be read: Input/output error\. "):
        all_of(arena, 50)


def test_a_read_in_parts_is_whole(tmp_path, readers, monkeypatch):
    content, preadv = records(9), os.preadv
    arena = arena_of(tmp_path, readers, content)
    monkeypatch.setattr(os, "preadv", lambda fd, targets, offset: preadv(fd, [targets[0][:7]], offset))
    assert torch.equal(arena.read(0, 9), content)


@contextmanager
def longest_file(nbytes):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_that_may_not_be_so_long_is_an_error(tmp_path, readers):
    arena = arena_of(tmp_path, readers)
    with longest_file(4096), pytest.raises(OutputError, match=r"to the disk of .*: File too large\. Free"):
        arena.reserve(1_000)


def test_a_full_disk_is_an_error(tmp_path, readers, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    arena = arena_of(tmp_path, readers)
    arena.reserve(10)
    monkeypatch.setattr(os, "pwrite", fail)
    with pytest.raises(OutputError, match=f"disk of {tmp_path}: No space left on device. Free some"):
        arena.write(0, records(10))


def test_the_file_has_no_name(tmp_path, readers):
    arena = arena_of(tmp_path, readers, records(10))
    assert not list(tmp_path.iterdir())
    arena.close()


def descriptors():
    return len(os.listdir("/proc/self/fd"))


def test_closing_closes_the_file(tmp_path, readers):
    before = descriptors()
    arena = arena_of(tmp_path, readers, records(10), 1_000)
    assert descriptors() == before + 1
    arena.close()
    arena.close()
    assert descriptors() == before
    assert arena.nbytes == 0


def test_an_arena_that_nobody_holds_closes_its_file(tmp_path, readers):
    before = descriptors()
    arena_of(tmp_path, readers, records(10))
    assert descriptors() == before


@pytest.mark.subprocess
def test_a_forked_process_reads_the_file_and_does_not_write_it(tmp_path):
    """A child that wrote there would change what its parent reads."""
    code = f"""
import os, sys, torch
sys.path.insert(0, {os.path.dirname(__file__)!r})
from pathlib import Path
from test_disk_arena import *
readers = Readers()
content = records(40)
arena = arena_of(Path({str(tmp_path)!r}), readers, content, 3000)
assert torch.equal(all_of(arena, 40), content)
if (child := os.fork()) == 0:
    assert torch.equal(all_of(arena, 40), content)
    try:
        arena.write(0, content[:, 1:2])
    except TieredKVError as error:
        assert "forked" in str(error)
        arena.freeze(40)
        arena.reserve(41)
        arena.write(40, content[:, :1])
        assert torch.equal(all_of(arena, 41)[:, 40], content[:, 0])
        os._exit(7)
    os._exit(1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
assert torch.equal(all_of(arena, 40), content)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.subprocess
def test_a_kill_leaves_no_file(tmp_path):
    code = f"""
import os, sys
sys.path.insert(0, {os.path.dirname(__file__)!r})
from pathlib import Path
from test_disk_arena import *
arena = arena_of(Path({str(tmp_path)!r}), Readers(), records(40))
print("written", flush=True)
sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "written\n"
        process.send_signal(signal.SIGKILL)
    assert not list(tmp_path.iterdir())
