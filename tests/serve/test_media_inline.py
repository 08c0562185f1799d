"""`data:` URLs are decoded to disk, each once, within the limits of a film."""

from __future__ import annotations

import base64
import threading

import pytest

from tieredkv.serve.errors import ApiError
from tieredkv.serve.media.inline import inline
from tieredkv.serve.media.library import Library
from tieredkv.serve.settings import Settings

KIB = 2**-20
"""In GiB."""


@pytest.fixture
async def library(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    library = Library(Settings(upload_gb=6000 * KIB, uploads_gb=9000 * KIB))
    await library.open()
    yield library
    await library.close()


def url(content: bytes, kind: str = "video/mp4") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def decoded(library, text):
    return inline(text, library.store, threading.Event())


@pytest.mark.parametrize("size", [1, 2, 3, 4 * 2**20 - 1, 3 * 2**20, 3 * 2**20 + 1, 5 * 2**20])
def test_every_size_comes_out_as_it_was(library, size):
    content = bytes(range(251)) * (size // 251 + 1)
    entry = decoded(library, url(content[:size]))
    assert entry.path.read_bytes() == content[:size]
    assert entry.bytes == size


@pytest.mark.parametrize(
    "kind", ["", "video/mp4", "VIDEO/MP4", "image/png", "video/mp4;codecs=avc1", "video/quicktime"]
)
def test_the_type_may_be_anything(library, kind):
    assert decoded(library, url(b"film", kind)).path.read_bytes() == b"film"


def test_an_escaped_url_is_read(library):
    text = url(b"\xfb\xff\xfe").replace("+", "%2B").replace("/", "%2F").replace("=", "%3D")
    assert decoded(library, text.replace("video%2Fmp4", "video/mp4")).path.read_bytes() == b"\xfb\xff\xfe"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("data:video/mp4;base64", "write data:video/mp4;base64"),
        ("data:video/mp4,film", "only base64"),
        ("data:,film", "only base64"),
        ("data:" + "x" * 1000 + ";base64,AAAA", "write data:video/mp4;base64"),
        ("data:../../x;base64,AAAA", "write data:video/mp4;base64"),
        ("data:video/mp4;base64,AAA", "damaged or was cut short"),
        ("data:video/mp4;base64,A*AA", "damaged or was cut short"),
        ("data:video/mp4;base64,AA\nAA", "damaged or was cut short"),
        ("data:video/mp4;base64,\u00e9AAA", "damaged or was cut short"),
        ("data:video/mp4;base64,AA==AAAA", "damaged or was cut short"),
        ("data:video/mp4;base64," + "A" * (2**22 - 2) + "==" + "AAAA", "ends in the middle"),
        ("data:video/jpeg;base64,AAAA,AAAA", "several files"),
    ],
)
def test_what_is_no_film_is_one_sentence(library, text, words):
    with pytest.raises(ApiError, match=words) as refused:
        decoded(library, text)
    assert refused.value.status == 400
    assert library.store.bytes == 0


def test_an_empty_film_is_refused(library):
    with pytest.raises(ApiError, match="empty"):
        decoded(library, "data:video/mp4;base64,")


def test_a_film_over_the_limit_is_refused_before_it_is_decoded(library, monkeypatch):
    monkeypatch.setattr("binascii.a2b_base64", lambda *_, **__: pytest.fail("decoded"))
    with pytest.raises(ApiError) as refused:
        decoded(library, "data:video/mp4;base64," + "A" * (9 * 2**20))
    assert refused.value.status == 413


async def test_a_conversation_that_repeats_its_film_has_it_once(library):
    first = await library.film(url=url(b"film"))
    again = await library.film(url=url(b"film"), kind="image")
    assert (again.path, again.sha256, again.kind) == (first.path, first.sha256, "image")
    assert library.store.bytes == 4
    assert library.store.uploads("") == []


async def test_a_name_keeps_the_bytes_it_was_given(library):
    first = await library.film(url=url(b"one"), uuid="film", client="a")
    assert await library.film(url=None, uuid="film", client="a") == first
    second = await library.film(url=url(b"two"), uuid="film", client="a")
    assert (await library.film(url=None, uuid="film", client="a")).sha256 == second.sha256 != first.sha256


@pytest.mark.parametrize("uuid", ["", "x" * 257])
async def test_a_name_has_a_length(library, uuid):
    with pytest.raises(ApiError, match="256 characters"):
        await library.film(url=url(b"one"), uuid=uuid)


async def test_a_film_that_left_is_asked_for_again(library):
    film = await library.film(url=url(b"x" * 5000 * 2**10), uuid="film")
    await library.film(url=url(b"y" * 5000 * 2**10))
    assert not film.path.exists()
    with pytest.raises(ApiError, match="give its url too") as refused:
        await library.film(url=None, uuid="film")
    assert refused.value.status == 404
