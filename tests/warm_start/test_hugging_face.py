"""`init_from` a Hugging Face folder: the names and layouts of Qwen3, Qwen3-MoE and Dots1."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lunaris.__main__ import main
from lunaris.inference import load_trained
from lunaris.runs.run_dir import RunDir

STILL = ["trainer.max_steps=1", "optimizer.learning_rate=1e-30", "optimizer.weight_decay=0"]
KINDS = {
    "qwen3": ["moe=none"],
    "qwen3_moe": ["moe=top2", "moe.first_dense_layers=1"],
    "dots1": ["moe=fine_grained", "moe.n_experts_per_token=2"],
}


def write_safetensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write the format: the header's length, the header, the bytes of the tensors."""
    names = {torch.float32: "F32", torch.bfloat16: "BF16"}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, value in tensors.items():
        raw = value.detach().contiguous().view(torch.uint8).numpy().tobytes()
        span = [len(data), len(data) + len(raw)]
        header[name] = {
            "dtype": names[value.dtype], "shape": list(value.shape), "data_offsets": span
        }  # fmt: skip
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def exported(state: dict[str, Tensor], q: int, kv: int) -> dict[str, Tensor]:
    """Return a state dict of this package under the names of Hugging Face, written out by hand."""
    out = {
        "model.embed_tokens.weight": state["embedding.weight"],
        "model.norm.weight": state["norm.weight"],
    }
    for layer in range(2):
        ours, theirs = f"blocks.{layer}.", f"model.layers.{layer}."
        mine = {n.removeprefix(ours): v for n, v in state.items() if n.startswith(ours)}
        rows = mine["attention.qkv.weight"].split([q, kv, kv])
        for name, part in zip("qkv", rows, strict=True):
            out[f"{theirs}self_attn.{name}_proj.weight"] = part
        out[f"{theirs}self_attn.o_proj.weight"] = mine["attention.out.weight"]
        for name in ("q_norm", "k_norm"):
            out[f"{theirs}self_attn.{name}.weight"] = mine[f"attention.{name}.weight"]
        out[f"{theirs}input_layernorm.weight"] = mine["attention_norm.weight"]
        out[f"{theirs}post_attention_layernorm.weight"] = mine["feed_forward_norm.weight"]
        for prefix, place in (("swiglu", "mlp."), ("shared", "mlp.shared_experts.")):
            if f"feed_forward.{prefix}.down.weight" in mine:
                both = mine[f"feed_forward.{prefix}.gate_up.weight"].chunk(2)
                for name, part in zip(("gate", "up"), both, strict=True):
                    out[f"{theirs}{place}{name}_proj.weight"] = part
                out[f"{theirs}{place}down_proj.weight"] = mine[f"feed_forward.{prefix}.down.weight"]
        if "feed_forward.router.weight" in mine:
            out[f"{theirs}mlp.gate.weight"] = mine["feed_forward.router.weight"]
            bias = mine["feed_forward.router.balance_bias"]
            if bias.any():
                out[f"{theirs}mlp.gate.e_score_correction_bias"] = bias
            for e in range(4):
                gate, up = mine["feed_forward.experts.gate_up"][e].mT.chunk(2)
                down = mine["feed_forward.experts.down"][e].mT
                for name, part in (("gate", gate), ("up", up), ("down", down)):
                    out[f"{theirs}mlp.experts.{e}.{name}_proj.weight"] = part
    return {name: value.clone() for name, value in out.items()}


