"""TieredCache: the transformers Cache protocol, composed of the tiers and the policies.

A cache is in one of two phases. *Prefill*: tokens arrive many at a time and attend exactly to everything before them,
streamed from the host tier. *Decode*: `seal` has classified the heads, spent the budget and filled the pool, and each
new token attends to what its heads select. More prompt tokens after a seal lead back to prefill.
"""

from __future__ import annotations

import itertools
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import Cache, PreTrainedConfig

from tieredkv.cache.counters import Counters
from tieredkv.cache.layer import TieredLayer
from tieredkv.cache.looks import Looks
from tieredkv.cache.prefill import TextRows
from tieredkv.cache.sliding_layer import SlidingLayer
from tieredkv.cache.tiers import Tiers
from tieredkv.config import TierConfig, tier_config
from tieredkv.environment import forking
from tieredkv.environment.ambient import settled
from tieredkv.errors import OptionError, TieredKVError, UnsupportedModelError, check_whole
from tieredkv.memory.copies import BackgroundCopies, StreamCopies, ThreadCopies, Transfer
from tieredkv.memory.ledger import DeviceLedger, on_device
from tieredkv.memory.pagelock import PageLocker
from tieredkv.memory.pool import DevicePool
from tieredkv.models import families
from tieredkv.models.kv_shape import KVShape
from tieredkv.ops.base import Ops
from tieredkv.ops.select import copying_by_torch, ops_for
from tieredkv.planning import decode_plan, prefill_plan, sizes
from tieredkv.policy import classify


