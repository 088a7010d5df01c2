"""Compressed files, which can only be read from their beginning."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import sys
import zlib
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO

from lunaris.errors import need

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
_BLOCK = 2**20


def is_compressed(path: Path) -> bool:
    """Return whether a file is compressed, by its name."""
    return path.suffix.lower() in COMPRESSIONS


class CompressedFile(AbstractContextManager["CompressedFile"]):
    """A compressed file that is read block by block.

    pending: the bytes that are read and not yet taken. ended: whether all is read. problem: why
    the rest of a corrupt file cannot be read, or "".
    """

    def __init__(self, path: Path) -> None:
        self.raw = path.open("rb")
        self._file = _decompressed(path, self.raw)
        self.pending = bytearray()
        self.ended = False
        self.problem = ""

    def __exit__(self, *_: object) -> None:
        self.raw.close()

    def _block(self, most: int = _BLOCK) -> bytes:
        """Return the next bytes, as many as one read gives; b"" at the end or at a problem."""
        if self.ended:
            return b""
        try:
            block = self._file.read1(most)
        except Exception as error:
            known = isinstance(error, OSError | EOFError | lzma.LZMAError | zlib.error)
            if not known and type(error).__name__ != "ZstdError":
                raise
            self.problem, block = f"cannot be read further: {error}", b""
        self.ended = not block
        return block

    def skip(self, count: int, keep: int) -> bytes:
        """Read past `count` bytes and return the first `keep` of them."""
        head = b""
        while count > 0 and (block := self._block(min(count, _BLOCK))):
            head = head if len(head) >= keep else (head + block)[:keep]
            count -= len(block)
        return head

    def fill(self, count: int) -> None:
        """Read until more than `count` bytes are pending, or to the end."""
        while len(self.pending) <= count and (block := self._block()):
            self.pending += block

    def line_end(self, count: int) -> int:
        """Return the end of the last line within `count` pending bytes, else of the first line."""
        end = self.pending.rfind(b"\n", 0, count) + 1
        searched = count
        while not end:
            end = self.pending.find(b"\n", searched) + 1
            searched = len(self.pending)
            if not end:
                block = self._block()
                self.pending += block
                end = 0 if block else len(self.pending)
        return end


def _decompressed(path: Path, raw: IO[bytes]) -> io.BufferedIOBase:
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if suffix == ".bz2":
        return bz2.BZ2File(raw)
    if suffix == ".xz":
        return lzma.LZMAFile(raw)
    zstd = need("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd", str(path))
    stream: io.BufferedIOBase = zstd.ZstdFile(raw)
    return stream
