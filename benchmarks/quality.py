"""Accuracy that policies lose, on trained models, for answers whose tokens must be read from the context one by one.

    make quality                                  everything, hours on two cores
    python benchmarks/quality.py --suite video    one of: video, hybrid, text, ablations, sweeps, bits, rounding
    python benchmarks/quality.py --quick          a few questions of each, as a check that it runs

Writes quality-SUITE.json and .png into benchmarks/results/, or into the current folder if there is none.

Each context and each question is prefilled once, exactly; from there every policy decodes the same answer
(`replay.py`). The first token is not counted, as no policy affects it. A hop of a video chain is right if all hops up
to it are, as in greedy decoding. On text, where the small model makes errors of its own, a step is right if all of its
tokens are predicted correctly given the true ones before. Rows are paired: the same questions under every policy,
including the full cache. Intervals are 95 %, by bootstrap over questions. Memory is relative to a full cache of 16
bits; pages of the models' 32 bits count as 16, pages of 8 bits as 8. All rows but `hybridkv` have unpacked pages.

Suites `bits` and `rounding` compare settings of `host_kv_bits`. They prefill each context once per setting, and under a
cap so small that every call reads its past from the host tier, as rounded as that is; their full cache is exact.
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
from quality_report import FULL, VIDEO_MODELS, aggregate, draw, show
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


Setting = tuple[str, Any, Any, bool]
"""Label, fields as in the results, `TierConfig`, and whether a full cache is decoded step by step on text too."""


def _readings(unit: Unit) -> list[tuple[Any, list[Setting]]]:
    """How the context is read, and under which settings it is then asked about.

    It is read once for each number of bits of the host tier, exactly unless the settings ask for fewer than 16; and
    again for `exact_past`, which keeps what was read on the device until the end.
    """
    from settings import tier_config

    groups: dict[tuple[int, bool], list[Setting]] = {}
    for label, text in unit.settings:
        fields = json.loads(text)
        exact_past, decoded = fields.pop("exact_past", False), fields.pop("decoded", False)
        tiers = tier_config(chunk_tokens=unit.chunk_tokens, spare_ratio=0.0, **fields)
        groups.setdefault((fields.get("host_kv_bits", 16), exact_past), []).append((label, fields, tiers, decoded))
    readings = []
    for (bits, exact_past), settings in groups.items():
        read_with = {**json.loads(unit.read_with), **({"gpu_kv_gb": 4.0} if exact_past else {})}
        tiers = tier_config(chunk_tokens=unit.chunk_tokens, **read_with, host_kv_bits=bits)
        readings.append((tiers, settings))
    return readings


def _run_video(unit: Unit) -> list[dict[str, Any]]:
    import video_tasks
    from replay import replay, replay_unsealed

    from tieredkv import use_attention
    from tieredkv.models import families

    model, processor = _model(unit.model)
    records = []
    with use_attention(model):
        for read_with, settings in _readings(unit):
            every = [tiers for _, _, tiers, _ in settings]
            reader, scene = video_tasks.read_video(model, processor, unit.tokens, unit.number, read_with)
            questions = video_tasks.ask(processor, families.video_family(model.config), scene, unit.questions)
            for index, asked in enumerate(questions):
                answers = replay(reader, asked, every, recall=asked.task == "chain")
                records += _records(unit, asked, asked.task, index, settings, answers)
                if unit.unsealed and asked.before is not None:
                    answers = replay_unsealed(reader, asked, every)
                    records += _records(unit, asked, "second, not sealed anew", index, settings, answers)
    return records


def _run_text(unit: Unit) -> list[dict[str, Any]]:
    import text_tasks
    from replay import ReplayedQuestion, TextReader, compare, replay, replay_at_once

    from tieredkv import use_attention

    model, tokenizer = _model("smollm2")
    records, exact = [], {}
    case = text_tasks.make_case(unit.task, tokenizer, unit.tokens, unit.number, unit.questions)
    with use_attention(model):
        for read_with, settings in _readings(unit):
            reader = TextReader(model, case.document_ids, read_with)
            whole = [one for one in settings if unit.at_once and one[1].get("policy") == FULL and not one[3]]
            others = [one for one in settings if one not in whole]
            for index, one in enumerate(case.questions):
                asked = ReplayedQuestion(one.task, one.prompt_ids, one.answer_ids, one.scored, one.steps)
                recall = index < 2 and unit.task != "perplexity"
                answers = [replay_at_once(reader, asked) for _ in whole]
                answers += replay(reader, asked, [one[2] for one in others], recall=recall) if others else []
                if whole:
                    exact.setdefault(index, answers[0].logits)
                for answer in answers if exact else ():
                    compare(answer, exact[index])
                records += _records(unit, asked, asked.task, index, [*whole, *others], answers)
    return records


def _records(
    unit: Unit, asked: Any, task: str, index: int, settings: list[Setting], answers: Any
) -> list[dict[str, Any]]:
    return [_record(unit, asked, task, index, *each) for each in zip(settings, answers, strict=True)]


def _record(unit: Unit, asked: Any, task: str, index: int, setting: Setting, answer: Any) -> dict[str, Any]:
    label, fields, _, _ = setting
    recalls = answer.recalls
    return {
        "model": unit.model,
        "task": task,
        "question": [unit.number, unit.questions, index],
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
        "kl": answer.kl,
        "same": answer.same,
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
