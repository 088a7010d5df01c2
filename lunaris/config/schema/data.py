"""The schemas of every kind of data. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

from lunaris.config.schema.base import Component, free, key


@dataclass
class DataConfig(Component):
    """The keys that every kind of data has."""

    _group_ = "data"
    # Tokens of one document neither attend to nor predict those of another.
    document_masking: bool = False


@dataclass
class StdlibDataConfig(DataConfig):
    """The source text of the running Python's standard library; needs no network."""

    _target_: str = "lunaris.data.stdlib.StdlibData"
    # Null: a folder under the user's cache, named after what the shards depend on.
    dir: str | None = None
    # Of the byte-level BPE that is trained on the text.
    vocab_size: int = key(2048, low=257, high=2**32)
    # Share of the documents kept for validation.
    val_fraction: float = key(0.05, low=0.0, high=0.9)


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
    # Share of the tokens kept for validation, the last ones.
    val_fraction: float = key(0.01, low=0.0, high=0.9)
    # Null: the manifest's, else the largest id + 1.
    vocab_size: int | None = key(None, low=1, high=2**32)
    # Null: the manifest's; without one, needed for document_masking.
    eot_id: int | None = key(None, low=0)
    # Compare the checksums of all shards before training.
    verify: bool = free(False)


@dataclass
class SyntheticDataConfig(DataConfig):
    """Tokens drawn from a seeded bigram table: for tests and for measuring speed."""

    _target_: str = "lunaris.data.synthetic.SyntheticData"
    # Different tokens.
    vocab_size: int = key(512, low=2, high=2**32)
    # Tokens of the corpus.
    n_tokens: int = key(1_000_000, low=2, at_most=10**8)
    # Of the tokens.
    seed: int = key(0, low=0, high=2**63 - 1)


@dataclass
class PreparedDataConfig(DataConfig):
    """What `lunaris prepare` makes shards from, and how; training reads the shards in `dir`."""

    # The folder of the shards.
    dir: str = MISSING
    # A tokenizer.json, a Hub name, or null: train byte-level BPE of `vocab_size` on a sample.
    tokenizer: str | None = None
    # The token that ends a text; null: <|endoftext|>, </s> or another known name.
    eot: str | None = None
    # Of a tokenizer that is trained here.
    vocab_size: int = key(32768, low=257, high=2**32)
    # Megabytes of text that a tokenizer is trained on.
    sample_mb: int = key(64, low=1)
    # Tokens of a shard file.
    shard_tokens: int = key(100_000_000, low=1)
    # Share of the documents kept for validation.
    val_fraction: float = key(0.001, low=0.0, high=0.9)
    # Name -> weight; null: in proportion to the sources' sizes.
    weights: Any = None
    # When a source runs out: continue with the others, or stop, so that the weights hold.
    on_exhausted: str = key("continue", allowed=("continue", "stop"))
    # Of the choice of validation documents and of the mixing of sources.
    seed: int = key(0, low=0, high=2**63 - 1)
    # Null: one a processor.
    processes: int | None = free(None, low=1)
    # At a document that cannot be read: fail, or skip and count it.
    on_error: str = free("fail", allowed=("fail", "skip"))
    # Compare the checksums of all shards before training.
    verify: bool = free(False)


@dataclass
class TextDataConfig(PreparedDataConfig):
    """Plain text, JSONL or Parquet files, compressed or not."""

    _target_: str = "lunaris.data.text.TextData"
    # A list of globs, or a map of source name -> list of globs.
    files: Any = MISSING
    # auto (by the files' names), text (a file is a document), lines (a line is), jsonl, parquet,
    # chat (JSONL of conversations, or of prompts and completions: only answers carry loss).
    format: str = key("auto", allowed=("auto", "text", "lines", "jsonl", "parquet", "chat"))
    # Of JSONL and Parquet: the key, or column, of the text.
    text_key: str = "text"


@dataclass
class HFDataConfig(PreparedDataConfig):
    """Datasets of the Hugging Face Hub, streamed; needs the extra `hf`."""

    _target_: str = "lunaris.data.hf.HFData"
    # "owner/name", or a map of source name -> {path, name, split, text_key}.
    datasets: Any = MISSING
    # Of a dataset that names none.
    split: str = "train"
    # The column of the text.
    text_key: str = "text"
