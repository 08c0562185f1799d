"""Calls of a prefill, of one layer of a 7B model's shape, on a card that is not there."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from fake_card import CARD, fake_card
from helpers import at_once
from launches import Recorder, recorded
from transformers import Qwen2Config

from tieredkv import TierConfig, TieredCache
from tieredkv.attention.interface import tag
from tieredkv.cache import tiered_cache
from tieredkv.cache.context_digests import ContextDigests
from tieredkv.cache.device_tier import DeviceTier
from tieredkv.cache.layer import pack
from tieredkv.cache.layer_order import LayerOrder
from tieredkv.cache.question import CONTEXT, Question

HEADS, KV_HEADS, DIM, LAYERS = 28, 4, 128, 28
TOKEN_BYTES = 2 * KV_HEADS * DIM * 2


@dataclass
class Link:
    """A copy between host and device."""

    to_card: bool
    nbytes: int
    waits: bool
    """Whether the host waits for it, even if its memory is page-locked: strided, of another dtype, or not asked to be
    asynchronous."""
    stream: str


@dataclass
class Made:
    """What one call has done."""

    launches: list[str] = field(default_factory=list)
    links: list[Link] = field(default_factory=list)
    by_name: dict[str, tuple[int, int]] = field(default_factory=dict)
    """How often, and bytes read and written at least."""
    waits: list[str] = field(default_factory=list)
    """Where the host has waited for the card."""

    def moved(self, to_card: bool) -> int:
        """Bytes over the link."""
        return sum(link.nbytes for link in self.links if link.to_card == to_card)

    @property
    def blocking(self) -> list[Link]:
        return [link for link in self.links if link.waits]

    def count(self, name: str) -> int:
        """Launches whose name contains this."""
        return sum(name in each for each in self.launches)


class Streams:
    """Copies in the order in which they are submitted, on a stream of their own."""

    def __init__(self) -> None:
        self.current = "main"
        self.waits: list[str] = []

    def submit(self, key: Hashable, copy: Callable[[], int]) -> None:
        before, self.current = self.current, "copies"
        copy()
        self.current = before

    def wait(self, key: Hashable) -> int:
        return 0

    def drain(self) -> None:
        self.waits.append("drain")

    def close(self) -> None:
        pass


class CallRecorder(Recorder):
    """`Recorder` that also looks at each copy over the link."""

    streams: Streams
    made: Made

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        name = func._schema.name.removeprefix("aten::")
        if name in ("copy_", "_to_copy") and self.steps:
            to, of = (args[0], args[1]) if name == "copy_" else (out, args[0])
            if to.device.type != of.device.type and to.numel():
                asked = (kwargs or {}).get("non_blocking", args[2] if name == "copy_" and len(args) > 2 else False)
                whole = to.is_contiguous() and of.is_contiguous() and to.dtype == of.dtype
                to_card = to.device.type == "cuda"
                self.made.links.append(Link(to_card, of.nbytes, not (asked and whole), self.streams.current))
        return out

    def _count(self, func: Any, read: list[torch.Tensor], out: Any) -> None:
        with self._noted():
            super()._count(func, read, out)

    def launch(self, kernel: Any, *args: Any, **options: Any) -> None:
        with self._noted():
            super().launch(kernel, *args, **options)

    @contextmanager
    def _noted(self) -> Iterator[None]:
        part, made = self._part, self.made
        launched, moved = len(part.launches), part.device_bytes
        yield
        for name in part.launches[launched:]:
            times, nbytes = made.by_name.get(name, (0, 0))
            made.by_name[name] = times + 1, nbytes + part.device_bytes - moved
            made.launches.append(name)


class OneLayer:
    """A cache on the card, of whose layers only the first is called."""

    def __init__(self, patch: Any, recorder: CallRecorder, prompt: int, **options: Any) -> None:
        shape = {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "hidden_size": HEADS * DIM}
        config = Qwen2Config(**shape, num_hidden_layers=LAYERS, max_position_embeddings=2**18, vocab_size=8)
        self.recorder, self.streams = recorder, Streams()
        recorder.streams = self.streams
        patch.setattr(DeviceTier, "_use_card", lambda tier, card: None)  # neither streams nor page-locked memory here
        patch.setattr(LayerOrder, "_check_lengths", lambda order, layers: None)  # the others stay empty
        patch.setattr(tiered_cache, "pack", lambda layers, tier, bits: pack(layers[:1], tier, bits))
        patch.setattr(DeviceTier, "beside", staticmethod(at_once))
        patch.setattr(ContextDigests, "_wait", lambda digests: self.streams.waits.append("digests"))
        self.cache = TieredCache(config, TierConfig(**options), prompt_tokens=prompt, copies=self.streams)
        self.cache.expect(CONTEXT)

    def call(self, tokens: int, question: Question | None = None) -> Made:
        """Read so many tokens."""
        if question is not None:
            self.cache.expect(question)
        query = torch.empty((1, tokens, HEADS, DIM), dtype=torch.bfloat16, device=CARD)
        keys, values = (torch.empty((1, tokens, KV_HEADS, DIM), dtype=torch.bfloat16, device=CARD) for _ in range(2))
        query, keys, values = (part.transpose(1, 2) for part in (query, keys, values))  # as models make them
        layer = self.cache.tiered_layers[0]
        self.recorder.made, self.streams.waits = Made(), []
        self.recorder.begin_step()
        tagged, _ = layer.update(tag(keys, layer), values)
        layer.attend(query[0], tagged[0], values[0], DIM**-0.5)
        made = self.recorder.made
        made.waits = self.streams.waits
        return made


@contextmanager
def one_layer(patch: Any, prompt: int, **options: Any) -> Iterator[OneLayer]:
    """patch: pytest's `monkeypatch`."""
    with patch.context() as patch, torch.no_grad(), fake_card(patch), recorded(patch, CallRecorder()) as recorder:
        yield OneLayer(patch, recorder, prompt, **options)
