"""How many processes a command starts on a machine, what joins them, and that a run keeps both."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lunaris.__main__ import main
from lunaris.config import decide
from lunaris.config.change import changed
from lunaris.config.compose import Composer, compose
from lunaris.config.frozen import read_config
from lunaris.config.schema.parallelism import DDPConfig, FSDPConfig, SingleConfig
from lunaris.config.trust import restricted
from lunaris.errors import UserError
from lunaris.launch.local import Local
from lunaris.launch.sweep.points import Sweep
from lunaris.runs.create import create

DATA = ["data=synthetic", "data.n_tokens=20000", "data.vocab_size=64"]
SMALL = [
    *DATA, "model.d_model=16", "model.n_layers=1", "model.n_heads=2", "model.n_kv_heads=1",
    "model.max_seq_len=16", "model.multiple_of=8", "trainer.batch_size=2",
]  # fmt: skip


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Return a function that gives this machine so many GPUs, and a torch that uses them."""
    monkeypatch.setattr("importlib.metadata.version", lambda name: "2.13.0+cu130")

    def give(number: int) -> None:
        monkeypatch.setattr(decide, "visible_gpus", lambda: [str(n) for n in range(number)])

    give(4)
    return give


def chosen(*overrides: str) -> tuple[int, str]:
    cfg: Any = compose([*DATA, *overrides])
    return cfg.launch.world_size(), cfg.parallelism._target_.rpartition(".")[2]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], (4, "DDP")),
        (["trainer.device=cuda"], (4, "DDP")),
        (["trainer.device=cpu"], (1, "Single")),
        (["launch.processes=1"], (1, "Single")),
        (["launch.processes=2"], (2, "DDP")),
        (["parallelism=fsdp"], (4, "FSDP")),
        (["parallelism=fsdp", "launch.processes=2"], (2, "FSDP")),
        (["launch=slurm"], (1, "Single")),
        (["launch=slurm", "launch.nodes=2", "launch.gpus_per_node=8"], (16, "DDP")),
    ],
)
def test_there_is_a_process_on_each_gpu_and_ddp_joins_several(
    gpus: Callable[[int], None], overrides: list[str], expected: tuple[int, str]
) -> None:
    assert chosen(*overrides) == expected


def test_one_process_trains_where_no_gpu_would_be_used(
    gpus: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(0)
    assert chosen() == (1, "Single")
    gpus(1)
    assert chosen() == (1, "Single")
    gpus(8)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "2.13.0+cpu")
    assert chosen() == (1, "Single")
    # Under torchrun its number counts.
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert chosen() == (2, "DDP")


