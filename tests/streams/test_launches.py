"""How many launches a decoding step takes on a card, what it moves, and that every step uses the same memory."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from launches import decoded

from tieredkv.planning import ahead_time, step_time

RANKED = {"theta": 2.0}
UNRANKED = {"theta": 2.0, "gpu_kv_gb": 1.0, "budget_ratio": None}
ADAPTIVE = {"theta": 2.0, "adaptive": True}
REUSE = {"theta": 2.0, "reuse_above": 0.5, "prefetch": True}
BOXES = {"policy": "arkvale"}
LAUNCHES = {  # of one layer: torch's operations, and kernels
    "ranked":                       (RANKED, False, 0, 11),
    "ranked, evidence":             (RANKED, True, 0, 12),
    "ranked, 4 bits":               ({**RANKED, "host_kv_bits": 4}, False, 0, 12),
    "ranked, 4 bits, evidence":     ({**RANKED, "host_kv_bits": 4}, True, 0, 13),
    "adaptive":                     (ADAPTIVE, False, 0, 12),
    "adaptive, evidence":           (ADAPTIVE, True, 0, 13),
    "reuse, prefetch":              (REUSE, False, 21, 13),
    "reuse, prefetch, evidence":    (REUSE, True, 21, 14),
    "boxes of keys":                (BOXES, False, 30, 8),
    "boxes of keys, evidence":      (BOXES, True, 30, 9),
    "unranked":                     (UNRANKED, False, 0, 3),
    "unranked, evidence":           (UNRANKED, True, 0, 4),
    "unranked, 4 bits, evidence":   ({**UNRANKED, "host_kv_bits": 4}, True, 0, 5),
    "no dynamic head":              ({**UNRANKED, "theta": 0.0}, False, 0, 3),
}  # fmt: skip
FORESEEN = {  # for a layer's predicted query: on the main stream; on the second one torch's operations (norm 8,
    # projection 1, correction 2, rotation 5 and what ranking takes), and kernels with the copy
    "ranked":        (RANKED, 0, 16, 6),
    "adaptive":      (ADAPTIVE, 4, 16, 6),
    "boxes of keys": (BOXES, 0, 46, 5),
}  # fmt: skip


@pytest.mark.parametrize("name", FORESEEN)
def test_a_prediction_takes_so_many_launches(llama, long_ids, monkeypatch, name):
    """None for the first layer, which no other comes before. The rest of a step is as without predictions."""
    options, *want = FORESEEN[name]
    plain = decoded(monkeypatch, llama, long_ids, False, **options).steps[2]
    step = decoded(monkeypatch, llama, long_ids, False, **options, ahead=True).steps[2]
    assert all(step[part].launches == plain[part].launches for part in plain)
    assert step.keys() - plain.keys() <= {f"{part} {i}" for part in ("foreseen", "second stream") for i in (1, 2)}
    for index in (1, 2):
        main = len(step[f"foreseen {index}"].launches) if f"foreseen {index}" in step else 0
        second = step[f"second stream {index}"].launches
        kernels = sum(launch.startswith("[") for launch in second)
        got = [main, len(second) - kernels, kernels]
        assert got == want, f"{got}: {second}"


@pytest.mark.parametrize("name", LAUNCHES)
def test_a_layer_takes_so_many_launches(llama, long_ids, monkeypatch, name):
    options, evidence, *want = LAUNCHES[name]
    step = decoded(monkeypatch, llama, long_ids, evidence, **options).steps[2]
    for index in range(3):
        launches = step[f"layer {index}"].launches
        kernels = sum(name.startswith("[") for name in launches)
        got = [len(launches) - kernels, kernels]
        assert got == want, f"{got}: {', '.join(launches)}"
    copies = {name: part.launches for name, part in step.items() if name.startswith("second stream")}
    assert copies == ({f"second stream {index}": ["[_gather]"] for index in range(3)} if "prefetch" in options else {})


def test_the_planner_counts_as_many():
    for kind, launches in step_time.LAUNCHES.items():
        assert launches == sum(LAUNCHES[f"{kind}, evidence"][2:])
    spent = ahead_time.cost(ahead_time.Lead(0, 0, 0))
    assert [spent.launches, spent.launches_aside, spent.ranking_launches] == list(FORESEEN["ranked"][1:])
