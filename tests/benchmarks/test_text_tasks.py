"""Text tasks: documents have the requested length and hold the answers, and what is scored must be read in them."""

from __future__ import annotations

import importlib.util
import re
import sys
from itertools import pairwise
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest

_SPEC = importlib.util.spec_from_file_location("text_tasks", Path(__file__).parents[2] / "benchmarks" / "text_tasks.py")
assert _SPEC is not None
assert _SPEC.loader is not None
text_tasks = importlib.util.module_from_spec(_SPEC)
sys.modules["text_tasks"] = text_tasks
_SPEC.loader.exec_module(text_tasks)

HIDING = [task for task, plan in text_tasks.TASKS.items() if plan is not None]


class Pieces:
    """Splits as SmolLM2's tokenizer does: words with the space before them, digits alone, runs of space."""

    def __init__(self) -> None:
        self.ids: dict[str, int] = {}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        assert not add_special_tokens
        pieces = re.findall(r" ?[^\W\d]{1,6}|\d| ?[^\s\w]+|\s+(?!\S)|\s", text)
        assert "".join(pieces) == text
        return [self.ids.setdefault(piece, len(self.ids)) for piece in pieces]

    def decode(self, ids: list[int]) -> str:
        texts = list(self.ids)
        return "".join(texts[i] for i in ids)


@pytest.fixture(scope="module")
def tokenizer() -> Pieces:
    return Pieces()


def scored_text(tokenizer: Any, question: Any) -> dict[int, str]:
    """What is scored, by step."""
    texts: dict[int, str] = {}
    for place, step in zip(question.scored, question.steps, strict=True):
        texts[step] = texts.get(step, "") + tokenizer.decode([question.answer_ids[place]])
    return texts


@pytest.mark.parametrize("task", text_tasks.TASKS)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_case_is_determined_by_its_seed(tokenizer, task, seed):
    case = text_tasks.make_case(task, tokenizer, 2048, seed)
    assert case == text_tasks.make_case(task, tokenizer, 2048, seed)
    assert case != text_tasks.make_case(task, tokenizer, 2048, seed + 2)


@pytest.mark.parametrize("task", text_tasks.TASKS)
@pytest.mark.parametrize(("tokens", "seed"), [(2048, 0), (2048, 1), (4096, 2), (8192, 3)])
def test_lengths_and_scored_places(tokenizer, task, tokens, seed):
    case = text_tasks.make_case(task, tokenizer, tokens, seed)
    assert len(case.questions) == (1 if task == "perplexity" else 8)
    assert max(len(case.document_ids) + len(question.prompt_ids) for question in case.questions) == tokens
    for question in case.questions:
        assert question.task == task
        assert question.prompt_ids
        assert len(case.document_ids) + len(question.prompt_ids) >= tokens - 32
        assert question.scored == sorted(set(question.scored))
        assert question.scored[0] > 0
        assert question.scored[-1] < len(question.answer_ids)
        assert question.steps == sorted(question.steps)
        assert question.steps[0] >= 1


@pytest.mark.parametrize("task", HIDING)
@pytest.mark.parametrize("seed", [0, 1])
def test_lines_to_hide_are_hidden_once_and_questions_differ(tokenizer, task, seed):
    case = text_tasks.make_case(task, tokenizer, 2048, seed)
    text = tokenizer.decode(case.document_ids)
    for question in case.questions:
        asked = tokenizer.decode(question.prompt_ids + question.answer_ids).strip()
        for line in asked.splitlines():
            assert text.count(line) == 1, line
            assert any(kept.startswith(line) for kept in text.splitlines())
    assert len({tuple(question.prompt_ids + question.answer_ids) for question in case.questions}) == 8


@pytest.mark.parametrize("task", HIDING)
def test_answers_are_cut_into_tokens_as_text_is(tokenizer, task):
    for question in text_tasks.make_case(task, tokenizer, 2048, 0).questions:
        ids = question.prompt_ids + question.answer_ids
        assert tokenizer.encode(tokenizer.decode(ids), add_special_tokens=False) == ids


@pytest.mark.parametrize("task", HIDING)
def test_the_scored_text_is_not_in_the_question(tokenizer, task):
    case = text_tasks.make_case(task, tokenizer, 2048, 0)
    for question in case.questions:
        prompt = tokenizer.decode(question.prompt_ids)
        texts = scored_text(tokenizer, question).values()
        assert all(character.isdigit() for text in texts for character in text)
        if task != "needle":  # a step of it is a single digit
            assert not any(text in prompt for text in texts)


