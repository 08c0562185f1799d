"""Files made to read other files, to reach the network or to use up the machine: each is one sentence, soon."""

from __future__ import annotations

import socket
import struct
import subprocess
import sys
import time
import zlib
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
from films import greys, noise, write
from media_examples import SHORT, opened
from PIL import Image

from tieredkv.errors import VideoError
from tieredkv.video.container import video_streams

pytestmark = [pytest.mark.subprocess, pytest.mark.files]


@pytest.fixture
def listener():
    """A server of this machine that nobody should connect to: its port."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()


PLAYLISTS = {
    "hls.mp4": "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{film}\n#EXT-X-ENDLIST\n",
    "hls of http.mp4": "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nhttp://127.0.0.1:{port}/a.ts\n#EXT-X-ENDLIST\n",
    "hls.m3u8": "\n#EXTM3U\n#EXTINF:9,\nfile://{film}\n",
    "concat.ffconcat": "ffconcat version 1.0\nfile '{film}'\n",
    "dash.mpd": '<?xml version="1.0"?><MPD><Period><BaseURL>{film}</BaseURL></Period></MPD>',
    "stream.sdp": "v=0\nc=IN IP4 127.0.0.1\nm=video {port} RTP/AVP 96\na=rtpmap:96 H264/90000\n",
    "reference.mp4": "concat:{film}|{film}",
    "graph.lavfi": "movie={film}",
}


@pytest.mark.parametrize("name", PLAYLISTS)
def test_a_playlist_opens_nothing(whole, tmp_path, listener, name):
    path = tmp_path / name
    path.write_text(PLAYLISTS[name].format(film=whole["cut.ts"], port=listener))
    with pytest.raises(VideoError, match=r"playlist|not a readable video"):
        opened(path, fps=1.0)


def test_a_playlist_with_a_film_in_front_opens_nothing(whole, tmp_path):
    """FFmpeg takes for a playlist what has one anywhere in its beginning."""
    path = tmp_path / "film.m3u8"
    path.write_bytes(b"\0" * 600 + PLAYLISTS["hls.mp4"].format(film=whole["cut.ts"]).encode())
    with pytest.raises(VideoError, match="not a readable video"):
        opened(path, fps=1.0)


@pytest.mark.parametrize("name", ["hls of http.mp4", "stream.sdp"])
def test_the_command_line_opens_no_network_for_a_file_either(tmp_path, listener, name):
    path = tmp_path / name.replace(".mp4", ".m3u8")
    path.write_text(PLAYLISTS[name].format(film="", port=listener))
    with pytest.raises(VideoError, match="not a readable video"):
        video_streams(path)


def test_a_pattern_in_a_name_is_a_name(tmp_path):
    for number in range(3):
        Image.fromarray(greys(3, 48, 64)[number]).save(tmp_path / f"a{number}.png")
    path = tmp_path / "a%01d.png"
    path.write_bytes(b"nothing")
    with pytest.raises(VideoError, match="not a readable video"):
        opened(path, fps=1.0)


def test_many_hundred_streams_are_refused(tmp_path):
    content = write(tmp_path / "one.avi", noise(3), codec="mpeg4").read_bytes()
    at = content.index(b"strl") - 8
    stream = content[at : at + 8 + struct.unpack_from("<I", content, at + 4)[0]]
    more = stream * 900
    head = content.index(b"hdrl") - 4
    sizes = {4: len(content) - 8 + len(more), head: struct.unpack_from("<I", content, head)[0] + len(more)}
    grown = bytearray(content[:at] + more + content[at:])
    for where, size in sizes.items():
        struct.pack_into("<I", grown, where, size)
    path = tmp_path / "streams.avi"
    path.write_bytes(grown)
    with av.open(str(path)) as container:
        assert len(container.streams) > 800
    begun = time.monotonic()
    with pytest.raises(VideoError, match=r"at least 64 streams|more than 64 streams"):
        opened(path, fps=1.0)
    assert time.monotonic() - begun < 5


def png(path: Path, width: int, height: int) -> Path:
    """A valid PNG of one colour, written row by row: a few hundred bytes for each million pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    squeeze = zlib.compressobj(9)
    row = bytes(1 + (width + 7) // 8)
    rows = b"".join([squeeze.compress(row) for _ in range(height)]) + squeeze.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b""))
    return path


