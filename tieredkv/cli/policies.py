"""tieredkv policies: what --policy may name."""

from __future__ import annotations

import json
import textwrap
from typing import Annotated

import typer


def policies(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """List what --policy and TierConfig(policy=...) may name, each in a paragraph with its source."""
    from tieredkv.policy.presets import POLICIES

    if as_json:
        made = {name: {"source": one.source, "summary": one.summary} for name, one in POLICIES.items()}
        typer.echo(json.dumps(made))
        return
    for name, one in POLICIES.items():
        typer.echo(f"{name}  ({one.source})")
        typer.echo(textwrap.indent(textwrap.fill(one.summary, 100), "    ") + "\n")


def add_to(app: typer.Typer) -> None:
    app.command("policies", epilog="Example: tieredkv policies")(policies)
