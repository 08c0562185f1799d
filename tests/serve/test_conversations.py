"""Conversations that clients send whole: found again, continued from what was read, never answered otherwise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from engine_examples import TIERS, Running, answer_of, question

import tieredkv
from tieredkv.cache.passage import Passage
from tieredkv.cache.untiered import Snapshot
from tieredkv.serve.engine.conversations import Conversations
from tieredkv.session.conversation import Conversation, Kept

QUESTIONS = ("what colour was the moon ?", "what colour was the fish ?", "what colour was the cup ?")


def kept(tokens: int, snapshot=None) -> Kept:
    """What is kept of a prompt with `tokens` tokens after the video, 40 bytes each."""
    fields = (torch.zeros(2, tokens, 5), torch.zeros(0))
    return Kept(torch.arange(tokens), Passage(100, 100 + tokens, (fields,), snapshot))


def conversation(*texts: str, tokens: int = 10, snapshot=None) -> Conversation:
    """A conversation whose last question was answered."""
    made = Conversation(list(zip(texts[::2], texts[1::2], strict=True)))
    made.kept = kept(tokens, snapshot)
    return made


# ---- matching


def test_a_conversation_begins_from_the_one_with_the_longest_common_beginning():
    known = Conversations()
    short, long, other = conversation("a", "1"), conversation("a", "1", "b", "3", "c", "4"), conversation("x", "1")
    for one in (long, short, other):
        known.keep(one)
    begun = known.begin([("a", "1"), ("b", "3"), ("d", "5")])
    assert begun.kept is long.kept
    assert begun.turns == [("a", "1"), ("b", "3"), ("d", "5")]
    assert long.turns[-1] == ("c", "4")


def test_texts_that_a_client_has_trimmed_match():
    known = Conversations()
    known.keep(conversation("a ", "1\n"))
    assert known.begin([("a", " 1")]).kept is not None


@pytest.mark.parametrize("turns", [(), [("b", "1")]])
def test_a_conversation_with_nothing_in_common_begins_with_nothing(turns):
    known = Conversations()
    known.keep(conversation("a", "1"))
    assert known.begin(turns).kept is None


def test_a_changed_answer_still_shares_its_question():
    known = Conversations()
    known.keep(conversation("a", "1"))
    assert known.begin([("a", "another")]).kept is not None


def test_a_conversation_is_kept_in_place_of_those_that_it_continues():
    known = Conversations()
    known.keep(conversation("a", "1"))
    known.keep(conversation("a", "2"))
    known.keep(conversation("a", "1", "b", "2"))
    assert len(known) == 2
    assert known.begin([("a", "2")]).kept is not None


def test_what_cannot_be_cut_does_not_replace_what_it_continues():
    known = Conversations()
    known.keep(conversation("a", "1", snapshot=Snapshot(110, ())))
    known.keep(conversation("a", "1", "b", "2", snapshot=Snapshot(120, ())))
    assert len(known) == 2


def test_the_least_recently_used_goes_first():
    known = Conversations(most=2)
    first, second, third = conversation("a", "1"), conversation("b", "1"), conversation("c", "1")
    known.keep(first)
    known.keep(second)
    known.begin([("a", "1")])  # used
    known.keep(third)
    assert known.begin([("a", "1")]).kept is first.kept
    assert known.begin([("b", "1")]).kept is None


def test_what_is_kept_is_bounded_in_bytes():
    each = conversation("a", "1").nbytes
    known = Conversations(most_bytes=2 * each)
    for name in "abc":
        known.keep(conversation(name, "1"))
    assert (len(known), known.nbytes) == (2, 2 * each)
    known.keep(conversation("d", "1", tokens=1000))
    assert known.nbytes <= 2 * each
    known.forget()
    assert known.nbytes == 0


# ---- with a model


@pytest.fixture(scope="session")
def chat(toy, short_video):
    """The library's answers to a conversation."""
    with tieredkv.open_session(toy[0], short_video, processor=toy[1], fps=4, **TIERS) as session:
        return [session.chat(text, max_new_tokens=8) for text in QUESTIONS]


class Reads:
    """Lists the prompt tokens that a model is given at a time."""

    def __init__(self, model):
        self.calls: list[int] = []
        self.hook = model.get_decoder().register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, module, args, options):
        if (tokens := options["inputs_embeds"].shape[1]) > 1:
            self.calls.append(tokens)

    def take(self) -> int:
        calls, self.calls = self.calls, []
        return sum(calls)


@pytest.fixture
def reads(toy):
    counted = Reads(toy[0])
    yield counted
    counted.hook.remove()


@pytest.mark.model
@pytest.mark.threads
async def test_a_conversation_sent_whole_is_answered_as_session_chat_and_reads_only_what_is_new(
    toy, short_video, chat, reads
):
    async with Running(*toy) as engine:
        turns, before = [], 0
        for text, expected in zip(QUESTIONS, chat, strict=True):
            answer = (await answer_of(engine.ask(question(short_video, text, turns=tuple(turns))))).generation
            assert answer.token_ids == expected.token_ids
            assert answer.stats.prompt_tokens == expected.stats.prompt_tokens
            assert reads.take() == answer.stats.prompt_tokens - before
            before = answer.stats.prompt_tokens
            turns.append((text, answer.text))


@pytest.mark.model
@pytest.mark.threads
async def test_two_clients_with_conversations_in_turn_both_read_only_what_is_new(toy, short_video, reads):
    async with Running(*toy) as engine:
        before = {}
        for number in range(2):
            for client in ("one", "two"):
                first = QUESTIONS[0] if client == "one" else QUESTIONS[1]
                turns = ((first, "red"),) * number
                asked = question(short_video, QUESTIONS[2] if number else first, turns=turns, client=client)
                answer = (await answer_of(engine.ask(asked))).generation
                read = reads.take()
                if number:
                    assert read <= answer.stats.prompt_tokens - before[client]
                before[client] = answer.stats.prompt_tokens


@pytest.mark.model
@pytest.mark.threads
async def test_a_conversation_whose_answers_the_client_invented_is_answered_as_if_it_were_true(toy, short_video, reads):
    """What was kept of the true one is used as far as its tokens are the same, and changes nothing."""
    made_up = ((QUESTIONS[0], "it was green , not cyan"), (QUESTIONS[1], "red"))
    async with Running(*toy) as engine:
        await answer_of(engine.ask(question(short_video, QUESTIONS[0])))
        fresh = await answer_of(engine.ask(question(short_video, QUESTIONS[2], turns=made_up)))
    async with Running(*toy) as engine:
        first = await answer_of(engine.ask(question(short_video, QUESTIONS[2], turns=made_up)))
    assert fresh.generation.token_ids == first.generation.token_ids
    np.testing.assert_allclose(fresh.generation.evidence.heat, first.generation.evidence.heat, atol=2e-3)
