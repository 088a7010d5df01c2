"""Compressed files, which can only be read from their beginning."""

from __future__ import annotations

import bz2
import gzip
import lzma
import zlib
from pathlib import Path
from typing import IO, Any, Protocol

from lunaris.errors import need

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
_BLOCK = 2**20


def is_compressed(path: Path) -> bool:
    """Return whether a file is compressed, by its name."""
    return path.suffix.lower() in COMPRESSIONS


class Stream(Protocol):
    """A stream of decompressed bytes."""

    def read1(self, most: int, /) -> bytes:
        """Return up to `most` bytes, as many as one read gives; b"" at the end."""


class CompressedFile:
    """A compressed file that is read block by block.

    pending: the bytes that are read and not yet taken. ended: whether all is read. problem: why
    the rest of a corrupt file cannot be read, or "".
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.pending = bytearray()
        self.ended = False
        self.problem = ""

    def __enter__(self) -> CompressedFile:
        self.raw = self._path.open("rb")
        self._file = decompressed(self._path, self.raw)
        return self

    def __exit__(self, *_: object) -> None:
        self.raw.close()

    def _block(self, most: int = _BLOCK) -> bytes:
        """Return the next bytes, as many as one read gives; b"" at the end or at a problem."""
        if self.ended:
            return b""
        try:
            block = bytes(self._file.read1(most))
        except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
            self.problem, block = f"cannot be read further: {error}", b""
        except Exception as error:
            if type(error).__module__.partition(".")[0] != "zstandard":
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


def decompressed(path: Path, raw: IO[bytes]) -> Stream:
    """Return the decompressed stream of `raw`, by the format that the file's name says."""
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if suffix == ".bz2":
        return bz2.BZ2File(raw)
    if suffix == ".xz":
        return lzma.LZMAFile(raw)
    zstandard = need("zstandard", f"{path}: .zst")
    return _Zstd(zstandard.ZstdDecompressor(), raw)


class _Zstd:
    """The stream of a zstd file of one or several frames.

    The library's own reader does not report a file that ends within a frame.
    """

    def __init__(self, decompressor: Any, raw: IO[bytes]) -> None:
        self._decompressor, self._raw = decompressor, raw
        self._frame = decompressor.decompressobj()
        self._next = b""  # read already, of the frame after this one
        self._begun = False
        self._ready = memoryview(b"")

    def read1(self, most: int) -> bytes:
        """Return up to `most` bytes, b"" at the end. Raises EOFError within a frame."""
        while not self._ready:
            data = self._next or self._raw.read(_BLOCK // 16)
            self._next = b""
            if self._frame.eof:
                if not data:
                    return b""
                self._frame = self._decompressor.decompressobj()
            elif not data:
                raise EOFError("it ends within a frame" if self._begun else "it is empty")
            self._begun = True
            self._ready = memoryview(self._frame.decompress(data))
            if self._frame.eof:
                self._next = self._frame.unused_data
        out, self._ready = self._ready[:most], self._ready[most:]
        return bytes(out)
