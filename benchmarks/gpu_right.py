"""Which caches are right, by kind of model: ours and transformers' offloaded one, beside its plain cache.

The comparison is a benchmark of its own; here every kind is a fact, so that one that fails hides no other.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from gpu_record import Fact, Run, Values


def facts(run: Run) -> list[Fact]:
    import right

    return [Fact(kind, 40, partial(one, run, kind, decoder)) for kind, decoder in right.kinds().items()]


def one(run: Run, kind: str, decoder: Any) -> Values:
    """A row; differences that are not finite are None."""
    import right

    prompt, new_tokens, runs = (300, 8, 0) if run.dry else (4096, 32, 2)
    row = right.compare(right.make_hybrid(kind, decoder, run.device), prompt, new_tokens, runs)
    return {"tokens": prompt, **{name: right._plain(value) for name, value in row.items()}}
