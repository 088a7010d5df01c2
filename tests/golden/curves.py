"""Write the golden loss curves: `python tests/golden/curves.py` replaces `curves.json`.

Do that only for a change that is meant to change the numbers, and say so in its commit. The script
uses only the command line, so that older code can write the curves that newer code must follow.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import tarfile
import tempfile
from pathlib import Path

from lunaris.__main__ import main

HERE = Path(__file__).resolve().parent
STEPS = 40
SMALL = [
    "seed=7", "model.d_model=32", "model.n_layers=2", "model.n_heads=4", "model.n_kv_heads=2",
    "model.max_seq_len=32", "model.multiple_of=8", f"trainer.max_steps={STEPS}",
    "trainer.batch_size=8", "trainer.log_interval=1", "trainer.eval_interval=20",
    "trainer.eval_steps=2", "trainer.device=cpu", "trainer.precision=fp32",
    "optimizer=adamw", "optimizer.learning_rate=5e-3", "schedule.warmup_steps=5",
]  # fmt: skip
DATA = {
    "synthetic": ["data=synthetic", "data.n_tokens=40000", "data.vocab_size=64"],
    "text": ["data=shards", "data.dir=shards"],
}
MODELS = {
    "dense": ["moe=none"],
    "switch": ["moe=switch", "moe.n_experts=4"],
    # The default of runs before version 3 of the config.
    "switch_sequence": ["moe=switch", "moe.n_experts=4", "moe.balance_scope=sequence"],
    "fine_grained_softmax": [
        "moe=fine_grained",
        "moe.n_experts=8",
        "moe.n_experts_per_token=2",
        "moe.expert_hidden_multiplier=1.0",
        "moe/router=softmax",
        "moe.router_z_loss_weight=0.001",
    ],
    "fine_grained": [
        "moe=fine_grained",
        "moe.n_experts=8",
        "moe.n_experts_per_token=2",
        "moe.expert_hidden_multiplier=1.0",
    ],
}
CURVES = {f"{m}-{d}": [*SMALL, *MODELS[m], *DATA[d]] for m in MODELS for d in DATA}


def curve(name: str) -> dict[str, list[float]]:
    """Train the run `name` in the current folder; return its losses (nats a token).

    train: [STEPS] the main loss of every step; val: the validation loss at steps 0, 20 and 40.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        code = main(["train", *CURVES[name], f"name={name}"])
    assert code == 0
    rows = [json.loads(x) for x in Path("runs", name, "metrics.jsonl").read_text().splitlines()]
    return {
        "train": [row["train/main_loss"] for row in rows if "train/main_loss" in row],
        "val": [row["val/loss"] for row in rows if "val/loss" in row],
    }


def write(path: Path) -> None:
    """Train every run in a temporary folder and write its curve into one JSON file."""
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        with tarfile.open(HERE / "runs_v1.tar.xz") as tar:
            tar.extractall(filter="data")
        lines = [f" {json.dumps(name)}: {json.dumps(curve(name))}" for name in CURVES]
        path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["LUNARIS_CONFIG_DIR"] = ""
    write(Path(sys.argv[1] if len(sys.argv) > 1 else HERE / "curves.json").resolve())
