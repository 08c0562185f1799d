"""Text tasks that measure what a cache policy loses while decoding: python benchmarks/text_tasks.py [chain copy ...]

Facts are hidden between the lines of real text, code or manual of Python's standard library; each token of the answer
is found in them. The true answer is fed (teacher forcing). It counts as right up to a token if the argmax is right at
every scored token up to there, as in greedy decoding. The first token comes from an exact prefill and is never scored.
Each scored token depends on tokens just generated, or forced, that are not in the question:

    chain       lines `4178.8823`, shuffled; the answer goes from pair to pair: `8823`, then `8823.3052`, `3052.7716`.
                Scored: the numbers reached from the second hop on. A step is a hop.
    lookup      lines `zebra-lamp.8823`; the answer lists some of them. Keys are forced; the question names none.
                Scored: the numbers. A step is a line of the answer.
    copy        lines `zebra: 417 882 305 ...`; the answer repeats one. Scored: from the fourth number on, without
                spaces. A step is a number.
    needle      lines `zebra=48217733`, one for each question, at even depths from 5 % to 95 %, in the questions' order.
                Scored: from the second digit on. A step is a digit.
    perplexity  of the last 512 tokens of a text given the rest; the question: the 64 tokens before. A step is a token.

SmolLM2-135M-Instruct retrieves digits but rarely words, hence the formats. A case depends on the seed, the tokenizer
and the version of Python, whose library is the text. Run as a script, it prints the accuracy of a full cache.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import random
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

HOPS = 6  # the first is answered by the prefill
RING = 12  # numbers in the cycle that chains follow
STRAY_PAIRS = 4
LOOKUP_LINES = 16
LOOKUP_ASKED = 4
COPY_ITEMS = 12
COPY_GIVEN = 3
NEEDLE_DIGITS = 8
LAST = 512
BEFORE_LAST = 64

CODE = """
argparse textwrap difflib tarfile zipfile configparser smtplib statistics fractions dataclasses enum inspect pdb
threading subprocess shutil mailbox optparse pickle doctest
"""

# Names of things.
WORDS = """
airplane apple architect armor astronaut attic backpack baker bakery balcony balloon baseball basil basket bay beach
bear beer beetle bicycle birch bishop boat bow bridge broccoli bronze brush bus cake camel camera candle carpenter
carpet cave cedar chain cheek chef chemist cherry chess chimney chocolate church cider cinnamon cliff clover coal coat
cookie coral corn cottage cradle crown dancer deer demon dentist desert doctor dog doll dolphin dress duke dwarf eagle
ear elbow emperor engineer factory fence fig fisherman fork fountain garden gate giraffe golf grape hammer harbor
helicopter hockey honey horse hose iron island ivory jacket jar jelly kettle kidney kite knight ladder lamp leather
lemon leopard lettuce lightning lime liver lobster lung mango mechanic microscope midnight miner mint monastery moose
morning mountain museum mustard necklace needle nose nurse ocean onion orange orchard organ oven paddle paper parade
parrot pea peach pepper pianist piano pillow pineapple pirate pizza planet plate plum poet poetry potato prince
pumpkin puppet puppy purple queen rabbit razor ribbon ring saddle sand sauce senator shark sheep shelf shepherd shield
ship shoulder shrimp silk silver singer skin skirt smoke soap soccer soup spider spinach squirrel stamp star statue
steak stomach storm stove strawberry summer sunrise sunset swamp sword table taxi tea teacher telephone telescope
television tennis theater thread thumb thunder tiger tin toad tobacco towel tractor truck trumpet tuna tunnel turkey
turtle umbrella vampire vanilla vase violin warehouse wasp wedding wheel whistle wine witch yellow zebra
"""


@dataclass(frozen=True)
class TextQuestion:
    """One question about a document, with its answer."""

    task: str
    prompt_ids: list[int]  # the question, tokens after the document
    answer_ids: list[int]
    scored: list[int]  # positions in answer_ids that count; never the first
    steps: list[int]  # for each scored position, the hop, line, number, digit or token it belongs to, from 1


@dataclass(frozen=True)
class TextCase:
    """A document and questions about it, asked independently of each other."""

    document_ids: list[int]  # prefilled once
    questions: list[TextQuestion]


@dataclass(frozen=True)
class HiddenLine:
    """A line to hide in the document, at a depth from 0, its beginning, to 1, its end."""

    line: str
    depth: float


@dataclass(frozen=True)
class PlannedQuestion:
    """A question's text, and its answer in pieces, each with its step; 0 if it is not scored."""

    prompt: str
    answer: list[tuple[str, int]]


Plan = Callable[[random.Random, Iterator[str], Iterator[str], int], tuple[list[HiddenLine], list[PlannedQuestion]]]


