"""Documents and windows without a mask in memory: the numbers of a mask, and no [L, L] tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import flex_attention as flex
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lunaris.model.attention import ranges
from lunaris.model.attention.gqa import GQAFactory
from lunaris.model.attention.mla import MLAFactory
from lunaris.model.attention.sliding_window import SlidingWindowFactory
from lunaris.model.transformer import Transformer
from lunaris.objective.next_token import NextToken

Make = Callable[..., Transformer]

WIDTHS = {"kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 6}
KINDS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "gqa": (GQAFactory, {}),
    "gqa-sinks": (lambda **keys: GQAFactory(sinks=True, output_gate=True, **keys), {}),
    "window": (lambda **keys: SlidingWindowFactory(window=5, full_every=2, **keys), {}),
    "window-sinks": (
        lambda **keys: SlidingWindowFactory(window=9, full_every=None, sinks=True, **keys),
        {},
    ),
    "mla": (
        lambda **keys: MLAFactory(q_lora_rank=None, **WIDTHS, **keys),
        {"norm": "pre", "n_kv_heads": 4},
    ),
}


def packed(length: int) -> dict[str, Tensor]:
    """Return two sequences of random tokens: of several documents, and of one."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 40, (2, length), generator=generator)
    documents = torch.zeros(2, length, dtype=torch.int64)
    documents[0] = (torch.arange(length)[:, None] >= torch.tensor([3, 4, length // 2])).sum(1)
    return {"tokens": tokens, "targets": tokens.roll(-1, 1), "documents": documents}


def results(model: Transformer, batch: dict[str, Tensor]) -> list[Tensor]:
    """Return the loss and every gradient."""
    total = NextToken()(model.train(), batch).total
    total.backward()
    return [total.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("documents", [True, False], ids=["documents", "alone"])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_those_of_a_mask(
    make_model: Make, monkeypatch: pytest.MonkeyPatch, kind: str, documents: bool
) -> None:
    monkeypatch.setattr(ranges, "_QUERIES", 7)
    batch = packed(24)
    if not documents:
        del batch["documents"]
    factory, keys = KINDS[kind]
    found = [
        results(make_model(None, attention=factory(ranges=how), **keys), batch)
        for how in ("auto", "masked")
    ]
    assert len(found[0]) > 10
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


def test_bf16_is_near_a_mask(make_model: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "_QUERIES", 7)
    found = []
    for how in ("auto", "masked"):
        with torch.autocast("cpu", torch.bfloat16):
            found.append(results(make_model(None, attention=GQAFactory(ranges=how)), packed(24)))
    for mine, other in zip(*found, strict=True):
        assert (mine - other).norm() < 0.02 * other.norm()


INSIDE = {op._opoverload: op._init_fn for op in (ranges._in_blocks, ranges._in_blocks_backward)}


class Pairs(TorchDispatchMode):
    """Collects the operators that make a tensor with two dimensions of a length or more."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inside = INSIDE.get(func)
        if inside is None:
            out = func(*args, **(kwargs or {}))
        else:
            with self:  # What an operator of the package does is seen, too.
                out = inside(*args)
        for each in tree_leaves(out):
            if isinstance(each, Tensor) and sum(n >= self.length for n in each.shape) > 1:
                self.found.append(f"{func}: {list(each.shape)}")
        return out


@pytest.mark.parametrize("kind", KINDS)
def test_no_tensor_has_a_number_for_every_pair_of_positions(make_model: Make, kind: str) -> None:
    length = 600
    factory, keys = KINDS[kind]
    for how in ("auto", "masked"):
        attention = factory(ranges=how)
        model = make_model(None, attention=attention, n_layers=1, max_seq_len=length, **keys)
        with Pairs(length) as pairs:
            results(model, packed(length))
        assert bool(pairs.found) == (how == "masked"), pairs.found[:3]


def heads_of(length: int, keys: int, groups: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 4, length, 16), (2, groups, keys, 16), (2, groups, keys, 16)]
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def begins(length: int, window: int) -> Tensor:
    """Return where the ranges begin of documents that end in and at the ends of blocks."""
    at = torch.arange(length)
    ends = [torch.tensor([128, 200, 256]), torch.tensor([5, 6, length - 1])]
    documents = torch.stack([(at[:, None] >= end).sum(1) for end in ends])
    positions = ranges.Positions(0, length, torch.device("cpu"), documents)
    first = ranges.first_attended(positions, window)
    assert first is not None
    return first


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("window", [50, 300, 1000])
def test_flex_attention_computes_the_same(
    monkeypatch: pytest.MonkeyPatch, window: int, sink: bool
) -> None:
    """On a CPU its reference implementation, which looks at every pair, runs instead."""
    monkeypatch.setattr(flex, "_validate_device", lambda *_: None)  # It refuses gradients there.
    length = 300
    first = begins(length, window)
    q, k, v = heads_of(length, length + int(sink))
    mask = F.pad(ranges.ranges_mask(first), (int(sink), 0), value=True)
    table = ranges.block_mask(first, sink)
    found = []
    for y in (
        flex.flex_attention(q, k, v, block_mask=table, scale=0.3, enable_gqa=True),
        ranges.attend_ranges(q, k, v, first, scale=0.3, sink=sink),
        F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3, enable_gqa=True),
    ):
        found.append([y, *torch.autograd.grad(y.square().sum(), (q, k, v))])
    for mine in found[:2]:
        for part, other in zip(mine, found[2], strict=True):
            torch.testing.assert_close(part, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("length", [128, 300, 512])
@pytest.mark.parametrize("window", [1, 50, 128, 300, 1000])
def test_the_table_names_every_block_with_a_pair(length: int, window: int, sink: bool) -> None:
    first = begins(length, window)
    table = ranges.block_mask(first, sink)
    mask = F.pad(ranges.ranges_mask(first)[:, 0], (int(sink), 0), value=True)
    counts = [table.kv_num_blocks, table.full_kv_num_blocks]
    indices = [table.kv_indices, table.full_kv_indices]
    rows, columns = -(-length // 128), -(-mask.size(2) // 128)
    for sequence in range(2):
        for row in range(rows):
            named = [
                set(index[sequence, 0, row, : count[sequence, 0, row]].tolist())
                for count, index in zip(counts, indices, strict=True)
            ]
            parts = mask[sequence, row * 128 : (row + 1) * 128].split(128, dim=1)
            full = {i for i in range(columns) if parts[i].all() and parts[i].size(1) == 128}
            some = {i for i in range(columns) if parts[i].any()} - full
            assert named == [some, full], (sequence, row)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::Warning")  # the compiler's own
@pytest.mark.parametrize("kind", ["gqa", "window-sinks", "mla"])
@pytest.mark.parametrize("kernel", ["blocks", "flex"])
def test_a_compiled_block_is_one_graph_without_a_number_for_every_pair(
    make_model: Make, monkeypatch: pytest.MonkeyPatch, kind: str, kernel: str
) -> None:
    length = 600
    factory, keys = KINDS[kind]
    keys = {"attention": factory(), "n_layers": 1, "max_seq_len": length, **keys}
    expected = results(make_model(None, **keys), packed(length))
    monkeypatch.setattr(flex, "_validate_device", lambda *_: None)
    if kernel == "flex":
        monkeypatch.setattr(ranges, "_takes_blocks", lambda _: False)
        monkeypatch.setattr(ranges, "find_spec", lambda _: True)
        monkeypatch.setattr("lunaris.model.attention.gqa.has_kernel", lambda *_: True)
    torch.compiler.reset()
    shapes: list[list[int]] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        for node in graph.graph.nodes:
            for each in tree_leaves(node.meta.get("example_value")):
                if isinstance(each, Tensor):
                    shapes.append(list(each.shape))
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    model = make_model(None, **keys)
    block = model.blocks[0]
    block.forward = torch.compile(block.forward, backend=backend, fullgraph=True, dynamic=False)
    found = results(model, packed(length))
    torch.compiler.reset()
    assert [2, length, 16] in shapes
    assert not [s for s in shapes if sum(n >= length for n in s) > 1]
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("width", "capability", "compiler", "there"),
    [
        (16, (8, 0), "gcc", True),
        (8, (8, 0), "gcc", False),
        (16, (6, 1), "gcc", False),
        (16, (8, 0), None, False),
    ],
)
def test_flex_attention_is_taken_where_triton_can_compile_it(
    monkeypatch: pytest.MonkeyPatch,
    width: int,
    capability: tuple[int, int],
    compiler: str | None,
    there: bool,
) -> None:
    monkeypatch.setattr(ranges, "_triton_is_complete", ranges._triton_is_complete.__wrapped__)
    monkeypatch.setattr(ranges, "find_spec", lambda _: True)
    monkeypatch.setattr(ranges.shutil, "which", lambda _: compiler)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert ranges.has_kernel(torch.device("cuda", 0), width) == there
    assert ranges.has_kernel(torch.device("cpu"), width)
