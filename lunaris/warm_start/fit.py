"""Which weights of a source go where in a model, by names and shapes alone. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from lunaris.errors import UserError

Shapes = dict[str, tuple[int, ...]]

# Tensors with a row for each token of the vocabulary.
_VOCABULARY = ("embedding.weight", "head.weight")
# What a router counts while it trains: another run may do without it.
_COUNTS = (".balance_bias", ".load_shares")
# Names of a layer's experts and of the dense feed-forward, below the layer's feed-forward.
EXPERTS, DENSE, ROUTER, SHARED = "experts.", "swiglu.", "router.", "shared."
_STACKED = ("gate_up", "down")


@dataclass
class Fit:
    """Where the tensors of a model come from, by their names.

    same: from the tensor of the same name and shape. resized: the same for as many rows as both
    have. upcycled: prefixes of feed-forwards with experts that come from a dense one. fresh: their
    routers. missing: tensors that the source lacks. unfit: name → both shapes. left_over: tensors
    of the source that the model lacks.
    """

    same: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    upcycled: list[str] = field(default_factory=list)
    fresh: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    left_over: list[str] = field(default_factory=list)
    unfit: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)

    def read(self) -> list[str]:
        """Return the names of the tensors that are read completely, so that none is drawn."""
        experts = [f"{prefix}{EXPERTS}{part}" for prefix in self.upcycled for part in _STACKED]
        return [*self.same, *experts]

    def faults(self) -> list[str]:
        """Return a line for each kind of what does not fit."""
        lines = [f"{name}: {a} there, {b} here" for name, (a, b) in self.unfit.items()]
        for what, names in (("missing there", self.missing), ("left over", self.left_over)):
            if names:
                lines.append(f"{what}: {_listed(names)}")
        return lines


def fit(model: Shapes, source: Shapes, *, resize: bool) -> Fit:
    """Match the tensors of a model with those of a source; see `Fit`."""
    found = Fit()
    experts = [n.removesuffix(f"{EXPERTS}gate_up") for n in model if n.endswith("experts.gate_up")]
    found.upcycled = [p for p in experts if f"{p}{DENSE}gate_up.weight" in source]
    used = {f"{p}{DENSE}{name}.weight" for p in found.upcycled for name in ("gate_up", "down")}
    for name, shape in model.items():
        prefix = next((p for p in found.upcycled if name.startswith(p)), None)
        if prefix is not None:
            if name.startswith(f"{prefix}{ROUTER}"):
                found.fresh.append(name)
            elif not name.startswith((f"{prefix}{EXPERTS}", f"{prefix}{SHARED}")):
                found.missing.append(name)
        elif name not in source:
            found.missing += [] if name.endswith(_COUNTS) else [name]
        else:
            used.add(name)
            if source[name] == shape:
                found.same.append(name)
            elif resize and name in _VOCABULARY and source[name][1:] == shape[1:]:
                found.resized.append(name)
            else:
                found.unfit[name] = (source[name], shape)
    found.left_over = [n for n in source if n not in used and not n.endswith(_COUNTS)]
    return found


def require_fit(found: Fit, given: str, *, strict: bool) -> None:
    """Raise UserError for what does not fit; where not strict, only if nothing does."""
    faults = found.faults()
    if faults and (strict or not (found.same or found.upcycled)):
        sizes = [name for name in found.unfit if name in _VOCABULARY]
        hint = (
            "init_from_resize=true takes the rows that both vocabularies have"
            if sizes and len(sizes) == len(found.unfit)
            else "init_from_strict=false starts with fresh weights where none fit"
        )
        raise UserError(
            f"init_from={given}: its weights do not fit this model; {hint}\n  "
            + "\n  ".join(faults[:20])
        )


def _listed(names: Iterable[str], most: int = 6) -> str:
    """Return names with a number in place of the layer, each once."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
