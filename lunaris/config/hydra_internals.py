"""The parts of Hydra that are not public, and our only uses of them.

tests/config/test_hydra_internals.py fails with a plain message when a new version of Hydra changes
one of them. No torch.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hydra.core.config_loader import ConfigLoader
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.plugins.launcher import Launcher
    from hydra.types import HydraContext
    from omegaconf import DictConfig

# Hydra takes plugins only from the package `hydra_plugins`; ours are registered under this name.
PLUGIN_PACKAGE = "hydra_plugins.lunaris"
# Where Hydra looks for options after the main folder, within `_searching`.
_places: list[str] = []


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


@cache
def _register_places() -> None:
    """Register a plugin that gives Hydra's search path the places of `_searching`."""
    from hydra.core.config_search_path import ConfigSearchPath
    from hydra.plugins.search_path_plugin import SearchPathPlugin

    class FurtherOptions(SearchPathPlugin):
        def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
            for place in _places:
                search_path.append("lunaris", place)

    register_plugin(FurtherOptions)


@contextmanager
def _searching(places: Sequence[str], defaults: dict[str, Any]) -> Iterator[None]:
    """Let Hydra find the options of further places, and `defaults` as the option `user/defaults`.

    places: as Hydra writes them, `file://FOLDER` or `pkg://PACKAGE`. defaults: the content of the
    option, {} for none.
    """
    from hydra.core.config_store import ConfigStore

    _register_places()
    before, _places[:] = list(_places), places
    repo = ConfigStore.instance().repo
    if defaults:
        ConfigStore.instance().store("defaults", defaults, group="user", package="_global_")
    try:
        yield
    finally:
        _places[:] = before
        repo.pop("user", None)


def run_hydra_main(
    config_path: str,
    task: Callable[[Any], Any],
    argv: list[str],
    places: Sequence[str] = (),
    defaults: dict[str, Any] | None = None,
) -> None:
    """Run `hydra.main` as if `argv` were the command line; raise its errors, print no warnings.

    config_path: the folder or package of the main config file, `train`. places, defaults: as
    `compose_options` takes them.
    """
    import hydra

    before = sys.argv, os.environ.get("HYDRA_FULL_ERROR", "0")
    sys.argv, os.environ["HYDRA_FULL_ERROR"] = argv, "1"
    try:
        with warnings.catch_warnings(), _searching(places, defaults or {}):
            warnings.simplefilter("ignore")
            hydra.main(config_path, "train", version_base="1.3")(task)()
    finally:
        sys.argv, os.environ["HYDRA_FULL_ERROR"] = before


def option_loader(config_path: str, search_path: list[str]) -> ConfigLoader:
    """Return Hydra's loader of the options in a folder or package and in further ones."""
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra._internal.utils import create_config_search_path

    path = create_config_search_path(config_path)
    for place in search_path:
        path.append("lunaris", place)
    return ConfigLoaderImpl(config_search_path=path)


def override_parser(config_loader: ConfigLoader | None = None) -> OverridesParser:
    """Return Hydra's parser of overrides. config_loader: finds what a `glob(…)` stands for."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return OverridesParser.create(config_loader)


def register_schemas(nodes: dict[str, type]) -> None:
    """Register dataclasses as `schema/NAME`; the one called `train` is that of the whole config."""
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    if "schema" in store.repo:
        return
    for name, node in nodes.items():
        package = "_global_" if name == "train" else None
        store.store(name=name, node=node, group="schema", package=package)


def compose_options(
    name: str,
    choices: list[str],
    path: str | None,
    module: str,
    schemas: dict[str, type],
    places: Sequence[str] = (),
    defaults: dict[str, Any] | None = None,
) -> DictConfig:
    """Return what Hydra composes for the choices of options, with Hydra's part of the config.

    name: of the main file, in the folder `path`, or else in the package `module`. places: where
    further options are, as Hydra writes it (`file://FOLDER`), the first first. defaults: the
    content of the option `user/defaults`, or None without it.
    """
    from hydra import compose, initialize_config_dir, initialize_config_module
    from hydra.core.global_hydra import GlobalHydra

    register_schemas(schemas)
    # Inside `hydra.main` (a foreign sweeper) Hydra is initialized already, with another folder.
    state = GlobalHydra.instance()
    outer, state.hydra = state.hydra, None
    try:
        with warnings.catch_warnings(), _searching(places, defaults or {}):
            warnings.simplefilter("ignore")
            # These read the search path at once, and not when their context is entered.
            opened: AbstractContextManager[object] = (
                initialize_config_module(module, version_base="1.3")
                if path is None
                else initialize_config_dir(os.path.abspath(path), version_base="1.3")
            )
            with opened:
                return compose(name, choices, return_hydra_config=True)
    finally:
        GlobalHydra.instance().hydra = outer
