"""The memory check: whether both tiers can serve a prompt, before any work is done on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tieredkv.config import TierConfig
from tieredkv.errors import BudgetError
from tieredkv.memory.limits import check_host, check_host_memory
from tieredkv.memory.units import GIB, as_gib
from tieredkv.models.kv_shape import KVShape
from tieredkv.planning.disk_plan import check_disk, disk_plan, least_bytes, to_disk
from tieredkv.planning.host_plan import fewer_bits, least_bits, prompt_bits
from tieredkv.planning.prefill_plan import question_rows, smallest_prefill_bytes, untiered_prefill_bytes
from tieredkv.planning.sizes import Layout, host_bytes, lay_out, records_bytes, smallest_decode_bytes, snapshot_bytes

FEWER_TOKENS = "lower fps, max_pixels, max_frames or max_new_tokens"
"""Remedy for a prompt that is too long, while its video is not ingested yet."""


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt of `tokens` tokens, the last `question_tokens` of them the question, and an answer of `new_tokens`."""

    tokens: int
    question_tokens: int
    new_tokens: int

    def layout(self, tiers: TierConfig) -> Layout:
        return lay_out(tiers, self.tokens, question_rows(tiers, self.question_tokens), self.new_tokens)


def check_memory(
    shape: KVShape,
    tiers: TierConfig,
    request: Request,
    device_remedy: str | Callable[[int], str] = FEWER_TOKENS,
    host_remedy: str | Callable[[int], str] | None = None,
    shared_remedy: str | Callable[[int], str] = f"{FEWER_TOKENS}, or lower gpu_kv_gb",
    *,
    room: int = 0,
    room_bytes: int = 0,
    beside: int = 0,
    available: int | None = None,
    one_memory: bool = False,
    bits: int | None = None,
    folder: Path | None = None,
    on_disk: bool = False,
) -> Layout:
    """Raise `BudgetError` unless the request fits under the device cap and in host memory. Returns its layout.

    device_remedy, host_remedy, shared_remedy: advice for the message, or functions that return it: of the smallest cap
    in bytes, which returns sentences; of the bytes that the host tier may have; of those of the one memory of both
    tiers. room: tokens that the host tier holds without growing, in `room_bytes` together with the snapshot; 0: nothing
    is allocated yet. beside: host memory that a conversation has allocated. available: bytes of host memory (None:
    measured now).
    one_memory: host memory must hold the device tier too, and the layers that do not grow. bits: of a host tier that is
    there; None: as planned for the prompt. folder: for what `host_kv_gb` does not hold; None: nothing goes to disk.
    on_disk: whether the tokens before the question are on disk already.
    """
    layout = request.layout(tiers)
    check_cap(shape, tiers, layout, question_rows(tiers, request.question_tokens), device_remedy, bits)
    if request.tokens <= room:
        return layout
    bits = prompt_bits(shape, tiers, request.tokens) if bits is None else bits
    if on_disk:
        before = request.tokens - request.question_tokens
        needed = least_bytes(shape, tiers, before, bits, request.question_tokens) + beside
        what = f"the cache of the video, on disk, and a question of {request.question_tokens:,} tokens"
    elif room:
        kept = records_bytes(shape, tiers, request.tokens, bits)
        needed = kept + snapshot_bytes(shape, request.tokens) + beside
        what = f"the cache of the video and a question of {request.question_tokens:,} tokens"
    else:
        needed = host_bytes(shape, tiers, request.tokens, bits)
        what = f"the cache of {request.tokens:,} tokens"

    def remedy(allowed: int) -> str:
        options = [*fewer_bits(shape, tiers, request.tokens, allowed), f"host_kv_gb={as_gib(needed)}"]
        if folder is not None:
            options += to_disk(shape, tiers, request.tokens, bits, allowed, folder)
        return f"lower fps, max_pixels or max_frames, or give {' or '.join(options)}"

    host_remedy = remedy if host_remedy is None else host_remedy
    plan = None if folder is None or room else disk_plan(shape, tiers, request.tokens, bits)
    if plan is None:
        check_host(needed, tiers.host_kv_gb, what, host_remedy, available, room_bytes + beside)
    else:
        check_disk(shape, tiers, request.tokens, bits, plan, folder, host_remedy, available)
        needed, what = plan.host_bytes, f"{what}, on disk,"
    if one_memory:
        what = f"{what}, with the device tier in the same memory,"
        untiered = sum(untiered_prefill_bytes(shape, tiers, request.tokens, request.question_tokens).values())
        device = min(tiers.cap_bytes, needed) + untiered
        check_host_memory(needed + device, what, shared_remedy, available)
    return layout


def smallest_cap_bytes(
    shape: KVShape, tiers: TierConfig, layout: Layout, text_rows: int, bits: int | None = None
) -> int:
    """The least cap with which this prompt can be prefilled and decoded, however its heads are classified.

    bits: of a host tier that is there; None: as it would be under that cap.
    """
    rows = min(text_rows, tiers.policy.text_window)
    bits = least_bits(shape, tiers) if bits is None else bits
    prefill = smallest_prefill_bytes(shape, tiers, layout.tokens, rows, bits)
    return max(prefill, smallest_decode_bytes(shape, tiers, layout, bits))


def check_cap(
    shape: KVShape,
    tiers: TierConfig,
    layout: Layout,
    text_rows: int,
    remedy: str | Callable[[int], str] = FEWER_TOKENS,
    bits: int | None = None,
) -> None:
    """Raise `BudgetError` if the prompt cannot be served under the cap."""
    if tiers.cap_bytes < smallest_cap_bytes(shape, tiers, layout, text_rows, bits):
        raise refusal(shape, tiers, layout, text_rows, remedy, bits)


def refusal(
    shape: KVShape,
    tiers: TierConfig,
    layout: Layout,
    text_rows: int | None = None,
    remedy: str | Callable[[int], str] = FEWER_TOKENS,
    bits: int | None = None,
) -> BudgetError:
    """The error for a cap that is too small; names the smallest `gpu_kv_gb` that works. remedy: as `device_remedy` of
    `check_memory`. bits: as for `smallest_cap_bytes`."""
    rows = tiers.policy.text_window if text_rows is None else text_rows
    smallest = smallest_cap_bytes(shape, tiers, layout, rows, bits)
    return BudgetError(
        f"gpu_kv_gb={tiers.gpu_kv_gb:g} is too small for {layout.tokens:,} tokens in {shape.kv_heads} KV heads "
        f"(full cache {layout.tokens * shape.token_bytes / GIB:.4g} GiB): the smallest that works is "
        f"{as_gib(smallest)}. " + (remedy(smallest) if callable(remedy) else f"Raise it, or {remedy}.")
    )
