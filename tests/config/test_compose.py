"""Composition: precedence, names, custom options and classes."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from lunaris.config.compose import Composer, Source, compose, schema_nodes
from lunaris.config.hydra_internals import register_schemas
from lunaris.config.run_names import join_names, point_name, run_name, sweep_name
from lunaris.errors import UserError


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_precedence(tmp_path: Path) -> None:
    # Each layer sets one key more than the one that wins over it.
    write(
        tmp_path / "train.yaml",
        "defaults: [schema/train, _self_, {model: mine}, {attention: gqa}, {moe: none},"
        " {objective: next_token}, {data: synthetic},"
        " {parallelism: single}, {optimizer: adamw}, {schedule: constant}, {trainer: default},"
        " {checkpoint: default}, {logger: local}, {launch: local}, {experiment: null}]\n"
        "model: {d_model: 8, n_layers: 8, n_heads: 8, max_seq_len: 8}\n",
    )
    write(
        tmp_path / "model/mine.yaml",
        "d_model: 16\nn_layers: 16\nn_heads: 16\n",
    )
    write(
        tmp_path / "experiment/more.yaml", "# @package _global_\nmodel: {d_model: 32, n_heads: 4}"
    )
    source = Source(path=str(tmp_path))
    schema = compose([]).model
    model = compose(["experiment=more", "model.n_heads=2"], source=source).model
    assert model.n_kv_heads == schema.n_kv_heads == 2  # schema
    assert model.n_layers == 16  # option over train.yaml
    assert model.d_model == 32  # experiment over option
    assert model.n_heads == 2  # command line over all


@pytest.mark.parametrize(
    "overrides",
    [
        ["moe=top2", "moe.n_experts=16", "moe.capacity_factor=null"],
        ["experiment=smoke", "moe=none", "model={d_model: 64, n_heads: 2}", "seed=7"],
        ["launch=slurm", "launch.additional_parameters.mail_type=END", "launch.setup=[a,b]"],
        [
            "data=text",
            "data.files={a: [x.txt]}",
            "data.weights={a: 2}",
            "optimizer.betas=[0.8,0.9]",
        ],
        ["out_dir=runs/${seed}/x", "trainer.max_steps=${seed}"],
    ],
)
def test_a_command_line_gives_what_hydra_itself_composes(overrides: list[str]) -> None:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_module

    register_schemas(schema_nodes())
    with initialize_config_module("lunaris.conf", version_base="1.3"):
        # Hydra wants a plus before what no schema holds, an entry of a map.
        plus = ["+" + text if text.count(".") > 1 else text for text in overrides]
        expected = hydra_compose("train", plus)
    assert Composer().compose_raw(overrides) == expected


def test_points_of_a_sweep_share_a_base_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    from lunaris.config import compose as module

    calls: list[list[str]] = []
    whole = module.compose_options
    monkeypatch.setattr(module, "compose_options", lambda *a: calls.append(a[1]) or whole(*a))
    points = [
        [f"moe={moe}", f"moe.n_experts={n}", f"data.n_tokens={4000 * n}", "data=synthetic"]
        for moe in ("switch", "top2")
        for n in (8, 4, 2)
    ]
    composer = Composer()
    together = [composer.compose(point) for point in points]
    assert calls == [["moe=switch", "data=synthetic"], ["moe=top2", "data=synthetic"]]
    assert together == [compose(point) for point in points]


def test_an_option_wins_over_the_schema_and_an_override_over_the_option() -> None:
    assert compose(["moe=top2"]).moe.n_experts_per_token == 2
    assert compose(["moe=top2", "moe.n_experts_per_token=3"]).moe.n_experts_per_token == 3


def test_a_dense_model_has_no_expert_keys() -> None:
    assert list(vars(compose(["moe=none"]).moe)) == ["_target_"]


def test_an_experiments_group_can_be_chosen_otherwise() -> None:
    cfg = compose(["experiment=smoke", "moe=none", "data=stdlib"])
    assert cfg.moe._target_.endswith("DenseFactory")
    assert cfg.data._target_.endswith("StdlibData")
    assert cfg.trainer.max_steps == 10


def test_no_experiment() -> None:
    cfg = compose(["experiment=null"])
    assert (cfg.experiment, cfg.name) == (None, "default")


def test_entries_of_a_map_need_no_plus() -> None:
    cfg = compose(["launch=slurm", "launch.additional_parameters.mail_type=END"])
    assert cfg.launch.additional_parameters == {"mail_type": "END"}
    data = ["data=text", "data.dir=x", "data.files.wiki=[a,b]", "data.files.code=[c]"]
    assert compose(data, check_data=False).data.files == {"wiki": ["a", "b"], "code": ["c"]}


def test_a_folder_with_more_options(tmp_path: Path) -> None:
    write(tmp_path / "mine/moe/eight.yaml", "defaults: [top2]\nn_experts: 24\n")
    source = Source(dir=str(tmp_path / "mine"))
    assert compose(["moe=eight"], source=source).moe.n_experts == 24
    with pytest.raises(UserError, match="did you mean eight"):
        compose(["moe=eigth"], source=source)
    with pytest.raises(UserError, match="--config-dir nowhere: no such folder"):
        compose([], source=Source(dir="nowhere"))


def test_an_option_without_a_schema_is_checked_by_its_class(tmp_path: Path) -> None:
    text = "_target_: lunaris.moe.factory.MoEFactory\n"
    write(tmp_path / "moe/plain.yaml", text + "n_experts: 6\n")
    write(tmp_path / "moe/typo.yaml", text + "n_expert: 6\n")
    write(tmp_path / "moe/wrong.yaml", text + "n_experts: six\n")
    write(tmp_path / "moe/empty.yaml", "n_experts: 6\n")
    source = Source(dir=str(tmp_path))
    moe = compose(["moe=plain"], source=source).moe
    assert (moe.n_experts, moe.balancing) == (6, "aux_loss")
    for option, message in {
        "typo": "n_expert: no such key; did you mean",
        "wrong": "n_experts=six: must be a whole number",
        "empty": "moe._target_=: must be the dotted path of a class",
    }.items():
        with pytest.raises(UserError, match=message):
            compose([f"moe={option}"], source=source)


def test_a_custom_class_may_have_any_keys(tmp_path: Path) -> None:
    write(tmp_path / "moe/mine.yaml", "_target_: functools.partial\nsecret: 1\n")
    source = Source(dir=str(tmp_path))
    cfg = compose(["moe=mine", "moe.secret=2", "+moe.other=3"], source=source)
    assert vars(cfg.moe) == {"_target_": "functools.partial", "secret": 2, "other": 3}
    with pytest.raises(UserError, match=r"write \+moe.others="):
        compose(["moe=mine", "moe.others=2"], source=source)


def test_a_logger_option_without_a_name_says_what_it_needs(tmp_path: Path) -> None:
    write(tmp_path / "logger/mine.yaml", "_target_: json.JSONDecoder\n")
    with pytest.raises(UserError, match="begin it with `# @package logger.NAME`"):
        compose(["logger=mine"], source=Source(dir=str(tmp_path)))


def test_faults_in_files_name_the_file_and_the_key(tmp_path: Path) -> None:
    start = "# @package _global_\n"
    write(tmp_path / "experiment/typo.yaml", start + "moe: {n_expert: 4}\n")
    write(tmp_path / "experiment/wrong.yaml", start + "moe: {n_experts: four}\n")
    write(tmp_path / "experiment/top.yaml", start + "moo: {n_experts: 4}\n")
    write(tmp_path / "experiment/option.yaml", start + "defaults: [{override /moe: swich}]\n")
    write(tmp_path / "experiment/broken.yaml", start + "moe: [\n")
    source = Source(dir=str(tmp_path))
    for option, message in {
        "typo": r"experiment/typo: moe.n_expert: no such key; did you mean moe.n_experts\?",
        "wrong": "experiment/wrong: moe.n_experts=four: must be a whole number",
        "top": "experiment/top: moo: no such key",
        "option": "moe=swich: no such option; .*; did you mean switch",
        "broken": "experiment/broken",
    }.items():
        with pytest.raises(UserError, match=message):
            compose([f"experiment={option}"], source=source)


def test_names() -> None:
    assert run_name([]) == "default"
    assert run_name(["moe=top2"]) == "moe=top2"
    assert run_name(["moe/router=softmax"]) == "moe.router=softmax"
    assert run_name(["experiment=smoke", "moe=top2"]) == "smoke,moe=top2"
    assert run_name(["launch.processes=2", "logger=wandb", "parallelism=ddp"]) == "default"
    assert run_name(["moe=switch", "moe=top2"]) == "moe=top2"
    assert run_name(["optimizer.betas=[0.9,0.99]"]) == "optimizer.betas=0.9-0.99"
    assert sweep_name(["moe=a,b", "launch.processes=1,2"], ["launch.processes=1,2"]) == (
        "moe=a-b,launch.processes=1-2"
    )
    assert point_name(["name=x"]) == "x"
    assert point_name(["name=x", "moe=top2"]) == "x,moe=top2"
    assert point_name(["optimizer.shift=-1"]) == "optimizer.shift=-1"
    assert compose(["name=mine", "moe=top2"]).name == "mine"


def test_a_name_does_not_depend_on_the_order_of_overrides() -> None:
    overrides = ["moe=top2", "experiment=smoke", "moe.n_experts=4", "seed=3", "model=tiny"]
    names = set()
    for seed in range(10):
        random.Random(seed).shuffle(overrides)
        names.add(run_name(overrides))
    assert names == {"smoke,model=tiny,moe=top2,seed=3,moe.n_experts=4"}


def test_names_are_safe_and_differ_where_overrides_do() -> None:
    nasty = ["data.dir=/a b/c", "data.dir=/a-b/c", "data.dir=../a", "name2=ü", f"x={'y' * 300}"]
    names = [join_names([text]) for text in nasty]
    assert len(set(names)) == len(names)
    for name in names:
        assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789.=-")
        assert len(name) <= 80 and name[0] not in ".-"


_FACTORY = "class MyFactory:\n    def __call__(self, layer, shape): ...\n"


def test_a_custom_class_is_imported_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(os.getcwd())
    Path("spelt.py").write_text(_FACTORY)
    Path("made.py").write_text(
        "import sys\n"
        "made = type('Made', (), {'__call__': print})\n"
        "setattr(sys.modules[__name__], 'MyF' + 'actory', made)\n"
    )
    Path("broken").mkdir()
    Path("broken/__init__.py").write_text("raise RuntimeError('no licence')\n")
    Path("broken/mine.py").write_text(_FACTORY)
    for target in ("spelt.MyFactory", "made.MyFactory"):
        assert compose([f"moe._target_={target}"]).moe._target_ == target
    for target, message in (
        ("spelt.MyFactry", r"spelt has no MyFactry; did you mean MyFactory\?"),
        ("broken.mine.MyFactory", "cannot be imported: RuntimeError: no licence"),
    ):
        with pytest.raises(UserError, match=message):
            compose([f"moe._target_={target}"])


def test_a_whole_number_may_be_written_with_an_exponent() -> None:
    cfg = compose(["trainer.max_steps=1e3", "trainer.eval_steps=2e0"])
    assert (cfg.trainer.max_steps, cfg.trainer.eval_steps) == (1000, 2)
    assert type(cfg.trainer.max_steps) is int and type(cfg.trainer.eval_steps) is int
