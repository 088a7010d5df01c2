"""The parts of Hydra that are not public, and our only uses of them.

tests/config/test_hydra_internals.py fails with a plain message when a new version of Hydra changes
one of them. No torch.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hydra.core.config_loader import ConfigLoader
    from hydra.plugins.launcher import Launcher
    from hydra.types import HydraContext
    from omegaconf import DictConfig

# Hydra takes plugins only from the package `hydra_plugins`; ours are registered under this name.
PLUGIN_PACKAGE = "hydra_plugins.lunaris"


def register_plugin(plugin: type) -> None:
    """Make a sweeper or launcher known to Hydra as `hydra_plugins.lunaris.NAME`."""
    from hydra.core.plugins import Plugins

    package = sys.modules.setdefault(PLUGIN_PACKAGE, ModuleType(PLUGIN_PACKAGE))
    plugin.__module__ = PLUGIN_PACKAGE
    setattr(package, plugin.__name__, plugin)
    Plugins.instance().register(plugin)


def instantiate_launcher(
    context: HydraContext, task: Callable[[Any], Any], config: DictConfig
) -> Launcher:
    """Return the launcher that `config.hydra.launcher` names, set up for a task."""
    from hydra.core.plugins import Plugins

    return Plugins.instance().instantiate_launcher(
        hydra_context=context, task_function=task, config=config
    )


def run_hydra_main(config_path: str, task: Callable[[Any], Any], argv: list[str]) -> None:
    """Run `hydra.main` as if `argv` were the command line; raise its errors, print no warnings.

    config_path: the folder or package of the main config file, `train`.
    """
    import hydra

    with warnings.catch_warnings(), _as_hydra_program(argv):
        warnings.simplefilter("ignore")
        hydra.main(config_path, "train", version_base="1.3")(task)()


def option_loader(config_path: str, search_path: list[str]) -> ConfigLoader:
    """Return Hydra's loader of the options in a folder or package and in further ones."""
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra._internal.utils import create_config_search_path

    path = create_config_search_path(config_path)
    for place in search_path:
        path.append("lunaris", place)
    return ConfigLoaderImpl(config_search_path=path)


@contextmanager
def _as_hydra_program(argv: list[str]) -> Iterator[None]:
    """Let `hydra.main` read `argv`, and make it raise its errors instead of printing them."""
    argv_before, full_error = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = argv
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        sys.argv = argv_before
        if full_error is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = full_error
