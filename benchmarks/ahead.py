"""How many of a step's misses can be copied a layer ahead: python benchmarks/ahead.py [--quick] [--out FILE]

While layer l computes, the query of layer l + 1 in the same step is predicted (`ahead_record.py`). Chunks are ranked by
the prediction as they will be by the query itself, by the sketches that rank them and with `stay` as shipped; the best
ranked that are in no slot are copied. Then layer l + 1 ranks by its true query and fetches only what is still missing.
Selections are real and slots simulated (`ahead_slots.py`), so every answer is that of the shipped policy. Models:
SmolLM2 on text (`python benchmarks/models.py` prepares it) and both tiny video models. The true answer is fed
(`replay.py`).

foreseen: share of the missing chunks that were copied ahead, layer 0 counted, which nothing predicts. wasted: chunks
copied and not selected, relative to the missing. exposed: chunks that a step still waits for, relative to those of a
run without copies ahead. copied: chunks copied in all, relative to the same. extra_weights: what the prediction reads,
relative to the layer's weights; sketches are read again besides.

Rows of `COUNTED`, and the first, "without", stand for decoding steps with the shipped prefetcher, whose copies are
counted: there is no foreseen share of these.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from ahead_record import QUERY, Watch
from ahead_slots import Outcome, best, run
from origin import origin, report, rounded
from replay import Reader, ReplayedQuestion, TextReader, prefill
from settings import tier_config

from tieredkv import TierConfig, use_attention
from tieredkv.cache.question import Question
from tieredkv.planning import ahead_time, decode_plan
from tieredkv.policy.correction import rank_of

PLAIN_STEPS, COUNTED = "steps, without", "steps, copied ahead"
RESULT = "benchmarks/results/ahead.json"
FACTOR = ahead_time.USUAL / 100
FACTORS = (1.0, FACTOR, 1.5)
SPARES = (0.1, 0.2, 0.4)
BUDGETS = (0.05, 0.1)
READ_WITH = {"gpu_kv_gb": 4.0, "host_kv_bits": 16, "ahead": True, "budget_ratio": 0.1}
"""With a budget, or everything would fit, and no correction be fitted."""


@dataclass
class Steps:
    """One answer: what every head of every layer selected and what was predicted. Rows are heads of all layers."""

    chosen: np.ndarray
    """`(T, n, N)`."""
    predicted: dict[str, np.ndarray]
    """By source: ranks `(T, n, N)`."""
    known: dict[str, np.ndarray]
    """By source: rows `(n,)` whose layer it predicts."""
    saliency: np.ndarray
    """`(n, N)`: by which the slots are filled at first."""


@contextmanager
def asking(
    reader: Reader, asked: ReplayedQuestion, tiers: TierConfig, trace: bool = False
) -> Iterator[list[torch.Tensor]]:
    """Inside the block the question is read, and the cache sealed under `tiers`: the saliency of each layer. After it
    the reader's cache is as before."""
    cache, context, scoring = reader.cache, reader.cache.get_seq_length(), reader.cache.tiers
    before = [] if asked.before is None else [*asked.before[0], *asked.before[1]]
    prefill(reader, [*before, *asked.prompt_ids])
    cache.set_tiers(tiers)
    cache.expect(Question(max_new_tokens=len(asked.answer_ids), rows=0, visual=reader.visual, trace=trace))
    saliency = [layer.rows.saliency for layer in cache.tiered_layers]
    cache.seal()
    yield saliency
    cache.truncate(context)
    cache.set_tiers(scoring)


def record(reader: Reader, watch: Watch, asked: ReplayedQuestion, tiers: TierConfig) -> Steps:
    """Decode the true answer under `tiers`."""
    with asking(reader, asked, replace(tiers, prefetch=False), trace=True) as saliency:
        watch.clear()
        with watch.watching(), reader.cache.forced():
            reader.feed(asked.answer_ids[:-1])
        return gather(reader.cache, watch, saliency)