def test_a_chain_goes_from_pair_to_pair(tokenizer):
    case = text_tasks.make_case("chain", tokenizer, 2048, 0)
    pairs = dict(re.findall(r"^(\d{4})\.(\d{4})$", tokenizer.decode(case.document_ids), re.MULTILINE))
    assert len(pairs) == text_tasks.RING + text_tasks.STRAY_PAIRS
    assert len(set(pairs.values())) == len(pairs)
    starts = set()
    for question in case.questions:
        key = tokenizer.decode(question.prompt_ids).strip().rstrip(".")
        starts.add(key)
        reached = {}
        for hop in range(1, text_tasks.HOPS + 1):
            key = reached[hop] = pairs[key]
        del reached[1]  # comes from the prefill
        assert scored_text(tokenizer, question) == reached
        assert len(set(reached.values())) == len(reached)
    assert len(starts) == len(case.questions)


def test_pairs_are_not_listed_in_the_order_of_the_chain(tokenizer):
    text = tokenizer.decode(text_tasks.make_case("chain", tokenizer, 2048, 0).document_ids)
    pairs = re.findall(r"^(\d{4})\.(\d{4})$", text, re.MULTILINE)
    assert sum(first[1] == second[0] for first, second in pairwise(pairs)) < 4


def test_a_lookup_names_keys_only_in_its_answer(tokenizer):
    case = text_tasks.make_case("lookup", tokenizer, 2048, 1)
    lines = dict(re.findall(r"^([a-z]+-[a-z]+)\.(\d{4})$", tokenizer.decode(case.document_ids), re.MULTILINE))
    assert len(lines) == text_tasks.LOOKUP_LINES
    assert len(set(lines.values())) == len(lines)
    for question in case.questions:
        assert not tokenizer.decode(question.prompt_ids).strip()
        keys = [line.split(".")[0] for line in tokenizer.decode(question.answer_ids).split()]
        assert len(set(keys)) == text_tasks.LOOKUP_ASKED
        assert scored_text(tokenizer, question) == {step: lines[key] for step, key in enumerate(keys, 1)}


def test_a_copy_scores_all_but_the_first_items(tokenizer):
    case = text_tasks.make_case("copy", tokenizer, 2048, 0)
    for question in case.questions:
        items = tokenizer.decode(question.answer_ids).split()
        assert len(items) == text_tasks.COPY_ITEMS
        numbered = list(enumerate(items, 1))[text_tasks.COPY_GIVEN :]
        assert scored_text(tokenizer, question) == dict(numbered)


def test_needles_lie_at_even_depths(tokenizer):
    case = text_tasks.make_case("needle", tokenizer, 4096, 0, questions=10)
    text = tokenizer.decode(case.document_ids)
    for number, question in enumerate(case.questions):
        assert question.scored == list(range(1, text_tasks.NEEDLE_DIGITS))
        before = text[: text.index(tokenizer.decode(question.answer_ids))]
        depth = len(tokenizer.encode(before, add_special_tokens=False)) / len(case.document_ids)
        assert depth == pytest.approx(0.05 + 0.1 * number, abs=0.05)


@pytest.mark.parametrize("seed", [0, 1])
def test_perplexity_goes_on_where_its_text_stops(tokenizer, seed):
    case = text_tasks.make_case("perplexity", tokenizer, 2048, seed)
    (question,) = case.questions
    assert len(question.answer_ids) == text_tasks.LAST
    assert question.scored == list(range(1, text_tasks.LAST))
    longer = text_tasks.make_case("perplexity", tokenizer, 2048 + text_tasks.LAST, seed)
    whole = case.document_ids + question.prompt_ids + question.answer_ids
    assert longer.document_ids + longer.questions[0].prompt_ids == whole


def test_texts_differ_between_seeds_and_are_code_or_prose(tokenizer):
    texts = [tokenizer.decode(text_tasks.make_case("perplexity", tokenizer, 1024, s).document_ids) for s in range(4)]
    assert len(set(texts)) == 4
    assert [any(text[:40] in topic for topic in topics.values()) for text in texts] == [False, True, False, True]


def test_refusals(tokenizer):
    with pytest.raises(ValueError, match="not one of chain, lookup"):
        text_tasks.make_case("chains", tokenizer, 2048, 0)
    with pytest.raises(ValueError, match="too few"):
        text_tasks.make_case("lookup", tokenizer, 128, 0)
