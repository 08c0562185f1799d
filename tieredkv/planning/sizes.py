"""Sizes: model shape x tokens x settings -> bytes of everything held, and the smallest cap that would work.

A cache is in one of two phases, each bounded by the same cap: prefill (staging buffers and score rows) and decode
(pool, digests, scratch; `decode_plan` divides what there is of it). `memory.device.DeviceLedger` counts what is really
held. No tensors are made here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tieredkv.config import TierConfig
from tieredkv.errors import BudgetError
from tieredkv.memory.units import FLOAT16, FLOAT32, GIB, INT32, INT64, as_gib, ceil_div
from tieredkv.models.kv_shape import KVShape
from tieredkv.ops.packing import norm_bytes, packed_bytes
from tieredkv.policy.classify import top_k_count
from tieredkv.policy.digests import DIGESTS, Digest

STAGING_TOKENS = 2048
"""Past tokens staged at a time when the cap has room: long enough that a copy runs at link speed and that merging the
blocks' attention costs nothing to speak of; longer would only leave fewer tokens resident."""

QUESTION_ROOM = 256
"""Tokens of host memory set aside beyond the video for the longest question; a longer one makes the tier grow."""

FEWER_TOKENS = "lower fps, max_frames or max_new_tokens"
"""What to do about a prompt that is too long, before its video is ingested."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How the prompt's tokens divide, the same for every head; counted in chunks and pages of C tokens."""

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


def question_rows(tiers: TierConfig, asked: int) -> int:
    """Text rows that are scored for a question of `asked` tokens: the last ones of its last prefill call."""
    return min(asked, tiers.prefill_chunk, tiers.method.text_window)


