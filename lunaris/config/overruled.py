"""What an experiment sets otherwise than an option that the command line names next to it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from lunaris.config.overrides import is_group_choice, parse
from lunaris.config.run_names import experiment

if TYPE_CHECKING:
    from lunaris.config.compose import Composer

# Keys that a sentence names before it counts the others.
_NAMED = 3


def overruled(composer: Composer, overrides: list[str]) -> list[str]:
    """Return a sentence for each option of a command line over which its experiment wins.

    Hydra merges the values of an experiment after every option, so `experiment=smoke model=base`
    has the width of the experiment. Keys that the command line gives itself do not count.
    """
    chosen = experiment(overrides)
    if chosen is None:
        return []
    parsed = parse(overrides)
    choices = {
        o.key_or_group: o.input_line or "" for o in parsed
        if is_group_choice(o) and not o.is_hydra_override() and o.key_or_group != "experiment"
    }  # fmt: skip
    if not choices:
        return []
    given = {o.key_or_group for o in parsed if not is_group_choice(o)}
    alone: Any = composer.compose_raw([*choices.values()])
    both: Any = composer.compose_raw([f"experiment={chosen}", *choices.values()])
    sentences = []
    for group, text in choices.items():
        path = group.replace("/", ".")
        before, after = _leaves(alone, path), _leaves(both, path)
        keys = [k for k in after if k not in given and after[k] != before.get(k, after)]
        if keys:
            named = ", ".join(f"{key}={after[key]}" for key in keys[:_NAMED])
            more = f" and {len(keys) - _NAMED} more keys" if len(keys) > _NAMED else ""
            sentences.append(
                f"experiment={chosen} sets {named}{more} over {text}; give them on the command "
                "line to change them"
            )
    return sentences


def _leaves(tree: Any, path: str) -> dict[str, Any]:
    """Return the values below a key of a tree, as they are written, by dotted key."""
    node = OmegaConf.select(tree, path)
    found: Any = OmegaConf.to_container(node) if OmegaConf.is_config(node) else {}
    rows: dict[str, Any] = {}
    stack = [(path, found)]
    while stack:
        here, value = stack.pop()
        if isinstance(value, dict):
            stack += [(f"{here}.{key}", each) for key, each in reversed(value.items())]
        else:
            rows[here] = value
    return rows
