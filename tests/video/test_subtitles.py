"""Cues are read as players show them, from text tracks and from files of subtitles."""

from __future__ import annotations

import io
from pathlib import Path

import av
import pytest
from films import numbered, with_sound

from tieredkv.errors import VideoError
from tieredkv.video.subtitles import Cue, read_cues, shown_text

pytestmark = pytest.mark.files

ONE = "00:00:01,000 --> 00:00:02,000"
TWO = "00:00:03,000 --> 00:00:04,500"


def srt(*cues: tuple[str, str]) -> str:
    return "".join(f"{number}\n{times}\n{text}\n\n" for number, (times, text) in enumerate(cues, 1))


def read(tmp_path: Path, text: str, name: str = "s.srt", encoding: str = "utf-8") -> list[Cue]:
    path = tmp_path / name
    path.write_bytes(text.encode(encoding))
    return read_cues(path)


def texts(tmp_path: Path, text: str, **options) -> list[str]:
    return [cue.text for cue in read(tmp_path, text, **options)]


# ---- files


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_the_encodings_and_line_ends_of_subtitles(tmp_path, encoding, newline):
    text = srt((ONE, "Café,\nzweite Zeile"), (TWO, "日本")).replace("\n", newline)
    cues = read(tmp_path, text, encoding=encoding)
    assert cues == [Cue(1.0, 2.0, "Café,\nzweite Zeile"), Cue(3.0, 4.5, "日本")]


def test_utf_16_in_the_other_byte_order(tmp_path):
    assert texts(tmp_path, "\ufeff" + srt((ONE, "é")), encoding="utf-16-be") == ["é"]


@pytest.mark.parametrize(
    ("text", "encoding", "what"),
    [("é", "latin-1", "bytes that are not UTF-8"), ("x", "utf-16-le", "a zero byte"), ("\0", "utf-8", "a zero byte")],
)
def test_other_bytes_give_one_error_with_file_and_line(tmp_path, text, encoding, what):
    stored = srt((ONE, "ok"), (TWO, text))
    line = 1 if encoding == "utf-16-le" else 7
    with pytest.raises(VideoError, match=rf"s\.srt: line {line} has {what}: save the subtitles as UTF-8\.$"):
        read(tmp_path, stored, encoding=encoding)


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("<i>He</i> <FONT color='#fff'>said</FONT>", "He said"),
        (r"{\an8}above", "above"),
        ("{sigh} a < b and c > d", "{sigh} a < b and c > d"),
        ("3<4, <unknown>", "3<4, <unknown>"),
        ("&lt;i&gt; R&amp;D&nbsp;&#39;x&hellip;", "<i> R&D 'x…"),
        ("12", "12"),
        ("a\n\nb", "a\nb"),
    ],
)
def test_text_is_what_is_shown(tmp_path, written, shown):
    assert texts(tmp_path, srt((ONE, written))) == [shown]


@pytest.mark.parametrize(
    ("times", "start", "end"),
    [
        ("00:00:01.000 --> 00:00:02.000", 1, 2),
        ("100:00:05,000 --> 100:00:06,250", 360005, 360006.25),
        ("1:00:05,000 --> 1:00:06,000 X1:1 X2:2", 3605, 3606),
    ],
)
def test_forms_of_times(tmp_path, times, start, end):
    assert read(tmp_path, srt((times, "x"))) == [Cue(start, end, "x")]


def test_cues_are_sorted_and_may_overlap(tmp_path):
    text = srt((TWO, "late"), (ONE, "early"), ("00:00:01,500 --> 00:00:03,500", "middle"))
    assert read(tmp_path, text) == [Cue(1, 2, "early"), Cue(1.5, 3.5, "middle"), Cue(3, 4.5, "late")]


@pytest.mark.parametrize("empty", ["", " ", "<i></i>", r"{\an8}", "&nbsp;"])
def test_empty_cues_are_left_out(tmp_path, empty):
    assert texts(tmp_path, srt((ONE, empty), (TWO, "x"))) == ["x"]


