"""What the schemas of all groups share. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

# Metadata of a key that changes where, how fast or how visibly a run trains, but not its numbers:
# a run's folder may be continued with another value of it (`lunaris.config.identity`).
FREE = {"identity": False}


@dataclass
class Component:
    """A part whose class is chosen by its dotted path; the other keys are its arguments."""

    _target_: str = MISSING


def free(default: Any = MISSING, *, factory: Any = None) -> Any:
    """Return a dataclass field that is not part of a run's identity."""
    if factory is not None:
        return field(default_factory=factory, metadata=FREE)
    return field(default=default, metadata=FREE)


def component(base: type[Component], default: type[Component], **metadata: Any) -> Any:
    """Return a dataclass field that holds a component of class `base`, by default a `default`.

    The field has no value of its own, since an option of its group gives it; where none does (a
    config file of an older version), `lunaris.config.typed` fills in `default`.
    """
    return field(default=MISSING, metadata={"base": base, "default": default, **metadata})


def component_keys(component: Component) -> dict[str, Any]:
    """Return the keys of a component without `_target_`: the arguments of its class.

    Of a custom class without a schema, those that it was given.
    """
    left_out = {"_target_", *getattr(type(component), "_not_given", ())}
    return {key: value for key, value in vars(component).items() if key not in left_out}
