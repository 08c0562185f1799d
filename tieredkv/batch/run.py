"""Answers the questions of a file, video by video."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tieredkv.batch.answers_file import AnswersFile
from tieredkv.batch.questions_file import BatchQuestion
from tieredkv.errors import FAILURES, reason


def run(
    questions: Sequence[BatchQuestion],
    answers: AnswersFile,
    open_session: Callable[[Path, Sequence[BatchQuestion]], Any],
    options: dict[str, Any],
    report: Callable[[str], None],
) -> None:
    """Answer the questions that `answers` has no line for, video by video in order of first appearance.

    open_session(video, its questions): opens a `VideoSession`, which is closed after the last of them. options:
    generation options, unless a question has its own. report: called with each line of progress. A question or video
    that fails becomes an error line; a failing disk raises `OSError`, which ends the run.
    """
    by_video: dict[Path, list[BatchQuestion]] = {}
    for question in questions:
        by_video.setdefault(question.path, []).append(question)
    for number, (video, group) in enumerate(by_video.items(), 1):
        pending = [question for question in group if not answers.has(question)]
        if not pending:
            continue
        report(f"video {number} of {len(by_video)}, {len(pending)} to answer: {video}")
        try:
            session = open_session(video, pending)
        except FAILURES as error:
            for question in pending:
                answers.fail(question, error)
            report(f"  failed: {reason(error)}")
            continue
        with session:
            for question in pending:
                try:
                    answer = session.ask(question.text, **{**options, **question.options})
                except FAILURES as error:
                    answers.fail(question, error)
                    report(f"  {question.id} failed: {reason(error)}")
                    continue
                answers.answer(question, answer.as_dict())
                report(f"  {question.id} answered, {len(answers.answered) + len(answers.failed)} of {len(questions)}")
