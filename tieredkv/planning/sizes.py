"""Sizes: model shape x tokens x settings -> bytes that the host tier and the decode phase hold.

The decode phase holds a pool, tables, digests and scratch; `decode_plan` divides a cap among them. The prefill phase,
under the same cap, is in `prefill_plan`. `memory.ledger.DeviceLedger` counts what is allocated. Nothing is allocated
here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tieredkv.config import TierConfig
from tieredkv.memory.units import FLOAT16, FLOAT32, INT32, INT64, ceil_div
from tieredkv.models.kv_shape import KVShape
from tieredkv.ops.packing import norm_bytes, packed_bytes
from tieredkv.policy.digests import DIGESTS, Digest

QUESTION_ROOM = 256
"""Tokens of host memory reserved after the video for questions; a longer question makes the tier grow."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How the prompt's tokens are divided, the same for every head; in chunks and pages of C tokens."""

    chunk_tokens: int
    tokens: int
    recent_start: int
    """First token of the recent region, on a chunk boundary; every head keeps it and everything after."""
    recent_pages: int
    """Pages of one head for the recent region and the tokens to be generated."""
    sink_chunks: int
    """Chunks at the front that dynamic heads always attend to."""

    @property
    def old_chunks(self) -> int:
        """Chunks before the recent region, all of them full."""
        return self.recent_start // self.chunk_tokens

    @property
    def retrievable(self) -> int:
        """Chunks a dynamic head chooses among."""
        return self.old_chunks - self.sink_chunks


