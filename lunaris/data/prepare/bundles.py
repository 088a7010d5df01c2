"""Bundles: files of encoded chunks, which the merging takes instead of encoding them.

A bundle holds chunks of one source that follow each other. For each chunk it has the lengths of the
documents ([D] int64), whether they are held out ([D] bool), and the tokens of both parts. An index
of the chunks in JSON follows, then its length and its CRC-32 (8 bytes each, little-endian). A
bundle is complete or absent. Of a damaged one, the chunks that are damaged are encoded again.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from lunaris.atomic_files import sync_folder
from lunaris.data import manifest as manifests
from lunaris.data.prepare import chunks as sizes
from lunaris.data.prepare.chunks import Chunk, Cursor, Source
from lunaris.data.prepare.encode import PARTS, Encoded, Job, Span, chunk_path
from lunaris.data.prepare.interleave import Progress
from lunaris.data.prepare.readers import Problem
from lunaris.data.prepare.spec import PrepareSpec
from lunaris.runs.preparation import BUNDLES, bundle_name, bundle_numbers

_NUMBER = 8  # Bytes of a number of the footer.
_COPY = 2**20


def bundles_folder(folder: Path) -> Path:
    """Return the folder of the bundles of an unfinished folder of shards."""
    return folder / manifests.UNFINISHED / BUNDLES


def digest_of(spec: PrepareSpec) -> str:
    """Return what the bytes of a bundle depend on besides its chunks; the tokenizer is there."""
    tokenizer = manifests.sha256(spec.folder / manifests.TOKENIZER)
    text = json.dumps([spec.settings, tokenizer, sizes.CHUNK_BYTES])
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Stored:
    """A chunk in a bundle, without its payload; encoded: None where it was only looked up."""

    chunk: Chunk
    encoded: Encoded | None


class BundleWriter:
    """Writes the chunks that one process is given into bundles."""

    def __init__(self, folder: Path, job: Job, digest: str) -> None:
        """folder: of the bundles. job: how the chunks are encoded, and where their tokens are."""
        self._folder, self._job, self._digest = folder, job, digest
        self._entries: list[dict[str, Any]] = []
        self._file: IO[bytes] | None = None

    def add(self, chunk: Chunk, encoded: Encoded) -> None:
        """Append a chunk, whose token files are removed; it follows the one before it."""
        if self._file is None:
            self._file = self._unfinished().open("wb")
        file, start = self._file, self._file.tell()
        arrays = [encoded.lengths.astype("<i8").tobytes(), encoded.held_out.astype("u1").tobytes()]
        crc = 0
        for raw in arrays:
            file.write(raw)
            crc = zlib.crc32(raw, crc)
        counts = {}
        for part in PARTS:
            path = chunk_path(self._job.folder, chunk, part)
            with path.open("rb") as tokens:
                while raw := tokens.read(_COPY):
                    file.write(raw)
                    crc = zlib.crc32(raw, crc)
            counts[part] = path.stat().st_size
            path.unlink()
        self._entries.append(
            {
                "chunk": _as_json(chunk),
                "offset": start,
                "documents": len(encoded.lengths),
                "bytes": counts,
                "crc": crc,
                "open": encoded.open,
                "text_bytes": encoded.text_bytes,
                "lines": encoded.lines,
                "problems": [[problem.line, problem.message] for problem in encoded.problems],
            }
        )

    def finish(self) -> None:
        """Make the bundle durable and complete, if it has any chunk; the next one begins."""
        if self._file is None:
            return
        entries, self._entries = self._entries, []
        index = json.dumps({"digest": self._digest, "entries": entries}).encode()
        with self._file as file:
            self._file = None
            file.write(index)
            for number in (len(index), zlib.crc32(index)):
                file.write(number.to_bytes(_NUMBER, "little"))
            file.flush()
            os.fsync(file.fileno())
        first = entries[0]["chunk"]
        size = sum(entry["chunk"]["size"] for entry in entries)
        name = bundle_name(first["source"], first["file"], first["start"], size)
        self._unfinished().replace(self._folder / name)
        sync_folder(self._folder)

    def _unfinished(self) -> Path:
        return self._job.folder / "unfinished"


class Bundles:
    """The bundles of an unfinished folder of shards."""

    def __init__(self, folder: Path, digest: str, *, read: bool) -> None:
        """folder: of the bundles, which may be absent. digest: of those that fit.

        read: whether `find` reads the chunks, and so takes a damaged one as absent.
        """
        self._digest, self._read = digest, read
        named = ((path, bundle_numbers(path)) for path in folder.glob("*.bundle"))
        found = sorted((numbers, path) for path, numbers in named if numbers is not None)
        # Of each source: where its bundles begin, in order, and their files.
        self._starts: dict[int, list[tuple[int, int]]] = {}
        self._paths: dict[int, list[Path]] = {}
        for (source, file, start, _), path in found:
            self._starts.setdefault(source, []).append((file, start))
            self._paths.setdefault(source, []).append(path)
        # Of each source: the bundle that was looked into last, with its chunks.
        self._opened: dict[int, tuple[Path, dict[tuple[int, int], dict[str, Any]]]] = {}

    def chunks(self, number: int, source: Source, cursor: Cursor) -> Iterator[Chunk | Stored]:
        """Yield the chunks of a source, the `number`-th, from a cursor on.

        The input is only read where a chunk is in no bundle; from there to the end of its file.
        """
        while number in self._starts:
            while (stored := self.find(number, cursor)) is not None:
                yield stored
                cursor = after(stored.chunk)
            for chunk in source.chunks(cursor):
                yield self.find(number, chunk.cursor) or chunk
                cursor = after(chunk)
                if chunk.last:
                    break
            else:
                return
        yield from source.chunks(cursor)

    def find(self, source: int, cursor: Cursor) -> Stored | None:
        """Return the chunk of a source that begins at a cursor, or None where no bundle has it."""
        place = (cursor.file, cursor.start)
        k = bisect.bisect_right(self._starts.get(source, []), place) - 1
        if k < 0:
            return None
        path = self._paths[source][k]
        if source not in self._opened or self._opened[source][0] != path:
            self._opened[source] = path, self._index(path)
        entry = self._opened[source][1].get(place)
        if entry is None:
            return None
        chunk = _from_json(entry["chunk"])
        if not self._read:
            return Stored(chunk, None)
        encoded = _encoded(path, entry)
        return None if encoded is None else Stored(chunk, encoded)

    def remove(self, progress: Sequence[Progress]) -> None:
        """Remove the bundles before where the merging of each source durably is."""
        for source, starts in self._starts.items():
            at = progress[source]
            # The last one that begins before that point may hold more.
            k = bisect.bisect_right(starts, (at.file, at.start)) - 1
            for path in self._paths[source][: max(k, 0)]:
                path.unlink(missing_ok=True)
            del self._paths[source][: max(k, 0)], starts[: max(k, 0)]

    def _index(self, path: Path) -> dict[tuple[int, int], dict[str, Any]]:
        """Return the chunks of a bundle by where they begin; none of one that does not fit."""
        try:
            with path.open("rb") as file:
                end = file.seek(-2 * _NUMBER, os.SEEK_END)
                length, crc = (int.from_bytes(file.read(_NUMBER), "little") for _ in range(2))
                file.seek(end - length)
                raw = file.read(length)
            index = json.loads(raw) if zlib.crc32(raw) == crc else {}
        except (OSError, ValueError, OverflowError):
            return {}
        if index.get("digest") != self._digest:
            return {}
        return {(e["chunk"]["file"], e["chunk"]["start"]): e for e in index["entries"]}


def after(chunk: Chunk) -> Cursor:
    """Return the cursor at which the source continues after a chunk."""
    if chunk.last:
        return Cursor(chunk.cursor.file + 1)
    return Cursor(chunk.cursor.file, chunk.stop, chunk.after)


def _encoded(path: Path, entry: dict[str, Any]) -> Encoded | None:
    """Return a chunk of a bundle, or None where it is damaged."""
    count, sizes_of = entry["documents"], entry["bytes"]
    try:
        with path.open("rb") as file:
            file.seek(entry["offset"])
            raw = file.read(9 * count + sum(sizes_of.values()))
    except OSError:
        return None
    if zlib.crc32(raw) != entry["crc"]:
        return None
    begin = entry["offset"] + 9 * count
    return Encoded(
        np.frombuffer(raw, "<i8", count).astype(np.int64),
        np.frombuffer(raw, "u1", count, offset=8 * count).astype(bool),
        entry["open"],
        entry["text_bytes"],
        entry["lines"],
        [Problem(line, message) for line, message in entry["problems"]],
        {
            "train": Span(path, begin, sizes_of["train"]),
            "val": Span(path, begin + sizes_of["train"], sizes_of["val"]),
        },
    )


def _as_json(chunk: Chunk) -> dict[str, Any]:
    """Return a chunk without its payload and head, which only its encoding needs."""
    kept = ("path", "kind", "stop", "size", "last", "problem", "after", "held_out", "source")
    return asdict(chunk.cursor) | {name: getattr(chunk, name) for name in kept}


def _from_json(raw: dict[str, Any]) -> Chunk:
    values = dict(raw)
    cursor = Cursor(values.pop("file"), values.pop("start"), values.pop("place"))
    return Chunk(cursor, **values)
