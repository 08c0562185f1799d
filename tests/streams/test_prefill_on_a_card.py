"""A prefill on a simulated card, on which everything happens as late as it may, equals that on the CPU."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from helpers import assert_near, pressed, text_config, tier_options
from simulated_card import BY_CPU, CARD, aten, on_card, simulated_card
from transformers import LlamaForCausalLM

import tieredkv
from tieredkv import TieredCache
from tieredkv.cache import context_digests
from tieredkv.cache.context_digests import ContextDigests
from tieredkv.cache.question import CONTEXT, Question
from tieredkv.environment.versions import cache_argument
from tieredkv.memory.copies import StreamCopies

TOKENS, QUESTION = 160, 12
CALLS = (29, 40, 32, 37, 10, QUESTION)
"""Most of them begin in the middle of a chunk."""
ROOM = {"everything resident": 1.5, "some resident": 0.7, "packed": 0.7}


@pytest.fixture(scope="module")
def small():
    config = text_config("llama")
    config.num_hidden_layers = 2
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


@pytest.fixture(autouse=True)
def little(monkeypatch):
    monkeypatch.setattr(context_digests, "FIT_TOKENS", 64)
    monkeypatch.setattr("tieredkv.planning.prefill_plan.STAGING_TOKENS", 8)


def prefilled(model, ids, room):
    """Logits of each call; then, of each layer, keys in host memory, digests, and attention of the question's rows."""
    bits = 8 if room == "packed" else 16
    tiers = {**pressed(model, TOKENS, ROOM[room]), "chunk_tokens": 8, "text_window": 16, "theta": 2.0}
    cache = TieredCache(model.config, **tier_options(**tiers, host_kv_bits=bits), prompt_tokens=TOKENS)
    with torch.no_grad(), tieredkv.use_attention(model), cache:
        cache.expect(CONTEXT)
        logits = []
        for part in ids.split(CALLS, dim=1):
            if part.shape[1] == QUESTION:
                cache.settle()
                cache.expect(Question(max_new_tokens=2, prompt_tokens=TOKENS, rows=QUESTION))
            logits.append(model(part, **cache_argument(cache)).logits.clone())
        layers = []
        for layer in cache.tiered_layers:
            digests = layer.digests.packed.clone()
            cache.device_tier.copies.drain()
            layers.append((layer.host.decoded(0, TOKENS)[0], digests, layer.rows.halves))
        return [each.cpu() for each in logits], layers, len(cache.device_tier.residents)


def compared(patch, model, room, seed):
    ids = torch.randint(0, 97, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    want, expected, _ = prefilled(model, ids, room)
    rounded = room == "packed" or model.dtype == torch.bfloat16
    with simulated_card(patch, seed):
        got, layers, _ = prefilled(on_card(copy.deepcopy(model)), ids.to(CARD), room)
    for ours, theirs in zip(got, want, strict=True):
        assert_near(ours, theirs)
    for (keys, digests, rows), (keys_wanted, digests_wanted, rows_wanted) in zip(layers, expected, strict=True):
        torch.testing.assert_close(keys, keys_wanted, rtol=0, atol=0.05 if rounded else 1e-5)
        assert digests.shape == digests_wanted.shape
        assert (digests != digests_wanted).float().mean() < (0.3 if rounded else 0.02)  # a kernel rounds halves up
        assert_near(rows, rows_wanted, model.dtype)


@pytest.mark.interpreter
@pytest.mark.parametrize("seed", [None, 0])
@pytest.mark.parametrize("room", ROOM)
def test_it_equals_that_of_a_cpu(small, monkeypatch, room, seed):
    compared(monkeypatch, small, room, seed)


def flash(query, keys, values, dropout=0.0, causal=False, debug=False, *, scale):
    """torch's flash attention for cards: grouped heads, and a causal mask that ends with the last key."""
    group, (n, m) = query.shape[1] // keys.shape[1], (query.shape[2], keys.shape[2])
    keys, values = (part.float().repeat_interleave(group, dim=1) for part in (keys, values))
    logits = query.float() @ keys.mT * scale
    if causal:
        hidden = torch.ones((n, m), dtype=torch.bool, device=query.device).triu(m - n + 1)
        logits = logits.masked_fill(hidden, float("-inf"))
    out, lse = (logits.softmax(-1) @ values).to(query.dtype), logits.logsumexp(-1)
    return out, lse, None, None, n, m, lse.new_zeros(()), lse.new_zeros(()), lse.new_zeros(())


@pytest.mark.interpreter
@pytest.mark.parametrize("room", ROOM)
def test_flash_attention_covers_past_and_new_tokens(small, monkeypatch, room):
    monkeypatch.setitem(BY_CPU, aten._scaled_dot_product_flash_attention.default, flash)
    monkeypatch.setattr("tieredkv.attention.exact._has_flash", lambda device: True)
    compared(monkeypatch, copy.deepcopy(small).to(torch.bfloat16), room, None)


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("kind", "name"), [(StreamCopies, "wait"), (ContextDigests, "_wait")], ids=["copies", "digests"]
)
def test_a_missing_wait_is_seen(small, monkeypatch, kind, name):
    held = []

    def forgotten(copies, key=None):
        held.append(getattr(copies, "_pending", {}).pop(key, None))  # what a copy reads stays alive
        return 0

    monkeypatch.setattr(kind, name, forgotten)
    with pytest.raises((AssertionError, torch.linalg.LinAlgError)):  # the latter of a moment that has not arrived
        compared(monkeypatch, small, "some resident", None)


@pytest.mark.interpreter
def test_a_cache_that_is_emptied_and_filled_again_locks_no_more_memory(small, monkeypatch):
    tiers = tier_options(**pressed(small, TOKENS, 0.7), chunk_tokens=8, text_window=16, theta=2.0, host_kv_bits=16)
    ids, locked = torch.zeros((1, 80), dtype=torch.int64), []
    with torch.no_grad(), simulated_card(monkeypatch):
        model = on_card(copy.deepcopy(small))
        with tieredkv.use_attention(model), TieredCache(model.config, **tiers, prompt_tokens=TOKENS) as cache:
            cache.expect(CONTEXT)
            for fitted in (True, True, False, True):
                for part in ids.to(CARD)[:, : 80 if fitted else 40].split(40, dim=1):
                    model(part, **cache_argument(cache))
                if fitted:
                    cache.settle()
                    locked.append(len(cache.device_tier.locker._locks))
                cache.truncate(0)
    assert locked[0] > 0
    assert set(locked) == {locked[0]}
