"""Time of a preparation by a job array against one process: wall clock, CPU seconds, bytes.

    python tests/benchmarks/prepare_array.py [--mb 60] [--tasks 4]

Starts a cluster of one node a task on this machine (needs root and `make cluster`), prepares the
same JSON lines by one process and by the array and its merging, and compares the shards. CPU
seconds are those of the python processes, starts included. The nodes share this machine's cores.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from prepare import documents, make_tokenizer, write_corpus

# Each process writes the CPU seconds that it and its children took, under its role.
_CLOCK = """
import atexit, os
def note():
    role = "here" if "SLURM_JOB_ID" not in os.environ else (
        "task" if "SLURM_ARRAY_TASK_ID" in os.environ else "merging")
    if "SLURM_JOB_ID" in os.environ and "SLURM_PROCID" not in os.environ:
        return
    used = sum(os.times()[:4])
    with open(os.environ["CPU_SECONDS"], "a") as file:
        file.write(f"{role} {used}\\n")
atexit.register(note)
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--mb", type=float, default=60, help="text")
    parser.add_argument("--tasks", type=int, default=4)
    args = parser.parse_args()
    module = _cluster_module()
    reason = module.missing_packages(accounting=False)
    if reason:
        raise SystemExit(reason)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        make_tokenizer()
        texts = documents(int(args.mb * 1e6))
        write_corpus("jsonl", texts)
        Path("site").mkdir()
        Path("site/sitecustomize.py").write_text(_CLOCK)
        cluster = module.Cluster(Path(folder, "cluster"), nodes=args.tasks)
        cluster.start()
        try:
            compare(cluster, args.tasks, sum(map(len, texts)))
        finally:
            cluster.stop()


def compare(cluster: Any, tasks: int, size: int) -> None:
    env = cluster.env | {"PYTHONPATH": str(Path("site").absolute()), "OMP_NUM_THREADS": "1"}
    one, one_cpu = prepare("one", ["data.processes=1"], env)
    jobs = ["launch=slurm", f"launch.array_tasks={tasks}", "launch.wait=true"]
    # One task a node, as on a cluster whose tasks fill their nodes.
    array, cpu = prepare("array", [*jobs, "launch.exclusive=true"], env)
    same = shards("one") == shards("array")
    load = os.getloadavg()[0]
    print(
        f"{size / 1e6:.1f} MB of text, {os.cpu_count()} cores, load {load:.1f}; same bytes: {same}"
    )
    print(f"one process     {one:6.1f} s, {one_cpu['here']:6.1f} s of CPU")
    shown = ", ".join(f"{role} {seconds:.1f}" for role, seconds in cpu.items())
    print(f"{tasks} tasks, merged {array:6.1f} s, {sum(cpu.values()):6.1f} s of CPU ({shown})")
    print(f"of the job that merges: {merging('array'):.1f} s by its own clock")


def prepare(folder: str, keys: list[str], env: dict[str, str]) -> tuple[float, dict[str, float]]:
    """Prepare the corpus; return the seconds, and the CPU seconds by role."""
    clock = Path(f"{folder}.cpu").absolute()
    command = [
        *(sys.executable, "-m", "lunaris", "prepare", "data=text", f"data.dir={folder}"),
        *("data.files=[corpus.jsonl]", "data.tokenizer=tokenizer.json", *keys),
    ]
    began = time.perf_counter()
    subprocess.run(command, env=env | {"CPU_SECONDS": str(clock)}, check=True, stderr=sys.stderr)
    seconds = time.perf_counter() - began
    time.sleep(1)  # The last job ends after its state is written.
    used: dict[str, float] = {}
    for line in clock.read_text().splitlines():
        role, value = line.split()
        used[role] = used.get(role, 0) + float(value)
    return seconds, used


def merging(folder: str) -> float:
    logs = "".join(path.read_text() for path in Path(folder, "logs/slurm").glob("*_log.out"))
    found = re.search(r"vocabulary [\d,]+ \(([\d.]+) s\)", logs)
    assert found, logs
    return float(found[1])


def shards(folder: str) -> dict[str, bytes]:
    kept = [*Path(folder).glob("*.npy"), Path(folder, "manifest.json")]
    return {path.name: path.read_bytes() for path in kept}


def _cluster_module() -> Any:
    path = Path(__file__).resolve().parents[1] / "slurm" / "cluster.py"
    spec = importlib.util.spec_from_file_location("slurm_cluster", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main()
