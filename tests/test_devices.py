"""What nvidia-smi says of the GPUs of a machine."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from lunaris import devices


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, gpus: str, capability: str) -> None:
    """Put an nvidia-smi onto the path that answers so."""
    file = folder / "nvidia-smi"
    file.write_text(f"#!/bin/sh\ncase $1 in *compute_cap) {capability};; *) {gpus};; esac\n")
    file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


@pytest.mark.parametrize(
    ("capability", "bf16"),
    [
        ("echo 7.5", False),
        ("echo 9.0; echo 7.5", False),
        ("echo 8.0", True),
        ("echo 12.0", True),
        # Of a driver that does not know the field.
        ("echo 'Field compute_cap is not a valid field to query.'; exit 2", True),
    ],
)
def test_gpus_that_compute_bf16_are_known_by_their_capability(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capability: str, bf16: bool
) -> None:
    install(tmp_path, monkeypatch, "echo 'Tesla T4, 15360'; echo 'Tesla T4, 15109'", capability)
    found = devices.this_machine()
    assert (found.gpus, found.gpu_memory) == (["Tesla T4"] * 2, 15109 << 20)
    assert found.bf16 == bf16


def test_an_nvidia_smi_that_does_not_work_shows_no_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch, "echo 'Failed, to communicate'; exit 9", "exit 9")
    assert devices.this_machine().gpus == []


@pytest.mark.parametrize(
    ("named", "apart", "found"),
    [
        ("0,1,2,3", False, ["0", "1"]),
        ("1", False, ["1"]),
        ("NoDevFiles", False, []),
        ("MIG-a,MIG-b", False, ["MIG-a"]),
        # Points of a sweep, each of which is given one of them.
        ("MIG-a,MIG-b", True, ["MIG-a", "MIG-b"]),
        ("GPU-a,GPU-b,GPU-c", False, ["GPU-a", "GPU-b", "GPU-c"]),
    ],
)
def test_no_more_gpus_are_visible_than_a_process_can_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str, apart: bool, found: list[str]
) -> None:
    install(tmp_path, monkeypatch, "echo 'Tesla T4, 15360'; echo 'Tesla T4, 15109'", "echo 7.5")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert devices.visible_gpus(apart=apart) == found


def test_without_an_nvidia_smi_the_indices_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    assert devices.visible_gpus() == ["0", "1", "2"]


def test_an_nvidia_smi_that_never_answers_is_asked_once_and_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(tmp_path, monkeypatch, "exec sleep 60", "exit 1")
    monkeypatch.setattr(devices, "_ANSWER_S", 0.5)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    killed: list[int] = []
    # A driver may hold it, so that it does not die.
    monkeypatch.setattr(subprocess.Popen, "kill", lambda self: killed.append(self.pid))
    try:
        assert devices.this_machine().gpus == []
        assert devices.visible_gpus() == ["0", "1"]
    finally:
        for pid in killed:
            os.kill(pid, signal.SIGKILL)
    assert len(killed) == 1
    error = capsys.readouterr().err
    assert error.count("warning: nvidia-smi does not answer within 0.5 s") == 1


def test_an_nvidia_smi_that_cannot_be_started_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(tmp_path, monkeypatch, "", "")
    (tmp_path / "nvidia-smi").write_text("#!/not/there\n")
    assert devices.this_machine().gpus == []
    assert "warning: nvidia-smi cannot be started: " in capsys.readouterr().err
