"""Lines of stdin, typed or piped; typed lines are saved in a history file."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tieredkv.cli.defaults import folder

HISTORY_LINES = 1000


def lines(prompt: str) -> Iterator[str]:
    """Lines of stdin until its end. At a terminal, `prompt` precedes each, and Ctrl-C discards the one being typed.

    Bytes that are not valid text become lone surrogates, so that only their own line fails.
    """
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
    if not sys.stdin.isatty():
        yield from (line.rstrip("\n") for line in sys.stdin)
        return
    with _history(history_file()):
        while True:
            try:
                yield _typed(prompt)
            except EOFError:
                print(file=sys.stderr)
                return
            except KeyboardInterrupt:
                print(file=sys.stderr)


def history_file() -> Path:
    """In `$XDG_STATE_HOME/tieredkv`, by default `~/.local/state/tieredkv`."""
    return folder("XDG_STATE_HOME", "~/.local/state") / "tieredkv" / "history"


def _typed(prompt: str) -> str:
    if sys.stdout.isatty():  # otherwise readline would write the prompt into the answers
        return input(prompt)
    print(prompt, end="", file=sys.stderr, flush=True)
    return input()


@contextmanager
def _history(file: Path) -> Iterator[None]:
    """Line editing and the lines of earlier runs, if Python has readline. A file that cannot be used is reported."""
    try:
        import readline
    except ImportError:
        yield
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.exists():
            readline.read_history_file(file)
        readline.set_history_length(HISTORY_LINES)
    except OSError as error:
        print(f"tieredkv: lines are not saved: {file}: {error.strerror or error}.", file=sys.stderr)
        yield
        return
    try:
        yield
    finally:
        try:
            readline.write_history_file(file)
        except OSError as error:
            print(f"tieredkv: lines are not saved: {file}: {error.strerror or error}.", file=sys.stderr)
