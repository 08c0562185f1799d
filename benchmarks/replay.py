"""The true answer decoded token by token under a policy, as `quality.py` measures it.

True tokens are fed as decoding steps (`TieredCache.forced`); greedy decoding would give the same tokens up to its first
error. The context and each question are prefilled once, exactly; policies differ from the seal on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

from tieredkv.cache.question import CONTEXT, Question
from tieredkv.cache.tiered_cache import TieredCache
from tieredkv.codecs import PLAIN
from tieredkv.config import TierConfig
from tieredkv.environment.versions import cache_argument
from tieredkv.models import families
from tieredkv.models.families.base import VideoGrid


@dataclass(frozen=True)
class ReplayedQuestion:
    """A question, its true answer, and which of the answer's tokens count."""

    task: str
    prompt_ids: list[int]
    answer_ids: list[int]
    scored: list[int]
    """Positions in `answer_ids`; never the first, which comes from the exact prefill."""
    steps: list[int]
    """For each scored position, its hop, word or value, counted from 1."""
    before: tuple[list[int], list[int]] | None = None
    """Prompt and answer of an earlier question of the same conversation."""


@dataclass
class Answer:
    """Results of one question under one policy."""

    right: list[bool]
    """For each scored position, whether its token was predicted, given the true ones before it."""
    right_so_far: list[bool]
    """For each scored position, whether all tokens up to it were, as in greedy decoding."""
    nll: list[float]
    """Negative log likelihood of each scored token, in nats."""
    logits: torch.Tensor
    """`(s, vocabulary)`, of each scored token."""
    held_bytes: int
    """On the device between steps: pool, digests, tables. Keys and values of 32 bits count as 16."""
    full_bytes: int
    """Keys and values of all tokens in a full cache of 16 bits."""
    missed_bytes: int = 0
    steps: int = 0
    recalls: list[float] = field(default_factory=list)
    """Per step and dynamic head: attention mass of the chosen chunks, relative to the best choice of as many."""
    kl: list[float] | None = None
    """Per scored token: divergence from an exact cache's prediction, in nats."""
    same: list[bool] | None = None
    """Per scored token: whether the most likely one is that cache's."""


class Reader(Protocol):
    """A model, and a cache that holds a context."""

    cache: TieredCache
    visual: torch.Tensor
    """`(n,)` mask of the context's visual tokens; tokens of a document count as visual."""

    def feed(self, ids: Sequence[int]) -> torch.Tensor:
        """Logits `(n, vocabulary)` after each of the next tokens."""


class TextReader:
    """A text model that has read a document."""

    def __init__(self, model: Any, document: Sequence[int], tiers: TierConfig) -> None:
        self.model = model
        self.cache = TieredCache(model.config, tiers)
        self.cache.expect(CONTEXT)
        for begin in range(0, len(document), tiers.prefill_chunk):
            self.feed(document[begin : begin + tiers.prefill_chunk])
        self.visual = torch.ones(len(document), dtype=torch.bool)
        self.cache.settle()

    def feed(self, ids: Sequence[int]) -> torch.Tensor:
        return self.model(torch.tensor([list(ids)]), **cache_argument(self.cache)).logits[0].float()


class VideoReader:
    """A video model that has read a chat template's head and a video."""

    def __init__(self, model: Any, head: Sequence[int], features: torch.Tensor, grid: VideoGrid, tiers: TierConfig):
        """features `(n, hidden)`: the vision tower's, `grid.visual_tokens` of them."""
        self.model, self.family = model, families.video_family(model.config)
        self.cache = TieredCache(model.config, tiers)
        self.cache.expect(CONTEXT)
        context = len(head) + grid.tokens
        positions = self.family.positions(model, len(head), grid, 0, context + 1, "published")
        self._after = int(positions[0, -1]) - context
        """Position of a later token, less its index in the prompt."""
        self.visual = torch.cat((torch.zeros(len(head), dtype=torch.bool), grid.is_visual()))
        embeddings = self.family.embed(model, torch.tensor([[*head, *grid.ids(visual=head[0])]]))
        embeddings[:, self.visual] = features
        for begin in range(0, context, tiers.prefill_chunk):
            part = slice(begin, min(begin + tiers.prefill_chunk, context))
            self.family.decode(model, embeddings[:, part], positions[:, part], self.cache)
        self.cache.settle()

    def feed(self, ids: Sequence[int]) -> torch.Tensor:
        begin = self.cache.get_seq_length() + self._after
        positions = torch.arange(begin, begin + len(ids)).expand(3, -1)
        embeddings = self.family.embed(self.model, torch.tensor([list(ids)]))
        return self.family.logits(self.model, self.family.decode(self.model, embeddings, positions, self.cache))[0]


