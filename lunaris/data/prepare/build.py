"""Building the shards that a `data` component reads: what joins training data and preparation.

`lunaris prepare` calls `build_shards`. Every command that reads data calls `make_ready`, because
`data=stdlib` is built on first use.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path

from lunaris.config.schema.data import HFDataConfig, PreparedDataConfig, TextDataConfig
from lunaris.data import manifest as manifests
from lunaris.data import stdlib
from lunaris.data.base import Data
from lunaris.data.manifest import Manifest
from lunaris.data.prepare.chunks import Source
from lunaris.data.prepare.file_source import FileSource, StdlibSource, expand
from lunaris.data.prepare.hf_source import hf_sources
from lunaris.data.prepare.pipeline import write_shards
from lunaris.data.prepare.spec import PrepareSpec, settings_of
from lunaris.data.prepared import PreparedData
from lunaris.data.stdlib import StdlibData
from lunaris.errors import UserError, did_you_mean

# More tokens than the standard library has: its parts have one shard each.
_ONE_SHARD = 2**40


def build_shards(data: PreparedData | StdlibData) -> Manifest:
    """Build the shards that `data` reads, or continue to; return their manifest.

    Raises UserError when its folder holds something else or a document cannot be read.
    """
    if isinstance(data, StdlibData):
        return _build_stdlib(data)
    return write_shards(spec_of(data))


def spec_of(data: PreparedData) -> PrepareSpec:
    """Return what to build for `data`. Raises UserError where its keys and its input do not fit."""
    sources = sources_of(data.keys)
    if not all(source.name.strip() for source in sources):
        raise UserError("data: the name of a source must not be empty")
    weights = source_weights(data.keys.weights, sources)
    settings = settings_of(data.keys, sources, weights)
    return PrepareSpec(data.keys, sources, weights, settings)


def make_ready(data: Data) -> None:
    """Make data ready to be read; `data=stdlib` is built first, once. Raises UserError."""
    if isinstance(data, StdlibData):
        build_shards(data)
    data.ensure_ready()


def _build_stdlib(data: StdlibData) -> Manifest:
    """Return the manifest of the standard library's shards; build them if there are none.

    Of several processes one builds, and the others wait for it.
    """
    made = manifests.read(data.folder)
    if made is None:
        print("preparing the source text of this Python as data, once", file=sys.stderr)
        keys = PreparedDataConfig(
            dir=str(data.folder),
            vocab_size=data.keys.vocab_size,
            val_fraction=data.keys.val_fraction,
            shard_tokens=_ONE_SHARD,
            processes=1,
        )
        source = StdlibSource(stdlib.library_files(), stdlib.library_root(), keys.val_fraction)
        spec = PrepareSpec(keys, [source], [1.0], stdlib.settings(data.keys))
        made = write_shards(spec, wait_for_lock=True)
    data.ensure_ready()
    return made


def sources_of(keys: PreparedDataConfig) -> Sequence[Source]:
    """Return the named sources of documents. Raises UserError when there is none."""
    if isinstance(keys, HFDataConfig):
        return hf_sources(keys.datasets, split=keys.split, text_key=keys.text_key)
    assert isinstance(keys, TextDataConfig)
    named = keys.files if isinstance(keys.files, dict) else {"text": keys.files}
    if not named:
        raise UserError("data.files={}: at least one source is needed")
    return [
        FileSource(str(name), expand(globs, Path(keys.dir)), keys.format, keys.text_key)
        for name, globs in named.items()
    ]


def source_weights(weights: object, sources: Sequence[Source]) -> list[float]:
    """Return the weight of each source: `data.weights`, else its size, or 1 if sizes are unknown.

    Raises UserError for an unknown name, a source without a weight, or a weight not above 0.
    """
    names = [source.name for source in sources]
    if weights is None:
        sizes = [float(source.size) for source in sources]
        return sizes if all(sizes) else [1.0] * len(sources)
    if not isinstance(weights, dict):
        raise UserError(f"data.weights={weights}: must map names of sources ({names}) to numbers")
    weights = {str(name): weight for name, weight in weights.items()}
    for name in weights:
        if name not in names:
            raise UserError(f"data.weights.{name}: no such source{did_you_mean(str(name), names)}")
    for name in names:
        if name not in weights:
            raise UserError(f"data.weights: source {name} has no weight")
        weight = weights[name]
        if isinstance(weight, bool) or not (
            isinstance(weight, int | float) and 0 < weight < math.inf
        ):
            raise UserError(f"data.weights.{name}={weight}: must be a finite number above 0")
    return [float(weights[name]) for name in names]
