"""Where `lunaris check` finds that the host waits for a GPU, with a GPU that is not there."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lunaris.check import waits
from lunaris.check.group import ITEMS, look_in_processes
from lunaris.check.item import OK, SKIP
from lunaris.check.steps import MODULE, looks
from lunaris.check.waits import host_waits
from lunaris.distributed import session
from lunaris.optim.clip import clip_grad_norm
from lunaris.runs.create import create


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A session on a GPU; the modes that torch was asked for."""
    modes: list[str] = []
    monkeypatch.setattr(session, "device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    return modes


def wait() -> None:
    warnings.warn("called a synchronizing CUDA operation (Triggered at …)", stacklevel=1)


def test_every_wait_is_counted_at_the_line_that_causes_it(
    gpu: list[str], tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def local_part(tensor: torch.Tensor) -> torch.Tensor:
        wait()
        return tensor

    # Called by the package; of this file as of torch the stack says nothing.
    monkeypatch.setattr(waits, "_TORCH", Path(__file__).parent)
    monkeypatch.setattr("lunaris.optim.clip.local_part", local_part)
    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)

    def step() -> None:
        warnings.warn("something else", stacklevel=1)
        for _ in range(2):
            clip_grad_norm([weight], None)

    item = host_waits(tiny(), step)
    assert gpu == ["warn", "default"] and item.state == OK
    assert item.figures["waits"] == 2, item
    (place,) = item.figures["places"]
    assert place.startswith("lunaris/optim/clip.py:") and f"{place} (2)" in item.text


@pytest.mark.parametrize(
    ("file", "passes"),
    [
        ("site-packages/lunaris/optim/clip.py", False),
        ("site-packages/lunaris/checkpoint.py", False),
        ("site-packages/lunaris/check/steps.py", True),
        ("site-packages/torch/optim/adam.py", True),
        ("site-packages/torchvision/ops.py", False),
        ("dist-packages/custom/model.py", False),
        ("contextlib.py", True),
    ],
)
def test_a_package_below_the_standard_library_is_not_part_of_it(
    monkeypatch: pytest.MonkeyPatch, file: str, passes: bool
) -> None:
    """As where the package is installed into a Python without a virtual environment."""
    library = Path("/usr/lib/python3.11")
    monkeypatch.setattr(waits, "_STDLIB", library)
    monkeypatch.setattr(waits, "_TORCH", library / "site-packages" / "torch")
    monkeypatch.setattr(waits, "_PACKAGE", library / "site-packages" / "lunaris")
    assert waits._passes_on(str(library / file)) == passes
    assert not waits._passes_on("/usr/lib/python3.11x/model.py")


def test_waits_of_custom_code_and_of_expert_parallelism_are_advised_on(
    gpu: list[str], tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = tiny("parallelism=ddp", "parallelism.expert_parallel=2", "launch.processes=2")
    item = host_waits(cfg, wait)
    assert len(item.advice) == 1 and "code that is not of this package" in item.advice[0]
    assert Path(__file__).name in item.text
    monkeypatch.setattr(waits, "_caller", lambda: "lunaris/moe/dispatch.py:3")
    assert host_waits(cfg, wait).advice[0].startswith("parallelism.expert_parallel=1")
    assert not host_waits(tiny(), wait).advice
    assert "does not wait" in host_waits(cfg, lambda: None).text


def test_steps_are_looked_at_after_the_run_is_built(
    tiny: Callable[..., Any], tmp_path: Path
) -> None:
    cfg = tiny()
    create(cfg, "lunaris check", [])
    path = Path(cfg.out_dir)
    assert look_in_processes(path, MODULE, looks) == 0
    found = json.loads((path / ITEMS).read_text())
    assert found["doing"] is None
    items = {item["name"]: item for item in found["items"]}
    assert list(items) == ["waits", "exposed", "micro-batch"]
    assert {item["state"] for item in items.values()} == {SKIP}
    assert "needs a GPU" in items["waits"]["text"] and "needs a GPU" in items["micro-batch"]["text"]
    assert "one process exchanges nothing" in items["exposed"]["text"]