def gather(cache: Any, watch: Watch, saliency: list[torch.Tensor]) -> Steps:
    """The selections and ranks of the answer just decoded."""
    selections = defaultdict(list)
    for one in cache.counters.trace or []:
        selections[one.layer].append(one)
    guesses = {(name, index): guess for name, index, guess in watch.predictions()}
    names = list(dict.fromkeys(name for name, _ in guesses))
    chosen, heads, first_mass = [], [], []
    ranks: dict[str, list[np.ndarray]] = {name: [] for name in names}
    known: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for layer in cache.tiered_layers:
        if not (own := selections[layer.index]):
            continue
        retrieval, layout = layer.sealed.retrieval, layer.sealed.phase.plan.layout
        n, chunks, count = len(own[0].heads), layout.retrievable, len(own)
        mask = np.zeros((count, n, chunks), dtype=bool)
        for step, one in enumerate(own):
            ids = one.first_token // layout.chunk_tokens - layout.sink_chunks
            for head in range(n):
                mask[step, head, ids[head][one.first_token[head] >= 0].numpy()] = True
        chosen.append(mask)
        c, first = layout.chunk_tokens, layout.sink_chunks * layout.chunk_tokens
        part = saliency[layer.index][own[0].heads, first : first + chunks * c]
        first_mass.append(part.unflatten(1, (chunks, c)).sum(-1).numpy())
        scaling = watch.layers[watch.attending[layer.index]].self_attn.scaling
        for name in names:
            guess = guesses.get((name, watch.attending[layer.index]))
            known[name].append(np.full(n, guess is not None))
            got = np.zeros((count, n, chunks), dtype=np.float32)
            if guess is not None:
                grouped = guess.view(len(saliency[0]), -1, *guess.shape[1:])  # (K, G, T, D)
                for step in range(count):
                    before = torch.from_numpy(mask[step - 1]) if step else torch.zeros((n, chunks), dtype=torch.bool)
                    logits = retrieval.ranking.logits(grouped[:, :, step].contiguous(), scaling)
                    got[step] = retrieval.ranking.ranks(logits, before).numpy()
            ranks[name].append(got)
        heads.append(n)
    return Steps(
        np.concatenate(chosen, 1),
        {name: np.concatenate(parts, 1) for name, parts in ranks.items()},
        {name: np.concatenate(parts) for name, parts in known.items()},
        np.concatenate(first_mass),
    )


def outcomes(steps: Steps, spare: float) -> Iterator[tuple[str, float, Outcome]]:
    """Source, factor and outcome of every way to copy ahead, with `spare` of the slots beside the selected ones; the
    first is without."""
    chosen = steps.chosen
    selected = chosen.sum(2).max(0)
    room = np.minimum(chosen.shape[2], np.rint(selected / (1 - spare)).astype(int))
    resident = best(steps.saliency, room)
    nobody = np.zeros(len(room), dtype=bool)
    yield "nothing ahead", 0.0, run(chosen, None, resident, room, 0.0, nobody)
    for name, predicted in steps.predicted.items():
        for factor in FACTORS:
            yield name, factor, run(chosen, predicted, resident, room, factor, steps.known[name])


def readers(model: str, contexts: int) -> Iterator[tuple[str, Reader, Watch, list[ReplayedQuestion]]]:
    """Task, a reader of a context whose queries were watched, and questions about it."""
    tiers = tier_config(chunk_tokens=8, **READ_WITH)
    if model == "smollm2":
        import text_tasks
        from models import load_smollm2

        loaded, tokenizer = load_smollm2()
        with use_attention(loaded):
            for task, number in itertools.product(("chain", "lookup", "copy"), range(contexts)):
                case = text_tasks.make_case(task, tokenizer, 2048, 500 + number, 2)
                watch = Watch(loaded)
                with watch.watching():
                    reader: Reader = TextReader(loaded, case.document_ids, tiers)
                watch.fitting = False
                yield (
                    task,
                    reader,
                    watch,
                    [
                        ReplayedQuestion(one.task, one.prompt_ids, one.answer_ids, one.scored, one.steps)
                        for one in case.questions
                    ],
                )
        return
    import video_tasks
    from models import load_hybrid

    from tieredkv.models import families
    from tieredkv.tiny import model as tiny

    loaded, processor = tiny.load() if model == "tiny" else load_hybrid()
    with use_attention(loaded):
        for number in range(contexts):
            watch = Watch(loaded)
            with watch.watching():
                reader, scene = video_tasks.read_video(loaded, processor, 2048, 500 + number, tiers)
            watch.fitting = False
            asked = video_tasks.ask(processor, families.video_family(loaded.config), scene, 2)
            yield "chain", reader, watch, [one for one in asked if one.task == "chain"]


def counted(reader: Reader, asked: ReplayedQuestion, tiers: TierConfig) -> tuple[int, int]:
    """Bytes that steps waited for, and that were copied ahead, when the true answer is decoded token by token."""
    with asking(reader, asked, tiers):
        for token in asked.answer_ids[:-1]:
            reader.feed([token])
        reader.cache.finish()
        return reader.cache.counters.missed_bytes, reader.cache.counters.prefetched_bytes