def test_a_cue_that_does_not_end_after_its_start_is_shown_until_the_next(tmp_path):
    text = srt(("00:00:01,000 --> 00:00:00,500", "a"), (TWO, "b"))
    assert read(tmp_path, text) == [Cue(1, 3, "a"), Cue(3, 4.5, "b")]


@pytest.mark.parametrize("line", ["00:00:0x,000 --> 00:00:02,000", "00:00:01 --> 00:00:02", "00:00:01,5 --> "])
def test_a_damaged_time_is_an_error_with_its_line(tmp_path, line):
    with pytest.raises(VideoError, match=r"s\.srt: line 6 has no valid times: "):
        read(tmp_path, srt((ONE, "x"), (line, "lost?")))


def test_an_arrow_in_the_text_is_text(tmp_path):
    assert texts(tmp_path, srt((ONE, "left --> right\n1 --> 2"))) == ["left --> right\n1 --> 2"]


def test_webvtt_with_all_that_surrounds_cues(tmp_path):
    text = """WEBVTT - a title
Kind: captions

STYLE
::cue { color: red }

NOTE
not shown

intro
00:03.000 --> 00:04.500 position:10% align:start
<v.loud Ann>Hi &lt;there&gt;</v> <00:03.500><c.x>you</c>
{plain} \\N

00:00:01,000 --> 00:00:02,000
early
100:00:05.000 --> 100:00:06.000
no empty line between
"""
    assert read(tmp_path, text, name="s.vtt") == [
        Cue(1, 2, "early"),
        Cue(3, 4.5, "Hi <there> you\n{plain} \\N"),
        Cue(360005, 360006, "no empty line between"),
    ]


@pytest.mark.parametrize("text", ["", "hello\n", "WEBVTT\n", srt((ONE, ""))])
def test_a_file_without_cues_is_refused(tmp_path, text):
    with pytest.raises(VideoError, match=r"s\.srt has no subtitles: give an \.srt or \.vtt file"):
        read(tmp_path, text)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    for path in (tmp_path / "none.srt", tmp_path, "a\0b"):
        with pytest.raises(VideoError, match=r"no such file of subtitles|cannot be read"):
            read_cues(path)


def test_a_file_too_large_for_subtitles_is_refused(tmp_path):
    path = tmp_path / "film.mkv"
    with path.open("wb") as file:
        file.truncate(2**27)
    with pytest.raises(VideoError, match="too many for subtitles"):
        read_cues(path)


# ---- tracks

ASS = """[Script Info]
ScriptType: v4.00+

[V4+ Styles]
Format: Name, Fontname
Style: Default,Arial

[Events]
Format: Layer, Start, End, Style, Name, MarginL, MarginR, MarginV, Effect, Text
Dialogue: 0,0:00:01.00,0:00:02.00,Default,,0,0,0,,{\\i1}Yes{\\i0}, {note}no\\Nline\\htwo
Dialogue: 0,0:00:03.00,0:00:04.50,Default,,0,0,0,,{\\p1}m 0 0 l 1 1{\\p0}
"""
VTT = "WEBVTT\n\n00:01.000 --> 00:02.000\n<v Ann>Hi</v> &amp; bye\n"


def packed(text: str) -> bytes:
    return len(text.encode()).to_bytes(2, "big") + text.encode()


def with_tracks(path: Path, film: Path, *tracks: tuple[str, str, str]) -> Path:
    """The packets of `film`, and tracks of (codec, text of a file, disposition)."""
    forms = {"subrip": "srt", "webvtt": "webvtt", "ass": "ass", "mov_text": "srt"}
    with av.open(str(film)) as source, av.open(str(path), "w") as output:
        packets = []
        streams = {stream.index: output.add_stream_from_template(stream) for stream in source.streams}
        for codec, text, disposition in tracks:
            written = av.open(io.BytesIO(text.encode()), format=forms[codec])
            template = written.streams.subtitles[0]
            if codec == "mov_text":
                track = output.add_stream(codec)
                track.codec_context.subtitle_header = ASS.encode()
                track.time_base = template.time_base
            else:
                track = output.add_stream_from_template(template)
            if disposition:
                track.disposition = av.stream.Disposition[disposition]
            for packet in written.demux(template):
                if packet.size:
                    if codec == "mov_text":
                        timed = av.Packet(packed(bytes(packet).decode()))
                        timed.pts, timed.dts, timed.duration = packet.pts, packet.dts, packet.duration
                        timed.time_base, packet = packet.time_base, timed
                    packet.stream = track
                    packets.append(packet)
        for packet in source.demux():
            if packet.size:
                packet.stream = streams[packet.stream_index]
                packets.append(packet)
        for packet in sorted(packets, key=lambda packet: packet.dts * packet.time_base):
            output.mux(packet)
    return path


