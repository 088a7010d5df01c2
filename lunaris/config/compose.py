"""Composition: the schemas, the options and the command line become one checked `Config`."""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from lunaris.config.hydra_internals import compose_options
from lunaris.config.keys import CONFIG_MODULE, folders, groups, schema_keys, split_key
from lunaris.config.messages import explain
from lunaris.config.overrides import apply, check, is_group_choice, open_maps, parse, quoted
from lunaris.config.run_names import experiment, run_name
from lunaris.config.schema.logger import LocalLoggerConfig
from lunaris.config.schema.root import Config
from lunaris.config.typed import OpenConfig, give_schemas, to_config
from lunaris.config.validate import check_values, validate
from lunaris.errors import UserError

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override


@dataclass(frozen=True)
class Source:
    """Where the config is read from: Hydra's --config-name, --config-path and --config-dir."""

    name: str = "train"
    # A folder that is read before the folder of this package.
    path: str | None = None
    # A folder that is read after it, with more options.
    dir: str | None = None
    # Overrides of Hydra's part of the config, which come before those of the command line.
    overrides: tuple[str, ...] = ()

    def flags(self) -> list[str]:
        """Return the words of a command line that reads from here."""
        named = {"--config-path": self.path, "--config-dir": self.dir}
        words = [word for flag, folder in named.items() if folder for word in (flag, folder)]
        words += ["--config-name", self.name] if self.name != "train" else []
        return [*words, *self.overrides]


# What is raised, besides a HydraException, for options that cannot be composed.
_REFUSED = (OmegaConfBaseException, YAMLError, OSError, ValueError)


class _Base(NamedTuple):
    """What Hydra composes for a set of options: its own part, which is large, and the rest."""

    hydra: DictConfig
    tree: DictConfig


class Composer:
    """Composes command lines of one source; Hydra composes each set of options only once.

    Each further point of a sweep then takes milliseconds instead of a tenth of a second.
    """

    def __init__(self, source: Source | None = None) -> None:
        self.source = source or Source()
        self._bases: dict[tuple[str, ...], _Base] = {}

    def compose(self, overrides: list[str], *, check_data: bool = True) -> Config:
        """Return the checked config for `overrides`; it has a name and no missing value.

        check_data=False: skip the checks that read prepared data. Raises UserError with the dotted
        key, the value and what is allowed.
        """
        tree = self.compose_raw(overrides)
        finish(tree, overrides)
        return checked(tree, check_data=check_data)

    def compose_raw(self, overrides: list[str], *, with_hydra: bool = False) -> DictConfig:
        """Return the tree that Hydra composes, without the checks across keys.

        Raises UserError, in the words of this package, for what Hydra refuses. with_hydra: keep
        Hydra's part of the tree.
        """
        _search_path(self.source)  # Reported before an option that its folder would hold.
        parsed = parse([*self.source.overrides, *overrides])
        check(parsed, config_dirs(self.source))
        base = self._base([o for o in parsed if is_group_choice(o)])
        cfg = copy.deepcopy(base.tree)
        if with_hydra:
            with open_dict(cfg):
                cfg.hydra = copy.deepcopy(base.hydra)
        for override in parsed:
            if not is_group_choice(override):
                choice = base.hydra.runtime.choices.get(split_key(override.key_or_group)[0])
                apply(cfg, override, choice)
        return cfg

    def _base(self, choices: list[Override]) -> _Base:
        from hydra.errors import HydraException

        texts = [*_search_path(self.source), *open_maps(choices)]
        key = tuple(texts)
        if key not in self._bases:
            try:
                tree = compose_options(
                    self.source.name, texts, self.source.path, CONFIG_MODULE, schema_nodes()
                )
            except (HydraException, *_REFUSED) as error:
                raise UserError(explain(error)) from error
            # With its schema, an override of a custom class's key is checked like any other.
            give_schemas(tree, strict=False)
            with open_dict(tree):
                self._bases[key] = _Base(tree.pop("hydra"), tree)
        return self._bases[key]


def compose(
    overrides: list[str], *, source: Source | None = None, check_data: bool = True
) -> Config:
    """Return the config for one command line, as `Composer.compose` does. No torch."""
    return Composer(source).compose(overrides, check_data=check_data)


def checked(tree: DictConfig, *, check_data: bool = True) -> Config:
    """Return the checked config of a composed tree, which has a name. Raises UserError."""
    if tree.get("name") is None:
        finish(tree, [])
    give_schemas(tree)
    check_values(tree)
    cfg = to_config(tree)
    validate(cfg, check_data=check_data)
    return cfg


def finish(cfg: DictConfig, overrides: list[str]) -> None:
    """Set the name and the experiment from the overrides, and add the local logger."""
    given = OmegaConf.is_interpolation(cfg, "name") or OmegaConf.is_missing(cfg, "name")
    if not given and cfg.name is None:
        cfg.name = run_name(overrides)
    cfg.experiment = experiment(overrides)
    add_local_logger(cfg)


def add_local_logger(cfg: DictConfig) -> None:
    """Put the local logger before those that were chosen without it."""
    if OmegaConf.is_dict(cfg.logger) and "local" not in cfg.logger:
        with open_dict(cfg):
            cfg.logger = {"local": OmegaConf.structured(LocalLoggerConfig), **cfg.logger}


def config_dirs(source: Source) -> list[Path]:
    """Return the folders that options are read from, this package's first."""
    given = [Path(folder) for folder in (source.path, source.dir) if folder is not None]
    return [*folders(), *given]


def schema_nodes() -> dict[str, type]:
    """Return the schemas that the `defaults` of option files name.

    Those of components that have keys: a group of values is typed by `Config` itself, and an option
    without keys states its `_target_`.
    """
    found = [schema for schemas in groups().values() for schema in schemas]
    named = {s.__name__: s for s in found if {"_target_"} < set(schema_keys(s))}
    return {"train": OpenConfig} | named


def _search_path(source: Source) -> list[str]:
    """Return the override that adds the other folders to Hydra's search path, or []."""
    further = [f"pkg://{CONFIG_MODULE}"] if source.path is not None else []
    for key, folder in (("--config-path", source.path), ("--config-dir", source.dir)):
        if folder is not None and not Path(folder).is_dir():
            raise UserError(f"{key} {folder}: no such folder")
    if source.dir is not None:
        further.append(f"file://{os.path.abspath(source.dir)}")
    further = [quoted(place) for place in further]
    return [f"hydra.searchpath=[{','.join(further)}]"] if further else []
