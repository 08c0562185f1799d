"""A film decoded in another process gives what it gives in this one, and a process that misbehaves is ended."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from films import greys, noise, with_sound, write
from media_examples import SHORT, identity_of, opened, shown
from PIL import Image

from tieredkv.errors import VideoError
from tieredkv.serve.media import child as child_module
from tieredkv.serve.media import guarded as guarded_module
from tieredkv.serve.media.guarded import GuardedVideo, Sealed
from tieredkv.serve.media.limits import Limits
from tieredkv.video.media import Picture, Video, media_of
from tieredkv.video.sampling import FileSource, Sampling

pytestmark = [pytest.mark.subprocess, pytest.mark.files]

FACTS = ("height", "width", "fps", "start", "expected", "seconds", "cues", "damaged")


def facts(source):
    return {name: getattr(source, name) for name in FACTS}


def assert_same(path, **sampling):
    here, there = FileSource(path, Sampling(**sampling)), opened(path, **sampling)
    frames = list(here.frames())
    seen = list(there.frames())
    assert facts(there) == facts(here)
    assert len(seen) == len(frames) > 0
    assert all(np.array_equal(one, other) for one, other in zip(seen, frames, strict=True))
    return here, there


@pytest.mark.parametrize("kind", ["faststart.mp4", "cut.mkv", "cut.ts", "cut.avi", "cut.webm"])
def test_frames_and_times_are_those_of_this_process(whole, kind):
    assert_same(whole[kind], fps=3.0)


def test_a_part_of_a_film_with_sound_that_begins_first(tmp_path):
    path = with_sound(tmp_path / "sound.mp4", greys(8, 48, 64), 0.75)
    here, _ = assert_same(path, fps=4.0, end=2.0)
    assert here.start == 0.75


def test_few_frames_of_a_long_span(whole):
    assert_same(whole["plain.mp4"], fps=10.0, max_frames=7, start=1.0)


def test_a_damaged_film_is_gone_over(whole, tmp_path):
    content = whole["cut.mkv"].read_bytes()
    path = tmp_path / "torn.mkv"
    path.write_bytes(content[: len(content) // 2])
    _, there = assert_same(path, fps=2.0, skip_damaged=True)
    assert there.damaged


def test_a_damaged_film_is_refused_in_the_same_words(whole, tmp_path):
    content = whole["cut.mkv"].read_bytes()
    path = tmp_path / "torn.mkv"
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(VideoError) as here:
        list(FileSource(path, Sampling(fps=2.0)).frames())
    with pytest.raises(VideoError) as there:
        list(opened(path, fps=2.0).frames())
    assert str(there.value) == str(here.value).replace(str(path), path.name)


def test_frames_can_be_read_again_and_from_any_on(whole):
    source = opened(whole["plain.mp4"], fps=2.0)
    frames = list(source.frames())
    later = list(source.frames(first=30))
    assert len(later) == len(frames) - 30
    assert np.array_equal(later[0], frames[30])


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tiff", "gif", "bmp"])
def test_a_picture_is_that_of_this_process(tmp_path, suffix):
    path = tmp_path / f"picture.{suffix}"
    Image.fromarray(noise(1)[0]).save(path)
    here, there = Picture(path).open(Sampling()), opened(path, "image")
    assert facts(there) == facts(here)
    assert np.array_equal(*(next(iter(source.frames())) for source in (here, there)))


def test_a_film_of_a_request_is_one_medium_which_states_its_hash(whole):
    one = shown(whole["plain.mp4"], fps=2.0)
    medium = GuardedVideo(Sealed(one.film, None, SHORT), one.sampling)
    assert media_of(medium) == (medium,)
    assert medium.sampling(Sampling(fps=1.0)).fps == 2.0
    assert opened(whole["plain.mp4"], fps=2.0).sha256() == one.film.sha256


def test_the_film_cannot_be_opened_in_this_process(whole):
    one = shown(whole["plain.mp4"])
    with pytest.raises(VideoError, match="type Sealed"):
        Video(GuardedVideo(Sealed(one.film, None, SHORT), one.sampling).source).check()


def test_subtitles_of_another_file_are_refused(whole):
    with pytest.raises(VideoError, match="the film's own"):
        opened(whole["plain.mp4"], subtitles="/etc/passwd")


def test_the_decoder_imports_no_torch():
    script = (
        "import sys, tieredkv.serve.media.decoder; print('torch' in sys.modules, 'tieredkv.session' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.split() == ["False", "False"], done.stderr


def test_reading_tells_how_far_it_is_and_can_be_stopped(whole):
    source, seen = opened(whole["plain.mp4"], fps=10.0), []

    def tick(seconds: float) -> None:
        seen.append(seconds)
        raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        list(source.frames(tick))
    assert seen


def test_a_session_over_it_is_the_session_over_the_film(video_model, processor, short_video):
    import tieredkv

    options = {"processor": processor, "fps": 1.0, "end": 8.0, "gpu_kv_gb": 0.5}
    one = shown(short_video)
    medium = guarded_module.guarded(one, identity_of(short_video), SHORT)
    answers = []
    for film in (short_video, medium):
        with tieredkv.open_session(video_model, film, **options) as session:
            answers.append(session.ask("what ?", max_new_tokens=4).token_ids)
    assert answers[0] == answers[1]


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_no_process_stays(whole, monkeypatch):
    pids = []
    start = child_module.Child.__init__

    def noted(self, *args, **options):
        start(self, *args, **options)
        pids.append(self.pid)

    monkeypatch.setattr(child_module.Child, "__init__", noted)
    source = opened(whole["plain.mp4"], fps=2.0)
    frames = source.frames()
    next(frames)
    frames.close()  # in the middle
    unread = opened(whole["plain.mp4"], fps=2.0)
    del unread
    assert len(pids) == 2
    assert not any(map(alive, pids))


def test_two_may_read_at_once(whole):
    source, counts = opened(whole["plain.mp4"], fps=5.0), []
    threads = [threading.Thread(target=lambda: counts.append(len(list(source.frames())))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counts == [100, 100]


def test_a_file_that_was_replaced_is_not_read(whole, tmp_path):
    path = tmp_path / "film.mp4"
    path.write_bytes(whole["plain.mp4"].read_bytes())
    source = opened(path, fps=2.0)
    path.unlink()
    path.write_bytes(whole["faststart.mp4"].read_bytes())
    with pytest.raises(VideoError, match="has changed since"):
        list(source.frames())
    with pytest.raises(VideoError, match="has changed since"):
        source.sha256()


def test_a_file_that_became_a_link_is_not_read(whole, tmp_path):
    path = tmp_path / "film.mp4"
    path.write_bytes(whole["plain.mp4"].read_bytes())
    medium = guarded_module.guarded(shown(path, fps=2.0), identity_of(path), SHORT)
    path.unlink()
    path.symlink_to("/etc/passwd")
    with pytest.raises(VideoError, match="no such file"):
        medium.open(Sampling())


# ---- a process that misbehaves

HANGS = "import sys, time; sys.stdin.readline(); time.sleep(60)"
DRIPS = (
    "import sys, time; sys.stdin.readline()\nwhile 1: sys.stdout.buffer.write(b'h'); sys.stdout.flush(); time.sleep(.2)"
)
LIES = "import sys, struct; sys.stdout.buffer.write(struct.pack('<cI', b'h', 2**32 - 1) + b'x' * 100)"
NONSENSE = "import sys, struct; sys.stdout.buffer.write(struct.pack('<cI', b'h', 2) + b'[]'); sys.stdout.flush()"
DIES = "import os; os.abort()"
WORKS = "import os, signal; os.kill(os.getpid(), signal.SIGXCPU)"


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (HANGS, "did nothing for 0.5 s"),
        (DRIPS, "did nothing for 0.5 s"),
        (LIES, "nonsense"),
        (NONSENSE, "nonsense"),
        (DIES, "ended by signal 6"),
        (WORKS, "more processor time than one film may"),
    ],
)
def test_a_process_that_misbehaves_is_one_sentence(whole, monkeypatch, script, words):
    monkeypatch.setattr(child_module, "COMMAND", (sys.executable, "-c", script))
    begun = time.monotonic()
    with pytest.raises(VideoError, match=words):
        opened(whole["plain.mp4"], limits=Limits(patience_s=0.5), fps=2.0)
    assert time.monotonic() - begun < 5


def test_a_process_that_hangs_in_the_middle_is_ended(whole, monkeypatch):
    facts = '{"height":2,"width":2,"fps":1,"start":0,"expected":3,"seconds":3,"cues":[]}'
    script = f"""
