"""`lunaris plan`, from its command line to its figures; and the warning that training prints."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lunaris.commands import plan as command
from lunaris.config.compose import compose
from lunaris.devices import Machine, find_device
from lunaris.errors import UserError
from lunaris.planning import report
from lunaris.planning.plan import fitting, make_plan

_DATA = [
    "moe=switch",
    "optimizer=adamw",
    "data=synthetic",
    "data.n_tokens=1000000",
    "trainer.batch_size=16",
]


def planned(capsys: pytest.CaptureFixture[str], *argv: str) -> Any:
    assert command.main([*_DATA, "--json", *argv]) == 0
    return json.loads(capsys.readouterr().out)


def test_figures_agree_with_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ("--device", "h100", "--mfu", "0.5", "parallelism=ddp", "launch.processes=8")
    found = planned(capsys, *argv, "trainer.gradient_accumulation_steps=2")
    assert found["device"] == "H100" and found["processes"] == 8
    assert found["tokens_per_step"] == 16 * 2 * 8 * 256
    assert found["tokens"] == found["tokens_per_step"] * 600
    assert found["epochs"] == found["tokens"] / 1_000_000
    assert found["parameters"]["total"] == sum(found["parameters"]["parts"].values())
    seconds = found["flops_per_token"] * found["tokens"] / (989e12 * 0.5 * 8)
    assert found["seconds"] == pytest.approx(seconds)
    assert found["gpu_hours"] == pytest.approx(seconds * 8 / 3600)
    assert found["kwh"] == pytest.approx(seconds * 8 / 3600 * 0.7)
    memory = found["memory"]
    assert memory["weights"] == 4 * found["parameters"]["total"]
    assert memory["peak"] >= memory["weights"] + memory["optimizer"] + memory["activations"]
    assert found["checkpoint_bytes"] == memory["weights"] + memory["optimizer"]


def test_a_sharded_run_of_a_thousand_gpus_is_planned(capsys: pytest.CaptureFixture[str]) -> None:
    keys = ("parallelism=fsdp", "launch.processes=1024", "parallelism.expert_parallel=8")
    found = planned(capsys, *keys, "model=large", "--device", "B200")
    assert found["memory"]["weights"] < 4 * found["parameters"]["total"] / 900
    assert found["checkpoint_bytes"] == pytest.approx(12 * found["parameters"]["total"], rel=0.01)


def test_text_names_what_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([*_DATA, "model=large", "trainer.batch_size=64", "--device", "A100"]) == 0
    out = capsys.readouterr().out
    assert "it does not fit; nearest that may: trainer" not in out
    assert "it does not fit; nearest that may: more processes with parallelism=fsdp" in out
    assert command.main([*_DATA, "model=base", "trainer.batch_size=256", "--device", "A100"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "does not fit" in line)
    changes = line.partition("may: ")[2].split()
    cfg = compose([*_DATA, "model=base", *changes])
    again = make_plan(cfg, gpu=True)
    assert again.sequences == 256
    assert again.needed(gpu=True) <= 80e9
    assert fitting(again, int(80e9), gpu=True) == []


@pytest.mark.parametrize(
    ("preset", "gpus"),
    [("moe_ladder_l", 1), ("dense_ladder_l", 1), ("moe_1b", 1), ("moe_4b", 8), ("moe_15b", 64)],
)
def test_presets_fit_the_gpus_of_80_gb_that_they_are_for(preset: str, gpus: int) -> None:
    data = ["data=synthetic", "data.n_tokens=1000000"] if "ladder" in preset else []
    cfg = compose([f"experiment={preset}", *data], check_data=False)
    assert cfg.launch.world_size() == gpus
    plan = make_plan(cfg, gpu=True)
    assert 30e9 < plan.needed(gpu=True) < 80e9


def test_padding_is_counted_where_a_gpu_has_no_grouped_product() -> None:
    def activations(name: str | None, *keys: str) -> int:
        cfg = compose([*_DATA, "moe=top2", "trainer.batch_size=16", *keys])
        device = find_device(name) if name else None
        return make_plan(cfg, gpu=True, device=device).memory.activations

    bf16, fp16 = "trainer.precision=bf16", "trainer.precision=fp16"
    assert activations("H100", bf16) == activations("B200", bf16) == activations(None, bf16)
    assert activations("A100", bf16) == activations("L40S", bf16) > activations("H100", bf16)
    assert activations("H100", fp16) == activations("A100", bf16)
    assert activations("A100", bf16, "moe=none") == activations("H100", bf16, "moe=none")
    # One block an expert, of its capacity.
    bounded = activations("A100", bf16, "moe.capacity_factor=1.25")
    assert activations("H100", bf16) < bounded < activations("A100", bf16)
    # Even loads, which the exchange tells the host.
    spread = ("launch.processes=2", "parallelism=ddp", "parallelism.expert_parallel=2")
    assert activations("A100", bf16, *spread) < bounded


def test_a_sweep_is_a_table_with_its_sum(capsys: pytest.CaptureFixture[str]) -> None:
    argv = [*_DATA, "-m", "moe.n_experts=4,8", "seed=1,2", "--device", "A100"]
    assert command.main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:5]] == [
        "point",
        "moe.n_experts=4,seed=1",
        "moe.n_experts=4,seed=2",
        "moe.n_experts=8,seed=1",
        "moe.n_experts=8,seed=2",
    ]
    assert lines[-1].startswith("4 points, 9.83 M tokens, ")
    found = planned(capsys, "-m", "moe.n_experts=4,8")
    assert [row["name"] for row in found] == ["moe.n_experts=4", "moe.n_experts=8"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--device", "H10"], "--device H10: not a known GPU.*did you mean H100"),
        (["--mfu", "2"], "--mfu 2.0: must be above 0 and at most 1"),
        (["--mfu", "x"], "argument --mfu"),
        (["--devise", "H100"], "--devise: no such flag"),
        (["moe.n_expert=2"], "did you mean moe.n_experts"),
        (["parallelism=ddp", "parallelism.expert_parallel=3"], "must divide the world"),
        (["data=shards", "data.dir=nowhere"], "model.vocab_size=null: must be given"),
    ],
)
def test_bad_input_is_refused(argv: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        command.main(argv)


def test_data_that_is_not_prepared_can_be_planned_with(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert command.main(["data=text", "data.dir=nowhere", "data.files=x.txt", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["vocab_size"] == 32768 and found["epochs"] is None


def test_training_warns_of_too_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def machine(gpus: list[str], gpu: int, free: int) -> None:
        monkeypatch.setattr(report, "this_machine", lambda: Machine(gpus, gpu, 2 * free, free))

    small = compose(_DATA)
    machine([], 0, 1 << 30)
    assert report.memory_warning(small) is None
    machine([], 0, 100 << 20)
    text = report.memory_warning(small)
    assert text is not None and "260.80 MiB of memory" in text and "100.00 MiB" in text
    # GPUs count where they are used.
    machine(["NVIDIA H100 80GB HBM3"], 80 << 30, 100 << 20)
    assert report.memory_warning(small) is None
    machine(["NVIDIA H100 80GB HBM3"], 2 << 30, 100 << 30)
    assert "this machine has" in (report.memory_warning(small) or "")
    # GPUs without bf16 train in fp32, which takes more.
    needed = {}
    for bf16 in (True, False):
        old = Machine(["Tesla T4"], 1 << 20, 2 << 30, 1 << 30, bf16)
        monkeypatch.setattr(report, "this_machine", lambda old=old: old)
        needed[bf16] = report.memory_warning(small)
    fp32 = compose([*_DATA, "trainer.precision=fp32"])
    assert needed[True] != needed[False] == report.memory_warning(fp32)
    slurm = compose([*_DATA, "launch=slurm", "launch.mem_gb=0.2", "launch.tasks_per_node=1"])
    assert "launch.mem_gb=0.2 gives it" in (report.memory_warning(slurm) or "")


def test_what_cannot_be_planned_trains_without_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "this_machine", lambda: Machine([], 0, 2, 1))
    cfg = compose(_DATA)
    cfg.attention._target_ = "mine.Attention"
    assert report.memory_warning(cfg) is None
