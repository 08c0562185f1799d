"""Operations compiled for a CPU, each against its twin in torch: by the tests of kernels, and by those here."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys

import pytest
import torch
from helpers import assert_near
from test_kernel_attention import (  # noqa: F401  (these tests are run here with the fixtures below)
    test_a_token_that_is_nan_makes_the_output_nan,
    test_attention_over_ragged_pages,
)
from test_kernel_choice import (  # noqa: F401
    test_all_of_equal_ranks_may_be_chosen_or_few,
    test_the_best_chunks_are_chosen,
    test_the_slots_longest_unused_give_way,
    test_ties_do_not_change_how_many_chunks_are_chosen,
)
from test_kernel_copies import (  # noqa: F401
    test_a_token_is_appended,
    test_heads_need_not_be_next_to_each_other,
    test_missed_chunks_are_gathered,
)
from test_kernel_ranking import (  # noqa: F401
    test_chunk_ranks,
    test_mass_that_was_not_chosen,
    test_where_all_is_chosen_no_mass_is_left,
)
from test_kernels import (  # noqa: F401
    shallow,
    test_decoding_with_kernels_is_decoding_with_torch,
    test_operations_have_the_parameters_that_the_contract_names,
    test_several_known_tokens_are_decoded_as_torch_decodes_them,
)

from tieredkv.ops import select
from tieredkv.ops.base import Ops
from tieredkv.ops.select import TORCH, ops_for
from tieredkv.policy.digests.sketch import Sketch

CPU = torch.device("cpu")


@pytest.fixture
def device() -> torch.device:
    return CPU


@pytest.fixture
def blocks() -> None:
    """Kernels handle rows in blocks; these do not."""


@pytest.fixture
def kernels(compiled: Ops) -> Ops:
    """What the tests of kernels test."""
    return compiled


@pytest.mark.parametrize(
    ("heads", "rows", "c", "d", "chunks"),
    [(3, 3, 8, 64, 37), (1, 7, 16, 128, 20), (2, 1, 32, 32, 9), (2, 9, 12, 80, 1), (1, 4, 8, 128, 300)],
)
def test_logits_of_sketches(compiled, heads, rows, c, d, chunks):
    """300 chunks of 8 tokens are several tiles, the last one shorter."""
    keys, queries = torch.randn(heads, chunks, c, d), torch.randn(heads, rows, d)
    digest = Sketch(d, c, 4)
    basis = digest.fit(torch.eye(d).expand(heads, d, d), keys.flatten(1, 2))
    made, prepared = digest.make(keys, basis), digest.prepare(queries, basis)
    ours = compiled.digest(digest)
    assert type(ours) is not Sketch
    arranged = ours.arranged(made)
    assert arranged.shape == made.shape
    assert_near(ours.logits(prepared, arranged, 1), digest.chunk_logits(prepared, made))


@pytest.mark.parametrize("digest", [Sketch(64, 8, 8), Sketch(72, 8, 4)], ids=["8 bits", "18 bytes a token"])
def test_sketches_that_have_no_whole_words_are_ranked_by_torch(compiled, digest):
    assert compiled.digest(digest) is digest


def test_where_a_chunk_is_much_less_likely_than_another_its_logit_is_still_right(compiled):
    digest = Sketch(16, 8, 4)
    made = torch.zeros(1, 2, digest.chunk_bytes, dtype=torch.uint8)
    made[0, 1] = 0xFF
    prepared, ours = torch.full((1, 1, 8), 4.0), compiled.digest(digest)
    got = ours.logits(prepared, ours.arranged(made), 1)
    want = torch.tensor([[[-8.0, 7.0]]]) * 4 * 8 + torch.log(torch.tensor(8.0))
    torch.testing.assert_close(got, want)


def test_compiled_operations_are_used_on_cpus_where_numba_is_installed(compiled, monkeypatch):
    assert ops_for(CPU) is compiled

    def missing():
        raise ImportError("Numba needs NumPy 2.5 or less")

    monkeypatch.setattr(select, "numba", missing)
    monkeypatch.setattr(select, "_on_a_cpu", select._on_a_cpu.__wrapped__)
    assert ops_for(CPU) is TORCH


def test_what_was_kept_on_disk_may_be_damaged(monkeypatch):
    def damaged():
        raise pickle.UnpicklingError("invalid load key")

    monkeypatch.setattr(select, "numba", damaged)
    with pytest.warns(UserWarning, match=r"\(UnpicklingError\), so steps use torch, which is slower: delete \*\.nbi"):
        assert select._on_a_cpu.__wrapped__() is TORCH


@pytest.mark.subprocess
def test_a_folder_that_cannot_be_written_is_no_error(compiled):
    """In another process, whose Numba finds no folder for what it compiles."""
    script = """
import torch
from tieredkv.ops.select import ops_for
from tieredkv.policy.digests.sketch import Sketch
digest = ops_for(torch.device("cpu")).digest(Sketch(16, 8, 4))
print(digest.logits(torch.zeros(1, 1, 8), torch.zeros(1, 1, 32, dtype=torch.uint8), 1).exp().item())
"""
    environment = {**os.environ, "NUMBA_CACHE_LOCATOR_CLASSES": "ZipCacheLocator"}  # that of packages in a zip file
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(8)


@pytest.mark.subprocess
def test_numba_is_not_imported_before_it_is_needed():
    script = "import sys, tieredkv, tieredkv.cli; print('numba' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
