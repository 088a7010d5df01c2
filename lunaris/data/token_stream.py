"""Many `.npy` files as one stream of tokens, and the sequences that are cut from it."""

from __future__ import annotations

import bisect
import os
import weakref
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lunaris.data.shuffle import permute
from lunaris.errors import UserError

# Beyond this many open files, the least recently used one is closed.
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
    """The tokens from `start` to `stop` of several shards in a row.

    They are read by `pread`, not through a memory map: where a file was cut or its disk fails, a
    read returns too little or an error, while a map would kill the process (SIGBUS).
    """

    def __init__(self, shards: list[Shard], start: int = 0, stop: int | None = None) -> None:
        self._shards = [shard for shard in shards if shard.tokens]
        ends = np.cumsum([shard.tokens for shard in self._shards], dtype=np.int64)
        self._ends: list[int] = ends.tolist()
        total = self._ends[-1] if self._ends else 0
        self._start = start
        self._stop = total if stop is None else stop
        assert 0 <= self._start <= self._stop <= total
        self._open: OrderedDict[int, int] = OrderedDict()
        weakref.finalize(self, _close, self._open)

    def __len__(self) -> int:
        return self._stop - self._start

    def read(self, position: int, out: np.ndarray) -> None:
        """Write the tokens from `position` on to out ([n], any integer type).

        Raises UserError where a shard cannot be read or was cut after training started.
        """
        at = position + self._start
        assert 0 <= position and at + len(out) <= self._stop
        i = bisect.bisect_right(self._ends, at)
        begin = at - (self._ends[i] - self._shards[i].tokens)
        while len(out):
            part = out[: self._shards[i].tokens - begin]
            part[:] = self._load(i, begin, len(part))
            out, begin, i = out[len(part) :], 0, i + 1

    def mask(self) -> TokenStream | None:
        """Return the loss mask of the same tokens as a stream, or None if they have none."""
        masks = [shard.mask for shard in self._shards if shard.mask is not None]
        return TokenStream(masks, self._start, self._stop) if masks else None

    def path(self, position: int) -> Path:
        """Return the shard that holds the token at `position`."""
        return self._shards[bisect.bisect_right(self._ends, position + self._start)].path

    def _load(self, i: int, begin: int, n: int) -> np.ndarray:
        """Return n tokens of the i-th shard from its token `begin` on ([n], the shard's type)."""
        shard = self._shards[i]
        tokens = np.empty(n, shard.dtype)
        begin = shard.offset + begin * shard.dtype.itemsize
        read = 0
        try:
            file = self._file(i)
            while read < tokens.nbytes:
                # A read that a signal ends may bring a part.
                more = os.preadv(file, [tokens.view(np.uint8).data[read:]], begin + read)
                if not more:
                    raise UserError(
                        f"{shard.path}: was cut to {os.fstat(file).st_size} bytes of "
                        f"{shard.offset + shard.tokens * shard.dtype.itemsize} after training "
                        "started; put it back, then start the run again"
                    )
                read += more
        except OSError as error:
            raise UserError(f"{shard.path}: cannot be read: {error}") from error
        return tokens

    def _file(self, i: int) -> int:
        """Return the descriptor of the i-th shard."""
        file = self._open.get(i)
        if file is None:
            file = self._open[i] = os.open(self._shards[i].path, os.O_RDONLY | os.O_CLOEXEC)
            if len(self._open) > _MOST_OPEN:
                os.close(self._open.popitem(last=False)[1])
        else:
            self._open.move_to_end(i)
        return file


def _close(files: OrderedDict[int, int]) -> None:
    for file in files.values():
        os.close(file)


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
