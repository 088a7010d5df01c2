"""`lunaris check`: its whole output on this machine, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lunaris.__main__ import main
from lunaris.check import stage
from lunaris.check.item import skipped
from lunaris.check.runs import ShortRuns

TINY = [
    "model.d_model=16", "model.n_layers=2", "model.n_heads=2", "model.n_kv_heads=1",
    "model.max_seq_len=16", "model.multiple_of=8", "moe.n_experts=4", "trainer.batch_size=4",
    "trainer.device=cpu", "data=synthetic", "data.vocab_size=64", "data.n_tokens=20000",
]  # fmt: skip
NAMES = [
    "software", "cores", "memory", "open files", "disk", "temporary", "device", "product",
    "experts", "attention", "ranges", "all-reduce", "agreement", "meshes", "training", "waits",
    "exposed", "micro-batch", "resume", "hang drill", "compilation",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_processes_are_ready_and_leave_nothing_behind(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    # Compiling takes most of the time, and this machine may have no compiler.
    monkeypatch.setattr(ShortRuns, "compiled", lambda self: skipped("compilation", "in this test"))
    given = ["parallelism=fsdp", "launch.processes=2"]
    assert main(["check", *TINY, *given, "--json", "--seconds", "800"]) == 0
    found = json.loads(capsys.readouterr().out)
    items = {item["name"]: item for item in found["items"]}
    assert list(items) == NAMES and found["ok"]
    left_out = {name for name, item in items.items() if item["state"] == "skip"}
    assert left_out == {"waits", "micro-batch", "compilation"}
    assert 0 <= items["exposed"]["figures"]["share"] < 1
    assert items["training"]["figures"]["tokens_per_s"] > 0
    assert "equal bit for bit" in items["resume"]["text"]
    assert "rank 1, stopped in a step, was named" in items["hang drill"]["text"]
    assert items["meshes"]["figures"]["meshes"][:2] == ["ddp", "fsdp"]
    assert not list((tmp_path / "temporary").iterdir()) and not Path("runs").exists()


@pytest.mark.parametrize(("gpus", "code"), [("0,1", 1), ("", 0)])
def test_what_fails_keeps_its_logs(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    gpus: str, code: int,
) -> None:  # fmt: skip
    """A machine with GPUs of which torch sees none, as with a torch for CPUs."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    for name in ("train", "resumed", "compiled"):
        monkeypatch.setattr(ShortRuns, name, lambda self, name=name: skipped(name, "in this test"))
    given = [text for text in TINY if text != "trainer.device=cpu"]
    assert main(["check", *given]) == code
    printed = capsys.readouterr().out
    kept = list((tmp_path / "temporary").iterdir())
    if code:
        assert "fail  device       torch" in printed and "this machine has 2" in printed
        assert "1 failed: device" in printed and f"logs    {kept[0]}" in printed
        assert [path.name for path in (kept[0] / "probe").iterdir() if path.is_dir()] == ["logs"]
    else:
        assert not kept and "nothing failed" in printed


def test_more_processes_than_gpus_are_refused_at_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    given = [text for text in TINY if text != "trainer.device=cpu"]
    assert main(["check", *given, "launch.processes=4", "parallelism=ddp"]) == 2
    assert "launch: 4 processes, but this machine has 2 GPUs" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "0")
    assert main(["check", *TINY]) == 2
    assert "not under torchrun; give launch.processes=N" in capsys.readouterr().err


def test_without_time_what_is_left_is_skipped(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", *TINY, "--seconds", "0.001"]) == 0
    printed = capsys.readouterr().out
    for name in ("device", "training", "waits", "resume", "hang drill", "compilation"):
        assert f"skip  {name:<12} no time is left; give --seconds" in printed
    assert printed.rstrip().endswith("nothing failed, 6 skipped")


@pytest.mark.parametrize(
    ("code", "seconds", "said"),
    [
        (None, 50, "skip  product      did not end within 3 s; give --seconds"),
        # With all of its time it hangs.
        (None, 1200, "fail  product      did not end within 3 s\n"),
        (-9, 1200, "fail  product      killed by SIGKILL"),
    ],
)
def test_too_little_time_does_not_fail_but_a_hang_and_steps_need_the_training(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    code: int | None, seconds: int, said: str,
) -> None:  # fmt: skip
    modules: dict[str, float] = {}

    def run(module: str, path: Path, timeout_s: float) -> stage.Ended:
        modules[module] = timeout_s
        (path / "items.json").write_text(json.dumps({"items": [], "doing": "product"}))
        return stage.Ended(code, 3.0, path / "check.log")

    monkeypatch.setattr(stage, "run_module", run)
    for name in ("train", "resumed", "compiled"):
        monkeypatch.setattr(ShortRuns, name, lambda self, name=name: skipped(name, "in this test"))
    assert main(["check", *TINY, "--seconds", str(seconds)]) == int(said.startswith("fail"))
    printed = capsys.readouterr().out
    assert said in printed and "skip  waits        needs the training above" in printed
    # More time is more time for this, too.
    assert list(modules) == ["lunaris.check.probe"]
    assert seconds / 3 - 10 < modules["lunaris.check.probe"] <= max(seconds / 3, 100)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["-m", "seed=1,2"], "--multirun: goes with lunaris train, not with check"),
        (["--cfg"], "--cfg: goes with lunaris train, not with check"),
        (["--seconds", "nan"], "--seconds nan: must be above 0"),
        (["--seconds", "0"], "--seconds 0: must be above 0"),
        (["--seconds", "x"], "--seconds"),
        (["--jsn"], "--jsn: no such flag"),
        (["moe.n_expert=4"], "moe.n_expert: no such key; did you mean moe.n_experts?"),
    ],
)
def test_mistakes_are_refused(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", *argv]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("error:") == 1
