"""`data=text`: the shards that `lunaris prepare` builds from text files."""

from __future__ import annotations

from lunaris.config.schema.data import TextDataConfig
from lunaris.data.prepared import PreparedData


class TextData(PreparedData):
    """Documents from files: plain text, JSON lines or Parquet, compressed or not."""

    schema = TextDataConfig
