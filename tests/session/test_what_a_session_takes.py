"""What a session takes of host and device, said before it is taken, and given back between questions."""

from __future__ import annotations

import pytest
from helpers import assert_near, session_logits

from tieredkv.api import new_session
from tieredkv.errors import BudgetError, TieredKVError
from tieredkv.session.conversation import Conversation
from tieredkv.video.sampling import Sampling

QUESTION = "what colour was the star ?"
SAMPLING = Sampling(fps=4)
OPTIONS = {"gpu_kv_gb": 0.5, "prefill_chunk": 64}


@pytest.fixture
def session(video_model, processor):
    with new_session(video_model, processor=processor, **OPTIONS) as opened:
        yield opened


def test_an_ingest_reports_the_tokens_that_are_cached(session, frames):
    seen = []
    session.ingest(frames, SAMPLING, report=lambda done, total: seen.append((done, total)))
    tokens = session.media[0].tokens
    assert [total for _, total in seen] == [tokens] * len(seen)
    assert [done for done, _ in seen] == [*range(64, tokens, 64), tokens]


def test_what_an_ingest_will_take_is_said_before_anything_is_decoded(session, frames, tmp_path):
    said = []

    def make_room(host_bytes, file_bytes):
        said.append((host_bytes, file_bytes))
        assert session.host_bytes == 0

    session.ingest(frames, SAMPLING, make_room=make_room)
    ((host_bytes, file_bytes),) = said
    assert session.host_bytes <= host_bytes <= 2 * session.host_bytes
    assert session.save(tmp_path / "film.tkv") <= 1.2 * file_bytes


def test_an_ingest_for_which_there_is_no_room_begins_not(session, frames):
    def refuse(host_bytes, file_bytes):
        raise BudgetError("no room")

    with pytest.raises(BudgetError, match="no room"):
        session.ingest(frames, SAMPLING, make_room=refuse, report=lambda *_: pytest.fail("it began"))
    session.ingest(frames, SAMPLING)
    assert session.ask(QUESTION, max_new_tokens=2).token_ids


def test_a_session_that_has_left_the_device_answers_as_before(session, video_model, processor, frames):
    session.ingest(frames, SAMPLING)
    assert session.device_bytes > 0
    session.leave_device()
    assert session.device_bytes == 0
    answers = session_logits(session, QUESTION, 4)
    with new_session(video_model, processor=processor, **OPTIONS) as other:
        other.ingest(frames, SAMPLING)
        assert_near(answers, session_logits(other, QUESTION, 4))
    session.close()
    session.leave_device()
    assert (session.device_bytes, session.host_bytes) == (0, 0)


def test_a_given_conversation_is_continued_and_the_sessions_own_is_not(session, frames):
    session.ingest(frames, SAMPLING)
    own = session.chat(QUESTION, max_new_tokens=3)
    again = session.chat("why ?", max_new_tokens=3)
    given = Conversation([(QUESTION, own.text)])
    answer = session.asking("why ?", {"max_new_tokens": 3}, chat=True, conversation=given).run(None)
    assert answer.token_ids == again.token_ids
    assert given.turns == [(QUESTION, own.text), ("why ?", answer.text)]
    assert given.kept is not None
    assert len(session.history) == 2


def test_a_given_conversation_is_left_alone_by_a_question_that_fails(session, frames):
    session.ingest(frames, SAMPLING)
    given = Conversation([("a", "b")])
    work = session.asking("why ?", {"max_new_tokens": 3}, chat=True, conversation=given)
    session.close()
    with pytest.raises(TieredKVError):
        work.run(None)
    assert given.turns == [("a", "b")]
