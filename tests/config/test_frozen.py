"""A run's config file is read by every later version of the code."""

from __future__ import annotations

import copy
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from lunaris.config import migrations
from lunaris.config.compose import Source, compose
from lunaris.config.frozen import read_config, to_yaml
from lunaris.config.identity import differing, identity
from lunaris.config.migrations import default_changed, removed, renamed
from lunaris.errors import UserError

COMMANDS = [
    [],
    ["moe=fine_grained", "optimizer=muon", "schedule=wsd", "logger=wandb"],
    ["moe=none", "data=text", "data.dir=x", "data.files={a: [b]}", "launch=slurm"],
    ["data=shards", "data.dir=[a,b]", "data.weights=[1,2]", "optimizer.betas=[0.8,0.9]"],
]


def leaves(tree: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in tree.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from leaves(value, (*path, key))


def without(tree: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    tree = copy.deepcopy(tree)
    node = tree
    for key in path[:-1]:
        node = node[key]
    del node[path[-1]]
    return tree


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_written_config_is_read_back_as_it_was(tmp_path: Path, command: list[str]) -> None:
    cfg = compose(command, check_data=False)
    (tmp_path / "config.yaml").write_bytes(to_yaml(cfg))
    again = read_config(tmp_path / "config.yaml")
    assert differing(identity(cfg), identity(again)) == []
    assert to_yaml(again) == to_yaml(cfg)


@pytest.mark.slow
def test_each_key_that_a_file_lacks_takes_its_default(tmp_path: Path) -> None:
    cfg = compose(["moe=top2", "moe.normalize_gates=false", "data=synthetic"])
    tree: Any = OmegaConf.to_container(OmegaConf.create(to_yaml(cfg).decode()))
    path = tmp_path / "config.yaml"
    whole = {"model", "data", "trainer", "launch"}  # Without one of these a file is cut off.
    for key in leaves(tree):
        path.write_text(OmegaConf.to_yaml(without(tree, key)))
        if len(key) == 1 and key[0] in whole or key in (("data", "_target_"), ("moe", "_target_")):
            with pytest.raises(UserError, match="config.yaml: "):
                read_config(path)
            continue
        if key[-1] == "_target_":
            continue
        found = read_config(path)
        changed = [row.partition(":")[0] for row in differing(identity(cfg), identity(found))]
        # What the option or the command line had changed is another value now, and nothing else.
        assert set(changed) <= {".".join(key), "global_batch"} or len(key) == 1, (key, changed)


@pytest.mark.parametrize(("before", "now"), [(True, "full"), (False, "none")])
def test_checkpointing_that_was_on_or_off_has_a_name(
    tmp_path: Path, before: bool, now: str
) -> None:
    cfg = compose(["moe=none", "data=synthetic"])
    tree: Any = OmegaConf.to_container(OmegaConf.create(to_yaml(cfg).decode()))
    tree["trainer"]["activation_checkpointing"] = before
    path = tmp_path / "config.yaml"
    path.write_text(OmegaConf.to_yaml(tree | {"config_version": 4}))
    assert read_config(path).trainer.activation_checkpointing == now


def test_muon_keeps_the_iteration_of_version_6(tmp_path: Path) -> None:
    cfg = compose(["optimizer=muon", "data=synthetic"])
    tree: Any = OmegaConf.to_container(OmegaConf.create(to_yaml(cfg).decode()))
    del tree["optimizer"]["orthogonalization"], tree["optimizer"]["learning_rate"]
    path = tmp_path / "config.yaml"
    for steps, found in ((None, 5), (8, 8)):
        tree["optimizer"].pop("ns_steps", None)
        if steps is not None:
            tree["optimizer"]["ns_steps"] = steps
        path.write_text(OmegaConf.to_yaml(tree | {"config_version": 6}))
        optimizer = read_config(path).optimizer
        assert (optimizer.orthogonalization, optimizer.ns_steps) == ("newton_schulz", found)
        assert optimizer.learning_rate == 3e-3


def test_migrations_rename_remove_and_keep_old_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = (
        renamed(8, "moe.experts", "moe.n_experts"),
        removed(8, "trainer.gone"),
        default_changed(9, "moe.aux_loss_weight", 0.5),
    )
    monkeypatch.setattr(migrations, "MIGRATIONS", rows)
    monkeypatch.setattr(migrations, "VERSION", 9)
    tree: Any = OmegaConf.to_container(OmegaConf.create(to_yaml(compose([])).decode()))
    tree["moe"]["experts"] = 6
    tree["trainer"]["gone"] = 1
    for key in ("n_experts", "aux_loss_weight"):
        del tree["moe"][key]
    path = tmp_path / "config.yaml"
    path.write_text(OmegaConf.to_yaml(tree | {"config_version": 7}))
    moe: Any = read_config(path).moe
    assert (moe.n_experts, moe.aux_loss_weight) == (6, 0.5)
    del tree["moe"]["experts"], tree["trainer"]["gone"]
    path.write_text(OmegaConf.to_yaml(tree | {"config_version": 8}))
    assert read_config(path).moe.aux_loss_weight == 0.5  # type: ignore[attr-defined]
    path.write_text(OmegaConf.to_yaml(tree | {"config_version": 9}))
    assert read_config(path).moe.aux_loss_weight == 0.01  # type: ignore[attr-defined]


MASKED = ["data=shards", "data.dir=x", "data.document_masking=true", "moe.capacity_factor=1"]


@pytest.mark.parametrize(
    ("command", "width"),
    [
        (["moe=top2"], 4.0),
        (["moe=top2", "model.ffn_hidden_multiplier=3"], 3.0),
        (["moe=switch", "moe.n_shared_experts=1"], 4.0),
        (["moe=top2", "moe.expert_hidden_multiplier=2"], 2.0),
        (["moe=switch"], None),
    ],
)
def test_version_3_made_each_expert_as_wide_as_the_dense_feed_forward(
    tmp_path: Path, command: list[str], width: float | None
) -> None:
    cfg = compose(command)
    tree: Any = OmegaConf.to_container(OmegaConf.create(to_yaml(cfg).decode()))
    path = tmp_path / "config.yaml"
    path.write_text(OmegaConf.to_yaml(tree | {"config_version": 3}))
    assert read_config(path).moe.expert_hidden_multiplier == width  # type: ignore[attr-defined]
    path.write_text(OmegaConf.to_yaml(tree))
    assert read_config(path) == cfg
    # A value that is none is refused as in any file.
    broken = tree | {"config_version": 3, "moe": tree["moe"] | {"n_experts_per_token": None}}
    path.write_text(OmegaConf.to_yaml(broken))
    with pytest.raises(UserError, match="moe: Incompatible value 'None'"):
        read_config(path)
    # What null means to a custom class, only that class knows.
    custom = {"_target_": "mine.Experts", "_schema_": "lunaris.config.schema.moe.MoEConfig"}
    tree["moe"] |= custom | {"n_experts_per_token": 2, "expert_hidden_multiplier": None}
    path.write_text(OmegaConf.to_yaml(tree | {"config_version": 3}))
    assert read_config(path).moe.expert_hidden_multiplier is None  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("command", "balance", "capacity"),
    [
        ([], "sequence", "document"),
        (MASKED, "sequence", "sequence"),
        ([*MASKED, "moe.balancing=bias"], "global", "sequence"),
        (["moe=top2", "moe.balancing=none"], "global", "document"),
    ],
    ids=["aux_loss", "aux_loss-masked", "bias-masked", "none"],
)
def test_version_2_counted_shares_and_capacity_in_each_sequence(
    tmp_path: Path, command: list[str], balance: str, capacity: str
) -> None:
    tree: Any = OmegaConf.to_container(
        OmegaConf.create(to_yaml(compose(command, check_data=False)).decode())
    )
    del tree["moe"]["balance_scope"], tree["moe"]["capacity_scope"]
    path = tmp_path / "config.yaml"
    path.write_text(OmegaConf.to_yaml(tree | {"config_version": 2}))
    moe: Any = read_config(path).moe
    assert (moe.balance_scope, moe.capacity_scope) == (balance, capacity)
    path.write_text(OmegaConf.to_yaml(tree))
    moe = read_config(path).moe
    assert (moe.balance_scope, moe.capacity_scope) == ("global", "document")


def test_the_scopes_of_version_2_are_no_keys_of_a_dense_model(tmp_path: Path) -> None:
    tree: Any = OmegaConf.to_container(OmegaConf.create(to_yaml(compose(["moe=none"])).decode()))
    path = tmp_path / "config.yaml"
    path.write_text(OmegaConf.to_yaml(tree | {"config_version": 2}))
    assert read_config(path) == compose(["moe=none"])
    del tree["moe"]
    path.write_text(OmegaConf.to_yaml(tree | {"config_version": 2}))
    assert read_config(path).moe.balance_scope == "sequence"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config_version": 99}, "config_version=99: written by a newer version of lunaris"),
        ({"config_version": True}, "config_version=True: must be a whole number"),
        ({"moo": 1}, "moo: no such key"),
        ({"model": None}, "model=null: must be a map"),
        ({"trainer": "x"}, "trainer=x: must be a map"),
        ({"checkpoint": 3}, "checkpoint=3: must be a map"),
        ({"moe": {"_target_": "lunaris.moe.factory.MoEFactory", "n_expert": 1}}, "did you mean"),
        ({"moe": {"_target_": "lunaris.moe.factory.Moe"}}, "not a class for moe"),
        ({"seed": "x"}, "config.yaml: "),
        ({"model": {"n_heads": 3}}, "must be divisible by model.n_heads=3"),
    ],
)
def test_a_file_that_the_schemas_refuse_is_named(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    tree: Any = OmegaConf.to_container(OmegaConf.create(to_yaml(compose([])).decode()))
    path = tmp_path / "config.yaml"
    path.write_text(OmegaConf.to_yaml(tree | change))
    with pytest.raises(UserError, match=message) as error:
        read_config(path)
    assert str(error.value).count(str(path)) == 1
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content", ["a: [", "a: b: c", "&a [*a]", "name: ${seed", "model:\n  d_mo"]
)
def test_a_file_that_is_not_yaml_is_refused_in_one_line(tmp_path: Path, content: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match="cannot be read|is incomplete") as error:
        read_config(path)
    assert "\n" not in str(error.value)


CUSTOM_OVER_OPTIONS = [
    ["data=text", "data.files=[a]", "data.dir=x", "data._target_=mine.Text", "data.verify=true"],
    ["launch=slurm", "launch.nodes=2", "parallelism=ddp", "launch._target_=mine.Launcher"],
    ["moe._target_=mine.Experts", "+moe.further={a: [1]}", "moe.router._target_=mine.Router"],
    ["optimizer._target_=mine.Optimizer", "+optimizer.fused=true"],
]


@pytest.mark.parametrize("command", CUSTOM_OVER_OPTIONS, ids=" ".join)
def test_a_custom_class_over_an_option_keeps_the_option_s_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    methods = {
        "Text": ("ensure_ready", "train", "val"), "Launcher": ("submit",),
        "Experts": ("__call__",), "Router": ("__call__",), "Optimizer": ("step",),
    }  # fmt: skip
    (tmp_path / "mine.py").write_text(
        "".join(
            f"class {name}:\n" + "".join(f"    def {each}(self): ...\n" for each in named)
            for name, named in methods.items()
        )
    )
    cfg = compose(command, check_data=False)
    (tmp_path / "config.yaml").write_bytes(to_yaml(cfg))
    again = read_config(tmp_path / "config.yaml")
    assert again == cfg
    assert differing(identity(cfg), identity(again)) == []


def test_a_custom_class_in_a_file_of_version_1_keeps_its_identity(tmp_path: Path) -> None:
    tree: Any = OmegaConf.to_container(OmegaConf.create(to_yaml(compose([])).decode()))
    del tree["config_version"], tree["moe"]["router"]
    tree["moe"]["_target_"] = "mine.Experts"
    tree["data"] = {"_target_": "mine.Data", "dir": "x", "verify": True}
    tree["launch"] = {"_target_": "mine.Launcher", "nodes": 2, "gpus_per_node": 4}
    path = tmp_path / "config.yaml"
    path.write_text(OmegaConf.to_yaml(tree))
    found = identity(read_config(path))
    assert found["moe.router._target_"] == "lunaris.moe.router.softmax.SoftmaxRouterFactory"
    assert found["data.dir"] == "x"
    assert "data.verify" not in found
    assert found["global_batch"] == 8 * identity(compose([]))["global_batch"]


def test_a_logger_of_version_1_becomes_a_list(tmp_path: Path) -> None:
    tree: Any = OmegaConf.to_container(OmegaConf.create(to_yaml(compose([])).decode()))
    del tree["config_version"]
    wandb = {"_target_": "lunaris.metrics.wandb_logger.WandbLogger", "project": "p"}
    path = tmp_path / "config.yaml"
    path.write_text(OmegaConf.to_yaml(tree | {"logger": wandb}))
    found = read_config(path).logger
    assert list(found) == ["local", "wandb"]
    assert found["wandb"].project == "p"  # type: ignore[attr-defined]
    local = {"_target_": "lunaris.metrics.loggers.LocalLogger"}
    path.write_text(OmegaConf.to_yaml(tree | {"logger": local}))
    assert list(read_config(path).logger) == ["local"]


def test_a_custom_component_brings_its_schema(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "toy_schema.py").write_text(
        textwrap.dedent(
            """
            from dataclasses import dataclass
            from lunaris.config.schema.attention import AttentionConfig
            from lunaris.config.schema.base import key

            class Toy:
                def __call__(self, layer, shape): ...

            @dataclass
            class ToyConfig(AttentionConfig):
                _target_: str = "toy_schema.Toy"
                window: int = key(4, low=1)
            """
        )
    )
    (tmp_path / "options/attention").mkdir(parents=True)
    (tmp_path / "options/attention/toy.yaml").write_text("_schema_: toy_schema.ToyConfig\n")
    source = Source(dir=str(tmp_path / "options"))
    cfg = compose(["attention=toy", "attention.window=8"], source=source)
    assert type(cfg.attention).__name__ == "ToyConfig"
    assert identity(cfg)["attention.window"] == 8
    path = tmp_path / "config.yaml"
    path.write_bytes(to_yaml(cfg))
    assert read_config(path).attention == cfg.attention
    for override, message in {
        "attention.window=wide": "attention.window=wide: must be a whole number",
        "attention.window=0": "attention.window=0: must be at least 1",
        "attention.windw=3": "attention.windw: no such key; did you mean attention.window?",
        "+attention.windw=3": "attention.windw: no such key; did you mean attention.window?",
    }.items():
        with pytest.raises(UserError) as error:
            compose(["attention=toy", override], source=source)
        assert message in str(error.value)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("_schema_: wrong.Check", "attention: window is odd"),
        ("_schema_: wrong.Default", "attention: its schema wrong.Default is wrong: "),
        ("_schema_: wrong.Unknown", "attention: its schema wrong.Unknown is wrong: "),
        ("_schema_: wrong.Check\nwindow: x", "attention.window=x: must be a whole number"),
        ("3", "Invalid loaded object type"),
    ],
)
def test_a_wrong_custom_schema_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str, message: str
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wrong", raising=False)
    (tmp_path / "wrong.py").write_text(
        textwrap.dedent(
            """
            from dataclasses import dataclass
            from lunaris.config.schema.attention import AttentionConfig

            class Toy: ...

            @dataclass
            class Check(AttentionConfig):
                _target_: str = "wrong.Toy"
                window: int = 3

                def __post_init__(self) -> None:
                    raise ValueError("window is odd")

            @dataclass
            class Default(AttentionConfig):
                _target_: str = "wrong.Toy"
                window: int = "x"

            @dataclass
            class Unknown(AttentionConfig):
                _target_: str = "wrong.Toy"
                window: "Nowhere" = 3
            """
        )
    )
    (tmp_path / "options/attention").mkdir(parents=True)
    (tmp_path / "options/attention/toy.yaml").write_text(option + "\n")
    with pytest.raises(UserError, match=message) as error:
        compose(["attention=toy"], source=Source(dir=str(tmp_path / "options")))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("option", ["gqa", "sliding_window", "mla"])
def test_a_run_of_version_4_keeps_its_masks(tmp_path: Path, option: str) -> None:
    keys = ["model.norm=pre", "model.n_kv_heads=8", "model.n_heads=8"] if option == "mla" else []
    cfg = compose(["moe=none", "data=synthetic", f"attention={option}", *keys])
    assert cfg.attention.ranges == "auto"  # type: ignore[attr-defined]
    tree: Any = OmegaConf.to_container(OmegaConf.create(to_yaml(cfg).decode()))
    del tree["attention"]["ranges"]
    path = tmp_path / "config.yaml"
    path.write_text(OmegaConf.to_yaml(tree | {"config_version": 4}))
    assert read_config(path).attention.ranges == "masked"  # type: ignore[attr-defined]
    del tree["attention"]
    path.write_text(OmegaConf.to_yaml(tree | {"config_version": 4}))
    assert read_config(path).attention.ranges == "masked"  # type: ignore[attr-defined]
