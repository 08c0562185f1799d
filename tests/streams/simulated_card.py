"""A card simulated on the CPU, on which everything happens as late as CUDA allows, or at random moments before.

Tensors on it (`CardTensor`) say that they are on `cuda:0`; their numbers are in CPU tensors. An operation on them is
not run but queued on the current stream, as on a card, and runs when something waits for it: an event, another stream,
the host. Triton's kernels are queued too and run in its interpreter. Fresh memory is full of NaN. Freed memory becomes
so at the next moment in the order of the stream that it was allocated on, as torch's allocator may give it to somebody
else from then on. Copies from and to page-locked memory are queued; others make the host wait, or take what they read
along at once. Capturing a graph keeps what is queued, and a replay queues it again, in no more order than CUDA promises
(`queues.Graph`). Memory that is allocated and freed in a capture is full of NaN from there on in each replay.

Not simulated: time, sizes of memory, several cards, and that operations of one stream overlap (they do not).
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from helpers import at_once
from queues import Graph, Order, Queues, Stream, Work
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from tieredkv.cache.device_tier import DeviceTier
from tieredkv.cache.preparing import Preparing
from tieredkv.codecs.rotated import hadamard
from tieredkv.environment.threads import at_most
from tieredkv.memory import copies, pagelock
from tieredkv.ops.triton import attend as attend_kernels
from tieredkv.session.pipeline import Pipeline

CARD = torch.device("cuda", 0)
MEMORY = 16 * 2**30
"""Bytes that it says are free."""
POISON = 255
"""Each byte of fresh and of freed memory: NaN as a float, -1 as an integer."""
aten = torch.ops.aten
WAITING = (aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default, aten.masked_select.default)
"""Operations that wait for their stream, as the host needs what they compute."""


class Block:
    """Memory on the card, alive as long as a tensor uses it."""

    def __init__(self, card: Card, raw: torch.Tensor) -> None:
        """raw: its bytes."""
        weakref.finalize(self, card.free, raw, card.current, card.graph_of(card.current))


class CardTensor(torch.Tensor):
    """A tensor on the card."""

    memory: torch.Tensor
    """Its numbers, on the CPU."""
    block: Block
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, memory: torch.Tensor, block: Block) -> CardTensor:
        made = torch.Tensor._make_wrapper_subclass(
            cls, memory.shape, strides=memory.stride(), storage_offset=memory.storage_offset(), dtype=memory.dtype,
            device=CARD, requires_grad=False,
        )  # fmt: skip
        made.memory, made.block = memory, block
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return Queues.now.dispatch(func, args, kwargs or {})

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __repr__(self, **kwargs: Any) -> str:
        return f"CardTensor({tuple(self.shape)}, {self.dtype})"


class Card(TorchDispatchMode, Queues):
    """The card, while it is entered."""

    def __init__(self, order: Order = "late") -> None:
        TorchDispatchMode.__init__(self)
        Queues.__init__(self, order)
        self.pinned: dict[int, int] = {}
        """Ends of page-locked ranges of host memory, by their begin."""
        self._freed: list[tuple[torch.Tensor, Stream]] = []
        """Memory of no graph that was freed on a stream while that was captured."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.dispatch(func, args, kwargs or {})

    def execute(self, work: Work) -> None:
        with _disable_current_modes():
            work.run()

    # ---- memory

    def new(self, like: torch.Tensor) -> CardTensor:
        """Fresh memory for a tensor of the shape, strides and dtype of `like`."""
        memory = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device="cpu")
        raw = bytes_of(memory)
        self.enqueue(Work(lambda: poison(raw), writes=[raw], kernel="fresh memory"))
        return CardTensor(memory, Block(self, raw))

    def free(self, raw: torch.Tensor, stream: Stream, graph: Graph | None) -> None:
        """Called when nobody has a block any more, which was allocated on `stream`, perhaps for a graph."""
        if Queues.now is not self or graph is not self.graph_of(stream):
            if Queues.now is self and graph is None:  # what is captured does not free it
                self._freed.append((raw, stream))
            return  # a graph's memory is its own for as long as it lives
        with self.stream(stream):
            self.enqueue(Work(lambda: poison(raw), writes=[raw], kernel="freed memory"))

    def captured(self) -> None:
        freed, self._freed = self._freed, []
        for raw, stream in freed:
            self.free(raw, stream, None)

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        address = tensor.data_ptr()
        return any(begin <= address < end for begin, end in self.pinned.items())

    def _register(self, address: int, nbytes: int, flags: int) -> int:
        self.pinned[address] = address + nbytes
        return 0

    def _unregister(self, address: int) -> int:
        return int(self.pinned.pop(address, 0) == 0)

    # ---- operations

    def dispatch(self, func: Any, args: Any, kwargs: Any) -> Any:
        with _disable_current_modes():
            return self._dispatch(func, args, kwargs)

    def _dispatch(self, func: Any, args: Any, kwargs: Any) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        to_card = kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda"
        if not to_card and not any(isinstance(tensor, CardTensor) for tensor in tensors):
            return self.on_host(func, args, kwargs)
        if func is aten.copy_.default:
            return self._copy(*args, **kwargs)
        if func is aten._to_copy.default:
            return self._to_copy(args[0], **kwargs)
        if func in WAITING:
            return self._at_once(func, args, kwargs)
        if func.is_view or func in (aten._unsafe_view.default, aten.detach.default):
            out, block = func(*tree_map(numbers, args), **kwargs), args[0].block
            return tree_map(lambda view: CardTensor(view, block) if isinstance(view, torch.Tensor) else view, out)
        return self._queue(BY_CPU.get(func, func), func, args, kwargs, to_card)

    def _queue(self, run: Any, func: Any, args: Any, kwargs: Any, to_card: bool) -> Any:
        """Queue an operation. Returns its outputs, whose shapes follow from those of its arguments."""
        given, named = tree_map(taken_along, args), tree_map(taken_along, kwargs)
        on_meta, by_meta = tree_map(meta, args), tree_map(meta, kwargs)
        if to_card:
            named["device"], by_meta["device"] = torch.device("cpu"), torch.device("meta")
        written = [numbers(each) for each in arguments_written(func, args, kwargs)]
        reads = [leaf for leaf in tree_leaves((given, named)) if isinstance(leaf, torch.Tensor)]
        reads = [tensor for tensor in reads if not any(tensor is each for each in written)]
        if func._schema.is_mutable:
            self.enqueue(Work(lambda: run(*given, **named), [*reads, *written], written, str(func)))
            results = arguments_written(func, args, kwargs)
            return results[0] if len(func._schema.returns) == 1 else (tuple(results) or None)
        try:
            shapes = run(*on_meta, **by_meta)
        except (NotImplementedError, RuntimeError):  # they depend on values
            return self._at_once(func, args, kwargs)
        made = tree_map(lambda like: self.new(like) if isinstance(like, torch.Tensor) else like, shapes)
        targets = [out.memory for out in tree_leaves(made) if isinstance(out, CardTensor)]

        def work() -> None:
            results = [result for result in tree_leaves(run(*given, **named)) if isinstance(result, torch.Tensor)]
            for target, result in zip(targets, results, strict=True):
                target.copy_(result)

        if not str(func).startswith(("aten.empty", "aten.new_empty")):
            self.enqueue(Work(work, reads, targets, str(func)))
        return made

    def _at_once(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The host waits for what the stream has computed."""
        self.synchronize(self.current)
        out = func(*tree_map(numbers, args), **tree_map(numbers, kwargs))
        return tree_map(lambda each: CardTensor(each, Block(self, bytes_of(each))) if is_tensor(each) else each, out)

    def on_host(self, func: Any, args: Any, kwargs: Any) -> Any:
        """An operation of the host alone."""
        return func(*args, **kwargs)

    def _to_copy(self, source: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        target, dtype = torch.device(kwargs.get("device") or source.device), kwargs.get("dtype") or source.dtype
        like = torch.empty_like(numbers(source), dtype=dtype, device="cpu")
        made = like if target.type == "cpu" else self.new(like)
        return self._copy(made, source, kwargs.get("non_blocking", False), made is like)

    def _copy(
        self, target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False, pinned: bool = False
    ) -> torch.Tensor:
        """pinned: the host's part of it is page-locked by torch."""
        host = source if isinstance(target, CardTensor) else target
        pinned = pinned or (self.is_pinned(host) and host.is_contiguous())
        late = isinstance(host, CardTensor) or (non_blocking and pinned)
        to, by = numbers(target), numbers(source)
        if not late and host is source:
            by = by.clone()
        self.enqueue(Work(lambda: to.copy_(by), [by], [to], "copy"))
        if not late and (host is target or not non_blocking):
            self.synchronize(self.current)
        return target

    def launch(self, run: Any, kernel: Any, *args: Any, **options: Any) -> None:
        """Queue a Triton kernel. One that is only compiled, on a thread of its own, does nothing here."""
        if options.get("warmup"):
            return
        given, named = [numbers(each) for each in args], {name: numbers(each) for name, each in options.items()}
        tensors = [each for each in (*given, *named.values()) if isinstance(each, torch.Tensor)]
        self.enqueue(Work(lambda: run(kernel, *given, **named), tensors, kernel=f"[{kernel.__name__}]"))


def numbers(thing: Any) -> Any:
    return thing.memory if isinstance(thing, CardTensor) else thing


def taken_along(thing: Any) -> Any:
    """As a kernel has it: the card's memory itself, what the host's memory holds at the launch."""
    return numbers(thing) if isinstance(thing, CardTensor) or not isinstance(thing, torch.Tensor) else thing.clone()


def meta(thing: Any) -> Any:
    if not isinstance(thing, torch.Tensor):
        return thing
    like = numbers(thing)
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device="meta")


