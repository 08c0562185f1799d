"""Forecast of the device bytes that each phase of a prompt holds, by purpose as in the ledger, and of its copies."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tieredkv.codecs import PLAIN
from tieredkv.codecs.base import FIT_TOKENS
from tieredkv.config import TierConfig
from tieredkv.memory.residency import Residency
from tieredkv.memory.units import INT32, ceil_div
from tieredkv.models.kv_shape import KVShape
from tieredkv.planning import sizes
from tieredkv.planning.admission import refusal
from tieredkv.planning.decode_plan import DecodePlan, gather_bytes, table_width
from tieredkv.planning.prefill_plan import (
    Call,
    Staging,
    plan_staging,
    prompt_calls,
    resident_beside_scores,
    resident_tokens,
)


def assumed_static(shape: KVShape, tiers: TierConfig, share: float) -> torch.Tensor:
    """Mask `(L, K)`: `share` of the heads static, spread evenly over the layers, or as the policy fixes it."""
    policy = tiers.policy
    share = 1.0 if policy.theta <= 0 else 0.0 if policy.theta > 1 else share
    index = torch.arange(shape.kv_heads, dtype=torch.float64, device="cpu")
    static = torch.floor((index + 1) * share + 0.5) > torch.floor(index * share + 0.5)
    static = static.view(shape.num_layers, shape.num_key_value_heads)
    static[: policy.dense_layers] = True
    return static


def decode_bytes(shape: KVShape, tiers: TierConfig, plan: DecodePlan, static: torch.Tensor) -> dict[str, int]:
    """Device bytes of the decode phase by purpose, as the ledger counts them, for a known `(L, K)` mask of heads.

    The ledger's "pool" is the sum of the first three: recent pages of all heads; pages kept by static heads; sink and
    retrieval slots of dynamic heads.
    """
    layout, heads = plan.layout, shape.num_key_value_heads
    tables, widest = sizes.chunk_mass_bytes(layout), 0
    tables += sizes.fit_bytes(shape, shape.kv_heads, plan.page_bits) + plan.ahead_bytes
    for index, mask in enumerate(static):
        n_dynamic = int((~mask).sum())
        width = table_width(plan, tiers, index, mask)
        widest = max(widest, width)
        tables += 2 * heads * width * INT32  # a page and its length
        if n_dynamic:
            tables += Residency.bytes_for(n_dynamic, int(plan.slots[index].max()), layout.retrievable)
            tables += sizes.reuse_bytes(shape, tiers, n_dynamic) if plan.ranked else 0
    n_dynamic = int((~static).sum())
    ranked = plan.ranked and n_dynamic > 0
    if n_dynamic:
        tables += sizes.record_bytes(shape, widest, layout.retrievable if ranked else 0)
    page = sizes.page_bytes(shape, tiers, plan.page_bits)
    return {
        "recent pages": shape.kv_heads * layout.recent_pages * page,
        "static pages": int(plan.pages[static].sum()) * page,
        "retrieval pool": int(plan.pages[~static].sum()) * page,
        "digests": sizes.digest_bytes(shape, tiers, layout, n_dynamic) if ranked else 0,
        "tables": tables,
        "ranking": sizes.ranking_bytes(shape, tiers, layout) if ranked else 0,
        "attention": gather_bytes(shape, tiers, plan, heads * widest),
    }


def step_bytes(
    shape: KVShape, tiers: TierConfig, plan: DecodePlan, static: torch.Tensor, host_bits: int
) -> tuple[int, int]:
    """Keys, values and digests that one step reads on the device; the most that it copies from the host. The last layer
    counts once more for each of its readers, which choose chunks of their own."""
    layout, dynamic = plan.layout, ~static
    pages = shape.num_key_value_heads * layout.recent_pages + (plan.pages * static).sum(1)
    pages += dynamic.sum(1) * layout.sink_chunks + plan.selected.sum(1)
    read = _with_readers(shape, pages) * sizes.page_bytes(shape, tiers, plan.page_bits)
    if not plan.ranked or not bool(dynamic.any()):
        return read, 0
    heads = _with_readers(shape, dynamic.sum(1))
    copied = _with_readers(shape, plan.selected.sum(1)) * sizes.chunk_bytes(shape, tiers, host_bits)
    return read + sizes.digest_bytes(shape, tiers, layout, heads), copied


def _with_readers(shape: KVShape, layers: torch.Tensor) -> int:
    """The sum over layers `(L,)`, the last of which is read by others too."""
    return int(layers.sum() + shape.readers * layers[-1])


def prefill_bytes(shape: KVShape, tiers: TierConfig, prompt: int, question_tokens: int, bits: int) -> dict[str, int]:
    """Device bytes of prefill by purpose, in the call that takes most. bits: of the host tier."""
    calls = [
        {
            "resident": room * shape.token_bytes,
            "staging": staging.nbytes,
            "scores": staging.scoring_bytes,
        }
        for _, room, staging, _ in _prefill(shape, tiers, prompt, question_tokens, bits)
    ]
    return max(calls, key=lambda purposes: sum(purposes.values()))


def prefill_copy_bytes(shape: KVShape, tiers: TierConfig, prompt: int, question_tokens: int, bits: int) -> int:
    """Past keys and values streamed to the device while `prompt` tokens, the question among them, are prefilled; those
    of the last layer once more for each of its readers. bits: of the host tier."""
    moved, c = 0, tiers.chunk_tokens
    heads = shape.num_key_value_heads * (shape.num_layers + shape.readers)
    for call, room, _, now in _prefill(shape, tiers, prompt, question_tokens, bits):
        chunk = sizes.chunk_bytes(shape, tiers, now)
        if call.rows:  # scoring reads the keys again
            chunk += sizes.key_bytes(shape, tiers, now)
        moved += max(0, ceil_div(call.begin - room, c)) * heads * chunk
    return moved


def _prefill(
    shape: KVShape, tiers: TierConfig, prompt: int, question_tokens: int, bits: int
) -> Iterator[tuple[Call, int, Staging, int]]:
    """For each call of a prefill: the call, the tokens that the device has room for, how the rest is staged, and the
    bits of the host tier. It is packed once it has the tokens that a codec is fitted to, or the video is complete; the
    question then finds no token on the device."""
    room, context = resident_tokens(shape, tiers, prompt + sizes.QUESTION_ROOM, bits), prompt - question_tokens
    for call in prompt_calls(tiers, prompt, question_tokens):
        now = bits if call.begin >= min(FIT_TOKENS, context) else PLAIN
        if call.begin >= context and now < PLAIN:
            room = 0
        room = resident_beside_scores(shape, tiers, room, call, now)
        staging = plan_staging(shape, tiers, call, min(room, call.begin), room, now)
        if staging is None:
            raise refusal(shape, tiers, sizes.lay_out(tiers, call.stop, call.rows, 1), call.rows)
        yield call, room, staging, now