def lay_out(tiers: TierConfig, tokens: int, text_rows: int, new_tokens: int) -> Layout:
    """Divide `tokens` prompt tokens, the last `text_rows` of them the question, before `new_tokens` generated ones."""
    c = tiers.chunk_tokens
    window = max(tiers.recent_window, min(text_rows, tiers.method.text_window))
    start = c * (max(0, tokens - window) // c)
    return Layout(
        chunk_tokens=c,
        tokens=tokens,
        recent_start=start,
        recent_pages=ceil_div(tokens - start + new_tokens, c),
        sink_chunks=min(ceil_div(tiers.sink_tokens, c), start // c),
    )


def chunk_bytes(shape: KVShape, tiers: TierConfig) -> int:
    """One chunk on the host, and what is copied of it: keys and values of C tokens of one KV head."""
    return 2 * tiers.chunk_tokens * shape.head_dim * shape.itemsize


def page_bytes(shape: KVShape, tiers: TierConfig, packed: bool) -> int:
    """One page on the device. packed: it is of 8 bits."""
    return packed_bytes(tiers.chunk_tokens, shape.head_dim) if packed else chunk_bytes(shape, tiers)


def host_bytes(shape: KVShape, tiers: TierConfig, prompt: int) -> int:
    """Host memory of the complete cache of `prompt` tokens: whole chunks, room for a longer question, digests."""
    chunks, digest = ceil_div(prompt + QUESTION_ROOM, tiers.chunk_tokens), digest_for(shape, tiers)
    fitting = digest.fitted_bytes + query_moment_bytes(shape.head_dim)
    return shape.kv_heads * (chunks * (chunk_bytes(shape, tiers) + digest.chunk_bytes) + fitting)


def digest_for(shape: KVShape, tiers: TierConfig) -> Digest[Any]:
    """The policy's digest, for chunks of this model's keys."""
    return DIGESTS[tiers.method.digest](shape.head_dim, tiers.chunk_tokens, tiers.method.digest_bits)


def query_moment_bytes(head_dim: int) -> int:
    """Second moment of the queries of one KV head, which digests are fitted to, on the host."""
    return head_dim**2 * FLOAT32


def scratch_page_bytes(shape: KVShape, tiers: TierConfig, packed: bool) -> int:
    """What the torch attention holds per gathered page: keys and values in float32 (torch's kernel packs the keys once
    more), indices of rows, a mask; of packed pages the scales of keys or values, in both types."""
    narrow = 1 if packed else 0 if shape.itemsize == FLOAT32 else shape.itemsize
    scales = FLOAT32 + FLOAT16 if packed else 0
    return tiers.chunk_tokens * (shape.head_dim * (3 * FLOAT32 + narrow) + scales + 2 * INT64 + FLOAT32 + 1)


def table_bytes(shape: KVShape, tiers: TierConfig, layout: Layout) -> int:
    """Upper bound of the index tables, int32 (page and length of every page a head could have, and its residency), and
    of what stands beside them."""
    per_page = 2 * INT32
    per_chunk = 6 * INT32  # residency: three for a slot, one and a byte for a chunk, one for no chunk
    reused = reuse_bytes(shape, tiers, shape.kv_heads)
    pages = layout.old_chunks + layout.recent_pages
    tables = shape.kv_heads * (pages * per_page + layout.retrievable * per_chunk + INT32)
    norms = norm_bytes(shape.kv_heads, shape.head_dim) if tiers.pack_pages else 0
    return tables + attended_bytes(layout) + reused + norms


def attended_bytes(layout: Layout) -> int:
    """What a step adds up of the attention that each chunk got, all layers in one."""
    return layout.retrievable * FLOAT32


def reuse_bytes(shape: KVShape, tiers: TierConfig, heads: int) -> int:
    """The queries of the step before of `heads` dynamic heads, where the policy reuses chunks; else 0."""
    group = shape.num_attention_heads // shape.num_key_value_heads
    return heads * group * shape.head_dim * FLOAT32 if tiers.method.reuse_above <= 1 else 0


def digest_bytes(shape: KVShape, tiers: TierConfig, layout: Layout, dynamic_heads: int) -> int:
    """Digests on the device: of every retrievable chunk of `dynamic_heads` heads, with the fitted state for ranking."""
    digest = digest_for(shape, tiers)
    return dynamic_heads * (layout.retrievable * digest.chunk_bytes + digest.ranking_fitted_bytes)


RANKING_SHARE = 64
"""Digests unpacked at a time take up to one part in so many of the cap."""


def _ranked_chunk_bytes(shape: KVShape, tiers: TierConfig) -> int:
    """Scratch per chunk ranked at a time."""
    return digest_for(shape, tiers).scratch_bytes(shape.num_key_value_heads, shape.num_attention_heads)


def ranked_chunks_at_once(shape: KVShape, tiers: TierConfig, layout: Layout) -> int:
    """Chunks of one layer to rank at a time: as many as `RANKING_SHARE` allows, of 512 to 4,096 tokens together.

    More would not be faster: what is unpacked of them has to stay in a processor's cache.
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
    """Scratch of ranking one layer's chunks for one more step at the same time: at most the logits of every token,
    four times."""
    return 4 * FLOAT32 * shape.num_attention_heads * layout.retrievable * layout.chunk_tokens


def staging_bytes(shape: KVShape, block_tokens: int) -> int:
    """The most that staging takes, each buffer being the keys and values of `block_tokens` tokens of a layer."""
    return 3 * buffer_bytes(shape, block_tokens)


def buffer_bytes(shape: KVShape, block_tokens: int) -> int:
    """Keys and values of `block_tokens` tokens of one layer."""
    return 2 * shape.num_key_value_heads * block_tokens * shape.head_dim * shape.itemsize


def staging_buffers(to_stage: int, block_tokens: int) -> int:
    """Buffers to stage `to_stage` tokens: one being read, and one or, if all is more than a block, two to stage to."""
    return 0 if to_stage == 0 else 2 if to_stage <= block_tokens else 3


def scoring_bytes(shape: KVShape, tiers: TierConfig, tokens: int, rows: int, block_tokens: int) -> int:
    """Scratch of scoring one layer's text rows: weights of one block, the running top k, the saliency."""
    if rows == 0:
        return 0
    heads = shape.num_attention_heads
    k = top_k_count(tiers.method.top_k_ratio, tokens)
    keys_float = shape.num_key_value_heads * block_tokens * shape.head_dim
    weights = 3 * heads * rows * block_tokens
    top = 7 * heads * rows * min(k, tokens)  # old, block's, both joined, and the new with its int64 indices
    return FLOAT32 * (keys_float + weights + top + 2 * shape.num_key_value_heads * tokens)


def resident_tokens(shape: KVShape, tiers: TierConfig, tokens: int) -> int:
    """First tokens of every layer to keep on the device while `tokens` tokens are prefilled, whole chunks.

    All of them if they fit: nothing is then staged from the host. Otherwise as many as fit beside the staging buffers:
    the first are read the most often. Room for the scores of `text_window` rows is left free if that saves more copies
    at the end, where residents make way otherwise, than it costs before.
    """
    c, rows = tiers.chunk_tokens, tiers.method.text_window
    everything = ceil_div(tokens, c) * c
    choices = []
    if block_tokens(shape, tiers, tokens, rows=0, resident=everything, staged=False):
        choices.append(everything)
    for scored in (0, rows):
        block = block_tokens(shape, tiers, tokens, scored, resident=0, staged=True)
        taken = staging_bytes(shape, block) + scoring_bytes(shape, tiers, tokens, scored, block)
        left = max(0, tiers.cap_bytes - taken) // shape.token_bytes if block else 0
        choices.append(min(everything, left // c * c))

    def read_again(resident: int) -> float:
        """Tokens copied to the device again: in each call those before it, at the end keys once more for the scores."""
        before = sum(max(0, past - resident) for past in range(0, tokens, tiers.prefill_chunk))
        return before + 1.5 * (
            tokens - min(tokens, resident_beside_scores(shape, tiers, resident, tokens, tokens, rows))
        )

    return min(choices, key=read_again)


def resident_beside_scores(shape: KVShape, tiers: TierConfig, resident: int, past: int, tokens: int, rows: int) -> int:
    """Tokens that stay resident when `rows` rows of `tokens` tokens, `past` of them cached, are scored: all or none."""
    staged = past > resident
    return resident if block_tokens(shape, tiers, tokens, rows, resident, staged) else 0


def block_tokens(shape: KVShape, tiers: TierConfig, tokens: int, rows: int, resident: int, staged: bool) -> int:
    """Past tokens to read at a time, whole chunks: the most that fit the cap, up to `STAGING_TOKENS`; 0 if none do.

    rows: text rows scored in the same pass (0 when none are). resident: tokens of every layer held on the device
    besides. staged: whether buffers are needed.
    """
    c = tiers.chunk_tokens
    cap = tiers.cap_bytes - resident * shape.token_bytes

    def fits(block: int) -> bool:
        buffers = staging_bytes(shape, block) if staged else 0
        return buffers + scoring_bytes(shape, tiers, tokens, rows, block) <= cap

    low, high = 0, max(1, STAGING_TOKENS // c)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle * c) else (low, middle - 1)
    return low * c


def least_pages(layout: Layout) -> int:
    """Pages a dynamic head cannot do without, besides the recent region."""
    return layout.sink_chunks + min(1, layout.retrievable)


def smallest_cap_bytes(shape: KVShape, tiers: TierConfig, layout: Layout, text_rows: int) -> int:
    """The least cap with which this prompt can be prefilled and decoded, whatever the heads turn out to be."""
    c = tiers.chunk_tokens
    rows = min(text_rows, tiers.method.text_window)
    prefill = staging_bytes(shape, c) + scoring_bytes(shape, tiers, layout.tokens, rows, c)
    method = tiers.method
    dense = (
        shape.kv_heads if method.keep_all else min(method.dense_layers, shape.num_layers) * shape.num_key_value_heads
    )
    others = shape.kv_heads - dense
    pages = shape.kv_heads * layout.recent_pages + dense * layout.old_chunks + others * least_pages(layout)
    gathered = max(shape.num_key_value_heads, ceil_div(pages, shape.kv_heads))
    packed = tiers.pack_pages and not method.keep_all
    scratch = gathered * scratch_page_bytes(shape, tiers, packed)
    decode = pages * page_bytes(shape, tiers, packed) + scratch + table_bytes(shape, tiers, layout)
    if others and method.theta > 0:
        least = _least_ranked(tiers)
        decode += digest_bytes(shape, tiers, layout, others) + ranking_bytes(shape, tiers, layout, least)
        decode = ceil_div(decode * RANKING_SHARE, RANKING_SHARE - 1)  # what is ranked at once grows with the cap
    return max(prefill, decode)


def check_cap(shape: KVShape, tiers: TierConfig, layout: Layout, text_rows: int, remedy: str = FEWER_TOKENS) -> None:
    """Raise `BudgetError` if the prompt cannot be served under the cap, before any work is done on it."""
    if tiers.cap_bytes < smallest_cap_bytes(shape, tiers, layout, text_rows):
        raise refusal(shape, tiers, layout, text_rows, remedy)


def refusal(
    shape: KVShape, tiers: TierConfig, layout: Layout, text_rows: int | None = None, remedy: str = FEWER_TOKENS
) -> BudgetError:
    """The error that says what was asked, what it takes, and the smallest `gpu_kv_gb` that works."""
    rows = tiers.method.text_window if text_rows is None else text_rows
    smallest = smallest_cap_bytes(shape, tiers, layout, rows)
    return BudgetError(
        f"gpu_kv_gb={tiers.gpu_kv_gb:g} is too small for {layout.tokens:,} tokens in {shape.kv_heads} KV heads "
        f"(full cache {layout.tokens * shape.token_bytes / GIB:.4g} GiB): the smallest that works is "
        f"{as_gib(smallest)}. Raise it, or {remedy}."
    )