def is_tensor(thing: Any) -> bool:
    return isinstance(thing, torch.Tensor)


def arguments_written(func: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
    given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
    return [given[each.name] for each in func._schema.arguments if each.alias_info and each.alias_info.is_write]


def attention(
    query: Any,
    keys: Any,
    values: Any,
    bias: Any,
    with_lse: bool,
    dropout: float = 0.0,
    causal: bool = False,
    **scale: Any,
) -> tuple[torch.Tensor, ...]:
    """A card's attention by a CPU's. The last two results are states of random numbers, of which it needs none."""
    operation = aten._scaled_dot_product_flash_attention_for_cpu.default
    out, lse = operation(query, keys, values, dropout, causal, **scale)
    return out, lse, lse.new_zeros(()), lse.new_zeros(())


BY_CPU = {aten._scaled_dot_product_efficient_attention.default: attention}


def bytes_of(memory: torch.Tensor) -> torch.Tensor:
    """All bytes of a tensor's storage."""
    return torch.empty(0, dtype=torch.uint8, device="cpu").set_(memory.untyped_storage())


def poison(raw: torch.Tensor) -> None:
    raw.fill_(POISON)


@contextmanager
def simulated_card(patch: Any, order: Order = "late", kind: type[Card] = Card) -> Iterator[Card]:
    """Inside the block there is a card. patch: pytest's `monkeypatch`."""
    card, kernels = kind(order), type(attend_kernels._merge_splits)
    run = kernels.run
    runtime = SimpleNamespace(cudaHostRegister=card._register, cudaHostUnregister=card._unregister)
    with patch.context() as patched:
        card.use(patched)
        patched.setattr(torch.cuda, "cudart", lambda: runtime)
        patched.setattr(kernels, "run", lambda *args, **options: card.launch(run, *args, **options))
        patched.setattr(attend_kernels, "programs_for", lambda device: 4)
        patched.setattr(pagelock, "ThreadPoolExecutor", AtOnce)
        patched.setattr(torch.cuda, "mem_get_info", lambda device=None: (MEMORY, MEMORY))
        for name in ("memory_allocated", "memory_reserved"):
            patched.setattr(torch.cuda, name, lambda device=None: 0)
        patched.setattr(torch.cuda, "empty_cache", lambda: None)
        patched.setattr(copies, "_streams", {})
        patched.setattr(Preparing, "start", lambda *_: None)  # other threads' memory would be taken for the card's
        patched.setattr(DeviceTier, "beside", staticmethod(at_once))
        hadamard.cache_clear()
        try:
            with at_most(1), FakeTensorMode(), card:  # that mode keeps torch from looking for a driver
                yield card
        finally:
            hadamard.cache_clear()


def stages_without_threads(patch: Any) -> None:
    """Let a session decode and encode a video on the thread that prefills it: another would have no card."""
    patch.setattr(Pipeline, "stage", lambda pipeline, name, items, depth=1: items)
    patch.setattr(Pipeline, "busy_seconds", lambda pipeline: defaultdict(float))


class AtOnce:
    """An executor without threads: page-locking is done when it is asked for."""

    def __init__(self, **kwargs: Any) -> None:
        pass

    def submit(self, function: Any, *args: Any) -> Any:
        error: BaseException | None = None
        try:
            function(*args)
        except Exception as raised:  # noqa: BLE001  # kept for `Future.exception`
            error = raised
        return SimpleNamespace(exception=lambda: error)

    def shutdown(self, **kwargs: Any) -> None:
        pass


def on_card(model: torch.nn.Module) -> torch.nn.Module:
    """Move a model's weights, in place."""
    for module in model.modules():
        for kind in (module._parameters, module._buffers):
            for name, tensor in kind.items():
                if tensor is not None:
                    moved = tensor.detach().to(CARD)
                    kind[name] = torch.nn.Parameter(moved, requires_grad=False) if kind is module._parameters else moved
    return model
