"""Folders from somebody else: what is in them is not run unless the person trusts it."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import lunaris
from lunaris.__main__ import main
from lunaris.checkpoint_reader import UntrustedFile, read_metadata
from lunaris.errors import UserError
from lunaris.metrics.records import read_rows
from lunaris.runs.checkpoint_files import complete, sums_of
from lunaris.runs.run_dir import RunDir

COMMANDS = {
    "resume": ["resume", "runs/run"],
    "evaluate": ["evaluate", "runs/run"],
    "generate": ["generate", "runs/run", "--prompt", "a", "--max-new-tokens", "2"],
}


class Hostile:
    """An object whose pickle makes the file `ran` when it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch ran",)


def replace(checkpoint: Path, name: str, content: bytes) -> None:
    """Replace a file of a checkpoint, with right checksums."""
    (checkpoint / name).write_bytes(content)
    sums = json.loads((checkpoint / "files.json").read_text())
    sums[name] = [len(content), zlib.crc32(content)]
    (checkpoint / "files.json").write_text(json.dumps(sums))


@pytest.mark.parametrize("command", [*COMMANDS, "train"])
def test_the_plan_of_a_checkpoint_runs_nothing(
    stopped: Callable[[], RunDir],
    keys: list[str],
    capsys: pytest.CaptureFixture[str],
    command: str,
) -> None:
    run_dir = stopped()
    for checkpoint in complete(run_dir.checkpoints):
        replace(checkpoint, ".metadata", pickle.dumps(Hostile()))
    before = sorted(p.name for p in run_dir.checkpoints.iterdir())
    assert main(COMMANDS.get(command, ["train", *keys])) == 2
    error = capsys.readouterr().err
    assert "step_00000004/.metadata: asks for posix.system" in error and "Traceback" not in error
    assert not Path("ran").exists()
    assert sorted(p.name for p in run_dir.checkpoints.iterdir()) == before


def test_a_value_that_is_no_tensor_runs_nothing(
    stopped: Callable[[], RunDir], capsys: pytest.CaptureFixture[str]
) -> None:
    """The bytes of one value within the file of tensors are replaced by a hostile pickle."""
    run_dir = stopped()
    torch.save(Hostile(), "hostile.pt")
    hostile = Path("hostile.pt").read_bytes()
    for checkpoint in complete(run_dir.checkpoints):
        plan = read_metadata(checkpoint)
        assert plan.storage_data is not None
        values = [i for i in plan.storage_data if "param_groups" in i.fqn]
        assert values
        file = checkpoint / "__0_0.distcp"
        size = file.stat().st_size
        file.write_bytes(file.read_bytes() + hostile)
        for index in values:
            info = plan.storage_data[index]
            info.offset, info.length = size, len(hostile)
        replace(checkpoint, ".metadata", pickle.dumps(plan))
        replace(checkpoint, "__0_0.distcp", file.read_bytes())
        assert sums_of(file)[0] == size + len(hostile)
    assert main(["resume", "runs/run"]) == 2
    error = capsys.readouterr().err
    assert "is not a plain value" in error and "Traceback" not in error
    assert not Path("ran").exists()


@pytest.mark.parametrize("module", ["builtins", "torch", "torch.distributed.checkpoint.metadata"])
def test_only_what_a_plan_needs_is_known(tmp_path: Path, module: str) -> None:
    for name in ("eval", "load", "os", "field"):
        (tmp_path / ".metadata").write_bytes(f"c{module}\n{name}\n.".encode())
        with pytest.raises(UntrustedFile, match=f"asks for {module}.{name}"):
            read_metadata(tmp_path)


def edit_config(run_dir: RunDir, key: str, target: str) -> None:
    """Let every copy of a run's config name another class."""

    def edited(tree: Any) -> Any:
        node = tree
        for name in key.split(".")[:-1]:
            node = node[name]
        node[key.split(".")[-1]] = target
        return tree

    run_dir.config_path.write_text(
        yaml.safe_dump(edited(yaml.safe_load(run_dir.config_path.read_text())))
    )
    for checkpoint in complete(run_dir.checkpoints):
        facts = json.loads((checkpoint / "run.json").read_text())
        facts["config"] = edited(facts["config"])
        replace(checkpoint, "run.json", json.dumps(facts).encode())


@pytest.mark.parametrize(
    ("key", "target"),
    [
        ("launch._target_", "os.system"),
        ("logger.local._target_", "mine.Logger"),
        ("moe._target_", "lunaris_not_ours.Moe"),
        ("optimizer._target_", "os.system"),
        ("data._schema_", "mine.Schema"),
    ],
)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_config_names_only_trusted_classes(
    stopped: Callable[[], RunDir],
    capsys: pytest.CaptureFixture[str],
    key: str,
    target: str,
    command: str,
) -> None:
    run_dir = stopped()
    Path("mine.py").write_text("open('ran', 'w')\n")
    edit_config(run_dir, key, target)
    before = run_dir.metrics_path.read_bytes()
    assert main(COMMANDS[command]) == 2
    error = capsys.readouterr().err
    assert f"{key}={target}: is no part of this package" in error and "Traceback" not in error
    assert f"--trust {target.rpartition('.')[0]}" in error
    assert not Path("ran").exists() and run_dir.metrics_path.read_bytes() == before


LOGGER = """\
from lunaris.metrics.loggers import LocalLogger
class Mine(LocalLogger):
    def start(self, run_dir, cfg, step):
        open("ran", "w").close()
        super().start(run_dir, cfg, step)
"""


def test_what_the_person_names_is_trusted(
    stopped: Callable[[], RunDir], keys: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """By --trust, or on the command line that composes the run."""
    # A name of its own: another test has imported its module `mine` in this process.
    (tmp_path / "trusted_logger.py").write_text(LOGGER)
    monkeypatch.syspath_prepend(str(tmp_path))
    run_dir = stopped()
    edit_config(run_dir, "logger.local._target_", "trusted_logger.Mine")
    assert main(["resume", "runs/run"]) == 2 and not Path("ran").exists()
    assert main(["resume", "runs/run", "--trust", "other", "--trust", "trusted_logger"]) == 0
    assert Path("ran").exists()
    shutil.rmtree(run_dir.path)
    Path("ran").unlink()
    own = [*keys, "logger.local._target_=trusted_logger.Mine"]
    assert main(["train", *own]) == 0 and Path("ran").exists()
    assert main(["train", *own]) == 0
    assert read_rows(run_dir.metrics_path)[-1]["step"] == 8


def test_python_trusts_what_it_is_given(stopped: Callable[[], RunDir]) -> None:
    run_dir = stopped()
    edit_config(run_dir, "optimizer._target_", "os.system")
    with pytest.raises(UserError, match="--trust os"):
        lunaris.load(run_dir.path)
    lunaris.load(run_dir.path, trust=["os"])  # Loading weights takes no optimizer.
