"""Run folders that older code wrote resume, evaluate and generate, with the numbers they had."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from lunaris.__main__ import main
from lunaris.metrics.records import read_rows
from lunaris.runs.run_dir import RunDir

RUNS = ("dense", "switch", "fine_grained", "wandb", "text")
SECOND = "sweeps/pair/seed=2"
# What the keys of the switch run have as their defaults: its file may lack all of them.
DEFAULTS = (
    "model.rope_theta", "model.dropout", "model.tie_embeddings", "model.norm", "model.vocab_size",
    "moe.n_shared_experts", "moe.balancing", "moe.normalize_gates", "moe.router_z_loss_weight",
    "moe.bias_update_rate", "moe.router_lr_scale", "moe.first_dense_layers", "data.seed",
    "data.document_masking", "optimizer.betas", "optimizer.eps", "optimizer.weight_decay",
    "schedule.min_lr_ratio", "trainer.grad_clip", "trainer.compile_model",
    "trainer.activation_checkpointing", "trainer.gradient_accumulation_steps",
    "checkpoint.async_save", "checkpoint.consolidated", "checkpoint.save_interval",
    "launch.max_restarts", "launch.collective_timeout_s", "experiment", "seed",
)  # fmt: skip


# What a file of version 1 means without saying so.
KEPT = ("moe.balance_scope=sequence",)


def _keys() -> list[str]:
    with tarfile.open(Path(__file__).parent / "runs_v1.tar.xz") as tar:
        file = tar.extractfile("./runs/switch/config.yaml")
        assert file is not None
        groups = yaml.safe_load(file)
    return [
        f"{group}.{key}" if isinstance(keys, dict) else group
        for group, keys in groups.items()
        for key in (keys if isinstance(keys, dict) else [None])
        if key != "_target_"
    ]


@pytest.fixture
def assert_same(script: Callable[[str], ModuleType], old: Path) -> Callable[[Any, Any], None]:
    """Return a check that numbers are those of the old code.

    They are bit for bit the same with the torch and the processor that computed them; elsewhere
    only the last bits may differ: 1e-4 relative, and a few tokens of an expert's share.
    """
    here = script("write_runs").machine() == json.loads((old / "machine.json").read_text())

    def check(found: Any, expected: Any) -> None:
        if isinstance(expected, dict):
            found = {key: found[key] for key in expected}  # Later code may add metrics.
        if here or not isinstance(expected, dict):
            assert found == expected
            return
        for key, value in expected.items():
            close = {"abs": 0.05} if key.startswith("moe/") else {"rel": 1e-4}
            assert found[key] == pytest.approx(value, **close), key

    return check


def expected(folder: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(Path(folder, "expected.json").read_text())
    return loaded


def exact_rows(folder: str) -> list[dict[str, Any]]:
    rows = read_rows(RunDir(folder).metrics_path)
    return [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in rows]


def assert_rows(folder: str, assert_same: Callable[[Any, Any], None]) -> None:
    rows = expected(folder)["rows"]
    for found, row in zip(exact_rows(folder), rows, strict=True):
        assert_same(found, row)
    assert RunDir(folder).read_status()["state"] == "done"


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.filterwarnings("ignore:.*wandb.*", "ignore::DeprecationWarning:wandb")
def test_a_stopped_run_trains_on_to_the_same_numbers(
    assert_same: Callable[[Any, Any], None], name: str
) -> None:
    assert main(["resume", f"runs/{name}"]) == 0
    assert_rows(f"runs/{name}", assert_same)


@pytest.mark.parametrize("name", RUNS)
def test_a_checkpoint_has_the_same_loss(
    assert_same: Callable[[Any, Any], None], capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert main(["evaluate", f"runs/{name}", "--json"]) == 0
    assert_same(json.loads(capsys.readouterr().out), expected(f"runs/{name}")["evaluate"])


def test_a_checkpoint_writes_the_same_text(
    script: Callable[[str], ModuleType], old: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "runs/text", *script("write_runs").GENERATE]) == 0
    assert capsys.readouterr().out == expected("runs/text")["generate"]


@pytest.mark.slow
def test_a_sweep_trains_only_its_stopped_point(
    assert_same: Callable[[Any, Any], None], capsys: pytest.CaptureFixture[str]
) -> None:
    done = exact_rows("sweeps/pair/seed=1")
    assert main(["resume", "sweeps/pair"]) == 0
    assert "[1/1] seed=2: done" in capsys.readouterr().out
    assert_rows(SECOND, assert_same)
    assert exact_rows("sweeps/pair/seed=1") == done
    assert main(["resume", "sweeps/pair"]) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_the_same_command_continues_a_run(
    script: Callable[[str], ModuleType], assert_same: Callable[[Any, Any], None]
) -> None:
    """The config that the command composes today equals the one in the folder.

    The default balance scope is another since version 3; the folder's keeps what it was. So is the
    optimizer, which is another option and has to be named.
    """
    module = script("write_runs")
    command = ["train", *module.SMALL, *module.RUNS["switch"], *KEPT, "optimizer=adamw"]
    assert main([*command, "name=switch"]) == 0
    assert_rows("runs/switch", assert_same)


def drop(path: Path, dotted: str) -> None:
    """Delete a key from a YAML file."""
    tree = yaml.safe_load(path.read_text())
    group, _, key = dotted.rpartition(".")
    del (tree[group] if group else tree)[key]
    path.write_text(yaml.safe_dump(tree, sort_keys=False))


@pytest.mark.parametrize("key", _keys())
def test_a_config_without_a_key_is_read_with_its_default(old: Path, key: str) -> None:
    run_dir = RunDir("runs/switch")
    before = run_dir.read_config()
    drop(run_dir.config_path, key)
    cfg = run_dir.read_config()
    node = cfg
    for part in key.split("."):
        assert hasattr(node, part), f"{key} is absent"
        node = getattr(node, part)
    if key in DEFAULTS:
        assert cfg == before


def test_a_config_without_its_defaults_resumes_to_the_same_numbers(
    assert_same: Callable[[Any, Any], None],
) -> None:
    run_dir = RunDir("runs/switch")
    for key in DEFAULTS:
        drop(run_dir.config_path, key)
    assert main(["resume", "runs/switch"]) == 0
    assert_rows("runs/switch", assert_same)
