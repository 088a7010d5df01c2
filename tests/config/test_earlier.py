"""A config file of the earlier Lunaris Codex becomes a command that composes to the same values."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from lunaris.__main__ import main
from lunaris.config.compose import compose

_OLD = """\
model:
  vocab_size: 50304
  d_model: 1024
  n_layers: 20
  n_heads: 16
  n_kv_heads: 4
  max_seq_len: 2048
  n_experts: 16
  capacity_factor: 1.5
  aux_loss_weight: null
data_dir: "my data/shards, b"
learning_rate: 2e-4
beta2: 0.99
batch_size: 32
num_workers: 8
compile_model: false
backend: fsdp
wandb_project: null
wandb_run_name: run 1
"""


def _command(text: str, capsys: pytest.CaptureFixture[str]) -> tuple[list[str], str]:
    Path("old.yaml").write_text(text)
    assert main(["import-config", "old.yaml"]) == 0
    printed = capsys.readouterr().out
    *_, line = printed.splitlines()
    program, command, *overrides = shlex.split(line)
    assert (program, command) == ("lunaris", "train")
    return overrides, printed


def test_the_command_has_the_file_s_values(capsys: pytest.CaptureFixture[str]) -> None:
    overrides, printed = _command(_OLD, capsys)
    cfg = compose(overrides, check_data=False)
    model, moe = cfg.model, cfg.moe
    assert (model.vocab_size, model.d_model, model.n_layers) == (50304, 1024, 20)
    assert (model.n_heads, model.n_kv_heads, model.max_seq_len) == (16, 4, 2048)
    assert vars(moe) | {"n_experts": 16, "capacity_factor": 1.5, "aux_loss_weight": 0.01} == vars(
        moe
    )
    assert cfg.data.dir == "my data/shards, b"
    assert cfg.optimizer.betas == (0.9, 0.99) and cfg.optimizer.learning_rate == 2e-4
    # Defaults of the earlier program.
    assert (cfg.trainer.max_steps, cfg.schedule.warmup_steps) == (600_000, 2000)
    assert (cfg.schedule.min_lr_ratio, cfg.checkpoint.keep_last) == (0.01, None)
    assert (cfg.trainer.batch_size, cfg.trainer.compile_model) == (32, False)
    assert cfg.parallelism._target_.endswith("FSDP")
    assert list(cfg.logger) == ["local"]
    assert "# num_workers: left out; sequences are read by a thread" in printed


def test_a_dense_file_and_an_empty_one(capsys: pytest.CaptureFixture[str]) -> None:
    text = "model: {n_experts: null}\nwandb_run_name: run 1\ndevice: cpu\n"
    overrides, printed = _command(text, capsys)
    cfg = compose(overrides, check_data=False)
    assert cfg.moe._target_.endswith("DenseFactory") and "the gate" not in printed
    assert (cfg.name, cfg.trainer.precision, cfg.trainer.device) == ("run-1", "fp32", "cpu")
    assert cfg.logger["wandb"].project == "lunaris-codex-moe"
    overrides, _ = _command("{}\n", capsys)
    assert compose(overrides, check_data=False).moe.n_experts == 8


def test_each_expert_is_as_wide_as_the_dense_feed_forward(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = "model: {n_experts_per_token: 2, ffn_hidden_multiplier: 3.0}\n"
    overrides, _ = _command(text, capsys)
    cfg = compose(overrides, check_data=False)
    assert cfg.moe.expert_width(cfg.model) == 1536  # 2/3 · 3 · 768


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "model: {n_layer: 3}",
            "model.n_layer: no key of the earlier Lunaris Codex; did you mean n",
        ),
        ("learning_rat: 1", "learning_rat: no key of the earlier Lunaris Codex; did you mean lea"),
        ("model: [1]", "model: must be a map of keys"),
        ("max_steps: [1]", "max_steps=[1]: must be one value"),
        ("- 1", "must be a map of keys, as the earlier train_moe.py reads it"),
        ("a: [", "cannot be read: "),
        ("model: {n_heads: 7}", "model.d_model=768: must be divisible by model.n_heads=7"),
        ("batch_size: many", "trainer.batch_size=many: "),
        ("backend: ddpp", "parallelism=ddpp: "),
    ],
)
def test_a_bad_file_is_refused_in_one_line(
    text: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("old.yaml").write_text(text)
    assert main(["import-config", "old.yaml"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1


def test_a_file_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import-config", "absent.yaml"]) == 2
    assert capsys.readouterr().err.startswith("error: absent.yaml: cannot be read: No such file")
