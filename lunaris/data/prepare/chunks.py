"""Units of work: bounded parts of the input, cut the same way whoever works on them.

A plain file is cut by bytes without reading it, Parquet by row groups; what must be read from its
beginning (a compressed file, a stream of documents) is cut as it is read and carries its bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lunaris.data.extras import need
from lunaris.data.prepare.decompress import CompressedFile, is_compressed
from lunaris.data.text_split import cut
from lunaris.errors import UserError, did_you_mean

# Bytes of input a unit aims at.
UNIT_BYTES = 4 * 2**20
# A document belongs to the validation part by a hash of so many of its first bytes.
HEAD_BYTES = 2**16
_KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet"}
FORMATS = ("auto", "text", "lines", "jsonl", "parquet")


@dataclass(frozen=True)
class Cursor:
    """Where a unit begins: file of the source, and bytes, row groups or documents within it.

    place: what the source itself noted of that point, for JSON (`Unit.after`), or None.
    """

    file: int = 0
    start: int = 0
    place: Any = None


@dataclass(frozen=True)
class Unit:
    """A part of one file of a source, made into tokens by one worker.

    kind: text (a piece of one document), lines, jsonl, parquet or documents. start, stop: bytes
    (decompressed), row groups or documents. size: bytes of the source's `size` it stands for.
    payload: the bytes, or the documents (bytes, or a str that says why one cannot be had).
    """

    source: int
    cursor: Cursor
    path: str
    kind: str
    stop: int
    size: int
    payload: bytes | list[bytes | str] | None = None
    # The first bytes of a text's one document, where it is in several units or a payload.
    head: bytes = b""
    # Whether the file ends here, and with it a text's one document.
    last: bool = True
    # Why what comes after these documents cannot be read.
    problem: str = ""
    # What a source that is read from its beginning notes of `stop`, to get there sooner.
    after: Any = None

    @property
    def start(self) -> int:
        return self.cursor.start


class Source(Protocol):
    """A named series of documents that can be cut into units from any unit's beginning."""

    name: str
    size: int  # bytes of all its input, 0 where that is not known
    text_key: str  # of records that its units' readers parse

    def units(self, index: int, cursor: Cursor) -> Iterator[Unit]:
        """Yield the units from `cursor` on; index: which of the sources this is."""

    def sample(self, budget: int) -> Iterator[Unit]:
        """Yield units of about `budget` bytes together, from all over the source."""

    def fingerprint(self) -> list[Any]:
        """Return what tells this input from another, for JSON."""


