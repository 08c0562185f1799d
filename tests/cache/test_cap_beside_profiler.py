"""What the ledger counts beside what torch's memory profiler sees: never less, and not several times as much.

On a CPU the device tier is in the same RAM as everything else, so the profiler sees what a card would hold.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from helpers import cap_share, tier_options

import tieredkv
from tieredkv.cache import prefill
from tieredkv.cache.looks import Looks
from tieredkv.cache.question import CONTEXT, Question
from tieredkv.cache.tiered_cache import TieredCache
from tieredkv.config import TierConfig
from tieredkv.environment.versions import cache_argument
from tieredkv.memory.ledger import DeviceLedger
from tieredkv.models.kv_shape import KVShape
from tieredkv.planning.prefill_plan import digesting_bytes
from tieredkv.policy.digests import DIGESTS

PROMPT, QUESTION = 2000, 80
TIGHT, AMPLE = 0.4, 50.0
"""Caps under which the past and the digests are read in several blocks, or in one."""


class Case(NamedTuple):
    """A tiny model and the settings of its cache."""

    dtype: torch.dtype
    heads: int
    kv_heads: int
    share: float
    """The cap, as a share of the full cache."""
    fields: dict[str, Any]


CASES = {
    "sketches": Case(torch.float32, 8, 2, AMPLE, {}),
    "sketches of 8 bits, few rows": Case(
        torch.bfloat16, 4, 4, AMPLE, {"digest_bits": 8, "pack_pages": False, "text_window": 8}
    ),
    "sketches, few rows, tight cap": Case(torch.bfloat16, 2, 2, TIGHT, {"text_window": 8}),
    "boxes, reused": Case(
        torch.bfloat16, 8, 2, AMPLE, {"digest": "cuboid", "digest_bits": 8, "reuse_above": 0.5, "top_k_ratio": 0.5}
    ),
    "segments, one KV head": Case(torch.float32, 16, 1, 1.0, {"digest": "segment", "chunk_tokens": 2}),
    "static heads": Case(torch.bfloat16, 8, 2, AMPLE, {"policy": "snapkv"}),
    "4 bits": Case(torch.bfloat16, 8, 2, TIGHT, {"host_kv_bits": 4}),
    "4 bits, few rows": Case(torch.bfloat16, 4, 4, AMPLE, {"host_kv_bits": 4, "text_window": 8}),
}
PARTS = "question", "steps", "several tokens"
MOMENTS = "held in prefill", "held in a step", "held"
MOST = {"scores": 4.0, "ranking": 3.0, "scratch": 1.6, "ranked ahead": 3.0}
"""Upper bound of counted over allocated bytes: some counted tensors do not exist at the same time, and a card decodes
more tokens at a time than the CPU."""


# ---- names inside the package that this file depends on


def settings(fields: dict[str, Any], gpu_kv_gb: float) -> tieredkv.TierConfig:
    all_dynamic = {} if "policy" in fields else {"theta": 2.0}
    options = {"gpu_kv_gb": gpu_kv_gb, "budget_ratio": 0.1, "chunk_tokens": 4, **all_dynamic, **fields}
    return tieredkv.TierConfig(**tier_options(**options))


def work(model: Any, cache: TieredCache, profiled: Callable[[str], Any]) -> None:
    """A prompt; then, each profiled, a question with scored rows, the seal and single tokens, several tokens a call."""
    ids = torch.randint(0, 97, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    cache.expect(CONTEXT)
    model(ids[:, :-QUESTION], **cache_argument(cache))
    cache.settle()  # digests the context; digests are on the host
    cache.reserve(PROMPT + 20)  # or the host tier grows while the profiler watches
    cache.expect(Question(max_new_tokens=20, looks=Looks(cache.tiers.chunk_tokens)))
    with profiled("question"):
        model(ids[:, -QUESTION:], **cache_argument(cache))
    with profiled("steps"):
        cache.seal()
        for place in range(2):
            model(ids[:, place : place + 1], **cache_argument(cache))
            moment("held", cache.ledger.used_bytes)
    with profiled("several tokens"), cache.forced():
        for tokens in (2, 16):
            model(ids[:, :tokens], **cache_argument(cache))


SCORING = (prefill, "score_text_rows")


def digest_of(kind: str, keys: torch.Tensor, bits: int) -> Callable[[], torch.Tensor]:
    """A function that digests chunks of keys `(K, n, C, D)`."""
    digest, tokens = DIGESTS[kind](keys.shape[-1], keys.shape[2], bits), keys.flatten(1, 2).float()
    fitted = digest.fit(tokens.mT @ tokens, tokens)
    return lambda: digest.make(keys, fitted)


def counted_for_digesting(chunks: torch.Tensor) -> int:
    """What a card's ledger counts for digesting chunks `(K, n, 2, C, D)`."""
    heads, count, _, c, d = chunks.shape
    shape = KVShape(1, heads, heads, d, chunks.dtype.itemsize)
    return digesting_bytes(shape, TierConfig(chunk_tokens=c), count)


