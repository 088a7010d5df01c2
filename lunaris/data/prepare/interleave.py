"""Interleaving the sources' documents into shards, in an order that depends on the input only."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lunaris.data.prepare.chunks import Chunk
from lunaris.data.prepare.encode import PARTS, Encoded, chunk_path, read_tokens
from lunaris.data.prepare.shard_writer import MaskedShardWriter, ShardWriter
from lunaris.data.prepare.spec import PrepareSpec
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
    # [D + 1] int64, tokens before each document, and before the end: of the chunk, of each part.
    before: np.ndarray
    before_in_part: dict[str, np.ndarray]


class SourceInterleaver:
    """Appends the documents of encoded chunks to the shards, mixed in proportion to the weights.

    The next document comes from the source with the fewest tokens taken relative to its weight, so
    that any stretch of the output holds the sources in the given proportions to within a document.
    Validation documents go to separate shards for each source.
    """

    def __init__(
        self,
        spec: PrepareSpec,
        train: ShardWriter | MaskedShardWriter,
        val: Sequence[ShardWriter | MaskedShardWriter],
        chunks: Path,
        state: list[dict[str, Any]] | None = None,
    ) -> None:
        """train, val: the writers of the training part and of each source's validation part.

        chunks: the folder of the token files. state: the `progress` of an interrupted interleaver,
        as JSON.
        """
        self._keys, self._weights = spec.keys, np.array(spec.weights, dtype=np.float64)
        self._train, self._val, self._chunks = train, val, chunks
        phases = np.random.default_rng(spec.keys.seed).random(len(spec.sources))
        self._phases = phases * _PHASE_TOKENS * self._weights / self._weights.sum()
        self.progress = [Progress(**p) for p in state or [{} for _ in spec.sources]]
        self._queues: list[deque[tuple[Chunk, Encoded]]] = [deque() for _ in spec.sources]
        self._loaded: list[_Loaded | None] = [None] * len(spec.sources)
        self.bytes_read = 0

    def add(self, chunk: Chunk, encoded: Encoded) -> None:
        """Take the next chunk of its source."""
        self._queues[chunk.source].append((chunk, encoded))

    def waiting(self, source: int) -> int:
        """Return how many chunks of a source were added and are not yet begun."""
        return len(self._queues[source])

    def end(self, source: int) -> None:
        """Note that the source whose chunk `advance` asked for has no more."""
        self.progress[source].exhausted = True

    def advance(self) -> int | None:
        """Merge as far as the added chunks allow.

        Returns the source whose next chunk is needed, or None when all is merged. Raises UserError
        for a document that cannot be read, unless problems are skipped.
        """
        while (source := self._next_source()) is not None:
            loaded = self._loaded[source] or self._load(source)
            if loaded is None:
                return source
            self._take(source, loaded)
        return None

    def _next_source(self) -> int | None:
        for i, progress in enumerate(self.progress):
            if progress.open and not progress.exhausted:
                return i
        if self._keys.on_exhausted == "stop" and any(p.exhausted for p in self.progress):
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
        for problem in encoded.problems:
            self._report(f"{chunk.path}:{progress.first_line + problem.line}: {problem.message}")
        tokens = read_tokens(self._chunks, chunk, encoded, self._train.dtype)
        lengths, held_out = encoded.lengths, encoded.held_out
        before = {"train": _before(lengths * ~held_out), "val": _before(lengths * held_out)}
        loaded = self._loaded[source] = _Loaded(chunk, encoded, tokens, _before(lengths), before)
        return loaded

    def _report(self, problem: str) -> None:
        from tqdm import tqdm

        if self._keys.on_error != "skip":
            raise UserError(f"{problem}; data.on_error=skip leaves such documents out")
        tqdm.write(f"skipped {problem}", file=sys.stderr)

    def _take(self, source: int, loaded: _Loaded) -> None:
        """Merge documents of a source until another source's turn or the end of the chunk."""
        progress, documents = self.progress[source], len(loaded.encoded.lengths)
        first = last = progress.documents_done
        if first < documents:
            last += self._turn(source, loaded, first)
            for part, writer in (("train", self._train), ("val", self._val[source])):
                begin, end = loaded.before_in_part[part][[first, last]]
                if begin < end:
                    writer.append(loaded.tokens[part][begin:end])
            progress.documents_done = last
            progress.taken += int(loaded.before[last] - loaded.before[first])
            progress.open = loaded.encoded.open and last == documents
            progress.documents += last - first - progress.open
        if last == documents:
            self._unload(source, loaded)

    def _turn(self, source: int, loaded: _Loaded, first: int) -> int:
        """Return how many documents to take before another source has the smallest share."""
        others = np.delete(self._shares(), source).min(initial=np.inf)
        start = self.progress[source].taken + self._phases[source]
        share = (start + loaded.before[first:-1] - loaded.before[first]) / self._weights[source]
        return max(1, int(np.searchsorted(share, others, side="right")))

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
        if loaded.encoded.spans is None:
            for part in PARTS:
                chunk_path(self._chunks, chunk, part).unlink()


def _before(lengths: np.ndarray) -> np.ndarray:
    """Return the sum of all lengths before each, and of all ([D + 1] int64)."""
    return np.concatenate([[0], np.cumsum(lengths)])
