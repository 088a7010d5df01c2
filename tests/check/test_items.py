"""What `lunaris check` finds of a machine, of kernels and meshes, where something is wrong."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from lunaris.check import machine, runs, stage
from lunaris.check.communication import _fitting
from lunaris.check.drill import hang_drill
from lunaris.check.item import FAIL, OK, SKIP, Item
from lunaris.check.machine import machine_items
from lunaris.check.runs import ShortRuns
from lunaris.devices import Machine
from lunaris.runs.create import create


def by_name(items: list[Item]) -> dict[str, Item]:
    return {item.name: item for item in items}


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_this_machine_is_ready_for_a_tiny_run(tiny: Callable[..., Any]) -> None:
    found = by_name(machine_items(tiny()))
    assert set(found) == {"software", "cores", "memory", "open files", "disk", "temporary"}
    assert {item.state for item in found.values()} == {OK}
    assert found["software"].figures["torch"] == torch.__version__
    assert "checkpoint takes" in found["disk"].text


def test_what_a_machine_lacks_is_said(
    tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = tiny("launch.processes=2", "parallelism=ddp")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**6, 10**6, 1000))
    monkeypatch.setattr(resource, "getrlimit", lambda what: (256, 512))
    few = Machine([], 0, 2 * 10**9, 10**6)
    monkeypatch.setattr(machine, "this_machine", lambda: few)
    monkeypatch.setattr(machine, "visible_gpus", lambda: list("01234567"))
    cfg.trainer.device = None
    monkeypatch.setattr(machine, "memory_warning", lambda cfg: "each process will need more")
    found = by_name(machine_items(cfg))
    assert (found["disk"].state, found["memory"].state) == (FAIL, FAIL)
    assert "each process will need more" in found["memory"].text
    (files,) = found["open files"].advice
    assert files.startswith("ulimit -Hn 65536: as root")
    (processes,) = found["cores"].advice
    assert processes.startswith("launch.processes=8: the run uses 2 of 8 GPUs")
    cfg.trainer.device = "cpu"
    assert not by_name(machine_items(cfg))["cores"].advice
    monkeypatch.setattr(os, "access", lambda path, how: False)
    assert "cannot be written" in by_name(machine_items(cfg))["disk"].text


def test_an_item_survives_json_and_fits_its_line() -> None:
    item = Item("training", OK, "fast", {"tokens_per_s": 3.0}, ("trainer.compile_model=true: x",))
    assert Item.from_dict(item.as_dict()) == item
    assert item.line() == "ok    training     fast"
    assert Item("experts", OK, "", {"difference": float("inf")}).as_dict()["figures"] == {
        "difference": None
    }


@pytest.mark.parametrize(("world", "expected"), [
    (2, ["ddp", "fsdp", "ddp expert_parallel=2", "fsdp expert_parallel=2"]),
    (4, [
        "ddp", "fsdp", "ddp expert_parallel=2", "fsdp expert_parallel=2", "hsdp shard_size=2",
        "ddp expert_parallel=4", "fsdp expert_parallel=4",
    ]),
])  # fmt: skip
def test_each_parallelism_that_divides_the_processes_has_a_mesh(
    world: int, expected: list[str]
) -> None:
    found = list(_fitting(world))
    assert [name for name, _, _ in found] == expected
    assert {mesh.world_size for _, mesh, _ in found} == {world}


class Scripted(ShortRuns):
    """Runs that have made the given rows, exit codes and logs."""

    def __init__(self, cfg: Any, folder: Path, *scripts: Any, compiles: bool = False) -> None:
        super().__init__(cfg, folder, lambda: 10.0, compiles=compiles)
        self._scripts = list(scripts)

    def _run(self, name: str, keep: bool = False, **trainer: Any) -> Any:
        log = self._folder / name / "logs" / "rank_0.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        made, code, *said = self._scripts.pop(0)
        log.write_text(said[0] if said else "fp32 on cpu\nresumed    after step 3\n")
        return made, stage.Ended(code, 3.0, log)


def rows(speed: float = 100.0, loss: float | None = 2.0) -> list[dict[str, Any]]:
    return [
        {"step": step, "train/loss": loss, "train/tokens": 64 * step, "perf/tokens_per_s": speed,
         "perf/mfu": 0.4, "perf/peak_memory_gb": [0.5, 1.0]}
        for step in range(1, runs.STEPS + 1)
    ]  # fmt: skip


def test_a_short_run_says_how_fast_it_is(tiny: Callable[..., Any], tmp_path: Path) -> None:
    item = Scripted(tiny(), tmp_path, (rows(), 0)).train()
    assert item.state == OK and "100 tokens/s, 0.64 s a step of 64 tokens, MFU 40.0%" in item.text
    assert item.figures["peak_memory_gb"] == 1.0
    # As metrics.jsonl has it.
    assert Scripted(tiny(), tmp_path, (rows(loss=None), 0)).train().state == FAIL
    log = "step 4 loss 7.2\nTraceback\nRuntimeError: no such kernel\nsome hint\n"
    failed = Scripted(tiny(), tmp_path, ([], 1, log)).train()
    assert (failed.state, failed.text) == (FAIL, "RuntimeError: no such kernel")
    assert Scripted(tiny(), tmp_path, ([], -9, log)).train().text == "killed by SIGKILL"
    slow = Scripted(tiny(), tmp_path, ([], None)).train()
    assert (slow.state, slow.text) == (SKIP, "did not end within 3 s; give --seconds")


@pytest.mark.parametrize(
    ("speed", "loss", "compiles", "state", "advice"),
    [
        (150.0, 2.0, False, OK, ["trainer.compile_model=true: 1.50 times as fast here"]),
        (101.0, 2.0, False, OK, []),
        (150.0, 2.1, False, FAIL, []),
        (150.0, None, False, FAIL, []),
        (150.0, 2.0, True, OK, []),
        (50.0, 2.0, True, OK, ["trainer.compile_model=false: 2.00 times as fast here"]),
    ],
)
def test_compilation_is_advised_where_it_is_right_and_faster(
    tiny: Callable[..., Any], tmp_path: Path, speed: float, loss: float | None, compiles: bool,
    state: str, advice: list[str],
) -> None:  # fmt: skip
    short = Scripted(
        tiny("trainer.precision=fp32"),
        tmp_path,
        (rows(), 0),
        (rows(speed, loss), 0),
        compiles=compiles,
    )
    assert short.compiled().state == SKIP  # Nothing to compare with.
    assert ("not compiled" in short.train().text) == compiles
    item = short.compiled()
    assert (item.state, list(item.advice)) == (state, advice)


@pytest.mark.parametrize(("compiles", "state"), [(False, SKIP), (True, FAIL)])
def test_a_compiler_that_fails_counts_where_the_config_compiles(
    tiny: Callable[..., Any], tmp_path: Path, compiles: bool, state: str
) -> None:
    script = [(rows(), 0), ([], 1, "InductorError: no g++\n")]
    short = Scripted(tiny("trainer.precision=fp32"), tmp_path, *script, compiles=compiles)
    short.train()
    item = short.compiled()
    assert (item.state, item.text) == (state, "InductorError: no g++")


def test_the_tolerance_is_that_of_the_precision_that_the_run_took(
    tiny: Callable[..., Any], tmp_path: Path
) -> None:
    """A GPU without bf16 takes fp32, whatever a recent one would take."""
    cfg, near = tiny("trainer.precision=auto"), rows()
    near[4]["train/loss"] = 2.02  # Within what bf16 may differ by.
    for chosen, state in (("bf16", OK), ("fp32", FAIL)):
        log = f"{chosen} on cuda\nresumed    after step 3\n"
        script = [(rows(), 0, log), (rows()[:3], 0), (near, 0, log)]
        short = Scripted(cfg, tmp_path / chosen, *script)
        create(
            replace(
                cfg,
                out_dir=str(tmp_path / chosen / "whole"),
                trainer=replace(cfg.trainer, precision=chosen),
            ),
            "lunaris check",
            [],
        )
        short.train()
        assert short.resumed().state == state


GPU = "training   6 steps = 384 tokens, fp32 on\n           cuda\nresumed    after step 3\n"


def test_a_resumed_run_that_differs_fails(tiny: Callable[..., Any], tmp_path: Path) -> None:
    near, far = rows(), rows()
    near[4]["train/loss"], far[4]["train/loss"] = 2.0000001, 9.0
    for script, log, state, said in (
        (rows(), None, OK, "equal bit for bit"),
        (rows(), "from the start\n", FAIL, "the run did not continue after step 3"),
        (near, None, FAIL, "losses differ by 5.0e-08"),
        (near, GPU, OK, "as kernels that add in another order make them"),
        (far, GPU, FAIL, "losses differ by 3.5e+00"),
        (rows()[:4], GPU, FAIL, "has 4 rows, one that was not stopped 6"),
    ):
        logs = [] if log is None else [log]
        short = Scripted(
            tiny("trainer.precision=fp32"),
            tmp_path,
            (rows(), 0, *logs),
            (rows()[:3], 0),
            (script, 0, *logs),
        )
        short.train()
        item = short.resumed()
        assert item.state == state and said in item.text, item


def test_a_drill_without_a_run_to_stop_fails(
    tiny: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert hang_drill(tiny(), tmp_path, 1.0).state == SKIP
    (tmp_path / "none.log").touch()
    monkeypatch.setattr("lunaris.check.drill.run_module", lambda *args, watch: stage.Ended(
        1, 1.0, tmp_path / "none.log"
    ))  # fmt: skip
    two = tiny("launch.processes=2", "parallelism=ddp")
    assert hang_drill(two, tmp_path, 1.0).text == "no time is left; give --seconds"
    item = hang_drill(two, tmp_path, 100.0)
    assert item.state == FAIL and "no run to stop: exit code 1" in item.text


def test_processes_that_take_too_long_end_with_all_that_they_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = tmp_path / "started_by_check.py"
    module.write_text(
        "import pathlib, subprocess, sys, time\n"
        "sleep = [sys.executable, '-c', 'import time; time.sleep(60)', sys.argv[1]]\n"
        "child = subprocess.Popen(sleep, start_new_session=True)\n"
        "pathlib.Path(sys.argv[1], 'child').write_text(str(child.pid))\n"
        "time.sleep(60)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    began = time.monotonic()
    seen: list[subprocess.Popen[bytes]] = []

    def watch(process: subprocess.Popen[bytes]) -> None:
        seen.append(process)
        file = tmp_path / "run" / "child"
        if file.exists() and file.read_text():
            # It does not react to a signal before it continues.
            os.kill(int(file.read_text()), signal.SIGSTOP)

    ended = stage.run_module("started_by_check", tmp_path / "run", 3.0, watch=watch)
    assert ended.code is None and "did not end within 3 s" in ended.reason()
    assert time.monotonic() - began < 20 and seen
    child = int((tmp_path / "run" / "child").read_text())
    for _ in range(100):
        if not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text():
            break
        time.sleep(0.05)
    else:
        raise AssertionError("the child still runs")


def test_descendants_are_those_of_a_process() -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(30)"]) as child:
        assert child.pid in stage.descendants(os.getpid())
        child.kill()
    assert stage.descendants(2**22 + 1) == []
