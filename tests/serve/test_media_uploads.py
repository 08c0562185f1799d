"""Uploads arrive on disk as they are sent, under limits, and come back as what they are and to no script."""

from __future__ import annotations

import asyncio
import errno
import io
import os
from pathlib import Path

import pytest

pytest.importorskip("fastapi")

from films import greys, write
from PIL import Image

from tieredkv.serve.errors import ApiError
from tieredkv.serve.media import uploads
from tieredkv.serve.media.library import Library
from tieredkv.serve.media.private import PrivateFolder
from tieredkv.serve.media.store import Store
from tieredkv.serve.media.uploads import clean_name, receive
from tieredkv.serve.settings import Settings

KIB = 2**-20
"""In GiB."""


@pytest.fixture
def settings():
    return Settings(upload_gb=400 * KIB, uploads_gb=1000 * KIB)


@pytest.fixture
async def library(settings, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    library = Library(settings)
    await library.open()
    yield library
    await library.close()
    assert [name for name in os.listdir(tmp_path) if name.startswith("tieredkv-")] == []


def stored(library) -> list[str]:
    """Names of the files in the library's folder."""
    return sorted(set(os.listdir(library.store._folder.path)) - {"lock"})


@pytest.fixture(scope="module")
def film(tmp_path_factory) -> bytes:
    return write(tmp_path_factory.mktemp("film") / "film.mp4", greys(10, 48, 64), rate=2).read_bytes()


async def send(client, content, name="film.mp4", **fields):
    return await client.post("/v1/files", files={"file": (name, content)}, data={"purpose": "user_data", **fields})


async def test_an_upload_is_openais_file_object(client, film):
    reply = await send(client, film)
    assert reply.status_code == 200, reply.text
    found = reply.json()
    assert found["id"].startswith("file-")
    assert len(found["id"]) > 30
    assert found | {"id": "", "created_at": 0} == {
        "id": "",
        "object": "file",
        "bytes": len(film),
        "created_at": 0,
        "filename": "film.mp4",
        "purpose": "user_data",
        "status": "processed",
    }
    assert (await client.get(f"/v1/files/{found['id']}")).json() == found


async def test_an_upload_is_a_film_that_a_question_may_name(client, library, film):
    id = (await send(client, film)).json()["id"]
    found = await library.film(url=id)
    assert found.path.read_bytes() == film
    assert found.name == "film.mp4"
    assert (await library.film(url=id, uuid="mine")).sha256 == found.sha256


async def test_uploads_are_listed_and_deleted(client, library, film):
    first, second = [(await send(client, film, name, purpose="vision")).json()["id"] for name in ("a.mp4", "b.mp4")]
    listed = (await client.get("/v1/files")).json()
    assert {each["id"] for each in listed["data"]} == {first, second}
    one = (await client.get("/v1/files", params={"limit": 1, "order": "asc"})).json()
    assert (len(one["data"]), one["has_more"]) == (1, True)
    assert (await client.get("/v1/files", params={"purpose": "user_data"})).json()["data"] == []
    assert (await client.delete(f"/v1/files/{first}")).json() == {"id": first, "object": "file", "deleted": True}
    assert (await client.get(f"/v1/files/{first}")).status_code == 404
    assert len(stored(library)) == 1


async def test_a_film_that_is_asked_about_is_not_deleted(client, library, film):
    id = (await send(client, film)).json()["id"]
    with library.pin(await library.film(url=id)):
        reply = await client.delete(f"/v1/files/{id}")
        assert (reply.status_code, reply.json()["error"]["code"]) == (409, "in_use")
    assert (await client.delete(f"/v1/files/{id}")).status_code == 200


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("../../x", "x"),
        ("/etc/passwd", "passwd"),
        ("..\\..\\boot.ini", "boot.ini"),
        ("a\r\nX-Evil: 1.mp4", "aX-Evil: 1.mp4"),
        ("\x1b[31mred.mp4", "[31mred.mp4"),
        ("..", "film"),
        ("", "film"),
        ("film\u202e4pm.exe", "film4pm.exe"),
        ("x" * 300 + ".mp4", "x" * 96 + ".mp4"),
        ("Ärger 1.mkv", "Ärger 1.mkv"),
    ],
)
async def test_names_are_text_and_never_paths(library, name, shown):
    assert clean_name(name) == shown
    with library.store.writing(name) as writer:
        writer.write(b"film")
        entry = writer.keep()
    assert entry.path.parent == library.store._folder.path
    assert entry.path.stem.isalnum()
    assert entry.path.suffix in ("", ".mp4", ".mkv")


