"""Which parameters decay, and which learn at a rate of their own."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn
from torch.distributed.tensor import DTensor


@dataclass
class ParameterRoles:
    """A model's parameters by role, each in the order of `named_parameters`.

    `routers` are the gates of Mixture-of-Experts layers; `embeddings` the token embedding and an
    untied head; `matrices` all other tensors of two or more dimensions, stacked experts among
    them; `vectors` the norms.
    """

    matrices: list[nn.Parameter] = field(default_factory=list)
    embeddings: list[nn.Parameter] = field(default_factory=list)
    routers: list[nn.Parameter] = field(default_factory=list)
    vectors: list[nn.Parameter] = field(default_factory=list)


def roles(model: nn.Module) -> ParameterRoles:
    """Sort the trainable parameters of `model` by role; a tied parameter is taken once."""
    found = ParameterRoles()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        parts = name.split(".")
        if "router" in parts:
            found.routers.append(parameter)
        elif parameter.ndim < 2:
            found.vectors.append(parameter)
        elif "embedding" in parts or "head" in parts:
            found.embeddings.append(parameter)
        else:
            found.matrices.append(parameter)
    return found


def by_layout(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Split parameters into those that one fused step can take: plain, or sharded on one mesh."""
    found: dict[object, list[nn.Parameter]] = {}
    for parameter in parameters:
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        found.setdefault(mesh, []).append(parameter)
    return list(found.values())


def set_learning_rate(groups: list[dict[str, object]], multiplier: float) -> None:
    """Set each group's `lr` to its own `peak_lr` times the schedule's multiplier.

    A group's peak already holds its scale (`moe.router_lr_scale`), so no step overwrites it.
    """
    for group in groups:
        group["lr"] = group["peak_lr"] * multiplier  # type: ignore[operator]
