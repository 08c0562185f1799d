"""Answers questions, video by video."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tieredkv.batch.answers import Answers
from tieredkv.batch.questions_file import BatchQuestion
from tieredkv.errors import FAILURES, reason
from tieredkv.video.sampling import Sampling


def run(
    questions: Sequence[BatchQuestion],
    answers: Answers,
    open_session: Callable[[Path, Sampling, Sequence[BatchQuestion]], Any],
    options: dict[str, Any],
    report: Callable[[str], None],
) -> None:
    """Answer the questions that `answers` has no line for, video by video in order of first appearance.

    open_session(video, sampling, its questions): opens a `VideoSession`, which is closed after the last of them.
    options: options of `VideoSession.ask`, unless a question has its own. report: called with each line of progress. A
    question or video that fails becomes an error line; a failing disk raises `OSError`, which ends the run.
    """
    groups: dict[tuple[Path, Sampling], list[BatchQuestion]] = {}
    for question in questions:
        groups.setdefault((question.path, question.sampling), []).append(question)
    for number, ((video, sampling), group) in enumerate(groups.items(), 1):
        pending = [question for question in group if not answers.has(question)]
        if not pending:
            continue
        settings = "".join(f", {name}={getattr(sampling, name)}" for name in sampling.given())
        report(f"video {number} of {len(groups)}, {len(pending)} to answer: {video}{settings}")
        try:
            if (fault := pending[0].fault) is not None:
                raise fault
            session = open_session(video, sampling, pending)
        except BrokenPipeError:  # of stderr: nobody reads what is reported
            raise
        except FAILURES as error:
            for question in pending:
                answers.fail(question, error)
            report(f"  failed: {reason(error)}")
            continue
        with session:
            for question in pending:
                try:
                    answer = session.ask(question.text, **{**options, **question.options})
                except BrokenPipeError:
                    raise
                except FAILURES as error:
                    answers.fail(question, error)
                    report(f"  {question.id} failed: {reason(error)}")
                    continue
                answers.answer(question, answer.as_dict())
                report(f"  {question.id} answered, {len(answers.answered) + len(answers.failed)} of {len(questions)}")
