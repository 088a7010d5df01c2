"""Files as a source of documents: which files a glob names, and how they are cut into chunks."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lunaris.data.prepare.chunks import (
    Chunk,
    Cursor,
    cut_before,
    kind_of,
    parquet_chunks,
    range_chunks,
    stream_chunks,
)
from lunaris.data.prepare.decompress import is_compressed
from lunaris.errors import UserError

# Bytes of each part of a plain file that is sampled.
_SAMPLE_PART = 2**18
# The most files that a sample reads.
_SAMPLE_FILES = 64


@dataclass
class FileSource:
    """The files of one source, in order. format: `data.format`; auto goes by each file's name."""

    name: str
    files: list[Path]
    format: str = "auto"
    text_key: str = "text"

    def __post_init__(self) -> None:
        self._sizes = [path.stat().st_size for path in self.files]
        self.size = sum(self._sizes)

    def chunks(self, index: int, cursor: Cursor) -> Iterator[Chunk]:
        """Yield the chunks from `cursor` on, file by file."""
        for i in range(cursor.file, len(self.files)):
            start = cursor.start if i == cursor.file else 0
            yield from self._file_chunks(index, i, start)

    def sample(self, budget: int) -> Iterator[Chunk]:
        """Yield chunks of about `budget` bytes, evenly from up to 64 files of the source."""
        count = min(len(self.files), _SAMPLE_FILES)
        share = budget // count
        for k in range(count):
            i = k * len(self.files) // count
            if kind_of(self.files[i], self.format) in ("text", "lines", "jsonl") and not (
                is_compressed(self.files[i])
            ):
                yield from self._sample_file(i, share)
                continue
            left = share
            for chunk in self._file_chunks(0, i, 0):
                yield chunk
                left -= chunk.size
                if left <= 0:
                    break

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
            yield Chunk(0, Cursor(i, start), str(path), kind, stop, stop - start)

    def _file_chunks(self, index: int, i: int, start: int) -> Iterator[Chunk]:
        path, size = self.files[i], self._sizes[i]
        kind = kind_of(path, self.format)
        at, head = start, b""
        try:
            if kind == "parquet":
                found = parquet_chunks(index, i, path, start, self.text_key, size)
            elif is_compressed(path):
                found = stream_chunks(index, i, path, kind, start)
            else:
                found = range_chunks(index, i, path, kind, start, size)
            for chunk in found:
                yield chunk
                at, head = chunk.stop, chunk.head
        except (OSError, ValueError) as error:  # pyarrow's are ValueErrors
            if isinstance(error, UserError):
                raise
            # A text that has begun must end; a file that gave nothing has no document at all.
            rest = "text" if kind == "text" and at else "lines"
            problem = f"cannot be read{' further' if at else ''}: {error}"
            yield Chunk(
                index, Cursor(i, at), str(path), rest, at, 0, b"", head=head, problem=problem
            )


def expand(globs: object, without: Path) -> list[Path]:
    """Return the files that globs name, sorted and each once; a folder stands for all its files.

    globs: `data.files` of one source, a string or a list of them. Files in the folder `without`,
    where the shards are written, are left out. Raises UserError for a glob that names no file.
    """
    excluded = os.path.realpath(without) + os.sep
    found: dict[str, str] = {}
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
        # By real path, because links may lead to a file twice, or around in a circle; the file is
        # named by the shortest path that leads to it.
        matched = {
            os.path.realpath(path): path
            for path in sorted(
                glob.glob(pattern, recursive=True), key=_depth_and_name, reverse=True
            )
            if Path(path).is_file()
        }
        matched = {real: path for real, path in matched.items() if not real.startswith(excluded)}
        if not matched:
            raise UserError(f"data.files: no file matches {pattern} (from {Path.cwd()})")
        for real, path in matched.items():
            found[real] = min(path, found.get(real, path), key=_depth_and_name)
    if not found:
        raise UserError("data.files=[]: at least one file is needed")
    return [Path(path) for path in sorted(found.values())]


def _depth_and_name(path: str) -> tuple[int, str]:
    return path.count(os.sep), path
