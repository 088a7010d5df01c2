"""Units of work: bounded parts of the input, cut the same way whoever works on them.

A plain file is cut by bytes without reading it, Parquet by row groups; what must be read from its
beginning (a compressed file, a stream of documents) is cut as it is read and carries its bytes.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from lunaris.data.cuts import cut
from lunaris.errors import UserError, did_you_mean

# Bytes of input a unit aims at.
UNIT_BYTES = 8 * 2**20
# A document belongs to the validation part by a hash of so many of its first bytes.
HEAD_BYTES = 2**16
_BLOCK = 2**20
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
_KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet"}
FORMATS = ("auto", "text", "lines", "jsonl", "parquet")


@dataclass(frozen=True)
class Cursor:
    """Where a unit begins: file of the source, and bytes, row groups or documents within it."""

    file: int = 0
    start: int = 0


@dataclass(frozen=True)
class Unit:
    """A part of one file of a source, made into tokens by one worker.

    kind: text (a piece of one document), lines, jsonl, parquet, documents, or problem. start, stop:
    bytes (decompressed), row groups or documents. size: bytes of the source's `size` it stands for.
    payload: the bytes, documents (bytes, or a str that says why one cannot be had) or the problem.
    """

    source: int
    cursor: Cursor
    path: str
    kind: str
    stop: int
    size: int
    payload: bytes | list[bytes | str] | str | None = None
    # The first bytes of a text's one document, where the payload is given.
    head: bytes = b""
    # Whether the file ends here, and with it a text's one document.
    last: bool = True

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
        return [
            [str(path), size, path.stat().st_mtime_ns]
            for path, size in zip(self.files, self._sizes, strict=True)
        ]

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
        at = start
        try:
            if kind == "parquet":
                yield from parquet_units(index, i, path, start, self.text_key, size)
            elif is_compressed(path):
                for unit in stream_units(index, i, path, kind, start):
                    at = unit.stop
                    yield unit
            else:
                yield from range_units(index, i, path, kind, start, size)
        except (OSError, EOFError, lzma.LZMAError) as error:
            yield _problem(index, i, path, at, error)
        except ValueError as error:
            # zstandard and pyarrow derive their errors from ValueError.
            if isinstance(error, UserError):
                raise
            yield _problem(index, i, path, at, error)


def _problem(index: int, i: int, path: Path, at: int, error: Exception) -> Unit:
    text = f"cannot be read on: {error}"
    return Unit(index, Cursor(i, at), str(path), "problem", at, 0, text)


def is_compressed(path: Path) -> bool:
    return path.suffix.lower() in COMPRESSIONS


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
    number = -(-start // UNIT_BYTES)
    while True:
        number += 1
        stop = min(number * UNIT_BYTES, size)
        if kind == "text":
            stop = cut_before(path, stop, size, UNIT_BYTES)
        last = stop >= size
        yield Unit(index, Cursor(i, at), str(path), kind, stop, stop - at, last=last)
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
    """Yield units that carry their bytes, from a compressed file read from its beginning."""
    with open_compressed(path) as (file, raw):
        head = _skip(file, start)
        if len(head) < min(start, HEAD_BYTES):
            return
        at, told = start, raw.tell() if start else 0
        pending = bytearray()
        last = False
        while not last:
            ended = False
            while len(pending) <= UNIT_BYTES and not ended:
                ended = not _read_on(file, pending)
            head = head or bytes(pending[:HEAD_BYTES])
            if ended:
                end = len(pending)
            elif kind == "text":
                begin = UNIT_BYTES - min(HEAD_BYTES, UNIT_BYTES // 2)
                end = begin + cut(bytes(pending[begin : UNIT_BYTES + 1]))
            else:
                end, ended = _line_end(file, pending)
            last = ended and end == len(pending)
            part = bytes(pending[:end])
            del pending[:end]
            now = raw.tell()
            yield Unit(
                index,
                Cursor(i, at),
                str(path),
                kind,
                at + end,
                now - told,
                payload=part,
                head=head if kind == "text" else b"",
                last=last,
            )
            at, told = at + end, now


def _skip(file: IO[bytes], count: int) -> bytes:
    """Read past `count` bytes and return the first `HEAD_BYTES` of them."""
    head = b""
    while count > 0:
        block = file.read(min(count, _BLOCK))
        if not block:
            break
        head = head if len(head) >= HEAD_BYTES else (head + block)[:HEAD_BYTES]
        count -= len(block)
    return head


def _read_on(file: IO[bytes], pending: bytearray) -> bool:
    """Append a block to `pending`; return whether there was one."""
    block = file.read(_BLOCK)
    pending += block
    return bool(block)


def _line_end(file: IO[bytes], pending: bytearray) -> tuple[int, bool]:
    """Return where a unit of whole lines ends, and whether the file ended on the way.

    A line longer than a unit is a unit of its own.
    """
    end = pending.rfind(b"\n", 0, UNIT_BYTES) + 1
    searched = UNIT_BYTES
    while not end:
        end = pending.find(b"\n", searched) + 1
        searched = len(pending)
        if not end and not _read_on(file, pending):
            return len(pending), True
    return end, False


class open_compressed:  # noqa: N801  used like open()
    """Open a compressed file: gives the decompressed stream and the raw one below it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> tuple[IO[bytes], IO[bytes]]:
        raw = self._raw = self._path.open("rb")
        suffix = self._path.suffix.lower()
        stream: Any
        if suffix == ".gz":
            stream = gzip.GzipFile(fileobj=raw)
        elif suffix == ".bz2":
            stream = bz2.BZ2File(raw)
        elif suffix == ".xz":
            stream = lzma.LZMAFile(raw)
        else:
            zstandard = need("zstandard", f"{self._path}: .zst")
            stream = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
        return stream, raw

    def __exit__(self, *_: object) -> None:
        self._raw.close()


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


def need(module: str, what: str) -> Any:
    """Import a module of the extra `hf`. Raises UserError naming the extra without it."""
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"{what} needs {module.partition('.')[0]}, which is not installed: "
            "pip install 'lunaris[hf]'"
        ) from error
