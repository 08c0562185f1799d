"""What can be tested of the CUDA path without a card: where tensors are, that a step never waits, and that a graph of
one step stands for all later ones."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from fake_card import CARD, fake_card
from launches import decoded
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from tieredkv.ops.select import triton
from tieredkv.ops.triton import copy as copy_kernels

SETTINGS = [
    {"theta": 2.0}, {"policy": "streaming"}, {"policy": "arkvale"}, {"policy": "quest", "gpu_kv_gb": 0.00065},
    {"reuse_above": 0.5, "prefetch": True}, {"adaptive": True}, {"gpu_kv_gb": 1.0},
    {"gpu_kv_gb": 1.0, "budget_ratio": None, "theta": 2.0},
    {"theta": 2.0, "ahead": True}, {"ahead": True, "adaptive": True}, {"policy": "arkvale", "ahead": True},
    {"host_kv_bits": 16}, {"host_kv_bits": 16, "pack_pages": False}, {"host_kv_bits": 4},
]  # fmt: skip


@pytest.mark.parametrize("options", SETTINGS, ids=str)
@pytest.mark.parametrize("evidence", [False, True], ids=["", "evidence"])
def test_a_step_stays_on_the_card_never_waits_and_repeats_itself(llama, long_ids, monkeypatch, options, evidence):
    _, captured, replayed = decoded(monkeypatch, llama, long_ids, evidence, **options).steps
    recorded = ["_to_copy.default"] if evidence else []
    for name, part in replayed.items():
        assert part.copies == (recorded if name == "after" else []), name
        assert part.stale == [], f"{name} reads what the step before allocated"
        assert part.allocated == captured[name].allocated, name
        assert part.launches == captured[name].launches, name


# ---- that these tests would find it: each operation is planted in a step


def planted(monkeypatch, model, ids, operation):
    """A step whose every append is preceded by `operation(lengths)`, of the page table's lengths."""
    append = copy_kernels.append

    def with_plant(keys, values, pages, table, lengths, count):
        operation(lengths)
        append(keys, values, pages, table, lengths, count)

    with monkeypatch.context() as patch:
        patch.setattr(copy_kernels, "append", with_plant)
        patch.setattr("fake_card.triton", triton.__wrapped__)  # not the table of an earlier call
        return decoded(patch, model, ids, False).steps[2]["layer 1"]


@pytest.mark.parametrize("wait", [lambda x: int(x.sum()), lambda x: x.any().item(), lambda x: bool((x < 0).any())])
def test_a_value_brought_to_the_host_is_found(llama, long_ids, monkeypatch, wait):
    with pytest.raises(DataDependentOutputException):
        planted(monkeypatch, llama, long_ids, wait)


def test_a_shape_that_depends_on_values_is_found(llama, long_ids, monkeypatch):
    with pytest.raises(DynamicOutputShapeException):
        planted(monkeypatch, llama, long_ids, lambda x: x.nonzero())


def test_a_copy_between_host_and_card_is_found(llama, long_ids, monkeypatch):
    for number, copy in enumerate((lambda x: x.cpu(), lambda x: x.copy_(torch.zeros(x.shape, dtype=x.dtype)))):
        part = planted(monkeypatch, llama, long_ids, copy)
        assert len(part.copies) == 1, number
        assert part.link_bytes > 0


def test_what_one_step_leaves_for_the_next_in_new_memory_is_found(llama, long_ids, monkeypatch):
    left = []

    def operation(lengths):
        if len(left) == 3:
            left.pop(0).add_(1)
        left.append(lengths * 2)

    assert planted(monkeypatch, llama, long_ids, operation).stale == ["add_.Tensor"]


def test_a_kernel_that_is_given_a_tensor_of_the_host_is_found(llama, long_ids, monkeypatch):
    append = copy_kernels.append

    def with_host(keys, values, pages, table, lengths, count):
        append(keys, values, pages, table, torch.zeros(lengths.shape, dtype=lengths.dtype, device="cpu"), count)

    monkeypatch.setattr(copy_kernels, "append", with_host)
    monkeypatch.setattr("fake_card.triton", triton.__wrapped__)
    with pytest.raises(AssertionError, match="_append: lengths is on cpu"):
        decoded(monkeypatch, llama, long_ids, False)


def test_prefill_attends_on_the_card(monkeypatch):
    from tieredkv.attention import exact

    with fake_card(monkeypatch):
        for dtype in (torch.float32, torch.bfloat16):
            query = torch.empty(6, 40, 64, dtype=dtype, device=CARD)
            keys = torch.empty(2, 40, 64, dtype=dtype, device=CARD)
            for causal in (True, False):
                out, lse = exact.attend(query, keys, keys, 0.125, causal)
                assert (out.shape, lse.shape, lse.dtype) == ((6, 40, 64), (6, 40), torch.float32)
                assert out.device == lse.device == CARD
