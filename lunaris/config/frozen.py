"""The `config.yaml` of a run's folder, written resolved and read by every later version."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from lunaris.config.migrations import VERSION, VERSION_KEY, migrate
from lunaris.config.schema.parallelism import AutoConfig
from lunaris.config.schema.root import Config
from lunaris.config.schema.trainer import AUTO
from lunaris.config.trust import check_tree
from lunaris.config.typed import complete_tree, give_schemas, to_config, to_plain
from lunaris.config.validate import check_values
from lunaris.errors import UserError

# Of what every config holds; `launch` is near its end.
_ALWAYS = ("model", "data", "trainer", "launch")


def to_yaml(cfg: Config) -> bytes:
    """Return the content of the file for a config."""
    return OmegaConf.to_yaml(to_tree(cfg)).encode()


def to_tree(cfg: Config) -> dict[str, Any]:
    """Return the content of the file for a config, as dicts, lists and scalars."""
    return {VERSION_KEY: VERSION} | to_plain(cfg)


def read_config(path: Path) -> Config:
    """Return the config in a file of this version or of an older one.

    A key that the file lacks takes its default. Raises UserError for a file that cannot be read, is
    cut off, or holds what today's schemas do not allow.
    """
    try:
        tree: Any = OmegaConf.to_container(OmegaConf.load(path))
    except (OSError, ValueError, YAMLError, OmegaConfBaseException, RecursionError) as error:
        reason = "; ".join(line.strip() for line in str(error).splitlines()[:4])
        raise UserError(f"{path}: cannot be read: {reason}") from error
    return from_tree(tree, path)


def from_tree(tree: Any, path: Path) -> Config:
    """Return the config in the content of a file, which is changed; path: of the file.

    Raises UserError for what is incomplete or not allowed by today's schemas, and for a class that
    is not trusted (`lunaris.config.trust`).
    """
    absent = [key for key in _ALWAYS if not isinstance(tree, dict) or key not in tree]
    if absent:
        raise UserError(f"{path}: is incomplete: it lacks {', '.join(absent)}")
    check_tree(tree, path)
    try:
        cfg = complete_tree(migrate(tree))
        give_schemas(cfg)
        check_values(cfg)
        read = to_config(cfg)
        _check_decided(read)
        return read
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {str(error).splitlines()[0]}") from error


def _check_decided(cfg: Config) -> None:
    """Raise UserError for what `lunaris.config.decide` decides before a file is written."""
    if getattr(cfg.launch, "processes", None) == AUTO:
        raise UserError(f"launch.processes={AUTO}: a run's file holds the number of its processes")
    if isinstance(cfg.parallelism, AutoConfig) and cfg.parallelism.left_open():
        raise UserError("parallelism=auto: a run's file names its parallelism: single, ddp, …")
