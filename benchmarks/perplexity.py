"""Perplexity of the end of a long text, decoded step by step under the tiered cache, over that under the full cache.

    python benchmarks/models.py            # once: SmolLM2-135M-Instruct
    python benchmarks/perplexity.py [--tokens 4096] [--last 96] ['{"share": 0.1, "theta": 2}' ...]

The text is source code of Python's standard library. All but its last tokens are prefilled exactly; each of the last
is fed alone, as in generation, and scored. A row per JSON object: `share`, the device's part of a full cache, and
fields of `TierConfig`. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import inspect
import json
import textwrap
from typing import Any

import torch
from models import load_smollm2
from transformers import DynamicCache

import tieredkv
from tieredkv.config import GIB
from tieredkv.sizes import model_shape

ROWS = ['{"share": 0.2}', '{"share": 0.1}', '{"share": 0.2, "theta": 2}', '{"share": 0.2, "theta": 0}']


@torch.no_grad()
def perplexity(model: Any, ids: torch.Tensor, last: int, cache: Any) -> float:
    """Of the last `last` tokens of `ids` `(1, N)`."""
    begin = ids.shape[1] - last
    logits = model(ids[:, :begin], past_key_values=cache, use_cache=True).logits[:, -1]
    losses = []
    for place in range(begin, ids.shape[1]):
        losses.append(torch.nn.functional.cross_entropy(logits, ids[:, place]))
        logits = model(ids[:, place : place + 1], past_key_values=cache, use_cache=True).logits[:, -1]
    return float(torch.stack(losses).mean().exp())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", default=ROWS, help="JSON objects: share, and fields of TierConfig")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--last", type=int, default=96)
    arguments = parser.parse_args()
    model, tokenizer = load_smollm2()
    text = inspect.getsource(argparse) + inspect.getsource(textwrap)
    ids = tokenizer(text, return_tensors="pt").input_ids[:, : arguments.tokens]
    full = perplexity(model, ids, arguments.last, DynamicCache(config=model.config))
    full_bytes = ids.shape[1] * model_shape(model.config, model.dtype).token_bytes
    print(f"full cache: perplexity {full:.3f}")
    rows = []
    for line in arguments.settings:
        settings = json.loads(line)
        share = settings.pop("share")
        options = {"gpu_kv_gb": share * full_bytes / GIB, "max_new_tokens": arguments.last, **settings}
        with tieredkv.use_attention(model), tieredkv.TieredCache(model.config, **options) as cache:
            ratio = perplexity(model, ids, arguments.last, cache) / full
            counters, peak = cache.counters, cache.ledger.peak_bytes / full_bytes
        rows.append(
            {
                "share": share,
                **settings,
                "ppl_ratio": ratio,
                "static_heads": counters.static_heads,
                "dynamic_heads": counters.dynamic_heads,
                "hit_rate": counters.hit_rate,
                "device_share_peak": peak,
            }
        )
        print(
            f"{line:50} ratio {ratio:.4f}, {counters.static_heads} static heads, {peak:.1%} on the device", flush=True
        )
    print(json.dumps({"benchmark": "perplexity", "tokens": ids.shape[1], "last": arguments.last, "rows": rows}))


if __name__ == "__main__":
    main()
