"""What each layer's query is, and what the layer before would have predicted, while a model decodes.

A prediction is made from the residual stream of an earlier layer: the later layer's own normalisation and query
projection are applied to it, and what that misses is corrected by what was fitted to the tokens of the context: as
shipped (`policy.correction`), or by linear maps of full rank, which are too large to ship. Then it is rotated. All
queries here are before rotation unless said otherwise. Shapes: `n` tokens, `H` query heads, `D` head dim, `W` width
of the stream.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionInterface

from tieredkv.cache.correcting import LEAST_TOKENS, ROWS
from tieredkv.policy.correction import fit_correction

STREAM, INPUT, TWO, QUERY = "stream", "input", "stream, two layers before", "query"
SOURCES = {STREAM: (1, "mid"), INPUT: (1, "input"), TWO: (2, "mid")}
"""From where a layer's query is predicted: so many layers before it, that layer's input, or the residual stream between
its attention and its MLP. `QUERY`: from the query of the layer before, if that has one."""
_seen: list[torch.Tensor] = []


def _spy(module: Any, query: torch.Tensor, key: Any, value: Any, attention_mask: Any, **_: Any) -> tuple[Any, None]:
    """An attention function that keeps the query and attends to nothing."""
    _seen.append(query)
    return torch.zeros_like(query).transpose(1, 2), None


AttentionInterface.register("tieredkv_spy", _spy)


class Fit:
    """Least squares from rows `(n, W)` and a constant to targets `(H, n, D)`, summed as tokens come."""

    def __init__(self) -> None:
        self._square: torch.Tensor | float = 0.0
        self._cross: torch.Tensor | float = 0.0
        self._map: torch.Tensor | None = None

    def add(self, rows: torch.Tensor, targets: torch.Tensor) -> None:
        padded = _with_one(rows).double()
        self._map = None
        self._square = self._square + padded.T @ padded
        self._cross = self._cross + torch.einsum("nw,hnd->hwd", padded, targets.double())

    def predict(self, rows: torch.Tensor, ridge: float) -> torch.Tensor:
        """`(H, n, D)`. ridge: relative to the rows' mean square; the same in every call."""
        if self._map is None:
            assert isinstance(self._square, torch.Tensor)
            damping = ridge * self._square.diagonal()[:-1].mean()
            damped = self._square + damping * torch.eye(len(self._square), dtype=torch.float64)
            self._map = torch.linalg.solve(damped, self._cross).float()
        return _with_one(rows) @ self._map


def _with_one(rows: torch.Tensor) -> torch.Tensor:
    return torch.cat((rows, rows.new_ones((*rows.shape[:-1], 1))), -1)


class HeadFit:
    """One `Fit` per query head, from its predicted query to its true one."""

    def __init__(self) -> None:
        self._fits: list[Fit] = []

    def add(self, predicted: torch.Tensor, true: torch.Tensor) -> None:
        self._fits = self._fits or [Fit() for _ in predicted]
        for fit, rows, target in zip(self._fits, predicted, true, strict=True):
            fit.add(rows, target.unsqueeze(0))

    def predict(self, predicted: torch.Tensor) -> torch.Tensor:
        return torch.cat([fit.predict(rows, 1e-2) for fit, rows in zip(self._fits, predicted, strict=True)])


class Fits:
    """What is fitted of one layer and source."""

    def __init__(self) -> None:
        self.heads, self.all = HeadFit(), Fit()
        self._sample: list[torch.Tensor] = []

    def add(self, rows: torch.Tensor, guess: torch.Tensor | None, true: torch.Tensor) -> None:
        if guess is not None:
            self.heads.add(guess, true)
        rest = true if guess is None else true - guess
        self.all.add(rows, rest)
        if self._sample or len(rows) < LEAST_TOKENS:
            return
        count = min(len(rows), ROWS)
        places = torch.arange(count, dtype=torch.int64, device="cpu") * len(rows) // count
        self._sample = [rows[places], rest[:, places].transpose(0, 1).flatten(1)]

    def corrected(self, rows: torch.Tensor, guess: torch.Tensor) -> torch.Tensor:
        """Guesses `(H, n, D)` with the correction that is shipped, fitted to the first call that is long enough."""
        correction = fit_correction(*self._sample)
        assert correction is not None
        flat = correction.corrected(rows, guess.transpose(0, 1).flatten(1))
        return flat.view(len(rows), len(guess), -1).transpose(0, 1)


