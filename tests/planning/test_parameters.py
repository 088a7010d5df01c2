"""The planned parameters are those of the model, by name and shape, for every option."""

from __future__ import annotations

import itertools

import pytest

from lunaris.config.compose import compose
from lunaris.config.keys import options
from lunaris.config.schema.root import Config
from lunaris.errors import UserError
from lunaris.planning.parameters import active_parameters, flops_per_token, model_parameters

_DATA = ["data=synthetic", "data.vocab_size=512"]
_PRESETS = [option.name for option in options("experiment", []) if option.name != "null"]
_PARTS = [
    *(f"model={name}" for name in ("nano", "tiny", "small", "base", "large")),
    *itertools.product(
        ("moe=none", "moe=switch", "moe=top2", "moe=fine_grained"),
        ("model.norm=pre", "model.norm=qk_reorder"),
    ),
    ("attention=sliding_window", "attention.sinks=true", "attention.output_gate=true"),
    ("attention=mla", "model.norm=pre", "model.n_kv_heads=4"),
    (
        "attention=mla",
        "model.norm=pre",
        "model.n_kv_heads=4",
        "attention.q_lora_rank=24",
        "attention.sinks=true",
        "attention.output_gate=true",
    ),
    ("model.activation=relu2", "moe.n_shared_experts=2", "moe.expert_hidden_multiplier=1.5"),
    ("objective=multi_token", "objective.depth=2", "moe.first_dense_layers=1"),
    ("model.tie_embeddings=false", "objective=multi_token", "moe=none"),
]


def check(cfg: Config) -> None:
    from lunaris.model.roles import parameter_roles
    from lunaris.run import bare_model

    vocab_size = cfg.model.vocab_size or getattr(cfg.data, "vocab_size", None) or 512
    model = bare_model(cfg, vocab_size)
    planned = model_parameters(cfg, vocab_size)
    built = [(name, tuple(p.shape)) for name, p in model.named_parameters()]
    assert [(p.name, p.shape) for p in planned] == built
    roles = parameter_roles(model)
    for parameter in planned:
        assert parameter.kind.name in (roles[parameter.name].name or ""), parameter
    count = model.count_parameters()
    assert (sum(p.numel for p in planned), active_parameters(cfg, planned)) == count
    length = cfg.model.max_seq_len
    assert flops_per_token(cfg, planned) == model.flops_per_token(length)


@pytest.mark.parametrize("part", _PARTS, ids=str)
def test_parameters_are_those_of_the_model(part: str | tuple[str, ...]) -> None:
    check(compose([*_DATA, *([part] if isinstance(part, str) else part)]))


@pytest.mark.parametrize("preset", _PRESETS)
def test_parameters_of_every_preset(preset: str) -> None:
    # Its data is a folder that every user names.
    more = ["data.dir=shards"] if preset == "codex_8ex_gqa_20l" else []
    check(compose([f"experiment={preset}", *more], check_data=False))


def test_a_custom_class_is_refused_by_name() -> None:
    cfg = compose(_DATA)
    cfg.attention._target_ = "mine.Attention"
    with pytest.raises(UserError, match="attention._target_=mine.Attention: a custom class"):
        model_parameters(cfg, 512)
