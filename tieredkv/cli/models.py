"""tieredkv models: list the supported models."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from tieredkv.storage.json_text import print_json


def models(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """List the supported models, and those refused.

    Models are listed by the model_type in their config.json; none is loaded. "video" models answer about videos; "text"
    models run under TieredCache. The cache of tiered layers is in host memory; that of other layers does not grow with
    the prompt and stays on the card.
    """
    from tieredkv.models import families

    rows = [
        _row(family.model_types, "video", map(families.find_decoder, family.text_types()), family.tested)
        for family in families.FAMILIES
    ]
    rows += [
        _row(decoder.model_types, "text", [decoder], decoder.tested)
        for decoder in families.DECODERS
        if not decoder.video_only
    ]
    if as_json:
        print_json({"models": rows, "refused": families.REFUSED})
        return
    cells = [("family", "kind", "model types", "tiered layers", "tested with transformers")]
    cells += [
        (row["family"], row["kind"], ", ".join(row["model_types"]), _layers(row), " to ".join(row["transformers"]))
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    for kind, reason in families.REFUSED.items():
        typer.echo(f"refused: {kind}, as {reason}")


def _row(kinds: tuple[str, ...], kind: str, decoders: Any, tested: tuple[str, str]) -> dict[str, Any]:
    """A model family as plain JSON values. decoders: of its text."""
    from tieredkv.models.families.decoder import TIERED

    return {
        "family": kinds[0],
        "kind": kind,
        "model_types": list(kinds),
        "tiered": [TIERED],
        "untiered": sorted({name for decoder in decoders for name in decoder.untiered}),
        "transformers": list(tested),
    }


def _layers(row: dict[str, Any]) -> str:
    """Which layers are tiered, in words."""
    if not row["untiered"]:
        return "all"
    return f"{', '.join(row['tiered'])}; not {', '.join(row['untiered'])}"


def add_to(app: typer.Typer) -> None:
    app.command("models", epilog="Example: tieredkv models")(models)