import sys, struct, time
def send(kind, content): sys.stdout.buffer.write(struct.pack('<cI', kind, len(content)) + content); sys.stdout.flush()
sys.stdin.readline(); send(b'h', {facts.encode()!r}); sys.stdin.readline(); send(b'f', bytes(12)); time.sleep(60)"""
    monkeypatch.setattr(child_module, "COMMAND", (sys.executable, "-c", script))
    source = opened(whole["plain.mp4"], limits=Limits(patience_s=0.5), fps=1.0)
    frames = source.frames()
    assert next(frames).shape == (2, 2, 3)
    with pytest.raises(VideoError, match="did nothing"):
        next(frames)


def test_waiting_can_be_stopped(whole, monkeypatch):
    monkeypatch.setattr(child_module, "COMMAND", (sys.executable, "-c", HANGS))

    def check() -> None:
        raise KeyError("stop")

    medium = guarded_module.guarded(shown(whole["plain.mp4"], fps=1.0), identity_of(whole["plain.mp4"]), SHORT)
    begun = time.monotonic()
    with pytest.raises(KeyError, match="stop"):
        medium.open(Sampling(), check)
    assert time.monotonic() - begun < 3


# ---- films that cost too much


def test_large_pictures_are_refused(tmp_path):
    path = write(tmp_path / "large.mp4", greys(2, 480, 640))
    with pytest.raises(VideoError, match=r"pictures of 640x480, more than the 100,000 pixels"):
        opened(path, limits=replace(SHORT, pixels=100_000), fps=1.0)


def test_long_films_are_refused(whole):
    with pytest.raises(VideoError, match="longer than the"):
        opened(whole["plain.mp4"], limits=replace(SHORT, seconds=10.0), fps=1.0)
    assert opened(whole["plain.mp4"], limits=replace(SHORT, seconds=10.0), fps=1.0, end=9.0).expected == 9


def test_many_frames_are_refused(whole):
    with pytest.raises(VideoError, match="200 frames, where 100 may be taken: lower fps"):
        opened(whole["plain.mp4"], limits=replace(SHORT, frames=100), fps=10.0)
    with pytest.raises(VideoError, match="more than 20 frames: give an end"):
        list(opened(whole["plain.mp4"], limits=replace(SHORT, decoded=20), fps=10.0).frames())


def test_memory_is_limited(tmp_path):
    path = write(tmp_path / "film.mp4", greys(3, 2160, 3840), preset="ultrafast")
    with pytest.raises(VideoError, match=r"film\.mp4"):
        list(opened(path, limits=replace(SHORT, memory=300 * 2**20), fps=10.0).frames())


def test_a_picture_bomb_is_refused(tmp_path):
    path = tmp_path / "bomb.png"
    Image.new("1", (20_000, 20_000)).save(path)
    assert path.stat().st_size < 100_000
    with pytest.raises(VideoError, match="more than the 36,000,000 pixels"):
        opened(path, "image")


@pytest.mark.parametrize("content", [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"nonsense", b"<svg/>"])
def test_other_pictures_are_refused(tmp_path, content):
    path = tmp_path / "picture.png"
    path.write_bytes(content)
    with pytest.raises(VideoError, match=r"not a readable picture: give a JPEG"):
        opened(path, "image")
