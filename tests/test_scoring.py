"""Scores of texts and questions equal a plain loop over the model's logits."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lunaris.__main__ import main
from lunaris.data.tokenizer import TextTokenizer
from lunaris.inference import load_trained
from lunaris.runs.run_dir import RunDir

pytestmark = pytest.mark.slow

LENGTH = 16


@pytest.fixture(scope="module")
def _on_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scored") / "run"


@pytest.fixture
def run(_on_text: Path, tiny: Callable[..., Any], run_here: Callable[[Any], RunDir]) -> RunDir:
    if not _on_text.exists():
        keys = ["data=stdlib", "data.vocab_size=300", "optimizer.learning_rate=1e-2"]
        run_here(tiny(*keys, f"out_dir={_on_text}", "moe.capacity_factor=1.0"))
    return RunDir(_on_text)


@pytest.fixture
def parts(run: RunDir) -> tuple[Any, TextTokenizer]:
    model, _ = load_trained(run.read_config(), run, None)
    return model, TextTokenizer(run.tokenizer_path)


@torch.no_grad()
def nats(parts: tuple[Any, TextTokenizer], context: list[int], targets: list[int]) -> float:
    """Return the summed loss of targets after a context, from the logits of one forward."""
    model, _ = parts
    ids = torch.tensor([context + targets])
    logs = model.logits(ids[:, :-1])[0].double().log_softmax(-1)
    return -sum(float(logs[len(context) - 1 + i, t]) for i, t in enumerate(targets))


def evaluated(capsys: pytest.CaptureFixture[str], *args: object) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert main(["evaluate", *map(str, args), "--json"]) == 0
    return list(json.loads(capsys.readouterr().out))


TEXT = "def f(x):\n    return 'naïve 漢字' * x  # 😀\n" * 3


def test_a_text_counts_every_token_once(
    run: RunDir, parts: tuple[Any, TextTokenizer], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("a.txt").write_text(TEXT)
    Path("b.txt").write_text("x")
    tokenizer = parts[1]
    ids = tokenizer.encode([TEXT.encode()])[0].tolist()
    assert len(ids) > 3 * LENGTH and len(ids) % LENGTH
    after = [tokenizer.eot_id, *ids]
    windows = range(0, len(ids), LENGTH)
    want = sum(nats(parts, after[i : i + 1], ids[i : i + LENGTH]) for i in windows)
    first, second, both = evaluated(capsys, run.path, "a.txt", "b.txt")
    assert (first["text"], first["step"], first["tokens"]) == ("a.txt", 8, len(ids))
    assert first["loss"] == pytest.approx(want / len(ids), rel=1e-5)
    assert first["perplexity"] == pytest.approx(math.exp(want / len(ids)), rel=1e-5)
    bits = want / math.log(2) / len(TEXT.encode())
    assert first["bits_per_byte"] == pytest.approx(bits, rel=1e-5)
    assert both["text"] == "(all)" and both["tokens"] == len(ids) + second["tokens"]
    total = first["loss"] * len(ids) + second["loss"] * second["tokens"]
    assert both["loss"] * both["tokens"] == pytest.approx(total, rel=1e-6)


def test_a_stride_gives_each_token_more_context(
    run: RunDir, parts: tuple[Any, TextTokenizer], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("a.txt").write_text(TEXT)
    tokenizer, stride = parts[1], 5
    ids = tokenizer.encode([TEXT.encode()])[0].tolist()
    after, want, done, start = [tokenizer.eot_id, *ids], 0.0, 0, 0
    while done < len(ids):
        end = min(start + LENGTH, len(ids))
        want += nats(parts, after[start : done + 1], ids[done:end])
        done, start = end, start + stride
    (row,) = evaluated(capsys, run.path, "a.txt", "--stride", stride)
    assert row["loss"] == pytest.approx(want / len(ids), rel=1e-5)


def test_choices_are_compared_by_their_likelihood(
    run: RunDir, parts: tuple[Any, TextTokenizer], capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = parts[1]
    questions = [
        {"context": "def f(", "choices": ["self):", "x", "漢字漢字"], "answer": 0},
        {"context": "import ", "choices": ["os", "a much longer name"], "answer": 1},
        {"context": "", "choices": ["class", "}"], "answer": 0},
        {"context": "x = 1\n" * 20, "choices": ["y", "import sys, os"], "answer": 0},
    ]
    Path("q.jsonl").write_text("\n".join(map(json.dumps, questions)) + "\n\n")
    plain, by_bytes = 0, 0
    for question in questions:
        context, found = str(question["context"]), []
        for choice in list(question["choices"]):  # type: ignore[call-overload]
            ids = tokenizer.encode([(context + choice).encode()])[0].tolist()
            before = len(tokenizer.encode([context.rstrip().encode()])[0])
            shown = [tokenizer.eot_id, *ids]
            cut = max(0, len(shown) - LENGTH - 1)
            found.append(-nats(parts, shown[cut : before + 1], ids[before:]))
        sizes = [len(choice.encode()) for choice in question["choices"]]  # type: ignore[attr-defined]
        per_byte = [n / size for n, size in zip(found, sizes, strict=True)]
        plain += found.index(max(found)) == question["answer"]
        by_bytes += per_byte.index(max(per_byte)) == question["answer"]
    (row,) = evaluated(capsys, run.path, "--choices", "q.jsonl")
    assert row["questions"] == 4 and row["choices"] == "q.jsonl"
    assert (row["accuracy"], row["accuracy_per_byte"]) == (plain / 4, by_bytes / 4)


def test_several_runs_are_one_table(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.txt").write_text(TEXT)
    rows = evaluated(capsys, run.path, run.path, "a.txt")
    assert len(rows) == 2 and rows[0] == rows[1]
    few = ["--max-sequences", "8"]
    rows = evaluated(capsys, run.path, run.path, "--at", 4, *few)
    assert [row["step"] for row in rows] == [4, 4]
    capsys.readouterr()
    assert main(["evaluate", str(run.path), str(run.path), *few]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["run", "step", "val/loss", "val/perplexity"] and len(table) == 3
    assert table[1] == table[2] and "8" in table[1].split()


BAD: list[tuple[list[str], str]] = [
    (["absent.txt"], "absent.txt: not a run's folder and no text file"),
    (["empty.txt"], "empty.txt: is empty"),
    (["binary.txt"], r"binary.txt: not text in UTF-8 (byte 2)"),
    (["a.txt", "--stride", "0"], "--stride 0: must be at least 1"),
    (["--stride", "4"], "--stride 4: is for text files"),
    (["a.txt", "--max-sequences", "4"], "--max-sequences 4: is for validation shards"),
    (["a.txt", "data.dir=x"], "data.dir=x: is for validation shards"),
    (["a.txt", "--at", "5"], "no checkpoint of step 5"),
    (["a.txt", "trainer.precison=fp32"], "did you mean trainer.precision"),
    (["--choices", "absent.jsonl"], "absent.jsonl: cannot be read"),
    (["--choices", "empty.jsonl"], "empty.jsonl: holds no question"),
]
# One line of a file of questions, and what is said of it.
LINES = [
    ("{", "line 2: not JSON"),
    (f'{{"answer": {"9" * 5000}}}', "line 2: not JSON"),
    ("[" * 100_000, "line 2: not JSON"),
    ("[]", 'line 2: must be {"context"'),
    ('{"context": "a"}', "line 2: lacks answer, choices"),
    ('{"context": 1, "choices": ["a", "b"], "answer": 0}', "line 2: context=1: must be a text"),
    ('{"context": "", "choices": ["a"], "answer": 0}', "line 2: choices: must be a list of at le"),
    ('{"context": "", "choices": ["a", ""], "answer": 0}', "line 2: choices: holds ''"),
    ('{"context": "", "choices": ["a", 2], "answer": 0}', "line 2: choices: holds 2"),
    ('{"context": "", "choices": ["a", "b"], "answer": 2}', "line 2: answer=2: must be an index"),
    ('{"context": "", "choices": ["a", "b"], "answer": true}', "line 2: answer=True"),
    ('{"context": "\\ud800", "choices": ["a", "b"], "answer": 0}', "line 2: holds half of a surr"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_input_is_one_message(
    run: RunDir, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("a.txt").write_text(TEXT)
    Path("empty.txt").write_text("")
    Path("empty.jsonl").write_text("\n")
    Path("binary.txt").write_bytes(b"ab\xff\xfe")
    refused([str(run.path), *arguments], message, capsys)


@pytest.mark.parametrize(("line", "message"), LINES)
def test_a_malformed_question_is_named_with_its_line(
    run: RunDir, line: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    good = '{"context": "a", "choices": ["b", "c"], "answer": 1}'
    Path("q.jsonl").write_text(f"{good}\n{line}\n{good}\n")
    refused([str(run.path), "--choices", "q.jsonl"], message, capsys)


def refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(Path.cwd().rglob("*"))
    capsys.readouterr()
    assert main(["evaluate", *arguments]) == 2
    out, error = capsys.readouterr()
    assert message in error and error.count("\n") == 1 and out == ""
    assert sorted(Path.cwd().rglob("*")) == before
