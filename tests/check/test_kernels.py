"""What `lunaris check` finds of the kernels of experts and attention, right and wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lunaris.check import attention
from lunaris.check.attention import Heads
from lunaris.check.item import FAIL, OK, SKIP, Item
from lunaris.check.kernels import kernel_looks
from lunaris.config.schema.data import SyntheticDataConfig
from lunaris.moe import experts
from lunaris.moe.experts import Product
from lunaris.run import bare_model


def kernel_items(cfg: Any) -> dict[str, Item]:
    return {name: look() for name, look in kernel_looks(cfg).items()}


def test_the_kernels_of_this_device_are_right(tiny: Callable[..., Any]) -> None:
    found = kernel_items(tiny())
    assert {item.state for item in found.values()} == {OK}
    assert found["experts"].figures["grouped_difference"] <= 2e-2
    assert found["experts"].figures["padded_difference"] <= 2e-2
    assert found["experts"].text.endswith("takes one product an expert (float32 on cpu)")
    assert {"math_s", "flash_s"} <= found["attention"].figures.keys()


@pytest.mark.parametrize("fault", ["values", "not finite, at the third time", "raises"])
@pytest.mark.parametrize("kind", [Product.GROUPED, Product.PADDED], ids=lambda p: p.name)
def test_a_wrong_product_of_experts_fails_where_it_is_taken(
    tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, kind: Product, fault: str
) -> None:
    name = f"{kind.name.lower()}_product"
    real, calls = getattr(experts, name), []

    def wrong(*args: Any) -> Tensor:
        calls.append(1)
        if fault == "raises":
            raise RuntimeError("no kernel\nsecond line")
        out = real(*args)
        if fault == "values":
            return out * 1.1
        return out * float("nan") if len(calls) == 3 else out

    monkeypatch.setattr(experts, name, wrong)
    monkeypatch.setattr(experts, "product_for", lambda *args: kind)
    item = kernel_items(tiny("trainer.precision=bf16"))["experts"]
    assert item.state == FAIL and item.figures["product"] == kind.name.lower()
    if fault == "raises":
        assert f"{kind.value} (taken by this run) fails: no kernel" in item.text
    # Where the run takes another, or has no experts, nothing rests on it.
    for taken, overrides in ((Product.LOOP, []), (kind, ["moe=none"])):
        calls.clear()
        monkeypatch.setattr(experts, "product_for", lambda *args, p=taken: p)
        item = kernel_items(tiny("trainer.precision=bf16", *overrides))["experts"]
        assert item.state == OK and "taken by this run" not in item.text


def test_experts_are_looked_at_with_the_widths_of_the_run(
    tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = tiny("model.d_model=48", "model.multiple_of=12")
    hidden = wide.moe.expert_width(wide.model)
    figures = kernel_items(wide)["experts"].figures
    assert (figures["width"], figures["hidden"]) == (48, hidden)
    # Which product is taken follows from them: a GPU with a kernel of grouped products.
    real = experts.choose_product
    monkeypatch.setattr(experts, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(
        experts,
        "choose_product",
        lambda kind, dtype, *args, **keys: real("cuda", dtype, *args, **keys),
    )
    bf16 = "trainer.precision=bf16"
    for multiple, product, advised in ((8, "grouped", False), (12, "padded", True)):
        given = (bf16, "model.d_model=48", f"model.multiple_of={multiple}")
        item = kernel_items(tiny(*given))["experts"]
        assert item.figures["product"] == product, item
        assert any("model.multiple_of=64" in text for text in item.advice) == advised
    # Experts that a CPU would multiply for long are looked at in small.
    monkeypatch.undo()
    large = kernel_items(tiny("model.d_model=1024", "model.n_heads=16", "model.n_kv_heads=4"))
    assert large["experts"].figures["width"] == 64


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model.n_heads=4", "model.n_kv_heads=2"], [Heads(4, 2, 4)]),
        (
            ["attention=sliding_window", "attention.window=5", "attention.full_every=2"],
            [Heads(2, 1, 8, 5), Heads(2, 1, 8)],
        ),
        (["attention.sinks=true"], [Heads(2, 1, 8, None, True)]),
        (
            ["attention=mla", "model.norm=pre", "model.n_kv_heads=2", "attention.v_head_dim=24"],
            [Heads(2, 2, 24)],
        ),
    ],
)
def test_attention_is_looked_at_with_the_heads_of_the_run(
    tiny: Callable[..., Any], overrides: list[str], expected: list[Heads]
) -> None:
    cfg = tiny(*overrides)
    assert Heads.of(bare_model(cfg, 64), cfg) == expected
    found = kernel_items(cfg)
    assert {found[name].state for name in ("attention", "ranges")} == {OK}
    assert str(expected[0]) in found["attention"].text


def test_a_wrong_kernel_of_attention_fails(
    tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = attention._attended, []

    def attended(*args: Any) -> Tensor:
        calls.append(1)
        return real(*args) + (len(calls) == 1)

    monkeypatch.setattr(attention, "_attended", attended)
    item = kernel_items(tiny())["attention"]
    assert (item.state, "flash differs from math" in item.text) == (FAIL, True)


def test_the_kernel_that_torch_takes_is_named(tiny: Callable[..., Any]) -> None:
    q = torch.randn(1, 2, 16, 8, requires_grad=True)

    def attended() -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)

    for backend, name in ((SDPBackend.MATH, "math"), (SDPBackend.FLASH_ATTENTION, "flash")):
        with sdpa_kernel([backend]):
            assert attention._kernel_of(attended) == name
    assert kernel_items(tiny())["attention"].figures["kernel"] == "flash"


@pytest.mark.parametrize("fault", ["outputs", "gradients"])
def test_a_wrong_kernel_of_ranges_fails(
    tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    real = attention._attended_ranges

    def wrong(q: Tensor, *args: Any, by_mask: bool) -> Tensor:
        if by_mask:
            return real(q, *args, by_mask=True)
        if fault == "outputs":
            return real(q, *args, by_mask=False) * 1.01
        return real(q.detach() + (q - q.detach()) * 1.01, *args, by_mask=False)

    monkeypatch.setattr(attention, "_attended_ranges", wrong)
    item = kernel_items(tiny())["ranges"]
    assert item.state == FAIL and item.advice[0].startswith("attention.ranges=masked: ")


def test_a_mask_is_advised_where_it_is_faster_and_ranges_are_needed(
    tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention._BothWays, "gain", lambda self: 0.5)
    assert not kernel_items(tiny())["ranges"].advice
    documents = tiny()
    assert isinstance(documents.data, SyntheticDataConfig)
    documents.data.document_masking = True
    item = kernel_items(documents)["ranges"]
    assert item.advice == ("attention.ranges=masked: 2.00 times as fast here",)
    window = tiny("attention=sliding_window", "attention.window=5")
    assert kernel_items(window)["ranges"].advice == item.advice
    assert not kernel_items(tiny("attention=sliding_window", "attention.ranges=masked"))[
        "ranges"
    ].advice


def test_without_a_kernel_of_ranges_that_is_said(
    tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "has_kernel", lambda device, width: False)
    item = kernel_items(tiny())["ranges"]
    assert item.state == SKIP and "computed by a mask" in item.text
