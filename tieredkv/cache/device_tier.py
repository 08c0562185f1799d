"""DeviceTier: the device side of a cache, and how keys and values get there."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch
from transformers import PreTrainedConfig

from tieredkv.cache.preparing import Preparing
from tieredkv.cache.resident import Resident
from tieredkv.codecs import PLAIN, codec_for
from tieredkv.codecs.base import Codec
from tieredkv.config import TierConfig
from tieredkv.errors import UnsupportedModelError
from tieredkv.memory.arena import Arena, MemoryArena
from tieredkv.memory.card import return_unused
from tieredkv.memory.copies import BackgroundCopies, StreamCopies, ThreadCopies
from tieredkv.memory.disk_tier import DiskTier
from tieredkv.memory.host import HostLayer
from tieredkv.memory.ledger import DeviceLedger
from tieredkv.memory.pagelock import PageLocker, aligned
from tieredkv.memory.pool import DevicePool
from tieredkv.memory.units import ceil_div
from tieredkv.models.kv_shape import KVShape, model_shape
from tieredkv.ops.base import Expected, Ops
from tieredkv.ops.select import copying_by_torch, ops_for
from tieredkv.planning import host_plan, prefill_plan
from tieredkv.planning.ahead_time import Lead, Waits
from tieredkv.planning.prefill_plan import Call
from tieredkv.planning.rates import Rates
from tieredkv.planning.sizes import digest_for, page_bits, page_bytes
from tieredkv.planning.step_works import step_waits
from tieredkv.planning.this_machine import machine_rates
from tieredkv.planning.weight_bytes import Weights

T = TypeVar("T")
MOST_WORKERS, LATER_WORKERS = 4, 2
"""Threads that compute beside a card: what a question may wait for, and what none waits for."""
MOST_TOKENS = 2**20
"""Of a prompt whose length is not known, as far as kernels are compiled for it ahead of need."""
DECODE_PURPOSES = ("pool", "digests", "tables")
"""Purposes that the ledger counts only while decoding."""


class DeviceTier:
    """Device memory under one cap, on every device that the model is spread over; all layers share it.

    Refers to layers by index only, so that they can hold a reference to it.
    """

    def __init__(
        self,
        tiers: TierConfig,
        config: PreTrainedConfig,
        prompt_tokens: int = 0,
        ops: Ops | None = None,
        copies: BackgroundCopies | None = None,
        disk: DiskTier | None = None,
    ) -> None:
        """config: the model's. prompt_tokens: length of the prompt, 0 if unknown. ops, copies: override the defaults of
        the device. disk: where the host tier's records are, which this then owns; None: in memory."""
        self.tiers, self.disk = tiers, disk
        self.ledger = DeviceLedger(tiers.cap_bytes)
        self.streamed_bytes = 0
        """Bytes of past keys and values streamed to the device during prefill; callers set it back."""
        self.copies: BackgroundCopies = ThreadCopies() if copies is None else copies
        """Copies under way between the tiers, in both phases."""
        self.locker: PageLocker | None = None
        """Keeps the host tier page-locked, if the model is on a card."""
        self.devices: list[torch.device] = []
        """Devices of the model's layers; known once their first keys arrive."""
        self.pools: list[DevicePool] = []
        """One per device while decoding."""
        self.residents: dict[int, Resident] = {}
        """By layer index, in prefill; empty when all of the past is streamed."""
        self.host_bits = PLAIN
        """Of the host tier of every layer."""
        self._bits_settled = False
        self._config, self._prompt_tokens = config, prompt_tokens
        self._shape: KVShape | None = None
        self._ops, self._own_copies = ops, copies is None
        self._workers: dict[bool, ThreadPoolExecutor] = {}
        """By whether nobody waits for them."""
        self._rates: Rates | None = None
        """Of the first device and its link, if they are known."""
        self._weights: tuple[int, tuple[Lead | None, ...]] | None = None
        """What a step reads of the model's weights, in all and in leads; None: not counted yet."""
        self.preparing = Preparing()
        """Compiles kernels for steps, if the model is on a card."""
        weakref.finalize(self, self.preparing.stop)
        self._resident_tokens: int | None = None
        """First tokens of every layer to keep on the device; None: not decided yet."""

    @property
    def shape(self) -> KVShape:
        """Sizes of the model's keys and values. A layer must have been placed."""
        assert self._shape is not None
        return self._shape

    def place(self, device: torch.device, dtype: torch.dtype) -> None:
        """Register the device of a layer, whose keys and values are of `dtype`.

        Raises `UnsupportedModelError` unless all layers are on the CPU, or all on CUDA devices.
        """
        if self._shape is None:
            self._shape = model_shape(self._config, dtype)
        if device in self.devices:
            return
        if device.type not in ("cpu", "cuda"):
            raise UnsupportedModelError(f"the model runs on {device}: tieredkv runs on CUDA devices and the CPU.")
        if {device.type, *(known.type for known in self.devices)} == {"cpu", "cuda"}:
            raise UnsupportedModelError(
                f"the model's layers are on {self.devices[0]} and {device}: load it on cards alone, or on the CPU."
            )
        if not self.devices:
            self._rates = machine_rates(device, self.tiers.link_gb_s)
        if device.type == "cuda":
            self._use_card(device)
            self.preparing.start(self._ops or ops_for(device), self.expected(dtype), device)
        self.devices.append(device)

    def _use_card(self, card: torch.device) -> None:
        if self.locker is None:
            if self._own_copies:
                self.copies.close()
                self.copies = StreamCopies()
            self.locker = PageLocker()
            weakref.finalize(self, self.locker.close)  # in case nobody closes the cache
        self.locker.use(card)

    def expected(self, dtype: torch.dtype) -> Expected:
        """What steps may be like, as far as it is known before the first question. dtype: of the layers."""
        shape, tiers, bits = self.shape, self.tiers, self.planned_bits()
        tokens = self._prompt_tokens or MOST_TOKENS
        return Expected(
            heads=shape.num_attention_heads,
            kv_heads=shape.num_key_value_heads,
            dtype=dtype,
            codecs=tuple((self.codec(bits, dtype), self.codec(pages, dtype)) for pages in page_bits(tiers, bits)),
            digest=digest_for(shape, tiers),
            group=tiers.policy.chunk_group,
            stay=tiers.policy.stay,
            chunks=ceil_div(tokens, tiers.chunk_tokens),
        )

    def change_tiers(self, tiers: TierConfig, empty: bool) -> None:
        """Use other settings from now on; residents are dropped. empty: no token is cached, so how many stay resident
        is decided again."""
        self.drop_residents()
        if empty:
            self._resident_tokens = None
        self.tiers = tiers
        self.ledger.set_cap(tiers.cap_bytes)

    # ---- the host tier

    def planned_bits(self, tokens: int = 0) -> int:
        """Bits of the host tier of a prompt of at least `tokens` tokens. A layer must have been placed."""
        return host_plan.host_bits(self.shape, self.tiers, max(self._prompt_tokens, tokens))

    @property
    def settled_bits(self) -> int | None:
        """`host_bits` once no layer may be packed any more; None before."""
        return self.host_bits if self._bits_settled or self.host_bits != PLAIN else None

    def next_bits(self, tokens: int) -> int:
        """What the host tier is to have for a prompt of at least `tokens` tokens."""
        return self.planned_bits(tokens) if self.settled_bits is None else self.host_bits

    def settle_bits(self, bits: int | None = None) -> None:
        """Keep the host tier in `bits` from now on; None: in those that it has."""
        self.host_bits, self._bits_settled = self.host_bits if bits is None else bits, True
        if self.host_bits != PLAIN:  # or the first question would see exact tokens, which no later one does
            self.drop_residents()

    def forget_bits(self) -> None:
        """The host tier is empty: the next prompt may have others."""
        self.host_bits, self._bits_settled = PLAIN, False

    def codec(self, bits: int, dtype: torch.dtype) -> Codec:
        """Of chunks of layers whose keys are of `dtype`."""
        return codec_for(bits, self.tiers.chunk_tokens, self.shape.head_dim, dtype)

    def new_arena(self, heads: int, chunk_bytes: int) -> Arena:
        """An empty arena for a layer."""
        if self.disk is not None:
            return self.disk.new_arena(heads, chunk_bytes, self.locker)
        return MemoryArena(heads, chunk_bytes, self.locker)

    def arena_of(self, records: torch.Tensor, whole: int) -> Arena:
        """An arena with records `(K, chunks, B)` that are there already. whole: how many chunks are complete."""
        if self.disk is not None:
            return self.disk.stored_arena(records, whole, self.locker)
        return MemoryArena.of(records, self.locker)

    def page_locked(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Uninitialised host memory that a card copies to and from without anybody waiting, until `unlock`."""
        if self.locker is None:
            return torch.empty(shape, dtype=dtype, device="cpu")
        memory = aligned(shape, dtype)
        self.locker.lock(memory)
        return memory

    def unlock(self, memory: torch.Tensor) -> None:
        """Memory from `page_locked`, or any other, is no longer used: waits for the cards."""
        if self.locker is not None:
            self.locker.unlock(memory)

    def beside(self, work: Callable[[], T], later: bool = False) -> Future[T]:
        """Compute on a thread of the host while the card is busy. `close` waits for it. later: no question waits for
        it, so that it must not delay what one does wait for."""
        if later not in self._workers:
            most = LATER_WORKERS if later else MOST_WORKERS
            self._workers[later] = ThreadPoolExecutor(most, thread_name_prefix="tieredkv-beside")
        return self._workers[later].submit(work)

    # ---- prefill

    def keep_first_tokens(self, layer: int, host: HostLayer, device: torch.device) -> None:
        """Allocate room for the first tokens of a layer that has none yet, if any are to stay on the device.

        None are if the prompt's length is unknown.
        """
        if self._resident_tokens is None:
            known = self._prompt_tokens > 0
            self._resident_tokens = (
                prefill_plan.resident_tokens(self.shape, self.tiers, self._prompt_tokens, self.planned_bits())
                if known
                else 0
            )
        if self._resident_tokens:
            shape = (host.num_heads, self._resident_tokens, host.head_dim)
            self.residents[layer] = Resident(
                self.ledger.empty("resident", shape, host.dtype, device),
                self.ledger.empty("resident", shape, host.dtype, device),
            )

    def make_room_for_scores(self, call: Call) -> None:
        """Drop the residents if scoring a call's rows needs their room."""
        kept = self._resident_tokens
        if kept and not prefill_plan.resident_beside_scores(self.shape, self.tiers, kept, call, self.host_bits):
            self.drop_residents()

    def drop_residents(self) -> None:
        """Free the residents of all layers; layers that see their first token later keep none either."""
        self._resident_tokens = 0
        if self.residents:
            self.residents.clear()
            return_unused(self.devices)
        self.ledger.release("resident")

    # ---- decoding

    def make_room_for_pools(self) -> None:
        """Free what only a prefill needs on the devices. No call may be under way."""
        self.drop_residents()
        return_unused(self.devices)

    def new_pool(self, pages: int, codec: Codec, device: torch.device) -> DevicePool:
        """A pool that lives until `end_decoding`."""
        self.pools.append(DevicePool(self.ledger, pages, codec, device))
        return self.pools[-1]

    def end_decoding(self) -> None:
        """Free the pools, and stop counting what was allocated with them. Does nothing in prefill. The layers must have
        left the decode phase, or their pages keep the memory."""
        decoding = bool(self.pools)
        for pool in self.pools:
            pool.close()
        self.pools = []
        for purpose in DECODE_PURPOSES:
            self.ledger.release(purpose)
        if decoding:  # a pool is one block, and nothing else is in it yet that would keep it
            return_unused(self.devices)

    def waits(self, layers: Sequence[torch.device]) -> Waits | None:
        """How long a step waits for chunks and may wait, by the rates of the first device; None: for as long as it
        takes, also where no link is known. layers: devices of the tiered layers."""
        tiers, on_card = self.tiers, layers[0].type == "cuda"
        limited = tiers.step_overhead is not None and tiers.budget_ratio is None
        undecided = on_card and tiers.prefetch and tiers.ahead is not False
        if self._rates is None or not (limited or undecided):
            return None
        if self._weights is None:
            dtype = {2: torch.bfloat16, 4: torch.float32}[self.shape.itemsize]  # of it only the size matters here
            try:
                weights = Weights.of(self._config, dtype)
            except UnsupportedModelError:  # it cannot be built from its config, so its weights are not known
                self._rates = None
                return None
            self._weights = weights.totals()["step_weight_bytes"], weights.leads()
        read, leads = self._weights
        if on_card:  # a query is not predicted on another device than its layer's
            before = (layers[0], *layers)
            leads = tuple(
                lead if own == other else None for lead, own, other in zip(leads, layers, before, strict=False)
            )
        if not on_card or (self.locker is not None and self.locker.refusal() is not None):
            leads = ()  # the host computes the copies, or waits for them
        return step_waits(self.shape, tiers, read, self._rates, leads, on_disk=self.disk is not None)

    def may_predict(self, tokens: int) -> bool:
        """Whether steps after at least `tokens` prompt tokens may rank chunks by predicted queries."""
        tiers = self.tiers
        on_card = any(device.type == "cuda" for device in self.devices)
        wanted = on_card and self.disk is None if tiers.ahead is None else tiers.ahead
        if not (wanted and tiers.prefetch and self.devices) or tiers.policy.reuse_above <= 1:
            return False
        prompt = max(self._prompt_tokens, tokens)
        pages = self.shape.kv_heads * ceil_div(prompt, tiers.chunk_tokens)
        least = page_bytes(self.shape, tiers, page_bits(tiers, self.planned_bits(prompt))[-1])
        return tiers.budget_ratio is not None or pages * least > tiers.cap_bytes

    def step_ops(self, device: torch.device) -> Ops:
        """The operations of a decoding step until the next seal: growing the host tier may change them."""
        ops = self._ops or ops_for(device)
        if self.disk is not None:
            return ops if device.type == "cpu" else copying_by_torch(ops, "copies from disk")
        refusal = None if self.locker is None else self.locker.refusal()
        if refusal is None:
            return ops
        warnings.warn(
            f"host memory could not be page-locked ({refusal}): chunks are copied through the host, which is slower. "
            "Raise `ulimit -l` or the container's memory limit.",
            stacklevel=2,
        )
        return copying_by_torch(ops)

    def close(self) -> None:
        """Free everything. `copies` must be closed, and the host tier freed."""
        for workers in self._workers.values():
            workers.shutdown(cancel_futures=True)
        self.preparing.stop()
        self.end_decoding()
        self.drop_residents()
        if self.locker is not None:
            self.locker.close()
        if self.disk is not None:
            self.disk.close()