# ---- measuring


@dataclass
class Block:
    """A part of the work, with the blocks inside it."""

    name: str
    counted: int
    """Bytes that the ledger counts for it; for a moment, all bytes that it counts."""
    before: int
    """Bytes allocated when it began, since the profiler was started."""
    live: int = 0
    allocated: int = 0
    """The most allocated inside it at once."""
    uncounted: int = 0
    """The most allocated at once beyond what was counted then."""
    followed: bool = False
    """Whether a block inside it has ended."""


def block(name: str, counted: int) -> Any:
    """A context for work that the profiler lists with a number of bytes."""
    return torch.profiler.record_function(f"{name}|{counted}")


def moment(name: str, counted: int) -> None:
    with block(name, counted):
        pass


@contextmanager
def profiling(done: list[Block]) -> Iterator[None]:
    """Adds to `done` the outermost blocks of the calling thread."""
    gc.disable()  # what it frees was allocated elsewhere
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            yield
    finally:
        gc.enable()
    begins, allocates, ends = range(3)
    events: list[tuple[int, int, str, int]] = []
    for event in profile.profiler.kineto_results.events():
        name, _, counted = event.name().rpartition("|")
        if event.name() == "[memory]":
            events.append((event.start_ns(), allocates, "", event.nbytes()))
        elif name:
            events += [(event.start_ns(), begins, name, int(counted)), (event.end_ns(), ends, name, 0)]
    total, open_blocks = 0, []
    for _, kind, name, nbytes in sorted(events, key=lambda event: event[:2]):
        if kind == begins:
            open_blocks.append(Block(name, nbytes, total))
        elif kind == ends:
            last = open_blocks.pop()
            if open_blocks:
                open_blocks[0].followed = True
            else:
                done.append(last)
        else:
            total += nbytes
            if open_blocks:
                outer, counted = open_blocks[0], sum(one.counted for one in open_blocks)
                outer.live += nbytes
                outer.allocated = max(outer.allocated, outer.live)
                if len(open_blocks) > 1 or not outer.followed:  # between the steps of several tokens, pages are packed
                    outer.uncounted = max(outer.uncounted, outer.live - counted)


def tiny_llama(case: Case) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 64}
    groups = {"num_attention_heads": case.heads, "num_key_value_heads": case.kv_heads}
    return LlamaForCausalLM(LlamaConfig(**sizes, **groups, initializer_range=0.3)).to(case.dtype).eval()


