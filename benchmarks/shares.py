"""Accuracy and traffic of the tiered cache by share of device memory, on the bundled model and new videos.

    python benchmarks/shares.py [--scenes 20] [--minutes 8.5] [--shares 0.05 0.1 0.2] [--set chunk_tokens=16 ...]

For every video the same questions are asked under each share and under a budget that holds everything (equal to stock
transformers, tests/cache/test_exactness.py). Prints a table and ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from typing import Any

from settings import tier_config

import tieredkv
from tieredkv.demo.answers import right_hops, right_words
from tieredkv.memory.units import GIB
from tieredkv.models.kv_shape import model_shape
from tieredkv.tiny import model as tiny
from tieredkv.tiny.evaluate import TOKENS_PER_SECOND
from tieredkv.tiny.scene import make_scene, questions

FULL = 2.0
"""A share that holds everything, including the digests and the recent region."""


def ask_all(scene: Any, asked: list[Any], model: Any, processor: Any, share: float, options: dict[str, Any]) -> dict:
    """Counts of one video under one share."""
    shape = model_shape(model.config, model.dtype)
    cap = share * scene.seconds * TOKENS_PER_SECOND * shape.token_bytes / GIB
    longest = max(len(question.words) for question in asked) + 1
    row: dict[str, float] = defaultdict(float)
    with tieredkv.open_session(
        model, scene.frames(), tiers=tier_config(gpu_kv_gb=cap, **options), processor=processor, fps=tiny.FPS
    ) as session:
        for question in asked:
            answer = session.ask(question.text, max_new_tokens=longest)
            row["words"] += len(question.words)
            row["right_words"] += right_words(question, answer.text)
            if question.kind == "chain":
                row["hops"] += len(question.words) // 2
                row["right_hops"] += right_hops(question, answer.text)
            stats = answer.stats
            row["selected"] += stats.selected_chunks
            row["resident"] += stats.selected_chunks * (stats.hit_rate or 0)
            row["static_heads"] += stats.static_heads
            row["questions"] += 1
            row["new_tokens"] += stats.new_tokens
            row["peak"] = max(row["peak"], stats.kv_device_peak_bytes / stats.kv_full_bytes)
            row["tpot_ms"] += stats.tpot_ms or 0
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=20)
    parser.add_argument("--minutes", type=float, default=8.5)
    parser.add_argument("--cards", type=int, default=12)
    parser.add_argument("--questions", type=int, default=12)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.085, 0.1, 0.2])
    parser.add_argument("--first-seed", type=int, default=1_100_000)
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="FIELD=VALUE", help="fields of TierConfig or of the policy"
    )
    parser.add_argument("--quick", action="store_true", help="one short video")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.scenes, arguments.minutes, arguments.shares = 1, 4.2, [0.15]
    options = {name: json.loads(value) for name, value in (pair.split("=") for pair in arguments.set)}
    tier_config(**options)

    started = time.perf_counter()
    model, processor = tiny.load()
    totals: dict[float, dict[str, float]] = {}
    for number in range(arguments.scenes):
        seed = arguments.first_seed + number
        scene = make_scene(seed, round(arguments.minutes * 60), arguments.cards)
        asked = questions(scene, seed, arguments.questions)
        for share in (FULL, *arguments.shares):
            row = ask_all(scene, asked, model, processor, share, options)
            total = totals.setdefault(share, defaultdict(float))
            for name, value in row.items():
                total[name] = max(total[name], value) if name == "peak" else total[name] + value

    rows = []
    print(f"{'share':>6} {'words':>7} {'hops':>7} {'hit rate':>9} {'static':>7} {'ms/token':>9}")
    for share, total in totals.items():
        rows.append(
            {
                "share": "full" if share == FULL else share,
                "words": total["right_words"] / total["words"],
                "hops": total["right_hops"] / total["hops"],
                "asked_words": int(total["words"]),
                "asked_hops": int(total["hops"]),
                "hit_rate": total["resident"] / total["selected"] if total["selected"] else None,
                "static_heads": total["static_heads"] / total["questions"],
                "device_share_peak": total["peak"],
                "tpot_ms": total["tpot_ms"] / total["questions"],
            }
        )
        last = rows[-1]
        rate = "-" if last["hit_rate"] is None else f"{last['hit_rate']:.1%}"
        print(
            f"{last['share']!s:>6} {last['words']:7.1%} {last['hops']:7.1%} {rate:>9} "
            f"{last['static_heads']:7.2f} {last['tpot_ms']:9.2f}"
        )
    print(
        json.dumps(
            {
                "benchmark": "shares",
                "scenes": arguments.scenes,
                "first_seed": arguments.first_seed,
                "visual_tokens": int(arguments.minutes * 60 * TOKENS_PER_SECOND),
                "options": options,
                "rows": rows,
                "seconds": round(time.perf_counter() - started, 1),
            }
        )
    )


if __name__ == "__main__":
    main()
