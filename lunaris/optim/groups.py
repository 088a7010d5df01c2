"""The parameter groups of an optimizer: which weights decay, and at which rate they learn."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.distributed.tensor import DTensor

from lunaris.model.roles import Role, parameter_roles


@dataclass
class ParameterGroups:
    """A model's trainable parameters by role, each in the order of `named_parameters`.

    matrices: the linear maps of the blocks, stacked experts among them. embeddings: the token
    embedding and an untied head. norms: the scales of the norms. routers: the routers' weights.
    """

    matrices: list[nn.Parameter]
    embeddings: list[nn.Parameter]
    norms: list[nn.Parameter]
    routers: list[nn.Parameter]


def group_by_role(model: nn.Module) -> ParameterGroups:
    """Group the trainable parameters of `model` by their role; a tied parameter is taken once.

    Raises UserError for a parameter without a role.
    """
    roles = parameter_roles(model)

    def of(role: Role) -> list[nn.Parameter]:
        named = model.named_parameters()
        return [p for name, p in named if p.requires_grad and roles[name] & role]

    return ParameterGroups(
        matrices=of(Role.MATRIX | Role.EXPERT),
        embeddings=of(Role.EMBEDDING),
        norms=of(Role.NORM),
        routers=of(Role.ROUTER),
    )


def by_layout(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Split parameters into those that one fused step can take: plain, or sharded on one mesh."""
    found: dict[object, list[nn.Parameter]] = {}
    for parameter in parameters:
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        found.setdefault(mesh, []).append(parameter)
    return list(found.values())


def set_learning_rate(groups: list[dict[str, object]], multiplier: float) -> None:
    """Set each group's `lr` to its `peak_lr` times the schedule's multiplier.

    The peak rate of the routers' group includes `moe.router_lr_scale`, so every step keeps it.
    """
    for group in groups:
        group["lr"] = group["peak_lr"] * multiplier  # type: ignore[operator]