def lay_out(tiers: TierConfig, tokens: int, text_rows: int, new_tokens: int) -> Layout:
    """Divide `tokens` prompt tokens, the last `text_rows` of them the question, before `new_tokens` generated ones."""
    c = tiers.chunk_tokens
    window = max(tiers.recent_window, min(text_rows, tiers.policy.text_window))
    start = c * (max(0, tokens - window) // c)
    return Layout(
        chunk_tokens=c,
        tokens=tokens,
        recent_start=start,
        recent_pages=ceil_div(tokens - start + new_tokens, c),
        sink_chunks=min(ceil_div(tiers.sink_tokens, c), start // c),
    )


def chunk_bytes(shape: KVShape, tiers: TierConfig) -> int:
    """One chunk on the host: keys and values of C tokens of one KV head. A fetch copies as much."""
    return 2 * tiers.chunk_tokens * shape.head_dim * shape.itemsize


def page_bytes(shape: KVShape, tiers: TierConfig, packed: bool) -> int:
    """One page on the device. packed: in 8 bits."""
    return packed_bytes(tiers.chunk_tokens, shape.head_dim) if packed else chunk_bytes(shape, tiers)


def host_bytes(shape: KVShape, tiers: TierConfig, prompt: int) -> int:
    """Host memory of the complete cache of `prompt` tokens: whole chunks, room for a longer question, digests, and the
    snapshot of layers that do not grow."""
    chunks, digest = ceil_div(prompt + QUESTION_ROOM, tiers.chunk_tokens), digest_for(shape, tiers)
    fitting = digest.fitted_bytes + query_moment_bytes(shape.head_dim)
    tiered = shape.kv_heads * (chunks * (chunk_bytes(shape, tiers) + digest.chunk_bytes) + fitting)
    return tiered + snapshot_bytes(shape, prompt)


def snapshot_bytes(shape: KVShape, tokens: int) -> int:
    """Host memory of the snapshot of the layers that do not grow, after `tokens` tokens."""
    states = shape.linear_layers * (shape.conv_state_bytes + shape.recurrent_state_bytes)
    return _window_bytes(shape, _window_tokens(shape, tokens)) + states


def untiered_bytes(shape: KVShape, past: int, new: int) -> dict[str, int]:
    """Device bytes, outside the cap, of the layers that do not grow, by kind: after a call of `new` tokens that follow
    `past` tokens. Empty without such layers."""
    kinds = {}
    if shape.sliding_layers:  # what the call attended to stays allocated until the next
        kinds["sliding windows"] = _window_bytes(shape, _window_tokens(shape, past) + new)
    if shape.linear_layers:  # the convolution state twice, see `LinearLayer`
        kinds["linear states"] = shape.linear_layers * (2 * shape.conv_state_bytes + shape.recurrent_state_bytes)
    return kinds


def _window_tokens(shape: KVShape, tokens: int) -> int:
    """How many of the last of `tokens` tokens a sliding layer keeps for the next one."""
    return min(tokens, shape.sliding_window - 1)


def _window_bytes(shape: KVShape, tokens: int) -> int:
    """Keys and values of `tokens` tokens in all sliding layers."""
    return shape.sliding_layers * tokens * shape.sliding_token_bytes


def digest_for(shape: KVShape, tiers: TierConfig) -> Digest[Any]:
    """The policy's digest, for chunks of this model's keys."""
    return DIGESTS[tiers.policy.digest](shape.head_dim, tiers.chunk_tokens, tiers.policy.digest_bits)


def query_moment_bytes(head_dim: int) -> int:
    """Second moment of the queries of one KV head, which digests are fitted to, on the host."""
    return head_dim**2 * FLOAT32


def scratch_page_bytes(shape: KVShape, tiers: TierConfig, packed: bool) -> int:
    """Scratch of the torch attention per gathered page: keys and values in float32 (torch's kernel copies the keys once
    more), row indices, a mask; for packed pages also the scales of keys or values, in float16 and float32."""
    narrow = 1 if packed else 0 if shape.itemsize == FLOAT32 else shape.itemsize
    scales = FLOAT32 + FLOAT16 if packed else 0
    return tiers.chunk_tokens * (shape.head_dim * (3 * FLOAT32 + narrow) + scales + 2 * INT64 + FLOAT32 + 1)


def table_bytes(shape: KVShape, tiers: TierConfig, layout: Layout) -> int:
    """Upper bound of the index tables, int32 (page and length of every page a head could have, and its residency), and
    of what the ledger counts with them."""
    per_page = 2 * INT32
    per_chunk = 6 * INT32  # residency: three for a slot, one and a byte for a chunk, one for no chunk
    reused = reuse_bytes(shape, tiers, shape.kv_heads)
    pages = layout.old_chunks + layout.recent_pages
    tables = shape.kv_heads * (pages * per_page + layout.retrievable * per_chunk + INT32)
    norms = norm_bytes(shape.kv_heads, shape.head_dim) if tiers.pack_pages else 0
    return tables + chunk_mass_bytes(layout) + reused + norms


def chunk_mass_bytes(layout: Layout) -> int:
    """The attention mass of each chunk in a step, summed over the layers of a device."""
    return layout.retrievable * FLOAT32


def reuse_bytes(shape: KVShape, tiers: TierConfig, heads: int) -> int:
    """The previous step's queries of `heads` dynamic heads if the policy reuses chunks; else 0."""
    group = shape.num_attention_heads // shape.num_key_value_heads
    return heads * group * shape.head_dim * FLOAT32 if tiers.policy.reuse_above <= 1 else 0


def digest_bytes(shape: KVShape, tiers: TierConfig, layout: Layout, dynamic_heads: int) -> int:
    """Digests on the device: of every retrievable chunk of `dynamic_heads` heads, with the fitted state for ranking."""
    digest = digest_for(shape, tiers)
    return dynamic_heads * (layout.retrievable * digest.chunk_bytes + digest.ranking_fitted_bytes)


RANKING_SHARE = 64
"""Digests unpacked at a time take at most 1 / RANKING_SHARE of the cap."""


def _ranked_chunk_bytes(shape: KVShape, tiers: TierConfig) -> int:
    """Scratch per chunk ranked at a time."""
    return digest_for(shape, tiers).scratch_bytes(shape.num_key_value_heads, shape.num_attention_heads)


def ranked_chunks_at_once(shape: KVShape, tiers: TierConfig, layout: Layout) -> int:
    """Chunks of one layer to rank at a time: as many as `RANKING_SHARE` allows, but 512 to 4,096 tokens in all.

    More would not be faster: the unpacked digests have to stay in a processor's cache.
    """
    fit = min(tiers.cap_bytes // RANKING_SHARE // _ranked_chunk_bytes(shape, tiers), 8 * _least_ranked(tiers))
    return max(1, min(layout.retrievable, max(fit, _least_ranked(tiers))))


def _least_ranked(tiers: TierConfig) -> int:
    """Chunks ranked at a time under the smallest caps."""
    return max(1, 512 // tiers.chunk_tokens)


def ranking_bytes(shape: KVShape, tiers: TierConfig, layout: Layout, at_once: int | None = None) -> int:
    """Scratch of ranking one layer's chunks for one step: logits and shares of all, and what unpacking takes.

    at_once: chunks unpacked at a time; None: `ranked_chunks_at_once`.
    """
    if at_once is None:
        at_once = ranked_chunks_at_once(shape, tiers, layout)
    per_chunk = FLOAT32 * (4 * shape.num_attention_heads + shape.num_key_value_heads)
    return layout.retrievable * per_chunk + min(at_once, layout.retrievable) * _ranked_chunk_bytes(shape, tiers)


def ranked_ahead_bytes(shape: KVShape, layout: Layout) -> int:
    """Scratch of ranking one layer's chunks for one more step at the same time: at most the logits of every token, and
    three times those of every chunk."""
    return FLOAT32 * shape.num_attention_heads * layout.retrievable * (layout.chunk_tokens + 3)


def gathered_pages(shape: KVShape, pool_pages: int) -> int:
    """Pages of a layer that the torch attention gathers at a time: an average head's, at least one of every head."""
    return max(shape.num_key_value_heads, ceil_div(pool_pages, shape.kv_heads))


def pool_bytes(shape: KVShape, tiers: TierConfig, pool_pages: int, packed: bool) -> int:
    """A pool, and the scratch to attend to its pages."""
    scratch = gathered_pages(shape, pool_pages) * scratch_page_bytes(shape, tiers, packed)
    return pool_pages * page_bytes(shape, tiers, packed) + scratch


def beside_pool_bytes(
    shape: KVShape, tiers: TierConfig, layout: Layout, dynamic_heads: int, at_once: int | None = None
) -> int:
    """What the decode phase holds besides the pool: tables and, for `dynamic_heads` heads that rank chunks, `at_once`
    at a time, digests and the scratch of ranking."""
    tables = table_bytes(shape, tiers, layout)
    if dynamic_heads == 0:
        return tables
    return tables + digest_bytes(shape, tiers, layout, dynamic_heads) + ranking_bytes(shape, tiers, layout, at_once)


def least_pages(layout: Layout) -> int:
    """The fewest pages of a dynamic head, besides the recent region."""
    return layout.sink_chunks + min(1, layout.retrievable)


def smallest_decode_bytes(shape: KVShape, tiers: TierConfig, layout: Layout) -> int:
    """The least cap with which this prompt can be decoded, however its heads are classified."""
    policy = tiers.policy
    dense_layers = shape.num_layers if policy.keep_all else min(policy.dense_layers, shape.num_layers)
    dense = dense_layers * shape.num_key_value_heads
    others = shape.kv_heads - dense
    pages = shape.kv_heads * layout.recent_pages + dense * layout.old_chunks + others * least_pages(layout)
    pool = pool_bytes(shape, tiers, pages, tiers.pack_pages and not policy.keep_all)
    dynamic = others if policy.theta > 0 else 0
    smallest = pool + beside_pool_bytes(shape, tiers, layout, dynamic, _least_ranked(tiers))
    # Digests unpacked at a time grow with the cap.
    return ceil_div(smallest * RANKING_SHARE, RANKING_SHARE - 1) if dynamic else smallest
