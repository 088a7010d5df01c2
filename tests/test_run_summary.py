"""The prompt that is proposed after a run comes from its own validation text."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from lunaris.run_summary import _prompt


class Lines:
    """Sequences of one text each."""

    seq_len = 63

    def __init__(self, rows: list[list[int]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def gather(self, n: np.ndarray, out: np.ndarray) -> None:
        for row, k in zip(out, n, strict=True):
            ids = self.rows[k % len(self)]
            row[:] = 0
            row[: len(ids)] = ids


@pytest.mark.parametrize(
    ("text", "prompt"),
    [
        ("ile\n\n  indented\nOnce upon a time\nthere", "Once upon a"),
        ("ile\ndef main(x):\n", "def main(x):"),
        ("one line that may begin within a word", "The"),
        ("\n1 + 1\n\n", "The"),
    ],
)
def test_a_prompt_is_the_first_words_of_a_line(tmp_path: Path, text: str, prompt: str) -> None:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    ids = tokenizer.encode(text).ids
    # Some tokens carry no loss.
    masked = [~token if k % 2 else token for k, token in enumerate(ids)]
    run: Any = SimpleNamespace(
        evaluator=SimpleNamespace(sources={"x": Lines([masked])}),
        dir=SimpleNamespace(tokenizer_path=tmp_path / "tokenizer.json"),
    )
    assert _prompt(run) == prompt
