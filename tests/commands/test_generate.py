from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lunaris.commands.evaluate import main as evaluate
from lunaris.commands.generate import main
from lunaris.data.prepare.build import build_shards
from lunaris.data.prepare.folder_tokenizer import train_bpe
from lunaris.data.text import TextData
from lunaris.errors import UserError
from lunaris.runs.run_dir import RunDir


@pytest.fixture
def trained_on_text(tiny: Callable[..., Any], run_here: Callable[[Any], RunDir]) -> RunDir:
    cfg = tiny("data=stdlib", "data.vocab_size=300", "trainer.max_steps=2")
    return run_here(cfg)


@pytest.mark.slow
def test_samples_start_with_the_prompt_and_depend_only_on_the_seed(
    trained_on_text: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    def sample(*flags: str) -> str:
        capsys.readouterr()
        folder = str(trained_on_text.path)
        assert main([folder, "--prompt", "def main(", "--max-new-tokens", "12", *flags]) == 0
        return capsys.readouterr().out

    first = sample("--seed", "1", "--top-k", "20", "--top-p", "0.9")
    assert first.startswith("def main(") and len(first) > len("def main(") + 3
    assert first == sample("--seed", "1", "--top-k", "20", "--top-p", "0.9")
    assert first != sample("--seed", "2", "--top-k", "20", "--top-p", "0.9")
    assert sample("--temperature", "0") == sample("--temperature", "0", "--seed", "5")


@pytest.mark.slow
def test_drafts_change_no_text(
    tiny: Callable[..., Any],
    run_here: Callable[[Any], RunDir],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prepared("first", "one two three ", "[END]")
    keys = ["data=shards", "data.dir=first", "moe=switch", "optimizer.learning_rate=1e-2"]
    cfg = tiny(*keys, "objective=multi_token", "objective.depth=2", "trainer.max_steps=40")
    folder = str(run_here(cfg).path)
    plain = str(run_here(tiny(*keys, "trainer.max_steps=1", name="plain")).path)

    def sample(*flags: str) -> str:
        capsys.readouterr()
        assert main([folder, "--prompt", "one two", "--samples", "2", *flags]) == 0
        return capsys.readouterr().out

    for flags in (["--temperature", "0"], ["--temperature", "1", "--top-k", "9"]):
        assert sample("--speculative", *flags) == sample(*flags)
    capsys.readouterr()
    with pytest.raises(UserError, match="--speculative: .*objective=multi_token"):
        main([plain, "--prompt", "one", "--speculative"])
    monkeypatch.delattr("lunaris.model.cache.LayerCache.truncate")  # As a custom attention's.
    with pytest.raises(UserError, match=r"--speculative: .* no method truncate\(length\)"):
        main([folder, "--prompt", "one", "--speculative"])
    assert capsys.readouterr().out == ""


def prepared(folder: str, words: str, eot: str) -> None:
    """Make shards of documents of `words` whose tokenizer ends a text by an unusual token."""
    Path(folder).mkdir()
    train_bpe([words * 50], 280, Path(folder, "made.json"))
    Path(f"{folder}.json").write_text(
        Path(folder, "made.json").read_text().replace("<|endoftext|>", eot)
    )
    Path(folder, "made.json").unlink()
    Path(f"{folder}.txt").write_text(words * 200)
    keys = {"tokenizer": f"{folder}.json", "eot": eot, "processes": 1, "val_fraction": 0.0}
    build_shards(TextData(dir=folder, files=f"{folder}.txt", **keys))


def test_the_runs_own_tokenizer_is_kept_and_no_other_taken_for_it(
    tiny: Callable[..., Any], run_here: Callable[[Any], RunDir], capsys: pytest.CaptureFixture[str]
) -> None:
    prepared("first", "one two three ", "[END]")
    keys = ["data=shards", "data.dir=first", "trainer.max_steps=2", "checkpoint.save_interval=1"]
    run_dir = run_here(tiny(*keys))
    assert main([str(run_dir.path), "--prompt", "one", "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().out.count("one") >= 1
    prepared("second", "uno dos tres ", "[END]")
    with pytest.raises(UserError, match=r"second/tokenizer\.json: another tokenizer than the run"):
        evaluate([str(run_dir.path), "data.dir=second"])
    # Other shards in the folder that the run was begun with.
    shutil.rmtree("first")
    Path("second").rename("first")
    shutil.rmtree(run_dir.checkpoints / "step_00000002")
    with pytest.raises(UserError, match=r"first/tokenizer\.json: another tokenizer than the run"):
        run_here(tiny(*keys))


@pytest.mark.slow
def test_nothing_is_printed_before_what_is_wrong(
    trained_on_text: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    with pytest.raises(UserError, match="no checkpoint of step 7"):
        main([str(trained_on_text.path), "--prompt", "x", "--at", "7"])
    with pytest.raises(UserError, match="--prompt: must be text in UTF-8"):
        main([str(trained_on_text.path), "--prompt", "\udcff"])
    assert capsys.readouterr().out == ""


def test_a_run_without_a_tokenizer_is_refused(
    tiny: Callable[..., Any], run_here: Callable[[Any], RunDir]
) -> None:
    run_dir = run_here(tiny("trainer.max_steps=1"))
    with pytest.raises(UserError, match="without a tokenizer"):
        main([str(run_dir.path), "--prompt", "x"])


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--temperature", "-1"),
        ("--temperature", "inf"),
        ("--temperature", "1e-45"),
        ("--top-p", "0"),
        ("--top-k", "0"),
        ("--seed", "-1"),
        ("--seed", str(2**63)),
    ],
)
def test_sampling_options_out_of_range_are_refused(tmp_path: Path, flag: str, value: str) -> None:
    with pytest.raises(UserError, match=f"{flag} {value}"):
        main([str(tmp_path), "--prompt", "x", flag, value])
