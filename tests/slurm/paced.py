"""Data for the cluster tests: as slow as a file says, and broken where a test wants it to be."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from lunaris.data.synthetic import SyntheticData

_BROKEN_SEED = 13


class PacedData(SyntheticData):
    """Synthetic data whose every gather first sleeps for the seconds in the file $PACE.

    With seed 13 it fails, until there is a file `mended` beside it.
    """

    def __init__(self, **keys: Any) -> None:
        super().__init__(**keys)
        self._pace = Path(os.environ["PACE"])
        if keys.get("seed") == _BROKEN_SEED and not self._pace.with_name("mended").exists():
            raise ValueError("failed by design")

    def train(self, seq_len: int, seed: int) -> _Paced:
        return _Paced(super().train(seq_len, seed), self._pace)


class _Paced:
    def __init__(self, sequences: Any, pace: Path) -> None:
        self._sequences = sequences
        self._pace = pace

    def __len__(self) -> int:
        return len(self._sequences)

    def gather(self, n: np.ndarray, out: np.ndarray) -> None:
        time.sleep(float(self._pace.read_text() or 0) if self._pace.exists() else 0)
        self._sequences.gather(n, out)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sequences, name)
