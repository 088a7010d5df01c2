"""What nvidia-smi says of the GPUs of a machine."""

from __future__ import annotations

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
