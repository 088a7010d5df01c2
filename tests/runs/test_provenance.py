"""The provenance of a run: what it records of the machine and the code."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from lunaris.runs import provenance


def test_the_commit_is_recorded_and_whether_files_differ_from_it(tmp_path: Path) -> None:
    def git(*args: str) -> str:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *args]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    provenance._git.cache_clear()
    assert provenance._git(tmp_path / "none") == {"commit": None, "dirty": None}
    git("init", "-q")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-q", "-m", "x")
    assert provenance._git(tmp_path) == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    provenance._git.cache_clear()
    (tmp_path / "file").write_text("two")
    assert provenance._git(tmp_path)["dirty"] is True
    provenance._git.cache_clear()


def test_the_job_is_recorded_without_the_rest_of_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    monkeypatch.setenv("SLURM_TOKEN", "secret")
    monkeypatch.setenv("MY_ARRAY", "x")
    assert provenance.machine()["slurm"] == {"SLURM_ARRAY_TASK_ID": "2", "SLURM_JOB_ID": "7"}


def test_versions_are_read_once_for_all_points(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    monkeypatch.setattr(provenance.metadata, "version", lambda name: read.append(name) or "1")
    provenance._version.cache_clear()
    assert provenance.collect("x", [])["versions"] == provenance.collect("x", [])["versions"]
    provenance._version.cache_clear()
    assert sorted(read) == sorted(provenance._PACKAGES)
