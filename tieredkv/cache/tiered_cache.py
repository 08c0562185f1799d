"""TieredCache: the transformers Cache protocol over two tiers.

A cache is in one of two phases. *Prefill*: tokens arrive many at a time and attend exactly to everything before them,
streamed from the host tier. *Decode*: `seal` has classified the heads, planned the cap and filled the pool, and each
new token attends to what its heads select. More prompt tokens after a seal return the cache to prefill.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import Cache, PreTrainedConfig

from tieredkv.cache import seal
from tieredkv.cache.conv_layer import ConvLayer
from tieredkv.cache.counters import Counters
from tieredkv.cache.decoding import Decoding
from tieredkv.cache.device_tier import DeviceTier
from tieredkv.cache.foresight import Foresight
from tieredkv.cache.layer import TieredLayer, pack
from tieredkv.cache.layer_order import LayerOrder
from tieredkv.cache.linear_layer import LinearLayer
from tieredkv.cache.question import Question
from tieredkv.cache.sliding_layer import SlidingLayer
from tieredkv.cache.untiered import Untiered
from tieredkv.codecs import PLAIN
from tieredkv.codecs.base import FIT_TOKENS
from tieredkv.config import TierConfig, tier_config
from tieredkv.environment import forking
from tieredkv.environment.ambient import settled
from tieredkv.errors import OptionError, TieredKVError, UnsupportedModelError
from tieredkv.memory.copies import BackgroundCopies
from tieredkv.memory.disk_tier import DiskTier
from tieredkv.memory.ledger import on_device
from tieredkv.models import families
from tieredkv.models.families.decoder import TIERED, sliding_window
from tieredkv.models.kv_shape import KVShape
from tieredkv.models.long_context import LongContext
from tieredkv.ops.base import Ops


class TieredCache(Cache):
    """Keys and values in two tiers: everything in host memory, and under a cap what each step needs on the device.

    Give it to a model whose attention is switched over:

        with tieredkv.use_attention(model):
            model.generate(input_ids, cache=TieredCache(model.config, gpu_kv_gb=0.5), max_new_tokens=200)

    (transformers before 5.24 calls the argument `past_key_values`.)

    One sequence, not a batch. The first call of a single token after the prompt seals the cache; until then every
    token attends exactly to all before it. If the prompt itself may end in a call of a single token (prefill in chunks
    that leave one over), give its length as `prompt_tokens`, or that token is taken for a generated one.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        tiers: TierConfig | None = None,
        *,
        max_new_tokens: int = 256,
        prompt_tokens: int = 0,
        ops: Ops | None = None,
        copies: BackgroundCopies | None = None,
        disk: DiskTier | None = None,
        **options: Any,
    ) -> None:
        """config: the model's. tiers, or its fields as keywords (`gpu_kv_gb=...`), not both.

        max_new_tokens: generated tokens for which device room is set aside; one more raises. prompt_tokens: length of
        the prompt, if known: the host tier is allocated once, as much of the prompt as the cap allows stays on the
        device while it is prefilled, only the call that completes it is scored, and no token before its end counts as
        generated. ops: the operations of decoding steps; copies: how the tiers copy in the background; both default to
        what suits the device. disk: keeps the host tier's records on disk; closed with the cache. Raises
        `UnsupportedModelError` when a layer is neither full attention nor, in a family where that is tested, a sliding
        window, linear attention or a convolution.
        """
        self.question = Question(max_new_tokens=max_new_tokens, prompt_tokens=prompt_tokens)
        """What follows the cached tokens."""
        self.device_tier = DeviceTier(tier_config(tiers, options), config, prompt_tokens, ops, copies, disk)
        self.ledger = self.device_tier.ledger
        """Counts the device bytes of keys, values, and what is allocated with them."""
        self.tiered_layers: list[TieredLayer] = []
        """The layers with full attention."""
        untiered: list[SlidingLayer | LinearLayer | ConvLayer] = []
        layers: list[TieredLayer | SlidingLayer | LinearLayer | ConvLayer] = []
        self._order = LayerOrder()
        text = config.get_text_config(decoder=True)
        decoder = families.text_decoder(text)
        kinds = decoder.layer_types(text)
        last = len(kinds) - 1 - kinds[::-1].index(TIERED)
        for place, kind in enumerate(kinds):
            readers = decoder.readers(text) if place == last else 0
            if kind == TIERED:
                index = len(self.tiered_layers)
                own = TieredLayer(self, self._order, self.device_tier, index, prompt_tokens, readers)
                own.sliding_window = decoder.window(text)
                self.tiered_layers.append(own)
                layers.append(own)
            else:
                untiered.append(self._untiered_layer(kind, text))
                layers.append(untiered[-1])
            self._order.add(layers[-1], kind == TIERED, readers)
        self.foresight = Foresight(self.tiered_layers)
        """What the layers are told of their queries in advance."""
        self.long_context = LongContext(config)
        """Which lengths the model's cache can have."""
        self.untiered = Untiered(untiered)
        """The layers that do not grow, which are transformers', and what they go back to."""
        super().__init__(layers=list(layers))
        self.decoding: Decoding | None = None
        """The decode phase; None: in prefill."""
        self._counters = Counters()
        self._forced = self._closed = False

    def _untiered_layer(self, kind: str, text: PreTrainedConfig) -> SlidingLayer | LinearLayer | ConvLayer:
        if kind == "sliding_attention":
            return SlidingLayer(self._order, sliding_window(text))
        if (states := getattr(text, "number_of_conv_states", 1)) != 1:
            raise UnsupportedModelError(
                f"layers of type {kind} of this {text.model_type} keep {states} states each: TieredCache supports one."
            )
        return ConvLayer(self._order) if kind == "conv" else LinearLayer(self._order)

    # ---- contents

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Logical length: every token cached, wherever it is now; the same for every layer."""
        forking.check()  # a model calls this before it computes much
        return self.tiered_layers[0].get_seq_length()

    @property
    def tiers(self) -> TierConfig:
        """The settings from the next seal on."""
        return self.device_tier.tiers

    @property
    def shape(self) -> KVShape:
        """Sizes of the model's keys and values. The cache must have seen its first tokens."""
        return self.device_tier.shape

    @property
    def sealed(self) -> bool:
        """Whether it is in the decode phase."""
        return self.decoding is not None

    @property
    def counters(self) -> Counters:
        """Counts of the current or last decode phase, up to date: waits for the device."""
        return self._counters if self.decoding is None else self.decoding.counters

    @property
    def room(self) -> int:
        """Tokens that the host tier holds without growing."""
        return min(layer.host.capacity if layer.host is not None else 0 for layer in self.tiered_layers)

    @settled
    def reserve(self, tokens: int) -> None:
        """Make room for exactly `tokens` tokens in the host tier."""
        for layer in self.tiered_layers:
            if layer.host is not None:
                layer.host.reserve(tokens)

    @property
    def host_bytes(self) -> int:
        """Host memory allocated for keys and values, and for the snapshot that `settle` took."""
        tiered = sum(layer.host.nbytes for layer in self.tiered_layers if layer.host is not None)
        return tiered + self.untiered.snapshot_bytes

    def leave_device(self) -> None:
        """Free what the cache keeps on the device between questions: later ones stream all of the past. Not while
        sealed, nor in the middle of a call. Layers that do not grow stay, as they are not counted against the cap."""
        self.device_tier.copies.drain()
        self.device_tier.drop_residents()

    @property
    def untiered_bytes(self) -> int:
        """Device memory that does not count against the cap: windows of sliding layers, states of the others."""
        return self.untiered.device_bytes

    # ---- transformers' protocol

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._check_open()
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        self._begin_linear_layer(layer_idx)
        return super().get_conv_state(layer_idx, state_idx)

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        if layer_idx is not None:  # by layers of transformers before 5.21, which then read the states themselves
            self._begin_linear_layer(layer_idx)
        return super().has_previous_state(layer_idx, state_idx)

    def _begin_linear_layer(self, layer_idx: int) -> None:
        self._check_open()
        if isinstance(layer := self.layers[layer_idx], LinearLayer):
            layer.begin()

    def _check_open(self) -> None:
        if self._closed:
            raise TieredKVError("this TieredCache is closed.")

    def reset(self) -> None:
        raise OptionError("TieredCache cannot be reset: make a new one, or crop it.")

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        raise OptionError("TieredCache does not support beam search: use num_beams=1.")

    # ---- the tokens to come

    def expect(self, question: Question) -> None:
        """Set what follows the cached tokens. Not while sealed."""
        if self.sealed:
            raise RuntimeError("the cache is sealed: truncate it first")
        self.question = question

    def check_between_calls(self) -> None:
        """Raise `RuntimeError` if a call of the model was interrupted, or is under way."""
        self._order.check_between_calls()

    @settled
    def settle(self) -> None:
        """Declare the cached tokens the context, and later ones questions about it.

        Digests are then fitted to the context alone, so that no question depends on another. Layers that cannot be
        truncated (sliding windows, linear attention, convolutions) are copied to host memory, so that the cache can
        come back to this length; the previous copy is dropped. The bits of the host tier stay as they are from now on.
        """
        self.check_between_calls()
        self.untiered.settle()
        if tokens := self.get_seq_length():
            pack(self.tiered_layers, self.device_tier, self.device_tier.next_bits(tokens))
            self.device_tier.settle_bits()
        for layer in self.tiered_layers:
            layer.settle()

    @settled
    def set_tiers(self, tiers: TierConfig) -> None:
        """Use other settings from the next seal on; cached tokens stay. Not while sealed.

        Settings that score the question's rows (`top_k_ratio`, windows) take effect with the next prompt. A policy
        that depends on the mass of their top k needs rows that were scored under such a policy. Raises `OptionError`
        where chunks of another size would be needed.
        """
        if self.sealed:
            raise RuntimeError("the cache is sealed: truncate it first")
        if tiers.chunk_tokens != self.tiers.chunk_tokens:
            raise OptionError(
                f"the cache is kept in chunks of {self.tiers.chunk_tokens} tokens: leave chunk_tokens as it is."
            )
        bits = self.device_tier.settled_bits
        if bits is not None and tiers.host_kv_bits not in (None, bits):
            raise OptionError(f"the cache is kept in {bits} bits: leave host_kv_bits as it is.")
        self.device_tier.change_tiers(tiers, empty=self.get_seq_length() == 0)
        for layer in self.tiered_layers:
            layer.drop_unfit_rows()

    # ---- phases

    def begin_layer(self, index: int, tokens: int) -> None:
        """Called when tiered layer `index` is updated with `tokens` new tokens; the first may change the phase."""
        if index == 0:
            forking.enter(self.device_tier.devices[0].type)
            self._order.begin_call()
            self.long_context.check(length := self.get_seq_length(), tokens)
            self._change_phase(tokens)
            begun = length > 0 and self.device_tier.host_bits != PLAIN  # an interrupted packing goes on
            if not self.sealed and (length >= FIT_TOKENS or begun):
                pack(self.tiered_layers, self.device_tier, self.device_tier.next_bits(length + tokens))
        self._order.begin_layer(index)

    def _change_phase(self, tokens: int) -> None:
        """Seal for the first generated token; leave the decode phase for more prompt."""
        if self.sealed:
            if tokens > 1 and not self._forced:
                self.unseal()
            return
        # Without scored rows (after a crop) a single token is prefilled: that is exact, and scores its row.
        scored = all(layer.rows is not None for layer in self.tiered_layers)
        if tokens == 1 and scored and self.get_seq_length() >= max(1, self.question.prompt_tokens):
            self.seal()

    @contextmanager
    def forced(self) -> Iterator[None]:
        """Inside the block, a call of several tokens on a sealed cache decodes them one after another, as if each had
        been passed alone: known tokens in fewer calls. (Outside, it is more prompt, and returns the cache to
        prefill.)"""
        self._forced = True
        try:
            yield
        finally:
            self._forced = False

    @settled
    def seal(self) -> None:
        """Classify the heads, plan the cap, fill the pool: ready for decoding steps.

        Raises `BudgetError` when the prompt does not fit under the cap; the cache is then still in prefill.
        """
        if self.sealed:
            raise RuntimeError("the cache is sealed already")
        self.device_tier.copies.drain()  # the seal reads what was written back
        self.decoding = seal.seal(self.tiered_layers, self.device_tier, self.question, self._order)

    @settled
    def unseal(self) -> None:
        """Go back to prefill; generated tokens become cached tokens like any other. Does nothing if not sealed."""
        if not self.sealed:
            return
        self.finish()
        self.device_tier.copies.drain()
        for layer in self.tiered_layers:
            layer.unseal()
        self._end_decoding()

    def _end_decoding(self) -> None:
        """Drop the decode phase, if there is one, with the tokens generated in it."""
        self._counters, self.decoding = self.counters, None
        for layer in self.tiered_layers:
            layer.end_decoding()
        self.device_tier.end_decoding()

    def finish(self) -> None:
        """Wait for copies still under way, so that the counters are final. Raises what a copy raised."""
        for layer in self.tiered_layers:
            with on_device(layer.device):
                self.device_tier.copies.wait(layer.index)

    # ---- going back, and the end

    @settled
    def truncate(self, tokens: int) -> None:
        """Forget all but the first `tokens` tokens, and leave the decode phase.

        Where layers cannot be truncated (a sliding window that has moved on, linear attention, convolutions), 0 and the
        length at the last `settle` are possible. Any other raises `OptionError`, which names them, and changes nothing.
        So does `UnsupportedModelError`, for a length at which the model rotates keys otherwise (`longrope`).
        """
        self.long_context.check_truncate(self.get_seq_length(), tokens)
        self.untiered.check_truncate(tokens, self.get_seq_length())
        self._order.reset()
        try:
            if tokens > min(layer.prompt_length for layer in self.tiered_layers):
                self.unseal()
            else:
                self.device_tier.copies.drain()
        finally:
            self._end_decoding()
            for layer in self.tiered_layers:
                layer.truncate(tokens)
            if tokens == 0:
                self.device_tier.forget_bits()
            self.untiered.truncate(tokens)

    def crop(self, tokens_to_remove: int) -> None:
        """transformers' spelling: a negative number of tokens to remove from the end."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes minus the number of tokens to remove, got {tokens_to_remove}.")
        self.truncate(self.get_seq_length() + tokens_to_remove)

    def close(self) -> None:
        """Free both tiers. May be called twice; using the cache afterwards raises."""
        if self._closed:
            return
        self._closed = True
        try:
            self.device_tier.copies.close()
        finally:
            self._end_decoding()
            for layer in self.tiered_layers:
                layer.close()
            self.untiered.close()
            self.device_tier.close()

    def __reduce__(self) -> Any:
        raise TieredKVError("a TieredCache cannot be pickled or copied: make another, or save a session.")

    def __enter__(self) -> TieredCache:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
