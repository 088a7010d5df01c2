"""Time from Enter to the prompt when a run or a sweep is sent, and what it is made of.

    python tests/benchmarks/submit.py [--points 100] [--repeat 3]

Starts a cluster of one node on this machine (needs root and `make cluster`), holds all jobs, and
prints the wall-clock time of each command and a profile by part: processes' start and imports,
composing and checking, freezing folders, copying the code, and sbatch. Of the sweep also the time
of `lunaris runs`, and the files that it has made.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

_PARTS = """
import contextlib, functools, importlib, sys, time
began = time.perf_counter()
spent = {}
def timed(module, name, label):
    owner = importlib.import_module(module)
    *path, last = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    before = getattr(owner, last)
    @functools.wraps(before)
    def call(*args, **keys):
        start = time.perf_counter()
        try:
            return before(*args, **keys)
        finally:
            spent[label] = spent.get(label, 0) + time.perf_counter() - start
    setattr(owner, last, call)
import lunaris.launch.sweep.slurm_array
timed("lunaris.config.compose", "Composer.compose", "compose and check")
timed("lunaris.launch.sweep.points", "create", "freeze folders")
timed("lunaris.launch.slurm", "create", "freeze folders")
timed("lunaris.launch.snapshot", "take", "copy the code")
timed("submitit.core.utils", "CommandFunction.__call__", "sbatch")
timed("lunaris.launch.slurm", "_mark_queued", "note in the folders")
timed("lunaris.runs.run_dir", "RunDir.write_status", "of which status.json")
imported = time.perf_counter()
from lunaris.__main__ import main
with contextlib.redirect_stdout(sys.stderr):
    assert main(sys.argv[1:]) == 0
total = time.perf_counter() - began
print(f"  {'imports':<22} {imported - began:7.3f} s")
for label, seconds in spent.items():
    print(f"  {label:<22} {seconds:7.3f} s")
print(f"  {'in the process':<22} {total:7.3f} s")
"""


def main() -> None:
    """Measure both submissions and print them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--points", type=int, default=100)
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    seeds = ",".join(str(seed) for seed in range(args.points))
    held = ["launch=slurm", "launch.additional_parameters.hold=true", "data=synthetic"]
    with tempfile.TemporaryDirectory() as folder:
        cluster = _cluster(Path(folder) / "cluster")
        cluster.start()
        os.environ["SLURM_CONF"] = str(cluster.conf)
        os.chdir(folder)
        try:
            _measure("one run", ["train", *held], args.repeat)
            _measure(f"{args.points} points", ["train", "-m", *held, f"seed={seeds}"], args.repeat)
            _look(Path("sweeps/run0"), args.points)
        finally:
            cluster.stop()


def _measure(label: str, command: list[str], repeat: int) -> None:
    walls = []
    for i in range(repeat):
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "lunaris", *command, f"name=run{i}"],
            check=True, capture_output=True,
        )  # fmt: skip
        walls.append(time.perf_counter() - start)
    print(
        f"{label}: {statistics.median(walls):.2f} s from Enter to the prompt (median of {repeat})"
    )
    done = subprocess.run(
        [sys.executable, "-c", _PARTS, *command, "name=parts"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    print(done.stdout, end="", flush=True)


def _look(sweep: Path, points: int) -> None:
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "lunaris", "runs", str(sweep), "--json"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    states = {row["state"] for row in json.loads(done.stdout)}
    files = [path for path in sweep.rglob("*") if path.is_file()]
    code = sum(path.is_relative_to(sweep / "code") for path in files)
    print(
        f"lunaris runs: {seconds:.2f} s, {points} points {'/'.join(sorted(states))}\n"
        f"files: {(len(files) - code) / points:.1f} a point, and {code} of the code once"
    )


def _cluster(folder: Path) -> Any:
    path = Path(__file__).parents[1] / "slurm" / "cluster.py"
    spec = importlib.util.spec_from_file_location("slurm_cluster", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Cluster(folder, nodes=1, max_array_size=1001)


if __name__ == "__main__":
    main()
