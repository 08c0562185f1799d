"""`data:` URLs: films and pictures that stand in the request itself."""

from __future__ import annotations

import binascii
import re
import threading
from urllib.parse import unquote

from tieredkv.serve.errors import ApiError
from tieredkv.serve.media.entry import Entry
from tieredkv.serve.media.store import Store

_HEADER = re.compile(r"data:(?P<type>[\w.+-]+/[\w.+-]+)?(?:;[\w.+-]+=[^;,\"]*)*(?P<base64>;base64)?", re.IGNORECASE)
_LONGEST_HEADER = 256
"""Characters before the comma."""
_BLOCK = 2**22
"""Characters decoded at a time; a multiple of four."""


def inline(url: str, store: Store, stop: threading.Event) -> Entry:
    """The film or picture that a `data:` URL holds, copied to the store. Blocks. stop: set to end early. Raises
    `ApiError`."""
    begin = url.find(",", 0, _LONGEST_HEADER)
    header = _HEADER.fullmatch(url, 0, begin) if begin >= 0 else None
    if header is None:
        raise _invalid("write data:video/mp4;base64, and then the bytes.")
    if header["base64"] is None:
        raise _invalid("only base64 is read: write data:video/mp4;base64, and then the bytes.")
    if "," in url[begin + 1 :]:
        raise _invalid("it holds several files, such as frames: give one film, or each picture in a part of its own.")
    if (len(url) - begin) * 3 // 4 > store.film_bytes + 3:
        most = store.film_bytes / 2**30
        raise ApiError(413, f"a data: URL is larger than the {most:g} GiB that a film may have.", code="file_too_large")
    subtype = (header["type"] or "video/mp4").lower().partition("/")[2]
    with store.writing(f"data.{ {'quicktime': 'mov', 'x-matroska': 'mkv'}.get(subtype, subtype) }") as writer:
        writer.name = f"the {subtype} of a data: URL"
        if "%" in url:
            url, begin = unquote(url[begin + 1 :]), -1
        for at in range(begin + 1, len(url), _BLOCK):
            if stop.is_set():
                raise ApiError(499, "the request was cancelled.")
            block = url[at : at + _BLOCK]
            if at + _BLOCK < len(url) and "=" in block[-2:]:
                raise _invalid("its base64 ends in the middle.")
            try:
                writer.write(binascii.a2b_base64(block, strict_mode=True))
            except (binascii.Error, ValueError):
                raise _invalid(
                    "its base64 is damaged or was cut short: encode the whole file, without line breaks."
                ) from None
        return writer.keep(listed=False)


def _invalid(message: str) -> ApiError:
    return ApiError(400, f"a data: URL is not valid: {message}", code="invalid_url", param="url")
