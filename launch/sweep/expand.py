"""The command line of a sweep: parsed and checked once, then expanded into points."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.override_parser.types import Override, ValueType
from hydra.errors import HydraException

from lunaris.config.cli import Flags
from lunaris.config.compose import Composer, Source, config_dirs, places
from lunaris.config.hydra_internals import PLUGIN_PACKAGE, option_loader
from lunaris.config.keys import CONFIG_MODULE
from lunaris.config.messages import explain
from lunaris.config.overrides import check, open_maps, parse
from lunaris.config.run_names import sweep_name
from lunaris.config.trust import allow_tree
from lunaris.errors import UserError
from lunaris.launch.sweep.pairs import combine
from lunaris.launch.sweep.points import Sweep

if TYPE_CHECKING:
    from hydra.core.config_loader import ConfigLoader
    from omegaconf import DictConfig

# Our sweeper, as `hydra.sweeper._target_` names it.
PRODUCT = f"{PLUGIN_PACKAGE}.Product"


@dataclass(frozen=True)
class SweepRequest:
    """What a command line asks of a sweep. `parsed` are the overrides as they were given."""

    flags: Flags
    command: str
    parsed: list[Override]

    @cached_property
    def overrides(self) -> list[Override]:
        """The overrides as Hydra takes them: with a plus before the entry of a free map."""
        given = {o.input_line: o for o in self.parsed}
        return [given.get(text) or parse([text])[0] for text in open_maps(self.parsed)]

    @cached_property
    def source(self) -> Source:
        """Where the config of every point is read from."""
        found = [_text(o) for o in self.parsed if o.key_or_group == "hydra.searchpath"]
        return replace(self.flags.source, overrides=tuple(found))

    def sweep(self) -> Sweep:
        """Return the sweep, without points. Raises UserError for an impossible folder."""
        swept = [_text(o) for o in self.parsed if o.is_sweep_override()]
        task = [_text(o) for o in self.parsed if not o.is_hydra_override()]
        given = {o.key_or_group: o.value() for o in self.parsed if not o.is_sweep_override()}
        name = str(given.get("name") or sweep_name(task, swept))
        composer = Composer(self.source, of_sweep=True)
        asked = given.get("hydra.sweep.dir") or given.get("out_dir")
        folder = str(asked or composer.defaults.keys.get("out_dir") or f"sweeps/{name}")
        folder = folder.replace("${name}", name)
        if "${" in folder:
            raise UserError(
                f"out_dir={folder}: in the out_dir of a sweep only ${{name}} is replaced; every "
                "point gets its own folder inside it"
            )
        # Hydra's sweepers write values in their own way: 1e-3 becomes 0.001.
        rewritten = [
            f"{o.get_key_element()}={o.get_value_element_as_str()}"
            for o in [*self.parsed, *self.overrides]
            if not (o.is_sweep_override() or o.is_hydra_override())
        ]
        shared = {*task, *rewritten}
        return Sweep(Path(folder), self.command, shared, composer, zipped=self.flags.zipped)

    def hydra_config(self, composer: Composer) -> DictConfig:
        """Return Hydra's own part of the config, which names the sweeper and the launcher.

        Raises UserError for a fault of the overrides that are not swept, and for a swept key of
        Hydra's own.
        """
        fixed = [
            _text(o)
            for o in self.parsed
            if not o.is_sweep_override() and o.key_or_group != "hydra.searchpath"
        ]
        from omegaconf import OmegaConf

        composed = composer.compose_raw(fixed, with_hydra=True)
        # Points that tasks of another launcher freeze are read from their folders.
        allow_tree(OmegaConf.to_container(composed))
        config: DictConfig = composed.hydra
        for override in self.parsed:
            if override.is_sweep_override() and override.is_hydra_override():
                raise UserError(f"{_text(override)}: a key of Hydra's own cannot be swept")
        return config

    def expand(self, params: dict[str, str]) -> list[list[str]]:
        """Return the overrides of every point. params: overrides from a file, by key.

        Raises UserError when they cannot be expanded.
        """
        task = [o for o in self.overrides if not o.is_hydra_override()]
        given = parse([f"{key}={value}" for key, value in params.items()])
        for override in (*given, *task):
            if override.value_type is ValueType.GLOB_CHOICE_SWEEP:
                # It knows the options that a `glob(…)` stands for.
                override.config_loader = _option_loader(self.source)
        try:
            return expand([*given, *task], self.flags.zipped)
        except (HydraException, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(explain(error)) from error


def read_request(flags: Flags, command: str) -> SweepRequest:
    """Parse and check the overrides of a command line. Raises UserError for the first bad one."""
    parsed = parse(flags.overrides)
    check(parsed, config_dirs(flags.source), sweep=True)
    return SweepRequest(flags, command, parsed)


def expand(overrides: list[Override], zipped: Sequence[str] = ()) -> list[list[str]]:
    """Return the overrides of every point: the product of all swept values.

    The last override of a key counts. zipped: what each `--zip` names, whose keys step together.
    Raises UserError for an interval, for a key without any value, and for keys that cannot be
    paired.
    """
    last: dict[str, tuple[Override, list[str]]] = {}
    for override in overrides:
        key = override.key_or_group
        last.pop(key, None)
        texts = [f"{override.get_key_element()}={value}" for value in _values(override)]
        if not texts:
            raise UserError(f"{override.input_line}: stands for no value; there is nothing to run")
        last[key] = override, texts
    swept = [key for key, (override, _) in last.items() if override.is_sweep_override()]
    return combine({key: texts for key, (_, texts) in last.items()}, swept, zipped)


def _values(override: Override) -> Iterator[str]:
    if not override.is_sweep_override():
        return iter([override.get_value_element_as_str()])
    if not override.is_discrete_sweep():
        raise UserError(
            f"{override.input_line}: this sweeper takes values one by one, not an interval"
        )
    return override.sweep_string_iterator()


def _option_loader(source: Source) -> ConfigLoader:
    main = f"pkg://{CONFIG_MODULE}"
    searched = places(source)
    for override in parse(list(source.overrides)):
        value = override.value()
        searched += value if isinstance(value, list) else []
    return option_loader(main if source.path is None else os.path.abspath(source.path), searched)


def _text(override: Override) -> str:
    return override.input_line or ""
