"""Many `.npy` files as one stream of tokens, and the sequences that are cut from it."""

from __future__ import annotations

import bisect
import mmap
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lunaris.data.shuffle import permute
from lunaris.errors import UserError

# A memory map takes a file descriptor; beyond this many, the least recently used one is closed.
_MOST_OPEN = 256


@dataclass(frozen=True)
class Shard:
    """One `.npy` file of tokens: where they begin (in bytes), how many, of which type.

    mask: the file of their loss mask, if they have one.
    """

    path: Path
    offset: int
    tokens: int
    dtype: np.dtype
    mask: Shard | None = None


class TokenStream:
    """The tokens from `start` to `stop` of several shards in a row, read through memory maps."""

    def __init__(self, shards: list[Shard], start: int = 0, stop: int | None = None) -> None:
        self._shards = [shard for shard in shards if shard.tokens]
        ends = np.cumsum([shard.tokens for shard in self._shards], dtype=np.int64)
        self._ends: list[int] = ends.tolist()
        total = self._ends[-1] if self._ends else 0
        self._start = start
        self._stop = total if stop is None else stop
        assert 0 <= self._start <= self._stop <= total
        self._open: OrderedDict[int, tuple[mmap.mmap, np.ndarray]] = OrderedDict()

    def __len__(self) -> int:
        return self._stop - self._start

    def read(self, position: int, out: np.ndarray) -> None:
        """Write the tokens from `position` on to out ([n], any integer type).

        Raises UserError where a shard was cut short after it was opened.
        """
        at = position + self._start
        assert 0 <= position and at + len(out) <= self._stop
        i = bisect.bisect_right(self._ends, at)
        tokens = self._map(i)
        begin = at - (self._ends[i] - len(tokens))
        while begin + len(out) > len(tokens):
            part = tokens[begin:]
            out[: len(part)] = part
            out, begin, i = out[len(part) :], 0, i + 1
            tokens = self._map(i)
        out[:] = tokens[begin : begin + len(out)]

    def mask(self) -> TokenStream | None:
        """Return the loss mask of the same tokens as a stream, or None if they have none."""
        masks = [shard.mask for shard in self._shards if shard.mask is not None]
        return TokenStream(masks, self._start, self._stop) if masks else None

    def path(self, position: int) -> Path:
        """Return the shard that holds the token at `position`."""
        return self._shards[bisect.bisect_right(self._ends, position + self._start)].path

    def _map(self, i: int) -> np.ndarray:
        shard, opened = self._shards[i], self._open.get(i)
        if opened is not None:
            self._open.move_to_end(i)
        else:
            try:
                with shard.path.open("rb") as file:
                    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:
                raise UserError(f"{shard.path}: cannot be read: {error}") from error
            self._require_whole(shard, mapped)
            tokens = np.frombuffer(mapped, shard.dtype, shard.tokens, shard.offset)
            opened = self._open[i] = mapped, tokens
            if len(self._open) > _MOST_OPEN:
                self._open.popitem(last=False)
        self._require_whole(shard, opened[0])
        return opened[1]

    @staticmethod
    def _require_whole(shard: Shard, mapped: mmap.mmap) -> None:
        # Reading a map past the end of its file kills the process (SIGBUS).
        expected = shard.offset + shard.tokens * shard.dtype.itemsize
        if mapped.size() < expected:
            raise UserError(
                f"{shard.path}: was cut to {mapped.size()} bytes of {expected} after training "
                "started; put it back, then start the run again"
            )


class StreamSequences:
    """The sequences of L + 1 tokens at every L-th position of a stream.

    There are N = (tokens − 1) // L of them; neighbours share one token, the last target of one and
    the first input of the next. With a seed, each epoch is a permutation keyed by (seed, epoch);
    without one, every epoch is in file order. masked: whether the stream has a loss mask.
    """

    def __init__(self, stream: TokenStream, seq_len: int, seed: int | None, name: str) -> None:
        """name: the folder of the shards, for messages."""
        self._stream = stream
        self.seq_len = seq_len
        self._seed = seed
        self._name = name
        self._mask = stream.mask()
        self.masked = self._mask is not None

    def __len__(self) -> int:
        return max(0, len(self._stream) - 1) // self.seq_len

    def place(self, n: np.ndarray) -> np.ndarray:
        """Return the positions in file order of the n-th sequences ([R] int64)."""
        epoch, index = np.divmod(n, len(self))
        return index if self._seed is None else permute(index, len(self), self._seed, epoch)

    def gather(self, n: np.ndarray, out: np.ndarray) -> None:
        """Write the n-th sequences (n: [R] int64) to out ([R, L + 1]).

        With a mask, a token t that carries no loss is written as ~t, which is negative.
        """
        read, starts = self._stream.read, (self.place(n) * self.seq_len).tolist()
        for row, start in zip(out, starts, strict=True):
            read(start, row)
        if self._mask is not None:
            keeps = np.empty(out.shape[1], dtype=np.uint8)
            for row, start in zip(out, starts, strict=True):
                self._mask.read(start, keeps)
                np.invert(row, out=row, where=keeps == 0)

    def source(self, n: np.ndarray) -> np.ndarray | None:
        """Return None: there is only one source."""
        return None

    def describe(self, n: int) -> str:
        """Return the path of the shard in which the n-th sequence begins."""
        place = int(self.place(np.array([n]))[0])
        return str(self._stream.path(place * self.seq_len)) if len(self._stream) else self._name
