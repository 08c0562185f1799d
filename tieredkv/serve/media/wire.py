"""What the process that decodes and the one that asks write to each other.

The request is a line of JSON, and so is each number of a frame from which to begin. The answer is a sequence of
messages: a kind, the number of bytes, the bytes.
"""

from __future__ import annotations

import struct

HEAD = struct.Struct("<cI")
"""Kind and number of bytes."""
FACTS = b"h"
"""JSON: what is known once the film is open."""
TICK = b"t"
"""A double: seconds decoded so far. Also a sign of life."""
FRAME = b"f"
"""Pixels, uint8 RGB."""
SAME = b"s"
"""Nothing: the frame before, again."""
END = b"d"
"""JSON: spans that were damaged."""
FAILED = b"e"
"""UTF-8: one sentence."""
SECONDS = struct.Struct("<d")
LONGEST_TEXT = 2**25
"""Bytes of any message that is not a frame."""
