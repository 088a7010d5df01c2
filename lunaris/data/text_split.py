"""Where a long text may be cut so that its parts are encoded as the whole would be."""

from __future__ import annotations

import re
from collections.abc import Iterator

# A text is encoded in pieces of at most this many bytes, so that one of any size takes little
# memory.
PIECE_BYTES = 65_536
_WORD_START = re.compile(rb"(?<=\S)\s")


def cut(window: bytes) -> int:
    """Return the last good place to cut at or before the window's last byte.

    The first white space after a word, so that a word keeps the space before it; where there is
    none, a character's first byte; in what is not UTF-8, the end.
    """
    end = len(window) - 1
    # Mostly there is one near; the whole window is searched only where there is none.
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
    """Yield a document in pieces of at most `most` bytes, cut in their second halves by `cut`."""
    start = 0
    while len(document) - start > most:
        begin = start + most // 2
        end = begin + cut(document[begin : start + most + 1])
        yield document[start:end]
        start = end
    if start < len(document):
        yield document[start:] if start else document