async def test_a_traversing_name_is_stored_inside(client, library, film):
    reply = await send(client, film, "../../x.mp4")
    assert reply.json()["filename"] == "x.mp4"
    assert len(stored(library)) == 1


async def test_a_film_over_the_limit_is_refused_and_leaves_nothing(client, library):
    reply = await send(client, b"x" * (401 * 2**10))
    assert (reply.status_code, reply.json()["error"]["code"]) == (413, "file_too_large")
    assert stored(library) == []
    assert library.store.bytes == 0


async def test_a_film_far_over_the_limit_is_refused_before_it_is_read(client):
    async def body():
        raise AssertionError("read")
        yield b""

    headers = {"Content-Type": "multipart/form-data; boundary=x", "Content-Length": str(2**40)}
    assert (await client.post("/v1/files", content=body(), headers=headers)).status_code == 413


async def test_the_least_recently_used_film_leaves_for_a_new_one(client, library):
    block = b"x" * (300 * 2**10)
    first, second, third = [(await send(client, block)).json()["id"] for _ in range(3)]
    await library.film(url=first)
    fourth = (await send(client, block)).json()["id"]
    left = {each["id"] for each in (await client.get("/v1/files")).json()["data"]}
    assert left == {first, third, fourth}
    assert second not in left
    assert library.store.bytes == 3 * len(block)


async def test_films_in_use_do_not_leave(client, library):
    block = b"x" * (300 * 2**10)
    films = [await library.film(url=(await send(client, block)).json()["id"]) for _ in range(3)]
    with library.pin(films[0]), library.pin(films[1]), library.pin(films[2]):
        reply = await send(client, block)
        assert (reply.status_code, reply.json()["error"]["code"]) == (507, "storage_full")
        assert len(stored(library)) == 3
    assert (await send(client, block)).status_code == 200


async def test_the_servers_own_film_stays(client, library, film, tmp_path):
    (tmp_path / "demo.mp4").write_bytes(film)
    library.add(tmp_path / "demo.mp4", "demo.mp4")
    for _ in range(5):
        await send(client, b"x" * (300 * 2**10))
    (demo,) = [each for each in (await client.get("/v1/files")).json()["data"] if each["filename"] == "demo.mp4"]
    assert (await client.delete(f"/v1/files/{demo['id']}")).status_code == 403


class FullDisk(io.FileIO):
    """A file on a disk that has no room."""

    def write(self, block):
        raise OSError(errno.ENOSPC, "No space left on device")


async def test_a_full_disk_is_one_sentence(client, library, monkeypatch, film):
    monkeypatch.setattr(Path, "open", lambda path, *given, **options: FullDisk(path, "w"))
    reply = await send(client, film)
    assert (reply.status_code, reply.json()["error"]["code"]) == (507, "disk_full")
    assert "make room" in reply.json()["error"]["message"]
    assert stored(library) == []


def form(*parts: bytes, end: bytes = b"--b--\r\n") -> bytes:
    return b"".join(b"--b\r\n" + part + b"\r\n" for part in parts) + end


FILE = b'Content-Disposition: form-data; name="file"; filename="a.mp4"\r\n\r\nfilm'
PURPOSE = b'Content-Disposition: form-data; name="purpose"\r\n\r\n'


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (form(PURPOSE + b"user_data"), "no_file"),
        (form(FILE, PURPOSE + b"assistants"), "invalid_purpose"),
        (form(FILE, FILE), "two_files"),
        (form(FILE.replace(b"\r\nfilm", b"\r\n")), "empty_file"),
        (form(FILE, PURPOSE + b"x" * 2000), "field_too_long"),
        (form(FILE, end=b""), "malformed"),
        (form(FILE)[:-20], "malformed"),
        (b"nonsense", "malformed"),
        (b"", "malformed"),
        (form(*[PURPOSE + b"vision"] * 20, FILE), "parts"),
        (form(b"X: " + b"y" * 100_000 + b"\r\n" + FILE), "malformed"),
    ],
)
async def test_bodies_that_are_no_upload_are_one_sentence_and_leave_nothing(client, library, body, code):
    reply = await client.post("/v1/files", content=body, headers={"Content-Type": "multipart/form-data; boundary=b"})
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, code)
    assert stored(library) == []
    assert library.store.bytes == 0


