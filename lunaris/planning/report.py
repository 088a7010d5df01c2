"""A plan in words, as a dict for machines, and a sweep's plans as a table. No torch."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from lunaris.config.schema.launch import LocalLaunchConfig, SlurmLaunchConfig
from lunaris.config.schema.root import Config
from lunaris.config.schema.trainer import AUTO
from lunaris.devices import Device, find_device, this_machine
from lunaris.errors import UserError
from lunaris.planning.plan import Plan, fitting, host_request, make_plan

# What saving is assumed to write, in bytes a second and process group: one network disk.
_DISK = 1e9
# What activation checkpointing computes twice.
_TWICE = {
    "selective": "norms, activations and dispatch are computed twice; FLOPs count products alone",
    "full": "activations are computed twice: a third more FLOPs than counted",
}


def as_text(plan: Plan, device: Device | None, mfu: float) -> str:
    """Return the plan as lines of at most 100 columns. device: None for CPUs."""
    lines = [*_model(plan), *_training(plan), *_memory(plan, device), *_exchange(plan)]
    lines += _time(plan, device, mfu)
    asked = host_request(plan.cfg)
    if asked is not None:
        memory = "the partition's default" if asked[1] is None else f"{asked[1]:g} GB"
        cores = f"{asked[0]} core{'s' * (asked[0] != 1)}"
        lines.append(_row("slurm", f"{cores} and {memory} of memory on each node"))
    return "\n".join(lines)


def as_dict(plan: Plan, device: Device | None, mfu: float) -> dict[str, Any]:
    """Return the plan's numbers; bytes, FLOPs, seconds; null where something is not known."""
    seconds = plan.seconds(device, mfu) if device else None
    return {
        "name": plan.cfg.name,
        "parameters": {
            "total": plan.parameters,
            "active": plan.active,
            "dense_twin": plan.dense_twin,
            "parts": plan.parts,
        },
        "vocab_size": plan.vocab_size,
        "flops_per_token": plan.flops,
        "processes": plan.processes,
        "steps": plan.cfg.trainer.max_steps,
        "tokens_per_step": plan.tokens_per_step,
        "tokens": plan.tokens,
        "epochs": plan.epochs,
        "memory": asdict(plan.memory),
        "checkpoint_bytes": plan.checkpoint,
        "traffic": asdict(plan.traffic) | {"total": plan.traffic.total},
        "device": device.name if device else None,
        "mfu": mfu if device else None,
        "seconds": seconds,
        "gpu_hours": seconds * plan.processes / 3600 if seconds else None,
        "kwh": _energy(plan, device, seconds) if device and seconds else None,
        "fits": _fits(plan, device) if device else None,
    }


def as_table(rows: list[tuple[str, Plan]], device: Device | None, mfu: float) -> str:
    """Return the plans of a sweep's points, by name, one a line, and their sum."""
    heads = ["point", "parameters", "active", "FLOPs/token", "tokens", "memory"]
    heads += ["GPU-hours", "fits"] if device else []
    cells, hours = [heads], 0.0
    for name, plan in rows:
        cell = [
            name,
            _count(plan.parameters),
            _count(plan.active),
            _count(plan.flops),
            _count(plan.tokens),
            _bytes(plan.needed(gpu=device is not None)),
        ]
        if device:
            taken = plan.seconds(device, mfu) * plan.processes / 3600
            hours += taken
            cell += [_number(taken), "yes" if _fits(plan, device) else "no"]
        cells.append(cell)
    widths = [max(len(row[i]) for row in cells) for i in range(len(heads))]
    lines = []
    for row in cells:
        first, rest = row[0].ljust(widths[0]), zip(row[1:], widths[1:], strict=True)
        lines.append("  ".join([first, *(cell.rjust(width) for cell, width in rest)]))
    tokens = sum(plan.tokens for _, plan in rows)
    total = f"{len(rows)} points, {_count(tokens)} tokens"
    if device:
        total += f", {_number(hours)} GPU-hours on {device.name} at {mfu:.0%} of its peak"
    return "\n".join([*lines, "", total])


def memory_warning(cfg: Config) -> str | None:
    """Return a warning where a config needs more memory than there is, or None.

    Looked at are the GPUs or the free memory of this machine for `launch=local`, and for
    `launch=slurm` without GPUs `launch.mem_gb`. None for what cannot be planned: a custom class.
    """
    gpu, available, where = _room(cfg)
    if available is None:
        return None
    device = find_device(this_machine().gpus[0]) if gpu else None
    if gpu and cfg.trainer.precision == AUTO and not this_machine().bf16:
        cfg = replace(cfg, trainer=replace(cfg.trainer, precision="fp32"))
    try:
        plan = make_plan(cfg, gpu=gpu, device=device)
    except UserError:
        return None
    needed = plan.needed(gpu=gpu)
    if needed <= available:
        return None
    changes = fitting(plan, available, gpu=gpu, device=device)
    advice = f"; {' '.join(changes)} would fit" if changes else ""
    return (
        f"each process will need about {_bytes(needed)} of memory, and {where} "
        f"{_bytes(available)}{advice}; `lunaris plan` shows what takes it"
    )


