"""What is known of GPUs: peak FLOP/s, memory and power, from the vendors' data sheets. No torch."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from itertools import takewhile
from threading import Thread

_GPUS = "name,memory.total"
_ANSWER_S = 10.0


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
    rows = [line.rsplit(",", 1) for line in _asked(_GPUS) or () if "," in line]
    try:
        gpu_memory = min((int(row[1]) * 2**20 for row in rows), default=0)
    except ValueError:
        rows, gpu_memory = [], 0
    # Asked for alone: a driver that does not know it refuses the entire question.
    bf16 = _compute_bf16(_asked("compute_cap") or ()) if rows else True
    page = os.sysconf("SC_PAGE_SIZE")
    total = page * os.sysconf("SC_PHYS_PAGES")
    available = _available() or page * os.sysconf("SC_AVPHYS_PAGES")
    return Machine([row[0].strip() for row in rows], gpu_memory, total, available, bf16)


@cache
def _asked(fields: str) -> tuple[str, ...] | None:
    """Return what nvidia-smi says of each GPU; None where it is absent or does not answer.

    A process asks once. That there is no answer is said on standard error.
    """
    if not shutil.which("nvidia-smi"):
        return None
    query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        asked = subprocess.Popen(
            query, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            text=True,
        )  # fmt: skip
    except OSError as error:
        _warn(f"cannot be started: {error.strerror}")
        return None
    try:
        return tuple(asked.communicate(timeout=_ANSWER_S)[0].splitlines())
    except subprocess.TimeoutExpired:
        asked.kill()
        assert asked.stdout is not None
        asked.stdout.close()
        # One that waits for a broken driver does not die: nothing may wait for it.
        Thread(target=asked.wait, daemon=True).start()
    _warn(f"does not answer within {_ANSWER_S:g} s")
    return None


@cache
def _warn(fault: str) -> None:
    text = "what it knows of the GPUs is missing; run it to see why"
    print(f"warning: nvidia-smi {fault}: {text}", file=sys.stderr, flush=True)


def _compute_bf16(capabilities: tuple[str, ...]) -> bool:
    """Return whether GPUs of these compute capabilities have products in bf16: 8.0 and above."""
    numbers = [text.strip() for text in capabilities if re.fullmatch(r"\s*\d+\.\d+\s*", text)]
    return all(float(number) >= 8 for number in numbers)


def visible_gpus(*, apart: bool = False) -> list[str]:
    """Return the GPUs that processes started here can use, as CUDA_VISIBLE_DEVICES names them.

    They are those that the variable names, where it is set, else all that nvidia-smi finds. Of
    parts of GPUs (MIG) a process sees one. apart: each process will be given GPUs of its own by the
    variable, so that all parts count.
    """
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return [str(number) for number in range(len(this_machine().gpus))]
    # CUDA takes those before the first invalid one; these are the usual ways to name none.
    none = ("", "-1", "NoDevFiles")
    valid = takewhile(lambda text: text not in none, map(str.strip, named.split(",")))
    found = list(dict.fromkeys(valid))
    # Without an nvidia-smi that answers, how many there are is not known.
    if all(map(str.isdigit, found)) and _asked(_GPUS) is not None:
        return found[: len(this_machine().gpus)]
    parts = [] if apart else [name for name in found if name.startswith("MIG-")]
    return [name for name in found if name not in parts[1:]]


def _available() -> int | None:
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            kilobytes = [line.split()[1] for line in file if line.startswith("MemAvailable:")]
    except OSError:
        return None  # Not Linux.
    return int(kilobytes[0]) * 1024 if kilobytes else None
