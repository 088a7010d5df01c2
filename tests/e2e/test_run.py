"""Training runs, from the composed config to the run's folder."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lunaris import frozen_choices
from lunaris.errors import UserError
from lunaris.metrics.records import read_rows
from lunaris.runs.create import create
from lunaris.runs.run_dir import RunDir


@pytest.mark.slow
def test_the_text_of_the_standard_library_trains(
    tiny: Callable[..., Any], run_here: Callable[[Any], RunDir]
) -> None:
    """The only option without golden losses: they depend on the Python that runs the tests."""
    keys = ["data.vocab_size=300", "trainer.max_steps=40", "optimizer.learning_rate=1e-2"]
    rows = read_rows(run_here(tiny("data=stdlib", *keys)).metrics_path)
    assert rows[1]["train/main_loss"] == pytest.approx(math.log(300), rel=0.05)
    assert rows[-1]["val/loss"] < rows[0]["val/loss"] - 0.3


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("norm", ["qk_reorder", "pre"])
def test_every_precision_and_norm_trains(
    tiny: Callable[..., Any], run_here: Callable[[Any], RunDir], precision: str, norm: str
) -> None:
    run_dir = run_here(
        tiny(
            f"trainer.precision={precision}",
            f"model.norm={norm}",
            "trainer.max_steps=40",
            "optimizer.learning_rate=1e-2",
        )
    )
    rows = read_rows(run_dir.metrics_path)[1:]
    assert rows[-1]["train/main_loss"] < rows[0]["train/main_loss"] - 0.05


def test_the_header_compares_with_the_dense_twin(
    tiny: Callable[..., Any], run_here: Callable[[Any], RunDir], capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = run_here(tiny("moe=none", "trainer.max_steps=1", name="dense"))
    assert "dense twin" not in capsys.readouterr().out
    size = run_dir.read_status()["parameters"]
    active = run_here(tiny("moe=top2", "trainer.max_steps=1")).read_status()["active_parameters"]
    twin = f"{active / size:.2f} of its dense twin's {size:,} (moe=none)"
    assert twin in capsys.readouterr().out


def test_what_auto_chose_stays_the_runs_precision(
    tiny: Callable[..., Any],
    run_here: Callable[[Any], RunDir],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def on_a_device_that_takes(name: str) -> None:
        monkeypatch.setattr(
            frozen_choices,
            "chosen_precision",
            lambda given, device: name if given == "auto" else given,
        )

    on_a_device_that_takes("bf16")
    first = tiny("trainer.stop_at=1", "trainer.max_steps=3")
    assert first.trainer.precision == "auto"
    run_dir = run_here(first)
    assert run_dir.read_config().trainer.precision == "bf16"
    assert "bf16 on cpu" in " ".join(capsys.readouterr().out.split())
    # The same command continues it with the same precision, on another device too.
    on_a_device_that_takes("fp32")
    for stop_at in (2, "null"):
        run_dir = run_here(tiny(f"trainer.stop_at={stop_at}", "trainer.max_steps=3"))
        assert run_dir.read_config().trainer.precision == "bf16"
    assert run_dir.read_status()["step"] == 3
    # Sending the command once more leaves the folder of a run that is done as it is.
    create(tiny("trainer.max_steps=3"), "lunaris train", [])
    assert "precision: bf16" in run_dir.config_path.read_text()
    with pytest.raises(UserError, match="trainer.precision: bf16 → fp32"):
        run_here(tiny("trainer.precision=fp32", "trainer.max_steps=3"))


def test_a_folder_that_names_its_precision_keeps_it_under_auto(
    tiny: Callable[..., Any], run_here: Callable[[Any], RunDir], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a folder of a version without `auto`, also without a checkpoint that has its config."""
    create(tiny("trainer.precision=fp32", "trainer.max_steps=1"), "lunaris train", [])
    monkeypatch.setattr(frozen_choices, "chosen_precision", lambda given, device: "bf16")
    assert run_here(tiny("trainer.max_steps=1")).read_config().trainer.precision == "fp32"


def test_a_vocabulary_smaller_than_the_datas_is_refused(
    tiny: Callable[..., Any], run_here: Callable[[Any], RunDir]
) -> None:
    with pytest.raises(UserError, match="model.vocab_size=63"):
        run_here(tiny("model.vocab_size=63"))


def test_dropping_the_default_experiment_leaves_a_folder_that_names_its_config(
    tiny: Callable[..., Any], run_here: Callable[[Any], RunDir], tmp_path: Path
) -> None:
    run_dir = run_here(tiny("trainer.max_steps=1"))
    assert run_dir.path == tmp_path / "runs/run"
    saved = run_dir.read_config()
    assert saved.trainer.max_steps == 1 and saved.out_dir == str(run_dir.path)
