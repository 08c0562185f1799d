"""Accuracy that policies lose, on trained models, for answers whose tokens must be read from the context one by one.

    make quality                                  everything, hours on two cores
    python benchmarks/quality.py --suite video    one of: video, hybrid, text, ablations, sweeps
    python benchmarks/quality.py --quick          a few questions of each, as a check that it runs

Writes quality-SUITE.json and .png into benchmarks/results/, or into the current folder if there is none.

Each context and each question is prefilled once, exactly; from there every policy decodes the same answer
(`replay.py`). The first token is not counted, as no policy affects it. A hop of a video chain is right if all hops up
to it are, as in greedy decoding. On text, where the small model makes errors of its own, a step is right if all of its
tokens are predicted correctly given the true ones before. Rows are paired: the same questions under every policy,
including the full cache. Intervals are 95 %, by bootstrap over questions. Memory is relative to a full cache of 16
bits; pages of the models' 32 bits count as 16, pages of 8 bits as 8. All rows but `hybridkv` have unpacked pages.
Finished contexts are kept in a file beside the results until a suite is complete, so an interrupted run resumes, and a
suite may be run in parts: `--tasks`, `--tokens`, `--contexts`; `--finished` writes the results so far.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from pathlib import Path
from typing import Any

from origin import RESULTS
from quality_report import VIDEO_MODELS, aggregate, draw, show
from quality_suites import SUITES, Unit, units

# ---- one context, in a process of its own


def run(unit: Unit) -> list[dict[str, Any]]:
    """Records of every question of a context, under every setting."""
    import torch

    with torch.no_grad():
        return _run_video(unit) if unit.model in VIDEO_MODELS else _run_text(unit)


_models: dict[str, Any] = {}


def _model(name: str) -> Any:
    import torch

    if name not in _models:
        torch.set_num_threads(1)
        if name == "tiny":
            from tieredkv.tiny import model as tiny

            _models[name] = tiny.load()
        elif name == "tiny-hybrid":
            from models import load_hybrid

            _models[name] = load_hybrid()
        else:
            from models import load_smollm2

            _models[name] = load_smollm2()
    return _models[name]


def _settings(unit: Unit) -> list[tuple[str, Any, Any]]:
    from settings import tier_config

    return [
        (label, json.loads(fields), tier_config(chunk_tokens=unit.chunk_tokens, spare_ratio=0.0, **json.loads(fields)))
        for label, fields in unit.settings
    ]


def _scoring(unit: Unit) -> Any:
    from settings import tier_config

    return tier_config(chunk_tokens=unit.chunk_tokens, **json.loads(unit.scored_with))


def _run_video(unit: Unit) -> list[dict[str, Any]]:
    import video_tasks
    from replay import replay, replay_unsealed

    from tieredkv import use_attention
    from tieredkv.models import families

    model, processor = _model(unit.model)
    settings, records = _settings(unit), []
    with use_attention(model):
        reader, scene = video_tasks.read_video(model, processor, unit.tokens, unit.number, _scoring(unit))
        for asked in video_tasks.ask(processor, families.video_family(model.config), scene, unit.questions):
            answers = replay(reader, asked, [tiers for _, _, tiers in settings], recall=asked.task == "chain")
            records += [_record(unit, asked, asked.task, *each) for each in zip(settings, answers, strict=True)]
            if unit.unsealed and asked.before is not None:
                answers = replay_unsealed(reader, asked, [tiers for _, _, tiers in settings])
                task = "second, not sealed anew"
                records += [_record(unit, asked, task, *each) for each in zip(settings, answers, strict=True)]
    return records


def _run_text(unit: Unit) -> list[dict[str, Any]]:
    import text_tasks
    from replay import ReplayedQuestion, TextReader, replay

    from tieredkv import use_attention

    model, tokenizer = _model("smollm2")
    settings, records = _settings(unit), []
    case = text_tasks.make_case(unit.task, tokenizer, unit.tokens, unit.number, unit.questions)
    with use_attention(model):
        reader = TextReader(model, case.document_ids, _scoring(unit))
        for number, one in enumerate(case.questions):
            asked = ReplayedQuestion(one.task, one.prompt_ids, one.answer_ids, one.scored, one.steps)
            recall = number < 2 and unit.task != "perplexity"
            answers = replay(reader, asked, [tiers for _, _, tiers in settings], recall=recall)
            records += [_record(unit, asked, asked.task, *each) for each in zip(settings, answers, strict=True)]
    return records


def _record(unit: Unit, asked: Any, task: str, setting: tuple[str, Any, Any], answer: Any) -> dict[str, Any]:
    label, fields, _ = setting
    recalls = answer.recalls
    return {
        "model": unit.model,
        "task": task,
        "tokens": unit.tokens,
        "chunk_tokens": unit.chunk_tokens,
        "label": label,
        "fields": fields,
        "right": [int(one) for one in answer.right],
        "so_far": [int(one) for one in answer.right_so_far],
        "steps": asked.steps,
        "nll": round(sum(answer.nll), 5),
        "scored": len(answer.nll),
        "held": answer.held_bytes,
        "full": answer.full_bytes,
        "missed": answer.missed_bytes,
        "decoded": answer.steps,
        "recall": sum(recalls) / len(recalls) if recalls else None,
    }


# ---- all of them


def finished(parts: Path) -> dict[str, list[dict[str, Any]]]:
    """Records of units that earlier runs wrote into `parts`, by key."""
    lines = parts.read_text().splitlines() if parts.exists() else []
    return {stored["key"]: stored["records"] for stored in map(json.loads, lines)}


def run_all(selected: list[Unit], processes: int, parts: Path) -> list[dict[str, Any]]:
    """Records of all units; those in `parts` are not run again."""
    done = finished(parts)
    left = [unit for unit in selected if unit.key not in done]
    started = time.perf_counter()
    os.environ["OMP_NUM_THREADS"] = "1"
    with multiprocessing.get_context("spawn").Pool(processes) as pool, parts.open("a") as out:
        for count, (unit, records) in enumerate(pool.imap_unordered(_keyed, left), 1):
            done[unit.key] = records
            out.write(json.dumps({"key": unit.key, "records": records}) + "\n")
            out.flush()
            seconds = time.perf_counter() - started
            print(f"\r{count} of {len(left)} contexts, {seconds / 60:.1f} min", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return [record for unit in selected for record in done[unit.key]]


def _keyed(unit: Unit) -> tuple[Unit, list[dict[str, Any]]]:
    return unit, run(unit)


def about(arguments: argparse.Namespace, suite: str) -> dict[str, Any]:
    """Machine, date, versions, command, seeds and default settings."""
    import dataclasses

    import video_tasks
    from origin import origin

    import tieredkv

    policy = dataclasses.asdict(tieredkv.TierConfig().policy)
    return {
        **origin(),
        "command": " ".join(["python benchmarks/quality.py --suite", suite, *_chosen(arguments)]),
        "seeds": {"video": f"{video_tasks.FIRST_SEED} + 1000 * tokens + number", "text": "number"},
        "defaults": {name: value for name, value in policy.items() if not callable(value) and name != "summary"},
    }


def _chosen(arguments: argparse.Namespace) -> list[str]:
    """The options that select contexts."""
    lengths = [] if arguments.tokens is None else ["--tokens", *map(str, arguments.tokens)]
    tasks = [] if arguments.tasks is None else ["--tasks", *arguments.tasks]
    contexts = [] if arguments.contexts is None else ["--contexts", str(arguments.contexts)]
    flags = [f"--{name}" for name in ("quick", "finished") if getattr(arguments, name)]
    return [*lengths, *tasks, *contexts, *flags]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", nargs="+", default=list(SUITES))
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for quality-SUITE.json and the plots")
    parser.add_argument("--tokens", type=int, nargs="+", help="only contexts of these lengths")
    parser.add_argument("--tasks", nargs="+", help="only these: video, chain, lookup, copy, needle, perplexity")
    parser.add_argument("--contexts", type=int, help="at most this many contexts of each kind")
    parser.add_argument("--finished", action="store_true", help="only contexts that earlier runs have finished")
    parser.add_argument("--quick", action="store_true", help="two questions of each kind")
    arguments = parser.parse_args()
    for suite in arguments.suite:
        selected = units(suite, arguments.quick)
        if not selected:
            parser.error(f"no suite {suite!r}: choose from {', '.join(SUITES)}")
        selected = [unit for unit in selected if arguments.tokens is None or unit.tokens in arguments.tokens]
        selected = [unit for unit in selected if arguments.tasks is None or unit.task in arguments.tasks]
        selected = [unit for unit in selected if arguments.contexts is None or unit.number < arguments.contexts]
        arguments.out.mkdir(parents=True, exist_ok=True)
        parts = arguments.out / f"quality-{suite}.parts.jsonl"
        if arguments.finished:
            there = finished(parts)
            selected = [unit for unit in selected if unit.key in there]
        if not selected:
            parser.error(f"suite {suite!r} has no context of that length, task and number")
        started = time.perf_counter()
        rows = aggregate(run_all(selected, arguments.processes, parts))
        show(rows)
        settings = {label: json.loads(fields) for unit in selected for label, fields in unit.settings}
        result = {
            "benchmark": "quality",
            "suite": suite,
            **about(arguments, suite),
            "settings": settings,
            "seconds": round(time.perf_counter() - started, 1),
            "rows": [{name: _rounded(value) for name, value in row.items()} for row in rows],
        }
        (arguments.out / f"quality-{suite}.json").write_text(json.dumps(result, indent=1) + "\n")
        if suite in ("video", "hybrid", "text"):
            draw(result["rows"], arguments.out / f"quality-{suite}.png")
        if not _chosen(arguments):
            parts.unlink()
        print(json.dumps(result))


def _rounded(value: Any) -> Any:
    return round(float(value), 5) if isinstance(value, float) else value


if __name__ == "__main__":
    main()
