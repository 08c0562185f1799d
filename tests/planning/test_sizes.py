"""How a prompt is divided, and the scratch that is counted for attending to pages."""

from __future__ import annotations

import pytest
import torch

from tieredkv.codecs import CODECS, codec_for
from tieredkv.config import TierConfig
from tieredkv.models.kv_shape import KVShape
from tieredkv.ops.base import Pages
from tieredkv.planning import sizes


def test_the_recent_region_starts_on_a_chunk_and_holds_the_question():
    tiers = TierConfig(chunk_tokens=32, recent_window=8)
    layout = sizes.lay_out(tiers, 1000, 50, 10)
    assert layout.recent_start % 32 == 0
    assert 1000 - layout.recent_start >= 50
    assert layout.recent_pages * 32 >= 1000 - layout.recent_start + 10


def test_a_short_prompt_is_all_recent():
    layout = sizes.lay_out(TierConfig(), 20, 10, 5)
    assert (layout.recent_start, layout.old_chunks, layout.retrievable) == (0, 0, 0)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "group"),
    [(torch.float32, 128, 7), (torch.bfloat16, 32, 2), (torch.bfloat16, 128, 7)],
    ids=str,
)
@pytest.mark.parametrize("batch_pages", [1, 10])
@pytest.mark.parametrize("bits", CODECS)
def test_scratch_counted_covers_what_the_torch_attention_allocates(dtype, head_dim, group, batch_pages, bits):
    """Peak of live bytes inside one call, from torch's own profiler, against the planner's figure."""
    from tieredkv.ops.torch_ops import paged_attention, write

    tiers = TierConfig(chunk_tokens=32)
    shape = KVShape(1, group, 1, head_dim, dtype.itemsize)
    codec = codec_for(bits, 32, head_dim, dtype)
    tokens = torch.randn(30 * 32, head_dim).to(dtype)
    fit = codec.fit(tokens.unsqueeze(0), tokens.unsqueeze(0))
    pages = Pages(codec, torch.zeros(30, sizes.page_bytes(shape, tiers, bits), dtype=torch.uint8), fit)
    write(tokens, tokens, pages, 0, torch.arange(30))
    table, lengths = torch.arange(30).int().view(1, 30), torch.full((1, 30), 32).int()
    query = torch.randn(group, 1, head_dim).to(dtype)
    paged_attention(query, pages, table, lengths, 1.0, batch_pages)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        paged_attention(query, pages, table, lengths, 1.0, batch_pages)
    live = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    fixed = 8 * group * head_dim * 4 + 30 * 32  # outputs of the call and of its merges, and the index of used pages
    assert 0 < peak <= batch_pages * sizes.scratch_page_bytes(shape, tiers, bits) + fixed
