"""The planned peak of a process against live tensors and resident memory, for several shapes.

    python tests/benchmarks/memory.py [OVERRIDE …]

Each shape trains two steps on a CPU, in a process of its own. `live` is the peak of all tensors by
torch's MemTracker, `resident` the growth of the process's peak resident memory over what it was
after a tiny model had trained, in a second run without the tracker. The ratios are plan / measured.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

SHAPES = [
    "moe=none",
    "moe=switch",
    "moe=top2 model.d_model=256",
    "moe=fine_grained",
    "moe=none attention=mla model.norm=pre model.n_kv_heads=4 model.d_model=256",
    "moe=switch model.d_model=512 trainer.batch_size=1",
    "moe=none trainer.activation_checkpointing=full model.d_model=256",
    "optimizer=muon model.d_model=384 trainer.batch_size=1",
    "trainer.gradient_accumulation_steps=2 model.d_model=256",
    "moe=switch objective=multi_token",
]
DATA = ["data=synthetic", "data.vocab_size=4096"]


def train(cfg: Any, vocab_size: int, tracker: Any = None) -> None:
    """Take two steps on random tokens, under a MemTracker where there is one."""
    from contextlib import nullcontext

    import torch

    from lunaris.config.instantiate import instantiate_component
    from lunaris.optim.clip import clip_grad_norm
    from lunaris.run import bare_model

    model = bare_model(cfg, vocab_size)
    model.to_empty(device="cpu")
    model.init_weights(1)
    objective: Any = instantiate_component("objective", cfg.objective)
    made = instantiate_component("optimizer", cfg.optimizer, model=model, router_lr_scale=1.0)
    optimizer: Any = made
    if tracker is not None:
        tracker.track_external(model, optimizer)
    shape = (cfg.trainer.batch_size, cfg.model.max_seq_len)
    with tracker or nullcontext():
        for _ in range(2):
            for _ in range(cfg.trainer.gradient_accumulation_steps):
                if tracker is not None:
                    tracker.reset_mod_stats()
                batch = {name: torch.randint(0, 64, shape) for name in ("tokens", "targets")}
                objective(model, batch).total.backward()
            clip_grad_norm(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()


def measure(overrides: list[str], how: str) -> dict[str, float]:
    """Return the planned and the measured peak in bytes."""
    import torch

    from lunaris.config.compose import compose
    from lunaris.planning.plan import make_plan

    cfg = compose([*DATA, *overrides])
    planned = make_plan(cfg, gpu=False).memory.peak
    if how == "live":
        from torch.distributed._tools.mem_tracker import MemTracker

        tracker = MemTracker()
        train(cfg, 4096, tracker)
        peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
        return {"planned": planned, "measured": peak}
    small = replace(cfg.model, d_model=32, n_layers=1, n_heads=4, n_kv_heads=4, max_seq_len=16)
    train(replace(cfg, model=small, trainer=replace(cfg.trainer, batch_size=1)), 64)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = _resident("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    train(cfg, 4096)
    return {"planned": planned, "measured": _resident("VmHWM") - before}


def _resident(name: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))


def main() -> None:
    """Print a line for each shape, or for the one of the command line."""
    if len(sys.argv) > 2 and sys.argv[1] in ("live", "resident"):
        print(json.dumps(measure(sys.argv[2:], sys.argv[1])))
        return
    print(f"{'planned':>10} {'live':>10} ratio {'resident':>10} ratio  shape")
    for shape in [" ".join(sys.argv[1:])] if len(sys.argv) > 1 else SHAPES:
        found = []
        for how in ("live", "resident"):
            command = [sys.executable, __file__, how, *shape.split()]
            env = os.environ | {"OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
            found.append(json.loads(done.stdout.splitlines()[-1]))
        live, resident = found
        columns = [f"{live['planned'] / 2**20:>6.0f} MiB"]
        for row in (live, resident):
            ratio = row["planned"] / row["measured"]
            columns.append(f"{row['measured'] / 2**20:>6.0f} MiB {ratio:.3f}")
        print(" ".join(columns), f" {shape}", flush=True)


if __name__ == "__main__":
    main()
