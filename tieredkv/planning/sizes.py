"""Sizes: model shape x tokens x settings -> bytes that the host tier and the decode phase hold.

The decode phase holds a pool, tables, digests and scratch; `decode_plan` divides a cap among them. The prefill phase,
under the same cap, is in `prefill_plan`. `memory.ledger.DeviceLedger` counts what is allocated. Nothing is allocated
here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from tieredkv.codecs import PLAIN, codec_for
from tieredkv.codecs.base import FIT_TOKENS, Codec
from tieredkv.config import TierConfig
from tieredkv.memory.units import FLOAT32, INT32, ceil_div
from tieredkv.models.kv_shape import KVShape
from tieredkv.ops import torch_ops
from tieredkv.policy.correction import rank_of
from tieredkv.policy.digests import DIGESTS, Digest

QUESTION_ROOM = 256
"""Tokens of host memory reserved after the video for questions; a longer question makes the tier grow."""
PAGE_BITS = 8
"""Of pages that are packed on the device, from a host tier of 16."""


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


def codec(shape: KVShape, tiers: TierConfig, bits: int) -> Codec:
    """The codec of so many bits, for chunks of this model."""
    dtype = {2: torch.float16, 4: torch.float32}[shape.itemsize]  # of dtypes only the size matters here
    return codec_for(bits, tiers.chunk_tokens, shape.head_dim, dtype)


def chunk_bytes(shape: KVShape, tiers: TierConfig, bits: int) -> int:
    """One chunk on the host: the record of C tokens of one KV head. A fetch copies as much."""
    return codec(shape, tiers, bits).chunk_bytes


def key_bytes(shape: KVShape, tiers: TierConfig, bits: int) -> int:
    """What of such a record scoring reads, its keys: of the fields, those at even places."""
    record = torch.empty(chunk_bytes(shape, tiers, bits), dtype=torch.uint8, device="cpu")
    return sum(field.nbytes for field in codec(shape, tiers, bits).fields(record)[::2])


def page_bytes(shape: KVShape, tiers: TierConfig, bits: int) -> int:
    """One page on the device: a record."""
    return chunk_bytes(shape, tiers, bits)


def page_bits(tiers: TierConfig, host_bits: int) -> tuple[int, ...]:
    """Bits of pages, from the most to the fewest, that a host tier of so many bits allows. Records of fewer than 16 are
    copied to pages as they are; others stay so if steps attend to everything and it all fits, or are packed."""
    if host_bits < PLAIN:
        return (host_bits,)
    return (PLAIN, PAGE_BITS) if tiers.pack_pages and not tiers.policy.keep_all else (PLAIN,)


def possible_page_bits(tiers: TierConfig) -> set[int]:
    """All that pages may have, whatever the host tier turns out to have."""
    return {*page_bits(tiers, PLAIN), PLAIN if tiers.host_kv_bits is None else tiers.host_kv_bits}


def fit_bytes(shape: KVShape, heads: int, bits: int) -> int:
    """What a codec has measured of the layers of `heads` KV heads (`Fit`)."""
    return 0 if bits == PLAIN else heads * 2 * 2 * shape.head_dim * FLOAT32


def first_tokens(tiers: TierConfig, tokens: int) -> int:
    """Of `tokens` prompt tokens in calls of `prefill_chunk`, the most that a layer holds in 16 bits before it is packed
    to fewer: it is before the first call that finds `FIT_TOKENS`, or once the video is complete."""
    return min(tokens, ceil_div(FIT_TOKENS, tiers.prefill_chunk) * tiers.prefill_chunk)


def records_bytes(shape: KVShape, tiers: TierConfig, tokens: int, bits: int) -> int:
    """Records of the whole chunks of `tokens` tokens."""
    return shape.kv_heads * ceil_div(tokens, tiers.chunk_tokens) * chunk_bytes(shape, tiers, bits)


def host_bytes(shape: KVShape, tiers: TierConfig, prompt: int, bits: int) -> int:
    """Host memory of the complete cache of `prompt` tokens: whole chunks, room for a longer question, digests, and the
    snapshot of layers that do not grow. With fewer than 16 bits, also what packing takes at its peak: one layer after
    the other is packed, from records of its first tokens in 16 bits to all of its room."""
    stored = stored_bytes(shape, tiers, prompt, bits)
    if bits == PLAIN:
        return stored
    packed = records_bytes(shape, tiers, prompt + QUESTION_ROOM, bits) // shape.num_layers
    plain = records_bytes(shape, tiers, first_tokens(tiers, prompt + QUESTION_ROOM), PLAIN) // shape.num_layers
    return stored + plain + (shape.num_layers - 1) * max(0, plain - packed)


def stored_bytes(shape: KVShape, tiers: TierConfig, prompt: int, bits: int) -> int:
    """What stays of `host_bytes` once everything is packed. A session file holds as much."""
    tokens, digest = prompt + QUESTION_ROOM, digest_for(shape, tiers)
    chunks, fitting = ceil_div(tokens, tiers.chunk_tokens), digest.fitted_bytes + query_moment_bytes(shape.head_dim)
    digests = shape.kv_heads * (chunks * digest.chunk_bytes + fitting)
    kept = records_bytes(shape, tiers, tokens, bits) + fit_bytes(shape, shape.kv_heads, bits)
    # Where ahead=None, a card's plan decides later: corrections, less than a per cent of the records, are left out.
    corrections = shape.num_layers * correction_bytes(shape) if tiers.ahead else 0
    return kept + digests + corrections + snapshot_bytes(shape, prompt)


def snapshot_bytes(shape: KVShape, tokens: int) -> int:
    """Host memory of the snapshot of the layers that do not grow, after `tokens` tokens."""
    states = shape.linear_layers * (shape.conv_state_bytes + shape.recurrent_state_bytes)
    states += shape.convolutions * shape.convolution_bytes
    return _window_bytes(shape, _window_tokens(shape, tokens)) + states


def untiered_bytes(shape: KVShape, past: int, new: int) -> dict[str, int]:
    """Device bytes, outside the cap, of the layers that do not grow, by kind: after a call of `new` tokens that follow
    `past` tokens. Empty without such layers."""
    kinds = {}
    if shape.sliding_layers:  # what the call attended to stays allocated until the next
        kinds["sliding windows"] = _window_bytes(shape, _window_tokens(shape, past) + new)
    if shape.linear_layers:  # the convolution state twice, see `LinearLayer`
        kinds["linear states"] = shape.linear_layers * (2 * shape.conv_state_bytes + shape.recurrent_state_bytes)
    if shape.convolutions:
        kinds["convolution states"] = shape.convolutions * shape.convolution_bytes
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


def scratch_page_bytes(shape: KVShape, tiers: TierConfig, bits: int) -> int:
    """Scratch of the torch attention per page that it reads at a time."""
    rows = shape.num_attention_heads // shape.num_key_value_heads
    return torch_ops.scratch_bytes(codec(shape, tiers, bits), rows)


def table_bytes(shape: KVShape, tiers: TierConfig, layout: Layout) -> int:
    """Upper bound of the index tables, int32 (page and length of every page a head could have, and its residency), and
    of what the ledger counts with them."""
    per_page = 2 * INT32
    per_chunk = 6 * INT32  # residency: three for a slot, one and a byte for a chunk, one for no chunk
    reused = reuse_bytes(shape, tiers, shape.kv_heads)
    pages = layout.old_chunks + layout.recent_pages
    tables = shape.kv_heads * (pages * per_page + layout.retrievable * per_chunk + INT32)
    fits = max(fit_bytes(shape, shape.kv_heads, bits) for bits in possible_page_bits(tiers))
    return tables + chunk_mass_bytes(layout) + reused + fits


def correction_bytes(shape: KVShape) -> int:
    """What corrects the predicted queries of one layer (`policy.correction`), at most."""
    width, outputs = shape.hidden_size, shape.num_attention_heads * shape.head_dim
    return rank_of(width) * (width + 1 + outputs) * shape.itemsize


def chunk_mass_bytes(layout: Layout) -> int:
    """The attention mass of each chunk in a step, summed over the layers of a device."""
    return layout.retrievable * FLOAT32


def record_bytes(shape: KVShape, columns: int, chunks: int) -> int:
    """What a step writes of one layer about the pages that it attends to: the log-sum-exp of each one's logits, if the
    table has `columns` columns, and where each head lists each of `chunks` chunks, 0 if chunks are not ranked."""
    return shape.num_attention_heads * columns * FLOAT32 + shape.num_key_value_heads * chunks * INT32


def most_record_bytes(shape: KVShape, layout: Layout) -> int:
    """Upper bound of `record_bytes`."""
    return record_bytes(shape, layout.old_chunks + layout.recent_pages, layout.retrievable)


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


def gathered_pages(shape: KVShape, tiers: TierConfig, pages: int) -> int:
    """Of `pages` pages, how many the torch attention gathers at a time: at least one of every KV head."""
    return max(shape.num_key_value_heads, min(pages, torch_ops.most_pages(tiers.chunk_tokens, shape.head_dim)))


def pool_bytes(shape: KVShape, tiers: TierConfig, pool_pages: int, bits: int) -> int:
    """A pool, and the scratch to attend to its pages: to an average head's at a time."""
    gathered = gathered_pages(shape, tiers, ceil_div(pool_pages, shape.kv_heads))
    scratch = gathered * scratch_page_bytes(shape, tiers, bits)
    return pool_pages * page_bytes(shape, tiers, bits) + scratch


