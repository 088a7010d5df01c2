"""What each parameter is for. Modules declare it; nothing is read from a parameter's name.

The initialisation, the optimizers and the parallelism all read these declarations.
"""

from __future__ import annotations

from enum import Flag, auto

from torch import nn

from lunaris.errors import UserError


class Role(Flag):
    """The role of one parameter: one of the first six, to which RESIDUAL_OUTPUT may be added.

    MATRIX: a linear map inside a block. EXPERT: such maps of several experts, stacked ([E, …]).
    EMBEDDING: the token embedding or an untied vocabulary projection. ROUTER: the weights that
    choose experts. NORM: the scale of a norm. BIAS: numbers that are added, such as a head's sink
    logit; they start at 0 and do not decay. RESIDUAL_OUTPUT: its product is added to the residual
    stream, so it starts smaller: `Role.MATRIX | Role.RESIDUAL_OUTPUT`.
    """

    MATRIX = auto()
    EXPERT = auto()
    EMBEDDING = auto()
    ROUTER = auto()
    NORM = auto()
    BIAS = auto()
    RESIDUAL_OUTPUT = auto()


def parameter_roles(model: nn.Module) -> dict[str, Role]:
    """Return the role of every parameter of `model`, in the order of `named_parameters`.

    A module declares roles with a method `parameter_roles()`, from names relative to itself
    ("weight", "qkv.weight") to roles. Where two modules declare one parameter, the outer one
    decides. Raises UserError for a parameter that no module declares.
    """
    declared: dict[str, Role] = {}
    for path, module in model.named_modules():
        declare = getattr(module, "parameter_roles", None)
        if declare is not None:
            for name, role in declare().items():
                declared.setdefault(f"{path}.{name}".removeprefix("."), role)
    names = [name for name, _ in model.named_parameters()]
    for name in names:
        if name not in declared:
            owner = type(model.get_submodule(name.rpartition(".")[0])).__name__
            raise UserError(
                f"{name}: no role is declared for this parameter of {owner}; return it from a "
                "method parameter_roles() of its module, or of one around it "
                "(lunaris/model/roles.py)"
            )
    return {name: declared[name] for name in names}


def parameters_in(model: nn.Module, role: Role) -> list[nn.Parameter]:
    """Return the parameters whose role overlaps `role`, in the order of `named_parameters`."""
    found = parameter_roles(model)
    return [p for name, p in model.named_parameters() if found[name] & role]


def modules_with(model: nn.Module, role: Role) -> list[nn.Module]:
    """Return the modules that hold a parameter of `role` themselves, in the model's order."""
    owners = {name.rpartition(".")[0] for name, r in parameter_roles(model).items() if r & role}
    return [module for name, module in model.named_modules() if name in owners]
