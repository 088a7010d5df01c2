"""Write the archive of run folders that later code must be able to continue.

    python tests/golden/write_runs.py tests/golden/runs_vN.tar.xz

The installed code writes the folders. Every run trains once to its end, which gives
`expected.json`, and once more until a SIGTERM in its sixth step, which gives the folder. The script
uses only the command line and `lunaris.train.train_step`, so that it works with older and newer
code.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import platform
import shutil
import signal
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import lunaris.train
from lunaris.__main__ import main

SMALL = [
    "model.d_model=8", "model.n_layers=1", "model.n_heads=2", "model.n_kv_heads=1",
    "model.max_seq_len=16", "model.multiple_of=8", "model.ffn_hidden_multiplier=1.5",
    "trainer.max_steps=8", "trainer.batch_size=4", "trainer.log_interval=1",
    "trainer.eval_interval=4", "trainer.eval_steps=2", "trainer.device=cpu",
    "optimizer.learning_rate=1e-2", "schedule.warmup_steps=2", "checkpoint.keep_last=1",
]  # fmt: skip
SYNTHETIC = ["data=synthetic", "data.n_tokens=4000", "data.vocab_size=64"]
EXPERTS = ["moe.n_experts=4", "moe.expert_hidden_multiplier=1.5"]
RUNS = {
    "dense": [
        *SYNTHETIC, "moe=none", "model.norm=pre", "model.dropout=0.1",
        "trainer.gradient_accumulation_steps=2", "trainer.batch_size=2", "schedule=wsd",
    ],
    "switch": [*SYNTHETIC, "moe=switch", *EXPERTS, "moe.capacity_factor=1.0"],
    "fine_grained": [
        *SYNTHETIC, "moe=fine_grained", *EXPERTS, "moe.n_experts_per_token=2", "model.n_layers=2",
        "moe.first_dense_layers=1", "optimizer=muon",
    ],
    "wandb": [
        *SYNTHETIC, "moe=none", "trainer.precision=fp16", "logger=wandb", "logger.mode=disabled",
        "logger.project=golden",
    ],
    "text": ["data=shards", "data.dir=shards", "data.document_masking=true", "moe=top2", *EXPERTS],
}  # fmt: skip
GENERATE = ["--prompt", "The ", "--max-new-tokens", "16", "--seed", "3"]
SWEEP = [*SYNTHETIC, "moe=none", *SMALL]


def call(*argv: str) -> str:
    """Run one command and return what it printed. Raises RuntimeError when it fails."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = main(list(argv))
    if code not in (0, 3):
        raise RuntimeError(f"lunaris {' '.join(argv)} returned {code}")
    return out.getvalue()


def exact(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a run without what depends on the machine's speed."""
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in rows]


@contextlib.contextmanager
def stopped_in_step_6() -> Iterator[None]:
    """Send this process SIGTERM in the sixth step of a run."""
    real: Callable[..., Any] = lunaris.train.train_step

    def step(run: Any, batch: Any) -> Any:
        if run.state.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(run, batch)

    lunaris.train.train_step = step
    try:
        yield
    finally:
        lunaris.train.train_step = real


def corpus() -> None:
    """Prepare the shards in `shards/` from generated sentences: a vocabulary of 270."""
    words = "the a red old small dog cat bird tree house sees finds likes leaves under over".split()
    number, lines = 1, []
    for _ in range(120):
        sentence = []
        for _ in range(6):
            number = number * 1103515245 + 12345 & 0x7FFFFFFF
            sentence.append(words[number >> 16 & 15])
        lines.append(" ".join(sentence).capitalize() + ".")
    documents = ["\n".join(lines[i : i + 4]) for i in range(0, len(lines), 4)]
    Path("corpus.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in documents))
    call(
        "prepare", "data=text", "data.dir=shards", "data.files=corpus.jsonl", "data.vocab_size=270",
        "data.val_fraction=0.2", "data.processes=1",
    )  # fmt: skip
    shutil.rmtree("shards/.prepare", ignore_errors=True)


def write_run(name: str, out: Path) -> None:
    """Write one run's folder and what the code makes of it."""
    overrides = [*SMALL, *RUNS[name], f"name={name}"]
    folder = Path("runs", name)
    call("train", *overrides)
    rows = exact(folder)
    shutil.rmtree(folder)
    with stopped_in_step_6():
        call("train", *overrides)
    expected: dict[str, Any] = {"rows": rows}
    expected["evaluate"] = json.loads(call("evaluate", str(folder), "--json"))
    if (folder / "tokenizer.json").is_file():
        expected["generate"] = call("generate", str(folder), *GENERATE)
    keep(folder, out / "runs" / name)
    write_json(out / "runs" / name / "expected.json", expected)


def write_sweep(out: Path) -> None:
    """Write a sweep of two points, one done and one stopped."""
    call("train", "-m", *SWEEP, "seed=1,2", "name=pair")
    point = Path("sweeps/pair/seed=2")
    rows = exact(point)
    for part in ("checkpoints", "metrics.jsonl", "loss.png"):
        path = point / part
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    write_json(point / "status.json", {"state": "queued", "step": 0, "attempts": 0, "max_steps": 8})
    with stopped_in_step_6():
        call("resume", str(point))
    keep(Path("sweeps/pair"), out / "sweeps" / "pair")
    write_json(out / "sweeps/pair/seed=2/expected.json", {"rows": rows})


def machine() -> dict[str, str]:
    """Return what the last bits of a number depend on: torch's version and the processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    found = {key.strip(): value.strip() for key, _, value in (x.partition(":") for x in lines)}
    names = ("vendor_id", "cpu family", "model", "model name")
    processor = " ".join(found[name] for name in names if name in found) or platform.processor()
    capability = torch.backends.cpu.get_cpu_capability()
    return {"torch": torch.__version__, "processor": f"{processor}, {capability}"}


def keep(folder: Path, to: Path) -> None:
    """Copy a folder without locks, logs and pictures, and without the machine's names."""
    unwanted = shutil.ignore_patterns("*.lock", ".lock", "logs", "loss.png", "wandb")
    shutil.copytree(folder, to, ignore=unwanted)
    for path in to.rglob("provenance.json"):
        facts = json.loads(path.read_text())
        for part in (facts, *facts["attempts"], *facts.get("earlier", [])):
            part.update({k: "." for k in ("host", "cwd", "platform") if k in part})
        write_json(path, facts)


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")


def write_all(out: Path) -> None:
    """Write the corpus, every run and the sweep into `out`."""
    torch.set_num_threads(1)
    corpus()
    shutil.copytree("shards", out / "shards", ignore=shutil.ignore_patterns("*.lock", ".lock"))
    for name in RUNS:
        write_run(name, out)
    write_sweep(out)
    write_json(out / "machine.json", machine())


if __name__ == "__main__":
    archive = Path(sys.argv[1]).resolve()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        os.environ["LUNARIS_CACHE"] = f"{folder}/cache"
        write_all(Path(folder, "out"))
        with tarfile.open(archive, "w:xz") as tar:
            tar.add("out", arcname=".")
