"""What an experiment sets otherwise than an option that the command line names next to it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from omegaconf import OmegaConf

from lunaris.config.overrides import is_group_choice, parse
from lunaris.config.run_names import experiment

if TYPE_CHECKING:
    from lunaris.config.compose import Composer

# Keys that a sentence names before it counts the others.
_NAMED = 3


class _Asked(NamedTuple):
    """What the sentences of a command line depend on.

    choices: its options by group, as written. given: the keys that it sets itself.
    """

    experiment: str
    choices: tuple[tuple[str, str], ...]
    given: frozenset[str]


def overruled(composer: Composer, command_lines: Iterable[Sequence[str]]) -> list[str]:
    """Return a sentence, once, for each option of a command line over which its experiment wins.

    Hydra merges the values of an experiment after every option, so `experiment=smoke model=base`
    has the width of the experiment. Keys that the command line gives itself do not count.
    """
    # The points of a sweep mostly differ in values, which change no sentence.
    asked = dict.fromkeys(_asked(list(overrides)) for overrides in command_lines)
    found = (_sentences(composer, each) for each in asked if each is not None)
    return list(dict.fromkeys(text for texts in found for text in texts))


def _asked(overrides: list[str]) -> _Asked | None:
    """Return None where there is no experiment, or no other option."""
    chosen = experiment(overrides)
    if chosen is None:
        return None
    parsed = parse(overrides)
    choices = {
        o.key_or_group: o.input_line or "" for o in parsed
        if is_group_choice(o) and not o.is_hydra_override() and o.key_or_group != "experiment"
    }  # fmt: skip
    given = frozenset(o.key_or_group for o in parsed if not is_group_choice(o))
    return _Asked(chosen, tuple(choices.items()), given) if choices else None


def _sentences(composer: Composer, asked: _Asked) -> list[str]:
    texts = [text for _, text in asked.choices]
    alone: Any = composer.compose_raw(texts)
    both: Any = composer.compose_raw([f"experiment={asked.experiment}", *texts])
    sentences = []
    for group, text in asked.choices:
        path = group.replace("/", ".")
        before, after = _leaves(alone, path), _leaves(both, path)
        keys = [
            key for key, value in after.items()
            if key not in asked.given and (key not in before or value != before[key])
        ]  # fmt: skip
        if keys:
            named = ", ".join(f"{key}={after[key]}" for key in keys[:_NAMED])
            more = f" and {len(keys) - _NAMED} more keys" if len(keys) > _NAMED else ""
            sentences.append(
                f"experiment={asked.experiment} sets {named}{more} over {text}; give them on the "
                "command line to change them"
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
