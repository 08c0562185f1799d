"""Reads an upload, `multipart/form-data`, as it arrives: the film goes to disk block by block."""

from __future__ import annotations

import asyncio
import re
import time
import unicodedata
from collections.abc import AsyncIterator
from contextlib import ExitStack
from typing import Any

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from tieredkv.serve.errors import ApiError
from tieredkv.serve.media.entry import Entry
from tieredkv.serve.media.store import Store, Writer
from tieredkv.serve.media.threads import finished

PURPOSES = ("user_data", "vision")
"""What OpenAI calls files to ask about."""
_IDLE_S, _TOTAL_S = 60.0, 6 * 3600.0
"""Seconds without a byte, and of all of it, after which an upload is given up."""
_BLOCK = 2**20
"""Bytes that are collected before they are written."""
_LONGEST_FIELD, _MOST_PARTS = 1024, 16
"""Bytes of a field that is no file; parts of one upload."""
_LONGEST_NAME = 100
_CONTROL = re.compile(r"[\x00-\x1f\x7f/\\]+")


def clean_name(name: str) -> str:
    """The last part of a client's file name as text to show: nothing that a terminal or a header could take for an
    instruction. It is never a path."""
    last = re.split(r"[/\\]", unicodedata.normalize("NFC", name))[-1]
    shown = "".join(
        c for c in _CONTROL.sub("", last) if unicodedata.category(c) not in ("Cf", "Cs", "Co", "Cn", "Zl", "Zp")
    )
    stem, dot, suffix = shown.strip().rpartition(".")
    short = f"{stem[: _LONGEST_NAME - len(suffix) - 1]}{dot}{suffix}" if stem and len(suffix) < 10 else shown.strip()
    return short[:_LONGEST_NAME].strip(" .") or "film"


async def receive(content_type: str, blocks: AsyncIterator[bytes], store: Store, owner: str) -> Entry:
    """The film of an upload, in the store. Nothing of it stays if it is cut short or refused. Raises `ApiError`.

    content_type: the header. blocks: the body.
    """
    kind, options = parse_options_header(content_type)
    boundary = options.get(b"boundary", b"")
    if kind != b"multipart/form-data" or not 0 < len(boundary) <= 200:
        raise ApiError(
            415,
            "an upload is multipart/form-data: curl -F purpose=user_data -F file=@film.mp4 .../v1/files, for example.",
            code="not_multipart",
        )
    with ExitStack() as stack:
        form = _Form(store, stack)
        parser = MultipartParser(boundary, form.callbacks())  # type: ignore[arg-type]
        until = time.monotonic() + _TOTAL_S
        try:
            while (block := await _next(blocks)) is not None:
                if time.monotonic() > until:
                    raise ApiError(408, f"the upload takes more than {_TOTAL_S / 3600:g} hours.", code="slow")
                parser.write(block)
                if form.pending_bytes >= _BLOCK or form.wants_file:
                    await finished(form.flush)
            parser.finalize()
        except FormParserError:
            raise _malformed() from None
        await finished(form.flush)
        return await finished(lambda: form.finish(owner))


async def _next(blocks: AsyncIterator[bytes]) -> bytes | None:
    """Starlette raises `ClientDisconnect` if the client goes away."""
    try:
        async with asyncio.timeout(_IDLE_S):
            return await anext(blocks, None)
    except TimeoutError:
        raise ApiError(408, f"nothing of the upload came for {_IDLE_S:g} s: send it again.", code="idle") from None


class _Form:
    """The parts of one body. The parser's callbacks only collect; `flush`, on another thread, writes."""

    def __init__(self, store: Store, stack: ExitStack) -> None:
        self._store, self._stack = store, stack
        self._writer: Writer | None = None
        self._pending: list[bytes] = []
        self.pending_bytes = 0
        self.wants_file = False
        """Whether the file's part has begun and has no place yet."""
        self._fields: dict[str, bytearray] = {}
        self._parts = 0
        self._header, self._value = bytearray(), bytearray()
        self._disposition = b""
        self._field: str | None = None
        self._file_name: str | None = None
        self._in_file = self._complete = False

    def callbacks(self) -> dict[str, Any]:
        """For `MultipartParser`."""
        return {
            "on_part_begin": self._part_begin,
            "on_header_field": self._header_field,
            "on_header_value": self._header_value,
            "on_header_end": self._header_end,
            "on_headers_finished": self._headers_finished,
            "on_part_data": self._part_data,
            "on_end": self._end,
        }

    def flush(self) -> None:
        """Write what has come of the file."""
        if self._file_name is not None and self._writer is None:
            self._writer = self._stack.enter_context(self._store.writing(self._file_name))
            self.wants_file = False
        if self._writer is not None and self._pending:
            blocks, self._pending, self.pending_bytes = self._pending, [], 0
            self._writer.write(b"".join(blocks))

    def finish(self, owner: str) -> Entry:
        """The film, once the body has ended."""
        if not self._complete:
            raise _malformed()
        if self._writer is None:
            raise ApiError(
                400, "the upload has no part called 'file': give the film there.", code="no_file", param="file"
            )
        purpose = bytes(self._fields.get("purpose", b"user_data")).decode("utf-8", "replace")
        if purpose not in PURPOSES:
            raise ApiError(
                400, f"purpose={purpose[:40]!r} is not valid: give user_data or vision.",
                code="invalid_purpose", param="purpose",
            )  # fmt: skip
        return self._writer.keep(owner, purpose)  # type: ignore[arg-type]

    def _part_begin(self) -> None:
        self._parts += 1
        self._disposition, self._field, self._in_file = b"", None, False
        if self._parts > _MOST_PARTS:
            raise ApiError(
                400, f"the upload has more than {_MOST_PARTS} parts: give a file and a purpose.", code="parts"
            )

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = bytes(self._value)
        self._header, self._value = bytearray(), bytearray()

    def _headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        name = options.get(b"name", b"").decode("utf-8", "replace")
        if name == "file":
            if self._file_name is not None:
                raise ApiError(400, "the upload has two files: give one at a time.", code="two_files", param="file")
            self._file_name = clean_name(options.get(b"filename", b"film").decode("utf-8", "replace"))
            self._in_file = self.wants_file = True
        else:
            self._field = name
            self._fields[name] = bytearray()

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        if self._in_file:
            self._pending.append(data[start:end])
            self.pending_bytes += end - start
        elif self._field is not None:
            field = self._fields[self._field]
            field += data[start:end]
            if len(field) > _LONGEST_FIELD:
                raise ApiError(
                    400, f"{self._field[:40]!r} is too long for a field of an upload.", code="field_too_long"
                )

    def _end(self) -> None:
        self._complete = True


def _malformed() -> ApiError:
    return ApiError(400, "the upload was cut short or is no multipart/form-data: send it again.", code="malformed")