def test_a_parallelism_of_one_process_gets_one(
    gpus: Callable[[int], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert chosen("parallelism=single") == (1, "Single")
    # One of a person's own may know nothing of other processes.
    (tmp_path / "mine_alone.py").write_text(
        "from lunaris.parallelism.single import Single\nclass Alone(Single): pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    own = [*DATA, "parallelism._target_=mine_alone.Alone", f"out_dir={tmp_path / 'own'}"]
    cfg: Any = compose(own)
    assert (cfg.launch.processes, cfg.parallelism._target_) == (1, "mine_alone.Alone")
    # Its schema inherits from that of auto, but it is decided.
    create(cfg, "lunaris train", [])
    with restricted(["mine_alone"]):
        read = read_config(tmp_path / "own" / "config.yaml")
    assert read.parallelism._target_ == "mine_alone.Alone"
    with pytest.raises(UserError, match="single: one process, but launch.processes=4; choose par"):
        chosen("parallelism=single", "launch.processes=4")


def test_points_of_a_sweep_have_a_gpu_each(gpus: Callable[[int], None], tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, "lunaris train -m", set())
    cfgs: list[Any] = [
        sweep.composer.compose(DATA),
        Composer(of_sweep=True).compose([*DATA, "launch.processes=2"]),
    ]
    assert [cfg.launch.processes for cfg in cfgs] == [1, 2]
    # A run that has the name of the sweep says nothing of its points.
    create(compose([*DATA, f"out_dir={tmp_path / 'lr'}"]), "lunaris train", [])
    point: Any = Composer(of_sweep=True).compose([*DATA, f"out_dir={tmp_path / 'lr'}"])
    assert point.launch.processes == 1
    assert isinstance(cfgs[0].parallelism, SingleConfig)
    assert isinstance(cfgs[1].parallelism, DDPConfig)


def test_a_run_keeps_what_it_was_started_with(gpus: Callable[[int], None], tmp_path: Path) -> None:
    name = f"out_dir={tmp_path / 'run'}"
    create(compose([*DATA, name]), "lunaris train", [])
    frozen: Any = read_config(tmp_path / "run" / "config.yaml")
    assert (frozen.launch.processes, type(frozen.parallelism)) == (4, DDPConfig)
    gpus(8)
    assert chosen(name) == (4, "DDP")
    # The same command opens the folder again, as the same run.
    create(compose([*DATA, name]), "lunaris train", [])
    assert chosen(name, "launch.processes=2") == (2, "DDP")
    assert chosen(name, "launch.processes=1", "parallelism=single") == (1, "Single")
    resumed: Any = changed(frozen, ["trainer.max_steps=700"])
    assert (resumed.launch.processes, type(resumed.parallelism)) == (4, DDPConfig)
    create(compose([*DATA, name, "parallelism=fsdp"]), "lunaris train", [])
    assert chosen(name) == (4, "FSDP")
    assert isinstance(compose([*DATA, name]).parallelism, FSDPConfig)


def test_a_run_of_one_process_stays_one_where_there_are_more_gpus(
    gpus: Callable[[int], None], tmp_path: Path
) -> None:
    name = f"out_dir={tmp_path / 'run'}"
    gpus(0)
    create(compose([*DATA, name]), "lunaris train", [])
    gpus(8)
    assert chosen(name) == (1, "Single")
    assert chosen(name, "launch.processes=2") == (2, "DDP")


def test_what_was_chosen_is_printed_and_started(
    gpus: Callable[[int], None], capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    started: list[int] = []

    def start(self: Local, path: Path) -> int:
        started.append(self.processes)
        return 0

    monkeypatch.setattr(Local, "start", start)
    assert main(["train", *SMALL, "name=x"]) == 0
    said = "launch.processes=auto: 4 processes, one on each GPU of this machine; parallelism=ddp\n"
    assert said in capsys.readouterr().err and started == [4]
    gpus(8)
    assert main(["train", *SMALL, "name=x"]) == 0
    assert "auto: 4 processes, as before; parallelism=ddp" in capsys.readouterr().err
    gpus(1)
    assert main(["train", *SMALL, "name=y"]) == 0
    assert "launch.processes=auto" not in capsys.readouterr().err and started == [4, 4, 1]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("processes: 4", "processes: auto", "launch.processes=auto: a run's file holds the number"),
        (
            "lunaris.parallelism.ddp.DDP",
            "lunaris.config.schema.parallelism.AutoConfig",
            "parallelism=auto: a run's file names its parallelism",
        ),
    ],
)
def test_a_file_that_a_person_has_set_to_auto_is_refused(
    gpus: Callable[[int], None], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    old: str, new: str, said: str,
) -> None:  # fmt: skip
    create(compose([*DATA, f"out_dir={tmp_path / 'run'}"]), "lunaris train", [])
    file = tmp_path / "run" / "config.yaml"
    text = file.read_text()
    assert old in text
    lines = text.replace("  expert_parallel: 1\n", "") if "Auto" in new else text
    file.write_text(lines.replace(old, new))
    assert main(["resume", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert f"{file}: {said}" in " ".join(error.split()) and "Traceback" not in error
