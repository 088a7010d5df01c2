"""Lunaris Codex: compose, train and launch Mixture-of-Experts language models.

From Python: `lunaris.compose`, `lunaris.train`, `lunaris.load`, `lunaris.metrics`, `lunaris.runs`
(`lunaris.api`, docs/python.md). Importing the package imports nothing else.
"""

import importlib
import sys
from types import ModuleType
from typing import Any

__version__ = "0.1.0"
__all__ = ["compose", "load", "metrics", "runs", "train"]


class _Callable(ModuleType):
    """A module of this package that is called like the function of its name in `lunaris.api`."""

    def __call__(self, *args: Any, **keys: Any) -> Any:
        api = importlib.import_module("lunaris.api")
        return getattr(api, self.__name__.rpartition(".")[2])(*args, **keys)


class _Package(ModuleType):
    """This package. `train`, `metrics` and `runs` are modules and functions at once."""

    def __setattr__(self, name: str, value: Any) -> None:
        # Python sets a module as an attribute of its package when it has imported it.
        if name in __all__ and type(value) is ModuleType:
            value.__class__ = _Callable
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name in ("compose", "load"):
            return getattr(importlib.import_module("lunaris.api"), name)
        if name in __all__:
            return importlib.import_module(f"lunaris.{name}")
        raise AttributeError(f"module 'lunaris' has no attribute {name!r}")


sys.modules[__name__].__class__ = _Package
