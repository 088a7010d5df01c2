"""The settings of a process that only trains."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest

from lunaris.launch import process

GPU = {
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    "TORCH_FR_BUFFER_SIZE": "2000",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
}


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of this machine, and none that a test leaves behind."""
    for name in [*GPU, "PYTORCH_CUDA_ALLOC_CONF", "TORCH_FR_DUMP_TEMP_FILE"]:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(process, "keep_freed_memory", lambda device: None)


def test_a_gpu_gets_what_the_environment_does_not_set(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    process.set_up_process("cuda", tmp_path)
    assert {name: os.environ[name] for name in GPU} == GPU
    assert os.environ["TORCH_FR_DUMP_TEMP_FILE"] == f"{tmp_path}/nccl_rank_"
    monkeypatch.delenv("PYTORCH_ALLOC_CONF")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:512")
    monkeypatch.delenv("TORCH_FR_BUFFER_SIZE")
    monkeypatch.delenv("TORCH_FR_DUMP_TEMP_FILE")
    monkeypatch.setenv("TORCH_NCCL_TRACE_BUFFER_SIZE", "0")
    process.set_up_process("cuda", tmp_path)
    assert "PYTORCH_ALLOC_CONF" not in os.environ and "TORCH_FR_BUFFER_SIZE" not in os.environ


def test_a_cpu_needs_none_of_it(tmp_path: Path) -> None:
    process.set_up_process("cpu", tmp_path)
    assert not any(name in os.environ for name in GPU)


def test_the_limit_of_open_files_becomes_the_hard_one() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
        process.raise_file_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (before[1], before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_system_that_refuses_keeps_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise ValueError("not allowed to raise maximum limit")

    monkeypatch.setattr(resource, "getrlimit", lambda what: (256, resource.RLIM_INFINITY))
    monkeypatch.setattr(resource, "setrlimit", refuse)
    process.raise_file_limit()
