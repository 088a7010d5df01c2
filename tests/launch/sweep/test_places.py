"""Which points of a sweep have room on a machine, and the GPUs and cores that each gets."""

from __future__ import annotations

import os
from typing import Any

import pytest

from lunaris import devices
from lunaris.config.schema.launch import LocalLaunchConfig
from lunaris.config.schema.root import Config
from lunaris.launch.local import threads_each
from lunaris.launch.sweep.places import Places


def config(device: str | None = None, **launch: int) -> Config:
    cfg = Config(launch=LocalLaunchConfig(**launch))
    cfg.trainer.device = device
    return cfg


def taking(places: Places, cfg: Any, names: str) -> list[str | None]:
    """Return the GPUs that each point of that name gets, None for one without room."""
    given = [places.take(name, cfg) for name in names]
    return [None if each is None else each.get("CUDA_VISIBLE_DEVICES", "") for each in given]


@pytest.mark.parametrize(
    ("named", "found"),
    [
        (None, ["0", "1"]),
        ("2,5", ["2", "5"]),
        (" GPU-8a, MIG-b ", ["GPU-8a", "MIG-b"]),
        ("0,0,-1,1", ["0"]),
        ("-1", []),
        ("", []),
    ],
)
def test_the_visible_gpus_are_those_that_the_variable_names_or_all(
    monkeypatch: pytest.MonkeyPatch, named: str | None, found: list[str]
) -> None:
    machine = devices.Machine(["NVIDIA H100"] * 2, 80, 1, 1)
    monkeypatch.setattr(devices, "this_machine", lambda: machine)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if named is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert devices.visible_gpus() == found


@pytest.mark.parametrize(
    ("gpus", "cfg", "given", "at_once"),
    [
        # Each point has GPUs of its own.
        ("4,5,6", config(), ["4", "5", "6", None], 3),
        ("0,1,2,3,4", config(processes=2), ["0,1", "2,3", None, None], 2),
        ("0,1", config(points_at_once=1), ["0", None, None, None], 1),
        # More points than GPUs share them evenly; a run of too many processes refuses itself.
        ("0,1", config(points_at_once=3), ["0", "1", "0", None], 3),
        ("0,1", config(processes=4), ["0,1", None, None, None], 1),
        # No GPU, or none that is wanted.
        ("", config(), ["", None, None, None], 1),
        ("", config(points_at_once=2), ["", "", None, None], 2),
        ("0,1", config("cpu"), ["", None, None, None], 1),
        ("0,1", config("cpu", points_at_once=3), ["", "", "", None], 3),
    ],
)
def test_points_have_room_as_long_as_there_are_gpus_or_as_many_as_were_asked_for(
    monkeypatch: pytest.MonkeyPatch,
    gpus: str,
    cfg: Config,
    given: list[str | None],
    at_once: int,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    places = Places()
    assert taking(places, cfg, "abcd") == given
    assert places.at_once(cfg) == at_once


def test_a_place_that_is_free_again_is_given_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    places, one, two = Places(), config(), config(processes=2)
    assert taking(places, one, "ab") == ["0", "1"]
    # One GPU is left, which is not enough.
    assert taking(places, two, "c") == [None]
    places.free("a")
    assert taking(places, two, "c") == ["0,2"]
    places.free("b")
    assert taking(places, one, "d") == ["1"]


@pytest.mark.parametrize(
    ("cfg", "processes"),
    [(config(points_at_once=2), 2), (config(points_at_once=2, processes=3), 6)],
)
def test_points_that_run_at_once_share_the_cores(
    monkeypatch: pytest.MonkeyPatch, cfg: Config, processes: int
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("OMP_NUM_THREADS")
    if hasattr(os, "sched_getaffinity"):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)))
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    assert threads_each(processes) == 12 // processes and threads_each(100) == 1
    assert Places().take("a", cfg) == {"OMP_NUM_THREADS": str(12 // processes)}
    # One point at a time has all cores, and a number of threads that is given stays.
    assert Places().take("a", config()) == {}
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert Places().take("a", cfg) == {}
