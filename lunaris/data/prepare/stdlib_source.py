"""The standard library's files as a source of documents, split by their names."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from lunaris.data.prepare.chunks import Chunk, Cursor
from lunaris.data.prepare.file_source import FileSource

_SAMPLE_BYTES = 8 * 2**20


class StdlibSource(FileSource):
    """The library's files; the hash of a file's name decides whether it is held out."""

    def __init__(self, files: list[Path], root: Path, val_fraction: float) -> None:
        """root: the folder that the files' names are relative to."""
        super().__init__("stdlib", files, "text")
        self._root, self._val_fraction = root, val_fraction

    def chunks(self, index: int, cursor: Cursor) -> Iterator[Chunk]:
        """Yield the chunks from `cursor` on, each marked as held out or not."""
        for chunk in super().chunks(index, cursor):
            name = Path(chunk.path).relative_to(self._root).as_posix()
            yield replace(chunk, held_out=is_held_out(name, self._val_fraction))

    def sample(self, budget: int) -> Iterator[Chunk]:
        """Yield about 8 MB of complete files at equal distances, whatever the budget is."""
        step = max(1, -(-self.size // _SAMPLE_BYTES))
        for i in range(0, len(self.files), step):
            size = self._sizes[i]
            yield Chunk(0, Cursor(i), str(self.files[i]), "text", size, size)


def is_held_out(name: str, fraction: float) -> bool:
    """Return whether a file of this name belongs to the validation part."""
    digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "little") < fraction * 2**64
