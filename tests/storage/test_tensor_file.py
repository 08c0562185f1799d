"""A file of tensors is whole or refused, whatever happens to the disk, the bytes or the process."""

from __future__ import annotations

import errno
import json
import re
import resource
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from tieredkv.errors import SessionError
from tieredkv.storage import atomic, header, tensor_file

MANIFEST = {"question": "what is täglich?", "steps": [1, 2.5, None], "nested": {"a": True}}


def _tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "keys": torch.randn(3, 5, 7).to(torch.bfloat16),
        "halves": torch.randn(9).to(torch.float16),
        "floats": torch.tensor([0.0, -0.0, float("nan"), float("inf")]),
        "tokens": torch.arange(11, dtype=torch.int32),
        "positions": torch.arange(6).view(2, 3),
        "mask": torch.tensor([True, False, True]),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "one": torch.tensor(7.0),
        "none": torch.empty(0, 4),
    }


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    bits = [x.reshape(-1).view(torch.uint8) for x in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "clip.kv"


@pytest.fixture
def saved(path: Path) -> Path:
    tensor_file.write(path, MANIFEST, _tensors())
    return path


def _load(path: Path) -> tensor_file.Stored:
    stored = tensor_file.read(path)
    stored.verify()
    return stored


def test_what_is_written_is_read_back(path: Path) -> None:
    written, checksum = tensor_file.write(path, MANIFEST, _tensors())
    stored = _load(path)
    assert written == path.stat().st_size == stored.nbytes
    assert checksum == stored.checksum
    assert stored.manifest == MANIFEST
    assert stored.path == path
    assert stored.names == sorted(_tensors())
    for name, tensor in _tensors().items():
        assert _same(stored.tensor(name), tensor), name


def test_a_file_may_hold_no_tensors(path: Path) -> None:
    tensor_file.write(str(path), {}, {})
    assert _load(path).names == []


def test_other_programs_can_open_it(saved: Path) -> None:
    with safe_open(saved, framework="pt") as file:
        assert json.loads(file.metadata()["tieredkv"])["format_version"] == tensor_file.FORMAT_VERSION
        assert _same(file.get_tensor("keys"), _tensors()["keys"])


def test_slices_of_one_buffer_are_written_separately(path: Path) -> None:
    buffer = torch.arange(10, dtype=torch.float32)
    tensor_file.write(path, {}, {"a": buffer[:4], "b": buffer[4:]})
    assert _same(_load(path).tensor("b"), buffer[4:])


@pytest.mark.parametrize(
    "tensor", [torch.zeros(4, 4).T[:2], torch.zeros(2, device="meta"), torch.zeros(2, dtype=torch.complex64)]
)
def test_tensors_it_cannot_hold_are_refused(path: Path, tensor: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="give contiguous CPU tensors"):
        tensor_file.write(path, {}, {"a": tensor})
    assert not list(path.parent.iterdir())


@pytest.mark.parametrize("name", ["tieredkv.seal", "__metadata__"])
def test_names_of_the_format_are_refused(path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"cannot be named '{name}'"):
        tensor_file.write(path, {}, {name: torch.zeros(1)})


def test_a_manifest_json_cannot_hold_is_refused(saved: Path) -> None:
    with pytest.raises(TypeError):
        tensor_file.write(saved, {"a": object()}, {})
    assert _load(saved).manifest == MANIFEST


def test_progress_counts_up_to_all_bytes(path: Path) -> None:
    calls: list[tuple[int, int | None]] = []
    tensor = torch.zeros(1_000_000)
    tensor_file.write(path, {}, {"a": tensor}, lambda done, total: calls.append((done, total)))
    assert calls == sorted(calls)
    assert calls[-1] == (tensor.nbytes, tensor.nbytes)


def test_the_mode_follows_the_umask(saved: Path) -> None:
    plain = saved.with_name("plain")
    plain.touch()
    assert saved.stat().st_mode == plain.stat().st_mode


# Damage


def _refused(path: Path) -> None:
    """Neither passes nor raises anything but the error that names the file."""
    with pytest.raises(SessionError, match=path.name):
        _load(path)


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of an undamaged file."""
    path = tmp_path_factory.mktemp("raw") / "clip.kv"
    tensor_file.write(path, MANIFEST, _tensors())
    return path.read_bytes()


def test_a_flipped_bit_in_any_byte_is_noticed(path: Path, raw: bytes) -> None:
    for place in range(len(raw)):
        path.write_bytes(raw[:place] + bytes([raw[place] ^ 1 << place % 8]) + raw[place + 1 :])
        _refused(path)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_other_bytes_are_noticed(path: Path, raw: bytes, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(raw) - 1))
    other = data.draw(st.binary(min_size=1, max_size=12))
    changed = raw[:start] + other + raw[start + len(other) :]
    if changed != raw:
        path.write_bytes(changed)
        _refused(path)


def test_header_damage_is_noticed_when_read_and_tensor_damage_when_verified(saved: Path) -> None:
    raw = saved.read_bytes()
    saved.write_bytes(raw.replace(b"nested", b"nestet"))
    with pytest.raises(SessionError, match="header does not match"):
        tensor_file.read(saved)
    saved.write_bytes(raw[:-1] + b"\x07")  # the last tensor is the one of bools
    stored = tensor_file.read(saved)
    stored.verify("keys", "tokens")
    with pytest.raises(SessionError, match=r"clip\.kv is damaged: 'mask'"):
        stored.verify()


def test_any_truncation_is_noticed_when_read(path: Path, raw: bytes) -> None:
    for length in range(len(raw)):
        path.write_bytes(raw[:length])
        with pytest.raises(SessionError, match=path.name):
            tensor_file.read(path)


def test_appended_bytes_are_noticed_when_read(saved: Path) -> None:
    saved.write_bytes(saved.read_bytes() + b"\0")
    with pytest.raises(SessionError, match="bytes instead of"):
        tensor_file.read(saved)


@pytest.mark.parametrize(
    "content", [b"hello", bytes(8), bytes(4096), b"\x02" + bytes(7) + b"{}", b"\0\0\0\x18ftypmp42" * 9]
)
def test_other_kinds_of_file_are_refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(SessionError, match=r"is not a tieredkv file|is cut short"):
        tensor_file.read(path)


def test_deep_nesting_is_refused(path: Path) -> None:
    deep = b'{"a":' * 100_000
    path.write_bytes(len(deep).to_bytes(8, "little") + deep)
    with pytest.raises(SessionError, match="is not a tieredkv file"):
        tensor_file.read(path)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"tieredkv": "1"}, {"tieredkv": "{}"}])
def test_safetensors_of_another_program_are_refused(path: Path, metadata: Any) -> None:
    save_file({"weight": torch.zeros(4)}, path, metadata=metadata)
    with pytest.raises(SessionError, match="is not a tieredkv file"):
        tensor_file.read(path)


def test_a_newer_format_asks_for_an_update(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_file, "FORMAT_VERSION", 7)
    tensor_file.write(path, {}, {})
    monkeypatch.undo()
    with pytest.raises(SessionError, match=r"written by a newer tieredkv \(format 7\): update"):
        tensor_file.read(path)


def test_missing_files_and_tensors_are_reported(tmp_path: Path, saved: Path) -> None:
    with pytest.raises(SessionError, match="no such file"):
        tensor_file.read(tmp_path / "other.kv")
    with pytest.raises(SessionError, match="is not a file"):
        tensor_file.read(tmp_path)
    with pytest.raises(SessionError, match="cannot be read: File name too long"):
        tensor_file.read(tmp_path / ("x" * 300))
    for ask in (tensor_file.read(saved).tensor, tensor_file.read(saved).verify):
        with pytest.raises(SessionError, match="holds no tensor 'values'"):
            ask("values")


# Mapping


@pytest.mark.subprocess
def test_reading_maps_and_does_not_read(path: Path) -> None:
    tensor_file.write(path, {}, {"a": torch.ones(25_000_000)})
    code = """
import sys, psutil, torch
from tieredkv.storage import tensor_file
resident = lambda: psutil.Process().memory_info().rss
torch.ones(10)[::5].tolist()  # what torch itself loads at first use
before = resident()
tensor = tensor_file.read(sys.argv[1]).tensor("a")
assert tensor[::5_000_000].tolist() == [1.0] * 5
print((resident() - before) / 2**20)
"""
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 50  # of 95 MiB; the system may read ahead around what is touched


def test_writing_into_a_tensor_leaves_the_file_alone(saved: Path) -> None:
    stored, other = tensor_file.read(saved), tensor_file.read(saved)
    stored.tensor("keys").zero_()
    assert not stored.tensor("keys").any()
    other.verify()
    assert _same(_load(saved).tensor("keys"), _tensors()["keys"])


def test_a_mapped_tensor_outlives_its_file(saved: Path) -> None:
    stored = tensor_file.read(saved)
    tensor = stored.tensor("tokens")
    tensor_file.write(saved, {}, {"tokens": torch.zeros(11, dtype=torch.int32)})
    stored.verify()
    del stored
    saved.unlink()
    assert _same(tensor, _tensors()["tokens"])


def test_a_file_can_be_saved_from_its_own_mapping(saved: Path) -> None:
    stored = tensor_file.read(saved)
    tensor_file.write(saved, {"again": 1}, {name: stored.tensor(name) for name in stored.names})
    assert all(_same(_load(saved).tensor(name), tensor) for name, tensor in _tensors().items())


# Writing that fails


def _only_the_old(path: Path) -> bool:
    return list(path.parent.iterdir()) == [path] and _load(path).manifest == MANIFEST


def _fail(error: Exception) -> Any:
    def save(tensors: Any, filename: Path, metadata: Any) -> None:
        filename.write_bytes(b"half")
        filename.with_name(".tmp123").write_bytes(b"half")
        raise error

    return save


def test_a_full_disk_leaves_the_old_file(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_file, "save_file", _fail(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(SessionError, match=r"clip\.kv could not be written: No space left on device"):
        tensor_file.write(saved, {}, {})
    assert _only_the_old(saved)


def test_any_failure_leaves_the_old_file(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_file, "save_file", _fail(RuntimeError("other")))
    with pytest.raises(RuntimeError, match="other"):
        tensor_file.write(saved, {}, {})
    assert _only_the_old(saved)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_failing_late_leaves_the_old_file(saved: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(atomic.os, call, fail)
    with pytest.raises(SessionError, match="Input/output error"):
        tensor_file.write(saved, {}, {})
    assert _only_the_old(saved)


def test_a_limit_on_file_size_leaves_the_old_file(saved: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(SessionError, match="could not be written: File too large"):
            tensor_file.write(saved, {}, {"a": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert _only_the_old(saved)


def test_an_exception_of_progress_cancels_the_writing(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = threading.Event()
    monkeypatch.setattr(tensor_file, "save_file", lambda *_: stopped.wait(60))

    def stop(done: int, total: int | None) -> None:
        stopped.set()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tensor_file.write(saved, {}, {}, stop)
    assert _only_the_old(saved)


def test_too_little_space_for_the_tensors_is_reported_before_writing(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = atomic.shutil.disk_usage(saved.parent)._replace(free=2**20)
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(tensor_file, "save_file", lambda *_: pytest.fail("something was written"))
    with pytest.raises(SessionError, match=r"needs 3.81 MiB of disk, 1 MiB free"):
        tensor_file.write(saved, {}, {"a": torch.zeros(1_000_000)})
    assert _only_the_old(saved)


@pytest.mark.parametrize("name", [".", "missing/clip.kv", "half \ud83d.kv", "x" * 250])
def test_a_target_that_cannot_be_written_is_a_session_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(SessionError) as refusal:
        header.check_target(tmp_path / name)
    with pytest.raises(SessionError, match=re.escape(str(refusal.value))):
        tensor_file.write(tmp_path / name, {}, {})
    assert not list(tmp_path.iterdir())


def test_threads_may_save_one_path_at_a_time(path: Path) -> None:
    errors: list[BaseException] = []

    def save(value: int) -> None:
        try:
            for _ in range(5):
                tensor_file.write(path, {"value": value}, {"a": torch.full((50_000,), value)})
        except BaseException as error:  # noqa: BLE001 - reported by the test
            errors.append(error)

    threads = [threading.Thread(target=save, args=(value,)) for value in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    stored = _load(path)
    assert bool((stored.tensor("a") == stored.manifest["value"]).all())


KILLS = """
import json, os, signal, sys, threading
from pathlib import Path
import torch
from tieredkv.storage import tensor_file

path = Path(sys.argv[1])
content = {name: torch.full((2_000_000,), value) for value, name in enumerate(("old", "new"), start=1)}
save = lambda name: tensor_file.write(path, {"is": name}, {"a": content[name], "b": content[name][:1000].clone()})
die = lambda: os.kill(os.getpid(), signal.SIGKILL)

def at_event(number):  # of opening, making a folder, renaming, removing, ...
    left = number
    def count(*event):
        nonlocal left
        left -= 1
        if left == 0:
            die()
    sys.addaudithook(count)

def at_share(share):  # of the bytes written
    pattern = f"{path.name}.{os.getpid()}-*.part"
    least = share * content["new"].nbytes
    def watch():
        while not any(tensor_file._written(part) >= least for part in path.parent.glob(pattern)):
            pass
        die()
    threading.Thread(target=watch, daemon=True).start()

def killed(arrange, value):
    if tensor_file.read(path).manifest["is"] == "new":
        save("old")
    child = os.fork()
    if not child:
        arrange(value)
        save("new")
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    stored = tensor_file.read(path)
    stored.verify()
    found = stored.manifest["is"]
    assert torch.equal(stored.tensor("a"), content[found]) and stored.names == ["a", "b"]
    counts[found] += 1
    counts["torn"] += len(os.listdir(path.parent)) > 1
    return code == -signal.SIGKILL

counts, event = {"old": 0, "new": 0, "torn": 0}, 1
save("old")
while killed(at_event, event):
    event += 1
for tenth in range(10):
    killed(at_share, tenth / 10)
save("old")
print(json.dumps({"counts": counts, "events": event, "files": os.listdir(path.parent)}))
"""


@pytest.mark.subprocess
def test_a_kill_at_any_moment_leaves_the_old_file_or_the_new(path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLS, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert min(report["counts"].values()) >= 1, report  # torn: killed while writing
    assert report["files"] == [path.name]  # what the killed ones left is gone
