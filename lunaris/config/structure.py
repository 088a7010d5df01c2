"""Checks of a composed config against its schemas: keys, missing values, interpolations, ranges."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from lunaris.config.keys import schema_keys, schema_of_target
from lunaris.config.messages import explain, no_such_key
from lunaris.config.schema.root import SCHEMAS, Config
from lunaris.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec

    from omegaconf import DictConfig

_OURS = "lunaris."
# By which a module may come by names that its source does not spell.
_MADE_AT_IMPORT = r"import\s*\*|__getattr__|(globals|locals|vars|setattr|exec)\(|sys\.modules"
_EXAMPLES = {"dir": "FOLDER", "files": "'[corpus/*.jsonl]'", "datasets": "OWNER/NAME"}


def check_structure(cfg: DictConfig) -> None:
    """Raise UserError for an unknown key, a missing value, an interpolation or a value's range."""
    check_keys(cfg)
    _check_values(cfg)
    for group in SCHEMAS:
        # Reaches the schema's __post_init__, which raises UserError itself.
        OmegaConf.to_object(cfg[group])
    Config(name=cfg.name, seed=cfg.seed, out_dir=cfg.out_dir)


def check_keys(cfg: DictConfig) -> None:
    """Raise UserError for a key that no schema has; give its schema to a group without one.

    A group whose `_target_` is a class of the person's own may have any keys.
    """
    for key in cfg:
        if key not in schema_keys(Config):
            raise UserError(no_such_key(str(key), schema_keys(Config)))
    for group in SCHEMAS:
        _give_schema(cfg, group)
        _check_keys(cfg, group)


def is_ours(cfg: DictConfig, group: str) -> bool:
    """Say whether the group's class is one of this package, or the group has none."""
    return str(cfg[group].get("_target_", _OURS)).startswith(_OURS)


def _give_schema(cfg: DictConfig, group: str) -> None:
    """Type a group that an option file without a schema filled, by its `_target_`."""
    node: Any = None if OmegaConf.is_missing(cfg, group) else cfg[group]
    if not OmegaConf.is_dict(node):
        raise UserError(f"{group}: no option is chosen; allowed are {', '.join(SCHEMAS[group])}")
    schemas = dict.fromkeys(SCHEMAS[group].values())
    if not any("_target_" in schema_keys(schema) for schema in schemas):
        return
    target = "" if OmegaConf.is_missing(node, "_target_") else str(node.get("_target_") or "")
    if "." not in target:
        raise UserError(f"{group}._target_={target}: must be the dotted path of a class")
    if not target.startswith(_OURS):
        _check_module(group, target)
        return
    schema = schema_of_target(group, target)
    if schema is None:
        known = [str(getattr(s, "_target_", "")) for s in schemas]
        raise UserError(
            f"{group}._target_={target}: not a class for {group}; allowed are "
            f"{', '.join(known)}, or a class of your own{did_you_mean(target, known)}"
        )
    if OmegaConf.get_type(node) is schema:
        return
    if OmegaConf.get_type(node) is not dict:
        option = next(name for name, its in SCHEMAS[group].items() if its is schema)
        raise UserError(f"{group}._target_={target}: choose it by {group}={option}")
    try:
        typed = OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.to_container(node))
    except OmegaConfBaseException as error:
        raise UserError(f"{group}: {explain(error)}") from error
    with open_dict(cfg):
        cfg[group] = typed


def _check_module(group: str, target: str) -> None:
    """Find the module of a class of the person's own, and the class's name, without running it."""
    key = f"{group}._target_={target}"
    module, _, name = target.rpartition(".")
    while module:
        try:
            spec = importlib.util.find_spec(module)
        except (ImportError, ValueError):
            spec = None
        except Exception as error:  # Its package's own code ran.
            reason = f"{type(error).__name__}: {error}"
            raise UserError(f"{key}: cannot be imported: {reason}") from error
        if spec is not None:
            return _check_name(key, name, spec)
        # A class within a class: the module is further up. An absent module ends at "".
        module, _, name = module.rpartition(".")
        if not name[:1].isupper():
            break
    raise UserError(f"{key}: no such module on the Python path")


def _check_name(key: str, name: str, spec: ModuleSpec) -> None:
    """Raise UserError when a module's source shows that it has no such name."""
    try:
        source = Path(spec.origin or "").read_text()
        tree = ast.parse(source)
    except (OSError, ValueError, SyntaxError):
        return  # Compiled, or broken in a way that its import tells better.
    if re.search(rf"\b{re.escape(name)}\b|{_MADE_AT_IMPORT}", source):
        return
    kinds = (ast.ClassDef, ast.FunctionDef)
    near = did_you_mean(name, [node.name for node in tree.body if isinstance(node, kinds)])
    raise UserError(f"{key}: {spec.origin} has no {name}{near}")


def _check_keys(cfg: DictConfig, group: str) -> None:
    schema = OmegaConf.get_type(cfg[group]) or dict
    if schema is dict or not is_ours(cfg, group):
        return
    known = schema_keys(schema)
    for key in cfg[group]:
        if key not in known:
            raise UserError(no_such_key(f"{group}.{key}", [f"{group}.{name}" for name in known]))


def check_interpolations(cfg: DictConfig) -> None:
    """Raise UserError for an interpolation that leads nowhere; a value may be missing."""
    _check_values(cfg, missing=True)


def _check_values(node: Any, path: str = "", *, missing: bool = False) -> None:
    """Raise UserError for an interpolation that leads nowhere, and for a missing value.

    missing: values may be.
    """
    listed = OmegaConf.is_list(node)
    for key in range(len(node)) if listed else list(node):
        here = f"{path}[{key}]" if listed else f"{path}.{key}".lstrip(".")
        if OmegaConf.is_missing(node, key):
            if missing:
                continue
            example = _EXAMPLES.get(here.rpartition(".")[2], "VALUE")
            raise UserError(f"{here}: must be given, it has no default; write {here}={example}")
        if OmegaConf.is_interpolation(node, key):
            raw: Any = OmegaConf.to_container(node, resolve=False)
            try:
                node[key]
            except OmegaConfBaseException as error:
                reason = str(error).splitlines()[0]
                raise UserError(f"{here}={raw[key]}: cannot be resolved: {reason}") from error
        elif OmegaConf.is_config(node[key]):
            _check_values(node[key], here, missing=missing)
        elif isinstance(node[key], int) and abs(node[key]) >= 2**63:
            raise UserError(f"{here}={node[key]}: must be below 2**63")
