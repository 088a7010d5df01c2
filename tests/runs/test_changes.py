"""`changes.jsonl`: what changed in a run's config, and from which step on."""

from __future__ import annotations

from pathlib import Path

from lunaris.runs.changes import (
    NAME,
    Change,
    begin_changes_at,
    changed_keys,
    read_changes,
    record_change,
    since,
)


def change(step: int, data: dict[str, str] | None = None, **keys: tuple[int, int]) -> Change:
    pairs = {key: {"old": old, "new": new} for key, (old, new) in keys.items()}
    return Change(step, pairs, {"at": step, **{k: v[1] for k, v in keys.items()}}, "command", data)


def keys(folder: Path) -> list[tuple[int, dict[str, object]]]:
    return [(c.step, {k: (row["old"], row["new"]) for k, row in c.keys.items()})
            for c in read_changes(folder)]  # fmt: skip


def test_changes_are_read_as_they_were_recorded(tmp_path: Path) -> None:
    first, second = change(5, a=(1, 2)), change(9, {"x": "1"}, b=(1, 2))
    record_change(tmp_path, first)
    record_change(tmp_path, second)
    assert read_changes(tmp_path) == [first, second]
    assert since(read_changes(tmp_path), 6) == [second]


def test_changes_of_one_step_become_one(tmp_path: Path) -> None:
    record_change(tmp_path, change(5, {"x": "1"}, a=(1, 2), b=(1, 2)))
    record_change(tmp_path, change(5, a=(2, 3), b=(2, 1)))
    assert keys(tmp_path) == [(5, {"a": (1, 3)})]
    (row,) = read_changes(tmp_path)
    assert row.config["a"] == 3 and row.data == {"x": "1"}
    record_change(tmp_path, change(5, a=(3, 1)))
    assert keys(tmp_path) == []


def test_a_run_that_goes_back_takes_its_changes_along(tmp_path: Path) -> None:
    for row in (change(5, a=(1, 2)), change(9, a=(2, 3)), change(12, b=(1, 2))):
        record_change(tmp_path, row)
    begin_changes_at(tmp_path, 12)
    assert [step for step, _ in keys(tmp_path)] == [5, 9, 12]
    begin_changes_at(tmp_path, 7)
    assert keys(tmp_path) == [(5, {"a": (1, 2)}), (7, {"a": (2, 3), "b": (1, 2)})]
    begin_changes_at(tmp_path, 0)
    assert keys(tmp_path) == [(0, {"a": (1, 3), "b": (1, 2)})]


def test_a_row_that_cannot_be_read_is_left_out_and_kept(tmp_path: Path) -> None:
    record_change(tmp_path, change(5, a=(1, 2)))
    path = tmp_path / NAME
    damaged = path.read_text() + "{\n[]\n"
    path.write_text(damaged)
    assert keys(tmp_path) == [(5, {"a": (1, 2)})]
    record_change(tmp_path, change(6, b=(1, 2)))
    assert [step for step, _ in keys(tmp_path)] == [5, 6]
    assert (tmp_path / f"{NAME}.damaged").read_text() == damaged
    assert "{\n" not in path.read_text()


def test_of_a_replaced_class_only_its_path_is_shown() -> None:
    old = {"schedule._target_": "a.Cosine", "schedule.min_lr_ratio": 0.1, "n": 1}
    new = {"schedule._target_": "a.WSD", "schedule.decay_fraction": 0.2, "n": 2}
    found = Change(1, changed_keys(old, new), {}, "")
    assert set(found.keys) == set(old) | set(new)
    assert str(found) == "schedule._target_: a.Cosine → a.WSD, n: 1 → 2"
