"""Attention in blocks against one plain softmax."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_near

from tieredkv.attention import exact


def plain(query, keys, values, scaling, hidden=None):
    """Softmax attention of `(H, n, D)` over `(K, m, D)`, written out."""
    group = query.shape[0] // keys.shape[0]
    keys, values = keys.repeat_interleave(group, 0), values.repeat_interleave(group, 0)
    logits = query @ keys.transpose(1, 2) * scaling
    if hidden is not None:
        logits = logits.masked_fill(hidden, float("-inf"))
    return logits.softmax(-1) @ values, logits.logsumexp(-1), logits.softmax(-1)


@pytest.mark.parametrize("group", [1, 2, 7])
@pytest.mark.parametrize("head_dim", [8, 32, 80])
def test_one_block(group, head_dim):
    query, keys = torch.randn(2 * group, 5, head_dim), torch.randn(2, 11, head_dim)
    values = torch.randn(2, 11, head_dim)
    out, lse = exact.attend(query, keys, values, 0.3, causal=False)
    want, want_lse, _ = plain(query, keys, values, 0.3)
    assert_near(out, want)
    assert_near(lse, want_lse)


def test_causal_block():
    query, keys, values = torch.randn(6, 9, 16), torch.randn(2, 9, 16), torch.randn(2, 9, 16)
    out, lse = exact.attend(query, keys, values, 0.25, causal=True)
    hidden = torch.ones(9, 9).triu(1).bool()
    want, want_lse, _ = plain(query, keys, values, 0.25, hidden)
    assert_near(out, want)
    assert_near(lse, want_lse)


def test_blocks_merged_are_the_whole():
    query, keys, values = torch.randn(4, 3, 16), torch.randn(2, 50, 16), torch.randn(2, 50, 16)
    parts = [
        exact.attend(query, k, v, 0.5, causal=False)
        for k, v in zip(keys.split(17, 1), values.split(17, 1), strict=True)
    ]
    out, lse = parts[0]
    for part in parts[1:]:
        out, lse = exact.merge(out, lse, *part)
    want, want_lse, _ = plain(query, keys, values, 0.5)
    assert_near(out, want)
    assert_near(lse, want_lse)


def test_row_weights_of_all_blocks_add_up_to_one():
    query, keys = torch.randn(4, 3, 16), torch.randn(2, 20, 16)
    hidden = torch.arange(20) >= torch.tensor([18, 19, 20]).unsqueeze(1)
    _, lse, want = plain(query, keys, torch.randn(2, 20, 16), 0.5, hidden)
    got = torch.cat(
        [
            exact.row_weights(query, keys[:, :12], lse, 0.5),
            exact.row_weights(query, keys[:, 12:], lse, 0.5, first_hidden=torch.tensor([6, 7, 8])),
        ],
        dim=-1,
    )
    assert_near(got.flatten(0, 1), want)
    torch.testing.assert_close(got.sum(-1), torch.ones(2, 2, 3))


@pytest.mark.parametrize(("head_dim", "kind"), [(256, "flash"), (257, "efficient"), (512, "efficient")])
def test_a_card_takes_wide_heads_where_torch_does(head_dim, kind):
    """torch's flash attention has heads of at most 256."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode

    called = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.append(str(func))
            return func(*args, **(kwargs or {}))

    with FakeTensorMode():
        query, keys = (torch.empty(h, 8, head_dim, dtype=torch.bfloat16, device="cuda") for h in (4, 2))
        with Record():
            out, lse = exact.attend(query, keys, keys, 0.1, causal=True)
    assert (out.shape, lse.shape) == (query.shape, query.shape[:2])
    assert any(f"_scaled_dot_product_{kind}_attention" in name for name in called)
