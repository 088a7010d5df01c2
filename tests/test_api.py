"""The package from Python: light to import, the same runs as from the command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import lunaris
from lunaris.__main__ import main
from lunaris.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
TINY = [
    "data=synthetic",
    "data.n_tokens=20000",
    "data.vocab_size=64",
    "model.d_model=16",
    "model.n_layers=1",
    "model.n_heads=2",
    "model.n_kv_heads=1",
    "model.max_seq_len=16",
    "moe.n_experts=4",
    "trainer.max_steps=4",
    "trainer.batch_size=4",
    "trainer.log_interval=1",
    "trainer.eval_steps=1",
    "trainer.device=cpu",
]


def api(name: str, *args: Any, **keys: Any) -> Any:
    """Call a function of the package; three of them are modules too, which mypy takes them for."""
    return getattr(lunaris, name)(*args, **keys)


def losses(folder: str) -> list[float]:
    rows = api("metrics", folder)
    rows = rows.to_dict("records") if hasattr(rows, "to_dict") else rows
    return [row["train/loss"] for row in rows if row["step"] > 0]


def test_importing_and_composing_need_no_torch() -> None:
    script = (
        "import sys, lunaris\n"
        "print(sorted({'torch', 'hydra', 'omegaconf', 'numpy'} & sys.modules.keys()))\n"
        "lunaris.compose(['moe=top2'])\nprint('torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["[]", "False"], done.stderr


def test_training_from_python_is_training_from_the_command_line() -> None:
    """Configs of all three kinds train bit for bit as the command does, twice in one process."""
    from hydra import compose, initialize_config_module

    result = api("train", lunaris.compose([*TINY, "name=a"]))
    assert result.step == 4 and result.best_val_loss > 0
    with initialize_config_module("lunaris.conf", version_base="1.3"):
        native = compose("train", [*TINY, "name=b"])
    assert api("train", native).best_val_loss == result.best_val_loss
    assert api("train", [*TINY, "name=c"]) == result
    assert main(["train", *TINY, "name=d"]) == 0
    assert losses("runs/a") == losses("runs/b") == losses("runs/c") == losses("runs/d")
    # Done already: nothing is trained again.
    assert api("train", [*TINY, "name=a"]) == result and len(losses("runs/a")) == 4

    table = api("runs", "runs")
    rows = table.to_dict("records") if hasattr(table, "to_dict") else table
    assert [(row["name"], row["state"]) for row in rows] == [(name, "done") for name in "abcd"]


def test_rows_are_dicts_where_pandas_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    api("train", [*TINY, "name=a"])
    monkeypatch.setattr("lunaris.api.importlib.util.find_spec", lambda name: None)
    rows = api("metrics", "runs/a")
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert api("runs")[0]["state"] == "done"


def test_a_loaded_model_is_that_of_the_checkpoint() -> None:
    api("train", [*TINY, "name=a", "checkpoint.save_interval=2"])
    model, tokenizer, cfg, step = lunaris.load("runs/a", device="cpu")
    assert (tokenizer, step, model.training) == (None, 4, False)
    assert cfg.model.d_model == 16
    ids = torch.arange(8)[None]
    earlier = lunaris.load("runs/a", step=2, device="cpu")
    assert earlier.step == 2
    assert not torch.equal(model.logits(ids), earlier.model.logits(ids))
    assert torch.equal(model.logits(ids), lunaris.load("runs/a", device="cpu").model.logits(ids))


def test_bad_input_raises_the_message_of_the_command_and_writes_nothing() -> None:
    with pytest.raises(UserError, match="did you mean moe.n_experts"):
        lunaris.compose(["moe.n_expert=4"])
    with pytest.raises(UserError, match="train takes a config"):
        api("train", 3)
    for name in ("metrics", "load"):
        with pytest.raises(UserError, match="nowhere"):
            api(name, "nowhere")
    with pytest.raises(UserError, match="nowhere"):
        api("runs", "nowhere")
    assert not list(Path().iterdir())


def test_a_module_that_is_called_is_still_a_module() -> None:
    import lunaris.train as loop
    from lunaris.metrics.records import read_rows
    from lunaris.runs import run_dir

    assert callable(lunaris.train) and callable(lunaris.metrics) and callable(lunaris.runs)
    assert loop.Run.__module__ == "lunaris.train" and run_dir.RunDir and read_rows
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        lunaris.trian  # noqa: B018


@pytest.mark.slow
def test_the_notebook_runs_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a real kernel; the second time on the folders of the first."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    notebook = nbformat.read(ROOT / "docs" / "notebook.ipynb", as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=240, resources={"metadata": {"path": str(tmp_path)}}
    )
    for _ in range(2):
        client.execute()
        shown = [cell.outputs[-1] for cell in notebook.cells if cell.cell_type == "code"]
        assert "RunResult(step=20" in shown[1]["data"]["text/plain"]
        assert len(shown) == 5 and "done" in shown[4]["data"]["text/plain"]
