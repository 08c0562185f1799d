"""What is typed or piped in, line by line; typed lines are remembered from one run to the next."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tieredkv.cli.defaults import folder

REMEMBERED = 1000
"""Lines kept."""


def lines(prompt: str) -> Iterator[str]:
    """Lines of stdin until its end. From a terminal each is asked for by `prompt`, and Ctrl-C begins it anew.

    Bytes that are no text come as lone surrogates, so that one such line does not take the others with it.
    """
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
    if not sys.stdin.isatty():
        yield from (line.rstrip("\n") for line in sys.stdin)
        return
    with _remembered(history_file()):
        while True:
            try:
                yield _typed(prompt)
            except EOFError:
                print(file=sys.stderr)
                return
            except KeyboardInterrupt:
                print(file=sys.stderr)


def history_file() -> Path:
    """Below `$XDG_STATE_HOME`, by default `~/.local/state`."""
    return folder("XDG_STATE_HOME", "~/.local/state") / "tieredkv" / "history"


def _typed(prompt: str) -> str:
    if sys.stdout.isatty():  # else readline would write the prompt among the answers
        return input(prompt)
    print(prompt, end="", file=sys.stderr, flush=True)
    return input()


@contextmanager
def _remembered(file: Path) -> Iterator[None]:
    """Line editing and the lines of earlier runs, where Python has readline; a file that cannot be used is told of."""
    try:
        import readline
    except ImportError:
        yield
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.exists():
            readline.read_history_file(file)
        readline.set_history_length(REMEMBERED)
    except OSError as error:
        print(f"tieredkv: lines are not remembered: {file}: {error.strerror or error}.", file=sys.stderr)
        yield
        return
    try:
        yield
    finally:
        try:
            readline.write_history_file(file)
        except OSError as error:
            print(f"tieredkv: lines are not remembered: {file}: {error.strerror or error}.", file=sys.stderr)
