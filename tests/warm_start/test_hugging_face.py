"""`init_from` a Hugging Face folder: names and layouts, by hand and as `lunaris export` writes."""

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
    if kind == "qwen3":
        # A file that another export left is no part of the weights: the index does not name it.
        names = {"weight_map": {path.name: path.name for path in Path("hf").glob("*.safetensors")}}
        Path("hf/model.safetensors.index.json").write_text(json.dumps(names))
        write_safetensors(Path("hf/left.safetensors"), {"left.weight": torch.zeros(2)})
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
    write_folder(Path("eps"), "qwen3", first, rms_norm_eps=1e-5)
    for name in ("cut", "no_header", "extra", "none", "config", "index", "absent"):
        write_folder(Path(name), "qwen3", first)
    Path("config/config.json").write_text('{"model_type": "qwen3"')
    Path("index/model.safetensors.index.json").write_text("[]")
    names = {"weight_map": {"model.norm.weight": "model-00003-of-00003.safetensors"}}
    Path("absent/model.safetensors.index.json").write_text(json.dumps(names))
    cut = Path("cut/model-00002-of-00002.safetensors")
    cut.write_bytes(cut.read_bytes()[:-4])
    Path("no_header/model-00001-of-00002.safetensors").write_bytes(b"\xff" * 40)
    write_safetensors(Path("extra/x.safetensors"), {"model.vision.weight": torch.zeros(2)})
    for path in Path("none").glob("*.safetensors"):
        path.unlink()
    before = sorted(str(path) for path in Path().rglob("*"))
    capsys.readouterr()
    for words, expected in [
        (
            ["init_from=gpt"],
            "model_type=qwen4; what can be read are qwen3, qwen3_moe, dots1, deepse",
        ),
        (["init_from=theta"], "rope_theta=1.0 there, model.rope_theta=10000.0 here"),
        (["init_from=hf", "model.norm=qk_reorder"], "q_norm.weight: (8,) there, (16,) here"),
        (
            ["init_from=hf", "model.parametrization=mup", "model.mup_base_width=8"],
            "the parametrization=standard there, model.parametrization=mup here",
        ),
        (["init_from=hf", "model.n_heads=1"], "blocks.0.attention.qkv.weight: (32, 16) there"),
        (["init_from=cut"], "model-00002-of-00002.safetensors is damaged: "),
        (["init_from=no_header"], "model-00001-of-00002.safetensors is damaged: its header has an"),
        (["init_from=extra"], "holds model.vision.weight, which has no place in the model"),
        (["init_from=eps"], "rms_norm_eps=1e-05 there, the epsilon of norms=1e-06 here"),
        (["init_from=config"], "init_from=config: config.json is empty or not JSON"),
        (["init_from=index"], "model.safetensors.index.json has no weight_map"),
        (["init_from=absent"], "names model-00003-of-00003.safetensors, which is not there"),
        (["init_from=none"], "init_from=none: holds no *.safetensors file"),
    ]:
        assert main(["fork", str(first.path), "name=new", "out_dir=new", *words]) == 2, words
        assert expected in capsys.readouterr().err, words
        assert sorted(str(path) for path in Path().rglob("*")) == before