def extra_weights(watch: Watch, how: str) -> float:
    """What a prediction reads, over the weights of a layer, both of 16 bits."""
    layer = watch.layers[watch.attending[-1]]
    config = layer.self_attn.config
    width, heads, head_dim = config.hidden_size, config.num_attention_heads, layer.self_attn.head_dim
    projection = width * heads * head_dim
    added = {
        "fitted": heads * head_dim * heads * head_dim if how.startswith(QUERY) else projection,
        "fitted by head": heads * head_dim**2,
        "corrected": rank_of(width) * (width + heads * head_dim),
    }.get(how.rpartition(", ")[2], 0)
    if how == COUNTED:
        added = rank_of(width) * (width + heads * head_dim)
    own = 0 if how.startswith(QUERY) else projection
    return (own + added) / sum(part.numel() for part in layer.parameters())


def measure(model: str, contexts: int, budgets: Sequence[float]) -> list[dict[str, Any]]:
    """Rows of one model: by task, budget, spare slots and way."""
    totals: dict[tuple[Any, ...], Outcome] = defaultdict(Outcome)
    steps_bytes: dict[tuple[Any, ...], list[tuple[int, int]]] = defaultdict(list)
    weights: dict[str, float] = {}
    for task, reader, watch, questions in readers(model, contexts):
        for asked, budget in itertools.product(questions, budgets):
            for spare, per_cent in itertools.product(SPARES, (0, *ahead_time.SHARES)):
                options = {"chunk_tokens": 8, "budget_ratio": budget, "spare_ratio": spare, "gpu_kv_gb": 4.0}
                tiers = tier_config(**options, ahead=per_cent > 0)
                with patch.object(decode_plan, "USUAL", per_cent):
                    steps_bytes[task, budget, spare, per_cent].append(counted(reader, asked, tiers))
            tiers = tier_config(chunk_tokens=8, budget_ratio=budget, spare_ratio=0.0, gpu_kv_gb=4.0)
            steps = record(reader, watch, asked, tiers)
            for spare in SPARES:
                for name, factor, outcome in outcomes(steps, spare):
                    totals[task, budget, spare, name, factor] += outcome
                    weights[name] = 0.0 if factor == 0 else extra_weights(watch, name)
        weights |= {PLAIN_STEPS: 0.0, COUNTED: extra_weights(watch, COUNTED)}
        print(f"{model} {task}: {len(questions)} answers", file=sys.stderr, flush=True)
        reader.cache.close()
    rows = []

    def add(task: str, budget: float, spare: float, how: str, factor: float, **figures: float) -> None:
        case = {"model": model, "task": task, "tokens": 2048, "budget": budget, "spare": spare}
        rows.append({**case, "how": how, "factor": factor, **figures, "extra_weights": weights[how]})

    for (task, budget, spare, name, factor), outcome in totals.items():
        plain = totals[task, budget, spare, "nothing ahead", 0.0]
        add(
            *(task, budget, spare, name, factor),
            miss_rate=outcome.missing / outcome.selected,
            foreseen=outcome.foreseen / outcome.missing,
            wasted=outcome.wasted / outcome.missing,
            exposed=outcome.late / plain.late,
            copied=(outcome.late + outcome.foreseen + outcome.wasted) / plain.late,
        )
    for (task, budget, spare, per_cent), counts in steps_bytes.items():
        without = sum(missed for missed, _ in steps_bytes[task, budget, spare, 0])
        missed, ahead = (sum(parts) for parts in zip(*counts, strict=True))
        how = COUNTED if per_cent else PLAIN_STEPS
        figures = {"exposed": missed / without, "copied": (missed + ahead) / without}
        add(task, budget, spare, how, per_cent / 100, **figures)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["smollm2", "tiny", "tiny-hybrid"])
    parser.add_argument("--contexts", type=int, default=1, help="of each task; two questions about each")
    parser.add_argument("--quick", action="store_true", help="a budget of 5 %% alone")
    parser.add_argument("--out", type=Path, help=f"also write the result here, as {RESULT} was")
    arguments = parser.parse_args()
    rows = []
    with torch.no_grad():
        for model in arguments.models:
            rows += measure(model, arguments.contexts, BUDGETS[:1] if arguments.quick else BUDGETS)
    for row in rows:
        if row["spare"] == 0.2 and row["factor"] in (0.0, FACTOR):
            seen = f"foreseen {row['foreseen']:.2f} wasted {row['wasted']:.2f} " if "foreseen" in row else ""
            print(
                f"{row['model']:<12} {row['task']:<7} {row['budget']:>4.0%} {row['how']:<34} "
                f"{seen}exposed {row['exposed']:.2f} copied {row['copied']:.2f}"
            )
    report({"benchmark": "ahead", **origin(), "rows": rounded(rows)}, arguments.out)


if __name__ == "__main__":
    main()
