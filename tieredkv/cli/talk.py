"""A conversation about one video: questions line by line, and a few commands."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tieredkv.cli.opening import is_there
from tieredkv.cli.stats import say_times, stats_lines
from tieredkv.cli.terminal import Stopped, TerminalStreamer, stopped_by_interrupt
from tieredkv.errors import FAILURES, SessionError, TieredKVError, reason
from tieredkv.memory.units import size_text
from tieredkv.session.results import Stats
from tieredkv.session.video_session import VideoSession
from tieredkv.storage.json_text import print_json
from tieredkv.storage.tensor_file import read

HELP = """\
/clear      start a new conversation
/save FILE  save the session, conversation included; without FILE, to that of --session
/stats      measurements of the last answer
/quit       leave, as Ctrl-D does, keeping the conversation with --session; Ctrl-C stops the answer being generated"""


class Talk:
    """The conversation of one session. Answers go to stdout, everything else to stderr."""

    def __init__(
        self, session: VideoSession, options: dict[str, Any], as_json: bool = False, save_to: Path | None = None
    ) -> None:
        """options: generation options of every answer. as_json: print an object per answer instead of streaming text.
        save_to: where `/save` without a file saves, and `keep`."""
        self.session, self.options, self.as_json, self.save_to = session, options, as_json, save_to
        self.failed = 0
        """Questions and commands that failed."""
        self.kept = True
        """Whether the last `keep` succeeded."""
        self._stats: Stats | None = None

    def run(self, lines: Iterable[str]) -> None:
        """Answer line by line until the end or `/quit`. After a failure, reports it and goes on."""
        for line in map(str.strip, lines):
            if line == "/quit":
                return
            try:
                if line.startswith("/"):
                    self._command(*line.split(maxsplit=1))
                elif line:
                    self._answer(line)
            except BrokenPipeError:  # nobody reads the answers
                raise
            except FAILURES as error:
                self.failed += 1
                _say(f"tieredkv: {reason(error)}")

    def keep(self) -> None:
        """Keep the conversation with the session's file, if there is one and anything changed. Reports a failure."""
        if self.save_to is None:
            return
        try:
            if self.session.save_conversation(self.save_to):
                _say(f"{self.save_to}: the conversation is kept.")
        except FAILURES as error:
            self.kept = False
            _say(f"tieredkv: {reason(error)}")

    def _answer(self, question: str) -> None:
        streamer = TerminalStreamer(self.session.processor.tokenizer, shown=not self.as_json)
        try:
            with stopped_by_interrupt(streamer):
                answer = self.session.chat(question, streamer=streamer, **self.options)
        except Stopped:
            _say("stopped: the conversation continues without this question.")
            return
        self._stats = answer.stats
        if self.as_json:
            print_json(answer.as_dict())
        elif not streamer.wrote_text:  # an empty answer is a line too
            print(flush=True)
        say_times(answer)

    def _command(self, name: str, rest: str = "") -> None:
        if name == "/save":
            self._save(Path(rest).expanduser() if rest else self.save_to)
        elif rest or name not in ("/clear", "/stats", "/help"):
            raise TieredKVError(f"{name} {rest}".strip() + " is not a command: /help lists them.")
        elif name == "/clear":
            self.session.clear_history()
            _say("a new conversation begins.")
        elif name == "/help":
            _say(HELP)
        elif self._stats is None:
            _say("nothing has been answered yet.")
        else:
            _say("\n".join(stats_lines(self._stats)))

    def _save(self, path: Path | None) -> None:
        if path is None:
            raise SessionError("there is no file to save to: give one, as in /save film.tkv.")
        if self.session.is_saved_to(path):
            self.session.save_conversation(path)
            _say(f"{path}: the conversation is kept.")
            return
        if is_there(path):
            try:
                read(path)
            except SessionError:
                raise SessionError(f"{path} exists and is not a session: it is not overwritten.") from None
        size = self.session.save(path)
        _say(f"{path}: {size_text(size)}.")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