def make_case(task: str, tokenizer: Any, tokens: int, seed: int, questions: int = 8) -> TextCase:
    """A document and questions; document and longest question together are exactly `tokens` tokens, others fewer.

    Even seeds use code, odd ones prose. `perplexity` has one question, whose answer follows the `tokens` tokens.
    """
    if task not in TASKS:
        raise ValueError(f"task {task!r}: not one of {', '.join(TASKS)}")
    rng = random.Random(f"{task} {seed}")  # seeded by a string, which gives the same numbers on every machine
    lines = _carrier(rng, seed % 2 == 0, 8 * (tokens + LAST))
    plan = TASKS[task]
    if plan is None:
        ids = _encode(tokenizer, "\n".join(lines))
        if len(ids) < tokens + LAST:
            raise ValueError(f"{tokens} tokens: the available texts have {len(ids)}, of which {LAST} are scored")
        middle, end = tokens - BEFORE_LAST, tokens + LAST
        scored = list(range(1, LAST))
        last = TextQuestion(task, ids[middle:tokens], ids[tokens:end], scored, [place + 1 for place in scored])
        return TextCase(ids[:middle], [last])
    text = "\n".join(lines)
    hidden, planned = plan(rng, _unused_words(rng, text), _unused_numbers(rng, text), questions)
    text_questions = [_question(task, tokenizer, question) for question in planned]
    room = tokens - max(len(question.prompt_ids) for question in text_questions)
    return TextCase(_document(tokenizer, room, hidden, lines), text_questions)


def _chain(
    rng: random.Random, words: Iterator[str], numbers: Iterator[str], questions: int
) -> tuple[list[HiddenLine], list[PlannedQuestion]]:
    ring = [next(numbers) for _ in range(max(RING, questions))]
    pairs = [*zip(ring, ring[1:] + ring[:1], strict=True)]
    pairs += [(next(numbers), next(numbers)) for _ in range(STRAY_PAIRS)]
    rng.shuffle(pairs)
    planned = []
    for question in range(questions):
        begin = question * len(ring) // questions
        *keys, last = (ring[(begin + hop) % len(ring)] for hop in range(HOPS + 1))
        answer = []
        for hop, (key, value) in enumerate(zip(keys, [*keys[1:], last], strict=True), 1):
            answer += [(f"\n{key}.", 0)] if hop > 1 else []
            answer += [(value, hop if hop > 1 else 0)]
        planned.append(PlannedQuestion(f"\n\n{keys[0]}.", answer))
    return [HiddenLine(f"{key}.{value}", rng.random()) for key, value in pairs], planned


def _lookup(
    rng: random.Random, words: Iterator[str], numbers: Iterator[str], questions: int
) -> tuple[list[HiddenLine], list[PlannedQuestion]]:
    lines = {f"{next(words)}-{next(words)}": next(numbers) for _ in range(LOOKUP_LINES)}
    planned = []
    for _ in range(questions):
        answer = []
        for step, key in enumerate(rng.sample(sorted(lines), LOOKUP_ASKED), 1):
            answer += [(f"\n{key}.", 0), (lines[key], step)]
        planned.append(PlannedQuestion("\n", answer))
    return [HiddenLine(f"{key}.{value}", rng.random()) for key, value in lines.items()], planned


def _copy(
    rng: random.Random, words: Iterator[str], numbers: Iterator[str], questions: int
) -> tuple[list[HiddenLine], list[PlannedQuestion]]:
    hidden, planned = [], []
    for _ in range(questions):
        name, items = next(words), [str(rng.randrange(100, 1000)) for _ in range(COPY_ITEMS)]
        hidden.append(HiddenLine(f"{name}: {' '.join(items)}", rng.random()))
        answer = []
        for step, item in enumerate(items, 1):
            answer += [(" ", 0), (item, step if step > COPY_GIVEN else 0)]
        planned.append(PlannedQuestion(f"\n\n{name}:", answer))
    return hidden, planned


def _needle(
    rng: random.Random, words: Iterator[str], numbers: Iterator[str], questions: int
) -> tuple[list[HiddenLine], list[PlannedQuestion]]:
    hidden, planned = [], []
    for question in range(questions):
        name, code = next(words), str(rng.randrange(10 ** (NEEDLE_DIGITS - 1), 10**NEEDLE_DIGITS))
        hidden.append(HiddenLine(f"{name}={code}", 0.05 + 0.9 * question / max(questions - 1, 1)))
        answer = [(digit, step if step > 1 else 0) for step, digit in enumerate(code, 1)]
        planned.append(PlannedQuestion(f"\n\n{name}=", answer))
    return hidden, planned


