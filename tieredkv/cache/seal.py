"""The seal: between the last prompt token and the first decoding step, classify the heads, plan the cap, fill the pool.

Shapes: `L` layers, `K` KV heads, `N` prompt tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tieredkv.cache.counters import Counters
from tieredkv.cache.decode_phase import DecodePhase
from tieredkv.cache.decoding import Decoding
from tieredkv.cache.device_tier import DeviceTier
from tieredkv.cache.layer import TieredLayer, pack
from tieredkv.cache.layer_order import LayerOrder
from tieredkv.cache.prefill import TextRows
from tieredkv.cache.question import Question
from tieredkv.config import TierConfig
from tieredkv.memory.ledger import on_device
from tieredkv.models.kv_shape import KVShape
from tieredkv.planning import decode_plan, sizes
from tieredkv.policy import classify


@dataclass(frozen=True, slots=True)
class HeadTypes:
    """What the question's rows say about every head."""

    scores: torch.Tensor
    """`(L, K)` text-centric scores; ones where nothing depends on them (`Policy.scores_mass`)."""
    static: torch.Tensor
    """`(L, K)` mask; the others are dynamic."""
    need: torch.Tensor | None
    """`(2, L, K)` tokens that a head needs in order to be static, and tokens that cover a smaller share of its
    attention; None: the policy does not measure it."""


def classify_heads(
    rows: Sequence[TextRows],
    shape: KVShape,
    tiers: TierConfig,
    layout: sizes.Layout,
    cap_bytes: int,
    host_bits: int,
) -> HeadTypes:
    """Which heads are static. rows: one per layer. cap_bytes: bytes that the plan may spend. host_bits: of the host
    tier."""
    policy, need = tiers.policy, None
    scores = torch.ones((len(rows), shape.num_key_value_heads), dtype=torch.float32, device="cpu")
    if policy.scores_mass:
        scores = torch.stack([layer.scores for layer in rows if layer.scores is not None])
    if policy.head_score == "mass":
        static = classify.static_heads(scores, policy.theta)
    else:
        need = _need(rows, shape, tiers, layout)
        static = need[0] <= decode_plan.mean_old_tokens(shape, tiers, layout, cap_bytes, host_bits)
    static[: policy.dense_layers] = True
    return HeadTypes(scores, static, need)


def _need(rows: Sequence[TextRows], shape: KVShape, tiers: TierConfig, layout: sizes.Layout) -> torch.Tensor:
    """`HeadTypes.need`; more than the prompt's tokens where there are too few rows to measure it."""
    heads, theta = shape.num_key_value_heads, tiers.policy.theta
    if theta <= 0:
        return torch.zeros((2, len(rows), heads), dtype=torch.int64, device="cpu")
    unknown = torch.full((2, heads), layout.tokens + 1, dtype=torch.int64, device="cpu")
    recent = layout.tokens - layout.recent_start
    need = [
        classify.tokens_to_cover(layer.halves, tiers.sink_tokens, recent, (theta, classify.SPREAD_SHARE))
        if layer.count >= classify.LEAST_ROWS
        else unknown
        for layer in rows
    ]
    return torch.stack(need, dim=1)


def text_mask(question: Question, tokens: int, text_window: int) -> torch.Tensor:
    """Mask `(tokens,)` of the prompt's text tokens."""
    if question.visual is None:
        return torch.arange(tokens, device="cpu") >= tokens - question.most_rows(text_window)
    is_text = torch.ones(tokens, dtype=torch.bool, device="cpu")
    is_text[: question.visual.shape[0]] = ~question.visual
    return is_text


def seal(layers: Sequence[TieredLayer], device_tier: DeviceTier, question: Question, order: LayerOrder) -> Decoding:
    """Take every layer from prefill to decoding.

    No copy may be under way. Raises `BudgetError` when the prompt does not fit under the cap; the layers are then still
    in prefill, and as they were.
    """
    rows = [layer.rows for layer in layers if layer.rows is not None]
    if len(rows) != len(layers):
        raise RuntimeError("no text rows were scored: nothing to classify the heads by")
    tiers, shape, tokens = device_tier.tiers, device_tier.shape, layers[0].prompt_length
    text_window = tiers.policy.text_window
    layout = sizes.lay_out(tiers, tokens, question.most_rows(text_window), question.max_new_tokens)
    # The plan counts the masses of chunks and pages of one device; every device has its own.
    masses = sizes.chunk_mass_bytes(layout) + sizes.most_record_bytes(shape, layout)
    cap_bytes = tiers.cap_bytes - (len(device_tier.devices) - 1) * masses
    bits = device_tier.next_bits(tokens)
    types = classify_heads(rows, shape, tiers, layout, cap_bytes, bits)
    heads, waits = (types.scores, types.static, types.need), device_tier.waits([layer.device for layer in layers])
    plan = decode_plan.plan_decode(shape, tiers, layout, cap_bytes, *heads, host_bits=bits, waits=waits)
    pack(layers, device_tier, bits)
    device_tier.make_room_for_pools()
    try:
        phases = _fill(layers, device_tier, question, plan, types.static)
    except BaseException:
        for layer in layers:
            layer.end_decoding()
        device_tier.end_decoding()
        raise
    return Decoding([layer.sealed for layer in layers if layer.sealed is not None], phases, order)


def _fill(
    layers: Sequence[TieredLayer],
    device_tier: DeviceTier,
    question: Question,
    plan: decode_plan.DecodePlan,
    static: torch.Tensor,
) -> list[DecodePhase]:
    """Allocate memory on every device as planned, and copy every layer's pages. Returns one phase per device."""
    tiers, shape, layout, looks = device_tier.tiers, device_tier.shape, plan.layout, question.looks
    dynamic_heads = int((~static).sum())
    counters = Counters(
        static_heads=int(static.sum()), dynamic_heads=dynamic_heads, trace=[] if question.trace else None
    )
    if looks is not None:
        attending = sum(int((~mask).sum()) * (1 + layer.readers) for layer, mask in zip(layers, static, strict=True))
        looks.begin_answer(layout.sink_chunks, attending * shape.num_attention_heads // shape.num_key_value_heads)

    widest = max(decode_plan.table_width(plan, tiers, index, mask) for index, mask in enumerate(static))
    chunks = shape.num_key_value_heads * layout.retrievable

    codec = device_tier.codec(plan.page_bits, layers[0].dtype)

    def phase(device: torch.device) -> DecodePhase:
        here = [layer.index for layer in layers if layer.device == device]
        return DecodePhase(
            tiers=tiers,
            shape=shape,
            plan=plan,
            ledger=device_tier.ledger,
            pool=device_tier.new_pool(plan.pool_pages(here), codec, device),
            prefetcher=device_tier.copies if tiers.prefetch else None,
            foreseen=plan.ahead,
            counters=counters,
            ops=device_tier.step_ops(device),
            chunk_mass=device_tier.ledger.empty("tables", (layout.retrievable,), torch.float32, device).zero_(),
            page_lse=device_tier.ledger.empty("tables", (shape.num_attention_heads, widest), torch.float32, device)
            if dynamic_heads
            else None,
            chunk_order=device_tier.ledger.empty("tables", (chunks,), torch.int32, device)
            if dynamic_heads and plan.ranked
            else None,
            looks=looks,
        )

    phases = {device: phase(device) for device in device_tier.devices}
    is_text = text_mask(question, layout.tokens, tiers.policy.text_window)
    for layer, mask in zip(layers, static, strict=True):
        with on_device(layer.device):
            layer.seal(mask, is_text, phases[layer.device])
    return list(phases.values())
