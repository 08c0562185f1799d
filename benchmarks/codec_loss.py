"""What rounding a cache costs, codec by codec: python benchmarks/codec_loss.py [--texts 4] [--bias none const 1 16]

SmolLM2 reads 2,048 tokens of code or prose exactly. All of its cache is then rounded, the first token too, and the next
192 tokens are fed: once with their own keys and values exact, and once with these rounded too, as when they are decoded
step by step. Printed are the mean divergence of their predictions from those with the exact cache (KL, in nats) and how
often the most likely token is the same; the last line is JSON.

SmolLM2 has no biases. `--bias` rounds the first layer's keys with some like Qwen2's added, which are taken off again
afterwards: constant ones (`const`), or rotated as if tokens were so many positions apart. Exact attention is then
unchanged, and the rounding is that of biased keys.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import text_tasks
import torch
from models import load_smollm2
from origin import origin
from transformers import DynamicCache

from tieredkv.codecs import codec_for
from tieredkv.codecs.base import fit_sample
from tieredkv.codecs.packed import Packed
from tieredkv.codecs.rotated import hadamard
from tieredkv.environment.versions import cache_argument

CONTEXT, NEXT, GROUP = 2048, 192, 32
Part = Callable[[torch.Tensor], torch.Tensor]
Both = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def stored(bits: int) -> Both:
    """As the package's codec returns keys and values `(K, n, D)`."""

    def both(keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        codec = codec_for(bits, 8, keys.shape[-1], keys.dtype)
        fit = codec.fit(keys, values)
        return codec.decode(codec.encode(keys, values, fit), fit)

    return both


def symmetric(rows: torch.Tensor) -> torch.Tensor:
    scales = rows.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 7.5
    return ((rows / scales + 7.5).round().clamp(0, 15) - 7.5) * scales


def between(rows: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """16 steps from the least to the largest."""
    low = rows.amin(dim, keepdim=True)
    scales = (rows.amax(dim, keepdim=True) - low).clamp(min=1e-30) / 15
    return ((rows - low) / scales).round() * scales + low


def least_squares(rows: torch.Tensor) -> torch.Tensor:
    """The best of seven scales of each row, by its squared error."""
    largest, best, least = rows.abs().amax(-1, keepdim=True), rows, torch.inf
    for share in (1, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7):
        scales = largest.clamp(min=1e-30) * share / 7.5
        got = ((rows / scales + 7.5).round().clamp(0, 15) - 7.5) * scales
        off = (got - rows).square().sum(-1, keepdim=True)
        best, least = torch.where(off < least, got, best), torch.minimum(off, torch.as_tensor(least))
    return best


def centred(rounding: Part, turn: bool = False) -> Part:
    """`rounding` of what is left without the mean; turn: and after a Hadamard rotation."""

    def part(rows: torch.Tensor) -> torch.Tensor:
        mean, matrix = fit_sample(rows).mean(1, keepdim=True), hadamard(rows.shape[-1], rows.device)
        return rounding((rows - mean) @ matrix) @ matrix + mean if turn else rounding(rows - mean) + mean

    return part


def turned(rows: torch.Tensor) -> torch.Tensor:
    matrix = hadamard(rows.shape[-1], rows.device)
    return symmetric(rows @ matrix) @ matrix


def by_channel(rows: torch.Tensor) -> torch.Tensor:
    """Scales of each token, after the norms of `packed`."""
    norms = Packed(8, rows.shape[-1], rows.dtype).fit(rows, rows).channels[:, :1]
    return symmetric(rows / norms) * norms


def in_groups(rows: torch.Tensor) -> torch.Tensor:
    """As KIVI (arXiv 2402.02750) does keys: scales of each channel over `GROUP` tokens, which divide all numbers."""
    return between(rows.unflatten(1, (-1, GROUP)), 2).flatten(1, 2)


def on(keys: Part, values: Part) -> Both:
    return lambda k, v: (keys(k), values(v))


def first_exact(codec: Both) -> Both:
    def both(keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        got = codec(keys, values)
        for part, want in zip(got, (keys, values), strict=True):
            part[:, 0] = want[:, 0]
        return got

    return both


def keys_only(bits: int) -> Part:
    return lambda rows: stored(bits)(rows, rows)[0]


CANDIDATES: dict[str, Both] = {
    "8 bits, as built": stored(8),
    "4, scale per token": on(symmetric, symmetric),
    "4, asymmetric": on(between, between),
    "4, channel norms": on(by_channel, by_channel),
    "4, mean off": on(centred(symmetric), centred(symmetric)),
    "4, Hadamard": on(turned, turned),
    "4, mean off, Hadamard": on(centred(symmetric, True), centred(symmetric, True)),
    "4, mean off, Hadamard, first token exact": first_exact(on(centred(symmetric, True), centred(symmetric, True))),
    "4, mean off, Hadamard, asymmetric": on(centred(between, True), centred(between, True)),
    "4, mean off, Hadamard, least squares": on(centred(least_squares, True), centred(least_squares, True)),
    "4 bits, as built": stored(4),
    "4, keys per channel and 32 tokens, values per token": on(in_groups, between),
    "keys as built in 8, values in 4": on(keys_only(8), keys_only(4)),
}


def biases(kind: str, heads: int, size: int) -> torch.Tensor:
    """`(K, n, D)`: up to 390 in the channels that turn slowest, as in Qwen2.5, with its frequencies."""
    rng, half = torch.Generator().manual_seed(5), size // 2
    sizes = torch.rand((heads, half), generator=rng) * 3
    sizes[:, -3:] = torch.tensor([60.0, 150.0, 300.0]) * (0.7 + 0.6 * torch.rand((heads, 3), generator=rng))
    sizes[:, half // 2 : half // 2 + 3] = 20 * torch.rand((heads, 3), generator=rng)
    begin = torch.rand((heads, half), generator=rng) * 2 * torch.pi
    places = torch.arange(CONTEXT + NEXT).float() * (0 if kind == "const" else float(kind))
    angles = begin[:, None] + places[:, None] * 1e6 ** (-torch.arange(half).float() / half)
    return torch.cat((sizes[:, None] * angles.cos(), sizes[:, None] * angles.sin()), dim=-1)


class Rounding(DynamicCache):
    """Holds the rounded keys and values `layers` of a context; with `new`, rounds those after it too."""

    def __init__(self, config: Any, layers: list[Any], codec: Both, bias: torch.Tensor | None, new: bool) -> None:
        super().__init__(config=config)
        self._context, self._codec, self._bias, self._new = layers, codec, bias, new
        for number, (keys, values) in enumerate(layers):
            super().update(*(part[None] for part in self._rounded(keys, values, number)), number)

    def _rounded(self, keys: torch.Tensor, values: torch.Tensor, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        added = 0 if self._bias is None or number else self._bias[:, : keys.shape[1]]
        got_keys, got_values = self._codec(keys + added, values)
        return got_keys - added, got_values

    def update(self, keys: Any, values: Any, layer_idx: int, *rest: Any, **more: Any) -> tuple[Any, Any]:
        if self._new:
            whole = [
                torch.cat((old, new[0]), dim=1)
                for old, new in zip(self._context[layer_idx], (keys, values), strict=True)
            ]
            keys, values = (part[None, :, CONTEXT:] for part in self._rounded(*whole, layer_idx))
        return super().update(keys, values, layer_idx, *rest, **more)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=4)
    parser.add_argument("--bias", nargs="+", default=["none"], help="none, const, or positions from token to token")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    (model, tokenizer), seen = load_smollm2(), defaultdict(list)
    for number in range(arguments.texts):
        lines = text_tasks._carrier(random.Random(f"bits {number}"), number % 2 == 0, 8 * (CONTEXT + NEXT))
        ids = torch.tensor([text_tasks._encode(tokenizer, "\n".join(lines))[: CONTEXT + NEXT]])
        cache = DynamicCache(config=model.config)
        model(ids[:, :CONTEXT], **cache_argument(cache), logits_to_keep=1)
        layers = [(layer.keys[0], layer.values[0]) for layer in cache.layers]

        def after(codec: Both, bias: Any = None, new: bool = False, ids: Any = ids, layers: Any = layers) -> Any:
            cache = Rounding(model.config, layers, codec, bias, new)
            return model(ids[:, CONTEXT:], **cache_argument(cache)).logits[0].log_softmax(-1)

        want = after(lambda keys, values: (keys, values))
        for kind, (name, codec) in itertools.product(arguments.bias, CANDIDATES.items()):
            bias = None if kind == "none" else biases(kind, *layers[0][0].shape[::2])
            for new in (False, True):
                got = after(codec, bias, new)
                kl = float((want.exp() * (want - got)).sum(-1).mean())
                same = float((want.argmax(-1) == got.argmax(-1)).float().mean())
                seen[name, kind, new].append((kl, same))
                print(f"text {number}, bias {kind:5}  {name:52} {new:1} KL {kl:.5f}  same {same:.3f}", file=sys.stderr)
    rows = []
    for (name, kind, new), each in seen.items():
        kl, same = (sum(one) / len(each) for one in zip(*each, strict=True))
        row = {"codec": name, "bias": kind, "new_too": new, "texts": len(each)}
        rows.append({**row, "kl": round(kl, 5), "same": round(same, 4)})
        which = "all" if new else "context"
        print(f"bias {kind:5}  {name:52} {which:8} KL {kl:.5f}  same {same:.3f}")
    print(json.dumps({"benchmark": "codec_loss", **origin(), "rows": rows}))


if __name__ == "__main__":
    main()