def replay(
    reader: Reader, question: ReplayedQuestion, policies: Sequence[TierConfig], recall: bool = False
) -> list[Answer]:
    """The question under each policy; leaves the reader's cache unchanged. recall: measure recalls."""
    cache, context = reader.cache, reader.cache.get_seq_length()
    before = [] if question.before is None else [*question.before[0], *question.before[1]]
    asked, scoring = [*before, *question.prompt_ids], cache.tiers
    first = prefill(reader, asked)
    answers = []
    for tiers in policies:
        answers.append(_decode(reader, tiers, question.answer_ids, first, question, [], recall))
        _back_to(reader, context, asked, scoring)
    cache.truncate(context)
    return answers


def replay_unsealed(reader: Reader, question: ReplayedQuestion, policies: Sequence[TierConfig]) -> list[Answer]:
    """The same for a second question, answered with the chunks and heads that the first one's seal kept."""
    assert question.before is not None
    cache, context, scoring = reader.cache, reader.cache.get_seq_length(), reader.cache.tiers
    asked, answered = question.before
    first = prefill(reader, asked)
    answers = []
    for tiers in policies:
        answers.append(_decode(reader, tiers, question.answer_ids, first, question, [*answered, *question.prompt_ids]))
        _back_to(reader, context, asked, scoring)
    cache.truncate(context)
    return answers


def replay_at_once(reader: Reader, question: ReplayedQuestion) -> Answer:
    """The question answered from all of the cache in one call, as a prompt: the context is as the host tier holds it,
    the answer's own tokens are not rounded. Leaves the reader's cache unchanged."""
    cache, context = reader.cache, reader.cache.get_seq_length()
    ids = [*question.prompt_ids, *question.answer_ids[:-1]]
    cache.expect(Question(prompt_tokens=context + len(ids), rows=0))
    logits = reader.feed(ids)[len(question.prompt_ids) - 1 :]
    host, itemsize = sum(layer.host.nbytes for layer in cache.tiered_layers), cache.shape.itemsize
    plain = cache.device_tier.host_bits == PLAIN
    full_bytes = (context + len(ids)) * cache.shape.token_bytes * 2 // itemsize
    cache.truncate(context)
    return _scored(question, logits, held_bytes=full_bytes if plain else host, full_bytes=full_bytes)


def compare(answer: Answer, exact: torch.Tensor) -> None:
    """Set `kl` and `same` of an answer. exact: `logits` of an exact cache's."""
    wanted, got = exact.log_softmax(-1), answer.logits.log_softmax(-1)
    answer.kl = (wanted.exp() * (wanted - got)).sum(-1).tolist()
    answer.same = (wanted.argmax(-1) == got.argmax(-1)).tolist()


def _scored(question: ReplayedQuestion, logits: torch.Tensor, **others: Any) -> Answer:
    """logits: after the prompt, and after each token of the answer but the last."""
    truth = torch.tensor(question.answer_ids)
    right = logits.argmax(-1) == truth
    so_far = right.cumprod(0).bool()
    nll = torch.nn.functional.cross_entropy(logits, truth, reduction="none")
    return Answer(
        right=[bool(right[place]) for place in question.scored],
        right_so_far=[bool(so_far[place]) for place in question.scored],
        nll=[float(nll[place]) for place in question.scored],
        logits=logits[question.scored],
        **others,
    )


