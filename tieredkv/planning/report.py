"""MemoryPlan: bytes by tier and purpose, and estimated times on a link and a card, as JSON and as a table.

Sizes are bytes, rates GB/s (1e9 bytes). Times are estimates from data moved, not measurements.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from tieredkv.codecs import PLAIN
from tieredkv.memory.units import GIB
from tieredkv.memory.units import size_text as _size
from tieredkv.models.kv_shape import KVShape
from tieredkv.models.long_context import beyond_training
from tieredkv.planning.cards import CARDS
from tieredkv.planning.links import LINKS
from tieredkv.planning.step_forecast import StepForecast


@dataclass(frozen=True, slots=True)
class BitsChoice:
    """What one setting of `host_kv_bits` would take."""

    bits: int
    host_bytes: int
    disk_bytes: int
    """Of what `host_kv_gb` does not hold; 0: it holds everything."""
    file_bytes: int
    step_copy_bytes: int | None
    """As in `MemoryPlan`; None: the cap is too small."""

    def __str__(self) -> str:
        if self.step_copy_bytes is None:
            copied = "gpu_kv_gb is too small"
        elif self.step_copy_bytes:
            copied = f"a step copies at most {_size(self.step_copy_bytes)}"
        else:
            copied = "a step copies nothing: all of it stays on the device"
        disk = f" and {_size(self.disk_bytes)} of disk" if self.disk_bytes else ""
        return f"{_size(self.host_bytes)}{disk}, {copied}"


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Where a prompt's keys and values would go, and what moving them would cost. `str()` gives the table."""

    model_type: str
    dtype: str
    shape: KVShape
    decoder_bytes: int
    """Weights of the decoder, embeddings and output layer included."""
    vision_bytes: int
    """Weights of the vision tower."""
    step_weight_bytes: int
    """Weights one decoding step reads: the decoder's, without tables of embeddings (except one that is the output
    layer), and only those experts that a token is routed to."""
    quantisation: str | None
    """How the checkpoint's weights are quantised; None: they are not."""
    video: str | None
    """Name of the video; None, like the next seven fields, if the plan is for a number of tokens."""
    frames: int | None
    frame_size: tuple[int, int] | None
    """Height and width of the frames before the processor resizes them."""
    tower_size: tuple[int, int] | None
    """Height and width of the frames as the vision tower sees them, without their tiles."""
    fps: float | None
    fit: str | None
    """What `fit=True` chose, in words; None without it."""
    grid: tuple[int, int, int] | None
    """Temporal steps, rows and columns of visual tokens."""
    encode_batch: int | None
    """Visual tokens per call of the vision tower."""
    visual_tokens: int
    video_text_tokens: int
    """Text that the model's prompt holds inside the video: timestamps, frame numbers."""
    prompt_tokens: int
    new_tokens: int
    full_bytes: int
    """Keys and values of the prompt in a full cache."""
    host_bytes: int
    """Host memory of the complete cache: whole chunks, room for a longer question, digests, the snapshot, and what
    packing takes at its peak."""
    disk_bytes: int
    """Of keys and values on disk, of which host memory holds those asked for most often; 0 if it holds all of them."""
    recent_bytes: int
    """Of host memory, for chunks that were read from disk last."""
    disk_folder: str | None
    """Where, unless the session is to be saved elsewhere."""
    host_bits: int
    """Bits of a number there; 16 stands for the model's dtype."""
    host_bits_reason: str
    """Why, in words."""
    bits_choices: tuple[BitsChoice, ...]
    """What each setting of `host_kv_bits` would take, from the most bits to the fewest."""
    file_bytes: int
    """A saved session, without its header."""
    snapshot_bytes: int
    """Part of it: the snapshot of layers that do not grow; 0 without such layers."""
    host_budget_bytes: int
    cap_bytes: int
    """`gpu_kv_gb` in bytes; neither phase exceeds it."""
    prefill: dict[str, int]
    """Device bytes of the prefill phase by purpose."""
    decode: dict[str, int]
    """Device bytes of the decode phase by purpose."""
    untiered_prefill: dict[str, int]
    """Device bytes of layers that do not grow, by kind, in the call of prefill that leaves most. Outside the cap."""
    untiered_decode: dict[str, int]
    """The same after the last step."""
    static_heads: int
    """Assumed: how many heads are static is known only once a question is asked."""
    dynamic_heads: int
    static_tokens: int
    """Tokens a static head attends to per step, all of them on the device (mean)."""
    dynamic_tokens: int
    """Tokens a dynamic head attends to per step."""
    page_bits: int
    """Bits of keys and values on the device while decoding."""
    step_read_bytes: int
    """Keys, values and digests that one step reads on the device."""
    step_copy_bytes: int
    """The most that one step copies from the host: all it selects, as if none of it were resident."""
    prefill_copy_bytes: int
    """Past keys and values streamed to the device while the whole prompt is prefilled and its question scored."""
    step: StepForecast
    """What a decoding step does, and how long it takes."""
    link: str
    link_gb_s: float
    card: str | None
    card_gb_s: float | None
    card_bytes: int | None
    """The card's memory by its data sheet; None, like the reserve, unless the card is known by name."""
    working_bytes: int
    """Device bytes besides weights and cap: estimated activations of the decoder and the vision tower, and the layers
    that do not grow."""
    reserve_bytes: int | None
    """What of the card's memory the driver, CUDA and workspaces are taken to use."""
    trained_tokens: int | None
    """The longest context that the model is made for; None if its config does not say."""

    @property
    def kv_bytes(self) -> int:
        """The most that keys and values take on the device: both phases, as sealing holds some of each, or the cap."""
        return min(self.cap_bytes, sum(self.prefill.values()) + sum(self.decode.values()))

    @property
    def card_needed_bytes(self) -> int | None:
        """What all of it takes of the card; None unless the card is known by name."""
        if self.reserve_bytes is None:
            return None
        return self.decoder_bytes + self.vision_bytes + self.working_bytes + self.kv_bytes + self.reserve_bytes

    @property
    def prefill_copy_s(self) -> float:
        """Seconds the link needs for what prefill streams."""
        return self.prefill_copy_bytes / self.link_gb_s / 1e9

    @property
    def step_copy_ms(self) -> float:
        """Milliseconds the link needs for the most that one step copies."""
        return self.step_copy_bytes / self.link_gb_s / 1e6

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        shape = values.pop("shape")
        values["bits_choices"] = [asdict(choice) for choice in self.bits_choices]
        return {
            "layers": shape.num_layers,
            "heads": shape.num_attention_heads,
            "kv_heads": shape.num_key_value_heads,
            "head_dim": shape.head_dim,
            "token_bytes": shape.token_bytes,
            **{name: list(value) if isinstance(value, tuple) else value for name, value in values.items()},
            "card_needed_bytes": self.card_needed_bytes,
            "prefill_copy_s": self.prefill_copy_s,
            "step_copy_ms": self.step_copy_ms,
            "step": self.step.as_dict(),
        }

    def __str__(self) -> str:
        return "\n".join(f"{name:<17} {text}".rstrip() for name, text in self._rows())

    def _rows(self) -> list[tuple[str, str]]:
        shape = self.shape
        text = self.prompt_tokens - self.visual_tokens
        rows = [
            (
                "model",
                f"{self.model_type}, {self.dtype}: {self._layers()} x {shape.num_attention_heads} heads, "
                f"{shape.num_key_value_heads} KV heads of {shape.head_dim}",
            ),
            ("weights", self._weights()),
            *self._video_rows(),
            ("prompt", f"{self.prompt_tokens:,} tokens, {text:,} of them text; then {self.new_tokens:,} generated"),
            *([("", warning)] if (warning := beyond_training(self.trained_tokens, self.prompt_tokens)) else []),
            ("full KV cache", f"{_size(self.full_bytes)}, {_size(shape.token_bytes)} per token"),
            (
                "host memory",
                f"{_size(self.host_bytes)} of {_size(self.host_budget_bytes)} allowed"
                + (f", {_size(self.snapshot_bytes)} of it the snapshot" if self.snapshot_bytes else "")
                + f"; a session file {_size(self.file_bytes)}",
            ),
            *self._disk_rows(),
            (f"  in {self.host_bits} bits", self.host_bits_reason),
            *(
                (f"  in {choice.bits} bits", str(choice))
                for choice in self.bits_choices
                if choice.bits != self.host_bits
            ),
            ("", ""),
            ("device memory", f"{'prefill':>12} {'decode':>12}"),
        ]
        for purpose in (*self.prefill, *self.decode):
            rows.append((f"  {purpose}", _cells(purpose, self.prefill, self.decode)))
        sums = [_size(sum(phase.values())) for phase in (self.prefill, self.decode)]
        cap = _size(self.cap_bytes)
        rows += [
            ("  sum", f"{sums[0]:>12} {sums[1]:>12}   of {cap} allowed"),
            *([("outside the cap", "")] if self.untiered_decode else []),
            *(
                (f"  {kind}", _cells(kind, self.untiered_prefill, self.untiered_decode))
                for kind in self.untiered_decode
            ),
            *self._card_rows(),
            ("", ""),
            (
                "heads",
                f"{self.static_heads} static, {self.dynamic_heads} dynamic, as assumed: "
                "which are static is known once a question is asked",
            ),
            (
                "a step attends to",
                f"{self.dynamic_tokens:,} tokens per dynamic head, {self.static_tokens:,} per static head; "
                f"reads {_size(self.step_read_bytes)}"
                + (f", pages in {self.page_bits} bits" if self.page_bits < PLAIN else ""),
            ),
            *self._time_rows(),
        ]
        return rows

    def _layers(self) -> str:
        shape = self.shape
        every = shape.num_layers + shape.sliding_layers + shape.linear_layers + shape.convolutions
        return f"{every} layers" if every == shape.num_layers else f"{shape.num_layers} tiered layers of {every}"

    def _weights(self) -> str:
        parts = [f"decoder {_size(self.decoder_bytes)}"]
        parts += [f"vision tower {_size(self.vision_bytes)}"] if self.vision_bytes else []
        return ", ".join(parts) + (f" ({self.quantisation})" if self.quantisation else "")

    def _video_rows(self) -> list[tuple[str, str]]:
        if not self.visual_tokens:
            return []
        if self.frames is None or self.frame_size is None or self.grid is None:
            names = [("videos", self.video)] if self.video else []
            return [*names, ("visual tokens", f"{self.visual_tokens:,}")]
        height, width = self.frame_size
        steps, rows, columns = self.grid
        seen = ""
        if self.tower_size is not None:
            seen = f" (frames of {self.tower_size[1]}x{self.tower_size[0]})"
        return [
            (
                "video",
                f"{Path(self.video or '').name}: {self.frames:,} frames of {width}x{height} at {self.fps:g} per second",
            ),
            (
                "visual tokens",
                f"{self.visual_tokens:,}: {steps:,} steps of {rows}x{columns}{seen}, "
                f"{self.encode_batch:,} per tower call"
                + (f"; {self.video_text_tokens:,} of text between" if self.video_text_tokens else ""),
            ),
        ]

    def _disk_rows(self) -> list[tuple[str, str]]:
        if not self.disk_bytes:
            return []
        share = self.recent_bytes / self.disk_bytes
        whole = f"{_size(self.disk_bytes)}, in {self.disk_folder}"
        return [("disk", f"{whole}: host memory has room for {share:.0%} of it, what steps ask for most often")]

    def _card_rows(self) -> list[tuple[str, str]]:
        if self.card_bytes is None or self.reserve_bytes is None or self.card_needed_bytes is None:
            return []
        parts = {
            "weights": self.decoder_bytes + self.vision_bytes,
            "KV": self.kv_bytes,
            "activations": self.working_bytes,
            "CUDA": self.reserve_bytes,
        }
        whole = f"{self.card_needed_bytes / GIB:.3g} of {self.card_bytes / GIB:g} GiB"
        return [(f"on {self.card}"[:17], f"{whole}: {', '.join(f'{k} {v / GIB:.3g}' for k, v in parts.items())}")]

    def _time_rows(self) -> list[tuple[str, str]]:
        link = f"{self.link_gb_s:g} GB/s" + (f", {self.link}" if self.link in LINKS else "")
        card = f"{self.card_gb_s or 0:g} GB/s"
        card += f", {self.card} by its data sheet" if any(self.card == known.name for known in CARDS) else ""
        return [
            ("prefill copies", f"{_size(self.prefill_copy_bytes)}: {self.prefill_copy_s:.3g} s at {link}"),
            (
                "a step copies",
                f"at most {_size(self.step_copy_bytes)}: {self.step_copy_ms:.3g} ms{self.step.copies()}",
            ),
            *self.step.rows(card),
            ("", "Times are estimates, not measured."),
        ]


def _cells(name: str, *phases: dict[str, int]) -> str:
    """A column of each phase's bytes under `name`, empty where it has none."""
    return " ".join(f"{_size(phase[name]) if name in phase else '':>12}" for phase in phases)
