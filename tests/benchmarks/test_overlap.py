"""What streams do at the same time (`benchmarks/overlap.py`), by made-up kernels."""

from __future__ import annotations

import gzip
import json
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import overlap
from overlap import Kernel

MAIN, ASIDE = 7, 20


def kernels(*rows):
    return [Kernel(name, stream, start, end) for name, stream, start, end in rows]


def test_a_copy_is_hidden_while_the_main_stream_computes():
    found = overlap.overlap(
        kernels(("mlp", MAIN, 0, 60), ("_gather", ASIDE, 20, 100), ("_attend_split", MAIN, 100, 150))
    )
    assert found["main_stream"] == MAIN
    assert (found["aside_copies_us"], found["aside_copies_hidden"]) == (80, 0.5)
    assert (found["copies_us"], found["copies_hidden"]) == (80, 0.5)


def test_a_copy_of_the_main_stream_is_not_hidden():
    found = overlap.overlap(kernels(("mlp", MAIN, 0, 60), ("_gather", MAIN, 60, 80), ("mlp", MAIN, 80, 90)))
    assert (found["copies_us"], found["copies_hidden"]) == (20, 0.0)
    assert (found["aside_us"], found["aside_copies_hidden"]) == (0, None)


def test_the_main_stream_does_not_compute_while_it_copies():
    found = overlap.overlap(kernels(("mlp", MAIN, 0, 50), ("_gather", MAIN, 50, 100), ("_gather", ASIDE, 40, 60)))
    assert found["aside_copies_hidden"] == 0.5


def test_ranking_on_the_second_stream_is_not_a_copy():
    found = overlap.overlap(
        kernels(
            ("mlp", MAIN, 0, 40), ("_sketch_logits", ASIDE, 0, 20), ("_gather", ASIDE, 20, 30), ("x", ASIDE, 45, 55)
        )
    )
    assert (found["aside_us"], found["aside_hidden"]) == (40, 0.75)
    assert (found["aside_copies_us"], found["aside_copies_hidden"]) == (10, 1.0)


def test_two_branches_shown_on_one_stream_overlap_all_the_same():
    found = overlap.overlap(kernels(("mlp", MAIN, 0, 60), ("_gather", MAIN, 30, 70)))
    assert found["launches"] == {"7": 2}
    assert found["copies_hidden"] == 0.75


def test_kernels_at_the_same_time_count_once():
    found = overlap.overlap(
        kernels(("mlp", MAIN, 0, 10), ("mlp", MAIN, 5, 20), ("_gather", ASIDE, 0, 30), ("_gather", 21, 10, 40))
    )
    assert (found["aside_copies_us"], found["aside_copies_hidden"]) == (40, 0.5)


def test_figures_are_those_of_one_step():
    found = overlap.overlap(kernels(("mlp", MAIN, 0, 60), ("mlp", MAIN, 60, 90), ("_gather", ASIDE, 20, 100)), steps=2)
    assert found["launches"] == {"7": 1, "20": 0.5}
    assert found["aside_copies_us"] == 40


def test_without_kernels_nothing_is_shared():
    found = overlap.overlap([])
    assert (found["main_stream"], found["launches"], found["copies_us"], found["copies_hidden"]) == (None, {}, 0, None)


@pytest.mark.parametrize(
    ("name", "copies"),
    [("_gather", True), ("_fetch", True), ("Memcpy HtoD (Pinned -> Device)", True), ("Memcpy DtoD", False),
     ("void at::native::vectorized_gather_kernel<16, long>", False), ("_gather_rows", False)],
)  # fmt: skip
def test_a_copy_is_what_crosses_the_link(name, copies):
    assert Kernel(name, MAIN, 0, 1).copies == copies


EVENTS = [
    {"ph": "X", "cat": "kernel", "name": "_gather", "ts": 5.5, "dur": 2, "args": {"stream": 20}},
    {"ph": "X", "cat": "gpu_memcpy", "name": "Memcpy HtoD", "ts": 9, "dur": 1, "args": {"stream": 7}},
    {"ph": "X", "cat": "cuda_runtime", "name": "cudaGraphLaunch", "ts": 1, "dur": 4, "args": {}},
    {"ph": "M", "name": "process_name", "args": {"name": "python"}},
]


@pytest.mark.parametrize("name", ["trace.json", "trace.json.gz"])
def test_kernels_are_read_from_a_trace(tmp_path, name):
    written = json.dumps({"traceEvents": EVENTS}).encode()
    (tmp_path / name).write_bytes(gzip.compress(written) if name.endswith("gz") else written)
    assert overlap.kernels_in(tmp_path / name) == kernels(("_gather", 20, 5.5, 7.5), ("Memcpy HtoD", 7, 9, 10))


@pytest.mark.parametrize(("by_graph", "path"), [({"7": 2.0, "20": 1.0}, "graph"), ({"7": 3.0}, "eager")])
def test_eager_steps_are_traced_if_those_of_the_graph_show_one_stream(monkeypatch, tmp_path, by_graph, path):
    class Steps:
        def __init__(self, eager):
            self.path = "eager" if eager else "graph"

        def __call__(self, token):
            self.launches = by_graph if self.path == "graph" else {"7": 2.0, "20": 1.0}

    def record(step, trace):
        return {"launches": taken[-1].launches}

    @contextmanager
    def sealed(eager):
        taken.append(Steps(eager))
        yield taken[-1]

    taken: list[Steps] = []
    monkeypatch.setattr(overlap, "record", record)
    assert overlap.traced(sealed, tmp_path / "trace.json")["path"] == path