@pytest.fixture(scope="module")
def measured(torch_operations: None) -> dict[tuple[str, str], list[Block]]:
    """By case and part of the work: the blocks of scratch, named by purpose, and moments with the bytes counted then:
    "held in prefill" before rows are scored, "held in a step" before it attends, "held" after it."""
    scratch, score = DeviceLedger.scratch, getattr(*SCORING)
    found: dict[tuple[str, str], list[Block]] = {}

    @contextmanager
    def watched_scratch(ledger: DeviceLedger, purpose: str, nbytes: int) -> Iterator[None]:
        if purpose == "scratch":
            moment("held in a step", ledger.used_bytes)
        with scratch(ledger, purpose, nbytes), block(purpose, nbytes):
            yield

    def measure(case: str) -> None:
        model = tiny_llama(CASES[case])
        tiers = settings(CASES[case].fields, cap_share(model, PROMPT, CASES[case].share))
        with (
            pytest.MonkeyPatch.context() as patch,
            torch.no_grad(),
            tieredkv.use_attention(model),
            TieredCache(model.config, tiers) as cache,
        ):

            def watched_score(*args: Any, **options: Any) -> Any:
                counted = cache.ledger.by_purpose()["scores"]
                moment("held in prefill", cache.ledger.used_bytes - counted)
                with block("scores", counted):
                    return score(*args, **options)

            patch.setattr(DeviceLedger, "scratch", watched_scratch)
            patch.setattr(*SCORING, watched_score)
            work(model, cache, lambda part: profiling(found.setdefault((case, part), [])))

    for case in CASES:
        measure(case)
    return found


# ---- tests


@pytest.mark.parametrize("case", CASES)
def test_scratch_is_counted_and_not_several_times(measured, case):
    blocks = [one for part in PARTS for one in measured[case, part] if one.name in MOST]
    for purpose in {one.name for one in blocks}:
        same = [one for one in blocks if one.name == purpose]
        assert max(one.uncounted for one in same) == 0, purpose
        largest = max(same, key=lambda one: one.allocated)
        assert largest.counted <= MOST[purpose] * largest.allocated, purpose


def test_every_purpose_of_scratch_was_measured(measured):
    assert {one.name for blocks in measured.values() for one in blocks} == {*MOST, *MOMENTS}


@pytest.mark.parametrize("case", [name for name, case in CASES.items() if case.share == AMPLE])
def test_what_the_past_is_staged_in_is_counted(measured, case):
    """Not counted are the activations of the question's tokens, here less than one buffer."""
    moments = [one for one in measured[case, "question"] if one.name == "held in prefill"]
    assert moments
    for one in moments:
        assert one.counted <= one.before <= one.counted + 900_000


@pytest.mark.parametrize("case", CASES)
def test_what_a_sealed_cache_holds_is_counted_and_nothing_else(measured, case):
    """Pool, digests, tables; not counted are a few numbers of each head: how many chunks it chose, missed, fetched."""
    moments = [one for one in measured[case, "steps"] if one.name == "held"]
    assert len(moments) == 2
    uncounted = 3500 if "reused" in case else 2500
    for one in moments:
        assert one.counted <= one.before <= one.counted + uncounted


@pytest.mark.parametrize("case", [name for name in CASES if name.startswith("sketches")])
def test_what_a_step_keeps_until_it_has_attended_is_counted(measured, case):
    """The logits that sketches gave, from which evidence is recorded. Not counted are activations of one token."""
    moments = [one for one in measured[case, "steps"] if one.name == "held in a step"]
    assert moments
    for one in moments:
        assert one.before <= one.counted + 12_000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("chunk_tokens", [1, 8, 32])
@pytest.mark.parametrize("kind", DIGESTS)
def test_digesting_on_a_card_is_counted_and_not_several_times(kind, chunk_tokens, dtype):
    staged = torch.randn(2, 4096 // chunk_tokens, 2, chunk_tokens, 64).to(dtype)
    make, counted = digest_of(kind, staged[:, :, 0], 4), counted_for_digesting(staged)
    with profiling(blocks := []), block("digesting", counted):
        make()
    allocated = staged.nbytes + blocks[0].allocated
    assert allocated <= counted <= 4 * allocated
