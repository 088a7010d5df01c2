"""`init_from`: a run starts from the weights of another, under every parallelism."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lunaris.__main__ import main
from lunaris.inference import load_trained
from lunaris.metrics.records import read_rows
from lunaris.runs.run_dir import RunDir

Tiny = Callable[..., Any]


@pytest.fixture
def dense(tiny: Tiny, run_here: Callable[[Any], RunDir]) -> RunDir:
    """Return a finished dense run with a consolidated file."""
    return run_here(tiny("moe=none", "checkpoint.consolidated=true", name="dense"))


def first_and_last_val(run_dir: RunDir) -> tuple[float, float]:
    losses = [row["val/loss"] for row in read_rows(run_dir.metrics_path) if "val/loss" in row]
    return losses[0], losses[-1]


def listing() -> list[str]:
    return sorted(str(path) for path in Path().rglob("*"))


@pytest.mark.slow
def test_a_warm_started_loss_begins_where_the_other_ended(
    dense: RunDir, tiny: Tiny, run_here: Callable[[Any], RunDir]
) -> None:
    ended = first_and_last_val(dense)[1]
    rows = []
    for n, given in enumerate(
        [dense.path, dense.checkpoints / "step_00000008", dense.path / "model.pt"]
    ):
        run = run_here(tiny("moe=none", "trainer.max_steps=2", f"init_from={given}", name=f"w{n}"))
        assert first_and_last_val(run)[0] == ended
        rows.append([row["train/loss"] for row in read_rows(run.metrics_path) if row["step"]])
        (parent,) = run.parents()
        assert parent == {
            "kind": "continued from",
            "dir": str(dense.path),
            "step": None if given.suffix else 8,
        }
    assert rows[0] == rows[1] == rows[2]
    earlier = run_here(tiny("moe=none", "trainer.max_steps=1",
                            f"init_from={dense.checkpoints}/step_00000004", name="w4"))  # fmt: skip
    (half,) = (row for row in read_rows(dense.metrics_path) if row["step"] == 4)
    assert first_and_last_val(earlier)[0] == half["val/loss"]


@pytest.mark.slow
def test_a_resumed_run_takes_its_own_checkpoint(
    dense: RunDir, tiny: Tiny, run_here: Callable[[Any], RunDir]
) -> None:
    cfg = tiny("moe=none", f"init_from={dense.path}", name="w")
    straight = read_rows(run_here(cfg).metrics_path)
    run = RunDir(cfg.out_dir)
    shutil.rmtree(run.checkpoints / "step_00000008")
    shutil.rmtree(dense.path)
    again = read_rows(run_here(cfg).metrics_path)
    assert [row["train/loss"] for row in again[1:]] == [row["train/loss"] for row in straight[1:]]


@pytest.mark.slow
def test_a_larger_vocabulary_keeps_the_old_rows(
    dense: RunDir, tiny: Tiny, run_here: Callable[[Any], RunDir]
) -> None:
    run = run_here(
        tiny("moe=none", "data.vocab_size=70", "trainer.max_steps=1", "schedule.warmup_steps=1",
             "optimizer.learning_rate=1e-12", "optimizer.weight_decay=0", "init_from_resize=true",
             f"init_from={dense.path}", name="wide")
    )  # fmt: skip
    old, _ = load_trained(dense.read_config(), dense, None)
    new, _ = load_trained(run.read_config(), run, None)
    assert new.embedding.weight.shape == (70, 16)
    torch.testing.assert_close(new.embedding.weight[:64], old.embedding.weight)
    assert new.embedding.weight[64:].abs().max() > 0


@pytest.mark.slow
def test_what_does_not_fit_is_reported_when_it_is_not_strict(
    dense: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fork", str(dense.path), "model.n_layers=3", "trainer.max_steps=1", "name=deep",
                 f"init_from={dense.path}", "init_from_strict=false"]) == 0  # fmt: skip
    said = capsys.readouterr().out
    assert "weights    from" in said and "no fit     missing there: blocks.2.attention" in said


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [
        ["parallelism=ddp", "launch.processes=2", "trainer.batch_size=2"],
        [
            "parallelism=fsdp",
            "launch.processes=4",
            "trainer.batch_size=1",
            "parallelism.expert_parallel=2",
        ],
    ],
    ids=["ddp", "fsdp with expert parallelism"],
)
def test_shards_start_from_a_checkpoint_of_one_process_and_back(
    finished: RunDir, layout: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    ended = first_and_last_val(finished)[1]
    assert main(["fork", "runs/run", "--weights", *layout, "trainer.eval_steps=2",
                 "trainer.max_steps=2", "name=sharded"]) == 0  # fmt: skip
    sharded = RunDir("runs/sharded")
    first, last = first_and_last_val(sharded)
    assert first == pytest.approx(ended, rel=1e-5)
    kinds = [(parent["kind"], parent["step"]) for parent in sharded.parents()]
    assert kinds == [("forked from", 8), ("continued from", 8)]
    assert main(["fork", "runs/sharded", "--weights", "parallelism=single", "launch.processes=1",
                 "trainer.batch_size=4", "trainer.max_steps=1", "name=back"]) == 0  # fmt: skip
    assert first_and_last_val(RunDir("runs/back"))[0] == pytest.approx(last, rel=1e-5)


def test_bad_weights_write_nothing(
    finished: RunDir, tiny: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("notes").mkdir()
    Path("notes/x.pt").write_bytes(b"no weights")
    torch.save([1], "notes/list.pt")
    torch.save({"epoch": 3, "model": {}}, "notes/other.pt")
    Path("hf").mkdir()
    Path("hf/config.json").write_text("{}")
    shutil.copytree(finished.path, "runs/empty")
    shutil.rmtree("runs/empty/checkpoints")
    shutil.copytree(finished.checkpoints / "step_00000008", "cut/step_00000008")
    (shard,) = Path("cut/step_00000008").glob("__0_*")
    shard.write_bytes(shard.read_bytes()[:-1])
    base = ["fork", "runs/run", "name=new"]
    before = listing()
    for words, expected in [
        (["init_from=nowhere"], "init_from=nowhere: no such file or folder"),
        (["init_from=notes"], "init_from=notes: not a run's folder, a checkpoint (step_"),
        (["init_from=notes/x.pt"], "init_from=notes/x.pt: not a file of weights that torch.load"),
        (["init_from=notes/list.pt"], "init_from=notes/list.pt: holds no named tensors"),
        (["init_from=notes/other.pt"], "init_from=notes/other.pt: holds more than named tensors"),
        (["init_from=hf"], "init_from=hf: config.json is empty or not JSON"),
        (["init_from=runs/empty"], "init_from=runs/empty: the run has no complete checkpoint"),
        (["init_from=cut/step_00000008"], "cut/step_00000008 is damaged: __0_0.distcp"),
        (["init_from=runs/run", "model.d_model=32"], "embedding.weight: (64, 16) there, (64, 32)"),
        (["init_from=runs/run", "moe.n_experts=8"], "router.weight: (4, 16) there, (8, 16) here"),
        (["init_from=runs/run", "model.n_layers=1"], "left over: blocks.1."),
        (["init_from=runs/run", "moe=none"], "missing there: blocks.0.feed_forward.swiglu"),
        (["init_from=runs/run", "data.vocab_size=70"], "init_from_resize=true takes the rows"),
        (["init_from=runs/run", "init_from_drop=0.5"], "init_from_drop=0.5: changes experts that"),
        (["init_from_noise=-1"], "init_from_noise=-1.0: must be at least 0"),
        (["init_from_drop=1"], "init_from_drop=1.0: must be between 0.0 and 0.99"),
        (
            ["--weights", "--at", "3"],
            "--at 3: runs/run has no such checkpoint; its checkpoint steps: 4, 8",
        ),
        (["--at", "4"], "--at 4: goes with --weights"),
    ]:
        assert main([*base, *words]) == 2, words
        assert expected in capsys.readouterr().err
        assert listing() == before, words
    assert main(["fork", "runs/empty", "--weights", "name=new"]) == 2
    assert "--weights: runs/empty has no such checkpoint; it has none" in capsys.readouterr().err


def test_another_tokenizer_is_refused(
    finished: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from lunaris.data.tokenizer import check_same_ids
    from lunaris.errors import UserError

    def tokenizer(name: str, *words: str) -> Path:
        model = {
            "type": "WordLevel",
            "vocab": {w: n for n, w in enumerate(words)},
            "unk_token": "a",
        }
        path = tmp_path / name
        path.write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
        return path

    short, longer = tokenizer("s.json", "a", "b"), tokenizer("l.json", "a", "b", "c")
    check_same_ids(short, longer, "x")
    check_same_ids(longer, short, "x")
    with pytest.raises(UserError, match="x: was trained with another tokenizer: the id 1 is 'b'"):
        check_same_ids(short, tokenizer("o.json", "a", "c"), "x")
