"""Canaries: what we use of Hydra without its being public works as in the version we know."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import pytest

PACKAGE = "pkg://lunaris.conf"


Canary = Callable[..., AbstractContextManager[None]]


@pytest.fixture
def canary(canary_of: Canary) -> Canary:
    """Return a context that fails, naming what hydra-core changed and where to adapt."""
    return partial(canary_of, "hydra-core", place="lunaris/config/hydra_internals.py")


def test_a_plugin_can_be_registered_by_hand(canary: Canary) -> None:
    with canary("how a plugin is registered"):
        from hydra.core.plugins import Plugins
        from hydra.plugins.launcher import Launcher

        from lunaris.config.hydra_internals import PLUGIN_PACKAGE, register_plugin

        class Probe(Launcher):
            def setup(self, **keys: object) -> None: ...
            def launch(self, job_overrides: object, initial_job_idx: int) -> list[object]:
                return []

        register_plugin(Probe)
        plugins, name = Plugins.instance(), f"{PLUGIN_PACKAGE}.Probe"
        assert plugins.class_name_to_class.pop(name) is Probe
        plugins.plugin_type_to_subclass_list[Launcher].remove(Probe)
        assert plugins.is_in_toplevel_plugins_module(name)


def test_a_launcher_is_instantiated_by_its_context(canary: Canary) -> None:
    with canary("Plugins.instantiate_launcher"):
        from hydra.core.plugins import Plugins

        keys = inspect.signature(Plugins.instantiate_launcher).parameters
        assert list(keys) == ["self", "hydra_context", "task_function", "config"]


def test_hydra_main_reads_the_lent_command_line_and_raises_its_errors(canary: Canary) -> None:
    argv = list(sys.argv)
    with canary("HYDRA_FULL_ERROR, or that hydra.main reads sys.argv"):
        from hydra.errors import HydraException

        from lunaris.config.compose import schema_nodes
        from lunaris.config.hydra_internals import register_schemas, run_hydra_main

        register_schemas(schema_nodes())
        seen: list[int] = []
        hydra = ["hydra/launcher=basic", "hydra/sweeper=basic"]
        run_hydra_main(PACKAGE, lambda cfg: seen.append(cfg.seed), ["lunaris", *hydra, "seed=7"])
        assert seen == [7]
        with pytest.raises(HydraException):
            run_hydra_main(PACKAGE, seen.append, ["lunaris", "moe=swich"])
    assert sys.argv == argv


def test_a_loader_knows_the_options_of_every_folder(canary: Canary, tmp_path: Path) -> None:
    (tmp_path / "moe").mkdir()
    (tmp_path / "moe" / "mine.yaml").write_text("{}\n")
    with canary("ConfigLoaderImpl, or the search path of its options"):
        from lunaris.config.hydra_internals import option_loader

        loader = option_loader(PACKAGE, [f"file://{tmp_path}"])
        assert {"mine", "switch", "top2"} <= set(loader.get_group_options("moe"))


def test_a_glob_asks_the_loader_of_its_override(canary: Canary) -> None:
    with canary("Override.config_loader, or how a glob is expanded"):
        from lunaris.config.hydra_internals import option_loader
        from lunaris.config.overrides import parse
        from lunaris.launch.sweep.expand import expand

        points = expand(parse(["schedule=glob(c*)"], option_loader(PACKAGE, [])))
        assert points == [["schedule=constant"], ["schedule=cosine"]]


def test_composing_leaves_an_outer_hydra_as_it_was(canary: Canary) -> None:
    with canary("GlobalHydra, ConfigStore or hydra.compose"):
        from hydra import initialize_config_module
        from hydra.core.config_store import ConfigStore
        from hydra.core.global_hydra import GlobalHydra

        from lunaris.config.compose import compose

        with initialize_config_module("lunaris.conf", version_base="1.3"):
            outer = GlobalHydra.instance().hydra
            assert compose(["seed=3"]).seed == 3
            assert GlobalHydra.instance().hydra is outer
        assert "schema" in ConfigStore.instance().repo
