"""JSON that people can read, that any reader splits into the same lines, and that any encoding of stdout can hold."""

from __future__ import annotations

import io
import json
import sys

import pytest

from tieredkv.storage.json_text import print_json, to_json

TEXT = 'Mädchen, 少女, 😀, half \ud83d, "quoted"\n\x85\u2028'


def test_text_is_readable():
    assert to_json({"text": "das Mädchen 少女 😀"}) == '{"text": "das Mädchen 少女 😀"}'


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1", "cp1252", "utf-16", "iso2022_jp"])
def test_any_encoding_gives_the_value_back(encoding):
    written = to_json([TEXT], encoding).encode(encoding)
    assert json.loads(written.decode(encoding)) == [TEXT]


def test_only_what_an_encoding_cannot_hold_is_escaped():
    assert to_json("ä少😀", "latin-1") == r'"ä\u5c11\ud83d\ude00"'


def test_a_value_is_one_line_for_every_reader():
    assert len(to_json([TEXT]).splitlines()) == 1


def test_a_closed_stdout_is_an_error(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(OSError, match="it is closed"):
        print_json("lost")


def test_stdout_gets_its_own_encoding(monkeypatch):
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="backslashreplace")
    monkeypatch.setattr(sys, "stdout", stdout)
    print_json("😀")
    assert stdout.buffer.getvalue() == b'"\\ud83d\\ude00"\n'  # type: ignore[attr-defined]
