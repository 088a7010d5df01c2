"""The edge to Hydra: `hydra.main` with our plugins, our command line and our messages."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any

from lunaris.config.cli import Flags
from lunaris.config.compose import Composer, register_schemas
from lunaris.config.messages import explain
from lunaris.config.options import CONFIG_MODULE
from lunaris.config.overrides import open_maps, parse
from lunaris.errors import UserError

# Hydra takes plugins from this package only; ours are registered under its name.
_PACKAGE = "hydra_plugins.lunaris"
_PLUGINS = {
    "Product": "lunaris.launch.sweep.sweeper",
    "LocalSweep": "lunaris.launch.sweep.sweeper",
    "SlurmArray": "lunaris.launch.sweep.slurm_array",
}


def hand_to_hydra(
    flags: Flags, extra: list[str], task: Callable[[Any], Any], plugins: list[str] | None = None
) -> None:
    """Let `hydra.main` do what the flags ask, and tell its faults as ours.

    Hydra's sweepers, launchers, completion and `--info` work by this way. plugins: the
    `_target_`s that the config will ask for; ours among them are registered. Raises UserError.
    """
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    register_schemas()
    _register(plugins or [])
    try:
        with warnings.catch_warnings(), _as_hydra_program(_argv(flags, extra)):
            warnings.simplefilter("ignore")
            hydra.main(f"pkg://{CONFIG_MODULE}", "train", version_base="1.3")(task)()
    except SystemExit as ended:
        # `--hydra-help` ends so.
        if ended.code:
            raise
    except (HydraException, OmegaConfBaseException, YAMLError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        if flags.shell_completion:
            raise UserError(explain(error)) from error
        # Ours is the better message, where the fault is one that our own composition finds.
        swept = {o.input_line for o in parse(flags.overrides) if o.is_sweep_override()}
        Composer(flags.source).unchecked([o for o in flags.overrides if o not in swept])
        raise UserError(explain(error)) from error


def _register(targets: list[str]) -> None:
    from hydra.core.plugins import Plugins

    package = sys.modules.setdefault(_PACKAGE, ModuleType(_PACKAGE))
    for target in targets:
        name = target.removeprefix(f"{_PACKAGE}.")
        if name in _PLUGINS:
            plugin = getattr(import_module(_PLUGINS[name]), name)
            plugin.__module__ = _PACKAGE
            setattr(package, name, plugin)
            Plugins.instance().register(plugin)


def _argv(flags: Flags, extra: list[str]) -> list[str]:
    argv = ["lunaris"]
    for flag, value in (
        ("--cfg", flags.cfg),
        ("--package", flags.package),
        ("--info", flags.info),
        ("--config-name", flags.config_name),
        ("--config-dir", flags.config_dir),
        ("--config-path", flags.config_path and os.path.abspath(flags.config_path)),
    ):
        argv += [flag, value] if value is not None else []
    for flag, given in (
        ("--multirun", flags.multirun),
        ("--resolve", flags.resolve),
        ("--hydra-help", flags.hydra_help),
        ("--shell-completion", flags.shell_completion),
    ):
        argv += [flag] if given else []
    if flags.config_path is not None:
        extra = [*extra, f"hydra.searchpath=[pkg://{CONFIG_MODULE}]"]
    return [*argv, *extra, *open_maps(parse(flags.overrides))]


@contextmanager
def _as_hydra_program(argv: list[str]) -> Iterator[None]:
    """Lend `hydra.main` the command line, and have it raise its errors instead of printing."""
    before, full = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = argv
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        sys.argv = before
        if full is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = full
