from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lunaris.commands.evaluate import main
from lunaris.errors import UserError
from lunaris.metrics.records import read_rows
from lunaris.runs.run_dir import RunDir


@pytest.mark.slow
def test_the_loss_of_the_last_checkpoint_is_the_one_that_training_saw(
    tiny: Callable[..., Any],
    run_here: Callable[[Any], RunDir],
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_dir = run_here(tiny("trainer.eval_steps=null"))
    rows = {
        row["step"]: row["val/loss"]
        for row in read_rows(run_dir.metrics_path)
        if row["step"] % 4 == 0
    }
    capsys.readouterr()
    for step, flags in ((8, []), (4, ["--step", "4"])):
        assert main([str(run_dir.path), "--json", *flags]) == 0
        result = json.loads(capsys.readouterr().out)
        assert result["step"] == step
        assert result["val/loss"] == pytest.approx(rows[step], rel=1e-6)


def test_any_folder_of_shards(
    finished: RunDir,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "shards").mkdir()
    np.save(tmp_path / "shards/a.npy", np.arange(2000, dtype=np.uint16) % 64)
    assert main([str(finished.path), f"data.dir={tmp_path}/shards", "trainer.batch_size=3"]) == 0
    assert "val/perplexity" in capsys.readouterr().out


def test_an_id_outside_the_vocabulary_is_named(
    finished: RunDir,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lunaris.data.shard_folder._SCAN_BYTES", 2)  # sees the first id only
    Path("a").mkdir()
    np.save("a/all.npy", np.array([1] * 50 + [64] + [1] * 50, np.uint16))
    with pytest.raises(UserError, match="holds the id 64, outside the vocabulary of 64"):
        main([str(finished.path), "data.dir=a"])


def test_several_folders_are_told_apart(
    finished: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, step in (("a", 1), ("b", 7)):
        Path(name).mkdir()
        np.save(Path(name) / "all.npy", (np.arange(2000) * step % 64).astype(np.uint16))
    losses = {}
    for folders in ("[a,b]", "a", "b"):
        capsys.readouterr()
        assert main([str(finished.path), f"data.dir={folders}", "--json"]) == 0
        losses[folders] = json.loads(capsys.readouterr().out)
    assert losses["[a,b]"]["val/a/loss"] == pytest.approx(losses["a"]["val/loss"], rel=1e-6)
    assert losses["[a,b]"]["val/b/loss"] == pytest.approx(losses["b"]["val/loss"], rel=1e-6)


def test_of_a_few_sequences_each_source_counts_by_its_length(
    finished: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, step, tokens in (("a", 1, 170), ("b", 7, 50)):
        Path(name).mkdir()
        np.save(Path(name) / "val.npy", (np.arange(tokens) * step % 64).astype(np.uint16))
    capsys.readouterr()
    folders = ["data.dir=[a,b]", "--max-sequences", "2", "--json"]
    assert main([str(finished.path), *folders]) == 0
    row = json.loads(capsys.readouterr().out)
    length = finished.read_config().model.max_seq_len
    a, b = ((tokens - 1) // length for tokens in (170, 50))
    assert a > b >= 2
    expected = (a * row["val/a/loss"] + b * row["val/b/loss"]) / (a + b)
    assert row["val/loss"] == pytest.approx(expected, rel=1e-6)
    assert abs(row["val/a/loss"] - row["val/b/loss"]) > 1e-3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data.dirs=x"], "did you mean data.dir"),
        (["trainer.batch_size=0"], "trainer.batch_size=0: must be at least 1"),
        (["trainer.batch_size=many"], "trainer.batch_size=many: must be an integer"),
        (["data.dir=${nope}"], "must be a folder, or a list of folders"),
        (["data.dir=???"], "must be a folder, or a list of folders"),
        (["--max-sequences", "0"], "--max-sequences 0: must be at least 1"),
        (["--step", "3"], "no checkpoint of step 3; its checkpoint steps: 8, 4"),
    ],
)
def test_bad_input_is_one_message(finished: RunDir, arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        main([str(finished.path), *arguments])


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a run's folder"):
        main([str(tmp_path)])


def test_json_has_no_nan(
    finished: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"run": "x", "step": 8, "val/loss": float("nan")}]
    monkeypatch.setattr("lunaris.commands.evaluate._validate", lambda runs, args: rows)
    assert main([str(finished.path), "--json"]) == 0
    assert capsys.readouterr().out == '{"step": 8, "val/loss": null}\n'
