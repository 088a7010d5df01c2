"""The manifest of a sweep: points are added and replaced, and what cannot be read is left out."""

from __future__ import annotations

from pathlib import Path

import pytest

from lunaris.atomic_files import read_json, write_json
from lunaris.config.compose import compose
from lunaris.config.identity import identity
from lunaris.errors import UserError
from lunaris.runs.sweep_manifest import (
    ManifestPoint,
    read_manifest,
    read_points,
    set_removed,
    write_points,
)


def test_a_point_that_is_written_again_keeps_its_place_and_its_job(tmp_path: Path) -> None:
    first = [ManifestPoint(name, [f"seed={name}"], name, identity={"seed": 1}) for name in "ab"]
    write_points(tmp_path / "s", "train", first)
    created = read_manifest(tmp_path / "s").created
    write_points(tmp_path / "s", "train", [ManifestPoint("a", [], "a", "7_0")])
    write_points(tmp_path / "s", "train again", [ManifestPoint("c", [], "c"), first[0]])
    manifest = read_manifest(tmp_path / "s")
    assert (manifest.name, manifest.command, manifest.created) == ("s", "train again", created)
    assert [(p.name, p.job_id) for p in manifest.points] == [("a", "7_0"), ("b", None), ("c", None)]
    assert manifest.points[0].overrides == ["seed=a"]
    assert list(read_json(tmp_path / "s" / "manifest.json")["points"][0]) == [
        "name", "overrides", "dir", "job_id", "identity", "config_version",
    ]  # fmt: skip


def test_a_manifest_of_a_newer_version_is_read(tmp_path: Path) -> None:
    row = {"name": "a", "overrides": [], "dir": "a", "from_tomorrow": 1}
    broken = row | {"config_version": "4"}
    write_json(tmp_path / "manifest.json", {"points": [row, {"name": "b"}, 3, broken]})
    assert read_points(tmp_path) == [ManifestPoint("a", [], "a")]


def test_a_manifest_of_version_3_had_experts_as_wide_as_the_dense_feed_forward(
    tmp_path: Path,
) -> None:
    given = identity(compose(["moe=top2", "model.ffn_hidden_multiplier=3"]))
    write_points(tmp_path, "train", [ManifestPoint("a", [], "a", identity=given)])
    key = "moe.expert_hidden_multiplier"
    found = read_points(tmp_path)
    assert found is not None and found[0].identity[key] is None
    content = read_json(tmp_path / "manifest.json")
    del content["points"][0]["config_version"]
    write_json(tmp_path / "manifest.json", content)
    found = read_points(tmp_path)
    assert found is not None and found[0].identity == given | {key: 3.0}


def test_removed_points_stay_noted_until_a_command_has_them_again(tmp_path: Path) -> None:
    points = [ManifestPoint(name, [], name) for name in "ab"]
    write_points(tmp_path, "train", points)
    assert read_manifest(tmp_path).removed == []
    set_removed(tmp_path, ["b"])
    write_points(tmp_path, "train", points[:1])
    manifest = read_manifest(tmp_path)
    assert (manifest.removed, [p.name for p in manifest.points]) == (["b"], ["a", "b"])
    set_removed(tmp_path, [])
    assert read_manifest(tmp_path).removed == []


def test_a_folder_of_something_else_is_no_sweep(tmp_path: Path) -> None:
    assert read_points(tmp_path) is None
    with pytest.raises(UserError, match="not a sweep's folder"):
        read_manifest(tmp_path)
