"""The archive of old run folders, unpacked, and the scripts that wrote the golden files."""

from __future__ import annotations

import importlib.util
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

_HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def script() -> Callable[[str], ModuleType]:
    """Return a function that loads a script of this folder by its name."""

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"golden_{name}", _HERE / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def _unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs_v1")
    with tarfile.open(_HERE / "runs_v1.tar.xz") as tar:
        tar.extractall(folder, filter="data")
    return folder


@pytest.fixture
def old(_unpacked: Path, tmp_path: Path) -> Path:
    """Copy the old shards, runs and sweep into the test's folder, which is the current one."""
    shutil.copytree(_unpacked, tmp_path, dirs_exist_ok=True)
    return tmp_path
