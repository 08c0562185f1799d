"""Text in pieces that later tokens do not change; joined, they are the whole text."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tieredkv.session.text_streamer import StableTextStreamer, token_texts


def pieces_of(tokenizer, ids: list[int]) -> tuple[list[str], str]:
    def text(token_ids: list[int]) -> str:
        return tokenizer.decode(token_ids, skip_special_tokens=True).strip()

    got: list[str] = []
    pieces = StableTextStreamer(text, got.append)
    pieces.put(torch.tensor([[1, 2, 3]]))
    for token in ids:
        pieces.put(torch.tensor([token]))
    pieces.finish(text(ids))
    return got, text(ids)


def test_no_piece_ends_inside_a_character(byte_tokenizer):
    ids = byte_tokenizer("  Grüße, 世界 👩‍👩‍👧 !\n").input_ids
    assert len(ids) > 30
    pieces, text = pieces_of(byte_tokenizer, ids)
    assert "".join(pieces) == text == "Grüße, 世界 👩‍👩‍👧 !"
    assert "\N{REPLACEMENT CHARACTER}" not in text
    assert pieces[:4] == ["G", "r", "ü", "ß"]
    assert pieces[6:8] == [" 世", "界"]


def test_an_answer_that_breaks_off_inside_a_character_is_given_whole(byte_tokenizer):
    ids = byte_tokenizer("ab 世").input_ids[:-1]
    pieces, text = pieces_of(byte_tokenizer, ids)
    assert "".join(pieces) == text == "ab \N{REPLACEMENT CHARACTER}"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 255), max_size=40))
def test_pieces_of_any_bytes_are_the_text(byte_tokenizer, ids):
    pieces, text = pieces_of(byte_tokenizer, ids)
    assert "".join(pieces) == text


def test_pieces_of_a_tokenizer_that_falls_back_to_bytes_are_the_text():
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, "▁go": 1, **{f"<0x{byte:02X}>": byte + 2 for byte in range(256)}}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    ids = [1, *(byte + 2 for byte in "€世".encode()), 1]
    pieces, text = pieces_of(tokenizer, ids)
    assert "".join(pieces) == text == "go€世 go"
    assert pieces == ["go", "€", "世", " go"]


def texts_of(tokenizer, ids: list[int]) -> list[str]:
    return token_texts(lambda some: tokenizer.decode(some, skip_special_tokens=True).strip(), ids)


def test_each_token_has_the_text_that_it_adds(byte_tokenizer):
    assert texts_of(byte_tokenizer, byte_tokenizer("a b").input_ids) == ["a", "", " b"]
    assert texts_of(byte_tokenizer, byte_tokenizer("é!").input_ids) == ["", "é", "!"]
    assert texts_of(byte_tokenizer, []) == []


@given(text=st.text(max_size=12), cut=st.integers(0, 3))
@settings(deadline=None, max_examples=50)
def test_texts_of_tokens_joined_are_the_whole_text(byte_tokenizer, text, cut):
    ids = byte_tokenizer(text).input_ids
    ids = ids[: max(0, len(ids) - cut)]
    texts = texts_of(byte_tokenizer, ids)
    assert len(texts) == len(ids)
    assert "".join(texts) == byte_tokenizer.decode(ids).strip()
