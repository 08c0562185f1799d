"""Stage two: the decoder learns retrieval from ever longer videos, with the vision tower frozen.

Three things are decisive. The answer is also a label at the question's key word ("star"): without it, retrieval from
two cards stays at chance. Text after the video has stock transformers' positions in half of the videos and
`max(previous) + 1` in the other half. Lengths vary within every stage: with fixed lengths the model memorises a rule
of positions for each.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from tieredkv.tiny import packed_hybrid
from tieredkv.tiny.clips import Clips, Video
from tieredkv.tiny.encode import TOKENS
from tieredkv.tiny.packed import Packed, forward
from tieredkv.tiny.prompts import AnyPrefix, Prefix, TimedPrefix, Tokenize
from tieredkv.tiny.scene import MAX_HOPS, NAMED_BY

TAIL = "<|im_end|>\n<|im_start|>assistant\n"
AGAIN = "\n<|im_start|>user\n"


WEIGHTS = {"colour": 2.0, "letter": 1.0, "shape": 0.4, "key": 1.0}


@dataclass(frozen=True)
class Stage:
    """One step of the curriculum: lengths in grid steps, cards per video, packed conversations per video.

    It ends after `steps` optimiser steps, or as soon as the share `enough` of retrieved words is right.
    """

    name: str
    lengths: tuple[int, int]
    cards: tuple[int, int]
    conversations: int
    steps: int
    lr: float
    enough: float = 0.96
    tokens: int = 5_000  # of video and text per optimiser step, approximately
    end: float = 0.4  # weight of the label that ends an answer; counting to six hops is learned last
    final_lr: float | None = None  # reached linearly over the last three quarters of the stage


CURRICULUM = (
    Stage("1 card", (5, 6), (1, 1), 4, 400, 1e-3, tokens=2_500),
    Stage("4 cards", (12, 18), (2, 4), 8, 1000, 1e-3, tokens=3_000),
    Stage("28 steps", (24, 34), (3, 5), 8, 500, 1e-3, tokens=3_000),
    Stage("56 steps", (48, 64), (5, 6), 10, 400, 1e-3, tokens=3_500),
    Stage("128 steps", (100, 150), (6, 9), 12, 400, 8e-4, tokens=4_000),
    Stage("320 steps", (240, 400), (8, 12), 14, 400, 7e-4),
    Stage("640 steps", (400, 750), (8, 16), 16, 300, 6e-4),
    Stage("1200 steps", (64, 1200), (8, 16), 16, 500, 5e-4, enough=2.0, end=1.0),
    Stage("settle", (64, 1600), (4, 16), 16, 700, 4e-4, enough=2.0, end=1.0, final_lr=1e-5),
)


@dataclass
class _Labels:
    """Rows of packed sequences, the token that each must predict, and its kind, which determines its weight."""

    video: list[int]
    row: list[int]
    token: list[int]
    kind: list[str]

    def add(self, video: int, row: int, token: int, kind: str) -> None:
        self.video.append(video)
        self.row.append(row)
        self.token.append(token)
        self.kind.append(kind)


def _ask(rng: np.random.Generator, cards: dict[str, tuple[str, str]]) -> tuple[list[str], int, list[str], list[str]]:
    """A random question about a video: its words, the index of its key word, the answer's words, their kinds."""
    shapes = list(cards)
    shape = shapes[rng.integers(len(shapes))]
    if rng.random() < 1 / 3:
        return f"what colour was the {shape} ?".split(), 4, [cards[shape][0]], ["colour"]
    # No more hops than cards: a second round could be copied from the answer instead of the video.
    hops, answer, current = int(rng.integers(1, min(MAX_HOPS, len(cards)) + 1)), [], shape
    for done in range(hops):
        if current not in cards:  # only where letters are random
            hops = done
            break
        letter = cards[current][1]
        current = NAMED_BY[letter]
        answer += [letter, current]
    return f"follow the {shape} for {hops} ?".split(), 2, answer, ["letter", "shape"] * hops


def _pack(
    rng: np.random.Generator,
    tokenize: Tokenize,
    before: AnyPrefix,
    videos: list[Video],
    conversations: int,
    words: torch.nn.Embedding,
) -> tuple[Packed, _Labels]:
    """One batch from videos of equal length. before: of that length; words: the model's."""
    labels = _Labels([], [], [], [])
    device = words.weight.device
    rows: list[dict[str, list[int]]] = []
    places = []
    for number, video in enumerate(videos):
        places.append(before.place(rng))
        row: dict[str, list[int]] = {"ids": [], "positions": [], "conversation": []}
        for conversation in range(conversations):
            _converse(rng, tokenize, number, conversation, video, row, labels, places[-1].first, places[-1].video_last)
        rows.append(row)
    longest = max(len(row["ids"]) for row in rows)

    def padded(key: str, value: int) -> torch.Tensor:
        return torch.tensor([row[key] + [value] * (longest - len(row[key])) for row in rows], device=device)

    ids = torch.tensor(before.ids, device=device)
    (picture,) = tokenize("<|video_pad|>")
    embedded = words(ids).expand(len(videos), -1, -1)
    features = torch.stack([video.features for video in videos]).to(embedded).flatten(1, 2)
    packed = Packed(
        embedded.index_copy(1, (ids == picture).nonzero().flatten(), features),
        torch.stack([place.prefix for place in places]).to(device),
        padded("ids", *tokenize("<|endoftext|>")),
        padded("positions", 0),
        padded("conversation", -1),
    )
    return packed, labels


