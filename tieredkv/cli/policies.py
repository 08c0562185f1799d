"""tieredkv policies: list the policies."""

from __future__ import annotations

import textwrap
from typing import Annotated

import typer

from tieredkv.cli.process import quick_imports
from tieredkv.storage.json_text import print_json


def policies(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """List the policies for --policy and TierConfig(policy=...), with their sources."""
    with quick_imports():
        from tieredkv.policy.presets import POLICIES
    if as_json:
        plain = {name: {"source": policy.source, "summary": policy.summary} for name, policy in POLICIES.items()}
        print_json(plain)
        return
    for name, policy in POLICIES.items():
        typer.echo(f"{name}  ({policy.source})")
        typer.echo(textwrap.indent(textwrap.fill(policy.summary, 100), "    ") + "\n")


def add_to(app: typer.Typer) -> None:
    app.command("policies", epilog="Example: tieredkv policies")(policies)
