"""`lunaris prepare`: make token shards from text files or Hub datasets; run again, it continues
where it stopped."""

from __future__ import annotations

import time
from shlex import quote
from typing import TYPE_CHECKING, Any

from lunaris.errors import UserError

if TYPE_CHECKING:
    from lunaris.data.manifest import Manifest

_USAGE = """\
usage: lunaris prepare [--verify] data=text|hf|stdlib data.dir=FOLDER [data.KEY=VALUE ...]

Trains or loads a tokenizer, and writes shards of tokens and their manifest into data.dir. It can be
killed at any moment; run the same command to continue. The shards are the same bytes for any
data.processes. Train on the folder with `lunaris train data=shards data.dir=FOLDER`.

  --verify  recompute the checksum of every shard in data.dir (any kind of data); write nothing

  lunaris prepare data=text data.dir=shards 'data.files=[corpus/*.jsonl]'
  lunaris prepare data=text data.dir=shards data.tokenizer=gpt2 \\
      'data.files={code: src/**/*.py, prose: books/*.txt.gz}' 'data.weights={code: 1, prose: 3}'
  lunaris prepare data=text data.dir=shards data.format=chat 'data.files=[chat/*.jsonl]'
  lunaris prepare data=hf data.dir=shards data.datasets=roneneldan/TinyStories
  lunaris prepare --verify data=shards data.dir=shards

The keys of data=text and their defaults (`lunaris train --cfg job -p data data=hf` shows others):
"""


def main(argv: list[str]) -> int:
    """Compose the `data` group, and build its shards or verify them; return the exit code."""
    if "-h" in argv or "--help" in argv:
        print(_USAGE + _keys())
        return 0
    flags = [arg for arg in argv if arg.startswith("-")]
    for flag in flags:
        if flag != "--verify":
            raise UserError(f"{flag}: no such option of prepare; allowed are --verify and --help")
    from lunaris.config.compose import compose
    from lunaris.config.instantiate import instantiate_component
    from lunaris.data.prepare.build import build_shards
    from lunaris.data.prepared import PreparedData
    from lunaris.data.stdlib import StdlibData

    overrides = [arg for arg in argv if not arg.startswith("-")]
    cfg = compose(overrides, check_data=False)
    if flags:
        return _verify(getattr(cfg.data, "dir", None))
    data = instantiate_component("data", cfg.data)
    began = time.monotonic()
    if hasattr(data, "build_shards"):
        made = data.build_shards()
    elif isinstance(data, PreparedData | StdlibData):
        made = build_shards(data)
    else:
        raise UserError(
            f"data={cfg.data._target_}: is trained on as it is; there is nothing to prepare"
        )
    _report(made, str(data.folder), time.monotonic() - began)
    return 0


def _verify(folders: Any) -> int:
    from lunaris.data.folders import folder_list
    from lunaris.data.shard_folder import verify

    if folders is None:
        raise UserError("--verify: needs data.dir, the folder of the shards")
    for folder in folder_list(folders, "data.dir"):
        print(f"{folder}: {verify(folder)} shards are as they were written")
    return 0


def _report(made: Manifest, folder: str, seconds: float) -> None:
    for source in made.sources:
        skipped = f", {source.skipped:,} skipped" if source.skipped else ""
        print(
            f"{source.name}: {source.documents:,} documents, {source.tokens:,} tokens "
            f"of {source.bytes:,} bytes{skipped}"
        )
    tokens = {part: sum(entry.tokens for entry in shards) for part, shards in made.shards.items()}
    shards = sum(len(entries) for entries in made.shards.values())
    print(
        f"{folder}: {tokens.get('train', 0):,} tokens for training, {tokens.get('val', 0):,} for "
        f"validation, {shards} shards of {made.dtype}, vocabulary {made.vocab_size:,} "
        f"({seconds:.1f} s)"
    )
    if not tokens.get("val"):
        few = sum(source.documents for source in made.sources) < 10
        print(
            "note: no document fell into the validation part, so training will have no val/loss; "
            + (
                "a text file is one document: cut it into files (`split -l 200 FILE pieces/`), or "
                "take its lines (data.format=lines), with data.val_fraction=0.1"
                if few
                else "raise data.val_fraction or give more text"
            )
            + ", in another data.dir"
        )
    print(f"next: lunaris train data=shards {quote(f'data.dir={folder}')}")


def _keys() -> str:
    from dataclasses import fields

    from lunaris.config.schema.data import TextDataConfig

    rows = []
    for key in fields(TextDataConfig):
        if key.name != "_target_":
            value = "(required)" if key.default == "???" else key.default
            rows.append(f"  data.{key.name:<16} {'null' if value is None else value}")
    return "\n".join(rows)
