"""Settings of a process that only trains, made before torch is loaded. No torch."""

from __future__ import annotations

import os
import resource
from pathlib import Path

from lunaris.launch.allocator import keep_freed_memory, trains_on_cpu

# Both names of the options of torch's allocator: the second is the one before torch 2.9.
_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
# The size and the file of the flight recorder by today's names, which win, and by the ones before.
_RECORDER = (
    "TORCH_FR_BUFFER_SIZE", "TORCH_FR_DUMP_TEMP_FILE",
    "TORCH_NCCL_TRACE_BUFFER_SIZE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE",
)  # fmt: skip
# Collectives that torch's flight recorder keeps in each process.
_RECORDED = 2000


def set_up_process(device: str | None, logs: Path) -> None:
    """Set up this process for training; what the environment sets already stays.

    On a CPU, the C library keeps freed memory. On a GPU, torch's allocator takes expandable
    segments, which fragment less, and NCCL's flight recorder writes the last collectives of each
    rank to `logs` when one of them times out. The limit of open files becomes the hard one: a
    process has sockets to many others, and every shard of the data is open.

    device: `trainer.device`.
    """
    keep_freed_memory(device)
    raise_file_limit()
    if trains_on_cpu(device):
        return
    if not any(name in os.environ for name in _ALLOCATOR):
        os.environ[_ALLOCATOR[0]] = "expandable_segments:True"
    if any(name in os.environ for name in _RECORDER):
        return
    os.environ["TORCH_FR_BUFFER_SIZE"] = str(_RECORDED)
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(logs.absolute() / "nccl_rank_"))


def raise_file_limit() -> None:
    """Raise the soft limit of open files to the hard one, where the system allows it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == hard:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (ValueError, OSError):
        pass  # macOS refuses an unlimited number.
