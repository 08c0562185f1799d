"""Available host memory: every control group counts, and a refusal states the sizes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from tieredkv.errors import BudgetError
from tieredkv.memory import limits
from tieredkv.memory.units import GIB


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """A machine with 10 GiB available."""
    monkeypatch.setattr(limits.psutil, "virtual_memory", lambda: SimpleNamespace(available=10 * GIB))


def write_group(folder: Path, version: int, limit: str, used: int, reclaimable: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = limits.VERSION_2 if version == 2 else limits.VERSION_1
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {reclaimable}\nslab 1\n")


def available(tmp_path: Path, groups: str) -> int:
    proc = tmp_path / "proc_cgroup"
    proc.write_text(groups)
    return limits.available_host_bytes(proc, tmp_path / "cgroup")


@pytest.mark.parametrize(
    ("version", "line", "mount"), [(2, "0::/a/b\n", ""), (1, "7:cpu:/x\n4:hugetlb,memory:/a/b\n", "memory")]
)
class TestOneGroup:
    def test_the_unused_part_of_its_limit_is_available(self, tmp_path, version, line, mount):
        write_group(tmp_path / "cgroup" / mount / "a" / "b", version, str(6 * GIB), 2 * GIB)
        assert available(tmp_path, line) == 4 * GIB

    def test_page_cache_that_can_be_dropped_is_free(self, tmp_path, version, line, mount):
        write_group(tmp_path / "cgroup" / mount / "a" / "b", version, str(6 * GIB), 2 * GIB, GIB)
        assert available(tmp_path, line) == 5 * GIB

    def test_the_tightest_of_all_ancestors_counts(self, tmp_path, version, line, mount):
        write_group(tmp_path / "cgroup" / mount / "a" / "b", version, str(6 * GIB), 2 * GIB)
        write_group(tmp_path / "cgroup" / mount / "a", version, str(6 * GIB), 3 * GIB)
        write_group(tmp_path / "cgroup" / mount, version, str(4 * GIB), 3 * GIB)
        assert available(tmp_path, line) == GIB

    def test_a_group_over_its_limit_leaves_nothing(self, tmp_path, version, line, mount):
        write_group(tmp_path / "cgroup" / mount / "a" / "b", version, str(GIB), 2 * GIB)
        assert available(tmp_path, line) == 0

    def test_a_path_on_the_host_still_finds_the_root_seen_in_a_container(self, tmp_path, version, line, mount):
        write_group(tmp_path / "cgroup" / mount, version, str(4 * GIB), GIB)
        assert available(tmp_path, line) == 3 * GIB


@pytest.mark.parametrize("version", [1, 2])
def test_a_group_without_a_limit_leaves_what_the_machine_has(tmp_path, version):
    unlimited = "max" if version == 2 else str(2**63 - 4096)
    write_group(tmp_path / "cgroup" / ("" if version == 2 else "memory"), version, unlimited, GIB)
    assert available(tmp_path, "0::/\n" if version == 2 else "4:memory:/\n") == 10 * GIB


@pytest.mark.parametrize("groups", ["", "nonsense\n", "0::/gone\n", "0::/../../up\n", "4:cpu:/a\n"])
def test_missing_files_set_no_limit(tmp_path, groups):
    assert available(tmp_path, groups) == 10 * GIB
    assert limits.available_host_bytes(tmp_path / "absent", tmp_path) == 10 * GIB


def test_files_that_cannot_be_parsed_set_no_limit(tmp_path):
    write_group(tmp_path / "cgroup", 2, "much", GIB)
    assert available(tmp_path, "0::/\n") == 10 * GIB


def test_this_machine_has_memory_available():
    assert 0 < limits.available_host_bytes() <= 10 * GIB


def test_the_budget_is_the_cap_or_a_safe_share():
    assert limits.host_budget_bytes(2.5, 10 * GIB) == int(2.5 * GIB)
    assert limits.host_budget_bytes(None, 10 * GIB) == int(limits.SAFE_SHARE * 10 * GIB)


@pytest.mark.parametrize(
    ("needed", "cap", "message"),
    [
        (5.2, 4, "A needs 5.2 GiB of host memory, host_kv_gb allows 4: B."),
        (4.0001, 4, "A needs 4.0001 GiB of host memory, host_kv_gb allows 4: B."),
        (12, 20, "A needs 12 GiB of host memory, 10 is available: B."),
        (12, 11, "A needs 12 GiB of host memory, 10 is available: B."),
        (9, None, "A needs 9 GiB of host memory, 8 may be used (80% of what is available): B."),
        (2000, None, "A needs 2000 GiB of host memory, 8 may be used (80% of what is available): B."),
    ],
)
def test_a_refusal_says_what_is_needed_and_what_is_available(needed, cap, message):
    with pytest.raises(BudgetError) as refused:
        limits.check_host(int(needed * GIB), cap, "A", "B", available=10 * GIB)
    assert str(refused.value) == message


@pytest.mark.parametrize(("needed", "cap"), [(4, 4), (9.5, 10), (8, None)])
def test_what_fits_is_not_refused(needed, cap):
    limits.check_host(int(needed * GIB), cap, "A", lambda allowed: pytest.fail("asked"), available=10 * GIB)


def test_a_remedy_may_be_a_function_of_the_allowed_bytes():
    with pytest.raises(BudgetError, match=f": give {4 * GIB} bytes"):
        limits.check_host(5 * GIB, 4, "A", lambda allowed: f"give {allowed} bytes", available=10 * GIB)
