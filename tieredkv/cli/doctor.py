"""tieredkv doctor: check this machine."""

from __future__ import annotations

from typing import Annotated

import typer

from tieredkv.storage.json_text import print_json


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check this machine: libraries, card, link, memory, codecs. Says what to do about each fault.

    A "problem" keeps something from working, a "note" does not. Exits with 1 if there is a problem.
    """
    from dataclasses import asdict

    from tieredkv.doctor.checks import examine

    checks = examine()
    problems = sum(check.state == "problem" for check in checks)
    if as_json:
        print_json({"checks": [asdict(check) for check in checks], "problems": problems})
    else:
        typer.echo("\n".join(map(str, checks)))
    raise typer.Exit(1 if problems else 0)


def add_to(app: typer.Typer) -> None:
    app.command("doctor", epilog="Example: tieredkv doctor")(doctor)
