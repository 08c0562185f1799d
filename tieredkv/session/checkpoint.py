"""Checkpoint: the finished part of a long ingest on disk, from which the same ingest goes on after an interruption.

A folder of three files: `lock`; `cache`, which only grows; and `state`, which is replaced whole each time and says how
much of `cache` counts. A kill at any moment leaves the last checkpoint as it was.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tieredkv.cache import unfinished
from tieredkv.cache.tiered_cache import TieredCache
from tieredkv.cache.unfinished import Mark
from tieredkv.codecs import PLAIN
from tieredkv.config import TierConfig
from tieredkv.errors import OutputError, SessionError
from tieredkv.session import session_file
from tieredkv.session.beside import CACHE, STATE, locked
from tieredkv.session.ingested_video import IngestedVideo
from tieredkv.session.origin import ModelSource, sampling_as_plain
from tieredkv.session.session_file import SessionState
from tieredkv.storage import block_file, tensor_file
from tieredkv.storage.atomic import check_space
from tieredkv.storage.block_file import Block

FLOOR_S = 30.0
"""Least seconds between two checkpoints."""
SHARE = 0.04
"""Most of the ingest's time that checkpoints may take."""
CHEAP_S = 5.0
"""A last checkpoint is written after a failure if it takes no longer."""


def is_due(elapsed: float, since: float, spent: float, expected: float) -> bool:
    """Whether to write a checkpoint now. All in seconds.

    elapsed: since the ingest began. since: since the last checkpoint, or since it began. spent: on checkpoints so far.
    expected: that this one takes, 0 if unknown. So checkpoints take at most `SHARE` of the time, and the first one.
    """
    return since >= FLOOR_S and (not expected or spent + expected <= SHARE * elapsed)


class Damaged(SessionError):
    """A checkpoint cannot be used, whatever the ingest: it is damaged, or was written by another version."""


@dataclass(frozen=True, slots=True, eq=False)
class Begun:
    """What a checkpoint holds."""

    tokens: int
    """Prompt tokens cached."""
    video: IngestedVideo
    """As far as it is cached: its grid ends with the last segment that is cached whole."""
    manifest: dict[str, Any]
    marks: tuple[Mark, ...]
    blocks: tuple[Block, ...]
    state: dict[str, torch.Tensor]


