"""`file:` URLs reach the films below one folder, and nothing else however they are written."""

from __future__ import annotations

import os
import threading

import pytest

from tieredkv.errors import VideoError
from tieredkv.serve.errors import ApiError
from tieredkv.serve.media.folder import Folder
from tieredkv.serve.media.library import Library
from tieredkv.serve.settings import Settings


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "videos"
    (root / "inner").mkdir(parents=True)
    (root / "film one.mp4").write_bytes(b"one")
    (root / "inner" / "two.mp4").write_bytes(b"two")
    (tmp_path / "secret.mp4").write_bytes(b"secret")
    (tmp_path / "videos-other").mkdir()
    (tmp_path / "videos-other" / "three.mp4").write_bytes(b"three")
    return root


def refusal(root, url) -> ApiError:
    with pytest.raises(ApiError) as refused:
        Folder(root).find(url)
    assert refused.value.status == 403
    return refused.value


def test_films_below_the_folder_are_found(root):
    folder = Folder(root)
    assert folder.find(f"file://{root}/film%20one.mp4") == (root / "film one.mp4", "film one.mp4")
    assert folder.find(f"file://localhost{root}/inner/two.mp4")[1] == "inner/two.mp4"
    assert folder.find("file:inner/../film one.mp4")[1] == "film one.mp4"


def test_without_a_folder_there_are_none(root):
    assert "--videos" in str(refusal(None, f"file://{root}/film%20one.mp4"))


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "file:///etc/no-such-file",
        "file://{root}/../secret.mp4",
        "file://{root}/inner/../../secret.mp4",
        "file://{root}/%2e%2e/secret.mp4",
        "file://{root}/..%2Fsecret.mp4",
        "file:../secret.mp4",
        "file:inner/../../secret.mp4",
        "file://{root}-other/three.mp4",
        "file:///proc/self/environ",
        "file:///dev/zero",
        "file://{root}",
        "file://{root}/inner/..",
    ],
)
def test_outside_is_refused_in_the_same_words_whether_it_exists_or_not(root, url):
    assert "does not point below the folder" in str(refusal(root, url.format(root=root)))


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("file://other.example/film.mp4", "of another host"),
        ("file:///videos/a.mp4?b", "%3F"),
        ("file:///videos/a.mp4#b", "%3F"),
        ("file:", "names no file"),
        ("file:///a%00b", "names no file"),
        ("file://[", "is no file: URL"),
    ],
)
def test_urls_that_are_none_are_one_sentence(root, url, words):
    assert words in str(refusal(root, url))


def test_a_link_to_a_film_outside_is_refused(root, tmp_path):
    (root / "link.mp4").symlink_to(tmp_path / "secret.mp4")
    (root / "out").symlink_to(tmp_path)
    refusal(root, "file:link.mp4")
    refusal(root, "file:out/secret.mp4")


def test_a_link_to_a_film_inside_is_followed(root):
    (root / "link.mp4").symlink_to("inner/two.mp4")
    assert Folder(root).find("file:link.mp4")[0] == root / "inner" / "two.mp4"


def test_the_folder_itself_may_be_a_link(root, tmp_path):
    (tmp_path / "alias").symlink_to(root)
    assert Folder(tmp_path / "alias").find(f"file://{tmp_path}/alias/film%20one.mp4")[1] == "film one.mp4"


def test_hidden_files_are_refused(root):
    (root / ".hidden").mkdir()
    (root / ".hidden" / "a.mp4").write_bytes(b"a")
    (root / "seen.mp4").symlink_to(".hidden/a.mp4")
    assert "hidden" in str(refusal(root, "file:.hidden/a.mp4"))
    assert "hidden" in str(refusal(root, "file:seen.mp4"))


def examine(folder, url):
    path, name = folder.find(url)
    return folder.examine(path, name, threading.Event())


@pytest.mark.parametrize("name", ["film one.mp4", "inner/two.mp4"])
def test_a_film_swapped_for_a_link_after_it_was_found_is_not_read(root, tmp_path, name):
    folder = Folder(root)
    path, shown = folder.find(f"file:{name}")
    path.unlink()
    path.symlink_to(tmp_path / "secret.mp4")
    with pytest.raises(VideoError, match="no such file"):
        folder.examine(path, shown, threading.Event())


def test_a_folder_swapped_for_a_link_after_a_film_was_found_is_not_entered(root, tmp_path):
    folder = Folder(root)
    path, shown = folder.find("file:inner/two.mp4")
    (tmp_path / "two.mp4").write_bytes(b"secret")
    (root / "inner").rename(root / "moved")
    (root / "inner").symlink_to(tmp_path)
    with pytest.raises(VideoError, match="no such file"):
        folder.examine(path, shown, threading.Event())


def test_pipes_folders_and_what_is_not_there_are_refused_at_once(root):
    os.mkfifo(root / "pipe.mp4")
    folder = Folder(root)
    for url, words in (("file:pipe.mp4", "not a regular"), ("file:inner", "not a regular"), ("file:no.mp4", "no such")):
        with pytest.raises(VideoError, match=words):
            examine(folder, url)


def test_a_film_is_hashed_again_only_if_it_changed(root, monkeypatch):
    from tieredkv.serve.media import folder as module

    calls = []
    hashed = module.hashed
    monkeypatch.setattr(module, "hashed", lambda *given: calls.append(1) or hashed(*given))
    folder = Folder(root)
    first = examine(folder, "file:film one.mp4")
    assert examine(folder, "file:film one.mp4") == first
    assert len(calls) == 1
    (root / "film one.mp4").write_bytes(b"another")
    assert examine(folder, "file:film one.mp4")[0] != first[0]
    assert len(calls) == 2


async def test_the_library_reads_films_below_the_folder(whole, tmp_path):
    root = tmp_path / "videos"
    root.mkdir()
    (root / "film.mp4").write_bytes(whole["plain.mp4"].read_bytes())
    library = Library(Settings(videos=root))
    film = await library.film(url="file:film.mp4", uuid="mine", client="a")
    assert (film.path, film.name) == (root / "film.mp4", "film.mp4")
    assert await library.film(url=None, uuid="mine", client="a") == film
    with pytest.raises(ApiError, match="no film is known as"):
        await library.film(url=None, uuid="mine", client="b")
    for url in ("ftp://example.org/a.mp4", "concat:a|b", "/etc/passwd", "../a.mp4", "rtsp://example.org/", "file-none"):
        with pytest.raises(ApiError):
            await library.film(url=url)
