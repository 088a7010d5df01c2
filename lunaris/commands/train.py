"""`lunaris train`: compose a run from the options and overrides, and run or send it."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lunaris.errors import Stopped, UserError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from lunaris.config.cli import Flags

HELP = "train a model here (launch=local) or send it to SLURM (launch=slurm); -m sweeps"

_WHAT = """\
Trains a model on this machine, or sends the run to SLURM (launch=slurm). The config is checked
before anything starts; the run's folder (out_dir) holds it, the metrics and the checkpoints. The
same command goes on from the newest checkpoint."""

_EXAMPLES = [
    ("lunaris train", "a small MoE model, in about two minutes"),
    ("lunaris train model=small moe=switch moe.n_experts=16", "other options, another value"),
    ("lunaris train experiment=smoke", "a preset of many overrides"),
    ("lunaris train -m moe.n_experts=4,8,16", "a sweep, one point after the other"),
    ("lunaris train parallelism=fsdp launch.processes=8", "eight GPUs of this machine"),
    ("lunaris train -m launch=slurm moe.n_experts=8,16", "a job array"),
]


def main(argv: list[str]) -> int:
    """Compose, check and launch; return the exit code."""
    from lunaris.config.cli import parse_flags

    flags = parse_flags(argv)
    if flags.help:
        return _help(flags)
    if flags.cfg == "job":
        return _show(flags)
    command = shlex.join(["lunaris", "train", *argv])
    if flags.multirun:
        from lunaris.launch.sweep.sweeper import sweep

        return sweep(flags, command)
    if flags.hydra_help or flags.cfg or flags.info or flags.shell_completion:
        from lunaris.launch.sweep.hydra_bridge import hand_to_hydra

        hand_to_hydra(flags, [], _unreached)
        return 0

    from lunaris.config.compose import compose

    return submit(compose(flags.overrides, source=flags.source), command, flags.overrides)


def submit(cfg: DictConfig, command: str, overrides: list[str]) -> int:
    """Give a composed config to its launcher, or run it here when torchrun started us."""
    if "RANK" in os.environ:
        return _run_as_rank(cfg, command, overrides)
    from lunaris.config.instantiate import build

    keys: dict[str, Any] = {str(k): v for k, v in cfg.launch.items() if k != "_target_"}
    launcher = build("launch._target_", cfg.launch._target_, keys)
    return int(launcher.submit(cfg, command, overrides))


def _run_as_rank(cfg: DictConfig, command: str, overrides: list[str]) -> int:
    from lunaris.launch.worker import work
    from lunaris.runs import run_dir as rundir

    if os.environ["RANK"] == "0":
        rundir.create(cfg, command, overrides)
    # The other ranks meet rank 0 when the process group is made.
    try:
        work(cfg, Path(cfg.out_dir))
    except (UserError, Stopped):
        raise
    except Exception:  # Printed by `work`, with its traceback.
        return 1
    return 0


def _help(flags: Flags) -> int:
    from lunaris.config.compose import config_dirs
    from lunaris.config.help_text import manual

    print(manual("lunaris train", _WHAT, _EXAMPLES, config_dirs(flags.source)))
    return 0


def _show(flags: Flags) -> int:
    from omegaconf import MISSING, OmegaConf

    from lunaris.config.compose import Composer, finish
    from lunaris.config.messages import shown
    from lunaris.config.structure import check_interpolations, check_keys

    cfg: Any = Composer(flags.source).unchecked(flags.overrides)
    finish(cfg, flags.overrides)
    check_keys(cfg)
    if flags.resolve:
        check_interpolations(cfg)
    if flags.package not in (None, "_global_"):
        absent = object()
        part = OmegaConf.select(cfg, flags.package, default=absent)
        if part is absent:
            # A value that has to be given still is there, but cannot be selected.
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


def _unreached(cfg: DictConfig) -> None:
    raise AssertionError("Hydra shows something here and runs nothing")