@dataclass
class FileSource:
    """Files of one source, in order. format: one of `FORMATS`; auto goes by each file's name."""

    name: str
    files: list[Path]
    format: str = "auto"
    text_key: str = "text"

    def __post_init__(self) -> None:
        self._sizes = [path.stat().st_size for path in self.files]
        self.size = sum(self._sizes)

    def units(self, index: int, cursor: Cursor) -> Iterator[Unit]:
        for i in range(cursor.file, len(self.files)):
            start = cursor.start if i == cursor.file else 0
            yield from self._file_units(index, i, start)

    def sample(self, budget: int) -> Iterator[Unit]:
        count = min(len(self.files), 64)
        share = budget // count
        for k in range(count):
            i = k * len(self.files) // count
            if kind_of(self.files[i], self.format) in ("text", "lines", "jsonl") and not (
                is_compressed(self.files[i])
            ):
                yield from self._spread(i, share)
                continue
            left = share
            for unit in self._file_units(0, i, 0):
                yield unit
                left -= unit.size
                if left <= 0:
                    break

    def fingerprint(self) -> list[Any]:
        files = [
            [str(path), size, path.stat().st_mtime_ns]
            for path, size in zip(self.files, self._sizes, strict=True)
        ]
        return [self.format, self.text_key, files]

    def _spread(self, i: int, share: int) -> Iterator[Unit]:
        """Yield parts of a plain file of a quarter of a megabyte, evenly over it."""
        path, size, part = self.files[i], self._sizes[i], 2**18
        kind = kind_of(path, self.format)
        if size <= share:
            share, part = size, size
        count = max(1, share // max(part, 1))
        for k in range(count):
            start = k * size // count
            stop = min(start + part, size)
            if kind == "text":
                start, stop = (cut_before(path, at, size, part) for at in (start, stop))
            yield Unit(0, Cursor(i, start), str(path), kind, stop, stop - start)

    def _file_units(self, index: int, i: int, start: int) -> Iterator[Unit]:
        path, size = self.files[i], self._sizes[i]
        kind = kind_of(path, self.format)
        at, head = start, b""
        try:
            if kind == "parquet":
                found = parquet_units(index, i, path, start, self.text_key, size)
            elif is_compressed(path):
                found = stream_units(index, i, path, kind, start)
            else:
                found = range_units(index, i, path, kind, start, size)
            for unit in found:
                yield unit
                at, head = unit.stop, unit.head
        except (OSError, ValueError) as error:  # pyarrow's are ValueErrors
            if isinstance(error, UserError):
                raise
            # A text that has begun has to end; else there is not even an empty document.
            rest = "text" if kind == "text" and at else "lines"
            problem = f"cannot be read{' on' if at else ''}: {error}"
            yield Unit(
                index, Cursor(i, at), str(path), rest, at, 0, b"", head=head, problem=problem
            )


def kind_of(path: Path, format: str) -> str:
    """Return what a file holds, by `format` or, for auto, by its name."""
    if format != "auto":
        return format
    plain = path.with_suffix("") if is_compressed(path) else path
    return _KINDS.get(plain.suffix.lower(), "text")


def range_units(index: int, i: int, path: Path, kind: str, start: int, size: int) -> Iterator[Unit]:
    """Yield byte ranges of a plain file; a text's are cut where words begin.

    A line belongs to the range that it begins in, so ranges of lines need no look at the file.
    """
    at = start
    head = b""
    if kind == "text" and size > UNIT_BYTES:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
    number = -(-start // UNIT_BYTES)
    while True:
        number += 1
        stop = min(number * UNIT_BYTES, size)
        if kind == "text":
            stop = cut_before(path, stop, size, UNIT_BYTES)
        last = stop >= size
        yield Unit(index, Cursor(i, at), str(path), kind, stop, stop - at, head=head, last=last)
        if last:
            return
        at = stop


def cut_before(path: Path, at: int, size: int, unit_bytes: int) -> int:
    """Return where to cut a text at `at` or a little before it: at white space, or a character."""
    if at <= 0 or at >= size:
        return min(max(at, 0), size)
    reach = min(HEAD_BYTES, unit_bytes // 2)
    with path.open("rb") as file:
        file.seek(max(0, at - reach))
        window = file.read(min(at, reach) + 1)
    return at - (len(window) - 1) + cut(window)


def stream_units(index: int, i: int, path: Path, kind: str, start: int) -> Iterator[Unit]:
    """Yield units that carry their bytes, from a compressed file read from its beginning.

    Of a damaged file, what can be read of it, and in its last unit what the damage is.
    """
    with CompressedFile(path) as stream:
        head = stream.skip(start, HEAD_BYTES)
        at, told = start, stream.raw.tell() if start else 0
        last = False
        while not last:
            stream.fill(UNIT_BYTES)
            pending = stream.pending
            head = head or bytes(pending[:HEAD_BYTES])
            if stream.ended and len(pending) <= UNIT_BYTES:
                end = len(pending)
            elif kind == "text":
                begin = UNIT_BYTES - min(HEAD_BYTES, UNIT_BYTES // 2)
                end = begin + cut(bytes(pending[begin : UNIT_BYTES + 1]))
            else:
                end = stream.line_end(UNIT_BYTES)
            last = stream.ended and end == len(pending)
            part = bytes(pending[:end])
            del pending[:end]
            now = stream.raw.tell()
            # Of a file that gave nothing there is not even an empty document.
            damaged = last and stream.problem
            yield Unit(
                index,
                Cursor(i, at),
                str(path),
                "lines" if damaged and not head else kind,
                at + end,
                now - told,
                payload=_whole_lines(part) if damaged and kind != "text" else part,
                head=head if kind == "text" else b"",
                last=last,
                problem=stream.problem if last else "",
            )
            at, told = at + end, now


def _whole_lines(part: bytes) -> bytes:
    return part[: part.rfind(b"\n") + 1]


def parquet_units(
    index: int, i: int, path: Path, start: int, text_key: str, size: int
) -> Iterator[Unit]:
    """Yield runs of row groups whose text column is a unit long. Raises UserError without it."""
    parquet = need("pyarrow.parquet", f"{path}: Parquet")
    with parquet.ParquetFile(path) as file:
        metadata = file.metadata
        columns = file.schema_arrow.names
    if text_key not in columns:
        raise UserError(
            f"data.text_key={text_key}: {path} has no such column; it has "
            f"{', '.join(columns)}{did_you_mean(text_key, columns)}"
        )
    groups = metadata.num_row_groups
    paths = [metadata.schema.column(k).path for k in range(metadata.num_columns)]
    column = paths.index(text_key)
    first, held = start, 0
    for group in range(start, groups):
        held += metadata.row_group(group).column(column).total_uncompressed_size
        if held >= UNIT_BYTES or group == groups - 1:
            share = size * (group + 1) // groups - size * first // groups
            last = group == groups - 1
            yield Unit(index, Cursor(i, first), str(path), "parquet", group + 1, share, last=last)
            first, held = group + 1, 0
