"""`lunaris fork`: a new run from the frozen config of another."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lunaris.__main__ import main
from lunaris.runs.run_dir import RunDir


def listing(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*"))


@pytest.mark.slow
def test_a_fork_has_the_parent_s_config_but_for_what_is_given(
    finished: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fork", "runs/run", "moe=none", "trainer.max_steps=4", "name=child"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "forked     from runs/run to runs/child"
    assert "           trainer.max_steps: 8 → 4" in said
    child, parent = RunDir("runs/child"), finished.read_config()
    cfg = child.read_config()
    assert (cfg.model, cfg.data, cfg.optimizer) == (parent.model, parent.data, parent.optimizer)
    assert cfg.trainer.max_steps == 4 and cfg.moe._target_.endswith("DenseFactory")
    assert child.read_status()["state"] == "done" and child.noted("overrides")[0] == "moe=none"
    assert main(["runs", "runs"]) == 0
    assert "  child: forked from runs/run" in capsys.readouterr().out
    assert main(["runs", "runs/child", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["parents"] == [{"kind": "forked from", "dir": "runs/run", "step": None}]


def test_the_best_point_of_a_sweep_is_found_and_named(
    finished: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lunaris.continuation.fork import best_point, plan_fork

    rows = []
    for name, loss in (("seed=1", 4.0), ("seed=2", 3.0), ("seed=3", None)):
        point = RunDir(Path("sweeps/s", name))
        point.path.mkdir(parents=True)
        point.config_path.write_bytes(finished.config_path.read_bytes())
        point.write_status(state="done", best_val_loss=loss)
        rows.append({"name": name, "dir": name, "overrides": [name]})
    Path("sweeps/s/manifest.json").write_text(json.dumps({"points": rows}))
    best = best_point(Path("sweeps/s"))
    assert best == Path("sweeps/s/seed=2")
    # Where the best point paused is no end of the fork.
    paused = RunDir(best).config_path
    text = paused.read_text()
    assert "  stop_at: null\n" in text
    paused.write_text(text.replace("  stop_at: null\n", "  stop_at: 3\n"))
    fork = plan_fork(best, ["trainer.max_steps=20"])
    assert fork.cfg.trainer.stop_at is None and "trainer.stop_at" in fork.change.keys
    for prefix in ("", "++"):
        assert plan_fork(best, [f"{prefix}trainer.stop_at=5"]).cfg.trainer.stop_at == 5
    assert fork.cfg.out_dir == "runs/seed=2,trainer.max_steps=20"
    assert fork.cfg.name == "seed=2,trainer.max_steps=20"


def test_bad_forks_write_nothing(finished: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    Path("sweeps/s").mkdir(parents=True)
    Path("sweeps/s/manifest.json").write_text('{"points": []}')
    Path("notes").mkdir()
    before = listing(Path())
    for words, expected in [
        (["nowhere"], "nowhere: not a run's folder"),
        (["notes"], "notes: not a run's folder"),
        (["sweeps/s"], "sweeps/s: not a run's folder; add --best"),
        (["notes", "--best"], "notes: holds no runs and no sweeps"),
        (["runs/run", "name=run"], "name=run: is the run in runs/run itself"),
        (["runs/run", "moe.n_expert=3"], "did you mean moe.n_experts?"),
        (["runs/run", "moe.n_experts=0"], "moe.n_experts=0: must be at least 1"),
        (["runs/run", "experiment=smoke"], "experiment=smoke: goes with `lunaris train`"),
        (["runs/run", "--wights"], "--wights"),
    ]:
        try:
            code = main(["fork", *words])
        except SystemExit as error:  # of argparse
            code = int(error.code or 0)
        assert code == 2 and expected in capsys.readouterr().err, words
    assert listing(Path()) == before
