"""Where `lunaris check` finds that compiled kernels cannot lie, or lie badly."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lunaris.check import temporary
from lunaris.check.item import FAIL, OK
from lunaris.check.temporary import temporary_item

PLACES = ("TMPDIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.delenv("TMPDIR", raising=False)
    for name in PLACES[1:]:
        monkeypatch.setenv(name, str(tmp_path / name))
    return tmp_path


def test_folders_of_this_machine_are_fit(places: Path, tiny: Callable[..., Any]) -> None:
    item = temporary_item(tiny())
    assert item.state == OK and not item.advice and set(item.figures) == set(PLACES)


def test_a_network_file_system_is_advised_against(
    places: Path, tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cache = tmp_path / "with space"
    cache.mkdir()
    written = str(cache).replace(" ", "\\040")
    mounts = tmp_path / "mounts"
    mounts.write_text(f"/dev/a / ext4 rw 0 0\nserver:/x {written} nfs4 rw 0 0\n")
    monkeypatch.setattr(temporary, "_MOUNTS", mounts)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(cache / "not" / "yet"))
    item = temporary_item(tiny())
    assert item.state == OK and item.figures["TRITON_CACHE_DIR"]["network"]
    assert [text[:30] for text in item.advice] == ["export TRITON_CACHE_DIR=/FOLDER"[:30]]
    assert item.figures["TMPDIR"]["file_system"] == "ext4"


def test_what_cannot_be_written_or_executed_fails_where_it_is_needed(
    places: Path, tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (places / "file").touch()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(places / "file" / "cache"))
    item = temporary_item(tiny())
    assert item.state == OK and item.advice[0].startswith("export TRITON_CACHE_DIR=")
    assert temporary_item(tiny("trainer.compile_model=true")).state == FAIL
    monkeypatch.setattr(os, "access", lambda path, how: False)
    assert "TMPDIR" in temporary_item(tiny()).text and temporary_item(tiny()).state == FAIL


def test_a_folder_without_execution_fails_for_caches_that_are_needed_only(
    places: Path, tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = {str(places): os.ST_NOEXEC}
    for name in PLACES[1:]:
        (places / name).mkdir()
    monkeypatch.setattr(
        os, "statvfs", lambda path: type("Flags", (), {"f_flag": flags.get(str(path), 0)})
    )
    item = temporary_item(tiny("trainer.compile_model=true"))
    (text,) = item.advice
    assert item.state == OK and text.startswith("export TMPDIR=/FOLDER") and "noexec" in text
    flags[str(places / "TRITON_CACHE_DIR")] = os.ST_NOEXEC
    item = temporary_item(tiny("trainer.compile_model=true"))
    assert item.state == FAIL and "TRITON_CACHE_DIR" in item.text and "noexec" in item.text
    assert temporary_item(tiny()).state == OK


def test_a_folder_that_python_did_not_take_is_named(
    places: Path, tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", f"{places}/")
    assert not temporary_item(tiny()).advice
    monkeypatch.setenv("TMPDIR", "/not/there")
    item = temporary_item(tiny())
    (text,) = item.advice
    assert item.state == OK and text.endswith(f"/not/there cannot, and {places} is taken instead")


def test_a_user_without_a_name_and_folders_that_may_not_be_searched_are_no_error(
    places: Path, tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = tiny()

    def unknown() -> str:
        raise KeyError("getpwuid(): uid not found")

    def closed(self: Path) -> bool:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("getpass.getuser", unknown)
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    # As Path.exists of Python 3.11 does; root, who may run this, may search every folder.
    monkeypatch.setattr(Path, "exists", closed)
    item = temporary_item(cfg)
    folder = item.figures["TORCHINDUCTOR_CACHE_DIR"]["folder"]
    assert item.state == OK and folder == str(places / f"torchinductor_uid_{os.getuid()}")