class TieredCache(Cache):
    """Keys and values in two tiers: everything in host memory, and under a cap what each step needs on the device.

    Give it to a model whose attention is switched over:

        with tieredkv.use_attention(model):
            model.generate(input_ids, cache=TieredCache(model.config, gpu_kv_gb=0.5), max_new_tokens=200)

    (transformers before 5.24 calls the argument `past_key_values`.)

    One sequence, not a batch. The first call of a single token after the prompt seals the cache; until then every
    token attends exactly to all before it. If the prompt itself may end in a call of a single token (prefill in chunks
    that leave one over), say its length as `prompt_tokens`, or that token is taken for a generated one.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        tiers: TierConfig | None = None,
        *,
        max_new_tokens: int = 256,
        prompt_tokens: int = 0,
        **options: Any,
    ) -> None:
        """config: the model's. tiers, or its fields as keywords (`gpu_kv_gb=...`), not both.

        max_new_tokens: generated tokens for which device room is set aside; one more raises. prompt_tokens: length of
        the prompt, if known: the host tier is allocated once, as much of the prompt as the cap allows stays on the
        device while it is prefilled, and no token before it counts as generated. Raises `UnsupportedModelError` when
        a layer is neither full attention nor, in a family where that is tested, a sliding window.
        """
        self.tiers = tier_config(tiers, options)
        for name, value in (("max_new_tokens", max_new_tokens), ("prompt_tokens", prompt_tokens)):
            check_whole(name, value, 0)
        text = config.get_text_config(decoder=True)
        kinds = families.check_layers(text)
        numbers = itertools.count()
        layers: list[Any] = [
            TieredLayer(self, next(numbers)) if kind == "full_attention" else SlidingLayer(self, text.sliding_window)
            for kind in kinds
        ]
        super().__init__(layers=layers)
        self.tiered_layers: list[TieredLayer] = [layer for layer in layers if isinstance(layer, TieredLayer)]
        """The layers that grow, which are ours."""
        self._all: list[TieredLayer | SlidingLayer] = layers
        self._text_config = text
        self.new_tokens, self.prompt_tokens = max_new_tokens, prompt_tokens
        self.auto_seal = True
        """Seal at the first single token after the prompt. A session turns this off and seals by itself."""
        self.text_rows = self.tiers.policy.text_window
        """Last rows of each prefill call to score; 0 when the question is not in it."""
        self.visual: torch.Tensor | None = None
        """`(N,)` mask of visual tokens; None: all but the last `text_rows` tokens count as visual."""
        self.looks: Looks | None = None
        """Takes what the scored rows and the steps attend to; None: nothing is recorded."""
        self.ledger = DeviceLedger(self.tiers.cap_bytes)
        self.transfer = Transfer()
        self._counters = Counters()
        self.ops: Ops | None = None
        """What a decoding step is made of; None: what suits the device."""
        self.copies: BackgroundCopies = ThreadCopies()
        """Copies under way between the tiers, in both phases."""
        self.locker: PageLocker | None = None
        """Keeps the host tier page-locked, where the model is on a card."""
        self.devices: list[torch.device] = []
        """Where the model's layers are, each of whose share of the device tier is there too; known with the first keys,
        or by `place`."""
        self._pools: list[DevicePool] = []
        self._resident: int | None = None
        self._announced: int | None = None
        self._closed = False
        self._forced = False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Logical length: every token cached, wherever it is now; the same for every layer."""
        forking.check()  # the first that a model asks of its cache, before it computes much
        return self.tiered_layers[0].get_seq_length()

    @property
    def shape(self) -> KVShape:
        """Sizes for the planner. The cache must have seen its first tokens."""
        text, host = self._text_config, self.tiered_layers[0].host
        assert host is not None
        return KVShape(
            num_layers=len(self.tiered_layers),
            num_attention_heads=text.num_attention_heads,
            num_key_value_heads=host.num_heads,
            head_dim=host.head_dim,
            itemsize=host.dtype.itemsize,
        )

    def resident_tokens(self) -> int:
        """First tokens of every layer to keep on the device during prefill; 0 when the prompt's length is not known."""
        if self._resident is None:
            known = self.prompt_tokens > 0
            self._resident = prefill_plan.resident_tokens(self.shape, self.tiers, self.prompt_tokens) if known else 0
        return self._resident

    @property
    def counters(self) -> Counters:
        """What the last or present decode phase did, up to date: waits for the device."""
        self._count()
        return self._counters

    def _count(self) -> None:
        for layer in self.tiered_layers:
            if layer.sealed is not None and layer.sealed.retrieval is not None:
                layer.sealed.retrieval.count()

    def place(self, device: torch.device) -> None:
        """Say where a layer of the model is. Raises `UnsupportedModelError` unless all are on the CPU, or on cards."""
        if device in self.devices:
            return
        if device.type not in ("cpu", "cuda"):
            raise UnsupportedModelError(f"the model runs on {device}: tieredkv runs on CUDA devices and the CPU.")
        if {device.type, *(known.type for known in self.devices)} == {"cpu", "cuda"}:
            raise UnsupportedModelError(
                f"the model's layers are on {self.devices[0]} and {device}: load it on cards alone, or on the CPU."
            )
        if device.type == "cuda":
            if self.locker is None:
                self.copies.close()
                self.copies, self.locker = StreamCopies(), PageLocker()
                weakref.finalize(self, self.locker.close)  # of a cache that nobody closes
            self.locker.use(device)
        self.devices.append(device)

    @property
    def sealed(self) -> bool:
        return bool(self._pools)

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
        """Host memory allocated for keys and values."""
        return sum(layer.host.nbytes for layer in self.tiered_layers if layer.host is not None)

    # ---- called by the layers

    def announce(self, index: int, tokens: int) -> None:
        """Layer `index` is about to attend for `tokens` new tokens; moves between the phases where that asks for it."""
        if self._closed:
            raise TieredKVError("this TieredCache is closed.")
        if index == 0:
            forking.enter(self.devices[0].type)
        if index > 0 and self._announced is not None:
            raise RuntimeError(
                f"layer {self._announced} updated a TieredCache but did not attend through it, so its output ignores "
                "the cache: run the model inside `with tieredkv.use_attention(model):`."
            )
        if index == 0:
            whole = self._all if self._all[0] is self.tiered_layers[0] else self.tiered_layers
            lengths = {layer.get_seq_length() for layer in whole}
            if self._announced is not None or len(lengths) > 1:
                raise self._interrupted()
            self._change_phase(tokens)
        self._announced = index

    def check_length(self, layer: SlidingLayer, tokens: int) -> None:
        """Raise unless `layer`, about to see `tokens` new tokens, has seen all that the others have, and no more."""
        if layer is self._all[0] and len({each.get_seq_length() for each in self._all}) > 1:
            raise self._interrupted()
        behind = self._all.index(layer) > self._all.index(self.tiered_layers[0])  # which have seen the new ones
        if layer.get_seq_length() != self.get_seq_length() - (tokens if behind else 0):
            raise self._interrupted()

    def _interrupted(self) -> RuntimeError:
        least = min(layer.get_seq_length() for layer in self._all)
        return RuntimeError(
            "the last forward did not run through all layers of this TieredCache: it was interrupted, or ran "
            f"outside `tieredkv.use_attention(model)`. Go back with truncate({least}) or less."
        )

    def _change_phase(self, tokens: int) -> None:
        """Seal for the first generated token, leave the decode phase for more prompt."""
        length = self.get_seq_length()
        if tokens > 1 and self.sealed:
            if not self._forced:
                self.unseal()
            return
        # Without scored rows (after a crop) a single token is prefilled: exact, and it brings rows of its own.
        scored = all(layer.rows is not None for layer in self.tiered_layers)
        prompt_done = length >= max(1, self.prompt_tokens)
        if tokens == 1 and self.auto_seal and not self.sealed and prompt_done and scored:
            self.seal()

    def check_turn(self, index: int) -> None:
        """Raise unless layer `index` is the one that was announced."""
        if self._announced != index:
            raise RuntimeError(f"layer {index} attends, but {self._announced} was updated")

    def attended(self) -> None:
        """The announced layer has cached its tokens and attended."""
        self._announced = None

    # ---- phases

    @settled
    def seal(self) -> None:
        """Classify the heads, spend the budget, prune the static heads, fill the pool: ready for decoding steps.

        Raises `BudgetError` when the prompt does not fit under the cap; the cache is then still in prefill.
        """
        if self.sealed:
            raise RuntimeError("the cache is sealed already")
        self.copies.drain()  # the host reads what was written back
        rows = [layer.rows for layer in self.tiered_layers if layer.rows is not None]
        if len(rows) != len(self.tiered_layers):
            raise RuntimeError("no text rows were scored: nothing to classify the heads by")
        length = self.get_seq_length()
        layout = sizes.lay_out(self.tiers, length, self.text_rows, self.new_tokens)
        # What a step adds up is held on every device; the plan knows of one.
        cap_bytes = self.tiers.cap_bytes - (len(self.devices) - 1) * sizes.attended_bytes(layout)
        method = self.tiers.policy
        scores, need = torch.stack([row.scores for row in rows]), None
        if method.head_score == "mass":
            static = classify.static_heads(scores, method.theta)
        else:
            need = self._need(rows, layout)
            static = need[0] <= decode_plan.mean_old_tokens(self.shape, self.tiers, layout, cap_bytes)
        static[: method.dense_layers] = True
        plan = decode_plan.plan_decode(self.shape, self.tiers, layout, cap_bytes, scores, static, need)
        if self.visual is None:
            is_text = torch.arange(length, device="cpu") >= length - self.text_rows
        else:
            is_text = torch.ones(length, dtype=torch.bool, device="cpu")
            is_text[: self.visual.shape[0]] = ~self.visual
        trace = self._counters.trace
        self._counters = Counters(
            static_heads=int(static.sum()),
            dynamic_heads=int((~static).sum()),
            trace=None if trace is None else [],
        )
        self._drop_resident()
        if self.looks is not None:
            heads = self.shape.num_attention_heads // self.shape.num_key_value_heads
            self.looks.seal(layout.sink_chunks, heads * self._counters.dynamic_heads)
        try:
            shared = {device: self._share(device, plan) for device in self.devices}
            for layer, mask in zip(self.tiered_layers, static, strict=True):
                with on_device(layer.device):
                    layer.seal(mask, is_text, shared[layer.device])
        except BaseException:
            self._drop_pool()
            raise

    def _share(self, device: torch.device, plan: decode_plan.DecodePlan) -> Tiers:
        """What the layers on one device have in common while decoding."""
        here = [layer.index for layer in self.tiered_layers if layer.device == device]
        dtype, layout = self.tiered_layers[0].dtype, plan.layout
        page = self.tiers.chunk_tokens, self.shape.head_dim, dtype
        pool = DevicePool(self.ledger, plan.pool_pages(here), *page, device, plan.packed)
        self._pools.append(pool)
        return Tiers(
            config=self.tiers,
            shape=self.shape,
            plan=plan,
            ledger=self.ledger,
            pool=pool,
            transfer=self.transfer,
            prefetcher=self.copies if self.tiers.prefetch else None,
            counters=self._counters,
            ops=self._ops(device),
            attended=self.ledger.empty("tables", (layout.retrievable,), torch.float32, device).zero_(),
            looks=self.looks,
        )

    def _ops(self, device: torch.device) -> Ops:
        """What a step is made of, until the next seal: the host tier may have moved since the last."""
        ops = self.ops or ops_for(device)
        refusal = None if self.locker is None else self.locker.refusal()
        if refusal is None:
            return ops
        warnings.warn(
            f"host memory could not be page-locked ({refusal}): chunks are copied through the host, which is slower. "
            "Raise `ulimit -l` or the container's memory limit.",
            stacklevel=2,
        )
        return copying_by_torch(ops)

    @property
    def step_ops(self) -> Ops:
        """What the steps since the seal are made of."""
        sealed = self.tiered_layers[0].sealed
        assert sealed is not None
        return sealed.tiers.ops

    def _need(self, rows: list[TextRows], layout: sizes.Layout) -> torch.Tensor:
        """Tokens that every head would need, `(2, L, K)`: to be static, and for a smaller share of its attention."""
        unknown = torch.full((2, self.shape.num_key_value_heads), layout.tokens + 1, dtype=torch.int64, device="cpu")
        shares = (self.tiers.policy.theta, classify.SPREAD_SHARE)
        recent = layout.tokens - layout.recent_start
        if shares[0] <= 0:
            return torch.zeros((2, len(rows), self.shape.num_key_value_heads), dtype=torch.int64, device="cpu")
        need = [
            classify.tokens_to_cover(row.halves, self.tiers.sink_tokens, recent, shares)
            if row.count >= classify.LEAST_ROWS
            else unknown
            for row in rows
        ]
        return torch.stack(need, dim=1)

    def count_step(self) -> None:
        """Count a step that ran without the model's Python code. Raises `BudgetError` if there is no room for it."""
        for layer in self.tiered_layers:
            assert layer.sealed is not None
            layer.sealed.count_step()

    @settled
    def note_step(self) -> None:
        """Keep what the step just taken attended to, where it is recorded. Waits for the device."""
        if self.looks is not None and self._pools:
            shares = {layer.device: layer.sealed.tiers for layer in self.tiered_layers if layer.sealed is not None}
            self.looks.add_step([share.attended for share in shares.values()])

    def counted(self) -> list[tuple[int, int, int]]:
        """What was counted in Python since the seal, for `count_again`."""
        return [layer.sealed.counted for layer in self.tiered_layers if layer.sealed is not None]

    def count_again(self, counted: list[tuple[int, int, int]]) -> None:
        """Forget what was counted since: steps that were recorded and not run."""
        self._announced = None
        for layer, values in zip(self.tiered_layers, counted, strict=True):
            assert layer.sealed is not None
            layer.sealed.counted = values

    @contextmanager
    def forced(self) -> Iterator[None]:
        """Inside the block, a call of several tokens on a sealed cache decodes them one after another, as if each had
        been given alone: known tokens in fewer calls. (Outside, it is more prompt, and leads back to prefill.)"""
        self._forced = True
        try:
            yield
        finally:
            self._forced = False

    @settled
    def settle(self) -> None:
        """Say that what is cached is the context, and that what follows are questions about it.

        Digests that are fitted are then fitted to the context alone, so that no question depends on another.
        """
        for layer in self.tiered_layers:
            layer.settle()

    @settled
    def set_tiers(self, tiers: TierConfig) -> None:
        """Other settings from the next seal on; what is cached stays. Not while sealed.

        What the question's rows were scored with (`top_k_ratio`, windows) changes with the next prompt only. Raises
        `OptionError` where chunks of another size would be needed.
        """
        if self.sealed:
            raise RuntimeError("the cache is sealed: truncate it first")
        if tiers.chunk_tokens != self.tiers.chunk_tokens:
            raise OptionError(f"the cache is kept in chunks of {self.tiers.chunk_tokens} tokens: keep chunk_tokens.")
        self._drop_resident()
        if self.get_seq_length() == 0:
            self._resident = None
        if self.text_rows == self.tiers.policy.text_window:
            self.text_rows = tiers.policy.text_window
        self.tiers = tiers
        self.ledger.cap_bytes = tiers.cap_bytes

    @settled
    def unseal(self) -> None:
        """Back to prefill; generated tokens become cached tokens like any other. Nothing happens if not sealed."""
        if not self.sealed:
            return
        self.finish()
        self.copies.drain()
        for layer in self.tiered_layers:
            layer.unseal()
        self._drop_pool()

    def make_room_for_scores(self, past: int, new: int, rows: int) -> None:
        """Give up the tokens kept on the device if scoring `rows` of `new` tokens after `past` needs their room."""
        room = self.resident_tokens()
        call = prefill_plan.Call(past, past + new, rows)
        if room and not prefill_plan.resident_beside_scores(self.shape, self.tiers, room, call):
            self._drop_resident()

    def _drop_resident(self) -> None:
        self._resident = 0  # layers that have seen no token yet must not begin to keep any
        for layer in self.tiered_layers:
            layer.resident = None
        self.ledger.release("resident")

    def _drop_pool(self) -> None:
        self._count()
        for layer in self.tiered_layers:
            layer.sealed = None
        for pool in self._pools:
            pool.close()
        self._pools = []
        for purpose in ("pool", "digests", "tables", "logits"):
            self.ledger.release(purpose)

    def finish(self) -> None:
        """Wait for copies still under way, so that the counters are final. Raises what a copy raised."""
        for layer in self.tiered_layers:
            with on_device(layer.device):
                self.copies.wait(layer.index)

    @settled
    def truncate(self, tokens: int) -> None:
        """Forget all but the first `tokens` tokens, leaving the decode phase if need be.

        Raises `OptionError`, and changes nothing, where a layer with a sliding window has forgotten what it would see.
        """
        for layer in self._all:
            if isinstance(layer, SlidingLayer):
                layer.check_truncate(tokens)
        self._announced = None
        try:
            if tokens > min(layer.prompt_length for layer in self.tiered_layers):
                self.unseal()
            else:
                self.copies.drain()
        finally:
            self._drop_pool()
            for layer in self._all:
                layer.truncate(tokens)

    def crop(self, tokens_to_remove: int) -> None:
        """transformers' spelling: a negative number of tokens to remove from the end."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes minus the number of tokens to remove, got {tokens_to_remove}.")
        self.truncate(self.get_seq_length() + tokens_to_remove)

    def close(self) -> None:
        """Free both tiers. Twice is fine; using the cache afterwards raises."""
        if self._closed:
            return
        self._closed = True
        try:
            self.copies.close()
        finally:
            self._drop_pool()
            self._drop_resident()
            for layer in self._all:
                layer.close()
            if self.locker is not None:
                self.locker.close()

    def __reduce__(self) -> Any:
        raise TieredKVError("a TieredCache cannot be pickled or copied: make another, or save a session.")

    def __enter__(self) -> TieredCache:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
