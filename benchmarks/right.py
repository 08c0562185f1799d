"""Which caches are right: logits of ours, and of transformers' offloaded cache, against those of its plain cache.

    python benchmarks/right.py                  on a card if there is one; a minute
    python benchmarks/right.py --device cpu     without the offloaded cache, which needs a card
    python benchmarks/right.py --quick          few tokens, as a check that it runs

Small random models, in float32, of every supported kind of text model in which some layers are linear attention,
convolutions or sliding windows. The prompt is prefilled in two calls and continued by known tokens one at a time; the
logits of every token are compared, and the largest difference is printed.

ours        TieredCache with room for everything
tight       TieredCache under the smallest cap that still lets every head attend to everything, all heads dynamic
offloaded   DynamicCache(offloading=True), the worst of several runs: its copies race with the computation

Exits with 1 unless both of ours are within the tolerance everywhere. The last line is JSON.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from origin import origin, report  # before torch: it sets how torch's threads wait

# isort: split
import torch
from hybrids import kinds, make_hybrid

from tieredkv import TierConfig, TieredCache, use_attention
from tieredkv.environment.versions import cache_argument
from tieredkv.errors import BudgetError
from tieredkv.memory.units import GIB, largest
from tieredkv.models.kv_shape import KVShape, model_shape
from tieredkv.planning.decode_plan import plan_decode
from tieredkv.planning.sizes import lay_out
from tieredkv.policy.presets import POLICIES

TOLERANCE = 1e-3
OFFLOADING_FAILURES = (RuntimeError, ValueError, AttributeError, TypeError)
"""What the offloaded cache raises for layers that it does not expect: tensors on two devices, states not there."""


@torch.no_grad()
def logits(model: Any, cache: Any, ids: torch.Tensor, new_tokens: int) -> torch.Tensor:
    """Of every token of `ids`, on the CPU: the prompt in two calls, then `new_tokens` calls of one token."""
    prompt = ids.shape[1] - new_tokens
    parts = ids.split([prompt // 2, prompt - prompt // 2, *[1] * new_tokens], dim=1)
    return torch.cat([model(part, **cache_argument(cache)).logits[0].cpu() for part in parts])


def difference(got: torch.Tensor, want: torch.Tensor) -> float:
    """The largest difference; infinite if any number is not finite."""
    largest_one = float((got - want).abs().max())
    return largest_one if math.isfinite(largest_one) else math.inf


def tightest(shape: KVShape, tiers: TierConfig, prompt: int, new_tokens: int) -> TierConfig:
    """`tiers` with the smallest cap under which every head attends to everything, if all heads are dynamic."""
    layout = lay_out(tiers, prompt, tiers.policy.text_window, new_tokens)
    static = torch.zeros((shape.num_layers, shape.num_key_value_heads), dtype=torch.bool)

    def chooses(cap_bytes: int) -> bool:
        try:
            return plan_decode(shape, tiers, layout, cap_bytes, static.double(), static, host_bits=16).ranked
        except BudgetError:
            return True

    cap = 1 + largest(chooses, 4 * (prompt + new_tokens) * shape.token_bytes)
    return replace(tiers, gpu_kv_gb=cap / GIB)


def ours(model: Any, tiers: TierConfig, ids: torch.Tensor, new_tokens: int) -> torch.Tensor:
    """Logits of `TieredCache`."""
    prompt = ids.shape[1] - new_tokens
    with (
        use_attention(model),
        TieredCache(model.config, tiers, max_new_tokens=new_tokens, prompt_tokens=prompt) as cache,
    ):
        got = logits(model, cache, ids, new_tokens)
        counters = cache.counters
        if tiers.policy.theta > 1 and counters.static_heads:
            raise RuntimeError(f"{counters.static_heads} heads are static")
    return got


def offloaded(model: Any, want: torch.Tensor, ids: torch.Tensor, new_tokens: int, runs: int) -> dict[str, Any]:
    """The columns of the offloaded cache: the largest difference of `runs` runs, or what kept it from working."""
    from transformers import DynamicCache

    worst = 0.0
    try:
        for _ in range(runs):
            cache = DynamicCache(config=model.config, offloading=True)
            worst = max(worst, difference(logits(model, cache, ids, new_tokens), want))
    except OFFLOADING_FAILURES as error:
        return {"offloaded": None, "offloaded_error": f"{type(error).__name__}: {error}".splitlines()[0]}
    if worst == math.inf:
        return {"offloaded": None, "offloaded_error": "its logits are not finite"}
    return {"offloaded": worst, "offloaded_error": None}


def compare(model: Any, prompt: int, new_tokens: int, runs: int) -> dict[str, Any]:
    """A row. runs: of the offloaded cache; 0: there is no card."""
    from transformers import DynamicCache

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, prompt + new_tokens), generator=generator).to(model.device)
    want = logits(model, DynamicCache(config=model.config), ids, new_tokens)
    shape, dynamic = model_shape(model.config, model.dtype), replace(POLICIES["hybridkv"], theta=2.0)
    roomy = TierConfig(gpu_kv_gb=1.0)
    tight = tightest(shape, TierConfig(policy=dynamic, pack_pages=False), prompt, new_tokens)
    return {
        "ours": difference(ours(model, roomy, ids, new_tokens), want),
        "ours_tight": difference(ours(model, tight, ids, new_tokens), want),
        "tight_cap_share": tight.cap_bytes / ((prompt + new_tokens) * shape.token_bytes),
        **(
            offloaded(model, want, ids, new_tokens, runs)
            if runs
            else {"offloaded": None, "offloaded_error": "needs a card"}
        ),
    }


def text(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="cpu or cuda; cuda by default if there is one")
    parser.add_argument("--tokens", type=int, default=4096, help="of the prompt")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--runs", type=int, default=3, help="of the offloaded cache")
    parser.add_argument("--out", type=Path, help="also write the result here")
    parser.add_argument("--quick", action="store_true", help="few tokens")
    arguments = parser.parse_args()
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device != "cpu" and not torch.cuda.is_available():
        parser.error(f"--device {device}, but there is no CUDA device here: give --device cpu")
    prompt, new_tokens = (160, 4) if arguments.quick else (arguments.tokens, arguments.new_tokens)
    runs = 0 if device == "cpu" else arguments.runs
    if not runs:
        print("DynamicCache(offloading=True) needs a card: its column is empty.")
    print(f"{'family':<20} {'ours':>8} {'tight':>8} {'offloaded':>10}")
    rows = []
    for kind, decoder in kinds().items():
        row = {"family": kind, **compare(make_hybrid(kind, decoder, device), prompt, new_tokens, runs)}
        rows.append(row)
        failed = row["offloaded_error"] if runs and row["offloaded_error"] else ""
        print(
            f"{kind:<20} {text(row['ours']):>8} {text(row['ours_tight']):>8} {text(row['offloaded']):>10} {failed}",
            flush=True,
        )
    wrong = [row["family"] for row in rows if max(row["ours"], row["ours_tight"]) > TOLERANCE]
    if wrong:
        print(f"ours differs by more than {TOLERANCE:g}: {', '.join(wrong)}", file=sys.stderr)
    result = {
        "benchmark": "right",
        **origin(),
        "device": device,
        "tokens": prompt,
        "new_tokens": new_tokens,
        "tolerance": TOLERANCE,
        "rows": [{name: _plain(value) for name, value in row.items()} for row in rows],
    }
    report(result, arguments.out)
    sys.exit(1 if wrong else 0)


def _plain(value: Any) -> Any:
    """JSON has no infinity."""
    return None if value == math.inf else value


if __name__ == "__main__":
    main()
