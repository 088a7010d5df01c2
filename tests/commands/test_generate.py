from __future__ import annotations

import io
import json
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
        assert sample("--speculative", *flags) == sample("--batch-size", "1", *flags)
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


@pytest.mark.slow
def test_prompts_of_a_file_are_sampled_in_batches(
    trained_on_text: RunDir, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A text depends neither on its batch nor on where its prompt comes from."""
    prompts = ["def main(", "import", "class A(B):\n    x = 1"]
    Path("lines.txt").write_text("def main(\n\nimport\n")
    Path("some.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
    folder = str(trained_on_text.path)

    def rows(*flags: str) -> list[dict[str, Any]]:
        capsys.readouterr()
        assert main([folder, "--max-new-tokens", "12", "--json", *flags]) == 0
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    both = ["--samples", "2", "--seed", "5"]
    all_at_once = rows("--prompts", "some.jsonl", *both)
    assert [(row["prompt"], row["seed"]) for row in all_at_once] == [
        (prompt, seed) for prompt in prompts for seed in (5, 6)
    ]
    assert all(row["tokens"] == 12 and row["ended"] == "length" for row in all_at_once)
    for size in ("1", "4"):
        assert rows("--prompts", "some.jsonl", "--batch-size", size, *both) == all_at_once
    assert rows("--prompts", "lines.txt", *both) == all_at_once[:4]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"import\n")))
    assert rows("--prompt", "def main(", "--prompts", "-", *both) == all_at_once[:4]

    capsys.readouterr()
    assert main([folder, "--prompts", "lines.txt", "--max-new-tokens", "12", *both]) == 0
    want = [
        f"--- prompt {i // 2 + 1}, sample {i % 2 + 1} (seed {row['seed']})\n"
        f"{row['prompt']}{row['text']}\n"
        for i, row in enumerate(all_at_once[:4])
    ]
    assert capsys.readouterr().out == "".join(want)
    assert main([folder, "--prompt", "import", "--max-new-tokens", "12", "--seed", "5"]) == 0
    assert capsys.readouterr().out == f"import{all_at_once[2]['text']}\n"


@pytest.mark.slow
def test_a_text_ends_before_a_stop_string(
    trained_on_text: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(trained_on_text.path)

    def row(*flags: str) -> dict[str, Any]:
        capsys.readouterr()
        keys = ["--prompt", "def main(", "--max-new-tokens", "40", "--json"]
        assert main([folder, *keys, *flags]) == 0
        return dict(json.loads(capsys.readouterr().out))

    free = row()
    for stop in (free["text"][9:12], free["text"][-1]):
        cut = row("--stop", stop, "--stop", "no such text")
        assert cut["text"] == free["text"][: free["text"].index(stop)]
        assert cut["ended"] == "stop" and cut["tokens"] <= free["tokens"]
    # What a stop string could have begun with is not lost at the end.
    assert row("--stop", free["text"][-1] + "!")["text"] == free["text"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "generate: needs --prompt TEXT, or --prompts FILE"),
        (["--prompts", "absent.txt"], "--prompts absent.txt: cannot be read"),
        (["--prompts", "blank.txt"], "--prompts blank.txt: holds no prompt"),
        (["--prompts", "binary.txt"], "--prompts binary.txt: must be text in UTF-8"),
        (["--prompts", "bad.jsonl"], "--prompts bad.jsonl, line 2: not JSON"),
        (["--prompts", "digits.jsonl"], "--prompts digits.jsonl, line 1: not JSON"),
        (["--prompts", "deep.jsonl"], "--prompts deep.jsonl, line 1: not JSON"),
        (["--prompts", "other.jsonl"], "--prompts other.jsonl, line 1: must be "),
        (["--prompt", "x", "--stop", ""], "--stop '': must be a text"),
        (["--prompt", "x", "--batch-size", "0"], "--batch-size 0: must be at least 1"),
        (["--prompt", "x", "--samples", "0"], "--samples 0: must be at least 1"),
    ],
)
def test_bad_prompts_are_one_message(tmp_path: Path, flags: list[str], message: str) -> None:
    Path("blank.txt").write_text("\n\n")
    Path("binary.txt").write_bytes(b"\xff")
    Path("bad.jsonl").write_text('{"prompt": "x"}\n{')
    Path("digits.jsonl").write_text('{"prompt": ' + "9" * 5000 + "}")
    Path("deep.jsonl").write_text("[" * 100_000)
    Path("other.jsonl").write_text('{"text": "x"}')
    with pytest.raises(UserError) as found:
        main([str(tmp_path), *flags])
    assert message in str(found.value)


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
