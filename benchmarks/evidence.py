"""Accuracy of evidence: the bundled model, new videos, questions whose true moments are known.

    python benchmarks/evidence.py [--scenes 6] [--share 0.1] [--set policy=\\"arkvale\\" ...]

Only correctly answered questions count. A card is hit if a moment overlaps the time it was on screen. `looked_up`:
cards hit by the best three moments of the token that named their letter or colour (shapes do not count, as the letter
determines the shape); `last`: the same for the last card of each answer; `answer_best`, `answer`: for questions that
depend on one card, whether the best moment, or one of the best three, of the whole answer hits it; `chain`: for chains
over n cards, the share hit by the best n + 2 moments of the answer. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from settings import tier_config

import tieredkv
from tieredkv.evidence.moments import Moment
from tieredkv.memory.units import GIB
from tieredkv.models.kv_shape import model_shape
from tieredkv.session.video_session import VideoSession
from tieredkv.tiny import model as tiny
from tieredkv.tiny.evaluate import TOKENS_PER_SECOND
from tieredkv.tiny.scene import SceneQuestion, make_scene, questions
from tieredkv.tiny.video import write_video

BEST = 3
COUNTS = ("last", "looked_up", "answer_best", "answer", "chain")


def hits(moments: Iterable[Moment], span: tuple[float, float]) -> bool:
    """Whether any moment overlaps a span of seconds."""
    return any(moment.start < span[1] and moment.end > span[0] for moment in moments)


def judge(session: VideoSession, asked: Sequence[SceneQuestion]) -> dict[str, list[float]]:
    """The counts of every correctly answered question: 1 for a hit, 0 for none; a share for chains."""
    counted: dict[str, list[float]] = {name: [] for name in COUNTS}
    for question in asked:
        answer = session.ask(question.text, max_new_tokens=len(question.words) + 1, evidence="tokens")
        if answer.text.split() != list(question.words):
            continue
        assert answer.evidence is not None
        assert answer.evidence.tokens is not None
        moments, tokens, cards = answer.evidence.moments, answer.evidence.tokens, sorted(set(question.spans))
        found = [float(hits(tokens[i][:BEST], question.spans[i])) for i in range(0, len(question.words), 2)]
        counted["last"].append(found[-1])
        counted["looked_up"] += found
        if len(cards) == 1:
            counted["answer_best"].append(hits(moments[:1], cards[0]))
            counted["answer"].append(hits(moments[:BEST], cards[0]))
        else:
            counted["chain"].append(sum(hits(moments[: len(cards) + 2], card) for card in cards) / len(cards))
    return counted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=6)
    parser.add_argument("--seconds", type=int, default=510)
    parser.add_argument("--cards", type=int, default=12)
    parser.add_argument("--questions", type=int, default=14)
    parser.add_argument(
        "--share", type=float, default=0.1, help="device memory, as a share of a full cache; 2 holds everything"
    )
    parser.add_argument("--first-seed", type=int, default=1_000_400)
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="FIELD=VALUE", help="fields of TierConfig or of the policy"
    )
    parser.add_argument("--quick", action="store_true", help="one short video")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.scenes, arguments.seconds, arguments.share = 1, 256, 0.15
    options: dict[str, Any] = {name: json.loads(value) for name, value in (p.split("=") for p in arguments.set)}
    tier_config(**options)
    started = time.perf_counter()
    model, processor = tiny.load()
    tokens = arguments.seconds * TOKENS_PER_SECOND
    cap = arguments.share * tokens * model_shape(model.config, model.dtype).token_bytes / GIB
    total: dict[str, list[float]] = {name: [] for name in COUNTS}
    asked = 0
    for seed in range(arguments.first_seed, arguments.first_seed + arguments.scenes):
        scene = make_scene(seed, arguments.seconds, arguments.cards)
        chosen = list({question.text: question for question in questions(scene, seed, arguments.questions)}.values())
        asked += len(chosen)
        with tempfile.TemporaryDirectory() as folder:
            path = write_video(scene, Path(folder) / "scene.mp4")
            with tieredkv.open_session(
                model, path, tiers=tier_config(gpu_kv_gb=cap, **options), processor=processor, fps=tiny.FPS
            ) as session:
                for name, values in judge(session, chosen).items():
                    total[name] += values
    shares = {name: sum(values) / len(values) if values else None for name, values in total.items()}
    for name, share in shares.items():
        print(f"{name:12} {'-' if share is None else f'{share:.1%}':>7} of {len(total[name])}")
    report = {
        "benchmark": "evidence",
        "scenes": arguments.scenes,
        "first_seed": arguments.first_seed,
        "visual_tokens": tokens,
        "share": arguments.share,
        "options": options,
        "asked": asked,
        "right": len(total["last"]),
        **shares,
        "seconds": round(time.perf_counter() - started, 1),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
