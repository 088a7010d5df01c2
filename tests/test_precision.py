from __future__ import annotations

import pytest
import torch

from lunaris.precision import Precision


@pytest.mark.parametrize(
    ("name", "dtype", "scales"),
    [
        ("fp32", torch.float32, False),
        ("bf16", torch.bfloat16, False),
        ("fp16", torch.float16, True),
    ],
)
def test_products_run_in_the_dtype_and_only_fp16_scales(
    name: str, dtype: torch.dtype, scales: bool
) -> None:
    precision = Precision(name, torch.device("cpu"))
    with precision.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
    assert precision.scaler.is_enabled() is scales