def _scoring(tiers: TierConfig) -> TierConfig:
    """The same settings, under which rows are scored for every policy: also by the mass of their top k."""
    return replace(tiers, policy=replace(tiers.policy, head_score="mass", theta=0.9))


def prefill(reader: Reader, ids: Sequence[int]) -> torch.Tensor:
    """Feed a prompt and score its last rows; returns the logits after it."""
    cache = reader.cache
    cache.set_tiers(_scoring(cache.tiers))
    window = cache.tiers.policy.text_window
    cache.expect(Question(prompt_tokens=cache.get_seq_length() + len(ids), rows=window))
    if len(ids) > window:
        reader.feed(ids[:-window])
    return reader.feed(ids[-window:])[-1:]


def _back_to(reader: Reader, context: int, asked: Sequence[int], scoring: TierConfig) -> None:
    """Forget everything after `asked`. A cache that can only go back to the context is fed `asked` again."""
    cache = reader.cache
    if not cache.untiered.layers:
        cache.truncate(context + len(asked))
        return
    cache.truncate(context)
    cache.set_tiers(scoring)
    prefill(reader, asked)


def _decode(
    reader: Reader,
    tiers: TierConfig,
    answer: Sequence[int],
    first: torch.Tensor,
    question: ReplayedQuestion,
    between: Sequence[int],
    recall: bool = False,
) -> Answer:
    """Seal and feed `between` and the answer as decoding steps. first: logits after the prompt."""
    cache = reader.cache
    prompt = cache.get_seq_length()
    cache.set_tiers(replace(tiers, prefetch=False))
    # The rows are scored already; rows=0 leaves the recent region at `recent_window` tokens.
    cache.expect(Question(max_new_tokens=len(between) + len(answer), rows=0, visual=reader.visual, trace=recall))
    cache.seal()
    bytes_by_purpose, itemsize = cache.ledger.by_purpose(), cache.shape.itemsize
    plain = cache.tiered_layers[0].sealed.pages.pool.codec.bits == PLAIN
    held_bytes = sum(bytes_by_purpose.values()) - (
        bytes_by_purpose["pool"] - bytes_by_purpose["pool"] * 2 // itemsize if plain else 0
    )
    fed = [*between, *answer[:-1]]
    with cache.forced():
        logits = reader.feed(fed) if fed else first[:0]
    counters = cache.counters
    return _scored(
        question,
        torch.cat((first, logits))[len(between) :],
        held_bytes=held_bytes,
        full_bytes=(prompt + len(fed)) * cache.shape.token_bytes * 2 // itemsize,
        missed_bytes=counters.missed_bytes,
        steps=len(fed),
        recalls=_recalls(cache) if recall else [],
    )


def _recalls(cache: TieredCache) -> list[float]:
    """For every recorded selection: the true attention mass of its chunks, relative to the best choice of as many.

    Mass is that of the softmax over the keys of all retrievable chunks, averaged over the group's query heads; sinks
    and the recent region, which are always attended to, are left out.
    """
    shares = []
    for selection in cache.counters.trace or []:
        layer = cache.tiered_layers[selection.layer]
        assert layer.sealed is not None
        layout, c = layer.sealed.phase.plan.layout, layer.sealed.phase.plan.layout.chunk_tokens
        keys = layer.host.keys(layout.sink_chunks, layout.sink_chunks + layout.retrievable)[selection.heads]
        keys = keys.reshape(len(selection.heads), -1, keys.shape[-1]).float()
        logits = (selection.query[selection.heads].float() @ keys.transpose(1, 2)) * keys.shape[-1] ** -0.5
        mass = logits.softmax(-1).mean(1).view(len(selection.heads), -1, c).sum(-1)
        asked = selection.first_token >= 0
        chosen = mass.gather(1, (selection.first_token // c - layout.sink_chunks).clamp(min=0)).mul(asked).sum(-1)
        best = mass.topk(asked.shape[1], dim=-1).values.mul(asked).sum(-1)
        shares += (chosen / best).tolist()
    return shares
