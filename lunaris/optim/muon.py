"""Muon for the matrices inside the blocks, AdamW for the rest, as one optimizer.

Muon: https://kellerjordan.github.io/posts/muon/; the update scale that lets it share AdamW's
learning rate and weight decay is that of arXiv 2502.16982, section 2.2.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from lunaris.model.layers import local_part
from lunaris.optim.groups import by_layout, parameter_groups
from lunaris.optim.matrix_exchange import map_matrices, part_of
from lunaris.optim.orthogonal import orthogonalize

# Elements that are exchanged at once, and on a GPU orthogonalized at once, where few large products
# are faster than many small ones; a CPU takes one parameter at a time, which stays in its cache.
_AT_ONCE = 1 << 25


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised per matrix; groups with `adamw=True` step by torch's fused AdamW.

    The update of a [rows, columns] matrix is scaled by 0.2 · sqrt(max(rows, columns)), which
    gives it the root mean square of an AdamW update. A matrix that is sharded (DTensor) is computed
    by one of its processes, so the numbers do not depend on the sharding; on a GPU up to the order
    in which batches of other sizes sum.

    Where `found_inf` ([] float32 on the device, as torch's gradient scaler sets it) is 1, a step
    changes no bit of weights and state, without waiting for a GPU.
    """

    _step_supports_amp_scaling = True
    found_inf: Tensor | None = None

    def __init__(self, groups: list[dict[str, Any]], defaults: dict[str, Any], method: str) -> None:
        """method: of `orthogonalize`; no value of a group, as older checkpoints lack it there."""
        super().__init__(groups, defaults)
        self._method = method

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take one step on every parameter that has a gradient; closures are not supported."""
        for group in self.param_groups:
            begin = _moments if group["adamw"] else _momentum
            params = [p for p in group["params"] if p.grad is not None]
            for parameter in params:
                if not self.state[parameter]:
                    self.state[parameter].update(begin(parameter))
            for alike in by_layout(params):
                states = [self.state[p] for p in alike]
                if group["adamw"]:
                    _adamw(alike, states, group, self.found_inf)
                else:
                    _muon(alike, states, group, self.found_inf, self._method)


def _momentum(parameter: nn.Parameter) -> dict[str, Tensor]:
    return {"momentum": torch.zeros_like(parameter)}


def _moments(parameter: nn.Parameter) -> dict[str, Tensor]:
    return {
        "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
        "exp_avg": torch.zeros_like(parameter),
        "exp_avg_sq": torch.zeros_like(parameter),
    }


def _adamw(
    params: list[nn.Parameter],
    states: list[dict[str, Tensor]],
    group: dict[str, Any],
    found_inf: Tensor | None,
) -> None:
    beta1, beta2 = group["betas"]
    adamw(
        params,  # type: ignore[arg-type]
        [p.grad for p in params if p.grad is not None],
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [],
        [state["step"] for state in states],
        fused=True,
        found_inf=found_inf,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )


def _muon(
    params: list[nn.Parameter],
    states: list[dict[str, Tensor]],
    group: dict[str, Any],
    found_inf: Tensor | None,
    method: str,
) -> None:
    if found_inf is not None and _on_host(found_inf):
        if found_inf:
            return
        found_inf = None
    at_once = _AT_ONCE if params[0].is_cuda else 0
    function = partial(orthogonalize, steps=group["ns_steps"], method=method)
    for some in _buckets(params, _AT_ONCE if isinstance(params[0], DTensor) else at_once):
        momenta = [local_part(states[i]["momentum"]) for i in some]
        parts = [
            part_of(params[i], _nesterov(params[i], momentum, group["momentum"], found_inf))
            for i, momentum in zip(some, momenta, strict=True)
        ]
        updates = map_matrices(function, parts, at_once)
        for i, update in zip(some, updates, strict=True):
            _apply(params[i], update, group, found_inf)


def _on_host(value: Tensor) -> bool:
    """Return whether reading `value` waits for no other device."""
    return value.device.type == "cpu"


def _nesterov(
    parameter: nn.Parameter, momentum: Tensor, beta: float, found_inf: Tensor | None
) -> Tensor:
    """Update the momentum in place and return the gradient to orthogonalize, both local."""
    assert parameter.grad is not None
    grad = local_part(parameter.grad)
    if found_inf is not None:
        # Its own momentum as the gradient leaves the momentum as it is.
        grad = torch.where(found_inf.bool(), momentum, grad)
    momentum.lerp_(grad, 1 - beta)
    return grad.lerp(momentum, beta)


def _apply(
    parameter: nn.Parameter, update: Tensor, group: dict[str, Any], found_inf: Tensor | None
) -> None:
    decay = 1 - group["lr"] * group["weight_decay"]
    rate = -0.2 * group["lr"] * max(parameter.shape[-2:]) ** 0.5
    weight = local_part(parameter)
    if found_inf is None:
        weight.mul_(decay).add_(update, alpha=rate)
    else:
        skip = found_inf.bool()
        weight.mul_(torch.where(skip, 1.0, decay))
        # A negative factor makes it -0.0, which changes no bit of what it is added to.
        weight.add_(torch.where(skip, 0.0, update), alpha=rate)


def _buckets(params: list[nn.Parameter], at_once: int) -> Iterator[list[int]]:
    """Yield the indices of parameters whose local parts have about `at_once` elements in all.

    The same in every process, also where the parts are not equal.
    """
    some: list[int] = []
    room = 0
    for i, parameter in enumerate(params):
        size = parameter.numel() // _shards(parameter)
        if some and size > room:
            yield some
            some = []
        room = (room if some else at_once) - size
        some.append(i)
    if some:
        yield some


def _shards(parameter: Tensor) -> int:
    """Return how many parts the elements of a parameter are divided into; replicas are none."""
    if not isinstance(parameter, DTensor):
        return 1
    mesh = parameter.device_mesh
    return prod(mesh.size(i) for i, p in enumerate(parameter.placements) if not p.is_replicate())


def build_muon(
    model: nn.Module,
    *,
    learning_rate: float,
    weight_decay: float,
    betas: Sequence[float],
    eps: float,
    momentum: float,
    orthogonalization: str,
    ns_steps: int,
    router_lr_scale: float = 1.0,
    width_multiplier: float = 1.0,
) -> torch.optim.Optimizer:
    """Return Muon over the matrices and stacked experts of `model`, AdamW over the rest.

    Its groups are those of `parameter_groups`.
    """
    rates = (learning_rate, weight_decay, router_lr_scale, width_multiplier)
    found = parameter_groups(model, *rates, orthogonal=True)
    groups = [
        group | {"adamw": name != "matrices"} for name, group in found.items() if group["params"]
    ]
    defaults = {"betas": tuple(betas), "eps": eps, "momentum": momentum, "ns_steps": ns_steps}
    return Muon(groups, defaults, orthogonalization)
