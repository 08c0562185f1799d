"""What a step launches, allocates and moves, counted without a card.

`Recorder` sees each of torch's operations and each launch of a Triton kernel. An operation that only makes a view
counts as nothing, one that only allocates counts as an allocation, and any other as one launch (torch uses two or more
kernels for a few: sorts, sums over very long rows). Bytes are what an operation or kernel reads and writes at least,
each tensor once; of the pool and of host memory, what it may touch at most.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from fake_card import CARD, fake_card, move_model, on_card
from helpers import LateCopies, pressed, tier_options
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import tieredkv
from tieredkv import TieredCache
from tieredkv.cache.foresight import Foresight
from tieredkv.cache.layer import TieredLayer
from tieredkv.cache.looks import Looks
from tieredkv.cache.question import Question
from tieredkv.environment.versions import cache_argument
from tieredkv.ops.triton import copy as copy_kernels
from tieredkv.session.step_graph import StepGraph

EMPTY = ("empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided")
"""Operations that allocate and launch nothing."""
PICKED = ("index", "index_select", "gather", "take", "embedding", "index_put", "index_put_", "scatter_", "index_add_")
"""Operations that touch only part of their first argument, as much as of the others together."""
STEPS = 3
"""The first compiles kernels, the second is captured, the third is what a replay stands for."""


@dataclass
class Part:
    """What one part of a step did."""

    launches: list[str] = field(default_factory=list)
    """Names of torch's operations and, in brackets, of kernels."""
    allocated: list[tuple[str, int]] = field(default_factory=list)
    """By which operation, and bytes."""
    device_bytes: int = 0
    link_bytes: int = 0
    """Between host and device: at most, if every chunk that a kernel may be asked for is missing."""
    copies: list[str] = field(default_factory=list)
    """torch's operations between host and device: each would wait, or could not be captured."""
    stale: list[str] = field(default_factory=list)
    """Reads of memory that the step before allocated: a replayed graph would find what the captured step left."""

    @property
    def kernels(self) -> Counter[str]:
        return Counter(self.launches)


R = TypeVar("R", bound="Recorder")


