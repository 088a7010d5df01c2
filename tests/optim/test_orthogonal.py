from __future__ import annotations

import pytest
import torch

from lunaris.optim.orthogonal import METHODS, orthogonalize


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(8, 5), (5, 8), (7, 7)], ids=str)
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e8])
def test_every_singular_value_comes_near_one(
    method: str, shape: tuple[int, int], scale: float
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


@pytest.mark.parametrize("method", METHODS)
def test_zeros_stay_zeros_and_a_matrix_is_computed_by_itself(method: str) -> None:
    torch.manual_seed(0)
    matrices = torch.randn(3, 4, 6)
    matrices[1] = 0
    together = orthogonalize(matrices, 3, method)
    assert (together[1] == 0).all()
    for one, alone in zip(together, matrices, strict=True):
        torch.testing.assert_close(one, orthogonalize(alone, 3, method))
