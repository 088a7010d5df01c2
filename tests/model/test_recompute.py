"""What activation checkpointing keeps in compiled blocks, and which products it knows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lunaris.model import recompute
from lunaris.model.transformer import Transformer
from lunaris.moe import experts
from lunaris.moe.experts import Product
from lunaris.objective.next_token import NextToken

Make = Callable[..., Transformer]


def saved_and_gradients(model: Transformer) -> tuple[int, list[Tensor]]:
    """Return the bytes that the compiled graphs save for their backward, and all gradients."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 40, (2, 24), generator=generator)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16):
        total = NextToken()(model, {"tokens": tokens, "targets": tokens}).total
    total.backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return sum(kept.values()), [total.detach(), *grads]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::Warning")  # the compiler's own
@pytest.mark.parametrize("product", [*Product, None], ids=lambda p: p.name if p else "dense")
def test_a_compiled_block_is_one_graph_and_keeps_as_little(
    make_model: Make, monkeypatch: pytest.MonkeyPatch, product: Product | None
) -> None:
    """The partitioner of `torch.compile` obeys the choice: less is saved, in this order."""
    monkeypatch.setattr(experts, "product_for", lambda *_: product)
    moe: dict[str, Any] | None = None if product is None else {}
    _, expected = saved_and_gradients(make_model(moe).train())
    saved = []
    for kind in ("none", "selective", "full"):
        torch.compiler.reset()
        model = make_model(moe, activation_checkpointing=kind).train()
        for block in model.blocks:
            block.forward = torch.compile(block.forward, backend="aot_eager", fullgraph=True)
        size, found = saved_and_gradients(model)
        saved.append(size)
        for mine, other in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, other, rtol=0.02, atol=0.02)
    torch.compiler.reset()
    none, selective, full = saved
    assert full < 0.7 * selective and selective < 0.8 * none, saved


@torch.library.custom_op("lunaris_test::drop", mutates_args=())
def drop(x: Tensor) -> Tensor:
    """Drop half of x, as a kernel of attention does that draws by itself."""
    return x * (torch.rand_like(x) < 0.5)


drop.register_autograd(
    lambda ctx, grad: grad * (ctx.saved_tensors[1] != 0),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0], output),
)


def test_what_is_drawn_after_a_kernel_that_draws_is_drawn_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kernel = torch.ops.lunaris_test.drop.default
    monkeypatch.setattr(recompute, "ATTENTION_KERNELS", {kernel})

    def gradient(kind: str) -> Tensor:
        torch.manual_seed(3)
        x = torch.linspace(1, 2, 64, requires_grad=True)
        run = recompute.run_of(kind, draws=True)
        y = run(lambda x: F.dropout(drop(x * x), 0.5) * x, x)
        y.sum().backward()
        assert x.grad is not None
        return x.grad

    assert torch.equal(gradient("selective"), gradient("none"))
