"""Every file of a run's folder, damaged: a command names it, or mends it and has the same numbers.

There is no third outcome: no traceback, and no run that trains on with other numbers.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from lunaris.__main__ import main
from lunaris.metrics.records import read_rows
from lunaris.runs.run_dir import RunDir

FILES = (
    "config.yaml", "provenance.json", "status.json", "metrics.jsonl", "tokenizer.json", "loss.png",
    ".lock", ".status.lock", "logs/rank_0.log", "checkpoints/step_00000004/run.json",
)  # fmt: skip
COMMANDS = ("resume", "train", "evaluate", "generate", "runs")


def remove(path: Path) -> None:
    path.unlink()


def empty(path: Path) -> None:
    path.write_bytes(b"")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def spoil(path: Path) -> None:
    """Put a byte that is not UTF-8 into the middle."""
    content = bytearray(path.read_bytes() or b" ")
    content[len(content) // 2] = 0xFF
    path.write_bytes(bytes(content))


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "inner").write_text("x")


def list_instead(path: Path) -> None:
    path.write_text("[1, 2]\n")


def other_types(path: Path) -> None:
    """Give every value of a JSON object, or of each line of them, another type."""
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
    except ValueError:
        rows = [json.loads(path.read_text())] if path.suffix == ".json" else [{"step": 3}]
    changed = [{key: _other(value) for key, value in row.items()} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in changed))


def _other(value: object) -> object:
    return {"x": 1} if isinstance(value, str | int | float | list) else [7]


WAYS = (remove, empty, cut, spoil, make_folder, list_instead, other_types)


def exact_rows(run_dir: RunDir) -> list[dict[str, Any]]:
    rows = read_rows(run_dir.metrics_path)
    return [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in rows]


def argv_of(command: str, keys: list[str]) -> list[str]:
    if command == "train":
        return ["train", *keys]
    further = {
        "evaluate": ["--json", "--max-sequences", "2"],
        "generate": ["--prompt", "the", "--max-new-tokens", "2"],
    }
    return [command, "runs/run", *further.get(command, [])]


def check_outcome(
    code: int, name: str, command: str, err: str, run_dir: RunDir, *, all_rows: bool
) -> None:
    """Fail unless a command named the damaged file, or ended with the undisturbed numbers."""
    assert code in (0, 2), (command, err)
    if code == 2:
        assert err.startswith("error: ") and Path(name).name in err, (command, err)
    elif command in ("resume", "train"):
        whole, found = exact_rows(RunDir("whole")), exact_rows(run_dir)
        # Rows before the checkpoint are lost with the file that held them.
        assert found[-4:] == whole[-4:] and (found == whole or not all_rows)
        assert run_dir.read_status()["state"] == "done"


@pytest.mark.filterwarnings("ignore:checkpoint .* is damaged")
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_or_mended(
    stopped: Callable[[], RunDir],
    keys: list[str],
    capsys: pytest.CaptureFixture[str],
    counted: Callable[[str, int], None],
    long: bool,
    name: str,
    way: Callable[[Path], None],
) -> None:
    for command in COMMANDS if long else COMMANDS[:1]:
        run_dir = stopped()
        way(run_dir.path / name)
        capsys.readouterr()
        code = main(argv_of(command, keys))
        err = capsys.readouterr().err
        check_outcome(code, name, command, err, run_dir, all_rows=name != "metrics.jsonl")
        counted("damaged files of a run's folder, each met by a command", 1)


BROKEN: list[tuple[str, str, Callable[..., Any], Callable[[Path], None]]] = [
    ("metrics.jsonl", "lunaris.metrics.records._row", json.loads, spoil),
    ("config.yaml", "lunaris.runs.run_dir.RunDir.saved_config", lambda self: None, remove),
    ("loss.png", "lunaris.runs.run_dir.RunDir.check_kinds", lambda self: None, make_folder),
    ("status.json", "lunaris.runs.run_dir._fits", lambda *_: True, other_types),
]


@pytest.mark.parametrize(("name", "part", "broken", "way"), BROKEN, ids=[row[0] for row in BROKEN])
def test_a_broken_build_is_caught(
    stopped: Callable[[], RunDir],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    part: str,
    broken: Callable[..., Any],
    way: Callable[[Path], None],
) -> None:
    monkeypatch.setattr(part, broken)
    run_dir = stopped()
    way(run_dir.path / name)

    def resumed() -> None:
        code = main(argv_of("resume", []))
        err = capsys.readouterr().err
        check_outcome(code, name, "resume", err, run_dir, all_rows=name != "metrics.jsonl")
        assert code == 0 or way is make_folder, "could have been mended"

    with pytest.raises((AssertionError, TypeError, ValueError, AttributeError)):
        resumed()


def other_tokens() -> None:
    """Change one token of the training shards, and the checksum that the manifest has of it."""
    import hashlib

    import numpy as np

    manifest = json.loads(Path("shards/manifest.json").read_text())
    entry = manifest["shards"]["train"][0]
    file = Path("shards", entry["file"])
    tokens = np.load(file)
    tokens[5] = (tokens[5] + 1) % 250
    np.save(file, tokens)
    entry["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    Path("shards/manifest.json").write_text(json.dumps(manifest))


def without_facts(run_dir: RunDir) -> None:
    """Make the checkpoints those of an older version, which have no `run.json`."""
    for folder in run_dir.checkpoints.iterdir():
        (folder / "run.json").unlink()
        sums = json.loads((folder / "files.json").read_text())
        del sums["run.json"]
        (folder / "files.json").write_text(json.dumps(sums))


@pytest.mark.parametrize("older", [False, True], ids=["today", "older"])
@pytest.mark.parametrize("command", ["resume", "train"])
def test_the_data_guard_stands_without_the_provenance(
    stopped: Callable[[], RunDir],
    keys: list[str],
    capsys: pytest.CaptureFixture[str],
    command: str,
    older: bool,
) -> None:
    run_dir = stopped()
    if older:
        without_facts(run_dir)
    other_tokens()
    spoil(run_dir.provenance_path)
    for _ in range(2):  # The second time, what could not be read is set aside already.
        assert main(argv_of(command, keys)) == 2
        err = capsys.readouterr().err
        assert ("provenance.json" in err) if older else ("trained on other tokens" in err)
    assert exact_rows(run_dir)[-1]["step"] <= 8
    assert not (run_dir.checkpoints / "step_00000006").exists()


def test_an_older_checkpoint_without_provenance_goes_on_once_a_person_accepts_the_data(
    stopped: Callable[[], RunDir], keys: list[str]
) -> None:
    run_dir = stopped()
    without_facts(run_dir)
    spoil(run_dir.provenance_path)
    assert main(argv_of("train", keys)) == 2
    run_dir.provenance_path.with_name("provenance.json.damaged").unlink()
    assert main(argv_of("train", keys)) == 0
    assert exact_rows(run_dir) == exact_rows(RunDir("whole"))


@pytest.mark.parametrize("older", [False, True], ids=["today", "older"])
def test_a_missing_config_does_not_let_another_one_in(
    stopped: Callable[[], RunDir], keys: list[str], capsys: pytest.CaptureFixture[str], older: bool
) -> None:
    run_dir = stopped()
    if older:
        without_facts(run_dir)
    run_dir.config_path.unlink()
    files = {p: p.read_bytes() for p in run_dir.path.rglob("*") if p.is_file()}
    assert main(["train", *keys, "optimizer.learning_rate=1e-4"]) == 2
    err = capsys.readouterr().err
    assert ("config.yaml: missing" in err) if older else ("learning_rate: 0.006 → 0.0001" in err)
    assert files == {p: p.read_bytes() for p in run_dir.path.rglob("*") if p.is_file()}
    if not older:
        assert main(["resume", "runs/run"]) == 0
        assert exact_rows(run_dir) == exact_rows(RunDir("whole"))
        assert run_dir.config_path.is_file()


def edits() -> list[tuple[str, Any]]:
    """Return edits of every value of the config to each of some others."""
    others: list[Any] = [0, -1, 7, 1e30, "x", None, [], {}, True]
    names = ("model.n_heads", "model.d_model", "moe.n_experts", "moe.router", "schedule._target_",
             "optimizer.betas", "trainer.batch_size", "seed", "data.dir", "data",
             "launch.processes", "optimizer.learning_rate", "logger", "checkpoint",
             "moe.first_dense_layers",
             "trainer.grad_clip", "parallelism._target_", "model.vocab_size")  # fmt: skip
    return [(name, value) for name in names for value in others]


@pytest.mark.parametrize("checkpoints", [True, False], ids=["saved", "nothing saved"])
def test_an_edited_config_is_checked_when_it_resumes(
    stopped: Callable[[], RunDir],
    capsys: pytest.CaptureFixture[str],
    counted: Callable[[str, int], None],
    long: bool,
    checkpoints: bool,
) -> None:
    run_dir = stopped()
    original = run_dir.config_path.read_text()
    for name, value in edits() if long else edits()[:: 23 if checkpoints else 11]:
        if not checkpoints:
            shutil.rmtree(run_dir.checkpoints, ignore_errors=True)
        tree = yaml.safe_load(original)
        group, _, key = name.rpartition(".")
        (tree[group] if group else tree)[key] = value
        run_dir.config_path.write_text(yaml.safe_dump(tree))
        run_dir.write_status(state="stopped")
        capsys.readouterr()
        code = main(["resume", "runs/run"])
        err = capsys.readouterr().err
        # Where no checkpoint has a copy, the edited rate is the run's own, and 1e30 diverges.
        diverged = "lower optimizer.learning_rate" in err and not checkpoints
        assert code == (1 if diverged else 2) or code == 0, (name, value, err)
        lines = [line for line in err.splitlines() if line.startswith("error: ")]
        assert code == 0 or len(lines) == 1, (name, value, err)
        if code == 0 and checkpoints:
            assert exact_rows(run_dir) == exact_rows(RunDir("whole")), (name, value)
            run_dir = stopped()
        counted("edits of a run's config.yaml, each resumed", 1)


def test_a_damaged_tokenizer_is_copied_again_and_not_generated_from(
    stopped: Callable[[], RunDir], capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = stopped()
    good = run_dir.tokenizer_path.read_bytes()
    changed = json.loads(good)
    vocab = changed["model"]["vocab"]
    first, second = list(vocab)[5], list(vocab)[6]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    run_dir.tokenizer_path.write_text(json.dumps(changed))
    assert main(argv_of("generate", [])) == 2
    assert "tokenizer.json: damaged" in capsys.readouterr().err
    assert main(["resume", "runs/run"]) == 0
    assert run_dir.tokenizer_path.read_bytes() == good
