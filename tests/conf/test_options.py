"""The config tree: every option composes, every experiment says how it is run."""

from __future__ import annotations

import functools
import shlex
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from lunaris.config.compose import compose
from lunaris.config.keys import EXPERIMENT, folders, groups, options, options_of
from lunaris.planning.plan import make_plan

FOLDER = folders()[0]
OPTIONS = [(group, option.name) for group in groups() for option in options(group)]
EXPERIMENTS = [option.name for option in options(EXPERIMENT)]
# What an option cannot know by itself.
NEEDED = {
    "attention=mla": ["model.norm=pre", "model.n_kv_heads=4"],
    "data=shards": ["data.dir=shards"],
    "data=text": ["data.dir=shards", "data.files=[a.txt]"],
    "data=hf": ["data.dir=shards", "data.datasets=owner/name"],
    "launch=slurm": ["parallelism=ddp"],
}


def test_every_schema_has_an_option() -> None:
    for group, schemas in groups().items():
        for schema in schemas:
            assert options_of(schema, group), f"no option of {group} has the schema {schema}"


@pytest.mark.parametrize(("group", "option"), OPTIONS, ids=lambda value: value)
def test_every_option_composes_to_its_schema(group: str, option: str) -> None:
    choice = f"{group}={option}"
    cfg = compose([choice, *NEEDED.get(choice, [])], check_data=False)
    node = functools.reduce(getattr, group.split("/"), cfg)
    chosen = node[option] if group == "logger" else node
    # What auto chose is in the config: here, one process.
    option = "single" if choice == "parallelism=auto" else option
    assert option in options_of_its_schema(group, type(chosen))


@pytest.mark.parametrize("size", [option.name for option in options("model")])
@pytest.mark.parametrize("option", [option.name for option in options("moe")])
def test_every_option_of_experts_computes_as_much_as_the_dense_model(
    option: str, size: str
) -> None:
    plan = make_plan(compose([f"moe={option}", f"model={size}", "data=synthetic"]), gpu=False)
    if option == "none":
        assert plan.dense_twin is None
    else:
        assert plan.dense_twin == plan_of_dense(size)
        assert 1.0 < plan.active / plan.dense_twin < 1.03  # Routers and rounding.


@functools.cache
def plan_of_dense(size: str) -> int:
    cfg = compose(["moe=none", f"model={size}", "data=synthetic"])
    return make_plan(cfg, gpu=False).active


def options_of_its_schema(group: str, schema: type) -> list[str]:
    assert schema in groups()[group]
    return options_of(schema, group)


@pytest.mark.parametrize(("group", "option"), OPTIONS, ids=lambda value: value)
def test_every_option_opens_with_what_it_is(group: str, option: str) -> None:
    summary = next(o.summary for o in options(group) if o.name == option)
    assert summary.endswith(".")


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_an_experiment_opens_with_the_command_that_runs_it(experiment: str) -> None:
    lines = (FOLDER / EXPERIMENT / f"{experiment}.yaml").read_text().splitlines()
    assert lines[0] == "# @package _global_"
    words = shlex.split(lines[1].removeprefix("# "))
    assert words[:3] == ["lunaris", "train", f"experiment={experiment}"]
    cfg = compose(words[2:], check_data=False)
    assert cfg.experiment == experiment
    assert cfg.name.startswith(experiment)


def test_an_option_holds_its_difference_only() -> None:
    # But the model's sizes, which stay when the defaults (those of nano) are tuned.
    for group, schemas in groups().items():
        for schema in schemas if group != "model" else ():
            base = OmegaConf.structured(schema)
            for option in options_of(schema, group):
                content = OmegaConf.create((FOLDER / group / f"{option}.yaml").read_text())
                # Of an option of the package _global_, what it says of its group.
                for key, value in content.get(group, content).items():
                    if key not in ("defaults", "_target_"):
                        assert base[key] != value, f"{group}/{option}.yaml repeats {key}"


def test_the_example_run_of_the_earlier_lunaris() -> None:
    cfg = compose(["experiment=codex_8ex_gqa_20l", "data.dir=x"], check_data=False)
    model, moe, trainer = cfg.model, cfg.moe, cfg.trainer
    assert (model.vocab_size, model.d_model, model.n_layers) == (50304, 1024, 20)
    assert (model.n_heads, model.n_kv_heads) == (16, 4)
    assert (model.max_seq_len, model.dropout) == (1024, 0.0)
    assert (moe.n_experts, moe.n_experts_per_token, moe.aux_loss_weight) == (8, 1, 0.01)
    assert (cfg.optimizer.learning_rate, cfg.optimizer.weight_decay) == (2e-4, 0.1)
    assert (cfg.schedule.warmup_steps, trainer.max_steps) == (2000, 200_000)
    assert (trainer.batch_size, trainer.gradient_accumulation_steps) == (32, 4)
    assert (trainer.grad_clip, trainer.compile_model, trainer.log_interval) == (1.0, True, 20)
    assert cfg.checkpoint.save_interval == 1000


def test_sizes_are_what_the_options_say() -> None:
    sizes = {"tiny": 13e6, "small": 110e6, "base": 320e6, "large": 1.2e9}
    for option, said in sizes.items():
        vocab_size = 32768 if option == "tiny" else 50304
        model = compose([f"model={option}"]).model
        hidden = 2 / 3 * model.ffn_hidden_multiplier * model.d_model
        hidden = model.multiple_of * -(-hidden // model.multiple_of)
        heads = model.n_heads + model.n_kv_heads
        attention = 2 * model.d_model * (model.d_model // model.n_heads) * heads
        layer = attention + 3 * model.d_model * hidden
        assert model.n_layers * layer + vocab_size * model.d_model == pytest.approx(said, rel=0.1)


def test_nothing_but_yaml_and_an_empty_module_is_in_the_tree() -> None:
    files = [p for p in Path(FOLDER).rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    odd = [p for p in files if p.suffix != ".yaml" and p.name != "__init__.py"]
    assert odd == []