def rotated(query: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Queries `(H, n, D)` with rotary positions, `cos` and `sin` `(n, d)`: the first d dimensions are rotated."""
    turned, rest = query[..., : cos.shape[-1]], query[..., cos.shape[-1] :]
    half = turned.shape[-1] // 2
    return torch.cat((turned * cos + torch.cat((-turned[..., half:], turned[..., :half]), -1) * sin, rest), -1)


Sight = tuple[torch.Tensor, torch.Tensor | None]
"""What a later layer's query is predicted from, `(n, W)`, and what its own projection makes of it, `(H, n, D)`."""


class Watch:
    """Records queries, by hooks that change nothing."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.layers = next(
            part
            for part in model.modules()
            if isinstance(part, torch.nn.ModuleList) and hasattr(part[0], "post_attention_layernorm")
        )
        self.attending = [index for index, layer in enumerate(self.layers) if hasattr(layer, "self_attn")]
        """Layers with a query, in the order of the cache's."""
        self.fitting = True
        self._fits: dict[tuple[str, int], Fits] = defaultdict(Fits)
        self._sights: dict[tuple[str, int], list[Sight]] = defaultdict(list)
        self._rotations: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._now: dict[tuple[str, int], Sight] = {}

    def clear(self) -> None:
        """Forget what was recorded, but not the fits."""
        self._sights.clear()
        self._rotations.clear()

    def _query(self, index: int, hidden: torch.Tensor, rotation: Any) -> torch.Tensor:
        """The query `(H, n, D)` of layer `index` if `hidden` `(1, n, W)` were its input."""
        layer = self.layers[index]
        config, kept = layer.self_attn.config, layer.self_attn.config._attn_implementation
        still = torch.ones_like(rotation[0]), torch.zeros_like(rotation[1])
        config._attn_implementation = "tieredkv_spy"
        try:
            layer.self_attn(layer.input_layernorm(hidden), position_embeddings=still, attention_mask=None)
        finally:
            config._attn_implementation = kept
        return _seen.pop()[0].float()

    def _enters(self, index: int, hidden: torch.Tensor, rotation: Any) -> None:
        self._rotation = rotation
        if index == 0 and not self.fitting:
            cos, sin = (part.reshape(-1, *part.shape[-2:])[0].float() for part in rotation)
            self._rotations.append((cos, sin))
        if index in self.attending:
            true = self._query(index, hidden, rotation)
            for name in (*SOURCES, QUERY):
                if (sight := self._now.pop((name, index), None)) is None:
                    continue
                if self.fitting:
                    self._fits[name, index].add(*sight, true)
                else:
                    self._sights[name, index].append(sight)
            if index + 1 in self.attending:
                self._now[QUERY, index + 1] = true.transpose(0, 1).flatten(1), None
        self._look(index, "input", hidden)

    def _look(self, index: int, place: str, hidden: torch.Tensor) -> None:
        for name, (distance, where) in SOURCES.items():
            if where == place and (later := index + distance) in self.attending:
                rows = self.layers[later].input_layernorm(hidden)[0].float()
                self._now[name, later] = rows, self._query(later, hidden, self._rotation)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Record inside the block."""

        def enters(index: int) -> Any:
            def hook(layer: Any, inputs: Any, named: Any) -> None:
                self._enters(index, inputs[0] if inputs else named["hidden_states"], named["position_embeddings"])

            return hook

        def middle(index: int) -> Any:
            return lambda norm, inputs: self._look(index, "mid", inputs[0])

        hooks = []
        for index, layer in enumerate(self.layers):
            hooks.append(layer.register_forward_pre_hook(enters(index), with_kwargs=True))
            hooks.append(layer.post_attention_layernorm.register_forward_pre_hook(middle(index)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def predictions(self) -> Iterator[tuple[str, int, torch.Tensor]]:
        """How, layer, and rotated predictions `(H, n, D)` of all calls since `clear`."""
        cos, sin = (torch.cat(parts) for parts in zip(*self._rotations, strict=True))
        for (name, index), sights in self._sights.items():
            fits, rows = self._fits[name, index], torch.cat([rows for rows, _ in sights])
            guesses = [guess for _, guess in sights if guess is not None]
            if not guesses:
                yield f"{name}, fitted", index, rotated(fits.all.predict(rows, 1e-2), cos, sin)
                continue
            guess = torch.cat(guesses, 1)
            yield name, index, rotated(guess, cos, sin)
            if name == STREAM:
                yield f"{name}, fitted by head", index, rotated(fits.heads.predict(guess), cos, sin)
                yield f"{name}, corrected", index, rotated(fits.corrected(rows, guess), cos, sin)
            yield f"{name}, fitted", index, rotated(guess + fits.all.predict(rows, 1e-2), cos, sin)
