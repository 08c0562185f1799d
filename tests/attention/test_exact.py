"""Attention in blocks and pages against one plain softmax."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_near

from tieredkv.attention import exact
from tieredkv.ops import torch_ops
from tieredkv.ops.packing import Packing


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


@pytest.mark.parametrize("batch_pages", [1, 2, 64])
@pytest.mark.parametrize("group", [1, 3, 7])
def test_pages_differ_from_head_to_head(batch_pages, group):
    """Ragged page lists, partly filled pages and holes against gathering each head's tokens by hand."""
    generator = torch.Generator().manual_seed(group)
    pages = torch.randn(20, 2, 4, 8, generator=generator)
    table = torch.stack([torch.randperm(20, generator=generator)[:5] for _ in range(3)])
    lengths = torch.tensor([[4, 4, 4, 4, 4], [4, 0, 3, 0, 0], [0, 0, 0, 0, 1]])
    query = torch.randn(3 * group, 2, 8, generator=generator)
    out, _ = torch_ops.paged_attention(query, pages, table, lengths, 0.4, batch_pages)
    for head in range(3):
        parts = [pages[p, :, :n] for p, n in zip(table[head].tolist(), lengths[head].tolist(), strict=True)]
        tokens = torch.cat(parts, dim=1)
        rows = query[head * group : (head + 1) * group]
        want, _, _ = plain(rows, tokens[:1].expand(1, -1, -1), tokens[1:], 0.4)
        assert_near(out[head * group : (head + 1) * group], want)


@pytest.mark.parametrize("batch_pages", [1, 6, 64])
@pytest.mark.parametrize("packed", [False, True])
def test_the_log_sum_exp_of_each_page_is_that_of_its_tokens(batch_pages, packed):
    keys, query = torch.randn(20, 2, 4, 8), torch.randn(6, 1, 8)
    table, lengths = torch.randperm(20)[:15].view(3, 5), torch.full((3, 5), 4)
    lengths[0, 1], lengths[2, 3] = 0, 2
    pages, packing = keys, None
    if packed:
        packing = Packing(torch.rand(20, 2, 4).half() + 0.5, torch.rand(3, 2, 8) + 0.5)
        pages = keys.mul(50).round().to(torch.int8)
    found = torch.full((6, 9), 7.0)
    _, lse = torch_ops.paged_attention(query, pages, table, lengths, 0.4, batch_pages, packing, found)
    torch.testing.assert_close(found[:, :5].logsumexp(-1), lse[:, 0])
    assert torch.equal(found[:, 5:], torch.full((6, 4), 7.0))
    assert bool((found[:2, 1] < -1e30).all())
    page = pages[table[2, 3], 0, :2].float()
    if packing is not None:
        page = page * packing.scales[table[2, 3], 0, :2, None] * packing.norms[2, 0]
    assert_near(found[5, 3], (page @ query[5, 0] * 0.4).logsumexp(-1))


def test_the_order_of_pages_does_not_matter():
    pages, query = torch.randn(6, 2, 4, 8), torch.randn(2, 1, 8)
    lengths = torch.tensor([[4, 2, 3]])
    forward = torch_ops.paged_attention(query, pages, torch.tensor([[0, 3, 5]]), lengths, 1.0, 8)
    backward = torch_ops.paged_attention(query, pages, torch.tensor([[5, 3, 0]]), lengths.flip(1), 1.0, 8)
    torch.testing.assert_close(forward, backward)


def test_a_head_without_pages_is_an_error():
    with pytest.raises(ValueError, match="no page"):
        torch_ops.paged_attention(
            torch.randn(1, 1, 8), torch.randn(2, 2, 4, 8), torch.zeros(1, 1).long(), torch.zeros(1, 1).long(), 1.0, 1
        )


def test_what_lies_beyond_a_pages_length_does_not_leak():
    pages, query = torch.randn(2, 2, 4, 8), torch.randn(2, 1, 8)
    table, lengths = torch.tensor([[0, 1]]), torch.tensor([[4, 2]])
    want = torch_ops.paged_attention(query, pages, table, lengths, 1.0, 8)
    pages[1, :, 2:] = 1e30
    torch.testing.assert_close(torch_ops.paged_attention(query, pages, table, lengths, 1.0, 8), want)


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
