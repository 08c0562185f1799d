"""Decodes what can be decoded of a damaged file, and notes where pictures are lost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tieredkv.video import pyav as av
from tieredkv.video.container import MATROSKA, opened

STRICT = {"err_detect": "explode"}
"""Options of a decoder with which it refuses a damaged picture instead of guessing the damaged part."""
_MOST_ERRORS = 1000
"""Errors in a row after which a container's end is taken for reached."""
_BETWEEN_BLOCKS = 256
"""Most bytes between the content of two blocks in a Matroska file; what takes more is damaged."""
_MARK_AHEAD = 3
"""Packets of a transport stream between the one marked as damaged and a loss."""
_AVI_HEAD = 8
"""Bytes of an AVI chunk before its content."""


class Salvage:
    """An iterator over the frames of an open file that are whole, in the order in which they are shown.

    Left out are frames whose packet is damaged, and those after it up to the next key frame, which build on it. Damage
    is what container or decoder report: a packet marked as incomplete, one that is not decoded without errors, bytes
    of a Matroska file that belong to no packet, packets that an AVI file's index names and the file lacks. What neither
    notices is shown as decoded.
    """

    def __init__(self, container: Any, stream: Any) -> None:
        """The stream must not have been decoded before."""
        self._container, self._stream, self._decoder = container, stream, _strict(stream)
        self._frames = self._decoded()
        self._broken = False
        """Whether the packets that follow build on one that is lost."""
        self._recovered: int | None = None
        """Presentation time of the key frame that ended that: a picture shown before it may still build on the loss."""
        self._damaged: set[int] = set()
        """Numbers of packets whose frames are left out."""
        self._lost: list[tuple[int | None, float | None]] = []
        """Presentation and decoding times of lost pictures that `lost_before` has not reported."""

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return next(self._frames)

    def lost_before(self, frame: Any | None) -> int:
        """How many pictures shown before `frame` (None: the end) were lost since the last call; 1 may mean more."""

        def earlier(lost: tuple[int | None, float | None]) -> bool:
            presentation, decoding = lost
            if frame is None:
                return True
            if presentation is not None and frame.pts is not None:
                return presentation < frame.pts
            return decoding is None or frame.dts is None or decoding < frame.dts

        before = [lost for lost in self._lost if earlier(lost)]
        self._lost = [lost for lost in self._lost if not earlier(lost)]
        return len(before)

    def _decoded(self) -> Iterator[Any]:
        with ExitStack() as decoders:
            for number, packet in enumerate(self.packets()):
                packet.opaque = number
                frames, failed = self._decode(packet)
                if failed and self._broken and packet.is_keyframe:
                    # What was damaged before may have damaged the decoder's own state.
                    yield from self._whole(self._decode(None)[0])
                    _, stream = decoders.enter_context(opened(Path(self._container.name), self._stream.index))
                    self._decoder = _strict(stream)
                    frames, failed = self._decode(packet)
                failed |= packet.is_corrupt or any(frame.is_corrupt for frame in frames if frame.opaque == number)
                self._note(number, packet, failed)
                yield from self._whole(frames)
            frames, failed = self._decode(None)
            if failed:
                self._lost.append((None, None))
            yield from self._whole(frames)

    def _decode(self, packet: Any | None) -> tuple[list[Any], bool]:
        """Frames, and whether the decoder failed. None: the last frames."""
        if packet is None:
            packet = av.Packet()
            packet.stream, packet.time_base = self._stream, self._stream.time_base
        try:
            return self._decoder.decode(packet), False
        except (av.FFmpegError, OSError):
            return [], True

    def _note(self, number: int, packet: Any, failed: bool) -> None:
        """Record whether this packet's frame is to be left out."""
        if packet.is_keyframe and not failed and self._broken:
            self._broken, self._recovered = False, packet.pts
        early = self._recovered is not None and packet.pts is not None and packet.pts < self._recovered
        if self._recovered is not None and packet.is_keyframe and packet.pts != self._recovered:
            self._recovered = None
        if failed or self._broken or early:
            self._damaged.add(number)
            self._lost.append((packet.pts, packet.dts))
            self._broken |= failed and not packet.is_disposable

    def _whole(self, frames: list[Any]) -> Iterator[Any]:
        for frame in frames:
            number = frame.opaque
            if frame.is_corrupt and number not in self._damaged:
                self._lost.append((frame.pts, frame.dts))
            elif number not in self._damaged:
                yield frame
            self._damaged.discard(number)

    def packets(self) -> Iterator[Any]:
        """The stream's packets, instead of frames. Notes those that are missing before one of them."""
        packets = self._all_packets()
        kind = self._container.format.name
        if kind == MATROSKA:
            packets = self._adjoining(packets)
        elif kind == "mpegts":
            packets = self._continuous(packets)
        elif kind == "avi" and len(self._stream.index_entries):
            packets = self._indexed(packets)
        return (packet for packet in packets if packet.stream_index == self._stream.index)

    def _all_packets(self) -> Iterator[Any]:
        errors = 0
        while errors < _MOST_ERRORS:
            try:
                for packet in self._container.demux():
                    if packet.size:
                        errors = 0
                        yield packet
                return
            except (av.FFmpegError, OSError):
                errors += 1
            except IndexError:  # as in `container.decoded`
                return

    def _adjoining(self, packets: Iterator[Any]) -> Iterator[Any]:
        """Packets of a Matroska file; bytes between them that belong to none are lost ones."""
        begin, end = None, 0
        for packet in packets:
            if begin is not None and packet.pos is not None and packet.pos > end + _BETWEEN_BLOCKS:
                self._lost.append((None if packet.pts is None else packet.pts - 1, None))
                self._broken = True
            if packet.pos is not None:
                laced = packet.pos == begin  # packets of one block have its position
                begin, end = packet.pos, packet.size + (end if laced else packet.pos)
            yield packet

    def _continuous(self, packets: Iterator[Any]) -> Iterator[Any]:
        """Packets of a transport stream, which marks as damaged a packet shortly before lost ones."""
        due, damaged = None, -_MARK_AHEAD - 1
        for number, packet in enumerate(packets):
            if packet.stream_index == self._stream.index and packet.dts is not None:
                damaged = number if packet.is_corrupt else damaged
                if due is not None and packet.dts > due and number - damaged <= _MARK_AHEAD:
                    self._lost.append((None, due))
                    self._broken = True
                due = packet.dts + 1.5 * packet.duration if packet.duration else None
            yield packet

    def _indexed(self, packets: Iterator[Any]) -> Iterator[Any]:
        """Packets of an AVI file, whose times FFmpeg counts: with the times of its index, where it has them."""
        entries = {entry.pos + _AVI_HEAD: entry for entry in self._stream.index_entries}
        times = sorted(entry.timestamp for entry in entries.values() if entry.size)
        last, shift, due = max(entries), 0, 0
        for packet in packets:
            if packet.stream_index == self._stream.index and packet.dts is not None:
                entry = entries.get(packet.pos)
                if entry is not None:
                    shift = entry.timestamp - packet.dts
                    while due < len(times) and times[due] < entry.timestamp:
                        self._lost.append((None, times[due]))
                        self._broken, due = True, due + 1
                    due += due < len(times) and times[due] == entry.timestamp
                elif packet.pos is not None and packet.pos < last:
                    continue  # no packet, but bytes that look like one
                packet.dts += shift
                packet.pts = None if packet.pts is None else packet.pts + shift
            yield packet


def _strict(stream: Any) -> Any:
    """The decoder of a stream: it refuses damaged pictures, and frames carry the numbers of their packets."""
    decoder = stream.codec_context
    decoder.thread_type = "SLICE"  # with threads for frames, errors are reported for later packets
    decoder.options = STRICT
    decoder.flags |= av.codec.context.Flags.copy_opaque
    return decoder
