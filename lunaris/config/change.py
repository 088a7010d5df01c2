"""A frozen config with other values, by the overrides of a command line. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf, open_dict

from lunaris.config.compose import Composer, Source, add_local_logger, checked, config_dirs
from lunaris.config.keys import EXPERIMENT, split_key
from lunaris.config.overrides import apply, check, is_group_choice, parse
from lunaris.config.schema.root import Config
from lunaris.config.typed import complete_tree, give_schemas, to_plain
from lunaris.errors import UserError

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override


def changed(
    cfg: Config, overrides: list[str], source: Source | None = None, *, check_data: bool = True
) -> Config:
    """Return the checked config that overrides make of a frozen one.

    GROUP=OPTION replaces the keys of the group by those of the option. Raises UserError for what
    `lunaris train` would refuse, and for a preset or a part of Hydra, which only it takes.
    """
    source = source or Source()
    parsed = parse(overrides)
    check(parsed, config_dirs(source))
    for override in parsed:
        if override.is_hydra_override() or override.key_or_group == EXPERIMENT:
            raise UserError(
                f"{override.input_line}: goes with `lunaris train`; a run that exists takes groups "
                "and keys"
            )
    tree = complete_tree(to_plain(cfg))
    give_schemas(tree)
    _choose(tree, [o for o in parsed if is_group_choice(o)], source)
    for override in parsed:
        if not is_group_choice(override):
            apply(tree, override, _choice_of(override, parsed))
    return checked(tree, check_data=check_data)


def _choose(tree: DictConfig, choices: list[Override], source: Source) -> None:
    """Put the groups of the chosen options, with the options' own defaults, into the tree."""
    if not choices:
        return
    texts = [o.input_line or "" for o in choices]
    composed: Any = Composer(source).compose_raw(texts)
    # `moe` before `moe/router`, which is a part of it.
    for group in sorted({o.key_or_group for o in choices}, key=len):
        parent, _, name = group.replace("/", ".").rpartition(".")
        node: Any = OmegaConf.select(tree, parent) if parent else tree
        if node is None or (parent and name not in node):
            raise UserError(f"{group}: the chosen option of {parent} has no {name}")
        with open_dict(node):
            node[name] = OmegaConf.select(composed, group.replace("/", "."))
    add_local_logger(tree)
    give_schemas(tree, strict=False)


def _choice_of(override: Override, parsed: list[Override]) -> str | None:
    """Return the option that the command line chooses for the group of an override's key."""
    group = split_key(override.key_or_group)[0]
    chosen = [o.value() for o in parsed if o.key_or_group == group and is_group_choice(o)]
    return str(chosen[-1]) if chosen else None
