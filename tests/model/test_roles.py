"""Roles are declared by modules; names of parameters say nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from lunaris.errors import UserError
from lunaris.model.init import init_weights
from lunaris.model.roles import Role, modules_with, parameter_roles, parameters_in
from lunaris.model.transformer import Transformer


class Pair(nn.Module):
    """Two maps, of which the module declares the roles it is given."""

    def __init__(self, **roles: Role) -> None:
        super().__init__()
        self.up = nn.Linear(300, 300, bias=False)
        self.down = nn.Linear(300, 300, bias=False)
        self._roles = {f"{name}.weight": role for name, role in roles.items()}

    def parameter_roles(self) -> dict[str, Role]:
        return self._roles


def test_every_parameter_of_the_model_has_a_role(make_model: Callable[..., Transformer]) -> None:
    model = make_model({"n_shared_experts": 1, "first_dense_layers": 1}, tie_embeddings=False)
    roles = parameter_roles(model)
    assert list(roles) == [name for name, _ in model.named_parameters()]
    block = {name.removeprefix("blocks.1."): r for name, r in roles.items() if "blocks.1." in name}
    residual = Role.RESIDUAL_OUTPUT
    assert block == {
        "attention.qkv.weight": Role.MATRIX,
        "attention.out.weight": Role.MATRIX | residual,
        "attention.q_norm.weight": Role.NORM,
        "attention.k_norm.weight": Role.NORM,
        "feed_forward_norm.weight": Role.NORM,
        "feed_forward.router.weight": Role.ROUTER,
        "feed_forward.experts.gate_up": Role.EXPERT,
        "feed_forward.experts.down": Role.EXPERT | residual,
        "feed_forward.shared.gate_up.weight": Role.MATRIX,
        "feed_forward.shared.down.weight": Role.MATRIX | residual,
    }
    assert roles["embedding.weight"] == roles["head.weight"] == Role.EMBEDDING
    assert roles["blocks.0.feed_forward.swiglu.down.weight"] == Role.MATRIX | residual
    assert modules_with(model, Role.EXPERT) == [model.blocks[1].feed_forward.experts]
    assert parameters_in(model.blocks[1], Role.ROUTER) == [
        model.blocks[1].feed_forward.router.weight
    ]


def test_a_parameter_without_a_role_is_named() -> None:
    model = nn.Sequential(Pair(up=Role.MATRIX))
    with pytest.raises(UserError, match=r"0\.down\.weight: no role is declared .* of Linear"):
        parameter_roles(model)


def test_the_outer_declaration_decides() -> None:
    outer = nn.Module()
    outer.inner = Pair(up=Role.MATRIX, down=Role.MATRIX)
    outer.parameter_roles = lambda: {"inner.up.weight": Role.ROUTER}
    roles = parameter_roles(outer)
    assert roles == {"inner.up.weight": Role.ROUTER, "inner.down.weight": Role.MATRIX}


def test_the_role_and_not_the_name_decides_the_initial_size() -> None:
    model = Pair(up=Role.MATRIX | Role.RESIDUAL_OUTPUT, down=Role.MATRIX)
    init_weights(model, seed=0, n_layers=8)
    assert model.up.weight.std().item() == pytest.approx(0.02 / 4, rel=0.02)
    assert model.down.weight.std().item() == pytest.approx(0.02, rel=0.02)


def test_a_module_resets_its_buffers() -> None:
    model = Pair(up=Role.MATRIX, down=Role.MATRIX)
    model.register_buffer("seen", torch.full((2,), torch.nan))
    with pytest.raises(AssertionError, match="Pair has buffers and no reset_buffers"):
        init_weights(model, seed=0, n_layers=1)
    model.reset_buffers = lambda: model.seen.zero_()
    init_weights(model, seed=0, n_layers=1)
    assert not model.seen.any()