@pytest.mark.parametrize("kind", ["", "video/mp4", "application/x-www-form-urlencoded", "multipart/form-data"])
async def test_other_types_are_refused(library, kind):
    async def body():
        yield b"x"

    with pytest.raises(ApiError) as refused:
        await receive(kind, body(), library.store, "")
    assert refused.value.status == 415


async def test_the_purpose_may_come_first_or_be_missing(client):
    for parts in ((PURPOSE + b"vision", FILE), (FILE, PURPOSE + b"vision")):
        reply = await client.post(
            "/v1/files", content=form(*parts), headers={"Content-Type": "multipart/form-data; boundary=b"}
        )
        assert reply.json()["purpose"] == "vision"
    reply = await client.post(
        "/v1/files", content=form(FILE), headers={"Content-Type": "multipart/form-data; boundary=b"}
    )
    assert reply.json()["purpose"] == "user_data"


async def test_an_upload_is_on_disk_while_it_arrives_and_gone_when_it_is_cut_short(library, monkeypatch):
    """More than a block is never in memory; whoever goes away leaves nothing."""
    monkeypatch.setattr(uploads, "_BLOCK", 2**16)
    arrived = asyncio.Event()
    sizes = []

    async def body():
        yield b"--b\r\n" + FILE
        for _ in range(3):
            yield b"x" * 100 * 2**10
            sizes.append(sum(os.path.getsize(library.store._folder.path / name) for name in stored(library)))
        arrived.set()
        await asyncio.sleep(60)

    upload = asyncio.create_task(receive("multipart/form-data; boundary=b", body(), library.store, ""))
    await arrived.wait()
    assert sizes[-1] > 200 * 2**10
    upload.cancel()
    with pytest.raises(asyncio.CancelledError):
        await upload
    assert stored(library) == []
    assert library.store.bytes == 0


async def test_an_upload_that_stalls_is_given_up(library, monkeypatch):
    monkeypatch.setattr(uploads, "_IDLE_S", 0.05)

    async def body():
        yield b"--b\r\n" + FILE
        await asyncio.sleep(60)

    with pytest.raises(ApiError) as refused:
        await receive("multipart/form-data; boundary=b", body(), library.store, "")
    assert refused.value.status == 408
    assert stored(library) == []


async def test_an_upload_that_never_ends_is_given_up(library, monkeypatch):
    monkeypatch.setattr(uploads, "_TOTAL_S", 0.1)

    async def body():
        yield b"--b\r\n" + FILE
        while True:
            yield b"x"
            await asyncio.sleep(0.02)

    with pytest.raises(ApiError) as refused:
        await receive("multipart/form-data; boundary=b", body(), library.store, "")
    assert (refused.value.status, refused.value.code) == (408, "slow")
    assert stored(library) == []


async def test_few_uploads_arrive_at_the_same_time(library):
    from contextlib import ExitStack

    with ExitStack() as writers:
        for _ in range(16):
            writers.enter_context(library.store.writing("a.mp4"))
        with pytest.raises(ApiError) as refused, library.store.writing("a.mp4"):
            pass
        assert (refused.value.status, refused.value.retry_after) == (429, 5)
    with library.store.writing("a.mp4"):
        pass


