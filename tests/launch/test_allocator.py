"""The allocator's settings: freed memory is used again without new page faults, on a CPU alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CHILD = """
import resource, sys
from lunaris.launch.allocator import keep_freed_memory
keep_freed_memory({"null": None}.get(sys.argv[1], sys.argv[1]))
for _ in range(20):
    block = bytearray(64 * 2**20)
    for at in range(0, len(block), 4096):
        block[at] = 1
    del block
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""
PAGES = 64 * 2**20 // 4096


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
@pytest.mark.parametrize(
    ("device", "kept"),
    [("cpu", True), ("cuda", False), ("null", not Path("/dev/nvidiactl").exists())],
)
def test_freed_memory_is_kept_on_a_cpu_alone(device: str, kept: bool) -> None:
    out = subprocess.run(
        [sys.executable, "-c", CHILD, device], check=True, capture_output=True, text=True
    )
    assert (int(out.stdout) < 3 * PAGES) is kept
