"""`lunaris train`: train a model here, or send it to SLURM (launch=slurm); -m sweeps."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lunaris.errors import UserError

if TYPE_CHECKING:
    from lunaris.config.cli import Flags
    from lunaris.config.schema.root import Config

_WHAT = """\
Trains a model on this machine, or sends the run to SLURM (launch=slurm). The config is checked
before anything starts; the run's folder (out_dir) holds it, the metrics and the checkpoints. Run
the same command again to continue from the newest checkpoint."""

_EXAMPLES = [
    ("lunaris train", "a small MoE model, in about two minutes"),
    ("lunaris train model=small moe=switch moe.n_experts=16", "other options, another value"),
    ("lunaris train experiment=smoke", "a preset of many overrides"),
    ("lunaris train -m moe.n_experts=4,8,16", "a sweep, on each GPU a point"),
    ("lunaris train -m moe.n_experts=4,8,16 --dry-run", "its points, checked; nothing is written"),
    ("lunaris train -m --zip moe.n_experts=8,16 moe=switch,top2", "two points, the values paired"),
    ("lunaris train parallelism=fsdp launch.processes=8", "eight GPUs of this machine"),
    ("lunaris train -m launch=slurm moe.n_experts=8,16", "a job array"),
]


def main(argv: list[str]) -> int:
    """Compose, check and launch; return the exit code."""
    from lunaris.config.cli import help_text, parse_flags
    from lunaris.config.compose import Composer, config_dirs
    from lunaris.config.overruled import overruled
    from lunaris.config.trust import allow, allow_named
    from lunaris.runs.provenance import composed_with

    flags = parse_flags(argv)
    if flags.help:
        print(help_text("lunaris train", _WHAT, _EXAMPLES, config_dirs(flags.source)))
        return 0
    if flags.cfg == "job":
        return _show(flags)
    allow(flags.trust)
    allow_named(flags.overrides)
    command = shlex.join(["lunaris", "train", *argv])
    if flags.multirun:
        from lunaris.launch.sweep.start import sweep

        return sweep(flags, command)
    if flags.hydra_help or flags.cfg or flags.info or flags.shell_completion:
        return _show_by_hydra(flags)
    composer = Composer(flags.source)
    cfg = composer.compose(flags.overrides)
    if os.environ.get("RANK", "0") == "0":
        for line in composer.defaults_lines([flags.overrides]):
            print(line, file=sys.stderr)
        if composer.decided is not None:
            print(composer.decided, file=sys.stderr)
        for text in overruled(composer, [flags.overrides]):
            print(f"warning: {text}", file=sys.stderr)
    with composed_with(composer.record(flags.overrides)):
        return submit(cfg, command, flags.overrides)


def submit(cfg: Config, command: str, overrides: list[str]) -> int:
    """Give a composed config to its launcher, or train here where torchrun started this process."""
    from lunaris.config.instantiate import instantiate_component
    from lunaris.continuation.checks import check_start
    from lunaris.launch.local import exit_code_here
    from lunaris.runs.create import create

    if os.environ.get("RANK", "0") == "0":
        check_start(cfg)
    if "RANK" not in os.environ:
        _warn_of_memory(cfg)
        launcher = instantiate_component("launch", cfg.launch)
        return int(launcher.submit(cfg, command, overrides))
    if os.environ["RANK"] == "0":
        create(cfg, command, overrides)
    # The other ranks wait for rank 0 when the process group is created.
    return exit_code_here(cfg, Path(cfg.out_dir))


def _warn_of_memory(cfg: Config) -> None:
    """Print a warning where the plan needs more memory than the machine, or the job, has."""
    from lunaris.planning.report import memory_warning

    text = memory_warning(cfg)
    if text is not None:
        print(f"warning: {text}", file=sys.stderr)


def _show(flags: Flags) -> int:
    from omegaconf import MISSING, OmegaConf

    from lunaris.config.compose import Composer, finish
    from lunaris.config.messages import shown
    from lunaris.config.typed import give_schemas
    from lunaris.config.validate import check_values

    cfg: Any = Composer(flags.source).compose_raw(flags.overrides)
    finish(cfg, flags.overrides)
    give_schemas(cfg)
    if flags.resolve:
        check_values(cfg, missing=True)
    if flags.package not in (None, "_global_"):
        absent = object()
        part = OmegaConf.select(cfg, flags.package, default=absent)
        if part is absent:
            # A key whose value is still missing exists, but cannot be selected.
            if flags.package not in OmegaConf.missing_keys(cfg):
                raise UserError(f"--package {flags.package}: no such part of the config")
            part = MISSING
        cfg = part
        print(f"# @package {flags.package}")
    if not OmegaConf.is_config(cfg):
        print(shown(cfg))
        return 0
    print(OmegaConf.to_yaml(cfg, resolve=flags.resolve), end="")
    return 0


def _show_by_hydra(flags: Flags) -> int:
    """Let Hydra show what the flags ask for: its help, its config, or how it composes ours."""
    from lunaris.config.compose import Composer
    from lunaris.config.overrides import parse
    from lunaris.launch.sweep.hydra_bridge import call_hydra

    option: dict[str, Any] = {}
    if flags.info or flags.cfg:
        composer = Composer(flags.source)
        option = composer.option(flags.overrides)
        for line in composer.defaults_lines([flags.overrides]):
            print(line, file=sys.stderr)
    call_hydra(flags, parse(flags.overrides), _unreached, defaults=option)
    return 0


def _unreached(cfg: object) -> None:
    raise AssertionError("Hydra only prints here and runs nothing")
