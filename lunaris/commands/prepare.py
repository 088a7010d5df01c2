"""`lunaris prepare`: make token shards from text files or Hub datasets; run again, it continues
where it stopped."""

from __future__ import annotations

import shlex
import sys
import time
from typing import TYPE_CHECKING, Any

from lunaris.console import fitted
from lunaris.errors import UserError

if TYPE_CHECKING:
    from lunaris.config.compose import Composer
    from lunaris.config.schema.root import Config

# Keys of launch=slurm with the values that a preparation takes, the default first.
_SHAPE: dict[str, tuple[Any, ...]] = {
    "nodes": (1,), "tasks_per_node": (None, 1), "gpus_per_node": (0,),
}  # fmt: skip
# Keys of launch=slurm for runs alone, with their defaults.
_OF_RUNS = {"after": None, "chain": 1, "max_failures": 0, "preflight": False}

_USAGE = """\
usage: lunaris prepare [--verify] data=text|hf|stdlib data.dir=FOLDER [data.KEY=VALUE ...]

Trains or loads a tokenizer, and writes shards of tokens and their manifest into data.dir. It can be
killed at any moment; run the same command to continue. The shards are the same bytes for any
data.processes. Train on the folder with `lunaris train data=shards data.dir=FOLDER`.
With launch=slurm, an array of launch.array_tasks jobs encodes the text and another job merges.

  --verify  recompute the checksum of every shard in data.dir (any kind of data); write nothing

  lunaris prepare data=text data.dir=shards 'data.files=[corpus/*.jsonl]'
  lunaris prepare data=text data.dir=shards data.tokenizer=gpt2 \\
      'data.files={code: src/**/*.py, prose: books/*.txt.gz}' 'data.weights={code: 1, prose: 3}'
  lunaris prepare data=text data.dir=shards data.format=chat 'data.files=[chat/*.jsonl]'
  lunaris prepare data=hf data.dir=shards data.datasets=roneneldan/TinyStories
  lunaris prepare data=text data.dir=shards 'data.files=[corpus/*.jsonl]' \\
      launch=slurm launch.array_tasks=16 launch.cpus_per_task=8 launch.partition=cpu
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
    from lunaris.config.compose import Composer
    from lunaris.config.schema.launch import SlurmLaunchConfig
    from lunaris.runs.provenance import composed_with

    composer = Composer()
    overrides = _for_tasks(composer, [arg for arg in argv if not arg.startswith("-")])
    for line in composer.defaults_lines([overrides], ("data", "launch")):
        print(line, file=sys.stderr)
    _check_launch(composer.compose_raw(overrides).launch)
    cfg = composer.compose(overrides, check_data=False)
    if flags:
        return _verify(getattr(cfg.data, "dir", None))
    if isinstance(cfg.launch, SlurmLaunchConfig):
        with composed_with(composer.record(overrides)):
            return _send(cfg, shlex.join(["lunaris", "prepare", *argv]), overrides)
    return _prepare_here(cfg)


def _for_tasks(composer: Composer, overrides: list[str]) -> list[str]:
    """Return the overrides, and for a preparation by jobs those that undo defaults for runs.

    A site's `launch.gpus_per_node` in a defaults.yaml, say, is not meant for tasks without a GPU.
    """
    from lunaris.config.keys import flat
    from lunaris.config.messages import shown

    if not _is_slurm(composer.compose_raw(overrides).launch):
        return overrides
    given = {text.partition("=")[0].lstrip("+~") for text in overrides}
    values = {f"launch.{key}": allowed[0] for key, allowed in _SHAPE.items()}
    values |= {f"launch.{key}": default for key, default in _OF_RUNS.items()}
    set_there = flat(composer.defaults.keys).keys() - given
    undone = {key: value for key, value in values.items() if key in set_there}
    return [*overrides, *(f"{key}={shown(value)}" for key, value in undone.items())]


def _is_slurm(launch: Any) -> bool:
    return str(launch.get("_target_")).startswith("lunaris.launch.slurm.")


def _check_launch(launch: Any) -> None:
    """Raise UserError for keys of launch=slurm that a preparation has no use for.

    launch: as composed; a further check would ask for a parallelism over several nodes.
    """
    if not _is_slurm(launch):
        return
    for key, allowed in _SHAPE.items():
        if launch.get(key, allowed[0]) not in allowed:
            raise UserError(
                f"launch.{key}={launch[key]}: must be {allowed[-1]} for `lunaris prepare`, which "
                "uses no GPU and whose tasks are a job array: launch.array_tasks is their number, "
                "launch.cpus_per_task the processes of each"
            )
    for key, default in _OF_RUNS.items():
        if launch.get(key, default) not in (default, []):
            raise UserError(
                f"launch.{key}={launch[key]}: goes with `lunaris train`, not with `lunaris prepare`"
            )


def _send(cfg: Config, command: str, overrides: list[str]) -> int:
    """Send the preparation to SLURM."""
    from lunaris.config.instantiate import locate_class
    from lunaris.data.prepared import PreparedData
    from lunaris.launch.prepare_array import PrepareArray

    made = locate_class("data", cfg.data)
    prepared = isinstance(made, type) and issubclass(made, PreparedData)
    if not prepared or hasattr(made, "build_shards"):
        raise UserError(
            f"data={cfg.data._target_}: launch=slurm prepares data=text and data=hf; use "
            "launch=local"
        )
    return PrepareArray.of(cfg).prepare(cfg, command, overrides)


def _prepare_here(cfg: Config) -> int:
    from lunaris.config.instantiate import instantiate_component
    from lunaris.data.prepare.build import build_shards
    from lunaris.data.prepare.summary import summary
    from lunaris.data.prepared import PreparedData
    from lunaris.data.stdlib import StdlibData
    from lunaris.runs.preparation import is_preparation
    from lunaris.runs.run_dir import RunDir
    from lunaris.runs.status import refuse_active

    data = instantiate_component("data", cfg.data)
    sent = hasattr(data, "folder") and is_preparation(data.folder)
    if sent:
        refuse_active(data.folder)
    began = time.monotonic()
    if hasattr(data, "build_shards"):
        made = data.build_shards()
    elif isinstance(data, PreparedData | StdlibData):
        made = build_shards(data)
    else:
        raise UserError(
            f"data={cfg.data._target_}: is trained on as it is; there is nothing to prepare"
        )
    if sent:
        RunDir(data.folder).write_status(state="done", last_error=None)
    about, _, command = summary(made, str(data.folder), time.monotonic() - began).rpartition("\n")
    # A command stays one line, which can be copied.
    print(f"{fitted(about)}\n{command}")
    return 0


def _verify(folders: Any) -> int:
    from lunaris.data.folders import folder_list
    from lunaris.data.shard_folder import verify

    if folders is None:
        raise UserError("--verify: needs data.dir, the folder of the shards")
    for folder in folder_list(folders, "data.dir"):
        print(f"{folder}: {verify(folder)} shards are as they were written")
    return 0


def _keys() -> str:
    from dataclasses import fields

    from lunaris.config.schema.data import TextDataConfig

    rows = []
    for key in fields(TextDataConfig):
        if key.name != "_target_":
            value = "(required)" if key.default == "???" else key.default
            rows.append(f"  data.{key.name:<16} {'null' if value is None else value}")
    return "\n".join(rows)
