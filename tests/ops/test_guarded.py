"""Kernels under guard: no order of programs, and nothing beside a tensor, matters to them."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")

import test_choose  # noqa: E402
import test_kernel_attention  # noqa: E402
import test_kernel_copies  # noqa: E402
import test_kernel_ranking  # noqa: E402
import triton.language as tl  # noqa: E402
from guarded import Overrun, guarded  # noqa: E402

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is not in use"),
]


@triton.jit
def _running_total(source, target, BLOCK: tl.constexpr):
    """Each program adds to what the one before left."""
    program = tl.program_id(0)
    before = tl.load(target + program - 1, mask=program > 0, other=0.0)
    tl.store(target + program, before + tl.load(source + program))


@triton.jit
def _copy(source, target, read, written, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + place, tl.load(source + place, mask=place < read, other=0.0), mask=place < written)


def test_a_kernel_that_depends_on_the_order_of_programs_is_found():
    source, found = torch.arange(8.0), set()
    for seed in range(4):
        with guarded(seed):
            target = torch.zeros(8)
            _running_total[(8,)](source, target, BLOCK=1)
            found.add(tuple(target.tolist()))
    assert len(found) > 1


def test_a_kernel_that_writes_past_its_tensor_is_found():
    with guarded(0), pytest.raises(Overrun, match="_copy wrote"):
        _copy[(2,)](torch.ones(10), torch.zeros(10), 10, 11, BLOCK=8)


def test_a_kernel_that_reads_past_its_tensor_is_found():
    target = torch.zeros(16)
    with guarded(0):
        _copy[(2,)](torch.ones(10), target, 11, 16, BLOCK=8)
    assert target[:10].tolist() == [1.0] * 10
    assert target[10].isnan()


def test_a_kernel_that_stays_within_its_tensors_passes():
    target = torch.zeros(10)
    with guarded(0):
        _copy[(2,)](torch.ones(10), target, 10, 10, BLOCK=8)
    assert target.tolist() == [1.0] * 10


SEEDS = pytest.mark.parametrize("seed", [0, 1])


@SEEDS
def test_choosing_and_placing_under_guard(kernels, device, monkeypatch, seed):
    from tieredkv.ops.triton import choose

    monkeypatch.setattr(choose, "TILE", 64)
    monkeypatch.setattr(choose, "_parts", lambda chunks, heads, device: -(-chunks // 64))
    with guarded(seed):
        for kind in ("any", "few values"):
            test_choose.test_the_choice_is_that_of_a_stable_sort(kernels, device, None, kind, 300)
        test_choose.test_slots_are_taken_in_the_order_of_their_last_use(kernels, device, None, "any", 150)


@SEEDS
@pytest.mark.parametrize(("bits", "page_bits", "dtype"), [(16, 8, torch.float16), (4, 4, torch.bfloat16)])
def test_copies_under_guard(kernels, device, seed, bits, page_bits, dtype):
    with guarded(seed):
        given = kernels, device, bits, page_bits, dtype, 12, 80
        test_kernel_copies.test_chunks_are_fetched(*given)
        test_kernel_copies.test_tokens_are_kept(*given)
        test_kernel_copies.test_missed_chunks_are_gathered(*given)
        test_kernel_copies.test_a_token_is_appended(kernels, device, page_bits, dtype, 80)


@SEEDS
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_attention_under_guard(kernels, device, seed, bits):
    with guarded(seed):
        test_kernel_attention.test_attention_over_ragged_pages(kernels, device, bits, torch.float32, 2, 7, 80, 12, 5, 1)


@SEEDS
def test_ranking_under_guard(kernels, device, seed):
    with guarded(seed):
        test_kernel_ranking.test_sketch_logits(kernels, device, 4, 1, 7, 16, 128, 20)
        test_kernel_ranking.test_logits_of_blocks(kernels, device, 4, 1, 2, 8, 20, 3)
        test_kernel_ranking.test_chunk_ranks(kernels, device, "mean", 2.0, 2500)


@SEEDS
def test_masses_under_guard(kernels, device, seed):
    with guarded(seed):
        for chunks in (5, 700):
            test_kernel_ranking.test_mass_that_was_not_chosen(kernels, device, chunks)
        test_kernel_ranking.test_the_share_that_was_not_seen_is_recorded(kernels, device)
        test_kernel_ranking.test_mass_of_chunks_is_that_of_their_pages(kernels, device, 300)


@SEEDS
@pytest.mark.parametrize("columns", [40, 1500])
def test_adapting_under_guard(kernels, device, seed, columns):
    with guarded(seed):
        test_kernel_ranking.test_heads_adapt_to_what_was_not_seen(kernels, device, columns)


@SEEDS
@pytest.mark.parametrize("bits", [4, 8])
def test_packing_sketches_under_guard(kernels, device, seed, bits):
    with guarded(seed):
        test_kernel_ranking.test_sketches_are_packed(kernels, device, bits, torch.bfloat16, 2, 16, 80, 5)