class Recorder(TorchDispatchMode):
    """Counts while it is entered, within `fake_card.fake_card`. `part` says to which part of which step."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[dict[str, Part]] = []
        self._name = "model"
        self._born: dict[int, tuple[torch.UntypedStorage, int]] = {}
        """Storages allocated in steps, kept alive so that none has another's key, and in which step."""

    def begin_step(self) -> None:
        self.steps.append({})

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        before, self._name = self._name, name
        try:
            yield
        finally:
            self._name = before

    @property
    def _part(self) -> Part:
        return self.steps[-1].setdefault(self._name, Part())

    # ---- torch's operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.steps:
            self._count(func, [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)], out)
        return out

    def _count(self, func: Any, read: list[torch.Tensor], out: Any) -> None:
        made = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        devices = {tensor.device.type for tensor in (*read, *made) if tensor.dim() or tensor.device.type == "cuda"}
        if "cuda" not in devices:
            return
        name, known = str(func).removeprefix("aten."), {key_of(tensor) for tensor in read}
        new = [tensor for tensor in made if key_of(tensor) not in known]
        for tensor in new:
            if tensor.device == CARD:
                self._part.allocated.append((name, tensor.untyped_storage().nbytes()))
                self._born[key_of(tensor)] = tensor.untyped_storage(), len(self.steps)
        if func._schema.name.removeprefix("aten::") in EMPTY or not (new or func._schema.is_mutable):
            return
        self._part.launches.append(name)
        self._touch(name, read)
        if len(devices) > 1:
            self._part.copies.append(name)
            self._part.link_bytes += sum(tensor.nbytes for tensor in new) or read[0].nbytes
        changed = [] if new or not read else [read[0]]
        seen = read[1:] if func._schema.name.removeprefix("aten::") in PICKED else read
        self._part.device_bytes += sum(extent(tensor) for tensor in (*seen, *new, *changed))

    def _touch(self, name: str, tensors: list[torch.Tensor]) -> None:
        for tensor in tensors:
            _, born = self._born.get(key_of(tensor), (None, 0))
            if born and born == len(self.steps) - 1:
                self._part.stale.append(name)

    # ---- kernels

    def launch(self, kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        """Stands for `KernelInterface.run`: checks where the arguments are, and counts instead of launching."""
        given = dict(zip(kernel.arg_names, args, strict=False)) | options
        tensors = {name: value for name, value in given.items() if isinstance(value, torch.Tensor)}
        for name, tensor in tensors.items():
            host = name == "arena"
            assert tensor.device.type == ("cpu" if host else "cuda"), f"{kernel.__name__}: {name} is on {tensor.device}"
            assert tensor.is_contiguous() or name in STRIDED, f"{kernel.__name__}: {name} is read as if contiguous"
        part = self._part
        part.launches.append(f"[{kernel.__name__}]")
        self._touch(kernel.__name__, list(tensors.values()))
        part.device_bytes += sum(extent(tensor) for name, tensor in tensors.items() if name not in RECORDS)
        pool, link = records_touched(kernel.__name__, given)
        part.device_bytes += pool
        part.link_bytes += link


RECORDS = ("arena", "pool", "numbers", "scales")
"""Arguments of kernels that are whole tiers, of which `records_touched` says how much is touched."""
STRIDED = ("arena", "packed", "keys", "chunk_in", "slot_of", "last_used", "page_lse")
"""Arguments of kernels that come with a stride."""


def records_touched(kernel: str, given: dict[str, Any]) -> tuple[int, int]:
    """Bytes of records that a launch touches at most: in the pool, and in host memory."""
    if kernel == "_attend_split":
        numbers = given["numbers"]
        return given["table"].numel() * numbers.shape[1] * numbers.itemsize, 0
    if kernel == "_append":
        return 2 * given["keys"].nbytes, 0
    if kernel == "_gather":
        record, page = (given[name].shape[-1] * given[name].itemsize for name in ("arena", "pool"))
        return given["missed"].numel() * page, given["missed"].numel() * record
    assert not any(name in given for name in ("arena", "pool")), f"say what {kernel} touches of the pool"
    return 0, 0


def extent(tensor: torch.Tensor) -> int:
    """Bytes of memory behind a tensor, however often it repeats them."""
    return min(tensor.nbytes, tensor.untyped_storage().nbytes())


def key_of(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


@contextmanager
def recorded(patch: Any, recorder: R) -> Iterator[R]:
    """Count what runs inside the block. patch: pytest's `monkeypatch`."""
    kind = type(copy_kernels._append)
    patch.setattr(kind, "run", lambda kernel, *args, **options: recorder.launch(kernel, *args, **options))
    with recorder:
        yield recorder


class SecondStream(LateCopies):
    """What it runs is a part of its own, once there is a recorder."""

    recorder: Recorder | None = None

    def submit(self, key: Hashable, copy: Callable[[], int]) -> None:
        def counted() -> int:
            with nullcontext() if self.recorder is None else self.recorder.part(f"second stream {key}"):
                return copy()

        super().submit(key, counted)


def decoded(patch: Any, model: Any, ids: torch.Tensor, evidence: bool, **options: Any) -> Recorder:
    """Three steps of a model in bfloat16 on a card. Parts: the attention of each layer ("layer 0", ...), what is done
    for a query that is predicted ("foreseen 1", ...), what runs on the second stream ("second stream 1", ...), what is
    recorded after a step ("after"), and the rest ("model")."""
    model = copy.deepcopy(model).to(torch.bfloat16)
    tiers = {**pressed(model, 900, 0.6), "chunk_tokens": 8, "text_window": 16, **options}
    made = TieredCache(model.config, **tier_options(**tiers), copies=(copies := SecondStream()))
    with torch.no_grad(), tieredkv.use_attention(model), made as cache:
        cache.expect(Question(max_new_tokens=8, looks=Looks(8) if evidence else None))
        model(ids, **cache_argument(cache))
        cache.seal()
        with patch.context() as patch, fake_card(patch), recorded(patch, Recorder()) as recorder, on_card(cache):
            copies.recorder = recorder
            faked, attend, record = move_model(model), TieredLayer.attend, cache.decoding.record_step
            foresee = Foresight.foresee

            def counted_attend(layer: TieredLayer, *args: Any, **kwargs: Any) -> torch.Tensor:
                with recorder.part(f"layer {layer.index}"):
                    return attend(layer, *args, **kwargs)

            def counted_foresee(foresight: Foresight, layer: int, sight: Any) -> None:
                with recorder.part(f"foreseen {layer}"):
                    foresee(foresight, layer, sight)

            def counted_record() -> None:
                with recorder.part("after"):
                    record()

            def forward(token: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
                return faked(token, **cache_argument(cache), position_ids=place).logits[:, -1]

            patch.setattr(TieredLayer, "attend", counted_attend)
            patch.setattr(Foresight, "foresee", counted_foresee)
            patch.setattr(cache.decoding, "record_step", counted_record)
            with tieredkv.use_attention(faked):
                step = StepGraph(forward, cache, CARD, axes=1, position=900)
                step.path = "eager: counted"
                for _ in range(STEPS):
                    recorder.begin_step()
                    step(7)
                    cache.finish()  # as a capture does: copies for the next step belong to this one
    return recorder
