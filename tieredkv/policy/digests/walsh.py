"""Sketches of neighbouring keys together: of their mean and of how they differ, with bits where they help most (ours).

`sketch` gives the same 4 bits to each of D / 2 directions of every key. Here the keys of a block of `B` tokens are
replaced by their Walsh-Hadamard transform: the first coefficient is the block's mean, the others are differences. As
neighbours are alike, the mean gets more bits than a difference, and all of them together two thirds of what sketches
take. A direction gets 0, 2, 4 or 6 bits, whatever lowers the error most. An error counts in proportion to the strength
of the keys: those that a query finds are seldom average ones, and must not be clipped for the sake of many weak ones.

Numbers have 2 bits. A direction of 6 bits has three of them, each of which refines the one before. So the records of
all heads have the same layout, whichever bits their directions have.

Shapes: `K` KV heads, `n` chunks, `C` chunk tokens, `B` tokens of a block, `M` blocks, `G` query heads per KV head, `D`
head dim, `m` directions; `P` and `Q` bytes of a mean and of a difference, of four numbers each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

import torch

from tieredkv.policy.digests.base import FLOAT32, Digest, Fitted
from tieredkv.policy.digests.sketch import chunk_mass, whitening

MOST_BLOCK = 8
"""Most tokens of a block."""
MOST_NUMBERS = 3
"""Most numbers of a direction: 6 bits."""
MIDDLE = 1.5
"""Of a number's values 0 to 3."""
FITTED_KEYS = 1024
"""Keys by which steps are chosen."""
REACHES = [2.5 * 0.82**power for power in range(9)]
"""Steps that are tried, relative to those with which the numbers just reach the largest key."""
FEWEST_TOKENS = 512
"""Fewest tokens that are ranked at a time."""
FLOAT16, INT16 = torch.float16.itemsize, torch.int16.itemsize


@dataclass(frozen=True, slots=True)
class Directions(Fitted):
    """Directions of one layer's keys: first those of the means, then those of the differences."""

    down: torch.Tensor
    """`(K, D, m)` float32: a coefficient times this, rounded down, is a whole number around 0."""
    up: torch.Tensor
    """`(K, D, m)` float16: a query times this is what numbers are multiplied by."""
    levels: torch.Tensor
    """`(K, m)` uint8: how many values a direction has; 1 if it has no bits."""
    column: torch.Tensor
    """`(K, 4 * (P + Q))` int16: the direction that each number belongs to, of the mean's, then of a difference's."""
    weight: torch.Tensor
    """`(K, 4 * (P + Q))` uint8: how many of its direction's steps one of each number is: 1, 4 or 16; 0 if unused."""
    centre: torch.Tensor
    """`(K, 1, D)` float32: mean key, which digests leave out."""

    def for_ranking(self, heads: torch.Tensor) -> Self:
        """Without what only digesting needs."""
        kept = (self.up[heads], self.levels[:0], self.column[heads], self.weight[heads], self.centre[heads])
        return type(self)(self.down[:0], *kept)


