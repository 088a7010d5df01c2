"""Files as a source of documents: which files a glob names, and how they are cut into chunks."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from lunaris.data.prepare.chunks import (
    Chunk,
    Cursor,
    cut_before,
    kind_of,
    parquet_chunks,
    range_chunks,
    stream_chunks,
    up_to,
)
from lunaris.data.prepare.decompress import is_compressed
from lunaris.data.prepare.encode import is_held_out
from lunaris.errors import UserError

# Bytes of each part of a plain file that is sampled.
_SAMPLE_PART = 2**18
# The most files that a sample reads.
_SAMPLE_FILES = 64
# What a sample reads of the standard library.
_STDLIB_SAMPLE = 8 * 2**20


@dataclass
class FileSource:
    """The files of one source, in order. format: `data.format`; auto goes by each file's name."""

    name: str
    files: list[Path]
    format: str = "auto"
    text_key: str = "text"

    def __post_init__(self) -> None:
        # The files, by their places, that `chunks` leaves out.
        self.left_out: frozenset[int] = frozenset()
        self._sizes = [path.stat().st_size for path in self.files]
        self.size = sum(self._sizes)

    def chunks(self, cursor: Cursor) -> Iterator[Chunk]:
        """Yield the chunks from `cursor` on, file by file."""
        for i in range(cursor.file, len(self.files)):
            if i not in self.left_out:
                yield from self._file_chunks(i, cursor.start if i == cursor.file else 0)

    def compressed(self) -> dict[int, int]:
        """Return the places of the compressed files, and how many bytes each has."""
        return {i: self._sizes[i] for i, path in enumerate(self.files) if is_compressed(path)}

    def sample(self, budget: int) -> Iterator[Chunk]:
        """Yield chunks of about `budget` bytes, evenly from up to 64 files of the source."""
        count = min(len(self.files), _SAMPLE_FILES)
        share = budget // count
        for k in range(count):
            i = k * len(self.files) // count
            path = self.files[i]
            if kind_of(path, self.format) == "parquet" or is_compressed(path):
                yield from up_to(share, self._file_chunks(i, 0))
            else:
                yield from self._sample_file(i, share)

    def fingerprint(self) -> list[object]:
        """Return the format, the key of the text and each file's path, size and time."""
        files = [
            [str(path), size, path.stat().st_mtime_ns]
            for path, size in zip(self.files, self._sizes, strict=True)
        ]
        return [self.format, self.text_key, files]

    def _sample_file(self, i: int, share: int) -> Iterator[Chunk]:
        """Yield `share` bytes of a plain file as parts at equal distances."""
        path, size, part = self.files[i], self._sizes[i], _SAMPLE_PART
        kind = kind_of(path, self.format)
        if size <= share:
            share, part = size, size
        count = max(1, share // max(part, 1))
        for k in range(count):
            start = k * size // count
            stop = min(start + part, size)
            if kind == "text":
                start, stop = (cut_before(path, at, size, part) for at in (start, stop))
            yield Chunk(Cursor(i, start), str(path), kind, stop, stop - start)

    def _file_chunks(self, i: int, at: int) -> Iterator[Chunk]:
        path, size = self.files[i], self._sizes[i]
        kind = kind_of(path, self.format)
        head = b""
        try:
            if kind == "parquet":
                found = parquet_chunks(i, path, at, self.text_key, size)
            elif is_compressed(path):
                found = stream_chunks(i, path, kind, at)
            else:
                found = range_chunks(i, path, kind, at, size)
            for chunk in found:
                yield chunk
                at, head = chunk.stop, chunk.head
        except (OSError, ValueError) as error:  # pyarrow's are ValueErrors
            if isinstance(error, UserError):
                raise
            # A text that has begun must end; a file that gave nothing has no document at all.
            rest = "text" if kind == "text" and at else "lines"
            problem = f"cannot be read{' further' if at else ''}: {error}"
            yield Chunk(Cursor(i, at), str(path), rest, at, 0, b"", head=head, problem=problem)


class StdlibSource(FileSource):
    """The standard library's files; the hash of a file's name decides whether it is held out."""

    def __init__(self, files: list[Path], root: Path, val_fraction: float) -> None:
        """root: the folder that the files' names are relative to."""
        super().__init__("stdlib", files, "text")
        self._root, self._val_fraction = root, val_fraction

    def chunks(self, cursor: Cursor) -> Iterator[Chunk]:
        """Yield the chunks from `cursor` on, each marked as held out or not."""
        for chunk in super().chunks(cursor):
            name = os.fsencode(Path(chunk.path).relative_to(self._root).as_posix())
            yield replace(chunk, held_out=is_held_out(name, self._val_fraction))

    def sample(self, budget: int) -> Iterator[Chunk]:
        """Yield about 8 MB of complete files at equal distances, whatever the budget is."""
        step = max(1, -(-self.size // _STDLIB_SAMPLE))
        for i in range(0, len(self.files), step):
            size = self._sizes[i]
            yield Chunk(Cursor(i), str(self.files[i]), "text", size, size)


def expand(globs: object, without: Path) -> list[Path]:
    """Return the files that globs name, sorted and each once; a folder stands for all its files.

    globs: `data.files` of one source, a string or a list of them. Files in the folder `without`,
    where the shards are written, are left out. Raises UserError for a glob that names no file.
    """
    excluded = os.path.realpath(without) + os.sep
    found: list[str] = []
    patterns = globs if isinstance(globs, list) else [globs]
    for pattern in patterns:
        if not isinstance(pattern, str) or not pattern:
            raise UserError(
                f"data.files={globs}: must be a glob, a list of globs, or a map of source name to "
                "globs"
            )
        pattern = str(Path(pattern).expanduser())
        if Path(pattern).is_dir():
            pattern = f"{glob.escape(pattern)}/**"
        matched = [
            path
            for path in glob.glob(pattern, recursive=True)
            if Path(path).is_file() and not os.path.realpath(path).startswith(excluded)
        ]
        if not matched:
            raise UserError(f"data.files: no file matches {pattern} (from {Path.cwd()})")
        found += matched
    if not found:
        raise UserError("data.files=[]: at least one file is needed")
    # By real path, because links may lead to a file twice, or around in a circle; the file is
    # named by the shortest path that leads to it.
    found.sort(key=lambda path: (path.count(os.sep), path), reverse=True)
    shortest = {os.path.realpath(path): path for path in found}
    return [Path(path) for path in sorted(shortest.values())]
