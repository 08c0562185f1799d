"""Triton's kernels as a whole: compiled where there is a card, else interpreted. Each against its twin in torch:
`test_kernel_attention.py`, `test_kernel_ranking.py`, `test_kernel_choice.py`, `test_kernel_copies.py`."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import LateCopies, assert_near, pressed, text_config, tier_options
from transformers import LlamaForCausalLM

import tieredkv
from tieredkv import TieredCache
from tieredkv.environment.versions import cache_argument
from tieredkv.ops import torch_ops
from tieredkv.ops.base import Ops
from tieredkv.ops.select import TORCH, copying_by_torch, ops_for, triton

pytestmark = pytest.mark.interpreter


@pytest.mark.parametrize("name", [name for name, part in vars(Ops).items() if name[0] != "_" and callable(part)])
def test_operations_have_the_parameters_that_the_contract_names(kernels, name):
    wanted = list(inspect.signature(getattr(Ops, name)).parameters)[1:]
    for ops in (TORCH, kernels):
        assert list(inspect.signature(getattr(ops, name)).parameters) == wanted, ops.name


@pytest.fixture(scope="module")
def shallow():
    """Two layers, as the interpreter is slow; the second may be prefetched for."""
    config = text_config("llama")
    config.num_hidden_layers = 2
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def test_several_known_tokens_are_decoded_as_torch_decodes_them(kernels, device, shallow, long_ids):
    if device.type != "cpu":
        pytest.skip("the model is on the CPU")
    found = []
    for ops in (TORCH, kernels):
        options = {"gpu_kv_gb": 1, "budget_ratio": 0.1, "theta": 2.0, "text_window": 16, "chunk_tokens": 8}
        with (
            torch.no_grad(),
            tieredkv.use_attention(shallow),
            TieredCache(shallow.config, **tier_options(**options), ops=ops, max_new_tokens=8) as cache,
        ):
            shallow(long_ids[:, :300], **cache_argument(cache))
            cache.seal()
            with cache.forced():
                found.append(shallow(long_ids[:, 40:44], **cache_argument(cache)).logits[0])
    torch.testing.assert_close(found[1], found[0], atol=3e-2, rtol=0)


@pytest.mark.parametrize("options", [
    {"theta": 2.0}, {"policy": "streaming"}, {"policy": "arkvale"},
    {"reuse_above": -1.0, "prefetch": True}, {"adaptive": True},
    {"host_kv_bits": 16, "pack_pages": False}, {"host_kv_bits": 16}, {"host_kv_bits": 4},
], ids=str)  # fmt: skip
def test_decoding_with_kernels_is_decoding_with_torch(shallow, long_ids, kernels, device, options):
    """Logits of several steps, and what was selected and copied."""
    if device.type != "cpu":
        pytest.skip("interpreted; on a card the whole path is tested")
    llama, ids = shallow, long_ids[:, :240]
    tiers = {**pressed(llama, 240, 0.5), "chunk_tokens": 8, "text_window": 16, "recent_window": 16, **options}

    def decode(ops):
        with (
            torch.no_grad(),
            tieredkv.use_attention(llama),
            # Triton's interpreter runs on one thread only.
            TieredCache(llama.config, **tier_options(**tiers), max_new_tokens=8, ops=ops, copies=LateCopies()) as cache,
        ):
            llama(ids, **cache_argument(cache))
            rows = [llama(ids[:, i : i + 1], **cache_argument(cache)).logits[0, -1] for i in range(2)]
            cache.finish()
            counters = cache.counters
            return torch.stack(rows), (counters.reused, counters.selected, counters.missed_bytes)

    (got, counts), (want, want_counts) = decode(kernels), decode(TORCH)
    assert_near(got, want)
    assert counts == want_counts
    assert (counts[0] > 0) == ("reuse_above" in options)


def test_kernels_are_used_on_cards_only():
    assert ops_for(torch.device("cpu")).name in ("numba", "torch")
    assert ops_for(torch.device("cuda")) is triton()


def test_no_kernel_reads_memory_that_is_not_page_locked():
    without = copying_by_torch(triton())
    assert not without.capturable
    assert (without.gather, without.fetch, without.keep) == (torch_ops.gather, torch_ops.fetch, torch_ops.keep)
    assert without.paged_attention is triton().paged_attention


@pytest.mark.slow
@pytest.mark.subprocess
@pytest.mark.parametrize("card", [["89"], ["86", "--common"], ["90", "--common"], ["120", "--common"]], ids=" ".join)
def test_every_kernel_compiles_for_a_card(card):
    """In a separate process, where Triton compiles: within the shared memory of RTX 30, 40, 50 and H100, and hardly
    spilling registers in common shapes."""
    pytest.importorskip("triton", reason="Triton is not installed")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).parent / "compile_kernels.py"
    done = subprocess.run([sys.executable, str(script), *card], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    compiled = {line.split()[0] for line in done.stdout.splitlines()}
    assert compiled >= {"_attend_split", "_turn_queries", "_append", "_choose", "_place", "_gather", "_keep"}