PRE = ["model.norm=pre", "optimizer.learning_rate=3e-2"]
REORDER = ["model.norm=qk_reorder", "optimizer.learning_rate=3e-2"]
WINDOW = ["attention=sliding_window", "attention.window=5"]
MLA = ["attention=mla", "model.n_kv_heads=2"]
FINE = ["moe=fine_grained", "moe.bias_update_rate=0.05", "moe.n_experts=8"]
# The model type that a run is written as, and its keys.
EXPORTED = {
    "dense": ("qwen3", [*PRE, "moe=none", "model.tie_embeddings=false"]),
    "geglu": ("qwen3", [*PRE, "moe=none", "model.activation=geglu"]),
    "window": ("qwen3_moe", [*PRE, "moe=top2", *WINDOW, "attention.full_every=null"]),
    "first_dense": ("qwen3_moe", [*PRE, "moe=top2", "moe.first_dense_layers=1"]),
    "shared": ("dots1", [*PRE, *FINE, "moe.n_shared_experts=2", "moe.router.route_scale=2.5"]),
    "no_shared": ("dots1", [*PRE, *FINE, "moe.n_shared_experts=0"]),
    "groups": ("dots1", [*PRE, *FINE, "moe.router.n_groups=4", "moe.router.topk_groups=2"]),
    "mla_dense": ("deepseek_v3", [*PRE, *MLA, "moe=none", "attention.qk_rope_head_dim=6"]),
    "mla_sigmoid": ("deepseek_v3", [*PRE, *MLA, *FINE, "attention.q_lora_rank=8"]),
    "mla_softmax": ("deepseek_v2", [*PRE, *MLA, "moe=switch", "moe.n_shared_experts=1"]),
    "reorder_dense": ("lunaris_codex", [*REORDER, "moe=none"]),
    "reorder_moe": ("lunaris_codex", [*REORDER, "moe=top2", *WINDOW]),
    "reorder_fine": ("lunaris_codex", [*REORDER, *FINE, "moe.first_dense_layers=1"]),
    "softmax_bias": ("lunaris_codex", [*PRE, "moe=top2", "moe.balancing=bias"]),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("kind", EXPORTED)
def test_an_exported_run_is_started_from_bit_for_bit(
    kind: str, tiny: Callable[..., Any], run_here: Callable[[Any], RunDir]
) -> None:
    """The step after the start moves no weight: its rate is too small to change any but a zero."""
    model_type, keys = EXPORTED[kind]
    first = run_here(tiny(*keys, name="first"))
    assert main(["export", str(first.path), "--to", "hf", "--no-check"]) == 0
    assert json.loads(Path("hf/config.json").read_text())["model_type"] == model_type
    state = load_trained(first.read_config(), first, None)[0].state_dict()
    still = list(STILL)
    if any(key.startswith("moe.bal") for key in keys) or FINE[0] in keys:
        assert any(v.any() for n, v in state.items() if n.endswith("balance_bias"))
        still.append("moe.bias_update_rate=1e-30")
    kept = [key for key in keys if not key.startswith("moe.bias_update_rate")]
    again = run_here(tiny(*kept, *still, "init_from=hf", name="again"))
    found, _ = load_trained(again.read_config(), again, None)
    names = [name for name in found.state_dict() if not name.endswith("load_shares")]
    assert {name for name in state if not name.endswith("load_shares")} == {*names}
    for name in names:
        value = found.state_dict()[name]
        assert torch.equal(torch.where(value.abs() < 1e-20, 0, value), state[name]), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            ["attention.qk_rope_head_dim=6", "attention.qk_nope_head_dim=6"],
            "kv_a.weight: (20, 16) there, (22",
        ),
        (["moe.router.route_scale=3"], "routed_scaling_factor=1.0 there, moe.router.route_scale=3"),
        (["moe.router.n_groups=4", "moe.router.topk_groups=2"], "n_group=1 there, moe.router.n_gr"),
        (["attention=gqa"], "blocks.0.attention.kv_a.weight"),
    ],
)
def test_what_computes_something_else_is_refused(
    keys: list[str], message: str, tiny: Callable[..., Any], run_here: Callable[[Any], RunDir],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    own = ["attention.qk_rope_head_dim=4", "attention.qk_nope_head_dim=8"]
    first = run_here(tiny(*PRE, *MLA, *FINE, *own, name="first"))
    assert main(["export", str(first.path), "--to", "hf", "--no-check"]) == 0
    capsys.readouterr()
    command = ["fork", str(first.path), "name=new", "out_dir=new", "init_from=hf", *keys]
    assert main(command) == 2
    assert message in capsys.readouterr().err and not Path("new").exists()


def test_another_window_is_refused(
    tiny: Callable[..., Any], run_here: Callable[[Any], RunDir], capsys: pytest.CaptureFixture[str]
) -> None:
    first = run_here(tiny(*PRE, "moe=none", *WINDOW, "attention.full_every=2", name="first"))
    assert main(["export", str(first.path), "--to", "hf", "--no-check"]) == 0
    assert main(["fork", str(first.path), "out_dir=same", "init_from=hf"]) == 0
    for keys, here in ((["attention=gqa"], "[None, None]"), (["attention.window=3"], "[3, None]")):
        capsys.readouterr()
        assert main(["fork", str(first.path), "out_dir=new", "init_from=hf", *keys]) == 2
        error = capsys.readouterr().err
        assert "the window of each layer=[" in error and f"attention={here} here" in error
    assert not Path("new").exists()