def beside_pool_bytes(
    shape: KVShape, tiers: TierConfig, layout: Layout, dynamic_heads: int, at_once: int | None = None
) -> int:
    """What the decode phase holds besides the pool: tables and, for `dynamic_heads` heads that rank chunks, `at_once`
    at a time, digests and the scratch of ranking. Upper bound, whether attention masses are recorded or not."""
    tables = table_bytes(shape, tiers, layout) + most_record_bytes(shape, layout)
    if dynamic_heads == 0:
        return tables
    return tables + digest_bytes(shape, tiers, layout, dynamic_heads) + ranking_bytes(shape, tiers, layout, at_once)


def least_pages(layout: Layout) -> int:
    """The fewest pages of a dynamic head, besides the recent region."""
    return layout.sink_chunks + min(1, layout.retrievable)


def all_pages(shape: KVShape, layout: Layout) -> int:
    """Pages of a pool that holds everything."""
    return shape.kv_heads * (layout.old_chunks + layout.recent_pages)


def old_pages(tiers: TierConfig, layout: Layout) -> int:
    """Pages before the recent region that an average head may have: by `budget_ratio` or, without one, all."""
    if tiers.budget_ratio is None or tiers.policy.keep_all:
        return layout.old_chunks
    recent = layout.tokens - layout.recent_start
    return max(least_pages(layout), int((tiers.budget_ratio * layout.tokens - recent) // layout.chunk_tokens))


def smallest_decode_bytes(shape: KVShape, tiers: TierConfig, layout: Layout, host_bits: int) -> int:
    """The least cap with which this prompt can be decoded from a host tier of so many bits, however its heads are
    classified."""
    policy = tiers.policy
    dense_layers = shape.num_layers if policy.keep_all else min(policy.dense_layers, shape.num_layers)
    dense = dense_layers * shape.num_key_value_heads
    others = shape.kv_heads - dense
    pages = shape.kv_heads * layout.recent_pages + dense * layout.old_chunks + others * least_pages(layout)
    pool = pool_bytes(shape, tiers, pages, page_bits(tiers, host_bits)[-1])
    dynamic = others if policy.theta > 0 else 0
    smallest = pool + beside_pool_bytes(shape, tiers, layout, dynamic, _least_ranked(tiers))
    # Digests unpacked at a time grow with the cap.
    return ceil_div(smallest * RANKING_SHARE, RANKING_SHARE - 1) if dynamic else smallest
