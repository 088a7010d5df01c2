"""Which files of custom classes go into the copy of the code."""

from __future__ import annotations

from pathlib import Path

import pytest

from lunaris.launch import snapshot
from lunaris.launch.own_code import own_files


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of modules on the path; `used` is imported by what a config names."""
    root = tmp_path / "modules"
    for name, text in {
        "own_part.py": "import numpy, os\nfrom own_helper.deep import x\n",
        "own_helper/__init__.py": "import own_last\n", "own_helper/deep.py": "from . import y\n",
        "own_helper/table.json": "{}", "own_helper/weights.bin": "", "own_last.py": "x = (",
        "unused.py": "", "own_space/inner.py": "", "numpy.txt": "",
    }.items():  # fmt: skip
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    monkeypatch.syspath_prepend(str(root))
    return root


def test_a_module_comes_with_what_it_imports_from_its_folder(folder: Path) -> None:
    found = own_files(["own_part.Router", "own_part.schema.Keys"], (".py", ".json"))
    assert found == {
        name: folder / name
        for name in (
            "own_part.py", "own_helper/__init__.py", "own_helper/deep.py", "own_helper/table.json",
            "own_last.py",
        )
    }  # fmt: skip
    # A folder without __init__.py is a package too.
    assert list(own_files(["own_space.inner.Part"], (".py",))) == ["own_space/inner.py"]


@pytest.mark.parametrize("target", ["torch.optim.SGD", "json.loads", "sys.path", "no_such.Part"])
def test_what_is_installed_or_absent_is_left_out(folder: Path, target: str) -> None:
    assert own_files([target], (".py",)) == {}


def test_the_copy_holds_them_and_is_another_when_they_change(folder: Path, tmp_path: Path) -> None:
    first = snapshot.take(tmp_path / "code", ["own_part.Router", "lunaris.moe.factory.MoEFactory"])
    assert (first.path / "own_helper" / "deep.py").is_file()
    assert (first.path / "lunaris" / "__init__.py").is_file()
    assert snapshot.take(tmp_path / "code", ["own_part.Router"]).path == first.path
    (folder / "own_last.py").write_text("x = 1")
    assert snapshot.take(tmp_path / "code", ["own_part.Router"]).path != first.path
