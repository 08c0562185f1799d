"""Stage one: the vision tower learns to name what a card shows, without questions.

Trained end to end on answers alone, the model learns colours but not shapes. So here each merged token, normalised and
multiplied by the word embeddings, must name the shape, the colour and the letter on screen, or `none`.
"""

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy, rms_norm

from tieredkv.tiny.encode import encode, to_pairs, to_patches
from tieredkv.tiny.prompts import Tokenize
from tieredkv.tiny.scene import COLOUR_NAMES, FPS, LETTER_NAMES, SHAPE_NAMES, Card, Scene, deal_times

ATTRIBUTES = (SHAPE_NAMES, COLOUR_NAMES, LETTER_NAMES)


def crowded_scene(seed: int, seconds: float = 64.0) -> Scene:
    """A scene with many independent cards, whose shapes may repeat: for training the tower, not for questions."""
    rng = np.random.default_rng((seed, 4))
    spans = deal_times(rng, int(seconds * 0.42), round(seconds * FPS), FPS)
    noise = max(1, len(spans) // 10)
    cards = [
        Card(str(rng.choice(SHAPE_NAMES)), str(rng.choice(COLOUR_NAMES)), str(rng.choice(LETTER_NAMES)), *span)
        for span in sorted(spans[noise:])
    ]
    distractors = [Card("", str(rng.choice(COLOUR_NAMES)), "", *span) for span in spans[:noise]]
    return Scene(seed, seconds, tuple(cards), tuple(distractors))


def card_steps(card: Card) -> range:
    """The grid steps (frame pairs) in which a card is visible in at least one frame."""
    return range(round(card.start_s * FPS) // 2, (round(card.end_s * FPS) + 1) // 2)


def labels(scene: Scene) -> torch.Tensor:
    """`(S, 3)` indices into shape, colour and letter names; the number of names where there is no card."""
    named = torch.tensor([[len(names) for names in ATTRIBUTES]]).repeat(scene.frame_count // 2, 1)
    for card in scene.cards:
        values = [
            SHAPE_NAMES.index(card.shape),
            COLOUR_NAMES.index(card.colour),
            LETTER_NAMES.index(card.letter),
        ]
        named[list(card_steps(card))] = torch.tensor(values)
    return named


def blemish(pairs: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Imitate rescaling and a codec: the first quarter of the pairs is blurred, the next gets noise."""
    x = pairs.float()
    quarter = len(x) // 4
    blurred, noisy = x[:quarter], x[quarter : 2 * quarter]
    weight = torch.rand(quarter, 1, 1, 1, 1, generator=generator) * 0.12
    for dim in (-1, -2):
        blurred.lerp_(blurred.roll(1, dim).add_(blurred.roll(-1, dim)).div_(2), weight)
    strength = torch.rand(quarter, 1, 1, 1, 1, generator=generator) * 20
    noise = torch.rand(noisy[0].numel() + 4096, generator=generator) - 0.5
    starts = torch.randint(0, 4096, (quarter,), generator=generator)
    noisy.addcmul_(noise.unfold(0, noisy[0].numel(), 1)[starts].view_as(noisy), strength)
    return x.clamp_(0, 255)


def attribute_logits(model: Any, tokenize: Tokenize, features: torch.Tensor) -> list[torch.Tensor]:
    """`(S, 4, hidden)` features -> per attribute `(S, 4, choices)` logits over its words and `none`."""
    words = model.model.language_model.embed_tokens.weight
    normal = rms_norm(features.float(), features.shape[-1:])
    # After a space, as in a sentence; each is one token.
    choices = [[token for name in (*names, "none") for token in tokenize(f" {name}")] for names in ATTRIBUTES]
    return [normal @ words[torch.tensor(ids, device=words.device)].float().T for ids in choices]


@torch.no_grad()
def accuracy(model: Any, tokenize: Tokenize, seeds: range) -> list[float]:
    """Share of merged tokens that name (shape, colour, letter) correctly, while a card is visible."""
    right, seen = torch.zeros(3), 0
    for seed in seeds:
        scene = crowded_scene(seed)
        truth = labels(scene)
        visible = truth[:, 0] < len(SHAPE_NAMES)
        features = encode(model.model.visual, to_patches(to_pairs(scene.frames())[visible]).to(model.device))
        for i, logits in enumerate(attribute_logits(model, tokenize, features)):
            right[i] += (logits.argmax(-1).cpu() == truth[visible, i, None]).float().mean(1).sum()
        seen += int(visible.sum())
    return (right / seen).tolist()


def train_vision(
    model: Any,
    tokenize: Tokenize,
    steps: int,
    report: Callable[[dict[str, Any]], None],
    batch: int = 384,
    lr: float = 1.5e-3,
    seed: int = 0,
) -> None:
    """Train the tower and the word embeddings in place; `report` is called with numbers every 50 steps."""
    device = model.device
    generator = torch.Generator().manual_seed(seed)
    parameters = [*model.model.visual.parameters(), model.model.language_model.embed_tokens.weight]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1, (step + 1) / 50) * (0.02 + 0.98 * (1 + math.cos(math.pi * step / steps)) / 2),
    )
    started, scene_seed, shelf = time.perf_counter(), seed * 10_000, _Shelf()
    for step in range(steps):
        while len(shelf) < 8 * batch:
            shelf.add(crowded_scene(scene_seed))
            scene_seed += 1
        pairs, truth = shelf.take(batch, generator)
        patches = to_patches(blemish(pairs, generator)).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            features = encode(model.model.visual, patches)
        loss = torch.zeros((), device=device)
        for i, logits in enumerate(attribute_logits(model, tokenize, features)):
            target = truth[:, i, None].expand(-1, logits.shape[1]).to(device)
            loss = loss + cross_entropy(logits.flatten(0, 1), target.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 49 or step == steps - 1:
            report(
                {
                    "stage": "vision",
                    "step": step + 1,
                    "loss": loss.item(),
                    "seconds": time.perf_counter() - started,
                }
            )


class _Shelf:
    """Frame pairs of several scenes, removed in random order so that a batch mixes scenes."""

    def __init__(self) -> None:
        self.pairs = torch.empty(0, 2, 3, 56, 56, dtype=torch.uint8)
        self.truth = torch.empty(0, 3, dtype=torch.long)

    def __len__(self) -> int:
        return len(self.pairs)

    def add(self, scene: Scene) -> None:
        self.pairs = torch.cat([self.pairs, to_pairs(scene.frames())])
        self.truth = torch.cat([self.truth, labels(scene)])

    def take(self, count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        order = torch.randperm(len(self), generator=generator)
        taken, rest = order[:count], order[count:]
        pairs, truth = self.pairs[taken], self.truth[taken]
        self.pairs, self.truth = self.pairs[rest], self.truth[rest]
        return pairs, truth
