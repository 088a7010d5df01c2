"""Where a long text may be cut so that its pieces have the same tokens as the complete text."""

from __future__ import annotations

import re
from collections.abc import Iterator

# A text is encoded in pieces of at most this many bytes, so that any text takes little memory.
PIECE_BYTES = 65_536
_WORD_START = re.compile(rb"(?<=\S)\s")


def cut(window: bytes) -> int:
    """Return the last good place to cut, at or before the window's last byte.

    It is the first white space after a word, so that a word keeps the space before it; if there is
    none, a character's first byte; if the window is not UTF-8, its last byte.
    """
    end = len(window) - 1
    # Usually there is one near the end; otherwise the complete window is searched.
    for begin in (max(0, end - 256), 0):
        place = 0
        for match in _WORD_START.finditer(window, begin):
            place = match.start()
        if place:
            return place
    for back in range(min(4, end)):
        if window[end - back] & 0xC0 != 0x80:
            return end - back
    return end


def split_bytes(document: bytes, most: int = PIECE_BYTES) -> Iterator[bytes]:
    """Yield a document in pieces of at most `most` bytes, which `cut` ends in their second half."""
    start = 0
    while len(document) - start > most:
        begin = start + most // 2
        end = begin + cut(document[begin : start + most + 1])
        yield document[start:end]
        start = end
    if start < len(document):
        yield document[start:] if start else document
