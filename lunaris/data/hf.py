"""`data=hf`: the shards that `lunaris prepare` builds from datasets of the Hugging Face Hub."""

from __future__ import annotations

from lunaris.config.schema.data import HFDataConfig
from lunaris.data.prepared import PreparedData


class HFData(PreparedData):
    """Documents of datasets that were streamed from the Hub or read from a folder."""

    schema = HFDataConfig
