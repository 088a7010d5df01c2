"""Write the first losses of every option: `python tests/golden/options.py [GROUP=OPTION ...]`.

With arguments it writes only those options and keeps the others in `options.json`; without, all.
Like `curves.py` it uses only the command line.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path

from lunaris.__main__ import main

HERE = Path(__file__).resolve().parent
SMALL = [
    "model.d_model=16", "model.n_layers=2", "model.n_heads=2", "model.n_kv_heads=1",
    "model.max_seq_len=16", "model.multiple_of=8", "trainer.max_steps=8", "trainer.batch_size=4",
    "trainer.log_interval=1", "trainer.eval_interval=4", "trainer.eval_steps=2",
    "trainer.device=cpu", "optimizer.learning_rate=3e-2", "schedule.warmup_steps=1",
]  # fmt: skip
# Options that train elsewhere: on SLURM, as the option that they become, on text that is prepared
# first, or on the text of the Python that runs the tests, whose losses differ from one version to
# the next.
ELSEWHERE = {
    "launch=slurm", "parallelism=auto", "data=text", "data=hf", "data=shards", "data=stdlib",
}  # fmt: skip
NOT_OPTIONS = {"experiment", "hydra"}
# Values of a key that choose other code, as an option does.
VALUES = [
    "model.activation=geglu",
    "model.activation=relu2",
    "attention.output_gate=true",
    "attention.sinks=true",
    "moe.balance_scope=sequence",
]
# What an option needs so that it changes the numbers of so small a model, or fits it.
MORE = {
    "attention=sliding_window": ["attention.window=4", "attention.full_every=2"],
    "attention=mla": ["model.norm=pre", "model.n_kv_heads=2", "optimizer.learning_rate=3e-3"],
}


def options() -> list[str]:
    """Return GROUP=OPTION of every option file of the config tree, sorted, and VALUES."""
    import lunaris.conf

    root = Path(str(lunaris.conf.__file__)).parent
    files = [path.relative_to(root) for path in sorted(root.glob("*/**/*.yaml"))]
    return [
        f"{file.parent.as_posix()}={file.stem}"
        for file in files
        if file.parts[0] not in NOT_OPTIONS
    ] + VALUES


def overrides(option: str) -> list[str]:
    """Return the overrides of a tiny run with the option."""
    tiny = list(SMALL)
    if not option.startswith("data="):
        tiny += ["data=synthetic"]
    if option != "data=stdlib":
        tiny += ["data.n_tokens=20000", "data.vocab_size=64"]
    if not option.startswith("moe="):
        tiny += ["moe=switch"]
    if not option.startswith("optimizer="):
        tiny += ["optimizer=adamw"]
    if option != "moe=none":
        tiny += ["moe.n_experts=4"]
    return [option, *tiny, *MORE.get(option, []), f"name={_name(option)}"]


def _name(option: str) -> str:
    return option.replace("/", ".").replace("=", ".")


def losses(option: str) -> list[float]:
    """Train eight steps with the option in the current folder.

    Returns [9] the loss of every step, and the validation loss at the end (nats a token).
    """
    with contextlib.redirect_stdout(io.StringIO()):
        code = main(["train", *overrides(option)])
    assert code == 0
    path = Path("runs", _name(option), "metrics.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [row["train/loss"] for row in rows[1:]] + [rows[-1]["val/loss"]]


def write(path: Path, chosen: list[str]) -> None:
    """Write the losses of the chosen options, or of all, into `path`."""
    found = json.loads(path.read_text()) if chosen else {}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        os.environ["TRACKIO_DIR"] = folder
        for option in chosen or [option for option in options() if option not in ELSEWHERE]:
            found[option] = losses(option)
    lines = [f" {json.dumps(option)}: {json.dumps(found[option])}" for option in sorted(found)]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    os.environ["WANDB_MODE"] = "offline"
    write(HERE / "options.json", sys.argv[1:])
