"""With `skip_damaged`, damaged files give the pictures that are whole, at their true times, and say what is missing."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
from films import KINDS, noise, numbered, numbers, retime, sample, set_length, write

from tieredkv.errors import VideoError
from tieredkv.video.frames import open_video
from tieredkv.video.sampling import Sampling

pytestmark = pytest.mark.files

RATE = 10
"""Frames per second of the films here, of which each picture is shown at a tenth of its number."""


@pytest.fixture(scope="module")
def films(tmp_path_factory) -> dict[str, Path]:
    """Films of 80 numbered pictures, whose key frames come each second."""
    folder = tmp_path_factory.mktemp("films")
    return {kind: write(folder / kind, numbered(80), **{"g": "10", "bf": "0", **KINDS[kind]}) for kind in KINDS}


def packets(path: Path) -> list[tuple[int, int]]:
    """Where in the file each packet of the video is, and its bytes."""
    with av.open(str(path)) as container:
        return [(packet.pos, packet.size) for packet in container.demux(container.streams.video[0]) if packet.size]


def next_key(path: Path, after: int) -> int:
    """The number of the first key frame from packet `after` on."""
    with av.open(str(path)) as container:
        keys = [packet.is_keyframe for packet in container.demux(container.streams.video[0]) if packet.size]
    return keys.index(True, after)


def damaged(path: Path, source: Path, first: int, last: int, data: bytes = b"\xff") -> Path:
    """A copy with `data` in place of the content of the packets from `first` to `last`."""
    stored = bytearray(source.read_bytes())
    with av.open(str(source)) as container:
        contents = [
            (packet.pos, bytes(packet)) for packet in container.demux(container.streams.video[0]) if packet.size
        ]
    for position, content in contents[first : last + 1]:
        at = stored.index(content, position)  # some containers' heads count as the packet's
        stored[at : at + len(content)] = data * len(content)
    path.write_bytes(stored)
    return path


def zeroed(path: Path, source: Path, first: int, last: int) -> Path:
    """A copy with zeros from the packet `first` to the end of `last`, where there is more than their contents."""
    stored, places = bytearray(source.read_bytes()), packets(source)
    begin, end = places[first][0], sum(places[last])
    stored[begin:end] = bytes(end - begin)
    path.write_bytes(stored)
    return path


def salvaged(path: Path, fps: float = RATE, **options) -> tuple[list[int], list[tuple[float, float]]]:
    """Which pictures are shown, and which seconds are said to be missing."""
    source = open_video(path, Sampling(fps, skip_damaged=True, **options))
    shown = numbers(source.frames())
    return shown, [(round(begin, 2), round(end, 2)) for begin, end in source.damaged]


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_file_is_read_as_without(films, kind):
    assert salvaged(films[kind]) == (numbers(sample(films[kind], RATE)), [])


@pytest.mark.parametrize("kind", ["faststart.mp4", "cut.mkv", "cut.avi", "cut.webm"])
def test_the_picture_before_is_shown_up_to_the_next_whole_one_and_times_stay_true(tmp_path, films, kind):
    """Packets 33 to 36 are lost, and with them what builds on them, up to the next key frame."""
    shown, missing = salvaged(damaged(tmp_path / kind, films[kind], 33, 36))
    key = next_key(films[kind], 37)
    assert shown == [*range(33), *[32] * (key - 33), *range(key, 80)]
    assert missing == [(3.3, key / RATE)]


@pytest.mark.parametrize("kind", ["faststart.mp4", "cut.mkv", "cut.ts", "cut.avi", "cut.webm"])
def test_a_zeroed_stretch_is_missing_whatever_it_hides(tmp_path, films, kind):
    """With it the container loses packets without a word, and more of them than were there."""
    shown, missing = salvaged(zeroed(tmp_path / kind, films[kind], 33, 36))
    if kind == "cut.ts":
        assert missing.pop(0) == (3.1, 3.2)  # its end is between those of other packets
        shown[31] = 31
    ((first, last),) = missing
    assert 3.1 <= first <= 3.3
    assert 3.7 <= last <= 6.1
    begin, end = round(first * RATE), round(last * RATE)
    assert shown == [*range(begin), *[begin - 1] * (end - begin), *range(end, 80)]


@pytest.mark.parametrize("kind", ["faststart.mp4", "cut.mkv", "cut.ts", "cut.avi", "cut.webm"])
@pytest.mark.parametrize("seed", range(3))
def test_flipped_bytes_move_no_picture_that_is_shown_as_whole(tmp_path, films, kind, seed):
    """Whatever is not said to be missing shows its own picture, or one that the decoder takes for whole."""
    stored, random = bytearray(films[kind].read_bytes()), np.random.default_rng(seed)
    begin, end = packets(films[kind])[20][0], sum(packets(films[kind])[50])
    for at in random.integers(begin, end, 20):
        stored[at] ^= int(random.integers(1, 256))
    path = tmp_path / kind
    path.write_bytes(stored)
    shown, missing = salvaged(path)
    assert len(shown) == 80
    assert shown[:20] == list(range(20))
    assert shown[62:] == list(range(62, 80))
    assert all(first >= 1.9 and last <= 6.2 for first, last in missing)


@pytest.mark.parametrize("kind", ["faststart.mp4", "cut.mkv", "cut.avi", "cut.webm"])
def test_a_file_that_is_cut_short_ends_early_and_says_what_is_missing(tmp_path, films, kind):
    path = tmp_path / kind
    path.write_bytes(films[kind].read_bytes()[: packets(films[kind])[40][0]])
    with pytest.raises(VideoError, match=r"decoding stopped .* go over what is damaged with skip_damaged"):
        sample(path, RATE)
    shown, missing = salvaged(path)
    assert shown == pytest.approx(list(range(len(shown))))
    assert 38 <= len(shown) <= 41
    assert missing == [(len(shown) / RATE, 8.0)]


def test_the_length_is_known_before_anything_is_decoded(tmp_path, films):
    """A model is told how many frames there are, and plans count them."""
    path = tmp_path / "cut.mkv"
    path.write_bytes(films["cut.mkv"].read_bytes()[: packets(films["cut.mkv"])[40][0]])
    source = open_video(path, Sampling(RATE, skip_damaged=True, max_frames=20))
    assert (source.expected, source.seconds, source.fps) == (20, pytest.approx(4.0), pytest.approx(5.0))
    assert numbers(source.frames()) == list(range(0, 40, 2))


@pytest.mark.parametrize("kind", ["faststart.mp4", "cut.mkv", "cut.avi"])
def test_a_damaged_end_shows_the_last_whole_picture(tmp_path, films, kind):
    """The packets are there, so the length is."""
    shown, missing = salvaged(damaged(tmp_path / kind, films[kind], 74, 79))
    assert shown == [*range(74), *[73] * 6]
    assert missing == [(7.4, 8.0)]


def test_a_damaged_beginning_is_missing_up_to_the_first_whole_picture(tmp_path, films):
    path = damaged(tmp_path / "v.mp4", films["faststart.mp4"], 0, 3)
    shown, missing = salvaged(path)
    key = next_key(path, 4)
    assert shown == list(range(key, 80))
    assert missing == [(0.0, key / RATE)]


def test_only_what_is_sampled_counts_as_missing(tmp_path, films):
    path = damaged(tmp_path / "v.mp4", films["faststart.mp4"], 33, 36)
    assert salvaged(path, start=5.0) == (list(range(50, 80)), [])
    assert salvaged(path, end=3.0) == (list(range(30)), [])
    key = next_key(path, 37)
    assert salvaged(path, start=3.5, end=6) == ([32] * (key - 35) + list(range(key, 60)), [(3.5, key / RATE)])


def test_one_lost_picture_costs_no_other_where_each_stands_alone(tmp_path):
    film = write(tmp_path / "whole.avi", numbered(40), "mjpeg", pixels="yuvj420p")
    shown, missing = salvaged(damaged(tmp_path / "v.avi", film, 20, 20))
    assert shown == [*range(20), 19, *range(21, 40)]
    assert missing == [(2.0, 2.1)]


def test_pictures_that_were_stored_before_ones_shown_earlier(tmp_path):
    """With B-frames the order of packets is not that of pictures."""
    film = write(tmp_path / "whole.mp4", numbered(80), g="10", bf="2")
    shown, missing = salvaged(damaged(tmp_path / "v.mp4", film, 33, 35))
    true = list(range(80))
    assert shown[:31] == true[:31]
    assert shown[40:] == true[40:]
    for place, picture in enumerate(shown):
        stated = any(first - 1e-6 <= place / RATE < last - 1e-6 for first, last in missing)
        assert (picture == place) or stated


def test_a_picture_that_the_decoder_would_guess_is_left_out(tmp_path):
    """A decoder for players shows what it can make of it."""
    film = write(tmp_path / "whole.avi", noise(20), "mjpeg", pixels="yuvj420p")
    stored = bytearray(film.read_bytes())
    position, size = packets(film)[7]
    stored[position + size // 2 : position + size // 2 + 100] = b"\xff\x00" * 50
    path = tmp_path / "v.avi"
    path.write_bytes(stored)
    assert len(sample(path, RATE)) == 20
    source = open_video(path, Sampling(RATE, skip_damaged=True))
    pictures = list(source.frames())
    assert [(round(begin, 2), round(end, 2)) for begin, end in source.damaged] == [(0.7, 0.8)]
    assert (pictures[7] == pictures[6]).all()


def test_pictures_before_a_key_frame_may_build_on_what_is_lost(tmp_path):
    """In an open group, pictures that are stored after the key frame and shown before it."""
    params = {"x264-params": "open-gop=1:scenecut=0:b-adapt=0:keyint=9:min-keyint=1"}
    film = write(tmp_path / "whole.mkv", noise(40), bf="2", **params)
    with av.open(str(film)) as container:
        stored = [packet for packet in container.demux(container.streams.video[0]) if packet.size]
    key = next(i for i, packet in enumerate(stored) if i > 12 and packet.is_keyframe)
    assert stored[key + 1].pts < stored[key].pts
    reference = max(i for i in range(key) if not stored[i].is_disposable)
    source = open_video(damaged(tmp_path / "v.mkv", film, reference, reference), Sampling(RATE, skip_damaged=True))
    list(source.frames())
    assert max(end for _, end in source.damaged) == pytest.approx(float(stored[key].pts * stored[key].time_base))


def test_frames_without_times_are_counted_though_some_are_lost(tmp_path):
    film = write(tmp_path / "whole.h264", numbered(40), format="h264", rate=RATE, g="10", bf="0")
    stored = bytearray(film.read_bytes())
    starts = [at for at in range(len(stored) - 4) if stored[at : at + 4] in (b"\0\0\0\1", b"\0\0\1\x41", b"\0\0\1\x65")]
    middle = starts[len(starts) // 2]
    stored[middle + 6 : middle + 30] = b"\xff" * 24
    path = tmp_path / "v.h264"
    path.write_bytes(stored)
    shown, missing = salvaged(path, fps=RATE)
    assert shown[-5:] == [35, 36, 37, 38, 39]
    assert len(missing) <= 1


def test_a_damaged_timestamp_is_gone_over(tmp_path, films):
    source = write(tmp_path / "source.mkv", numbered(40), bf="0", g="5")
    path = retime(tmp_path / "v.mkv", source, [5000 if i == 20 else i / 10 for i in range(40)])
    set_length(path, b"00:00:04.000000000")
    with pytest.raises(VideoError, match="decoding stopped"):
        sample(path, RATE)
    shown, missing = salvaged(path)
    assert shown == [*range(20), 19, *range(21, 40)]
    assert missing == [(2.0, 2.1)]


@pytest.mark.parametrize("content", [b"", b"no film at all " * 100])
def test_a_file_with_nothing_to_read_is_refused(tmp_path, content):
    path = tmp_path / "v.mkv"
    path.write_bytes(content)
    with pytest.raises(VideoError, match=r"v\.mkv"):
        open_video(path, Sampling(1, skip_damaged=True))


def test_a_film_without_a_whole_picture_is_refused(tmp_path, films):
    path = damaged(tmp_path / "v.mp4", films["faststart.mp4"], 0, 79)
    with pytest.raises(VideoError, match=r"v\.mp4: its video stream has no frame"):
        open_video(path, Sampling(1, skip_damaged=True))


def test_skip_damaged_is_true_or_false():
    with pytest.raises(VideoError, match="skip_damaged='yes' is not valid: give True or False"):
        Sampling(1, skip_damaged="yes")
