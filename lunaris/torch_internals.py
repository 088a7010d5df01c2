"""Everything of torch that is private and that Lunaris uses, in one file.

Torch may change these names in any release. `tests/test_torch_internals.py` checks each of them,
so that a new version fails there, with its number, and not in the middle of a run.
"""

from __future__ import annotations

import os
import signal
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, SavePlan
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _get_default_store, _set_pg_timeout, _world
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.tensor import DTensor


def default_store() -> dist.Store:
    """Return the key-value store of the default process group."""
    return _get_default_store()


def set_collective_timeout(timeout: timedelta, *, exempt: Collection[object]) -> None:
    """Set the time that a collective may take, in every process group but those in `exempt`."""
    for group in list(_world.pg_map):
        if group not in exempt:
            _set_pg_timeout(timeout, group)


def without_duplicates(planner: DefaultSavePlanner, plans: list[SavePlan]) -> list[SavePlan]:
    """Return the plans of a save in which one process writes what several hold."""
    return planner._dedup_save_plans(plans)


def split_dimension(mesh: DeviceMesh, name: str, sizes: dict[str, int]) -> DeviceMesh:
    """Return `mesh` with its dimension `name` split into several, of these names and sizes."""
    return mesh._unflatten(name, tuple(sizes.values()), tuple(sizes))


def cpu_multiplies(dtype: torch.dtype) -> bool:
    """Return whether this processor has matrix products in `dtype` (bfloat16 or float16)."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.ops.mkldnn._is_mkldnn_fp16_supported()


_ATEN = torch.ops.aten
# The kernels of attention whose results selective checkpointing keeps, and the product of experts.
ATTENTION_KERNELS = {
    _ATEN._scaled_dot_product_flash_attention_for_cpu.default,
    _ATEN._scaled_dot_product_flash_attention.default,
    _ATEN._scaled_dot_product_efficient_attention.default,
    _ATEN._scaled_dot_product_cudnn_attention.default,
    torch.ops.higher_order.flex_attention,
}
GROUPED_PRODUCT = _ATEN._grouped_mm.default


def cpu_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Return a CPU's attention ([B, H, L, K]) and the logarithms of the softmax's sums ([B, H, L]).

    mask: added to the scores, in the dtype of q.
    """
    kernel = _ATEN._scaled_dot_product_flash_attention_for_cpu
    out, sums = kernel(q, k, v, attn_mask=mask, scale=scale)
    return out, sums


def cpu_attention_backward(
    grad: Tensor, inputs: tuple[Tensor, ...], mask: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v; inputs: these and the results of `cpu_attention`."""
    kernel = _ATEN._scaled_dot_product_flash_attention_for_cpu_backward
    q, k, v = kernel(grad, *inputs, 0.0, False, attn_mask=mask, scale=scale)
    return q, k, v


def takes_found_inf(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether a step of `optimizer` reads its attribute `found_inf` on the device.

    Where that ([] float32) is 1 the step changes nothing: the protocol of torch's gradient scaler.
    """
    return getattr(optimizer, "_step_supports_amp_scaling", False)


def record_memory_history(on: bool) -> None:
    """Begin to record what the memory of CUDA is allocated for, with Python's stacks, or end it.

    The newest 200,000 allocations and frees are kept.
    """
    if on:
        torch.cuda.memory._record_memory_history(stacks="python", max_entries=200_000)
    else:
        torch.cuda.memory._record_memory_history(enabled=None)


def dump_memory_history(path: Path) -> None:
    """Write what is recorded as a snapshot that pytorch.org/memory_viz opens.

    Raises OSError where the file cannot be written.
    """
    torch.cuda.memory._dump_snapshot(str(path))


class AgreedGradScaler(torch.amp.GradScaler):
    """torch's gradient scaler for plain and sharded gradients; all processes skip a step together.

    When a gradient overflows in one process, those with other shards or other experts must skip the
    step too, or the weights no longer fit together.
    """

    def _unscale_grads_(
        self,
        optimizer: torch.optim.Optimizer,
        inv_scale: Tensor,
        found_inf: Tensor,
        allow_fp16: bool,
    ) -> dict[torch.device, Tensor]:
        grads = [
            p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad
            for group in optimizer.param_groups
            for p in group["params"]
            if p.grad is not None
        ]
        torch._amp_foreach_non_finite_check_and_unscale_(grads, found_inf, inv_scale)
        if dist.is_initialized():
            dist.all_reduce(found_inf, op=dist.ReduceOp.MAX)
        return {found_inf.device: found_inf}


class ElasticAgent(LocalElasticAgent, ABC):
    """torch's elastic agent of one machine, with the places that a subclass may decide on."""

    PASSED_ON = (signal.SIGTERM, signal.SIGINT)

    @abstractmethod
    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal of `PASSED_ON` while workers run, for which torch kills them."""

    @abstractmethod
    def ending(self, exit_codes: set[int | None]) -> tuple[signal.Signals, float]:
        """Return the signal that the group's survivors get, and after how many seconds they are
        killed. exit_codes: those of the workers so far, None for one that still runs."""

    @abstractmethod
    def may_restart(self, failed: RunResult, restarts_left: int) -> bool:
        """Return whether a group whose workers failed may start again."""

    def send(self, number: signal.Signals) -> None:
        """Send a signal to every worker that still runs."""
        for pid in self._pcontext.pids().values() if self._pcontext is not None else ():
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                pass  # It has ended already.

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, int]:
        # torch's agent sets its handlers in this call.
        started = super()._start_workers(worker_group)
        for number in self.PASSED_ON:
            signal.signal(number, self.on_signal)
        # The agent ends the survivors as soon as it sees a failure, after a time that it chooses.
        assert self._pcontext is not None
        self._pcontext._close = partial(self._close_workers, self._pcontext._close)  # type: ignore[method-assign]
        return started

    def _close_workers(
        self, close: Callable[..., None], death_sig: signal.Signals, timeout: int = 0
    ) -> None:
        handlers = self._pcontext.subprocess_handlers.values()  # type: ignore[union-attr]
        number, patience_s = self.ending({handler.proc.poll() for handler in handlers})
        close(death_sig=number, timeout=patience_s)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = super()._monitor_workers(worker_group)
        if result.is_failed() and not self.may_restart(result, self._remaining_restarts):
            self._remaining_restarts = 0
        return result
