"""A card simulated on the CPU, on which everything happens as late as CUDA allows, or at random moments before.

Tensors on it (`CardTensor`) say that they are on `cuda:0`; their numbers are in CPU tensors. An operation on them is
not run but queued on the current stream, as on a card, and runs when something waits for it: an event, another stream,
the host. Triton's kernels are queued too and run in its interpreter. Fresh memory is full of NaN. Freed memory becomes
so at the next moment in the order of the stream that it was allocated on, as torch's allocator may give it to somebody
else from then on. Copies from and to page-locked memory are queued; others make the host wait, or take what they read
along at once. Capturing a graph keeps what is queued, and a replay queues it again.

Not simulated: time, sizes of memory, several cards, order within a graph, and that operations of one stream overlap
(they do not).
"""

from __future__ import annotations

import random
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from tieredkv.codecs.rotated import hadamard
from tieredkv.ops.triton import attend as attend_kernels

CARD = torch.device("cuda", 0)
POISON = 255
"""Each byte of fresh and of freed memory: NaN as a float, -1 as an integer."""
aten = torch.ops.aten
WAITING = (aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default, aten.masked_select.default)
"""Operations that wait for their stream, as the host needs what they compute."""


class Block:
    """Memory on the card, alive as long as a tensor uses it."""

    def __init__(self, card: Card, memory: torch.Tensor) -> None:
        """memory: its bytes."""
        if not card.capturing:  # a graph's memory is its own for as long as it lives
            weakref.finalize(self, card.free, memory, card.current)


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
        return Card.now.dispatch(func, args, kwargs or {})

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __repr__(self, **kwargs: Any) -> str:
        return f"CardTensor({tuple(self.shape)}, {self.dtype})"


class Stream:
    """A queue; the fake of `torch.cuda.Stream`."""

    def __init__(self, device: Any = None, priority: int = 0) -> None:
        self.priority = priority
        self.done, self.queue = 0, []
        """How much it has run, and what it is to run."""
        Card.now.streams.append(self)

    @property
    def end(self) -> int:
        return self.done + len(self.queue)

    def wait_event(self, event: Event) -> None:
        Card.now.wait(self, event)

    def wait_stream(self, other: Stream) -> None:
        event = Event()
        event.record(other)
        self.wait_event(event)

    def synchronize(self) -> None:
        Card.now.synchronize(self)


class Event:
    """The fake of `torch.cuda.Event`."""

    def __init__(self, **kwargs: Any) -> None:
        self.stream: Stream | None = None
        self.place = 0

    def record(self, stream: Stream | None = None) -> None:
        self.stream = stream or Card.now.current
        self.place = self.stream.end
        Card.now.recorded(self)


class Graph:
    """The fake of `torch.cuda.CUDAGraph`."""

    def __init__(self) -> None:
        self.queued: list[Callable[[], None]] = []

    def replay(self) -> None:
        for work in self.queued:
            Card.now.enqueue(work)

    def reset(self) -> None:
        self.queued = []


