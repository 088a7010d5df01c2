from __future__ import annotations

import pytest
import torch

from lunaris.optim import orthogonal
from lunaris.optim.orthogonal import METHODS, orthogonalize


@pytest.mark.parametrize("shape", [(8, 5), (5, 8), (7, 7)], ids=str)
@pytest.mark.parametrize(
    ("method", "scale"),
    # Newton-Schulz fades out below 1e-7.
    [("newton_schulz", 1.0), ("newton_schulz", 1e8)]
    + [("polar_express", scale) for scale in (1e-12, 1.0, 1e8)],
)
def test_every_singular_value_comes_near_one(
    shape: tuple[int, int], method: str, scale: float
) -> None:
    torch.manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(3, *shape), full_matrices=False)
    values = torch.logspace(-1.5, 0, min(shape))
    result = orthogonalize(scale * u @ torch.diag(values) @ v, 8, method)
    assert result.shape == (3, *shape)
    found = torch.linalg.svdvals(result)
    assert found.min() > (0.99 if method == "polar_express" else 0.6)
    assert found.max() < (1.01 if method == "polar_express" else 1.3)
    # The singular vectors stay.
    inside = u.mT @ result @ v.mT
    torch.testing.assert_close(
        inside, torch.diag_embed(inside.diagonal(dim1=-2, dim2=-1)), atol=1e-4, rtol=0
    )
    assert (inside.diagonal(dim1=-2, dim2=-1) > 0).all()


@pytest.mark.parametrize("steps, most", [(1, 0.96), (2, 0.84), (3, 0.50), (4, 0.083), (5, 3.6e-4)])
def test_the_polynomials_are_the_minimax_ones_of_what_is_left(steps: int, most: float) -> None:
    """The largest error over [0.005, 1] after each, and equal at its ends as Chebyshev says."""
    x = torch.linspace(0.005, 1, 200_001, dtype=torch.float64)
    for a, b, c in METHODS["polar_express"][:steps]:
        x = a * x + b * x**3 + c * x**5
    low, high = 1 - x.min().item(), x.max().item() - 1
    assert high == pytest.approx(most, rel=0.1)
    assert low == pytest.approx(high, abs=2e-4)


@pytest.mark.parametrize("steps", [3, 5, 8])
def test_polar_express_stays_in_its_range_in_bfloat16(
    steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its polynomials are steep above their ranges, and 2^-9 of rounding is enough to get there."""
    monkeypatch.setattr(orthogonal, "_dtype", lambda device: torch.bfloat16)
    torch.manual_seed(0)
    plain = torch.randn(3, 192, 192)
    u, _, v = torch.linalg.svd(plain[0])
    uneven = u @ torch.diag(torch.logspace(-4, 0, 192)) @ v
    for matrix in (*plain, uneven):
        most = torch.linalg.svdvals(orthogonalize(matrix, steps)).max().item()
        assert most < (1.55 if steps == 3 else 1.05)


@pytest.mark.parametrize("method", METHODS)
def test_zeros_stay_zeros_and_a_matrix_is_computed_by_itself(method: str) -> None:
    torch.manual_seed(0)
    matrices = torch.randn(3, 4, 6)
    matrices[1] = 0
    together = orthogonalize(matrices, 3, method)
    assert (together[1] == 0).all()
    for one, alone in zip(together, matrices, strict=True):
        torch.testing.assert_close(one, orthogonalize(alone, 3, method))
