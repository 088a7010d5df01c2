"""Names of runs and of sweep points, derived from the overrides alone."""

from __future__ import annotations

import re

# Groups that change where, how fast or how visibly a run trains: they are not part of its name.
_UNNAMED = ("name", "out_dir", "launch", "logger", "checkpoint", "parallelism", "hydra")
_LONGEST = 80


def run_name(overrides: list[str]) -> str:
    """Return the name of the run with these overrides: "default", "moe=top2", …

    The same overrides in another order give the same name, and different ones another. The
    name is made of letters, digits and `._=+,-`, and is at most 80 characters long.
    """
    last = {_key(text): text for text in overrides if not is_unnamed(text)}
    if experiment(overrides) is None:
        last.pop("experiment", None)
    return join_names(sorted(last.values(), key=_order)) or "default"


def sweep_name(overrides: list[str], swept: list[str]) -> str:
    """Return the name of a sweep: the overrides that name a run, and all that are swept."""
    named = [text for text in overrides if text in swept or not is_unnamed(text)]
    return join_names(sorted(named, key=_order)) or "sweep"


def point_name(swept: list[str]) -> str:
    """Return the name of a sweep's point from the overrides that differ between its points."""
    given = [text.partition("=")[2] for text in swept if _key(text) == "name"]
    others = join_names([text for text in swept if _key(text) != "name"])
    return ",".join([*given[-1:], *([others] if others else [])]) or "default"


def unsaid_by(name: str, overrides: list[str]) -> list[str]:
    """Return the overrides that the name of a run does not already hold, in order."""
    held = {*name.split(","), ""}
    return [o for o in overrides if _key(o) != "name" and _safe(o) not in held]


def values_of(overrides: list[str]) -> dict[str, str]:
    """Return the values of overrides by their keys, as text: "+a.b=1" -> {"a.b": "1"}."""
    return {_key(text): text.partition("=")[2] for text in overrides}


def is_unnamed(override: str) -> bool:
    """Return whether a name leaves out the override, like `launch=slurm` or `name=x`."""
    return re.split(r"[./@]", _key(override))[0] in _UNNAMED


def experiment(overrides: list[str]) -> str | None:
    """Return the name of the experiment that `overrides` choose, or None."""
    chosen = [text.partition("=")[2] for text in overrides if _key(text) == "experiment"]
    return chosen[-1] if chosen and chosen[-1] != "null" else None


def join_names(overrides: list[str]) -> str:
    """Return the overrides as one safe name, shortened with a hash where it is too long."""
    parts = [_safe(text) for text in overrides]
    name = ",".join(part for part in parts if part)
    if len(name) <= _LONGEST and not _loses(overrides):
        return name
    import hashlib  # Not at the top: it takes milliseconds, and few names need it.

    digest = hashlib.sha256("\n".join(overrides).encode()).hexdigest()[:8]
    return f"{name[: _LONGEST - 9].rstrip(',=.')}-{digest}"


def _key(override: str) -> str:
    return override.lstrip("+~").partition("=")[0]


def _order(override: str) -> tuple[bool, bool, str]:
    # An experiment first, then the groups, then the keys.
    key = _key(override)
    return key != "experiment", "." in key, override


def _safe(override: str) -> str:
    key, _, value = override.lstrip("+").partition("=")
    key = key.replace("/", ".")
    sign = "-" if value.startswith("-") else ""
    value = re.sub(r"[^A-Za-z0-9._=+-]+", "-", re.sub(r"[\[\]'\"]", "", value)).strip("-")
    value = sign + value
    text = value if key == "experiment" else f"{key}={value}"
    return re.sub(r"[^A-Za-z0-9._=+-]+", "-", text).lstrip("-.")


def _loses(overrides: list[str]) -> bool:
    """Return whether another list of overrides could have the same name."""
    texts = [_key(text).replace("/", ".") + text.partition("=")[2] for text in overrides]
    return any(re.search(r"[^A-Za-z0-9._=+\[\],'\"-]", text) for text in texts)
