"""The link's rate is measured by copies, once per machine; a file that is no good is no error."""

from __future__ import annotations

import json

import pytest
import torch

from tieredkv.memory import link
from tieredkv.planning import this_machine

CPU = torch.device("cpu")


class Wire:
    """Copies that take the seconds that a list says, the last of them from then on, and the clock that sees them."""

    def __init__(self, *seconds: float) -> None:
        self.now, self.seconds, self.copies = 0.0, list(seconds), 0

    def copy(self) -> None:
        self.now += self.seconds[min(self.copies, len(self.seconds) - 1)]
        self.copies += 1

    def clock(self) -> float:
        return self.now


def test_the_rate_is_that_of_the_fastest_copy_once_the_link_is_awake():
    wire = Wire(0.02, 0.02, 0.004, 0.002, 0.003)
    assert link.measure(wire.copy, 10**7, wire.clock) == pytest.approx(1e7 / 0.002 / 1e9)
    asleep = Wire(*[0.0011] * 28, 0.01)  # the first 28 take more than 0.03 s, and do not count
    assert link.measure(asleep.copy, 10**7, asleep.clock) == pytest.approx(1.0)


def test_a_clock_that_stands_still_while_a_copy_runs_does_not_divide_by_zero():
    times = iter([0.0, 1.0] + [2.0] * 16)
    assert link.measure(lambda: None, 10**6, lambda: next(times)) > 0


def test_a_machine_is_measured_once(tmp_path):
    file, measured = tmp_path / "new" / "links.json", []

    def measure():
        measured.append(True)
        return 24.5

    assert link.remembered(file, "one", measure) == link.remembered(file, "one", measure) == 24.5
    assert len(measured) == 1
    assert link.remembered(file, "other", lambda: 11.0) == 11.0
    assert json.loads(file.read_text()) == {"one": 24.5, "other": 11.0}
    assert [path.name for path in file.parent.iterdir()] == ["links.json"]


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe", b"[1]", b'{"one": "fast"}', b'{"one": -1}', b'{"one": true}', b'{"one": NaN}']
)
def test_a_damaged_file_is_measured_anew_and_replaced(tmp_path, content):
    file = tmp_path / "links.json"
    file.write_bytes(content)
    assert link.remembered(file, "one", lambda: 24.5) == 24.5
    assert json.loads(file.read_text()) == {"one": 24.5}


def test_where_nothing_can_be_written_it_is_measured_each_time(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    assert link.remembered(blocked / "links.json", "one", lambda: 24.5) == 24.5
    folder = tmp_path / "links.json"
    folder.mkdir()
    assert link.remembered(folder, "one", lambda: 24.5) == 24.5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "links.json"]


def test_the_file_is_in_the_users_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("TIEREDKV_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert link.cache_file() == tmp_path / "tieredkv" / "links.json"
    monkeypatch.setenv("TIEREDKV_CACHE", str(tmp_path / "mine"))
    assert link.cache_file() == tmp_path / "mine" / "links.json"


def test_nothing_is_measured_on_a_cpu(monkeypatch):
    monkeypatch.setattr(this_machine, "card_link_gb_s", lambda card: pytest.fail("a link was measured"))
    assert this_machine.machine_rates(CPU, None) is None
    assert this_machine.machine_rates(CPU, 12.5).link_gb_s == 12.5


def test_a_cards_memory_and_link_are_found_out_unless_the_link_is_given(monkeypatch):
    card = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GeForce RTX 3060")
    monkeypatch.setattr(this_machine, "memory_gb_s", lambda device: None)
    monkeypatch.setattr(this_machine, "card_link_gb_s", lambda device: 24.5)
    measured, given = (this_machine.machine_rates(card, rate) for rate in (None, 11.0))
    assert (measured.link_gb_s, given.link_gb_s) == (24.5, 11.0)
    assert measured.attention_gb_s == pytest.approx(0.8 * 360)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some Card")
    assert this_machine.machine_rates(card, None) is None
