"""The copy of the code that a job runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lunaris.launch import snapshot


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small git checkout laid out as ours, with a change, a new file and an ignored one."""
    root = tmp_path / "checkout"
    for name, text in {
        "lunaris/__init__.py": "x = 1\n", "lunaris/gone.py": "", "launch/__init__.py": "",
        "conf/__init__.py": "", "conf/train.yaml": "a: 1\n", ".gitignore": "*.log\n",
        "mine.py": "", "tests/test_x.py": "", "README.md": "",
    }.items():  # fmt: skip
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for command in (["init", "-q"], ["add", "."], ["-c", "user.name=n", "-c", "user.email=e",
                                                   "commit", "-q", "-m", "m"]):  # fmt: skip
        subprocess.run(["git", "-C", str(root), *command], check=True)
    (root / "lunaris/__init__.py").write_text("x = 2\n")
    (root / "lunaris/new.py").write_text("y = 1\n")
    (root / "lunaris/out.log").write_text("")
    (root / "lunaris/gone.py").unlink()
    monkeypatch.setattr(snapshot, "_checkout", lambda: root)
    return root


def test_tracked_and_untracked_files_are_copied_as_installed(
    checkout: Path, tmp_path: Path
) -> None:
    taken = snapshot.take(tmp_path / "code")
    files = {str(p.relative_to(taken.path)) for p in taken.path.rglob("*") if p.is_file()}
    assert files == {
        "lunaris/__init__.py", "lunaris/new.py", "lunaris/conf/__init__.py", "mine.py",
        "lunaris/conf/train.yaml", "lunaris/launch/__init__.py",
    }  # fmt: skip
    assert (taken.path / "lunaris/__init__.py").read_text() == "x = 2\n"


def test_commit_and_difference_are_told(checkout: Path, tmp_path: Path) -> None:
    taken = snapshot.take(tmp_path / "code")
    assert taken.commit is not None and len(taken.commit) == 40
    assert "-x = 1\n+x = 2\n" in taken.diff and "+y = 1" in taken.diff


def test_many_and_large_new_files_are_bounded(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (checkout / "corpus").mkdir()
    for i in range(300):
        (checkout / "corpus" / f"{i}.json").write_text("[1]\n")
    (checkout / "corpus" / "all.json").write_text("word\n" * 100_000)
    (checkout / "lunaris" / "table.json").write_text("row\n" * 50_000)
    started: list[list[str]] = []
    popen = subprocess.Popen

    def counted(command: list[str], **keys: object) -> object:
        started.append(command)
        return popen(command, **keys)  # type: ignore[call-overload]

    monkeypatch.setattr(subprocess, "Popen", counted)
    taken = snapshot.take(tmp_path / "code")
    assert len(started) == 4
    assert "corpus/" not in taken.diff and "word" not in taken.diff
    assert "b/lunaris/table.json\nnew file mode 100644\n(200,000 bytes, not shown)" in taken.diff
    assert "+y = 1" in taken.diff and len(taken.diff) < 5_000


def test_a_long_difference_is_cut(checkout: Path, tmp_path: Path) -> None:
    (checkout / "lunaris/__init__.py").write_text("x = 1\n" * 400_000)
    diff = snapshot.take(tmp_path / "code").diff
    assert diff.endswith("\n(cut: it is longer)\n") and len(diff) < (1 << 20) + 100


def test_the_same_code_is_copied_once_and_other_code_beside_it(
    checkout: Path, tmp_path: Path
) -> None:
    first = snapshot.take(tmp_path / "code").path
    assert snapshot.take(tmp_path / "code").path == first
    (checkout / "conf/train.yaml").write_text("a: 2\n")
    assert snapshot.take(tmp_path / "code").path != first
    assert (first / "lunaris/conf/train.yaml").read_text() == "a: 1\n"


@pytest.mark.slow
def test_a_copy_of_the_installed_package_is_what_python_imports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot, "_checkout", lambda: None)
    path = snapshot.take(tmp_path / "code").path
    code = "import lunaris.launch.slurm, lunaris.conf as c, lunaris.run as r; print(c.__file__, \
r.__file__, lunaris.launch.slurm.__file__)"
    env = {"PYTHONPATH": str(path), "PYTHONSAFEPATH": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(file.startswith(str(path)) for file in done.stdout.split())
