"""The schemas of every kind of data. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

from lunaris.config.schema.base import Component, free
from lunaris.config.schema.checks import one_of, within


@dataclass
class DataConfig(Component):
    """The keys that every kind of data has."""

    # Tokens of one document neither attend to nor predict those of another.
    document_masking: bool = False


@dataclass
class StdlibDataConfig(DataConfig):
    """The source text of the running Python's standard library; needs no network."""

    _target_: str = "lunaris.data.stdlib.StdlibData"
    # Null: a folder under the user's cache, named after what the shards depend on.
    dir: str | None = None
    vocab_size: int = 2048
    val_fraction: float = 0.05

    def __post_init__(self) -> None:
        within("data.vocab_size", self.vocab_size, 257, 2**32)
        within("data.val_fraction", self.val_fraction, 0.0, 0.9)


@dataclass
class ShardsDataConfig(DataConfig):
    """One or several folders of `.npy` token shards, with or without a manifest."""

    _target_: str = "lunaris.data.shards.ShardsData"
    # A folder, or a list of folders that are mixed.
    dir: Any = MISSING
    # Null: the folder's `val` part when a manifest names one, else `val_fraction` of the tokens.
    val_dir: Any = None
    # One weight a folder; null: in proportion to their tokens.
    weights: list[float] | None = None
    val_fraction: float = 0.01
    # Null: the manifest's, else the largest id + 1.
    vocab_size: int | None = None
    # Null: the manifest's; without one, needed for document_masking.
    eot_id: int | None = None
    verify: bool = free(False)

    def __post_init__(self) -> None:
        within("data.val_fraction", self.val_fraction, 0.0, 0.9)
        within("data.vocab_size", self.vocab_size, low=1)
        within("data.eot_id", self.eot_id, low=0)


@dataclass
class SyntheticDataConfig(DataConfig):
    """Tokens drawn from a seeded bigram table: for tests and for measuring speed."""

    _target_: str = "lunaris.data.synthetic.SyntheticData"
    vocab_size: int = 512
    n_tokens: int = 1_000_000
    seed: int = 0

    def __post_init__(self) -> None:
        within("data.vocab_size", self.vocab_size, 2, 2**32)
        within("data.n_tokens", self.n_tokens, low=2)
        within("data.seed", self.seed, 0, 2**63 - 1)


@dataclass
class PreparedDataConfig(DataConfig):
    """What `lunaris prepare` makes shards from, and how; training reads the shards in `dir`."""

    dir: str = MISSING
    # A tokenizer.json, a Hub name, or null: train byte-level BPE of `vocab_size` on a sample.
    tokenizer: str | None = None
    # The token that ends a text; null: <|endoftext|>, </s> or another known name.
    eot: str | None = None
    vocab_size: int = 32768
    sample_mb: int = 64
    shard_tokens: int = 100_000_000
    val_fraction: float = 0.001
    # Name -> weight; null: in proportion to the sources' sizes.
    weights: Any = None
    # When a source runs out: continue with the others, or stop, so that the weights hold.
    on_exhausted: str = "continue"
    seed: int = 0
    # Null: one a processor.
    processes: int | None = free(None)
    on_error: str = free("fail")
    verify: bool = free(False)

    def __post_init__(self) -> None:
        within("data.vocab_size", self.vocab_size, 257, 2**32)
        within("data.sample_mb", self.sample_mb, low=1)
        within("data.shard_tokens", self.shard_tokens, low=1)
        within("data.val_fraction", self.val_fraction, 0.0, 0.9)
        within("data.seed", self.seed, 0, 2**63 - 1)
        within("data.processes", self.processes, low=1)
        one_of("data.on_error", self.on_error, ("fail", "skip"))
        one_of("data.on_exhausted", self.on_exhausted, ("continue", "stop"))


@dataclass
class TextDataConfig(PreparedDataConfig):
    """Plain text, JSONL or Parquet files, compressed or not."""

    _target_: str = "lunaris.data.text.TextData"
    # A list of globs, or a map of source name -> list of globs.
    files: Any = MISSING
    # auto (by the files' names), text (a file is a document), lines (a line is), jsonl, parquet.
    format: str = "auto"
    text_key: str = "text"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("data.format", self.format, ("auto", "text", "lines", "jsonl", "parquet"))


@dataclass
class HFDataConfig(PreparedDataConfig):
    """Datasets of the Hugging Face Hub, streamed; needs the extra `hf`."""

    _target_: str = "lunaris.data.hf.HFData"
    # "owner/name", or a map of source name -> {path, name, split, text_key}.
    datasets: Any = MISSING
    split: str = "train"
    text_key: str = "text"