class Card(TorchDispatchMode):
    """The card, while it is entered. Queues run at random moments by a `seed`; None: only when they have to."""

    now: Card

    def __init__(self, seed: int | None) -> None:
        super().__init__()
        self._chance = None if seed is None else random.Random(seed)
        self.streams: list[Stream] = []
        Card.now = self
        self.current = Stream()
        self.capturing: Graph | None = None
        self.pinned: dict[int, int] = {}
        """Ends of page-locked ranges of host memory, by their begin."""
        self.waits = 0
        """How often the host has waited for a stream."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.dispatch(func, args, kwargs or {})

    # ---- queues

    def enqueue(self, work: Callable[[], None]) -> None:
        if self.capturing is not None:
            self.capturing.queued.append(work)
            return
        self.current.queue.append(work)
        if self._chance is not None:
            for stream in self.streams:
                if self._chance.random() < 0.3:
                    self.run(stream, stream.done + self._chance.randint(0, len(stream.queue)))

    def run(self, stream: Stream, upto: int) -> None:
        """Run a stream's work up to its place `upto`."""
        while stream.done < upto:
            work = stream.queue.pop(0)
            stream.done += 1
            work()

    def wait(self, stream: Stream, event: Event) -> None:
        if event.stream is None or self.capturing is not None:  # a graph's work is in order
            return
        other, place = event.stream, event.place
        before, self.current = self.current, stream
        self.enqueue(lambda: self.run(other, place))
        self.current = before

    def recorded(self, event: Event) -> None:
        """Called when an event is recorded."""

    def synchronize(self, stream: Stream) -> None:
        """The host waits for a stream."""
        if self.capturing is not None:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        self.waits += 1
        self.run(stream, stream.end)

    def synchronize_all(self, device: Any = None) -> None:
        for stream in self.streams:
            self.synchronize(stream)

    # ---- memory

    def new(self, like: torch.Tensor) -> CardTensor:
        """Fresh memory for a tensor of the shape, strides and dtype of `like`."""
        with torch.utils._python_dispatch._disable_current_modes():
            memory = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device="cpu")
            raw = bytes_of(memory)
        self.enqueue(lambda: poison(raw))
        return CardTensor(memory, Block(self, raw))

    def free(self, raw: torch.Tensor, stream: Stream) -> None:
        if Card.now is not self:
            return
        before, self.current = self.current, stream
        self.enqueue(lambda: poison(raw))
        self.current = before

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        address = tensor.data_ptr()
        return any(begin <= address < end for begin, end in list(self.pinned.items()))

    # ---- operations

    def dispatch(self, func: Any, args: Any, kwargs: Any) -> Any:
        with torch.utils._python_dispatch._disable_current_modes():
            return self._dispatch(func, args, kwargs)

    def _dispatch(self, func: Any, args: Any, kwargs: Any) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        cards = [tensor for tensor in tensors if isinstance(tensor, CardTensor)]
        asked = kwargs.get("device")
        to_card = asked is not None and torch.device(asked).type == "cuda"
        if not cards and not to_card:
            self.on_host(func, tensors)
            return func(*args, **kwargs)
        if func is aten.copy_.default:
            return self._copy(*args, **kwargs)
        if func is aten._to_copy.default:
            return self._to_copy(args[0], **kwargs)
        if func in WAITING:
            self.synchronize(self.current)
            return self._wrap(func(*tree_map(numbers, args), **tree_map(numbers, kwargs)))
        if func.is_view or func in (aten._unsafe_view.default, aten.detach.default):
            out = func(*tree_map(numbers, args), **kwargs)
            return tree_map(
                lambda view: CardTensor(view, args[0].block) if isinstance(view, torch.Tensor) else view, out
            )
        func = BY_CPU.get(func, func)
        if "device" in kwargs:
            kwargs = {**kwargs, "device": CARD if asked is None else asked}
        given, named = tree_map(taken_along, args), tree_map(taken_along, kwargs)
        named = {name: torch.device("cpu") if name == "device" else value for name, value in named.items()}
        mutable = getattr(getattr(func, "_schema", None), "is_mutable", False)
        if mutable:
            self.enqueue(lambda: func(*given, **named))
            return named_outputs(func, args, kwargs)
        try:
            shapes = func(
                *tree_map(meta, args), **{**tree_map(meta, kwargs), **({"device": "meta"} if to_card else {})}
            )
        except (NotImplementedError, RuntimeError):  # its shape depends on values
            self.synchronize(self.current)
            return self._wrap(func(*given, **named))
        made = tree_map(lambda like: self.new(like) if isinstance(like, torch.Tensor) else like, shapes)
        targets = [out.memory for out in tree_leaves(made) if isinstance(out, CardTensor)]

        def work() -> None:
            results = [result for result in tree_leaves(func(*given, **named)) if isinstance(result, torch.Tensor)]
            for target, result in zip(targets, results, strict=True):
                target.copy_(result)

        if not str(func).startswith(("aten.empty", "aten.new_empty")):
            self.enqueue(work)
        return made

    def on_host(self, func: Any, tensors: list[torch.Tensor]) -> None:
        """Called for an operation of the host alone, before it runs."""

    def _wrap(self, out: Any) -> Any:
        """Results on the card of what ran at once."""

        def wrapped(result: Any) -> Any:
            return CardTensor(result, Block(self, bytes_of(result))) if isinstance(result, torch.Tensor) else result

        return tree_map(wrapped, out)

    def _to_copy(self, source: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        target, dtype = torch.device(kwargs.get("device") or source.device), kwargs.get("dtype") or source.dtype
        like = torch.empty_like(numbers(source), dtype=dtype, device="meta")
        if target.type == "cpu":  # into fresh memory, which is not page-locked: the host waits
            self.synchronize(self.current)
            return numbers(source).to(dtype, copy=True)
        made = self.new(like)
        self._copy(made, source, kwargs.get("non_blocking", False))
        return made

    def _copy(self, target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        host = source if isinstance(target, CardTensor) else target
        to, by = numbers(target), numbers(source)
        late = isinstance(host, CardTensor) or (non_blocking and self.is_pinned(host) and host.is_contiguous())
        if not late and host is source:
            by = by.clone()
        self.enqueue(lambda: to.copy_(by))
        if not late and (host is target or not non_blocking):
            self.synchronize(self.current)
        return target

    def launch(self, run: Any, kernel: Any, *args: Any, **options: Any) -> None:
        """Queue a Triton kernel."""
        given, named = [numbers(each) for each in args], {name: numbers(each) for name, each in options.items()}
        self.enqueue(lambda: run(kernel, *given, **named))


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


def named_outputs(func: Any, args: Any, kwargs: Any) -> Any:
    """What an operation that writes to its arguments returns: those arguments."""
    given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
    written = [given[each.name] for each in func._schema.arguments if each.alias_info and each.alias_info.is_write]
    return written[0] if len(func._schema.returns) == 1 else tuple(written) or None


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
def simulated_card(patch: Any, seed: int | None = None, kind: type[Card] = Card) -> Iterator[Card]:
    """Inside the block there is a card. patch: pytest's `monkeypatch`. seed: as of `Card`."""
    from tieredkv.memory import pagelock

    card = kind(seed)

    @contextmanager
    def stream(other: Stream | None) -> Iterator[None]:
        before, card.current = card.current, other or card.current
        try:
            yield
        finally:
            card.current = before

    @contextmanager
    def graph(captured: Graph, **kwargs: Any) -> Iterator[None]:
        card.synchronize_all()
        with stream(kwargs["stream"]):
            card.capturing = captured
            try:
                yield
            finally:
                card.capturing = None

    def register(address: int, nbytes: int, flags: int) -> int:
        card.pinned[address] = address + nbytes
        return 0

    fakes = {
        "Stream": Stream, "Event": Event, "CUDAGraph": Graph, "graph": graph, "stream": stream,
        "current_stream": lambda device=None: card.current, "set_stream": lambda other: setattr(card, "current", other),
        "current_device": lambda: 0, "device": lambda device: nullcontext(), "synchronize": card.synchronize_all,
        "cudart": lambda: SimpleNamespace(
            cudaHostRegister=register, cudaHostUnregister=lambda address: int(card.pinned.pop(address, 0) == 0)
        ),
    }  # fmt: skip
    run = type(attend_kernels._merge_splits).run
    with patch.context() as patched:
        for name, fake in fakes.items():
            patched.setattr(torch.cuda, name, fake)
        patched.setattr(
            type(attend_kernels._merge_splits), "run", lambda *args, **named: card.launch(run, *args, **named)
        )
        patched.setattr(attend_kernels, "programs_for", lambda device: 4)
        patched.setattr(pagelock, "ThreadPoolExecutor", AtOnce)
        hadamard.cache_clear()
        try:
            with FakeTensorMode(), card:  # the former keeps torch from looking for a driver
                yield card
        finally:
            hadamard.cache_clear()


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