def _converse(
    rng: np.random.Generator,
    tokenize: Tokenize,
    number: int,
    conversation: int,
    video: Video,
    row: dict[str, list[int]],
    labels: _Labels,
    position: int,
    video_last: int | None,
) -> None:
    """Append one conversation, mostly of one turn, to a packed row. Positions count up from `position`.

    With `video_last` (the video's largest position) they are those of stock transformers: the prompt is
    numbered as if the video took two positions, and generated tokens continue from there.
    """
    turns = 2 if rng.random() < 0.15 else 1
    for turn in range(turns):
        question, key, answer, kinds = _ask(rng, video.cards)
        again = [*tokenize(AGAIN)] if turn else []
        prompt = [*again, *tokenize(" ".join(question)), *tokenize(TAIL)]
        reply = [*tokenize(" ".join(answer) + "<|im_end|>")]  # a token for each word, and the end
        base = len(row["ids"])
        if answer:
            labels.add(number, base + len(again) + key, reply[0], "key")
        for i, (token, kind) in enumerate(zip(reply, [*kinds, "end"], strict=True)):
            labels.add(number, base + len(prompt) - 1 + i, token, f"{kind}{i // 2 + 1}" if kind == "letter" else kind)
        positions = list(range(position, position + len(prompt)))
        position += len(prompt)
        # `generate` numbers new tokens from the last + 1 (checked in 5.17 to 5.23). Only a bare forward, through
        # `rope_deltas`, continues from the largest position so far: hence only a small share of it.
        if turn == turns - 1 and video_last is not None and rng.random() < 0.2:
            position = max(video_last + 1, position)
        positions += range(position, position + len(reply))
        position += len(reply)
        row["ids"] += prompt + reply
        row["positions"] += positions
        row["conversation"] += [conversation] * (len(prompt) + len(reply))


def _draw(rng: np.random.Generator, clips: Clips, stage: Stage, step_tokens: int) -> list[Video]:
    low, high = stage.lengths
    steps = (
        int(np.exp(rng.uniform(np.log(low), np.log(high)))) if rng.random() < 0.5 else int(rng.integers(low, high + 1))
    )
    count = max(1, round(stage.tokens / (steps * step_tokens + stage.conversations * 22)))
    return [
        clips.splice(
            rng,
            steps,
            min(int(rng.integers(stage.cards[0], stage.cards[1] + 1)), steps // 4),
            random_letters=rng.random() < 0.15,
        )
        for _ in range(count)
    ]


def train_stage(
    model: Any,
    tokenize: Tokenize,
    optimizer: torch.optim.Optimizer,
    clips: Clips,
    stage: Stage,
    seed: int,
    report: Callable[[dict[str, Any]], None],
    warmup: int = 0,
) -> int:
    """Train the decoder in place; returns the number of optimiser steps."""
    rng = np.random.default_rng(seed)
    language_model, device = model.model.language_model, model.device
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    run, step_tokens = forward, TOKENS
    prefix: type[AnyPrefix] = Prefix
    if model.config.model_type == "qwen3_5":
        run, prefix, step_tokens = packed_hybrid.forward, TimedPrefix, TOKENS + 4
    tally = _Tally()
    started = time.perf_counter()
    for step in range(stage.steps):
        lr = stage.lr * min(1.0, (step + 1) / max(warmup, 1))
        if stage.final_lr is not None:
            lr = min(lr, stage.final_lr + (stage.lr - stage.final_lr) * (stage.steps - step) / (0.75 * stage.steps))
        for group in optimizer.param_groups:
            group["lr"] = lr
        videos = _draw(rng, clips, stage, step_tokens)
        with torch.autocast(device.type, torch.bfloat16):
            before = prefix(tokenize, rng, len(videos[0].features))
            packed, labels = _pack(rng, tokenize, before, videos, stage.conversations, language_model.embed_tokens)
            hidden = run(language_model, packed)
            logits = hidden[labels.video, labels.row] @ language_model.embed_tokens.weight.T
        target = torch.tensor(labels.token, device=device)
        weights = WEIGHTS | {"end": stage.end}
        weight = torch.tensor([weights[kind.rstrip("0123456789")] for kind in labels.kind], device=device)
        loss = (cross_entropy(logits.float(), target, reduction="none") * weight).sum() / weight.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        tally.add(loss.item(), labels.kind, (logits.argmax(-1) == target).tolist())
        if step % 20 == 19 or step == stage.steps - 1:
            line = tally.take()
            report(
                {
                    "stage": stage.name,
                    "step": step + 1,
                    "seconds": round(time.perf_counter() - started, 1),
                    **line,
                }
            )
            if min(line.get("colour", 0), line.get("letter1", 0), line.get("letter", 0)) >= stage.enough:
                return step + 1
    return stage.steps


class _Tally:
    """Teacher-forced accuracy by kind of word since the last report."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.hits: dict[str, list[bool]] = {}

    def add(self, loss: float, kinds: Iterable[str], hits: Iterable[bool]) -> None:
        self.losses.append(loss)
        for kind, hit in zip(kinds, hits, strict=True):
            name = "letter" if kind.startswith("letter") and kind != "letter1" else kind
            self.hits.setdefault(name, []).append(hit)

    def take(self) -> dict[str, float]:
        line = {"loss": round(float(np.mean(self.losses)), 4)}
        line |= {kind: round(float(np.mean(hits)), 4) for kind, hits in sorted(self.hits.items())}
        self.__init__()  # type: ignore[misc]
        return line
