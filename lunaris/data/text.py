"""Text files of any number and size: plain, JSON lines or Parquet, compressed or not."""

from __future__ import annotations

import glob
import math
import os
from pathlib import Path
from typing import Any

from lunaris.data import manifest as manifests
from lunaris.data.manifest import Manifest
from lunaris.data.prepare.chunks import FileSource, Source
from lunaris.data.prepare.pipeline import default_processes, prepare
from lunaris.data.prepare.spec import Recipe
from lunaris.data.prepared import PreparedFolder
from lunaris.errors import UserError, did_you_mean


class Preparable(PreparedFolder):
    """Shards that `lunaris prepare` makes of sources; training takes them as they are."""

    option = ""

    def __init__(
        self,
        *,
        dir: str,
        tokenizer: str | None = None,
        eot: str | None = None,
        vocab_size: int = 32768,
        sample_mb: int = 64,
        shard_tokens: int = 100_000_000,
        val_fraction: float = 0.001,
        weights: dict[str, float] | None = None,
        on_exhausted: str = "continue",
        seed: int = 0,
        processes: int | None = None,
        on_error: str = "fail",
        verify: bool = False,
        document_masking: bool = False,
    ) -> None:
        """Keys of the `data` group; nothing is read before `make` or `prepare`."""
        if not dir.strip():
            raise UserError("data.dir=: must be the path of a folder")
        super().__init__(Path(dir), verify=verify, document_masking=document_masking)
        self._weights = weights
        self._recipe = Recipe(
            folder=self.folder,
            tokenizer=tokenizer,
            eot=eot,
            vocab_size=vocab_size,
            sample_mb=sample_mb,
            shard_tokens=shard_tokens,
            val_fraction=val_fraction,
            seed=seed,
            on_exhausted=on_exhausted,
            processes=processes or default_processes(),
            on_error=on_error,
        )

    def prepare(self) -> None:
        if manifests.read(self.folder) is None:
            raise UserError(
                f"data.dir={self.folder}: not prepared yet; run `lunaris prepare "
                f"data={self.option} …` with the same keys first"
            )
        super().prepare()

    def make(self) -> Manifest:
        """Make the shards, or go on making them. Raises UserError for what cannot be read."""
        sources = self.sources()
        if not all(source.name.strip() for source in sources):
            raise UserError(f"data={self.option}: the name of a source must not be empty")
        return prepare(self._recipe, sources, source_weights(self._weights, sources))

    def sources(self) -> list[Source]:
        """Return the named sources of documents."""
        raise NotImplementedError


class TextData(Preparable):
    """Documents from files: one list of globs, or a list a named source."""

    option = "text"

    def __init__(
        self,
        *,
        files: Any,
        format: str = "auto",
        text_key: str = "text",
        **keys: Any,
    ) -> None:
        """files: globs, or source name -> globs; text_key: of JSON objects, or Parquet's column."""
        super().__init__(**keys)
        self._files, self._format, self._text_key = files, format, text_key

    def sources(self) -> list[Source]:
        named = self._files if isinstance(self._files, dict) else {"text": self._files}
        if not isinstance(self._files, str | list | dict):
            raise UserError(
                f"data.files={self._files}: must be a glob, a list of globs, or a map of source "
                "name to globs"
            )
        if not named:
            raise UserError("data.files={}: at least one source is needed")
        return [
            FileSource(str(name), expand(globs, self.folder), self._format, self._text_key)
            for name, globs in named.items()
        ]


def expand(globs: Any, without: Path) -> list[Path]:
    """Return the files that globs name, sorted, each once; a folder stands for all in it.

    What lies in the folder `without`, that of the shards, is left out. Raises UserError for a glob
    that names no file.
    """
    ours = os.path.realpath(without) + os.sep
    found: dict[str, str] = {}
    for pattern in [globs] if isinstance(globs, str) else globs or []:
        if not isinstance(pattern, str) or not pattern:
            raise UserError(
                f"data.files={globs}: must be a glob, a list of globs, or a map of source name to "
                "globs"
            )
        pattern = str(Path(pattern).expanduser())
        if Path(pattern).is_dir():
            pattern = f"{glob.escape(pattern)}/**"
        # By its real path, as links may lead to a file, or around in a circle, a second time; by
        # the shortest of its names.
        matched = {
            os.path.realpath(path): path
            for path in sorted(glob.glob(pattern, recursive=True), key=_order, reverse=True)
            if Path(path).is_file()
        }
        matched = {real: path for real, path in matched.items() if not real.startswith(ours)}
        if not matched:
            raise UserError(f"data.files: no file matches {pattern} (from {Path.cwd()})")
        for real, path in matched.items():
            found[real] = min(path, found.get(real, path), key=_order)
    if not found:
        raise UserError("data.files=[]: at least one file is needed")
    return [Path(path) for path in sorted(found.values())]


def _order(path: str) -> tuple[int, str]:
    return path.count(os.sep), path


def source_weights(weights: Any, sources: list[Source]) -> list[float]:
    """Return a weight a source: as given by name; else by size, or alike where that is unknown.

    Raises UserError for an unknown name, a source without a weight, a weight not above 0.
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
