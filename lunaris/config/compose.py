"""Composition: the schemas, the options and the command line become one checked `Config`."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from lunaris.config.decide import decide_processes
from lunaris.config.defaults import Defaults, read_defaults, user_folder
from lunaris.config.hydra_internals import compose_options
from lunaris.config.keys import CONFIG_MODULE, flat, folders, groups, schema_keys, split_key
from lunaris.config.messages import explain, shown
from lunaris.config.overrides import apply, check, is_group_choice, keys_of, open_maps, parse
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
    """What Hydra composes for a set of options: its own part, which is large, and the rest.

    defaults: the option `user/defaults`, which is part of it. applied: what it changed, by key.
    """

    hydra: DictConfig
    tree: DictConfig
    defaults: dict[str, Any]
    applied: dict[str, Any]


class Composer:
    """Composes command lines of one source; Hydra composes each set of options only once.

    Each further point of a sweep then takes milliseconds instead of a tenth of a second.
    """

    def __init__(
        self, source: Source | None = None, *, with_defaults: bool = True, of_sweep: bool = False
    ) -> None:
        """with_defaults: whether the `defaults.yaml` of the person or the site counts.

        of_sweep: whether the command lines are points of a sweep, each with a GPU of its own.
        """
        self.source = source or Source()
        self._with_defaults, self._of_sweep = with_defaults, of_sweep
        # Of the last config: the line of `decide_processes`.
        self.decided: str | None = None
        self._bases: dict[tuple[str, ...], _Base] = {}

    @cached_property
    def defaults(self) -> Defaults:
        """What the `defaults.yaml` sets, wherever that fits. Raises UserError for a wrong one."""
        return read_defaults(config_dirs(self.source)) if self._with_defaults else Defaults()

    def applied(self, overrides: list[str]) -> dict[str, Any]:
        """Return what the `defaults.yaml` changes in the config of a command line, by key."""
        if self.defaults.file is None:
            return {}  # Nothing is parsed for each of many points.
        parsed = self._parsed(overrides)
        base = self._base([o for o in parsed if is_group_choice(o)])
        given = {key for o in parsed if not is_group_choice(o) for key in keys_of(o)}
        return {key: value for key, value in base.applied.items() if key not in given}

    def record(self, overrides: list[str]) -> dict[str, Any]:
        """Return the file and the keys of `applied`, as provenance.json keeps them, or {}."""
        applied = self.applied(overrides)
        return {"file": str(self.defaults.file), "keys": applied} if applied else {}

    def defaults_lines(
        self, command_lines: Iterable[Sequence[str]], groups: Sequence[str] = ()
    ) -> list[str]:
        """Return the line that names what the `defaults.yaml` changes in any of them, or none.

        groups: the only ones whose keys count; (): all.
        """
        found = [self.applied(list(overrides)) for overrides in command_lines]
        applied = {
            key: value
            for each in found
            for key, value in each.items()
            if not groups or key.partition(".")[0] in groups
        }
        return [self.defaults.line(applied)] if applied else []

    def option(self, overrides: list[str]) -> dict[str, Any]:
        """Return the content of the option `user/defaults` for a command line, {} without one."""
        return self._base([o for o in self._parsed(overrides) if is_group_choice(o)]).defaults

    def compose(self, overrides: list[str], *, check_data: bool = True) -> Config:
        """Return the checked config for `overrides`; it has a name and no missing value.

        check_data=False: skip the checks that read prepared data. Raises UserError with the dotted
        key, the value and what is allowed.
        """
        tree = self.compose_raw(overrides)
        finish(tree, overrides)
        try:
            cfg = typed(tree)
            self.decided = decide_processes(cfg, of_sweep=self._of_sweep)
            validate(cfg, check_data=check_data)
            return cfg
        except UserError as error:
            words = re.split(r"[^\w.]+", str(error))
            if named := [key for key in self.applied(overrides) if key in words]:
                are = "are" if len(named) > 1 else "is"
                file = self.defaults.file
                raise UserError(f"{error}; {', '.join(named)} {are} set by {file}") from error
            raise

    def compose_raw(self, overrides: list[str], *, with_hydra: bool = False) -> DictConfig:
        """Return the tree that Hydra composes, without the checks across keys.

        Raises UserError, in the words of this package, for what Hydra refuses. with_hydra: keep
        Hydra's part of the tree.
        """
        parsed = self._parsed(overrides)
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

    def _parsed(self, overrides: list[str]) -> list[Override]:
        places(self.source)  # Reported before an option that its folder would hold.
        parsed = parse([*self.source.overrides, *overrides])
        check(parsed, config_dirs(self.source))
        return parsed

    def _base(self, choices: list[Override]) -> _Base:
        texts = open_maps(choices)
        key = tuple(texts)
        if key not in self._bases:
            plain = chosen = self._composed(texts, {})
            if self.defaults.choices:
                chosen = self._composed(texts, self.defaults.option())
            fitting = self.defaults.fitting(chosen.tree)
            base = self._composed(texts, self.defaults.option(fitting)) if fitting else chosen
            applied = {
                group: shown(option)
                for group, option in self.defaults.choices.items()
                if plain.hydra.runtime.choices.get(group) != base.hydra.runtime.choices.get(group)
            }
            if fitting:
                before, after = _values(chosen), _values(base)
                # Those that an experiment sets are not changed.
                applied |= {k: after[k] for k in fitting if after.get(k) != before.get(k)}
            self._bases[key] = base._replace(applied=applied)
        return self._bases[key]

    def _composed(self, texts: list[str], defaults: dict[str, Any]) -> _Base:
        from hydra.errors import HydraException

        source, module = self.source, CONFIG_MODULE
        try:
            tree = compose_options(
                source.name, texts, source.path, module, schema_nodes(), places(source), defaults
            )
        except (HydraException, *_REFUSED) as error:
            raise UserError(explain(error)) from error
        # With its schema, an override of a custom class's key is checked like any other.
        give_schemas(tree, strict=False)
        with open_dict(tree):
            return _Base(tree.pop("hydra"), tree, defaults, {})


def _values(base: _Base) -> dict[str, Any]:
    """Return the values of a composed tree as they are written, by dotted key."""
    plain: Any = OmegaConf.to_container(base.tree)
    return flat(plain)


def compose(
    overrides: list[str], *, source: Source | None = None, check_data: bool = True
) -> Config:
    """Return the config for one command line, as `Composer.compose` does. No torch."""
    return Composer(source).compose(overrides, check_data=check_data)


def checked(tree: DictConfig, *, check_data: bool = True) -> Config:
    """Return the checked config of a composed tree, which has a name. Raises UserError."""
    cfg = typed(tree)
    decide_processes(cfg)
    validate(cfg, check_data=check_data)
    return cfg


def typed(tree: DictConfig) -> Config:
    """Return the config of a composed tree, without the checks across groups. Raises UserError."""
    if tree.get("name") is None:
        finish(tree, [])
    give_schemas(tree)
    check_values(tree)
    return to_config(tree)


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
    given = (source.path, source.dir, user_folder())
    return [*folders(), *(Path(folder) for folder in given if folder is not None)]


def schema_nodes() -> dict[str, type]:
    """Return the schemas that the `defaults` of option files name.

    Those of components that have keys: a group of values is typed by `Config` itself, and an option
    without keys states its `_target_`.
    """
    found = [schema for schemas in groups().values() for schema in schemas]
    named = {s.__name__: s for s in found if {"_target_"} < set(schema_keys(s))}
    return {"train": OpenConfig} | named


def places(source: Source) -> list[str]:
    """Return where Hydra looks for options besides the main folder, as it writes places.

    The first one wins. Raises UserError for a folder that does not exist.
    """
    for key, folder in (("--config-path", source.path), ("--config-dir", source.dir)):
        if folder is not None and not Path(folder).is_dir():
            raise UserError(f"{key} {folder}: no such folder")
    user = user_folder()
    further = [folder for folder in (source.dir, user) if folder is not None]
    ours = [f"pkg://{CONFIG_MODULE}"] if source.path is not None else []
    return [*ours, *(f"file://{os.path.abspath(folder)}" for folder in further)]