def _room(cfg: Config) -> tuple[bool, int | None, str]:
    """Return whether processes train on GPUs, the bytes that each can take, and who says so."""
    launch = cfg.launch
    if isinstance(launch, SlurmLaunchConfig):
        if launch.gpus_per_node or launch.mem_gb is None:
            return True, None, ""
        share = launch.mem_gb * 1e9 / launch.processes_per_node()
        return False, int(share), f"launch.mem_gb={launch.mem_gb:g} gives it"
    if not isinstance(launch, LocalLaunchConfig):
        return False, None, ""
    machine = this_machine()
    if machine.gpus and cfg.trainer.device != "cpu":
        return True, machine.gpu_memory or None, f"a {machine.gpus[0]} of this machine has"
    share = machine.available / launch.processes
    return False, int(share), "of this machine's free memory it can have"


def _model(plan: Plan) -> list[str]:
    share = (
        f", {_count(plan.active)} of them active a token" if plan.active < plan.parameters else ""
    )
    lines = [_row("model", f"{plan.parameters:,} parameters{share}")]
    if plan.dense_twin:
        ratio = f"{plan.active / plan.dense_twin:.2f} of its dense twin's"
        lines.append(_row("", f"{ratio} {plan.dense_twin:,} (moe=none)"))
    for part, count in plan.parts.items():
        lines.append(f"  {part:<16} {count:>16,}  {count / plan.parameters:>5.1%}")
    lines.append(_row("compute", f"{_count(plan.flops)} FLOPs a token, forward and backward"))
    return lines


def _training(plan: Plan) -> list[str]:
    trainer = plan.cfg.trainer
    steps, tokens = f"{trainer.max_steps:,} steps", _count(plan.tokens)
    line = f"{steps} of {plan.sequences:,} sequences = {tokens} tokens"
    if plan.epochs is not None:
        line += f", {_number(plan.epochs)} times the data's {_count(plan.data_tokens or 0)}"
    each = plan.tokens / max(plan.active, 1)
    return [_row("training", line), _row("", f"{_number(each)} tokens for each active parameter")]


def _memory(plan: Plan, device: Device | None) -> list[str]:
    memory, trainer = plan.memory, plan.cfg.trainer
    peak = f"{_bytes(memory.peak)} at the peak of a process, in {memory.instant}"
    lines = [_row("memory", peak)]
    parts = {
        "weights": memory.weights,
        "gradients": memory.gradients,
        "optimizer": memory.optimizer,
        "activations": memory.activations,
        "logits": memory.logits,
        "gathered": memory.gathered,
    }
    lines += [f"  {name:<16} {_bytes(size):>16}" for name, size in parts.items() if size]
    gpu = device is not None
    lines.append(
        _row("", "not counted: fragmentation, and experts with more than their share of tokens")
    )
    if device:
        needed = f"with 2 GiB for CUDA and NCCL {_bytes(plan.needed(gpu=gpu))} of"
        lines.append(_row("", f"{needed} {device.name}'s {_bytes(device.memory)}"))
        if not _fits(plan, device):
            changes = fitting(plan, device.memory, gpu=True, device=device)
            fits = " ".join(changes) if changes else "more processes with parallelism=fsdp"
            lines.append(_row("", f"it does not fit; nearest that may: {fits}"))
    kept = plan.cfg.checkpoint.keep_last
    copies = "all are kept" if kept is None else f"{kept} are kept"
    seconds = plan.checkpoint / _DISK
    lines.append(
        _row(
            "checkpoint",
            f"{_bytes(plan.checkpoint)} each, {copies}; {_time_text(seconds)} to save at 1 GB/s",
        )
    )
    if trainer.activation_checkpointing != "none":
        lines.append(_row("", _TWICE[trainer.activation_checkpointing]))
    return lines


def _exchange(plan: Plan) -> list[str]:
    sent = plan.traffic
    if not sent.total:
        return []
    parts = {"gradients": sent.gradients, "parameters": sent.parameters, "tokens": sent.tokens}
    shown = ", ".join(f"{name} {_bytes(size)}" for name, size in parts.items() if size)
    return [_row("network", f"{_bytes(sent.total)} sent by a process in a step ({shown})")]


def _time(plan: Plan, device: Device | None, mfu: float) -> list[str]:
    if device is None:
        return [_row("time", "give --device H100 (and --mfu 0.4) for time, energy and fit")]
    seconds = plan.seconds(device, mfu)
    hours = seconds * plan.processes / 3600
    on = f"{plan.processes} × {device.name} at {mfu:.0%} of the peak"
    return [
        _row(
            "time",
            f"{_time_text(seconds)} on {on}: {_number(hours)} GPU-hours, "
            f"{_number(_energy(plan, device, seconds))} kWh of the GPUs alone",
        )
    ]


def _energy(plan: Plan, device: Device, seconds: float) -> float:
    return seconds / 3600 * plan.processes * device.watts / 1000


def _fits(plan: Plan, device: Device) -> bool:
    return plan.needed(gpu=True) <= device.memory


def _row(name: str, text: str) -> str:
    return f"{name:<11}{text}"


def _count(number: float) -> str:
    for size, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}".rstrip()
    return f"{number:.3g}"


def _bytes(size: float) -> str:
    for scale, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size >= scale:
            return f"{size / scale:.2f} {unit}"
    return f"{size:.0f} B"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"


def _time_text(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, hours = seconds / 60, seconds / 3600
    if hours < 1:
        return f"{minutes:.0f} min"
    return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:.1f} days"
