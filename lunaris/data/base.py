"""The interfaces between the training loop and the data. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np


class Sequences(Protocol):
    """An endless series of sequences: the n-th one is a pure function of n.

    A class may have an attribute `masked`. Where it is true, `gather` writes a token t that carries
    no loss as a target as ~t (−t − 1).
    """

    seq_len: int

    def __len__(self) -> int:
        """Return the number of distinct sequences of one epoch."""

    def gather(self, n: np.ndarray, out: np.ndarray) -> None:
        """Write the n-th sequences (n: [R] int64, any n >= 0) to out ([R, seq_len + 1] int64)."""

    def source(self, n: np.ndarray) -> np.ndarray | None:
        """Return the index of each sequence's source ([R] int64), or None if there is only one."""

    def describe(self, n: int) -> str:
        """Return the file or name that the n-th sequence comes from, for messages."""


def is_masked(sequences: Sequences) -> bool:
    """Return whether some tokens of the sequences carry no loss."""
    return bool(getattr(sequences, "masked", False))


class Data(Protocol):
    """A corpus of tokens with a training part and a validation part."""

    vocab_size: int
    eot_id: int | None
    tokenizer_path: Path | None

    def ensure_ready(self) -> None:
        """Open and check the corpus; cheap when called again. Raises UserError.

        It comes before every other method.
        """

    def digests(self) -> dict[str, str]:
        """Return a digest of each source's training tokens by its name, in the sources' order.

        A custom class may lack this method; then a run cannot detect that its tokens changed.
        """

    def train(self, seq_len: int, seed: int) -> Sequences:
        """Return the training part, shuffled by `seed`. Raises UserError when it is too short."""

    def val(self, seq_len: int) -> dict[str, Sequences]:
        """Return each source's validation part in file order; {} when there is none."""