@pytest.mark.parametrize(
    ("name", "codec", "text", "shown"),
    [
        ("v.mkv", "subrip", srt((ONE, "<i>Hi</i> &amp; {\\an8}bye")), "Hi & bye"),
        ("v.mkv", "webvtt", VTT, "Hi & bye"),
        ("v.mkv", "ass", ASS, "Yes, no\nline two"),
        ("v.mp4", "mov_text", srt((ONE, "Hi <3 & bye")), "Hi <3 & bye"),
    ],
)
def test_text_tracks(tmp_path, steady, name, codec, text, shown):
    path = with_tracks(tmp_path / name, steady, (codec, text, ""))
    assert read_cues("auto", path) == [Cue(1, 2, shown)]


def test_the_times_of_a_track_are_those_that_players_show(tmp_path):
    """A transport stream's clock does not begin at 0; neither does that of this file, whose picture begins late."""
    film = with_sound(tmp_path / "late.mkv", numbered(8), begin=1.0)
    with av.open(str(film)) as source, av.open(str(tmp_path / "shifted.mkv"), "w") as output:
        streams = [output.add_stream_from_template(stream) for stream in source.streams]
        for packet in source.demux():
            if packet.size:
                for name in ("pts", "dts"):
                    setattr(packet, name, getattr(packet, name) + round(2 / packet.time_base))
                packet.stream = streams[packet.stream_index]
                output.mux(packet)
    text = srt(("00:00:03,500 --> 00:00:04,000", "x"), (ONE, "before the film"))
    path = with_tracks(tmp_path / "v.mkv", tmp_path / "shifted.mkv", ("subrip", text, ""))
    (cue,) = read_cues("auto", path)
    assert cue == (pytest.approx(1.5, abs=0.03), pytest.approx(2.0, abs=0.03), "x")


@pytest.mark.parametrize(("dispositions", "best"), [(("", ""), "0"), (("forced", ""), "1"), (("", "default"), "1")])
def test_the_best_track(tmp_path, steady, dispositions, best):
    tracks = [("subrip", srt((ONE, str(i))), kind) for i, kind in enumerate(dispositions)]
    path = with_tracks(tmp_path / "v.mkv", steady, *tracks)
    assert [cue.text for cue in read_cues("auto", path)] == [best]


def test_tracks_that_are_not_text_are_named(tmp_path, steady):
    path = with_tracks(tmp_path / "v.mkv", steady, ("subrip", srt((ONE, "x")), ""))
    path.write_bytes(path.read_bytes().replace(b"S_TEXT/UTF8", b"S_HDMV/PGS\0"))
    with pytest.raises(VideoError, match=r"v\.mkv: its subtitle tracks are not text but \w*pgs\w*: give an \.srt"):
        read_cues("auto", path)


def test_a_video_without_a_track_is_refused(steady):
    with pytest.raises(VideoError, match=r"\.mkv: its subtitle tracks are none: give an \.srt"):
        read_cues("auto", steady)


def test_auto_needs_a_file():
    with pytest.raises(VideoError, match="subtitles='auto' is for a video file"):
        read_cues("auto")


def test_a_track_of_a_file_object(tmp_path, steady):
    path = with_tracks(tmp_path / "v.mkv", steady, ("subrip", srt((ONE, "x")), ""))
    assert read_cues("auto", io.BytesIO(path.read_bytes())) == [Cue(1, 2, "x")]


def test_text_of_quicktime_may_be_utf_16():
    text = "é".encode("utf-16")
    assert shown_text("mov_text", len(text).to_bytes(2, "big") + text + b"styles") == "é"