async def test_a_browser_can_seek_in_a_film(client, film):
    id = (await send(client, film, 'a "film".mp4')).json()["id"]
    reply = await client.get(f"/v1/files/{id}/content", headers={"Range": "bytes=100-199"})
    assert reply.status_code == 206
    assert reply.content == film[100:200]
    assert reply.headers["content-range"] == f"bytes 100-199/{len(film)}"
    assert reply.headers["content-type"] == "video/mp4"
    assert reply.headers["content-disposition"].startswith("inline; filename")
    whole = await client.get(f"/v1/files/{id}/content")
    assert (whole.status_code, whole.content, whole.headers["accept-ranges"]) == (200, film, "bytes")
    head = await client.head(f"/v1/files/{id}/content")
    assert (head.content, head.headers["content-length"]) == (b"", str(len(film)))
    assert (await client.get(f"/v1/files/{id}/content", headers={"Range": "bytes=9999999-"})).status_code == 416


@pytest.mark.parametrize(
    "content", [b"<script>alert(1)</script>", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%PDF"]
)
async def test_what_is_no_film_is_never_shown_as_a_page(client, content):
    id = (await send(client, content, "film.html")).json()["id"]
    headers = (await client.get(f"/v1/files/{id}/content")).headers
    assert headers["content-type"] == "application/octet-stream"
    assert headers["content-disposition"].startswith("attachment")
    assert headers["x-content-type-options"] == "nosniff"
    assert "sandbox" in headers["content-security-policy"]


@pytest.mark.subprocess
async def test_a_frame_is_a_jpeg_of_what_is_shown_then(client, film):
    id = (await send(client, film)).json()["id"]
    reply = await client.get(f"/v1/files/{id}/frame", params={"time": 2.2, "width": 32})
    assert reply.headers["content-type"] == "image/jpeg"
    picture = Image.open(io.BytesIO(reply.content))
    assert picture.size == (32, 24)
    assert abs(picture.convert("L").getpixel((16, 12)) - 90) < 12  # number 4 of `greys`
    again = await client.get(f"/v1/files/{id}/frame", params={"time": 2.2, "width": 32})
    assert again.content == reply.content
    late = await client.get(f"/v1/files/{id}/frame", params={"time": 99})
    assert late.status_code == 400
    assert "past the end" in late.json()["error"]["message"]


@pytest.mark.parametrize("query", [{"time": "-1"}, {"time": "nan"}, {"width": "9"}, {"width": "100000"}, {"time": "x"}])
async def test_a_frame_that_cannot_be_is_refused(client, query):
    assert (await client.get("/v1/files/file-x/frame", params=query)).status_code in (400, 422)


@pytest.mark.parametrize("id", ["file-none", "..%2F..%2Fetc%2Fpasswd", "%00", "lock"])
async def test_unknown_ids_are_not_found(client, id):
    for rest in ("", "/content", "/frame"):
        assert (await client.get(f"/v1/files/{id}{rest}")).status_code == 404


async def test_one_keys_uploads_are_not_anothers(library, film):
    with library.store.writing("a.mp4") as writer:
        writer.write(film)
        entry = writer.keep("key-a")
    assert library.store.uploads("key-a") == [entry]
    assert library.store.uploads("key-b") == []


def test_what_a_killed_server_left_is_removed_at_the_next_start(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    left = tmp_path / "tieredkv-films-left"
    left.mkdir()
    (left / "lock").touch()
    (left / "film.mp4").touch()
    (tmp_path / "tieredkv-films-link").symlink_to("/etc")
    running = PrivateFolder()
    other = PrivateFolder()
    assert not left.exists()
    assert running.path.exists()
    assert running.path.stat().st_mode & 0o77 == 0
    assert (tmp_path / "tieredkv-films-link").is_symlink()
    running.close()
    other.close()
    assert not running.path.exists()


def test_a_closed_store_takes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    store = Store(1, 1)
    store.open()
    store.close()
    with pytest.raises(ApiError, match="shutting down"), store.writing("a.mp4"):
        pass


async def test_openais_library_uploads_and_deletes(client, film):
    openai = pytest.importorskip("openai")
    theirs = openai.AsyncOpenAI(api_key="none", base_url="http://127.0.0.1:8000/v1", http_client=client)
    found = await theirs.files.create(file=("film.mp4", film), purpose="user_data")
    assert [each.id async for each in theirs.files.list()] == [found.id]
    assert (await theirs.files.content(found.id)).content == film
    assert (await theirs.files.delete(found.id)).deleted
