"""Interleaving the sources' documents into shards, in an order that depends on the input only."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from lunaris.data.prepare.chunks import Chunk
from lunaris.data.prepare.encode import PARTS, Encoded, chunk_path
from lunaris.data.prepare.shard_writer import ShardWriter
from lunaris.errors import UserError

# By the seed, the sources start up to this many tokens apart in the rotation.
_PHASE_TOKENS = 1024


@dataclass
class Progress:
    """How far one source has been merged: everything that the merging of the rest depends on."""

    file: int = 0
    start: int = 0  # of the chunk that is next or being merged
    documents_done: int = 0  # of that chunk
    open: bool = False  # whether the last merged document continues
    place: dict[str, object] | None = None  # the source's own note of `start`
    first_line: int = 0  # lines of the chunk's file before the chunk
    taken: int = 0  # tokens
    documents: int = 0
    bytes: int = 0
    skipped: int = 0
    exhausted: bool = False


@dataclass
class _Loaded:
    """The chunk of a source that is being merged, with its tokens in memory."""

    chunk: Chunk
    encoded: Encoded
    tokens: dict[str, np.ndarray]
    # [D] int64, tokens before each document: in the chunk, and in the document's part of it.
    before: np.ndarray
    before_in_part: np.ndarray


class SourceInterleaver:
    """Appends the documents of encoded chunks to the shards, mixed in proportion to the weights.

    The next document comes from the source with the fewest tokens taken relative to its weight, so
    that any stretch of the output holds the sources in the given proportions to within a document.
    Validation documents go to separate shards for each source.
    """

    def __init__(
        self,
        names: list[str],
        weights: list[float],
        train: ShardWriter,
        val: list[ShardWriter],
        chunks: Path,
        *,
        seed: int,
        skip_problems: bool,
        stop_at_first: bool,
        report: Callable[[str], None],
        state: list[dict[str, Any]] | None = None,
    ) -> None:
        """train, val: the writers of the training part and of each source's validation part.

        chunks: the folder of the token files. skip_problems: leave unreadable documents out, and
        pass a message to `report`. stop_at_first: end when one source is exhausted. state: the
        `state()` of an interrupted interleaver.
        """
        self._names, self._weights = names, np.array(weights, dtype=np.float64)
        self._train, self._val, self._chunks = train, val, chunks
        self._skip_problems, self._stop_at_first = skip_problems, stop_at_first
        self._report = report
        phases = np.random.default_rng(seed).random(len(names))
        self._phases = phases * _PHASE_TOKENS * self._weights / self._weights.sum()
        self.progress = [_restored(p) for p in state] if state else [Progress() for _ in names]
        self._queues: list[deque[tuple[Chunk, Encoded]]] = [deque() for _ in names]
        self._loaded: list[_Loaded | None] = [None] * len(names)
        self._planned = [False] * len(names)
        self.bytes_read = 0

    def state(self) -> list[dict[str, Any]]:
        """Return what a later interleaver needs to continue; JSON can hold it."""
        return [asdict(progress) for progress in self.progress]

    def add(self, chunk: Chunk, encoded: Encoded) -> None:
        """Take the next chunk of its source."""
        self._queues[chunk.source].append((chunk, encoded))

    def waiting(self, source: int) -> int:
        """Return how many chunks of a source were added and are not yet begun."""
        return len(self._queues[source])

    def end(self, source: int) -> None:
        """Note that a source has no chunk after those that were added."""
        self._planned[source] = True

    def advance(self) -> int | None:
        """Merge as far as the added chunks allow.

        Returns the source whose next chunk is needed, or None when all is merged. Raises UserError
        for a document that cannot be read, unless problems are skipped.
        """
        while True:
            source = self._next_source()
            if source is None:
                return None
            loaded = self._loaded[source] or self._load(source)
            if loaded is None:
                if self._planned[source]:
                    self.progress[source].exhausted = True
                    continue
                return source
            self._take(source, loaded)

    def _next_source(self) -> int | None:
        for i, progress in enumerate(self.progress):
            if progress.open and not progress.exhausted:
                return i
        if self._stop_at_first and any(progress.exhausted for progress in self.progress):
            return None
        shares = self._shares()
        source = int(np.argmin(shares))
        return None if shares[source] == np.inf else source

    def _shares(self) -> np.ndarray:
        """Return the tokens taken of each source relative to its weight ([S]); inf: exhausted."""
        taken = np.array([progress.taken for progress in self.progress], dtype=np.float64)
        exhausted = np.array([progress.exhausted for progress in self.progress])
        return np.where(exhausted, np.inf, (taken + self._phases) / self._weights)

    def _load(self, source: int) -> _Loaded | None:
        if not self._queues[source]:
            return None
        chunk, encoded = self._queues[source].popleft()
        progress = self.progress[source]
        assert progress.documents_done == 0 or progress.start == chunk.start
        if progress.file != chunk.cursor.file:  # an empty file in between has no chunk
            progress.first_line = 0
        progress.file, progress.start = chunk.cursor.file, chunk.cursor.start
        self._check(source, chunk, encoded)
        dtype = self._train.dtype
        tokens = {part: np.fromfile(chunk_path(self._chunks, chunk, part), dtype) for part in PARTS}
        lengths, held_out = encoded.lengths, encoded.held_out
        before_in_part = np.where(
            held_out, _before(lengths * held_out), _before(lengths * ~held_out)
        )
        loaded = _Loaded(chunk, encoded, tokens, _before(lengths), before_in_part)
        self._loaded[source] = loaded
        return loaded

    def _check(self, source: int, chunk: Chunk, encoded: Encoded) -> None:
        for problem in encoded.problems:
            line = self.progress[source].first_line + problem.line
            text = f"{chunk.path}:{line}: {problem.message}"
            if not self._skip_problems:
                raise UserError(f"{text}; data.on_error=skip leaves such documents out")
            self._report(f"skipped {text}")

    def _take(self, source: int, loaded: _Loaded) -> None:
        """Merge documents of a source until another source's turn or the end of the chunk."""
        progress, lengths = self.progress[source], loaded.encoded.lengths
        first = progress.documents_done
        last = len(lengths)
        if first < last:
            count = last - first if self._alone(source) else self._turn(source, loaded, first)
            last = first + count
            self._append(source, loaded, first, last)
            progress.documents_done = last
            progress.taken += int(lengths[first:last].sum())
            progress.open = loaded.encoded.open and last == len(lengths)
            progress.documents += last - first - progress.open
        if last == len(lengths):
            self._unload(source, loaded)

    def _alone(self, source: int) -> bool:
        return all(p.exhausted for i, p in enumerate(self.progress) if i != source)

    def _turn(self, source: int, loaded: _Loaded, first: int) -> int:
        """Return how many documents to take before another source has the smallest share."""
        others = np.delete(self._shares(), source).min()
        start = self.progress[source].taken + self._phases[source]
        share = (start + loaded.before[first:] - loaded.before[first]) / self._weights[source]
        return max(1, int(np.searchsorted(share, others, side="right")))

    def _append(self, source: int, loaded: _Loaded, first: int, last: int) -> None:
        writers = {"train": self._train, "val": self._val[source]}
        lengths, held_out = loaded.encoded.lengths[first:last], loaded.encoded.held_out[first:last]
        for part, mine in zip(PARTS, (~held_out, held_out), strict=True):
            which = np.flatnonzero(mine)
            if len(which):
                begin = loaded.before_in_part[first + which[0]]
                tokens = loaded.tokens[part][begin : begin + int(lengths[which].sum())]
                writers[part].append(tokens)

    def _unload(self, source: int, loaded: _Loaded) -> None:
        progress, chunk = self.progress[source], loaded.chunk
        progress.documents_done = 0
        progress.start, progress.place = chunk.stop, chunk.after
        progress.first_line += loaded.encoded.lines
        if chunk.last:
            progress.file, progress.start, progress.first_line = chunk.cursor.file + 1, 0, 0
        progress.bytes += loaded.encoded.text_bytes
        progress.skipped += len(loaded.encoded.problems)
        self.bytes_read += chunk.size
        self._loaded[source] = None
        for part in PARTS:
            chunk_path(self._chunks, chunk, part).unlink()


def _before(lengths: np.ndarray) -> np.ndarray:
    """Return the sum of all lengths before each ([D] int64)."""
    return np.cumsum(lengths) - lengths


def _restored(state: dict[str, Any]) -> Progress:
    return Progress(**{f.name: state[f.name] for f in fields(Progress)})
