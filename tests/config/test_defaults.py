"""The defaults of a person or a site: where they are found, what they win over, what they say."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lunaris.__main__ import main
from lunaris.config.compose import Composer, Source, compose
from lunaris.config.defaults import user_folder
from lunaris.errors import UserError
from lunaris.launch.local import Local
from lunaris.launch.sweep import run_points
from lunaris.launch.sweep.points import Outcome, Point
from lunaris.runs.run_dir import RunDir

Write = Callable[..., Path]
SITE = "launch: {partition: gpu, account: me}\n"


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Return a function that writes a file of the folder of defaults."""
    folder = tmp_path / "my [site]"
    folder.mkdir()
    monkeypatch.setenv("LUNARIS_CONFIG_DIR", str(folder))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def put(text: str, name: str = "defaults.yaml") -> Path:
        file = folder / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
        return file

    return put


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Let no run start; return the folders of those that would have."""
    paths: list[Path] = []

    def start(self: Local, path: Path) -> int:
        paths.append(path)
        return 0

    def run(points: list[Point], progress: Any, *, more_follows: bool = False) -> list[Outcome]:
        paths.extend(point.dir for point in points)
        return [Outcome(point, "done") for point in points]

    monkeypatch.setattr(Local, "start", start)
    monkeypatch.setattr(run_points, "run_points", run)
    return paths


def test_where_the_folder_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LUNARIS_CONFIG_DIR")
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_folder() is None
    for folder in (".config/lunaris", "xdg/lunaris", "mine"):
        (tmp_path / folder).mkdir(parents=True)
    assert user_folder() == tmp_path / ".config/lunaris"
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    assert user_folder() == tmp_path / "xdg/lunaris"
    monkeypatch.setenv("LUNARIS_CONFIG_DIR", "~/mine")
    assert user_folder() == tmp_path / "mine"
    monkeypatch.setenv("LUNARIS_CONFIG_DIR", "")
    assert user_folder() is None


def test_a_folder_that_is_named_and_absent_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LUNARIS_CONFIG_DIR", "nowhere")
    assert main(["plan"]) == 2
    assert "error: LUNARIS_CONFIG_DIR=nowhere: no such folder" in capsys.readouterr().err


def test_keys_count_where_the_chosen_option_has_them(write: Write) -> None:
    write(SITE + "launch.additional_parameters.reservation: r1\nlogger: {wandb: {project: p}}\n")
    assert compose(["data=synthetic"]) == Composer(with_defaults=False).compose(["data=synthetic"])
    launch: Any = compose(["launch=slurm", "launch.account=you"]).launch
    assert (launch.partition, launch.account) == ("gpu", "you")
    assert launch.additional_parameters == {"reservation": "r1"}
    assert compose(["launch=slurm", "launch.additional_parameters.qos=x"]).launch != launch
    raw: Any = Composer().compose_raw(["logger=[local,wandb]"])
    assert raw.logger.wandb.project == "p"


@pytest.mark.parametrize(
    ("overrides", "steps", "interval", "clip"),
    [
        # Over the options, below an experiment, and below the command line.
        ([], 77, 3, 0.5),
        (["trainer.max_steps=5", "schedule.warmup_steps=1"], 5, 3, 0.5),
        (["experiment=smoke"], 10, 2, 0.5),
        (["experiment=smoke", "trainer.max_steps=5", "trainer.grad_clip=2"], 5, 2, 2.0),
    ],
)
def test_precedence(
    write: Write, overrides: list[str], steps: int, interval: int, clip: float
) -> None:
    write("trainer: {max_steps: 7.7e1, log_interval: 3, grad_clip: 0.5}\n")
    trainer = compose(["data=synthetic", *overrides]).trainer
    assert (trainer.max_steps, trainer.log_interval, trainer.grad_clip) == (steps, interval, clip)


def test_an_experiment_s_value_wins_where_it_is_that_of_the_option_too(write: Write) -> None:
    write("# @package _global_\ntrainer: {max_steps: 600}\n", "experiment/same.yaml")
    assert compose(["data=synthetic"]).trainer.max_steps == 600
    write("trainer: {max_steps: 5}\nschedule: {warmup_steps: 1}\n")
    assert compose(["data=synthetic"]).trainer.max_steps == 5
    assert compose(["data=synthetic", "experiment=same"]).trainer.max_steps == 600


def test_an_option_may_be_a_default(write: Write) -> None:
    write("moe: fine_grained\nlaunch: slurm\nlaunch.partition: gpu\ndata: stdlib\n")
    composer = Composer()
    cfg: Any = composer.compose(["model=tiny"])
    assert cfg.moe.n_experts_per_token == 4 and cfg.launch.partition == "gpu"
    assert composer.applied([]) == {
        "moe": "fine_grained",
        "launch": "slurm",
        "launch.partition": "gpu",
    }
    # The experiment has its data, and the command line the last word.
    cfg = composer.compose(["experiment=smoke", "moe=none", "launch=local"])
    assert cfg.data._target_.endswith("SyntheticData") and cfg.moe._target_.endswith("DenseFactory")
    assert composer.applied(["experiment=smoke", "moe=none", "launch=local"]) == {}


def test_the_folder_s_options_can_be_chosen(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write("defaults: [slurm]\npartition: site\nmem_gb: 3\n", "launch/mysite.yaml")
    write("launch: {mem_gb: 8}\n")
    launch: Any = compose(["launch=mysite"]).launch
    assert (launch.partition, launch.mem_gb) == ("site", 8)
    assert main(["train", "--help"]) == 0
    assert "mysite" in capsys.readouterr().out
    assert main(["train", "launch=mysit"]) == 2
    assert "did you mean mysite?" in capsys.readouterr().err
    # A folder that the command names comes before.
    other = tmp_path / "other/launch"
    other.mkdir(parents=True)
    (other / "mysite.yaml").write_text("defaults: [slurm]\npartition: other\n")
    named: Any = compose(["launch=mysite"], source=Source(dir=str(other.parent))).launch
    assert named.partition == "other"
    # What Hydra is told to search comes last, and is searched next to the others.
    third = tmp_path / "third/launch"
    third.mkdir(parents=True)
    (third / "mysite.yaml").write_text("defaults: [slurm]\npartition: third\n")
    (third / "more.yaml").write_text("defaults: [slurm]\npartition: more\n")
    for option, partition in (("mysite", "other"), ("more", "more")):
        searched = [f"hydra.searchpath=[file://{third.parent}]", f"launch={option}"]
        found: Any = compose(searched, source=Source(dir=str(other.parent))).launch
        assert found.partition == partition


def test_keys_of_a_custom_option_need_no_schema(write: Write) -> None:
    write("_target_: torch.optim.SGD\nlr: 0.5\n", "optimizer/sgd.yaml")
    write("optimizer: {lr: 0.25}\n")
    assert compose(["optimizer=sgd"]).optimizer.lr == 0.25  # type: ignore[attr-defined]
    assert compose([]).optimizer == Composer(with_defaults=False).compose([]).optimizer


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("launch: {partitoin: x}", [], "launch.partitoin: no such key; did you mean launch.parti"),
        ("lunch: {x: 1}", [], "lunch: no such key or group; did you mean launch?"),
        ("seed.x: 1", [], "seed.x: seed is a value"),
        ("trainer: {max_steps: many}", [], "trainer.max_steps=many: must be a whole number"),
        ("trainer: {compile_model: 1}", [], "trainer.compile_model=1: must be true or false"),
        ("launch: {timeout_min: 0}", [], "launch.timeout_min=0: must be at least 1"),
        ("launch: {cluster: here}", [], "launch.cluster=here: allowed are slurm, local"),
        ("launch: slum", [], "launch=slum: no such option; allowed are local, slurm"),
        ("moe: {router: sigmoid}", [], "moe.router=sigmoid: must be "),
        ("logger: {wand: {project: x}}", [], "logger.wand: no such key; did you mean logger.wandb"),
        ("logger: {wandb: {projct: x}}", [], "logger.wandb.projct: no such key; did you mean"),
        ("trainer: 3", [], "trainer=3: must be"),
        ("seed: [1", [], "cannot be read: "),
        ("- a", [], "must be a map of keys"),
        ("experiment: smoke", [], "experiment=smoke: cannot be a default"),
        ("name: x", [], "name=x: cannot be a default"),
        ("hydra: {run: {dir: x}}", [], "hydra: no such key or group"),
    ],
)
def test_a_wrong_file_is_one_error_that_names_it(
    write: Write,
    started: list[Path],
    capsys: pytest.CaptureFixture[str],
    text: str,
    overrides: list[str],
    message: str,
) -> None:
    file = write(text)
    assert main(["train", "data=synthetic", *overrides]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {file}: {message}") and "Traceback" not in said
    assert said.count("error:") == 1 and not os.listdir()


@pytest.mark.parametrize(
    ("text", "overrides", "message", "named"),
    [
        (
            "launch: {conda: a, venv: b}",
            ["launch=slurm"],
            "launch.conda=a: only one of",
            "launch.conda, launch.venv are",
        ),
        ("model: {n_heads: 3}", [], "model.d_model=128: must be divisible", "model.n_heads is"),
    ],
)
def test_a_conflict_that_it_causes_names_the_file(
    write: Write,
    started: list[Path],
    capsys: pytest.CaptureFixture[str],
    text: str,
    overrides: list[str],
    message: str,
    named: str,
) -> None:
    file = write(text)
    assert main(["train", "data=synthetic", *overrides]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {message}") and said.endswith(f"{named} set by {file}\n")
    assert not os.listdir()


def test_an_error_of_the_command_line_does_not_name_the_file(
    write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    write("trainer: {max_steps: 50}\nschedule: {warmup_steps: 1}\n")
    assert main(["train", "data=synthetic", "trainer.max_steps=0"]) == 2
    assert capsys.readouterr().err.startswith("error: trainer.max_steps=0: must be ")


def test_commands_say_what_it_changed_and_only_that(
    write: Write,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(SITE)
    line = "defaults   ~/my [site]/defaults.yaml: launch.partition=gpu,"
    slurm = ["launch=slurm", "data=synthetic"]
    assert main(["plan", "--json", *slurm]) == 0
    shown = capsys.readouterr()
    assert shown.err.startswith(line) and "launch.account=me" in shown.err
    assert json.loads(shown.out)["processes"] == 1
    assert main(["plan", "-m", *slurm, "seed=1,2", "launch.account=you"]) == 0
    said = capsys.readouterr().err
    assert said.count("defaults   ") == 1 and "account" not in said
    assert main(["plan", "data=synthetic"]) == 0
    assert "defaults" not in capsys.readouterr().err
    assert main(["train", "-m", *slurm, "seed=1,2", "--dry-run"]) == 0
    assert capsys.readouterr().err.startswith(line)
    assert main(["train", "--cfg", "job", "-p", "launch", *slurm]) == 0
    assert "partition: gpu" in capsys.readouterr().out
    assert not os.listdir()


def test_info_shows_it_as_a_part_of_the_config(
    write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(SITE)
    assert main(["train", "--info", "defaults", "launch=slurm"]) == 0
    shown = capsys.readouterr()
    assert "user/defaults" in shown.out and "launch.partition=gpu" in shown.err
    assert main(["train", "--info", "config", "launch=slurm"]) == 0
    assert "partition: gpu" in capsys.readouterr().out
    assert main(["train", "--info", "searchpath"]) == 0
    assert str(file.parent) in capsys.readouterr().out


def test_prepare_takes_its_keys(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.txt").write_text("one two three " * 400)
    write("data: {shard_tokens: 500}\ntrainer: {max_steps: 5}\n")
    assert main(["prepare", "data=text", "data.files=a.txt", "data.dir=out"]) == 0
    shown = capsys.readouterr()
    assert "3 shards of uint16" in shown.out
    assert "data.shard_tokens=500" in shown.err and "max_steps" not in shown.err
    write(SITE)
    slurm = ["launch=slurm", "launch.dry_run=true"]
    assert main(["prepare", "data=text", "data.files=a.txt", "data.dir=sent", *slurm]) == 0
    shown = capsys.readouterr()
    assert "#SBATCH --partition=gpu" in shown.out and "launch.partition=gpu" in shown.err


def test_a_run_records_it_and_is_refused_or_continued_as_if_it_had_been_given(
    write: Write, started: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    file = write("optimizer: {learning_rate: 0.5}\nlaunch: {max_restarts: 2, partition: gpu}\n")
    argv = ["train", "data=synthetic", "name=x"]
    assert main(argv) == 0
    run_dir = RunDir("runs/x")
    assert run_dir.read_config().optimizer.learning_rate == 0.5  # type: ignore[attr-defined]
    keys = {"optimizer.learning_rate": 0.5, "launch.max_restarts": 2}
    recorded = {"file": str(file), "keys": keys}
    assert run_dir.noted("defaults") == recorded

    # Another value of a key that decides the numbers, and of one that does not.
    write("optimizer: {learning_rate: 0.25}\n")
    capsys.readouterr()
    assert main(argv) == 2
    said = capsys.readouterr().err
    assert "optimizer.learning_rate: 0.5 → 0.25" in said and "lunaris resume" in said
    frozen = run_dir.config_path.read_bytes()
    run_dir.write_status(state="stopped")
    write("optimizer: {learning_rate: 0.25}\nlaunch: {max_restarts: 7}\n")
    assert main(["resume", str(run_dir.path)]) == 0
    assert run_dir.config_path.read_bytes() == frozen
    assert run_dir.noted("defaults") == recorded
    assert main([*argv, "optimizer.learning_rate=0.5"]) == 0
    assert run_dir.read_config().launch.max_restarts == 7  # type: ignore[attr-defined]
    assert run_dir.noted("defaults")["keys"] == {"launch.max_restarts": 7}
    assert started == [run_dir.path] * 3


def test_a_broken_file_does_not_keep_a_run_from_going_on(write: Write, started: list[Path]) -> None:
    assert main(["train", "data=synthetic", "name=x"]) == 0
    RunDir("runs/x").write_status(state="stopped")
    write("nonsense: 1\n")
    assert main(["resume", "runs/x"]) == 0
    assert main(["train", "data=synthetic", "name=x"]) == 2
    assert len(started) == 2


@pytest.mark.parametrize("sweeper", ["lunaris", "basic"])
def test_the_points_of_a_sweep_have_it(
    write: Write, started: list[Path], capsys: pytest.CaptureFixture[str], sweeper: str
) -> None:
    file = write("out_dir: there/${name}\ntrainer: {log_interval: 3}\nlaunch: {partition: x}\n")
    argv = ["train", "-m", "data=synthetic", "name=s", f"hydra/sweeper={sweeper}", "seed=1,2"]
    assert main([*argv, "moe=none,switch"]) in (0, 1)
    names = [f"seed={seed},moe={moe}" for seed in (1, 2) for moe in ("none", "switch")]
    assert sorted(started) == sorted(Path("there/s", name) for name in names)
    for name in names:
        run_dir = RunDir(Path("there/s", name))
        assert run_dir.read_config().trainer.log_interval == 3
        keys = run_dir.noted("defaults")
        assert keys["file"] == str(file) and keys["keys"]["trainer.log_interval"] == 3
    assert capsys.readouterr().err.count("defaults   ") == 1


def test_a_number_in_quotes_is_a_number(write: Write) -> None:
    file = write('trainer: {max_steps: "12"}\noptimizer: {learning_rate: "0.01"}\n')
    cfg = compose([])
    assert (cfg.trainer.max_steps, cfg.optimizer.learning_rate) == (12, 0.01)
    file.write_text('trainer: {max_steps: "0"}\n')
    with pytest.raises(UserError, match="trainer.max_steps=0: must be at least 1"):
        compose([])
