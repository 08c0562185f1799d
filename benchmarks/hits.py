"""How many of the selected chunks are on the device already, by how many are selected and how many have slots.

    python benchmarks/hits.py            the bundled video model, 8.5 to 34 minutes, and SmolLM2, 2,048 to 7,680 tokens
    python benchmarks/hits.py --quick    one short video

For every length one cache is filled, and its questions are answered under every budget (share of the tokens attended to
per step) and spare share (of the slots). Videos and their questions are made up (`tieredkv.tiny.scene`); the text is
Python's standard library, and its next 64 tokens are decoded. `planning.step_time.assumed_hit_rate` is fitted to the
rows of video. Prints a row for each, and one line of JSON at the end.
"""

from __future__ import annotations

import argparse
import asyncio.base_events
import inspect
import typing
import unittest.mock
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from models import load_smollm2, smollm2_folder
from origin import origin, report, rounded
from replay import TextReader

import tieredkv
from tieredkv import TierConfig, use_attention
from tieredkv.cache.question import Question
from tieredkv.tiny import model as tiny
from tieredkv.tiny.scene import make_scene, questions

BUDGETS, SPARE = (0.025, 0.05, 0.1, 0.2, 0.4), (0.0, 0.2, 0.5, 0.75, 0.875)
FIRST = TierConfig(gpu_kv_gb=1, budget_ratio=0.1, host_kv_bits=8)
SEED, CARDS, ASKED = 1_100_000, 12, 8
QUESTION, ANSWER = 64, 64
"""Tokens of text that are scored, and that are then decoded."""


def settings(budgets: Sequence[float]) -> Iterator[tuple[TierConfig, dict[str, Any]]]:
    for budget in budgets:
        for spare in SPARE:
            yield replace(FIRST, budget_ratio=budget, spare_ratio=spare), {"budget": budget, "spare": spare}


def video(minutes: float, budgets: Sequence[float]) -> Iterator[dict[str, Any]]:
    """Rows of one video."""
    model, processor = tiny.load()
    scene = make_scene(SEED, round(minutes * 60), CARDS)
    asked = questions(scene, SEED, ASKED)
    with tieredkv.open_session(model, scene.frames(), tiers=FIRST, processor=processor, fps=tiny.FPS) as session:
        cached = session._ready()
        for tiers, row in settings(budgets):
            cached.cache.set_tiers(tiers)
            selected = resident = 0.0
            for question in asked:
                stats = session.ask(question.text, max_new_tokens=len(question.words) + 1).stats
                selected += stats.selected_chunks
                resident += stats.selected_chunks * (stats.hit_rate or 0)
            yield {
                "kind": "video",
                "tokens": cached.cache.get_seq_length(),
                **row,
                "hit_rate": resident / selected if selected else None,
            }


def text(lengths: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Rows of SmolLM2."""
    model, tokenizer = load_smollm2()
    source = "".join(map(inspect.getsource, (asyncio.base_events, typing, argparse, unittest.mock)))
    ids = tokenizer(source)["input_ids"]
    with use_attention(model):
        for tokens in lengths:
            reader = TextReader(model, ids[:tokens], FIRST)
            cache, asked = reader.cache, tokens + QUESTION
            cache.expect(Question(prompt_tokens=asked, rows=QUESTION))
            reader.feed(ids[tokens:asked])
            for tiers, row in settings(BUDGETS):
                cache.set_tiers(tiers)
                cache.expect(Question(max_new_tokens=ANSWER, rows=0, visual=reader.visual))
                cache.seal()
                with cache.forced():
                    reader.feed(ids[asked : asked + ANSWER])
                yield {"kind": "text", "tokens": tokens, **row, "hit_rate": cache.counters.hit_rate}
                cache.truncate(asked)
            cache.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, nargs="+", default=[8.5, 17.0, 34.0])
    parser.add_argument("--tokens", type=int, nargs="*", default=[2048, 4096, 7680], help="of text")
    parser.add_argument("--out", type=Path, help="also write the result here")
    parser.add_argument("--quick", action="store_true", help="one short video")
    arguments = parser.parse_args()
    budgets: Sequence[float] = BUDGETS
    if arguments.quick:
        arguments.minutes, arguments.tokens, budgets = [1.0], [], (0.1,)
    if arguments.tokens and not smollm2_folder().exists():
        parser.error(f"{smollm2_folder()} is not there: run python benchmarks/models.py, or give --tokens without any")
    rows = []

    def kept(found: Iterator[dict[str, Any]]) -> None:
        for row in found:
            if row["hit_rate"] is None:  # every head is static, or attends to everything
                continue
            rows.append(row)
            told = f"{row['budget']:6.1%} selected, {row['spare']:6.1%} of the slots spare"
            print(f"{row['kind']:<6} {row['tokens']:>7,} tokens, {told}: {row['hit_rate']:6.1%} hits", flush=True)

    for minutes in arguments.minutes:
        kept(video(minutes, budgets))
    if arguments.tokens:
        kept(text(arguments.tokens))
    report({"benchmark": "hits", **origin(), "rows": rounded(rows)}, arguments.out)


if __name__ == "__main__":
    main()
