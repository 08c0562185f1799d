"""A URL is downloaded once, to a file that is removed, if the user allows it; anything else is one sentence."""

from __future__ import annotations

import json
import os
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
from command_line import run
from films import numbers

import tieredkv
from tieredkv.errors import VideoError
from tieredkv.video import download
from tieredkv.video.fetched import fetched
from tieredkv.video.frames import open_video
from tieredkv.video.sampling import Sampling

pytestmark = pytest.mark.files


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """The folder for temporary files, empty at the end of the test."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert os.listdir(folder) == []


@pytest.fixture(scope="module")
def server(steady):
    """A web server: its address, and the requests that came."""
    film, requests, stop = steady.read_bytes(), [], threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requests.append(self.path)
            kind, _, rest = self.path.lstrip("/").partition("/")
            if kind == "to":
                self.send_response(302)
                self.send_header("Location", rest if "://" in rest else f"/{rest}")
                self.end_headers()
                return
            if kind == "status":
                self.send_error(int(rest))
                return
            if kind == "slow":
                stop.wait(20)
                return
            body = {"page": b"<!DOCTYPE html><p>film", "list": b"#EXTM3U\n/etc/passwd", "nothing": b""}.get(kind, film)
            self.send_response(200)
            if kind != "unsized":
                self.send_header("Content-Length", str(len(body) + 1000 * (kind == "short")))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as web:
        web.daemon_threads = True
        thread = threading.Thread(target=web.serve_forever, daemon=True)
        thread.start()
        yield SimpleNamespace(at=f"http://127.0.0.1:{web.server_port}", requests=requests)
        stop.set()
        web.shutdown()


@pytest.mark.parametrize("path", ["film/v.mkv", "unsized/v.mkv", "to/film/v.mkv", "to/to/film/v.mkv", "film/"])
def test_a_url_is_its_file(server, steady, temporary, path):
    with fetched(f"{server.at}/{path}?key=secret", True) as local:
        (folder,) = temporary.iterdir()
        assert folder.stat().st_mode & 0o777 == 0o700
        source, file = open_video(local, Sampling(4)), open_video(steady, Sampling(4))
        assert source.name == f"{server.at}/{path}"
        assert source.sha256() == file.sha256()
        assert numbers(source.frames()) == numbers(file.frames())


def test_the_file_is_removed_with_the_last_reference_to_it(server, temporary):
    source = open_video(download.download(f"{server.at}/film/v.mkv"), Sampling(1))
    assert len(list(source.frames())) == 4
    assert os.listdir(temporary)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("status/404", r"/status/404: the server answers 404 \(Not Found\)"),
        ("status/500", "the server answers 500"),
        ("to/file:///etc/passwd", r"answers 302 \(Found - Redirection to url 'file:///etc/passwd' is not allowed"),
        ("to/ftp://127.0.0.1/film.mp4", "only http and https URLs can be opened, not ftp"),
        ("to/data://text/plain,film", r"answers 302 .* is not allowed"),
        ("short/v.mkv", r"/short/v\.mkv: the download ended after [\d,]+ of [\d,]+ bytes: try again"),
        ("page/v.mkv", "not a video file but a web page or a playlist: give the URL of the file"),
        ("list/v.mkv", "not a video file but a web page or a playlist"),
        ("nothing/v.mkv", "the server sent nothing"),
    ],
)
def test_what_is_no_film_there_is_one_sentence(server, temporary, path, message):
    with pytest.raises(VideoError, match=message):
        download.download(f"{server.at}/{path}")


def test_a_redirect_in_a_circle_ends(server, temporary):
    with pytest.raises(VideoError, match="the server answers 302"):
        download.download(f"{server.at}/" + "to/" * 30 + "film/v.mkv")


def test_a_server_that_sends_nothing_is_given_up(server, temporary, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT_S", 0.2)
    with pytest.raises(VideoError, match=r"/slow/v\.mkv: cannot be downloaded \(nothing came for 0\.2 s\)"):
        download.download(f"{server.at}/slow/v.mkv")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://127.0.0.1:9/v.mkv", r"cannot be downloaded \(Connection refused\)"),
        ("http://127.0.0.1:port/v.mkv", "not a URL|cannot be downloaded"),
        ("http:///v.mkv", "not a URL|cannot be downloaded"),
        ("http://[::1/v.mkv", "not a URL"),
    ],
)
def test_addresses_that_do_not_work_are_one_sentence(temporary, url, message):
    with pytest.raises(VideoError, match=message):
        download.download(url)


def test_a_disk_without_room_is_said_before_the_download(server, temporary, monkeypatch):
    monkeypatch.setattr(download.shutil, "disk_usage", lambda folder: SimpleNamespace(free=100))
    with pytest.raises(VideoError, match=r"has 0 MiB, and .* has 0 MiB free: set TMPDIR"):
        download.download(f"{server.at}/film/v.mkv")


def test_nothing_is_asked_of_a_server_without_leave(server, temporary):
    before = len(server.requests)
    for allow_url in (False, None, "no"):
        with pytest.raises(VideoError, match=r"is a URL, which is downloaded only with allow_url=True \(--allow-url\)"):
            tieredkv.open_session("no model", f"{server.at}/film/v.mkv", allow_url=allow_url)
    with pytest.raises(VideoError, match="allow_url=True"):
        tieredkv.generate("no model", f"{server.at}/film/v.mkv", "what ?")
    with pytest.raises(VideoError, match="allow_url=True"):
        open_video(f"{server.at}/film/v.mkv", Sampling(1))
    assert len(server.requests) == before


@pytest.mark.model
def test_a_session_of_a_url_is_that_of_the_file(video_model, processor, server, steady, temporary, tmp_path):
    url, options = f"{server.at}/film/v.mkv", {"gpu_kv_gb": 1, "fps": 2, "processor": processor}
    with tieredkv.open_session(video_model, url, allow_url=True, **options) as session:
        assert os.listdir(temporary) == []
        answer = session.ask("what ?", max_new_tokens=2)
        session.save(tmp_path / "v.tkv")
    with tieredkv.load_session(tmp_path / "v.tkv", video_model, processor=processor, video=steady) as session:
        assert session.ask("what ?", max_new_tokens=2).token_ids == answer.token_ids
    given = tieredkv.generate(video_model, url, "what ?", allow_url=True, max_new_tokens=2, **options)
    assert given.token_ids == answer.token_ids
    with steady.open("rb") as file:
        given = tieredkv.generate(video_model, file, "what ?", max_new_tokens=2, **options)
    assert given.token_ids == answer.token_ids


@pytest.mark.model
def test_a_plan_takes_urls_among_several_videos(video_model, processor, server, steady, temporary):
    url, options = f"{server.at}/film/v.mkv", {"gpu_kv_gb": 1, "fps": 2, "processor": processor}
    expected = tieredkv.plan(video_model, [steady, steady], **options).prompt_tokens
    for videos in ([steady, url], [tieredkv.Video(url), url]):
        assert tieredkv.plan(video_model, videos, allow_url=True, **options).prompt_tokens == expected
    assert os.listdir(temporary) == []
    with pytest.raises(VideoError, match="allow_url=True"):
        tieredkv.plan(video_model, [steady, url], **options)


@pytest.mark.model
def test_commands_take_urls_with_allow_url(monkeypatch, capsys, server, temporary, tmp_path):
    url, options = f"{server.at}/film/v.mkv", ["-m", "tiny", "--fps", "1", "--max-new-tokens", "2"]
    code, out, err = run(monkeypatch, capsys, "ask", url, "what ?", *options)
    assert (code, out) == (2, "")
    assert "--allow-url" in err
    page = tmp_path / "page.html"
    code, out, err = run(monkeypatch, capsys, "ask", url, "what ?", *options, "--allow-url", "--evidence", str(page))
    assert code == 0, err
    assert "v.mkv" in page.read_text("utf-8")
    questions, answers = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"
    questions.write_text(json.dumps({"video": url, "question": "what ?"}))
    code, _, err = run(monkeypatch, capsys, "run", str(questions), "-o", str(answers), *options, "--allow-url")
    assert code == 0, err
    assert json.loads(answers.read_text())["text"] == out.strip()
    code, _, err = run(monkeypatch, capsys, "run", str(questions), "-o", str(tmp_path / "b.jsonl"), *options)
    assert code == 1
    assert "--allow-url" in (tmp_path / "b.jsonl").read_text()
    code, _, err = run(monkeypatch, capsys, "plan", url, "-m", "tiny", "--fps", "1", "--allow-url")
    assert code == 0, err
    assert not [path for path in tmp_path.rglob("*") if path.name == "video"]
