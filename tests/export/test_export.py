"""Tiny trained models of every kind, written and loaded by transformers."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lunaris.commands.export import main
from lunaris.errors import RunFailed, UserError
from lunaris.export.choose import choose
from lunaris.export.settings import Settings
from lunaris.inference import load_trained
from lunaris.model.generate import generate
from lunaris.runs.run_dir import RunDir

PRE = ["model.norm=pre", "optimizer.learning_rate=3e-2", "model.max_seq_len=48"]
WINDOW = ["attention=sliding_window", "attention.window=5"]
MLA = ["attention=mla", "model.n_kv_heads=2"]
# Of a width 2.67 times the base's, which no folder knows of.
MUP = ["model.parametrization=mup", "model.mup_base_width=6"]
FINE = ["moe=fine_grained", "moe.bias_update_rate=0.05", "moe.n_experts=8"]
# The architecture, and the keys of a run that exports to it.
KINDS = {
    "dense": ("Qwen3", ["moe=none", "model.tie_embeddings=false", "model.rope_theta=500.0"]),
    "geglu": ("Qwen3", ["moe=none", "model.activation=geglu"]),
    "dense_window": ("Qwen3", ["moe=none", *WINDOW, "attention.full_every=2"]),
    "switch": ("Qwen3Moe", ["moe=switch", "moe.capacity_factor=1.0"]),
    "top2": ("Qwen3Moe", ["moe=top2", "moe.first_dense_layers=1"]),
    "top2_raw": ("Qwen3Moe", ["moe=top2", "moe.normalize_gates=false"]),
    "moe_window": ("Qwen3Moe", ["moe=top2", *WINDOW, "attention.full_every=null"]),
    "ahead": ("Qwen3Moe", ["moe=switch", "objective=multi_token"]),
    "fine_grained": ("Dots1", [*FINE, "moe.first_dense_layers=1"]),
    "two_shared": ("Dots1", [*FINE, "moe.n_shared_experts=2", "moe.router.route_scale=2.5"]),
    "no_shared": ("Dots1", [*FINE, "moe.n_shared_experts=0", *WINDOW, "attention.full_every=2"]),
    "groups": ("Dots1", [*FINE, "moe.router.n_groups=4", "moe.router.topk_groups=2"]),
    "mup_dense": ("Qwen3", ["moe=none", *MUP, "model.tie_embeddings=false"]),
    "mup_fine": ("Dots1", [*FINE, *MUP]),
    "mup_mla": ("DeepseekV3", ["moe=none", *MLA, *MUP]),
    "mla_dense": ("DeepseekV3", ["moe=none", *MLA]),
    "mla_sigmoid": ("DeepseekV3", [*FINE, *MLA, "attention.q_lora_rank=8"]),
    "mla_softmax": ("DeepseekV2", ["moe=switch", "moe.n_shared_experts=1", *MLA]),
}
REORDER = "model.norm=qk_reorder"
# The keys of runs that are written with a class of ours.
OWN_KINDS = {
    "reorder_dense": ["moe=none", REORDER, "model.tie_embeddings=false"],
    "reorder_window": ["moe=top2", REORDER, *WINDOW, "attention.full_every=2"],
    "reorder_sigmoid": [*FINE, REORDER, "moe.first_dense_layers=1"],
    "mup_reorder": ["moe=top2", REORDER, *MUP],
    "softmax_bias": ["moe=top2", "moe.balancing=bias", "moe.bias_update_rate=0.05"],
    "softmax_shared": ["moe=switch", "moe.n_shared_experts=1"],
}


def exported(tiny: Any, run_here: Any, keys: list[str], *flags: str) -> tuple[Any, RunDir]:
    """Train, export to `out`, and return the config and the run."""
    cfg = tiny(*PRE, *keys)
    run_dir = run_here(cfg)
    assert main([str(run_dir.path), "--to", "out", *flags]) == 0
    return cfg, run_dir


def loaded(dtype: torch.dtype = torch.float32, *, own_code: bool = False) -> Any:
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(
        "out", dtype=dtype, output_loading_info=True, trust_remote_code=own_code
    )
    assert not any(report.values()), report
    return model.eval()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_computes_the_same_logits_and_text(
    kind: str, tiny: Callable[..., Any], run_here: Callable[[Any], RunDir]
) -> None:
    architecture, keys = KINDS[kind]
    cfg, run_dir = exported(tiny, run_here, keys, "--no-check")
    config = json.loads(Path("out/config.json").read_text())
    assert config["architectures"] == [f"{architecture}ForCausalLM"] and "auto_map" not in config
    check_same(cfg, run_dir, loaded())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("kind", OWN_KINDS)
def test_what_no_stock_class_computes_is_written_with_its_code(
    kind: str, tiny: Callable[..., Any], run_here: Callable[[Any], RunDir]
) -> None:
    cfg, run_dir = exported(tiny, run_here, OWN_KINDS[kind], "--no-check")
    assert "auto_map" in json.loads(Path("out/config.json").read_text())
    assert Path("out/modeling_lunaris.py").is_file()
    assert "trust_remote_code=True" in Path("out/README.md").read_text()
    check_same(cfg, run_dir, loaded(own_code=True))


def check_same(cfg: Any, run_dir: RunDir, theirs: Any) -> None:
    """Assert equal logits within 1e-5 of the largest, and equal greedy text from a cache."""
    ours, _ = load_trained(cfg, run_dir, None)
    tokens = torch.randint(64, (5, 48), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, found = ours.logits(tokens), theirs(input_ids=tokens).logits
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    prompt = tokens[:3, :6]
    # A mask, since the model cannot know that no token is padding.
    text = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=40)
    assert torch.equal(text, generate(ours, prompt, 40, temperature=0))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dense", "top2", "fine_grained", "mla_sigmoid"])
def test_weights_in_bfloat16_are_those_of_the_run_rounded(
    kind: str,
    tiny: Callable[..., Any],
    run_here: Callable[[Any], RunDir],
    capsys: pytest.CaptureFixture[str],
) -> None:
    cfg, run_dir = exported(tiny, run_here, KINDS[kind][1], "--dtype", "bf16", "--no-check")
    assert "in bf16" in capsys.readouterr().out
    ours, _ = load_trained(cfg, run_dir, None)
    tokens = torch.randint(64, (4, 48), generator=torch.Generator().manual_seed(1))
    model = loaded(torch.bfloat16)
    assert (
        model.dtype == torch.bfloat16
        and json.loads(Path("out/config.json").read_text())["dtype"] == "bfloat16"
    )
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.copy_(parameter.bfloat16())
        expected = ours.logits(tokens)
        assert (loaded()(input_ids=tokens).logits - expected).abs().max() <= (
            1e-5 * expected.abs().max()
        )
        found = model(input_ids=tokens).logits.float()
    # Computed in bfloat16; a router may choose another expert for a token.
    near = (found - expected).abs().amax(dim=-1) <= 0.06 * expected.abs().max()
    assert near.float().mean() > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mup_dense", "mup_mla"])
def test_factors_of_mup_pass_the_check_in_bfloat16(
    kind: str, tiny: Callable[..., Any], run_here: Callable[[Any], RunDir]
) -> None:
    exported(tiny, run_here, KINDS[kind][1], "--dtype", "bf16")


@pytest.mark.slow
def test_every_tensor_comes_back_bit_for_bit(
    tiny: Callable[..., Any], run_here: Callable[[Any], RunDir]
) -> None:
    cfg, run_dir = exported(tiny, run_here, ["moe=top2"], "--at", "4", "--no-check")
    ours, step = load_trained(cfg, run_dir, 4)
    theirs = loaded().state_dict()
    assert step == 4
    for layer, block in enumerate(ours.blocks):
        name = f"model.layers.{layer}"
        qkv = [theirs[f"{name}.self_attn.{part}_proj.weight"] for part in "qkv"]
        assert torch.equal(torch.cat(qkv), block.attention.qkv.weight)
        assert torch.equal(theirs[f"{name}.self_attn.o_proj.weight"], block.attention.out.weight)
        assert torch.equal(theirs[f"{name}.self_attn.q_norm.weight"], block.attention.q_norm.weight)
        experts = block.feed_forward.experts
        assert torch.equal(theirs[f"{name}.mlp.experts.gate_up_proj"].mT, experts.gate_up)
        assert torch.equal(theirs[f"{name}.mlp.experts.down_proj"].mT, experts.down)
        assert torch.equal(theirs[f"{name}.mlp.gate.weight"], block.feed_forward.router.weight)
    assert torch.equal(theirs["model.embed_tokens.weight"], ours.embedding.weight)


@pytest.mark.slow
def test_a_folder_holds_its_tokenizer_shards_and_card(
    tiny: Callable[..., Any],
    run_here: Callable[[Any], RunDir],
    capsys: pytest.CaptureFixture[str],
) -> None:
    from transformers import AutoTokenizer

    keys = ["data=stdlib", "data.vocab_size=300", "moe=switch", "moe.n_experts=40",
            "model.d_model=64", "model.n_layers=3", "trainer.max_steps=2"]  # fmt: skip
    exported(tiny, run_here, keys, "--license", "mit", "--max-shard-mb", "1")
    said = capsys.readouterr().out
    assert "tokens of text its logits differ by at most" in said and "no remote code" in said
    index = json.loads(Path("out/model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 1 and files == {path.name for path in Path("out").glob("*.safetensors")}
    assert f"{index['metadata']['total_size']:,} bytes" in said
    card = Path("out/README.md").read_text()
    assert card.startswith("---\nlicense: mit\n") and "val/perplexity" in card
    assert "Qwen3MoeForCausalLM" in card and "n_experts: 40" in card and "| `stdlib-" in card
    tokenizer = AutoTokenizer.from_pretrained("out")
    batch = tokenizer(["def main(", "import"], return_tensors="pt", padding=True)
    text = loaded().generate(**batch, max_new_tokens=5)
    assert tokenizer.decode(text[0]).startswith("def main(")
    assert not [path for path in Path().iterdir() if path.name.startswith(".tmp")]


@pytest.mark.slow
def test_a_difference_is_found_and_leaves_nothing(
    tiny: Callable[..., Any], run_here: Callable[[Any], RunDir], monkeypatch: pytest.MonkeyPatch
) -> None:
    common = Settings.common
    wrong = {"rope_parameters": {"rope_type": "default", "rope_theta": 90.0}}
    monkeypatch.setattr(Settings, "common", lambda self: common(self) | wrong)
    with pytest.raises(RunFailed, match="logits of the written folder differ"):
        exported(tiny, run_here, ["moe=none"])
    assert not Path("out").exists() and not list(Path().glob(".tmp*"))


@pytest.mark.slow
def test_a_checkpoint_sharded_over_four_processes_is_exported(tiny: Callable[..., Any]) -> None:
    from lunaris.api import train

    cfg = tiny(*PRE, *FINE, "launch.processes=4", "parallelism=fsdp",
               "parallelism.expert_parallel=2")  # fmt: skip
    train(cfg)
    assert main([cfg.out_dir, "--to", "out"]) == 0
    ours, _ = load_trained(cfg, RunDir(cfg.out_dir), None)
    tokens = torch.randint(64, (2, 48))
    with torch.no_grad():
        difference = (loaded()(input_ids=tokens).logits - ours.logits(tokens)).abs().max()
    assert difference < 1e-5


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["model.activation=relu2"], "model.activation=relu2: .*swiglu or geglu"),
        (["objective.logit_soft_cap=30"], "objective.logit_soft_cap=30.0: "),
        (["attention.sinks=true"], "attention.sinks=true: "),
        (["attention.output_gate=true"], "attention.output_gate=true: "),
        (["moe=switch", "moe.balancing=bias", *MLA], "moe.balancing=bias: .*moe/router=sigmoid"),
        (["moe=top2", *MLA], "moe.normalize_gates=true: "),
        (
            [*FINE, "moe.n_experts_per_token=1", "moe.normalize_gates=false",
             "moe.router.n_groups=8", "moe.router.topk_groups=2"],
            "moe.router.n_groups=8: .*two experts in a group",
        ),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)  # fmt: skip
def test_what_no_class_computes_is_refused_by_its_key(
    tiny: Callable[..., Any], keys: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        choose(Settings(tiny("model.norm=pre", *keys), 64, None))


def test_a_custom_class_is_refused(tiny: Callable[..., Any]) -> None:
    cfg = tiny("model.norm=pre", "attention._target_=lunaris.model.attention.gqa.GQAFactory")
    cfg.attention._target_ = "mine.Attention"
    with pytest.raises(UserError, match=r"attention\._target_=mine\.Attention: a custom class"):
        choose(Settings(cfg, 64, None))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_widths_that_transformers_cannot_multiply_are_one_message(
    tiny: Callable[..., Any], run_here: Callable[[Any], RunDir]
) -> None:
    odd = ["model.d_model=6", "model.n_heads=1", "model.multiple_of=3"]
    run_dir = run_here(tiny("model.norm=pre", *FINE, *odd))
    with pytest.raises(RunFailed, match="cannot compute this model; widths that are multiples"):
        main([str(run_dir.path), "--to", "out"])
    assert not Path("out").exists() and not list(Path().glob(".tmp*"))


def test_bad_input_writes_nothing(
    tiny: Callable[..., Any], finished: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lunaris.runs.create import create

    good = create(tiny("model.norm=pre", name="good"), "test", [])
    Path("full").mkdir()
    Path("full/file").touch()
    Path("link").symlink_to("nowhere")
    folder, out = str(good.path), "out"
    for argv, message in (
        (["nowhere", "--to", out], "not a run's folder"),
        ([str(finished.path), "--to", out, "--at", "3"], "no checkpoint of step 3"),
        ([folder, "--to", out], "no complete checkpoint"),
        ([folder, "--to", "full"], "--to full: exists already"),
        ([folder, "--to", "link"], "--to link: exists already"),
        ([folder, "--to", "."], "--to .: exists already"),
        ([str(finished.path), "--to", "full/file/x"], "--to full/file/x: cannot be written: Not a"),
        ([folder, "--to", "x" * 300], "cannot be written: File name too long"),
        ([folder, "--to", out, "--max-shard-mb", "0"], "--max-shard-mb 0"),
        ([folder, "--to", out, "--text", "no.txt"], "--text no.txt: cannot be read"),
    ):
        with pytest.raises(UserError, match=message):
            main(argv)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"pip install 'lunaris-codex\[export\]'"):
        main([folder, "--to", out])
    assert not Path(out).exists() and not list(Path().glob(".tmp*"))
