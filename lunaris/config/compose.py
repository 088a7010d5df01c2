"""Composition: the schemas, the options and the command line become one checked `Config`."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lunaris.config.keys import CONFIG_MODULE, folders, groups, split_key
from lunaris.config.messages import explain
from lunaris.config.overrides import apply, check, is_group_choice, open_maps, parse, quoted
from lunaris.config.run_names import experiment, run_name
from lunaris.config.schema.root import Config
from lunaris.errors import UserError

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override
    from omegaconf import DictConfig


@dataclass(frozen=True)
class Source:
    """Where the config is read from: Hydra's --config-name, --config-path and --config-dir."""

    name: str = "train"
    # Read before our own folder.
    path: str | None = None
    # Read after it: further options, of ours or of new names.
    dir: str | None = None
    # Overrides of Hydra's own part that every command line of the source begins with.
    overrides: tuple[str, ...] = ()


class Composer:
    """Composes command lines of one source; Hydra composes each set of options only once.

    A point of a sweep then takes milliseconds, not a tenth of a second.
    """

    def __init__(self, source: Source | None = None) -> None:
        self._source = source or Source()
        self._bases: dict[tuple[str, ...], DictConfig] = {}

    def compose(self, overrides: list[str], *, check_data: bool = True) -> Config:
        """Return the config for `overrides`, checked, named, with nothing missing.

        `check_data=False` leaves out what needs the data to be there already. Raises UserError
        with the dotted key, the value and what is allowed.
        """
        from lunaris.config.typed import give_schemas, to_config
        from lunaris.config.validate import check_values, validate

        tree = self.compose_raw(overrides)
        finish(tree, overrides)
        give_schemas(tree)
        check_values(tree)
        cfg = to_config(tree)
        validate(cfg, check_data=check_data)
        return cfg

    def compose_raw(self, overrides: list[str], *, with_hydra: bool = False) -> DictConfig:
        """Return the tree that Hydra composes, without the checks across keys.

        Raises UserError, in the words of this package, for what Hydra refuses. with_hydra: keep
        Hydra's part of the tree.
        """
        from omegaconf import open_dict

        _search_path(self._source)  # Reported before an option that its folder would hold.
        parsed = parse([*self._source.overrides, *overrides])
        check(parsed, config_dirs(self._source))
        cfg = copy.deepcopy(self._base([o for o in parsed if is_group_choice(o)]))
        chosen: dict[str, Any] = dict(cfg.hydra.runtime.choices)
        if not with_hydra:
            with open_dict(cfg):
                del cfg["hydra"]
        for override in parsed:
            if not is_group_choice(override):
                apply(cfg, override, chosen.get(split_key(override.key_or_group)[0]))
        return cfg

    def _base(self, choices: list[Override]) -> DictConfig:
        from hydra.errors import HydraException
        from omegaconf.errors import OmegaConfBaseException
        from yaml import YAMLError

        from lunaris.config.typed import give_schemas

        texts = [*_search_path(self._source), *open_maps(choices)]
        key = tuple(texts)
        if key not in self._bases:
            try:
                base = _hydra_compose(self._source, texts)
            except (HydraException, OmegaConfBaseException, YAMLError, ValueError) as error:
                raise UserError(explain(error)) from error
            # So that an override is judged by the schema of a custom class too.
            give_schemas(base, strict=False)
            self._bases[key] = base
        return self._bases[key]


def compose(
    overrides: list[str], *, source: Source | None = None, check_data: bool = True
) -> Config:
    """Return the config for one command line, as `Composer.compose` does. No torch."""
    return Composer(source).compose(overrides, check_data=check_data)


def finish(cfg: DictConfig, overrides: list[str]) -> None:
    """Fill in what follows from the overrides: the names, and the logger that every run has."""
    from omegaconf import OmegaConf, open_dict

    from lunaris.config.schema.logger import LocalLoggerConfig

    given = OmegaConf.is_interpolation(cfg, "name") or OmegaConf.is_missing(cfg, "name")
    if not given and cfg.name is None:
        cfg.name = run_name(overrides)
    cfg.experiment = experiment(overrides)
    if OmegaConf.is_dict(cfg.logger) and "local" not in cfg.logger:
        with open_dict(cfg):
            cfg.logger = {"local": OmegaConf.structured(LocalLoggerConfig), **cfg.logger}


def _hydra_compose(source: Source, choices: list[str]) -> DictConfig:
    from hydra import compose as hydra_compose

    register_schemas()
    with warnings.catch_warnings(), _initialized(source):
        warnings.simplefilter("ignore")
        return hydra_compose(source.name, choices, return_hydra_config=True)


def config_dirs(source: Source) -> list[Path]:
    """Return the folders that options come from, ours first."""
    given = [Path(folder) for folder in (source.path, source.dir) if folder is not None]
    return [*folders(), *given]


def register_schemas() -> None:
    """Register every schema as `schema/NAME`, where the `defaults` of option files find it."""
    from hydra.core.config_store import ConfigStore

    from lunaris.config.typed import OpenConfig

    store = ConfigStore.instance()
    if "schema" in store.repo:
        return
    store.store(group="schema", name="train", node=OpenConfig, package="_global_")
    for schemas in groups().values():
        for schema in schemas:
            store.store(group="schema", name=schema.__name__, node=schema)


@contextmanager
def _initialized(source: Source) -> Iterator[None]:
    from hydra import initialize_config_dir, initialize_config_module
    from hydra.core.global_hydra import GlobalHydra

    # Within `hydra.main` (a sweep) there is one already, which reads from elsewhere.
    state = GlobalHydra.instance()
    outer, state.hydra = state.hydra, None
    try:
        opened: AbstractContextManager[Any]
        if source.path is not None:
            opened = initialize_config_dir(os.path.abspath(source.path), version_base="1.3")
        else:
            opened = initialize_config_module(CONFIG_MODULE, version_base="1.3")
        with opened:
            yield
    finally:
        GlobalHydra.instance().hydra = outer


def _search_path(source: Source) -> list[str]:
    """Return the override that adds the folders beside the main one, or nothing."""
    further = [f"pkg://{CONFIG_MODULE}"] if source.path is not None else []
    for key, folder in (("--config-path", source.path), ("--config-dir", source.dir)):
        if folder is not None and not Path(folder).is_dir():
            raise UserError(f"{key} {folder}: no such folder")
    if source.dir is not None:
        further.append(f"file://{os.path.abspath(source.dir)}")
    further = [quoted(place) for place in further]
    return [f"hydra.searchpath=[{','.join(further)}]"] if further else []
