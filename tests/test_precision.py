from __future__ import annotations

import pytest
import torch

from lunaris.precision import Precision, chosen_precision


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


@pytest.mark.parametrize(("computes", "chosen"), [(True, "bf16"), (False, "fp32")])
def test_auto_takes_bf16_where_a_gpu_computes_it(
    monkeypatch: pytest.MonkeyPatch, computes: bool, chosen: str
) -> None:
    asked: list[bool] = []

    def supported(including_emulation: bool = True) -> bool:
        asked.append(including_emulation)
        return computes

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert chosen_precision("auto", torch.device("cuda")) == chosen and asked == [False]
    assert chosen_precision("fp16", torch.device("cuda")) == "fp16"
    # On a CPU it is fp32, also where the processor has products in bf16.
    assert Precision("auto", torch.device("cpu")).name == "fp32"


def test_emulation_is_told_of_a_processor_without_the_instructions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cpu = torch.device("cpu")
    for supported in (True, False):
        for name in ("bf16", "fp16"):
            monkeypatch.setattr(
                torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", lambda s=supported: s
            )
            assert Precision(name, cpu).emulated is not supported
    assert not Precision("fp32", cpu).emulated
    assert not Precision("bf16", torch.device("cuda")).emulated