def write_folder(folder: Path, kind: str, run: RunDir, **changes: Any) -> dict[str, Tensor]:
    """Write the weights of a run as a folder with two files; return the run's state dict."""
    cfg = run.read_config()
    model, _ = load_trained(cfg, run, None)
    state = dict(model.state_dict())
    tensors = exported(state, q=16, kv=8)
    folder.mkdir()
    names = list(tensors)
    for number, part in enumerate((names[:5], names[5:]), 1):
        path = folder / f"model-0000{number}-of-00002.safetensors"
        write_safetensors(path, {name: tensors[name] for name in part})
    moe: Any = cfg.moe
    content = {
        "model_type": kind, "hidden_act": "silu", "num_attention_heads": 2,
        "num_key_value_heads": 1, "rope_parameters": {"rope_theta": 10000.0},
    }  # fmt: skip
    if kind in ("qwen3_moe", "dots1"):
        content |= {
            "num_experts_per_tok": moe.n_experts_per_token, "norm_topk_prob": moe.normalize_gates
        }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(content | changes))
    return state


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_weights_come_back_bit_for_bit(
    kind: str, tiny: Callable[..., Any], run_here: Callable[[Any], RunDir]
) -> None:
    first = run_here(tiny(*KINDS[kind], "model.norm=pre", name="first"))
    state = write_folder(Path("hf"), kind, first)
    if kind == "dots1":
        assert any(v.any() for n, v in state.items() if n.endswith("balance_bias"))
    still = [*STILL, "moe.bias_update_rate=1e-30"] if kind == "dots1" else STILL
    again = run_here(tiny(*KINDS[kind], "model.norm=pre", *still, "init_from=hf", name="again"))
    found, _ = load_trained(again.read_config(), again, None)
    # The step moves no weight: its rate is below the smallest number that changes any but a zero.
    for name, value in found.state_dict().items():
        if not name.endswith("load_shares"):
            assert torch.equal(torch.where(value.abs() < 1e-20, 0, value), state[name]), name


@pytest.mark.slow
def test_a_dense_folder_becomes_experts(
    tiny: Callable[..., Any],
    run_here: Callable[[Any], RunDir],
    capsys: pytest.CaptureFixture[str],
) -> None:
    first = run_here(tiny("moe=none", "model.norm=pre", name="first"))
    write_folder(Path("hf"), "qwen3", first)
    capsys.readouterr()
    run_here(tiny("moe=top2", "model.norm=pre", "trainer.max_steps=1", "init_from=hf", name="up"))
    said = capsys.readouterr().out
    assert "weights    from hf: " in said and "upcycled   the feed-forward of 2 layers" in said
    assert "largest difference of a logit is" in said


@pytest.mark.slow
def test_bad_folders_write_nothing(
    tiny: Callable[..., Any],
    run_here: Callable[[Any], RunDir],
    capsys: pytest.CaptureFixture[str],
) -> None:
    first = run_here(tiny("moe=none", "model.norm=pre", name="first"))
    write_folder(Path("hf"), "qwen3", first)
    write_folder(Path("gpt"), "qwen4", first)
    write_folder(Path("theta"), "qwen3", first, rope_theta=1.0, rope_parameters=None)
    for name in ("cut", "no_header", "extra", "none"):
        write_folder(Path(name), "qwen3", first)
    cut = Path("cut/model-00002-of-00002.safetensors")
    cut.write_bytes(cut.read_bytes()[:-4])
    Path("no_header/model-00001-of-00002.safetensors").write_bytes(b"\xff" * 40)
    write_safetensors(Path("extra/x.safetensors"), {"model.vision.weight": torch.zeros(2)})
    for path in Path("none").glob("*.safetensors"):
        path.unlink()
    before = sorted(str(path) for path in Path().rglob("*"))
    capsys.readouterr()
    for words, expected in [
        (["init_from=gpt"], "model_type=qwen4; what can be read are qwen3, qwen3_moe, dots1"),
        (["init_from=theta"], "rope_theta=1.0 there, model.rope_theta=10000.0 here"),
        (["init_from=hf", "model.norm=qk_reorder"], "q_norm.weight: (8,) there, (16,) here"),
        (["init_from=hf", "model.n_heads=1"], "blocks.0.attention.qkv.weight: (32, 16) there"),
        (["init_from=cut"], "model-00002-of-00002.safetensors is damaged: "),
        (["init_from=no_header"], "model-00001-of-00002.safetensors is damaged: its header has an"),
        (["init_from=extra"], "holds model.vision.weight, which has no place in the model"),
        (["init_from=none"], "init_from=none: holds no *.safetensors file"),
    ]:
        assert main(["fork", str(first.path), "name=new", "out_dir=new", *words]) == 2, words
        assert expected in capsys.readouterr().err, words
        assert sorted(str(path) for path in Path().rglob("*")) == before
