"""What the schemas of all groups share. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, ClassVar

from omegaconf import MISSING

from lunaris.errors import UserError, did_you_mean

# Metadata of a key that changes where, how fast or how visibly a run trains, but not its numbers:
# a run's folder may be continued with another value of it (`lunaris.config.identity`).
FREE = {"identity": False}
# Metadata of a key that is part of a run's identity but does not change what its weights are: it
# may change in the middle of a run, by `lunaris resume DIR KEY=VALUE`, which records the change.
CHANGEABLE = {"changeable": True}


def key(
    default: Any = MISSING, *, identity: bool = True, changeable: bool = False, **limits: Any
) -> Any:
    """Return a dataclass field whose value is checked when a schema of the package is built.

    limits: `low` and `high` (inclusive), `above`, `at_most` (far beyond any use, so that products
    of such sizes do not overflow), or `allowed`, a tuple of texts; None (an unset optional value)
    always passes. identity: whether the key is part of a run's identity.
    changeable: whether it may nevertheless change in the middle of a run.
    """
    metadata = {"identity": identity, "changeable": changeable, "limits": limits}
    return field(default=default, metadata=metadata)


free = partial(key, identity=False)
changeable = partial(key, changeable=True)


@dataclass
class Schema:
    """The keys of a group or of an option; a value outside the limits of its key is refused."""

    # Where the keys stand in the config.
    _group_: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for item in fields(self):
            if limits := item.metadata.get("limits"):
                name = f"{self._group_}.{item.name}".lstrip(".")
                check_limits(name, getattr(self, item.name), **limits)


@dataclass
class Component(Schema):
    """A part whose class is chosen by its dotted path; the other keys are its arguments."""

    _target_: str = MISSING


def component(base: type[Component], default: type[Component], **metadata: Any) -> Any:
    """Return a dataclass field that holds a component of class `base`, by default a `default`.

    The field has no value of its own, since an option of its group gives it; where none does (a
    config file of an older version), `lunaris.config.typed` fills in `default`.
    """
    return field(default=MISSING, metadata={"base": base, "default": default, **metadata})


def component_keys(component: object) -> dict[str, Any]:
    """Return the keys of a component without `_target_`: the arguments of its class.

    Of a custom class without a schema, those that it was given.
    """
    left_out = {"_target_", *getattr(type(component), "_not_given", ())}
    return {name: value for name, value in vars(component).items() if name not in left_out}


def check_limits(
    name: str,
    value: Any,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    allowed: tuple[str, ...] = (),
) -> None:
    """Raise UserError for a value outside the limits (see `key`) of the dotted key `name`."""
    if value is None:
        return
    if allowed and value not in allowed:
        fault = f"allowed are {', '.join(allowed)}{did_you_mean(str(value), allowed)}"
    elif not allowed and not math.isfinite(value):
        fault = "must be a finite number"
    elif above is not None and value <= above:
        fault = f"must be greater than {above}"
    elif at_most is not None and value > at_most:
        fault = f"must be at most {at_most}"
    elif (low is not None and value < low) or (high is not None and value > high):
        fault = f"must be at least {low}" if high is None else f"must be between {low} and {high}"
    else:
        return
    raise UserError(f"{name}={value}: {fault}")
