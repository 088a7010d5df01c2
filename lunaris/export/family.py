"""What an architecture of transformers is to the writer. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from lunaris.export.weights import Weight


@dataclass(frozen=True)
class Family:
    """How one model is written.

    architecture: the class of transformers. config: the fields of `config.json`. weights: the
    tensors, those of one tensor of the checkpoint next to each other. code: files of Python within
    this package that go along, which `trust_remote_code` runs; none for a stock class.
    """

    architecture: str
    config: dict[str, object]
    weights: tuple[Weight, ...]
    code: tuple[str, ...] = ()