class Walsh(Digest[Directions]):
    """The transformed keys of a chunk, block by block: of each the mean, then the differences.

    Byte j of a mean holds numbers j, j + P, j + 2 P and j + 3 P, the first in its lowest bits; a difference's likewise.
    """

    name = "walsh"
    estimates_mass = True
    fitted_type = Directions

    @property
    def block(self) -> int:
        """B: a power of two that divides C."""
        return min(MOST_BLOCK, self.chunk_tokens & -self.chunk_tokens)

    @property
    def mean_bytes(self) -> int:
        """P: at 4 bits, as many numbers as the head has dimensions."""
        return max(1, self.head_dim * self.bits // 16)

    @property
    def other_bytes(self) -> int:
        """Q: at 4 bits, 5 numbers for 8 dimensions."""
        return max(1, 5 * self.head_dim * self.bits // 128)

    @property
    def block_bytes(self) -> int:
        """Bytes of a block."""
        return self.mean_bytes + (self.block - 1) * self.other_bytes

    @property
    def mean_directions(self) -> int:
        """Most directions that means have; differences have the rest of m."""
        return self.head_dim * 5 // 8 if self.bits == 4 else self.head_dim

    @property
    def directions(self) -> int:
        """m."""
        return self.mean_directions + (self.head_dim // 2 if self.bits == 4 else self.head_dim)

    @property
    def chunk_bytes(self) -> int:
        return self.chunk_tokens // self.block * self.block_bytes

    @property
    def fitted_bytes(self) -> int:
        return self.directions * (FLOAT32 * self.head_dim + 1) + self.ranking_fitted_bytes

    @property
    def ranking_fitted_bytes(self) -> int:
        numbers = 4 * (self.mean_bytes + self.other_bytes)
        return self.head_dim * (FLOAT16 * self.directions + FLOAT32) + numbers * (INT16 + 1)

    def scratch_bytes(self, kv_heads: int, query_heads: int) -> int:
        """A copy of the digests, numbers unpacked at a time, also in float32, and five times every token's logits; and
        the directions in float32, shared out among the fewest tokens that are ranked at a time."""
        directions = FLOAT32 * kv_heads * self.head_dim * self.directions * self.chunk_tokens // FEWEST_TOKENS
        unpacked = kv_heads * self.chunk_bytes * (FLOAT32 + 3)
        return directions + unpacked + 5 * FLOAT32 * self.chunk_tokens * query_heads

    def fit(self, query_moment: torch.Tensor, keys: torch.Tensor) -> Directions:
        weigh, back = whitening(query_moment)
        keys = keys.double()
        centre = keys.mean(1, keepdim=True)
        blocks = ((keys - centre) @ weigh).unflatten(1, (-1, self.block))
        strength = blocks.square().sum(-1).mean(2)
        strength = strength / strength.mean(1, keepdim=True).clamp(min=1e-30)
        coefficients = _transform(self.block, blocks) @ blocks / self.block
        means, numbers = self.mean_directions, (4 * self.mean_bytes, 4 * self.other_bytes)
        mean = _fit(coefficients[:, :, 0], strength, means, numbers[0])
        every = strength.repeat_interleave(self.block - 1, 1)
        other = _fit(coefficients[:, :, 1:].flatten(1, 2), every, self.directions - means, numbers[1])
        axes, step, count = (torch.cat(both, dim=-1) for both in zip(mean, other, strict=True))
        owners = [_owners(part[2], many) for part, many in zip((mean, other), numbers, strict=True)]
        column = torch.cat((owners[0][0], owners[1][0] + means), dim=1)
        return Directions(
            down=(weigh @ axes / step.unsqueeze(1)).float(),
            up=(back @ axes * step.unsqueeze(1)).half(),
            levels=(4**count).to(torch.uint8),
            column=column.to(torch.int16),
            weight=torch.cat((owners[0][1], owners[1][1]), dim=1).to(torch.uint8),
            centre=centre.float(),
        )

    def make(self, keys: torch.Tensor, fitted: Directions) -> torch.Tensor:
        blocks = (keys.float() - fitted.centre.unsqueeze(1)).flatten(1, 2).unflatten(1, (-1, self.block))
        transform = _transform(self.block, blocks) / self.block
        mean, others = (transform[:1] @ blocks).squeeze(2), (transform[1:] @ blocks).flatten(1, 2)
        del blocks
        numbers, means = 4 * self.mean_bytes, self.mean_directions
        parts = [(mean, slice(0, means), slice(0, numbers), 0)]
        if self.block > 1:
            parts.append((others, slice(means, None), slice(numbers, None), means))
        packed = [
            _pack(
                part @ fitted.down[:, :, of], fitted.levels[:, of], fitted.column[:, at] - first, fitted.weight[:, at]
            )
            for part, of, at, first in parts
        ]
        if self.block > 1:
            packed[1] = packed[1].unflatten(1, (-1, self.block - 1)).flatten(2)
        return torch.cat(packed, dim=-1).view(len(keys), keys.shape[1], self.chunk_bytes)

    def prepare(self, query: torch.Tensor, fitted: Directions) -> torch.Tensor:
        """What each number is multiplied by, `(K, G, 4 * (P + Q))`."""
        along = query @ fitted.up.float()
        column = fitted.column.long().unsqueeze(1).expand(-1, query.shape[1], -1)
        return along.gather(-1, column).mul_(fitted.weight.unsqueeze(1))

    def chunk_logits(self, prepared: torch.Tensor, digests: torch.Tensor) -> torch.Tensor:
        """Log of the sum of the tokens' exponentiated logits."""
        return chunk_mass(self._products(prepared, digests), self.chunk_tokens)

    def _products(self, prepared: torch.Tensor, digests: torch.Tensor) -> torch.Tensor:
        """Products `(K, G, n * C)` with all keys."""
        numbers, block = 4 * self.mean_bytes, self.block
        blocks = digests.reshape(len(digests), -1, self.block_bytes)
        mean = _dots(prepared[..., :numbers], blocks[..., : self.mean_bytes])
        if block == 1:
            return mean
        others = blocks[..., self.mean_bytes :].unflatten(-1, (block - 1, -1)).flatten(1, 2)
        coefficients = mean.new_empty((*mean.shape, block))
        coefficients[..., 0] = mean
        coefficients[..., 1:] = _dots(prepared[..., numbers:], others).unflatten(-1, (-1, block - 1))
        return (coefficients @ _transform(block, coefficients)).flatten(2)

    def constant(self, query: torch.Tensor, fitted: Directions) -> torch.Tensor:
        """The queries' products with the centre."""
        return (query @ fitted.centre.mT).squeeze(-1)


def _transform(block: int, like: torch.Tensor) -> torch.Tensor:
    """Walsh-Hadamard matrix `(B, B)` of 1 and -1, equal to its transpose; the first row is of ones."""
    matrix = like.new_ones((1, 1))
    for _ in range(int(math.log2(block))):
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix


def _fit(
    part: torch.Tensor, strength: torch.Tensor, directions: int, numbers: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Axes `(K, D, directions)`, their steps and how many of `numbers` each has `(K, directions)`, for coefficients
    `(K, m, D)` that count in proportion to `strength` `(K, m)`."""
    heads, many, d = part.shape
    if many == 0:  # blocks of one token
        axes = torch.eye(d, dtype=part.dtype, device=part.device)[:, :directions].expand(heads, -1, -1)
        ones = part.new_ones((heads, directions))
        return axes, ones, torch.zeros_like(ones, dtype=torch.int64)
    weights = strength.unsqueeze(-1)
    axes = torch.linalg.eigh((part * weights).mT @ part).eigenvectors.flip(-1)[:, :, :directions]
    along = part @ axes
    reach = along.abs().amax(1).clamp(min=1e-12)
    some = slice(None, None, max(1, many // FITTED_KEYS))
    along, weights = along[:, some].float(), weights[:, some].float()
    errors, steps = [(weights * along.square()).sum(1)], [reach.float()]
    for count in range(1, MOST_NUMBERS + 1):
        tried = torch.stack([reach.float() * share / 4**count for share in REACHES])
        error = torch.stack([(weights * (along - _rounded(along, step, count)).square()).sum(1) for step in tried])
        best = error.min(0)
        errors.append(best.values)
        steps.append(tried.gather(0, best.indices.unsqueeze(0)).squeeze(0))
    counts = _share_numbers(torch.stack(errors, -1), numbers)
    return axes, torch.stack(steps, -1).gather(-1, counts.unsqueeze(-1)).squeeze(-1).double(), counts


def _rounded(along: torch.Tensor, step: torch.Tensor, count: int) -> torch.Tensor:
    """Coordinates `(K, m, directions)` as `count` numbers hold them in steps `(K, directions)`."""
    step, half = step.unsqueeze(1), 4**count / 2
    return ((along / step).floor() + 0.5).clamp(0.5 - half, half - 0.5) * step


def _share_numbers(errors: torch.Tensor, numbers: int) -> torch.Tensor:
    """How many numbers each direction gets, `(K, directions)`: those that lower the sum of errors most.

    errors `(K, directions, MOST_NUMBERS + 1)`: with 0, 1, ... numbers. Gains are made to fall from one number to
    the next, so that the largest of them are each direction's first.
    """
    most = errors.shape[-1] - 1
    gains = torch.stack(
        [
            torch.stack(
                [
                    torch.stack([(errors[..., a] - errors[..., b]) / (b - a) for b in range(at + 1, most + 1)]).amax(0)
                    for a in range(at + 1)
                ]
            ).amin(0)
            for at in range(most)
        ],
        -1,
    )
    chosen = gains.flatten(1).topk(min(numbers, gains[0].numel()), dim=1).indices
    one = torch.ones_like(chosen)
    return torch.zeros(errors.shape[:2], dtype=torch.int64, device=errors.device).scatter_add_(1, chosen // most, one)


def _owners(count: torch.Tensor, numbers: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Direction and weight `(K, numbers)` of each number, if directions have `count` `(K, directions)` of them."""
    column = torch.zeros((len(count), numbers), dtype=torch.int64, device=count.device)
    weight = torch.zeros_like(column)
    for head, own in enumerate(count):
        used = int(own.sum())
        column[head, :used] = torch.arange(len(own), device=own.device).repeat_interleave(own)
        weight[head, :used] = torch.cat(
            [4 ** torch.arange(int(each), dtype=torch.int64, device="cpu") for each in own]
        ).to(own.device)
    return column, weight


def _pack(along: torch.Tensor, levels: torch.Tensor, column: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Coefficients `(K, m, directions)` in steps as bytes `(K, m, numbers / 4)`."""
    levels = levels.float().unsqueeze(1)
    whole = (along.floor_() + (levels / 2).floor()).clamp_(min=0)
    whole = torch.minimum(whole, levels - 1)
    numbers = whole.gather(-1, column.long().unsqueeze(1).expand(-1, along.shape[1], -1))
    numbers = numbers.div_(weight.clamp(min=1).unsqueeze(1)).floor_().to(torch.uint8).bitwise_and_(3)
    first, second, third, fourth = numbers.chunk(4, dim=-1)
    return first | (second << 2) | (third << 4) | (fourth << 6)


def _dots(prepared: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    """Products `(K, G, m)` of what is prepared `(K, G, numbers)` with coefficients `(K, m, numbers / 4)`."""
    product = -MIDDLE * prepared.sum(-1, keepdim=True)
    for place, part in enumerate(prepared.chunk(4, dim=-1)):
        # Numbers stay where they are in their byte, and so are too large by a power of two: shifting them takes longer.
        numbers, part = (packed & (3 << 2 * place)).float(), part / 4**place
        product = torch.baddbmm(product, part, numbers.mT) if place == 0 else product.baddbmm_(part, numbers.mT)
    return product
