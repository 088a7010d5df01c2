from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lunaris.config.identity import identity
from lunaris.config.schema.attention import GQAConfig
from lunaris.config.schema.data import SyntheticDataConfig
from lunaris.config.schema.launch import LocalLaunchConfig
from lunaris.config.schema.logger import LocalLoggerConfig, WandbLoggerConfig
from lunaris.config.schema.moe import NoMoEConfig
from lunaris.config.schema.objective import NextTokenConfig
from lunaris.config.schema.optimizer import AdamWConfig
from lunaris.config.schema.parallelism import SingleConfig
from lunaris.config.schema.root import Config
from lunaris.config.schema.schedule import CosineConfig
from lunaris.config.schema.trainer import TrainerConfig
from lunaris.errors import UserError
from lunaris.runs import create as creation
from lunaris.runs.create import create
from lunaris.runs.run_dir import RunDir


def config(tmp_path: Path, **trainer: int) -> Config:
    return Config(
        name="x",
        out_dir=str(tmp_path / "runs/x"),
        attention=GQAConfig(),
        moe=NoMoEConfig(),
        objective=NextTokenConfig(),
        data=SyntheticDataConfig(),
        parallelism=SingleConfig(),
        optimizer=AdamWConfig(),
        schedule=CosineConfig(),
        trainer=TrainerConfig(
            **{"max_steps": 3, "batch_size": 4, "gradient_accumulation_steps": 2} | trainer
        ),
        logger={"local": LocalLoggerConfig()},
        launch=LocalLaunchConfig(),
    )


def test_a_folder_holds_config_provenance_and_status(tmp_path: Path) -> None:
    run_dir = create(config(tmp_path), "lunaris train", ["a=1"])
    assert run_dir.read_config() == config(tmp_path)
    provenance = json.loads((run_dir.path / "provenance.json").read_text())
    assert provenance["command"] == "lunaris train" and provenance["overrides"] == ["a=1"]
    assert provenance["versions"]["torch"] and provenance["host"]
    assert run_dir.read_status()["state"] == "queued"


def test_what_another_launch_changes_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = create(config(tmp_path), "lunaris train", ["a=1"]).path / "provenance.json"
    first = json.loads(path.read_text())
    create(config(tmp_path), "lunaris train", ["a=1"])
    assert "earlier" not in json.loads(path.read_text())
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    create(config(tmp_path), "lunaris train", ["a=1"])
    now = json.loads(path.read_text())
    assert now["cwd"] == str(tmp_path / "other")
    (earlier,) = now["earlier"]
    assert earlier["cwd"] == first["cwd"] and earlier.keys() == {"cwd", "created"}


def test_another_config_is_refused_with_the_differing_keys(tmp_path: Path) -> None:
    create(config(tmp_path), "", [])
    with pytest.raises(UserError, match=r"trainer.max_steps: 3 → 5") as error:
        create(config(tmp_path, max_steps=5), "", [])
    assert "global_batch" not in str(error.value)
    assert RunDir(tmp_path / "runs/x").read_config().trainer.max_steps == 3


def test_keys_that_do_not_change_the_numbers_may_change(tmp_path: Path) -> None:
    create(config(tmp_path), "", [])
    other = config(tmp_path, batch_size=2)
    other.launch = LocalLaunchConfig(processes=2)
    other.logger["wandb"] = WandbLoggerConfig(project="p")
    assert identity(other) == identity(config(tmp_path))
    create(other, "", [])
    assert RunDir(tmp_path / "runs/x").read_config().launch.world_size() == 2


def test_a_second_job_is_refused_and_a_dead_one_frees_the_folder(tmp_path: Path) -> None:
    run_dir = create(config(tmp_path), "", [])
    hold = (
        "import sys; from lunaris.runs.run_dir import RunDir\n"
        f"with RunDir({str(run_dir.path)!r}).lock():\n"
        "    print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"in use by process {holder.pid}"):
            create(config(tmp_path), "", [])
        holder.kill()
    with run_dir.lock():
        pass


def test_attempts_are_counted_in_the_provenance(tmp_path: Path) -> None:
    run_dir = create(config(tmp_path), "", [])
    assert [run_dir.record_attempt(2), run_dir.record_attempt(4)] == [1, 2]
    run_dir.begin_at(3)
    attempts = json.loads((run_dir.path / "provenance.json").read_text())["attempts"]
    assert [attempt["world_size"] for attempt in attempts] == [2, 4]
    assert [attempt.get("step") for attempt in attempts] == [None, 3]


@pytest.mark.parametrize("text", ["", "a: [", "- 1", "model: {}\ndata: {}\n"])
def test_a_config_that_is_not_whole_is_named(tmp_path: Path, text: str) -> None:
    run_dir = create(config(tmp_path), "lunaris train", [])
    run_dir.config_path.write_text(text)
    with pytest.raises(UserError, match=r"runs/x/config\.yaml: (cannot be read|is incomplete)"):
        run_dir.read_config()


def test_a_folder_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(path: Path, content: bytes) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(creation, "replace_file", refused)
    with pytest.raises(UserError, match="out_dir=.*: cannot be written: Permission denied"):
        create(config(tmp_path), "lunaris train", [])


def test_the_time_of_training_leaves_out_what_lies_between_attempts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir, clock = RunDir(tmp_path), [1000.0]
    monkeypatch.setattr("lunaris.runs.run_dir.time.time", lambda: clock[0])
    assert run_dir.trained_s(active=False) is None
    run_dir.record_attempt(1)
    clock[0] = 1010.0
    assert run_dir.trained_s(active=True) == 10
    run_dir.end_attempt()
    clock[0] = 2000.0
    run_dir.record_attempt(1)  # Killed 5 s later, after a row of metrics.
    run_dir.metrics_path.write_text("")
    os.utime(run_dir.metrics_path, (2005.0, 2005.0))
    assert run_dir.trained_s(active=False) == 15
    clock[0] = 3000.0
    run_dir.record_attempt(1)
    clock[0] = 3001.0
    assert run_dir.trained_s(active=True) == 16


@pytest.mark.parametrize(
    "attempts",
    [[{}], [{"time": "x"}], [{"time": 1.0}, {"time": 2.0, "ended": 3.0}], [{"host": "a"}] * 2],
)
def test_the_time_of_training_is_unknown_where_attempts_are(
    tmp_path: Path, attempts: list[dict[str, object]]
) -> None:
    RunDir(tmp_path).note(attempts=attempts)
    assert RunDir(tmp_path).trained_s(active=False) is None
    assert RunDir(tmp_path).record_attempt(1) == len(attempts) + 1
