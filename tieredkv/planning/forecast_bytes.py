"""What the phases of one prompt would hold on the device, by purpose, and copy to it: the ledger's counts, foreseen."""

from __future__ import annotations

import torch

from tieredkv.config import TierConfig
from tieredkv.memory.residency import Residency
from tieredkv.memory.units import INT32, ceil_div
from tieredkv.models.kv_shape import KVShape
from tieredkv.ops.packing import norm_bytes
from tieredkv.planning import decode_plan, sizes


def assumed_static(shape: KVShape, tiers: TierConfig, share: float) -> torch.Tensor:
    """Mask `(L, K)`: `share` of the heads static, spread evenly over the layers, or what the policy settles itself."""
    method = tiers.method
    share = 1.0 if method.theta <= 0 else 0.0 if method.theta > 1 else share
    index = torch.arange(shape.kv_heads, dtype=torch.float64, device="cpu")
    static = torch.floor((index + 1) * share + 0.5) > torch.floor(index * share + 0.5)
    static = static.view(shape.num_layers, shape.num_key_value_heads)
    static[: method.dense_layers] = True
    return static


def decode_bytes(
    shape: KVShape, tiers: TierConfig, made: decode_plan.DecodePlan, static: torch.Tensor
) -> dict[str, int]:
    """Device bytes of the decode phase by purpose, as the ledger counts them, for a known `(L, K)` mask of heads.

    The ledger's "pool" is the sum of the first three: recent pages of all heads; pages kept by static heads; sink and
    retrieval slots of dynamic heads.
    """
    layout, heads = made.layout, shape.num_key_value_heads
    tables, widest = sizes.attended_bytes(layout), 0
    tables += norm_bytes(shape.kv_heads, shape.head_dim) if made.packed else 0
    for index, mask in enumerate(static):
        n_dynamic = int((~mask).sum())
        width = decode_plan.table_width(made, tiers, index, mask)
        widest = max(widest, width)
        tables += 2 * heads * width * INT32  # a page and its length
        if n_dynamic:
            tables += Residency.bytes_for(n_dynamic, int(made.slots[index].max()), layout.retrievable)
            tables += sizes.reuse_bytes(shape, tiers, n_dynamic) if made.ranked else 0
    n_dynamic = int((~static).sum())
    ranked = made.ranked and n_dynamic > 0
    page = sizes.page_bytes(shape, tiers, made.packed)
    return {
        "recent pages": shape.kv_heads * layout.recent_pages * page,
        "static pages": int(made.pages[static].sum()) * page,
        "retrieval pool": int(made.pages[~static].sum()) * page,
        "digests": sizes.digest_bytes(shape, tiers, layout, n_dynamic) if ranked else 0,
        "tables": tables,
        "ranking": sizes.ranking_bytes(shape, tiers, layout) if ranked else 0,
        "attention": min(made.scratch_pages, heads * widest) * sizes.scratch_page_bytes(shape, tiers, made.packed),
    }


def prefill_bytes(shape: KVShape, tiers: TierConfig, prompt: int, asked: int) -> dict[str, int]:
    """Device bytes of the prefill phase by purpose: of the prompt's last calls, the one that takes most."""

    def call(begin: int, stop: int, rows: int, room: int) -> dict[str, int]:
        c, held = tiers.chunk_tokens, min(room, begin)
        to_stage = ceil_div(begin - held, c) * c
        block = sizes.block_tokens(shape, tiers, stop, rows, room, staged=to_stage > 0)
        block = min(block, max(to_stage, ceil_div(max(held, stop - begin), c) * c))
        buffers = sizes.staging_buffers(to_stage, block)
        return {
            "resident": room * shape.token_bytes,
            "staging": buffers * sizes.buffer_bytes(shape, min(block, to_stage)),
            "scores": sizes.scoring_bytes(shape, tiers, stop, rows, block),
        }

    calls = [call(*one) for one in _calls(shape, tiers, prompt, asked)]
    return max(calls, key=lambda held: sum(held.values()))


def prefill_copy_bytes(shape: KVShape, tiers: TierConfig, prompt: int, asked: int) -> int:
    """Past keys and values streamed to the device while `prompt` tokens are prefilled and the last `asked` scored."""
    moved, c = 0, tiers.chunk_tokens
    for begin, _, rows, room in _calls(shape, tiers, prompt, asked):
        past = max(0, ceil_div(begin, c) * c - room) * shape.token_bytes
        moved += past + (past // 2 if rows else 0)  # scoring reads the keys again
    return moved


def _calls(shape: KVShape, tiers: TierConfig, prompt: int, asked: int) -> list[tuple[int, int, int, int]]:
    """The forward calls of a prefill: first token, end, text rows scored (of the last call), tokens resident."""
    size, prefix = tiers.prefill_chunk, prompt - asked
    room = sizes.resident_tokens(shape, tiers, prompt + sizes.QUESTION_ROOM)
    calls = [(begin, min(begin + size, prefix), 0, room) for begin in range(0, prefix, size)]
    last = max(prefix, prompt - size)
    calls += [(max(prefix, stop - size), stop, 0, room) for stop in range(last, prefix, -size)]
    rows = min(asked, size, tiers.method.text_window)
    left = sizes.resident_beside_scores(shape, tiers, room, last, prompt, rows)
    return [*calls, (last, prompt, rows, left)]
