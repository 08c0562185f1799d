"""From prefill to decoding: which heads are static, which tokens are text, and what a failed seal leaves."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_near, pressed, tier_options

import tieredkv
from tieredkv.cache.layer_pages import LayerPages
from tieredkv.cache.prefill import TextRows
from tieredkv.cache.question import Question
from tieredkv.cache.seal import classify_heads, text_mask
from tieredkv.cache.tiered_cache import TieredCache
from tieredkv.codecs import PLAIN
from tieredkv.config import TierConfig
from tieredkv.environment.versions import cache_argument
from tieredkv.memory.units import GIB
from tieredkv.models.kv_shape import KVShape
from tieredkv.planning import sizes
from tieredkv.policy.classify import LEAST_ROWS

SHAPE = KVShape(num_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16, itemsize=4)
TOKENS = 400


def rows(focused: list[bool], count: int) -> TextRows:
    """Rows of heads that attend to one old token (`focused`), or evenly to all."""
    halves = torch.full((2, len(focused), TOKENS), 1 / TOKENS)
    for head, one in enumerate(focused):
        if one:
            halves[:, head] = 0
            halves[:, head, 100] = 1
    return TextRows(torch.tensor([0.9 if one else 0.1 for one in focused]), halves, count)


def classified(of_layers: list[TextRows], share: float = 0.3, **options):
    tiers = TierConfig(gpu_kv_gb=share * TOKENS * SHAPE.token_bytes / GIB, pack_pages=False, **tier_options(**options))
    return classify_heads(of_layers, SHAPE, tiers, sizes.lay_out(tiers, TOKENS, 16, 8), tiers.cap_bytes, PLAIN)


def test_heads_that_need_few_tokens_are_static():
    types = classified([rows([True, False], 32), rows([False, True], 32)])
    assert types.static.tolist() == [[True, False], [False, True]]
    assert types.need.shape == (2, 2, 2)


def test_too_few_rows_make_no_head_static():
    few = classified([rows([True, True], LEAST_ROWS - 1)] * 2)
    assert not few.static.any()
    assert bool((few.need > TOKENS).all())
    assert classified([rows([True, True], LEAST_ROWS)] * 2).static.all()


def test_every_head_of_a_dense_layer_is_static():
    types = classified([rows([False, False], 32)] * 2, share=1.2, dense_layers=1)
    assert types.static.tolist() == [[True, True], [False, False]]


def test_scores_decide_where_the_policy_says_so():
    types = classified([rows([True, False], 32)] * 2, head_score="mass", theta=0.5)
    assert types.static.tolist() == [[True, False]] * 2
    assert types.need is None


@pytest.mark.parametrize(
    ("question", "text"),
    [
        (Question(rows=3), [0, 0, 0, 0, 0, 1, 1, 1]),
        (Question(), [0, 0, 0, 0, 1, 1, 1, 1]),
        (Question(rows=3, visual=torch.tensor([False, True, True, False, True])), [1, 0, 0, 1, 0, 1, 1, 1]),
    ],
    ids=["no mask", "no rows", "a mask of the context"],
)
def test_what_is_text(question, text):
    assert text_mask(question, 8, text_window=4).int().tolist() == text


def test_a_fault_while_the_pool_is_filled_leaves_the_cache_in_prefill(llama, long_ids, monkeypatch):
    def fail(self, *arguments):
        raise MemoryError("not enough")

    options = {**pressed(llama, 900, 0.5), "chunk_tokens": 8, "text_window": 16, "host_kv_bits": 16}
    with torch.no_grad(), tieredkv.use_attention(llama), TieredCache(llama.config, **tier_options(**options)) as cache:
        llama(long_ids[:, :880], **cache_argument(cache))
        with monkeypatch.context() as patch:
            patch.setattr(LayerPages, "fill", fail)
            with pytest.raises(MemoryError):
                cache.seal()
        assert not cache.sealed
        assert cache.ledger.by_purpose() == {}
        got = llama(long_ids[:, 880:], **cache_argument(cache)).logits
        cache.seal()
    assert_near(got, llama(long_ids).logits[:, 880:])