TASKS: dict[str, Plan | None] = {
    "chain": _chain,
    "lookup": _lookup,
    "copy": _copy,
    "needle": _needle,
    "perplexity": None,  # hides nothing
}


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def _carrier(rng: random.Random, code: bool, characters: int) -> list[str]:
    """Lines of the standard library: at least `characters` characters, or all there are."""
    from pydoc_data.topics import topics

    names = CODE.split() if code else sorted(topics)
    rng.shuffle(names)
    parts: list[str] = []
    while names and sum(map(len, parts)) < characters:
        name = names.pop()
        parts.append(inspect.getsource(importlib.import_module(name)) if code else topics[name])
    return "\n".join(parts).splitlines()


def _unused_words(rng: random.Random, text: str) -> Iterator[str]:
    """Words that the text does not contain, each once."""
    used, words = set(re.findall("[a-z]+", text.lower())), WORDS.split()
    return (word for word in rng.sample(words, len(words)) if word not in used)


def _unused_numbers(rng: random.Random, text: str) -> Iterator[str]:
    """Numbers of four digits that the text does not contain, each once."""
    return (number for number in map(str, rng.sample(range(1000, 10_000), 9000)) if number not in text)


def _question(task: str, tokenizer: Any, plan: PlannedQuestion) -> TextQuestion:
    answer_ids: list[int] = []
    scored: list[int] = []
    steps: list[int] = []
    for text, step in plan.answer:
        for token in _encode(tokenizer, text):
            if step and answer_ids:
                scored.append(len(answer_ids))
                steps.append(step)
            answer_ids.append(token)
    return TextQuestion(task, _encode(tokenizer, plan.prompt), answer_ids, scored, steps)


def _document(tokenizer: Any, length: int, hidden: list[HiddenLine], lines: list[str]) -> list[int]:
    """Exactly `length` tokens: the lines in order with the hidden ones between them, cut off at the end."""
    room = length - sum(len(_encode(tokenizer, "\n" + one.line)) for one in hidden)
    waiting = sorted(hidden, key=lambda one: one.depth)
    written: list[str] = []
    used = 0
    for line in lines:
        while waiting and used >= waiting[0].depth * (room - 64):
            written.append(waiting.pop(0).line)
        if used > 1.1 * room + 256:
            break
        written.append(line)
        used += len(_encode(tokenizer, "\n" + line))
    ids = _encode(tokenizer, "\n".join(written))
    facts = [place for place, line in enumerate(written) if line in {one.line for one in hidden}]
    if waiting or len(ids) < length or len(_encode(tokenizer, "\n".join(written[: facts[-1] + 1]))) > length:
        raise ValueError(f"{length} tokens are too few for the hidden lines, or too many for the available texts")
    return ids[:length]


def full_cache(model: Any, case: TextCase) -> list[list[bool]]:
    """Per question, which scored tokens the model predicts with its full cache."""
    import torch
    from transformers import DynamicCache

    from tieredkv.environment.versions import cache_argument

    device, rows = next(model.parameters()).device, []
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        model(torch.tensor([case.document_ids], device=device), **cache_argument(cache), logits_to_keep=1)
        for question in case.questions:
            answer = question.answer_ids
            ids = torch.tensor([question.prompt_ids + answer[:-1]], device=device)
            logits = model(ids, **cache_argument(cache), logits_to_keep=len(answer)).logits[0]
            predicted = logits.argmax(-1).tolist()
            rows.append([predicted[place] == answer[place] for place in question.scored])
            cache.crop(-ids.shape[1])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", default=[*TASKS], metavar="task", help=", ".join(TASKS))
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--cases", type=int, default=6)
    parser.add_argument("--questions", type=int, default=8)
    arguments = parser.parse_args()
    from models import load_smollm2

    model, tokenizer = load_smollm2()
    for task in arguments.tasks:
        begin, right = time.perf_counter(), []
        by_step: dict[int, list[bool]] = {}
        for seed in range(arguments.cases):
            case = make_case(task, tokenizer, arguments.tokens, seed, arguments.questions)
            rows = full_cache(model, case)
            right += rows
            for question, row in zip(case.questions, rows, strict=True):
                steps: dict[int, bool] = {}
                for step, good in zip(question.steps, row, strict=True):
                    steps[step] = steps.get(step, True) and good
                for step, good in steps.items():
                    by_step.setdefault(step, []).append(good)
        report = {
            "task": task,
            "tokens": arguments.tokens,
            "questions": len(right),
            "right": sum(map(sum, right)) / sum(map(len, right)),
            "whole_answers": sum(map(all, right)) / len(right),
            "steps": {} if task == "perplexity" else {k: round(sum(v) / len(v), 3) for k, v in by_step.items()},
            "seconds_per_case": (time.perf_counter() - begin) / arguments.cases,
        }
        print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
