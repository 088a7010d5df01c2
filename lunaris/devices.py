"""What is known of GPUs: peak FLOP/s, memory and power, from the vendors' data sheets. No torch."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from itertools import takewhile


@dataclass(frozen=True)
class Device:
    """A GPU. flops: peak dense bf16 FLOP/s; memory: bytes; watts: its power limit.

    grouped_mm: whether torch has a kernel for products of several experts in bf16 on it.
    """

    name: str
    flops: float
    memory: int
    watts: float
    grouped_mm: bool = False


def _gpu(
    name: str, tera_flops: float, gigabytes: float, watts: float, *, grouped_mm: bool = False
) -> Device:
    return Device(name, tera_flops * 1e12, int(gigabytes * 1e9), watts, grouped_mm)


DEVICES = [
    _gpu("B200", 2250, 180, 1000, grouped_mm=True),
    _gpu("H200", 989, 141, 700, grouped_mm=True),
    _gpu("H100", 989, 80, 700, grouped_mm=True),
    _gpu("H100 PCIe", 756, 80, 350, grouped_mm=True),
    _gpu("A100", 312, 80, 400),
    _gpu("L40", 181, 48, 300),
    _gpu("L40S", 362, 48, 350),
    _gpu("L4", 121, 24, 72),
    _gpu("RTX 4090", 165, 24, 450),
    _gpu("RTX 3090", 71, 24, 350),
    _gpu("MI300X", 1307, 192, 750),
    _gpu("MI250", 362, 128, 560),
]


def find_device(name: str) -> Device | None:
    """Return the device whose name is part of `name` (as CUDA calls it), or None.

    The longest such name decides: "H100 PCIe" is slower than any other "H100".
    """
    known = [device for device in DEVICES if device.name in name]
    return max(known, key=lambda device: len(device.name)) if known else None


@dataclass(frozen=True)
class Machine:
    """This machine. gpus: the names of its GPUs; gpu_memory: bytes of one; memory: of the host.

    available: bytes of the host's memory that a new process can take. bf16: whether every GPU
    computes it; True where that is not known.
    """

    gpus: list[str]
    gpu_memory: int
    memory: int
    available: int
    bf16: bool = True


def this_machine() -> Machine:
    """Look at this machine without torch: nvidia-smi, where there is one, and /proc."""
    rows = [line.rsplit(",", 1) for line in _asked("name,memory.total") if "," in line]
    try:
        gpu_memory = min((int(row[1]) * 2**20 for row in rows), default=0)
    except ValueError:
        rows, gpu_memory = [], 0
    # Asked for alone: a driver that does not know it refuses the entire question.
    bf16 = _compute_bf16(_asked("compute_cap")) if rows else True
    page = os.sysconf("SC_PAGE_SIZE")
    total = page * os.sysconf("SC_PHYS_PAGES")
    available = _available() or page * os.sysconf("SC_AVPHYS_PAGES")
    return Machine([row[0].strip() for row in rows], gpu_memory, total, available, bf16)


def _asked(fields: str) -> list[str]:
    """Return what nvidia-smi says of each GPU, [] where it is absent or does not work."""
    if not shutil.which("nvidia-smi"):
        return []
    query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return []  # It is there and does not work: no GPU that training could use.
    return done.stdout.splitlines()


def _compute_bf16(capabilities: list[str]) -> bool:
    """Return whether GPUs of these compute capabilities have products in bf16: 8.0 and above."""
    numbers = [text.strip() for text in capabilities if re.fullmatch(r"\s*\d+\.\d+\s*", text)]
    return all(float(number) >= 8 for number in numbers)


def visible_gpus() -> list[str]:
    """Return the GPUs that a process started here can use, as CUDA_VISIBLE_DEVICES names them.

    They are those that the variable names, where it is set, else all that nvidia-smi finds.
    """
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return [str(number) for number in range(len(this_machine().gpus))]
    # CUDA takes those before the first invalid one; -1 is the usual way to name none.
    valid = takewhile(lambda text: text not in ("", "-1"), map(str.strip, named.split(",")))
    return list(dict.fromkeys(valid))


def _available() -> int | None:
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            kilobytes = [line.split()[1] for line in file if line.startswith("MemAvailable:")]
    except OSError:
        return None  # Not Linux.
    return int(kilobytes[0]) * 1024 if kilobytes else None