class Checkpoint:
    """The checkpoint of one ingest, locked against others until `close` or `remove`."""

    def __init__(self, path: Path, source: ModelSource | None = None) -> None:
        """path: of the folder. source: of the model. Raises `SessionError` if the folder is in use, has
        other files in it, or cannot be written."""
        self.path, self._source = path, source
        self._folder = locked(path)
        self._state, self._cache = path / STATE, path / CACHE
        self._marks: tuple[Mark, ...] = ()
        self._blocks: tuple[Block, ...] = ()
        self._origin: dict[str, Any] | None = None
        self._began = self._last = time.monotonic()
        self._spent = self._rate = 0.0
        """Seconds spent on checkpoints, and per byte of the last one."""
        self._useless = False

    # ---- reading

    def begun(self) -> Begun | None:
        """What an earlier ingest has left; None if there is nothing. Raises `Damaged`."""
        if not self._state.exists():
            return None
        try:
            stored = tensor_file.read(self._state)
            stored.verify()
            plain = stored.manifest["checkpoint"]
            blocks = tuple(Block(*block) for block in plain["blocks"])
            marks = tuple(Mark.of(mark) for mark in plain["marks"])
            state = {name: stored.tensor(name).clone() for name in stored.names}
            video = session_file.state_of(stored).video
            session_file.codec_of(stored.manifest)  # raises if it was written by an older version
            return Begun(plain["tokens"], video, stored.manifest, marks, blocks, state)
        except SessionError as error:
            raise Damaged(str(error)) from None
        except (KeyError, TypeError, ValueError) as error:
            raise Damaged(f"{self._state} holds no checkpoint ({error!r}).") from None

    def check(self, begun: Begun, now: IngestedVideo, tiers: TierConfig, model: Any, processor: Any) -> None:
        """Raise `SessionError`, which names the difference, unless the ingest that has begun is this one.

        now: what this ingest would be.
        """
        was, difference = begun.video, _difference(begun.video, now)
        difference = difference or session_file.origin_difference(begun.manifest, model, processor)
        chunk, given = begun.manifest["tiers"]["chunk_tokens"], tiers.chunk_tokens
        if not difference and chunk != given:
            difference = f"in chunks of {chunk} tokens, and chunk_tokens={given} was given"
        bits, wanted = begun.manifest["host"]["bits"], tiers.host_kv_bits
        if not difference and bits != PLAIN and wanted not in (None, bits):
            difference = f"in {bits} bits, and host_kv_bits={wanted} was given"
        if not difference and was.facts.sha256 != now.facts.sha256:
            difference = f"for another video ({was.facts.name}, as it was then) than {now.facts.name}"
        if difference:
            raise SessionError(
                f"an ingest was begun {difference}: give what it was begun with to continue it, or remove {self.path} "
                "to start over."
            )

    def restore(self, begun: Begun, cache: TieredCache, devices: dict[Any, torch.device]) -> None:
        """Fill an empty cache, whose layers compute on `devices`. Raises `Damaged`."""

        def read(number: int, targets: list[torch.Tensor]) -> None:
            block_file.read(self._cache, begun.blocks[number], targets)

        try:
            codec = session_file.codec_of(begun.manifest)
            unfinished.restore(cache, begun.tokens, codec, begun.state, begun.marks, read, devices)
        except SessionError as error:
            raise Damaged(str(error)) from None
        except (KeyError, RuntimeError, ValueError) as error:
            raise Damaged(f"{self.path} does not hold this model's cache ({error}).") from None
        self._marks, self._blocks = begun.marks, begun.blocks
        self._origin = {name: begun.manifest[name] for name in _ORIGIN if name in begun.manifest}

    # ---- writing

    def check_space(self, nbytes: int) -> None:
        """Raise `OutputError`, and write none from now on, if the disk does not have room for the whole checkpoint and
        the session file beside it. nbytes: of each."""
        written = self._blocks[-1].end if self._blocks else 0
        try:
            check_space(self.path, 2 * nbytes - written)
        except OutputError:
            self._useless = True
            raise

    def is_due(self, cache: TieredCache) -> bool:
        """Whether to write one now, between two calls of the model."""
        now = time.monotonic()
        return not self._useless and is_due(
            now - self._began, now - self._last, self._spent, self._rate * self._new_bytes(cache)
        )

    def is_cheap(self, cache: TieredCache) -> bool:
        """Whether writing one more takes little time, as far as known from others."""
        return not self._useless and self._rate > 0 and self._rate * self._new_bytes(cache) <= CHEAP_S

    def write(self, cache: TieredCache, video: IngestedVideo, model: Any, processor: Any) -> None:
        """Write what is cached, and is not there yet. video: as in `Begun`.

        Raises `RuntimeError` in the middle of a call, and `SessionError` or `OutputError` if the disk fails: none is
        written then from now on.
        """
        started = time.monotonic()
        try:
            if self._origin is None:
                self._origin = session_file.origin_of(model, processor, self._source)
            before = self._marks[-1] if self._marks else Mark()
            parts = unfinished.parts(cache, before)
            nbytes = self._new_bytes(cache)
            block = block_file.append(self._cache, self._blocks[-1].end if self._blocks else 0, parts.growing)
            marks, blocks = (*self._marks, parts.mark), (*self._blocks, block)
            plain = {"tokens": parts.tokens, "marks": [asdict(mark) for mark in marks]}
            content = session_file.content_of(cache, SessionState(video, []))
            own = {"checkpoint": {**plain, "blocks": [(each.offset, each.nbytes, each.checksum) for each in blocks]}}
            tensor_file.write(self._state, {**self._origin, **content, **own}, parts.state)
        except BaseException:
            self._useless = True
            raise
        self._marks, self._blocks = marks, blocks
        self._last = time.monotonic()
        self._spent += self._last - started
        self._rate = (self._last - started) / max(1, nbytes)

    def _new_bytes(self, cache: TieredCache) -> int:
        """Bytes of keys and values that are not written yet."""
        return unfinished.new_bytes(cache, self._marks[-1] if self._marks else Mark())

    # ---- the end

    def start_over(self) -> None:
        """Forget what an earlier ingest has left."""
        for file in (self._state, self._cache):
            file.unlink(missing_ok=True)
        self._marks, self._blocks, self._origin = (), (), None

    def remove(self) -> None:
        """Remove the folder: the session is saved."""
        self._folder.remove()

    def close(self) -> None:
        """Unlock, and leave what is there for another time. May be called twice."""
        if self._folder.locked and self._folder.is_empty():
            self._folder.remove()
        self._folder.close()


_ORIGIN = ("model", "model_settings", "model_state", "processor", "source")
"""Entries of the manifest that say which model it is, and stay the same."""


def _difference(was: IngestedVideo, now: IngestedVideo) -> str | None:
    """How the video is read or written otherwise than it was, as "with another ..."; None: it is not."""
    changes = []
    if was.positions != now.positions:
        changes.append(f"positions was {was.positions!r}, is {now.positions!r}")
    if was.system != now.system:
        changes.append("the system prompt differs")
    before, after = (sampling_as_plain(video.sampling) if video.sampling else {} for video in (was, now))
    if was.facts.subtitles != now.facts.subtitles:
        changes.append("the subtitles differ")
    rates = [(video.facts.fps, video.facts.start, video.facts.seconds) for video in (was, now)]
    resolved = ("fps", "source_fps", "max_frames", "start", "end")  # they say how `rates` came about
    for name in sorted(before.keys() | after.keys()):
        old, new = before.get(name), after.get(name)
        if old != new and (name not in resolved or rates[0] != rates[1]):
            changes.append(f"{name} was {old}, is {new}")
    if not changes and rates[0] != rates[1]:
        changes.append(f"rate, start and length were {rates[0]}, are {rates[1]}")
    frames = [(video.grid.rows, video.grid.columns, video.grid.frames_per_step) for video in (was, now)]
    if not changes and frames[0] != frames[1]:
        changes.append(f"rows, columns and frames of a step were {frames[0]}, are {frames[1]}")
    return f"with other settings ({', '.join(changes)})" if changes else None
