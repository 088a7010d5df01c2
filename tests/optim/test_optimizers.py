from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lunaris.model.roles import Role
from lunaris.optim import muon
from lunaris.optim.adamw import build_adamw
from lunaris.optim.groups import parameter_groups, set_learning_rate
from lunaris.optim.muon import build_muon
from lunaris.optim.orthogonal import METHODS

ADAM = {"learning_rate": 0.01, "weight_decay": 0.1, "betas": [0.9, 0.95], "eps": 1e-8}
MUON = ADAM | {"momentum": 0.9, "orthogonalization": "newton_schulz", "ns_steps": 5}


class Toy(nn.Module):
    """One parameter of each role, under names that say nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Embedding(7, 4)
        self.b = nn.Linear(4, 6, bias=False)
        self.c = nn.Parameter(torch.randn(3, 4, 6))
        self.d = nn.Linear(4, 3, bias=False)
        self.e = nn.Parameter(torch.ones(4))

    def parameter_roles(self) -> dict[str, Role]:
        return {
            "a.weight": Role.EMBEDDING,
            "b.weight": Role.MATRIX,
            "c": Role.EXPERT | Role.RESIDUAL_OUTPUT,
            "d.weight": Role.ROUTER,
            "e": Role.NORM,
        }

    def loss(self) -> Tensor:
        return sum((p * torch.arange(p.numel()).view_as(p).cos()).sum() for p in self.parameters())


def test_each_parameter_has_one_role() -> None:
    model = Toy()
    groups = parameter_groups(model, 0.01, 0.1, 1.0)
    found = {name: [id(p) for p in group["params"]] for name, group in groups.items()}
    assert found == {
        "matrices": [id(model.c), id(model.b.weight)],
        "embeddings": [id(model.a.weight)],
        "routers": [id(model.d.weight)],
        "norms": [id(model.e)],
    }


@pytest.mark.parametrize("build", [build_adamw, lambda m, **k: build_muon(m, **MUON | k)])
def test_stacked_experts_decay_norms_do_not_and_the_router_keeps_its_scale(build) -> None:
    model = Toy()
    optimizer = build(model, **ADAM, router_lr_scale=0.5)
    by_parameter = {id(p): g for g in optimizer.param_groups for p in g["params"]}
    assert by_parameter[id(model.c)]["weight_decay"] == 0.1
    assert by_parameter[id(model.e)]["weight_decay"] == 0.0
    for multiplier in (0.1, 1.0, 0.3):
        set_learning_rate(optimizer.param_groups, multiplier)
        assert by_parameter[id(model.b.weight)]["lr"] == pytest.approx(0.01 * multiplier)
        assert by_parameter[id(model.d.weight)]["lr"] == pytest.approx(0.005 * multiplier)


@pytest.mark.parametrize(
    ("build", "matrices"),
    [(build_adamw, 4.0), (lambda m, **k: build_muon(m, **MUON | k), 2.0)],
)
def test_rates_fall_with_the_width_and_the_share_that_decays_stays(build, matrices: float) -> None:
    model = Toy()
    optimizer = build(model, **ADAM, router_lr_scale=0.5, width_multiplier=4.0)
    by_parameter = {id(p): g for g in optimizer.param_groups for p in g["params"]}
    for parameter, rate, decay in (
        (model.a.weight, 0.01, 0.1),
        (model.b.weight, 0.01 / matrices, 0.1 * matrices),
        (model.c, 0.01 / matrices, 0.1 * matrices),
        (model.d.weight, 0.005 / 4, 0.1 * 4),
        (model.e, 0.01, 0.0),
    ):
        group = by_parameter[id(parameter)]
        assert (group["peak_lr"], group["weight_decay"]) == (rate, decay)


def test_muon_steps_its_adamw_groups_as_torch_does() -> None:
    torch.manual_seed(0)
    ours, theirs = Toy(), Toy()
    theirs.load_state_dict(ours.state_dict())
    a = build_muon(ours, **MUON)
    b = build_adamw(theirs, **ADAM)
    for _ in range(5):
        for model, optimizer in ((ours, a), (theirs, b)):
            model.loss().backward()
            optimizer.step()
            optimizer.zero_grad()
    for name in ("a.weight", "d.weight", "e"):
        torch.testing.assert_close(ours.get_parameter(name), theirs.get_parameter(name))
    assert not torch.allclose(ours.b.weight, theirs.b.weight)


def reference_muon(
    weight: Tensor, grads: list[Tensor], rate: float, decay: float, method: str, steps: int
) -> Tensor:
    """Return a matrix after Muon steps in float64, written as its papers do.

    The iteration keeps the singular vectors, so it is a polynomial of the singular values.
    """
    weight, momentum = weight.double(), torch.zeros_like(weight, dtype=torch.float64)
    for grad in grads:
        momentum = 0.9 * momentum + 0.1 * grad
        u, values, v = torch.linalg.svd(0.1 * grad + 0.9 * momentum, full_matrices=False)
        if method == "newton_schulz":
            values = values / values.norm(dim=-1, keepdim=True)
            polynomials = [(3.4445, -4.7750, 2.0315)] * steps
        else:
            values = values / values.norm(p=4, dim=-1, keepdim=True) / 1.01
            polynomials = METHODS[method][:steps]
        for a, b, c in polynomials:
            values = a * values + b * values**3 + c * values**5
        update = u @ torch.diag_embed(values) @ v
        scale = 0.2 * max(weight.shape[-2:]) ** 0.5
        weight = weight - rate * decay * weight - rate * scale * update
    return weight


@pytest.mark.parametrize("method, steps", [("newton_schulz", 5), ("polar_express", 3)])
@pytest.mark.parametrize("name", ["b.weight", "c"])
def test_muon_steps_matrices_by_its_formula(name: str, method: str, steps: int) -> None:
    torch.manual_seed(0)
    model = Toy()
    parameter = model.get_parameter(name)
    begin = parameter.detach().clone()
    grads = [torch.randn(begin.shape, dtype=torch.float64) for _ in range(3)]
    optimizer = build_muon(model, **MUON | {"orthogonalization": method, "ns_steps": steps})
    for grad in grads:
        parameter.grad = grad.float()
        optimizer.step()
    want = reference_muon(begin, grads, 0.01, 0.1, method, steps)
    torch.testing.assert_close(
        parameter - begin, want - begin, check_dtype=False, rtol=1e-3, atol=1e-6
    )


@pytest.mark.parametrize("shape", [(64, 64), (32, 128), (4, 96, 48)], ids=str)
def test_muons_update_is_as_large_as_adamws(shape: tuple[int, ...]) -> None:
    """The root mean square of a step without decay is about 0.2 of the rate (arXiv 2502.16982)."""
    torch.manual_seed(0)
    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros(shape))
    model.parameter_roles = lambda: {"weight": Role.MATRIX}
    optimizer = build_muon(model, **MUON | {"learning_rate": 1.0})
    model.weight.grad = torch.randn(shape)
    optimizer.step()
    assert 0.16 < model.weight.square().mean().sqrt().item() < 0.24


@pytest.mark.parametrize("on_host", [True, False], ids=["read", "on the device"])
def test_muon_skips_a_step_without_changing_a_bit(
    on_host: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU's step is decided by `where`, which must be the same step too."""
    torch.manual_seed(0)
    models = [Toy(), Toy()]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [build_muon(model, **MUON) for model in models]
    for step in range(4):
        for model, optimizer in zip(models, optimizers, strict=True):
            model.loss().backward()
            skipping = model is models[1]
            monkeypatch.setattr(muon, "_on_host", lambda value, here=on_host: here)
            optimizer.found_inf = torch.tensor(0.0) if skipping else None
            optimizer.step()
            optimizer.zero_grad()
        for parameter in models[1].parameters():
            parameter.grad = torch.full_like(parameter, torch.nan)
        optimizers[1].found_inf = torch.tensor(1.0)
        optimizers[1].step()
        optimizers[1].zero_grad()
        for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
            assert torch.equal(one, other), step
    states = [optimizer.state_dict()["state"] for optimizer in optimizers]
    for i in states[0]:
        for name in states[0][i]:
            assert torch.equal(states[0][i][name], states[1][i][name]), name
