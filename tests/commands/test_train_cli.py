"""`lunaris train` as a user types it: exit codes, what is printed, what is left on the disk."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf

from lunaris.__main__ import commands, main
from lunaris.runs.run_dir import RunDir

SMOKE = ["experiment=smoke", "moe=none", "trainer.max_steps=2", "data.n_tokens=5000", "name=x"]


@pytest.mark.parametrize(
    "argv",
    [
        ["train", "moe.n_expert=16"],
        ["train", "+moe.n_expert=16"],
        ["train", "moe=swich"],
        ["train", "data=shards", "data.dir=absent"],
        ["train", "launch._target_=json.Absent"],
        ["train", "launch._target_=json.JSONDecoder"],
        ["train", "launch._target_=json.tool.json"],
        ["prepare", "data._target_=json.JSONDecoder.no"],
        ["train", "--multirn"],
        ["train", "--cfg", "jobs"],
        ["train", "--resolve"],
        ["train", "--cfg", "job", "-m"],
        ["train", "--cfg", "job", "moe.n_expert=16"],
        ["train", "--cfg", "job", "+moe.n_expert=16"],
        ["train", "--cfg", "job", "--resolve", "trainer.max_steps=${nope}"],
        ["train", "--cfg", "job", "--package", "mo"],
        ["train", "--config-name", "absent"],
        ["train", "--config-dir", "absent"],
        ["train", "--config-path", "absent"],
        ["trian"],
    ],
    ids=" ".join,
)
def test_bad_input_ends_with_2_and_one_message(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and len(captured.err.splitlines()) == 1
    assert captured.out == ""
    assert os.listdir() == []


def test_a_run_leaves_its_folder_and_continues_from_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *SMOKE]) == 0
    run_dir = RunDir("runs/x")
    assert run_dir.read_status()["state"] == "done"
    provenance = json.loads((run_dir.path / "provenance.json").read_text())
    assert provenance["command"] == "lunaris train " + " ".join(SMOKE)
    assert provenance["overrides"] == SMOKE
    assert sorted(os.listdir()) == ["runs"]
    # Another config does not.
    capsys.readouterr()
    assert main(["train", *SMOKE, "model.d_model=64"]) == 2
    assert "model.d_model: 32 → 64" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer._target_=json.JSONDecoder", "takes neither `model` nor `params`"),
        (
            "moe._target_=collections.Counter",
            "Counter: has no method __call__; lunaris.",
        ),
        ("data.n_tokens=99999999999999", "data.n_tokens=99999999999999: must be at most 100000000"),
    ],
)
def test_what_shows_before_the_start_is_told_in_one_line_and_nothing_is_written(
    override: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    smoke = [each for each in SMOKE if each.partition("=")[0] != override.partition(".")[0]]
    assert main(["train", *smoke, override]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert os.listdir() == []


def test_what_shows_only_at_the_start_is_told_in_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    message = "batch_size=99999999999999 and model.max_seq_len=32"
    assert main(["train", *SMOKE, "trainer.batch_size=99999999999999"]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert len([line for line in error.splitlines() if line.startswith("error: ")]) == 1
    status = RunDir("runs/x").read_status()
    assert status["state"] == "failed" and message in status["last_error"]


def test_what_nobody_foresaw_ends_with_1_and_one_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(".")
    Path("unforeseen.py").write_text("def falling(max_steps): return lambda step: {}[step]\n")
    assert main(["train", *SMOKE, "schedule._target_=unforeseen.falling"]) == 1
    assert capsys.readouterr().err.count("Traceback") == 1
    assert "KeyError: 0" in RunDir("runs/x").read_status()["last_error"]
    assert "Traceback" in (RunDir("runs/x").logs / "rank_0.log").read_text()


@pytest.mark.slow
def test_under_torchrun_every_rank_trains_in_its_own_process() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    argv = ["-m", "lunaris", "train", *SMOKE, "parallelism=ddp", "trainer.device=cpu"]
    done = subprocess.run([*command, *argv], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    run_dir = RunDir("runs/x")
    assert run_dir.read_status()["state"] == "done"
    assert (run_dir.logs / "rank_1.log").is_file()
    assert run_dir.read_config().launch.processes == 2


def test_cfg_shows_what_would_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--cfg", "job", "moe=top2"]) == 0
    cfg: Any = OmegaConf.create(capsys.readouterr().out)
    assert (cfg.moe.n_experts_per_token, cfg.name) == (2, "moe=top2")
    assert "hydra" not in cfg
    assert OmegaConf.to_container(cfg, resolve=False)["out_dir"] == "runs/${name}"  # type: ignore[call-overload, index]
    assert main(["train", "--cfg", "job", "--resolve"]) == 0
    assert "out_dir: runs/default" in capsys.readouterr().out
    assert main(["train", "-c", "-p", "moe", "moe=none"]) == 0
    shown = capsys.readouterr().out
    assert shown == "# @package moe\n_target_: lunaris.moe.factory.DenseFactory\n"
    assert main(["train", "--cfg", "job", "-p", "model.d_model"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "128"
    # A key without a value is shown too.
    for part, value in (("data.dir", "???"), ("model.vocab_size", "null")):
        assert main(["train", "--cfg", "job", "data=shards", "-p", part]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == value
    assert os.listdir() == []


def test_hydras_own_flags_work(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--cfg", "hydra"]) == 0
    assert "sweeper:" in capsys.readouterr().out
    assert main(["train", "--cfg", "all", "-p", "moe.n_experts"]) == 0
    assert main(["train", "--info", "defaults", "moe=none"]) == 0
    assert "moe/none" in capsys.readouterr().out
    assert main(["train", "--hydra-help"]) == 0
    assert "Hydra" in capsys.readouterr().out
    assert os.listdir() == []


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("lunaris tr", ["train"]),
        ("lunaris train mo", ["moe", "model"]),
        ("lunaris train moe=", ["moe=switch", "moe=none"]),
        ("lunaris train moe=top2 moe.n_sh", ["moe.n_shared_experts="]),
    ],
)
def test_a_shell_completes_commands_groups_options_and_keys(
    line: str,
    shown: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COMP_LINE", line)
    assert main(["-sc", "query=bash"]) == 0
    printed = capsys.readouterr().out.split()
    assert all(any(word.startswith(text) for word in printed) for text in shown)
    assert bool(printed) == bool(shown)


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("lunaris resume ", ["runs/one", "sweeps/other/", "sweeps/two"]),
        ("lunaris resume ru", ["runs/"]),
        ("lunaris generate runs/o", ["runs/one"]),
        ("lunaris report ./runs/o", ["./runs/one"]),
        ("lunaris evaluate absent/", []),
        ("lunaris logs --rank 1 sweeps/", ["sweeps/other/", "sweeps/two"]),
    ],
)
def test_a_shell_completes_folders_of_runs(
    line: str, shown: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in ("runs/one", "sweeps/two", "sweeps/other"):
        Path(folder).mkdir(parents=True)
    Path("runs/one/config.yaml").touch()
    Path("sweeps/two/manifest.json").write_text('{"points": []}')
    Path("runs/file").touch()
    monkeypatch.setenv("COMP_LINE", line)
    assert main(["-sc", "query=bash"]) == 0
    assert capsys.readouterr().out.split() == shown


def test_every_command_has_its_completion() -> None:
    from lunaris.__main__ import _OF_FOLDERS, _OF_KEYS, commands

    assert sorted([*_OF_FOLDERS, *_OF_KEYS, "import-config", "keys", "new"]) == sorted(commands())


def test_help_names_every_group_and_option(capsys: pytest.CaptureFixture[str]) -> None:
    from lunaris.config.keys import group_names, options

    assert main(["train", "--help"]) == 0
    shown = capsys.readouterr().out
    for group in group_names():
        assert f"\n  {group}\n" in shown
        for option in options(group):
            assert f"\n    {option.name} " in shown
    for flag in ("--multirun", "--cfg", "--config-dir", "--help"):
        assert flag in shown
    assert "lunaris train -m moe.n_experts=4,8,16" in shown


def test_help_lists_every_command_with_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert main(["--help"]) == 0
    assert capsys.readouterr().out == shown
    for name in commands():
        assert re.search(rf"^  {name} +\w", shown, re.MULTILINE)


def test_the_way_of_installing_does_not_matter() -> None:
    argv = ["train", "--cfg", "job", "-p", "seed"]
    program = Path(sys.executable).with_name("lunaris")
    for command in ([sys.executable, "-m", "lunaris"], [str(program)]):
        done = subprocess.run([*command, *argv], capture_output=True, text=True)
        assert done.stdout.splitlines()[-1] == "1337", done.stderr


def shards(folder: Path, *arrays: np.ndarray) -> str:
    folder.mkdir()
    for i, array in enumerate(arrays):
        np.save(folder / f"shard_{i}.npy", array)
    return str(folder)


def tokens(count: int, largest: int = 99) -> np.ndarray:
    return (np.arange(count) % (largest + 1)).astype(np.uint16)


@pytest.mark.parametrize(
    ("array", "overrides", "message"),
    [
        (tokens(5000), ["model.vocab_size=99"], "model.vocab_size=99: must be at least 100, for "),
        (tokens(5000), ["data.vocab_size=50"], "data.vocab_size=50: must be at least 100, for "),
        (tokens(256), [], "model.max_seq_len=256: one sequence needs 257 tokens, but data.dir="),
        (tokens(0), [], "holds no tokens"),
        (tokens(5000).astype(np.float32), [], "holds float32; allowed are one-dimensional"),
        (tokens(5000) > 3, [], "holds bool; allowed are"),
        (tokens(5000).astype(np.int32) - 1, [], "holds the negative id -1"),
        (tokens(5000).reshape(50, 100), [], "has 2 dimensions"),
        (tokens(5000), ["data.weights=[1,2]"], "data.weights=[1.0,2.0]: must be one weight for"),
        (tokens(5000), ["data.document_masking=true"], "needs data.eot_id"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_shards_are_checked_before_anything_starts(
    array: np.ndarray, overrides: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shards(Path("shards"), array)
    assert main(["train", "data=shards", f"data.dir={folder}", *overrides]) == 2
    assert message in capsys.readouterr().err
    assert os.listdir() == ["shards"]


def test_truncated_and_empty_shards_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(shards(Path("shards"), tokens(5000)))
    whole = (folder / "shard_0.npy").read_bytes()
    for content, message in ((whole[:-10], "truncated"), (b"", "empty file")):
        (folder / "shard_0.npy").write_bytes(content)
        assert main(["train", "data=shards", "data.dir=shards"]) == 2
        assert message in capsys.readouterr().err
    (folder / "shard_0.npy").unlink()
    assert main(["train", "data=shards", "data.dir=shards"]) == 2
    assert "holds no .npy files" in capsys.readouterr().err
    assert os.listdir() == ["shards"]


def test_text_has_to_be_prepared_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "data=text", "data.dir=out", "data.files=[a.txt]"]) == 2
    assert "data.dir=out: holds no prepared shards yet" in capsys.readouterr().err
