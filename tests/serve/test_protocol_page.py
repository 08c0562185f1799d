"""The page about OpenAI's protocol says what the code refuses, ignores and understands."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("fastapi")

from tieredkv.serve.protocol.chat import ChatRequest
from tieredkv.serve.protocol.generation import Additions
from tieredkv.serve.protocol.refused import CHAT, IGNORED, RESPONSES
from tieredkv.serve.protocol.responses import ResponsesRequest
from tieredkv.serve.protocol.sampling import WORDS

PAGE = Path(__file__).parents[2] / "docs" / "openai.md"


def refused_table() -> str:
    """One row for each field, in the order of the code."""
    rows = ["| field | why | accepted |", "|---|---|---|"]
    for name, refused in {**CHAT, **RESPONSES}.items():
        only = "" if name in CHAT and name in RESPONSES else " (chat)" if name in CHAT else " (responses)"
        harmless = ", ".join(f"`{json.dumps(value)}`" for value in refused.harmless)
        rows.append(f"| `{name}`{only} | {refused.reason.rstrip('.')} | {harmless} |")
    return "\n".join(rows)


def filled(text: str) -> str:
    """The page as it should be."""
    ignored = ", ".join(f"`{name}`" for name in sorted(IGNORED))
    text = re.sub(
        r"(<!-- table: refused -->\n).*?(<!-- end -->)", rf"\g<1>\n{refused_table()}\n\n\g<2>", text, flags=re.S
    )
    return re.sub(r"(<!-- list: ignored -->).*?(<!-- end -->)", rf"\g<1>{ignored}\g<2>", text, flags=re.S)


def test_the_table_and_the_list_are_those_of_the_code():
    text = PAGE.read_text()
    assert filled(text) == text, f"run python {Path(__file__).name} in this folder"


def test_every_word_that_works_is_on_the_page():
    text = PAGE.read_text()
    unsaid = {"stream", "stream_options", "messages", "input", "instructions", "store", "metadata", "include"}
    fields = {*ChatRequest.model_fields, *ResponsesRequest.model_fields} - unsaid
    assert [name for name in sorted({*fields, *WORDS, *Additions.model_fields}) if f"`{name}`" not in text] == [
        "media_io_kwargs",
    ]
    assert "`media_io_kwargs.video`" in text


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text()))
