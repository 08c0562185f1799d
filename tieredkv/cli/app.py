"""The command line as one application, and the exit codes of its errors."""

from __future__ import annotations

import io
import os
import sys
import warnings
from typing import Annotated

import typer

from tieredkv import __version__
from tieredkv.cli import ask, bench, chat, defaults, demo, doctor, models, plan, policies, run, serve
from tieredkv.cli.process import INTERRUPTED
from tieredkv.errors import TieredKVError, reason
from tieredkv.progress import at_terminal

# Read when torch is imported, which only commands do. If another program takes a core, the other threads spin until it
# is given back, and decoding is several times slower. Sleeping instead costs little (docs/log.md).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if not at_terminal():  # read when huggingface_hub is imported: transformers' bars would fill a log with one long line
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"max_content_width": 100},
)
for command in (ask, chat, run, serve, plan, models, policies, demo, bench, doctor):
    command.add_to(app)


def _show_version(value: bool) -> None:
    if value:
        typer.echo(__version__)
        raise typer.Exit


@app.callback(epilog='Example: tieredkv ask film.mp4 "What is on the table?" -m Qwen/Qwen2.5-VL-3B-Instruct')
def _options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Long-video question answering with the key/value cache in two memory tiers.

    Answers go to stdout, everything else to stderr. Exit code: 0, 1 (something failed) or 2 (bad input).
    """
    settings = defaults.read(defaults.path())
    context.default_map = {command.name: settings for command in app.registered_commands if command.name}


def _short_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """A warning of this package in one line, as other messages are; of others with its place, as Python does."""
    if issubclass(category, UserWarning) and os.path.dirname(os.path.dirname(__file__)) in filename:
        return f"tieredkv: {message}\n"
    return f"{filename}:{lineno}: {category.__name__}: {message}\n"


def execute() -> None:
    """Run the command of `sys.argv`; raises `SystemExit`.

    An error that the user can fix is one sentence on stderr and exit code 2; a failing disk gives 1, and so does a
    reader of the output that has closed it, without a word.
    """
    for stream in (sys.stdout, sys.stderr):  # file names may be invalid text, and answers may not fit the encoding
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    warnings.formatwarning = _short_warning
    try:
        try:
            app()
        finally:
            sys.stdout.flush()  # a full disk is reported, and not by Python while it ends
    except TieredKVError as error:
        _end(str(error), 2)
    except BrokenPipeError:
        sys.exit(1)
    except OSError as error:
        _end(reason(error), 1)
    except KeyboardInterrupt:
        _end("interrupted.", INTERRUPTED)
    except SystemExit as stop:
        if stop.code == INTERRUPTED:  # typer's exit code for an interrupt
            _end("interrupted.", INTERRUPTED)
        raise


def _end(message: str, code: int) -> None:
    print(f"tieredkv: {message}", file=sys.stderr)
    sys.exit(code)