@pytest.mark.parametrize("kind", ["video", "image"])
def test_a_picture_of_a_billion_pixels_is_refused(tmp_path, kind):
    path = png(tmp_path / "bomb.png", 32_000, 32_000)
    assert path.stat().st_size < 2**18
    begun = time.monotonic()
    with pytest.raises(VideoError, match=r"pixels|not a readable video"):
        opened(path, kind, fps=1.0)
    assert time.monotonic() - begun < 5


def test_a_film_that_states_a_huge_picture_is_refused(tmp_path):
    """The size is in the file's header and in no picture."""
    film = write(tmp_path / "film.avi", noise(3), codec="mjpeg", pixels="yuvj420p")
    content = bytearray(film.read_bytes())
    at = content.index(b"strf") + 8
    content[at + 4 : at + 12] = struct.pack("<ii", 60_000, 60_000)
    film.write_bytes(bytes(content))
    try:
        source = opened(film, fps=1.0)
    except VideoError:
        return
    assert (source.width, source.height) == (64, 48)


def test_pixels_that_are_shown_wide_count_as_they_are_shown(tmp_path):
    path = tmp_path / "wide.mkv"
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=10)
        video.width, video.height, video.pix_fmt = 640, 480, "yuv420p"
        video.codec_context.sample_aspect_ratio = 9
        container.mux(video.encode(av.VideoFrame.from_ndarray(greys(1, 480, 640)[0], format="rgb24")))
        container.mux(video.encode())
    with pytest.raises(VideoError, match="5760x480, more than the 1,000,000 pixels"):
        opened(path, limits=replace(SHORT, pixels=1_000_000), fps=1.0)


def test_a_film_that_says_it_lasts_forever_is_refused(tmp_path):
    path = write(tmp_path / "long.mkv", noise(3))
    from films import set_length

    set_length(path, b"99:00:00.000000000")
    with pytest.raises(VideoError, match=r"99\.0 hours, longer than the 12"):
        opened(path, fps=1.0)


@pytest.mark.parametrize("seed", range(4))
def test_damaged_bytes_end_in_one_sentence_or_in_pictures(whole, tmp_path, seed):
    random = np.random.default_rng(seed)
    name = ["plain.mp4", "cut.mkv", "cut.ts", "cut.avi"][seed]
    content = np.frombuffer(whole[name].read_bytes(), np.uint8).copy()
    where = random.integers(0, len(content), 200)
    content[where] = random.integers(0, 256, 200)
    path = tmp_path / name
    path.write_bytes(content.tobytes())
    said = "."
    try:
        for picture in opened(path, fps=2.0).frames():
            assert picture.shape == (32, 48, 3)
    except VideoError as error:
        said = str(error)
    assert len(said.splitlines()) == 1


def test_the_processes_environment_holds_no_secrets(whole, tmp_path, monkeypatch):
    from tieredkv.serve.media import child

    monkeypatch.setenv("TIEREDKV_API_KEY", "secret")
    monkeypatch.setenv("HF_TOKEN", "secret")
    out = tmp_path / "environment"
    script = f"import os; open({str(out)!r}, 'w').write(repr(dict(os.environ)))"
    monkeypatch.setattr(child, "COMMAND", (sys.executable, "-c", script))
    with pytest.raises(VideoError, match="ended with code 0"):
        opened(whole["plain.mp4"], fps=1.0)
    assert "secret" not in out.read_text()


def test_the_process_ends_with_the_one_that_asked(whole, tmp_path):
    script = f"""
import os
from tieredkv.serve.media.child import Child
from tieredkv.serve.media.limits import Limits
film = {str(whole["plain.mp4"])!r}
request = dict(name="film", path=film, kind="video", sampling=dict(fps=1.0))
print(Child(os.open(film, os.O_RDONLY), request, Limits()).pid, flush=True)
os._exit(0)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    pid = int(done.stdout)
    until = time.monotonic() + 5
    while time.monotonic() < until:
        try:
            if Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":
                break
        except OSError:
            break
        time.sleep(0.02)
    else:
        pytest.fail("it is still there")
