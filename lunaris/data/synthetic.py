"""`data=synthetic`: tokens of a seeded bigram table, for tests and for measuring speed."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from lunaris.config.schema.data import SyntheticDataConfig
from lunaris.data.base import Sequences
from lunaris.data.shards import checked_keys, require_sequences
from lunaris.data.token_stream import Shard, StreamSequences, TokenStream

# Each token has this many likely followers; one token in `_NOISE` is drawn from all.
_FOLLOWERS = 4
_NOISE = 10
_VAL_TOKENS = 65_536


class ArrayStream(TokenStream):
    """The tokens of one array in memory."""

    def __init__(self, tokens: np.ndarray, name: str) -> None:
        super().__init__([Shard(Path(name), 0, len(tokens), tokens.dtype)])
        self._tokens = tokens

    def _load(self, i: int, begin: int, n: int) -> np.ndarray:
        return self._tokens[begin : begin + n]


class SyntheticData:
    """A corpus that a model can learn: nine times in ten, one of four tokens follows each token.

    The first `n_tokens` are for training. The tokens after them, an eighth as many but at most
    65,536, are for validation.
    """

    tokenizer_path: Path | None = None
    eot_id: int | None = 0

    def __init__(self, **keys: Any) -> None:
        """keys: of `SyntheticDataConfig`; for `document_masking`, token 0 is the end of a text."""
        given = checked_keys(SyntheticDataConfig, keys)
        self.vocab_size, self._n_tokens, self._seed = given.vocab_size, given.n_tokens, given.seed
        self._tokens: np.ndarray | None = None

    def ensure_ready(self) -> None:
        """Draw the tokens, once."""
        if self._tokens is None:
            held_out = max(2, min(_VAL_TOKENS, self._n_tokens // 8))
            self._tokens = bigram_tokens(self.vocab_size, self._n_tokens + held_out, self._seed)

    def digests(self) -> dict[str, str]:
        """Return the sha256 of the training tokens."""
        tokens = self._drawn[: self._n_tokens]
        return {"synthetic": hashlib.sha256(tokens.tobytes()).hexdigest()}

    def train(self, seq_len: int, seed: int) -> Sequences:
        """Return the training part, shuffled by `seed`. Raises UserError when it is too short."""
        stream = ArrayStream(self._drawn[: self._n_tokens], "synthetic")
        part = StreamSequences(stream, seq_len, seed, "synthetic")
        require_sequences(part, stream, seq_len, "synthetic")
        return part

    def val(self, seq_len: int) -> dict[str, Sequences]:
        """Return the validation part in order; {} when it is shorter than one sequence."""
        stream = ArrayStream(self._drawn[self._n_tokens :], "synthetic")
        part = StreamSequences(stream, seq_len, None, "synthetic")
        return {"synthetic": part} if len(part) else {}

    @property
    def _drawn(self) -> np.ndarray:
        assert self._tokens is not None, "ensure_ready() comes first"
        return self._tokens


def bigram_tokens(vocab_size: int, n_tokens: int, seed: int) -> np.ndarray:
    """Return n_tokens ([n] uint32) of a Markov chain whose table is drawn from `seed`."""
    random = np.random.default_rng(seed)
    table = random.integers(0, vocab_size, (vocab_size, _FOLLOWERS), dtype=np.uint32)
    choice = random.integers(0, _FOLLOWERS, n_tokens)
    noise = random.integers(0, _NOISE, n_tokens) == 0
    anything = random.integers(0, vocab_size, n_tokens)
    followers, picks = table.tolist(), choice.tolist()
    tokens, token = [], 0
    for pick, noisy, any_token in zip(picks, noise.tolist(), anything.tolist(), strict=True):
        token = any_token if noisy else followers[token][pick]
        tokens.append(token)
    return np.array(tokens, dtype=np.uint32)
