"""lm-evaluation-harness scores an exported folder, where it is installed."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lunaris.__main__ import main
from lunaris.data.stdlib import library_files
from lunaris.runs.run_dir import RunDir

# The Python of an environment of its own that has lm-eval.
PYTHON = os.environ.get("LUNARIS_LM_EVAL_PYTHON", sys.executable)

_TASK = """
task: own_choices
dataset_path: json
dataset_kwargs: {data_files: {test: QUESTIONS}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
target_delimiter: ""
metric_list: [{metric: acc}, {metric: acc_norm}]
"""


def questions(number: int) -> list[dict[str, Any]]:
    """Return lines of Python with their last word, or that of one of three other lines."""
    lines = []
    for path in sorted(library_files())[:40]:
        for line in path.read_text(errors="ignore").splitlines():
            found = re.fullmatch(r"(.*\S )(\w{3,12})", line)
            if found and len(line) < 60 and line.isascii():
                lines.append(found.groups())
    step = len(lines) // (4 * number)
    taken = lines[:: max(1, step)][: 4 * number]
    return [
        {
            "context": taken[i][0],
            "choices": [taken[(i + number * ((j - i) % 4)) % len(taken)][1] for j in range(4)],
            "answer": i % 4,
        }
        for i in range(number)
    ]


@pytest.mark.slow
def test_the_harness_agrees_with_ours(
    tiny: Callable[..., Any], run_here: Callable[[Any], RunDir], capsys: pytest.CaptureFixture[str]
) -> None:
    """It starts a context at once, ours after an end of text: few questions may differ."""
    if "LUNARIS_LM_EVAL_PYTHON" not in os.environ and not importlib.util.find_spec("lm_eval"):
        pytest.skip("lm-eval is not installed here, and LUNARIS_LM_EVAL_PYTHON names no Python")
    keys = ["data=stdlib", "data.vocab_size=300", "moe=top2", "model.norm=pre"]
    keys += ["optimizer.learning_rate=1e-2", "trainer.max_steps=60", "model.max_seq_len=64"]
    run_dir = run_here(tiny(*keys, "model.d_model=32"))
    assert main(["export", str(run_dir.path), "--to", "out"]) == 0
    Path("q.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions(60)))
    Path("task").mkdir()
    Path("task/own.yaml").write_text(_TASK.replace("QUESTIONS", str(Path("q.jsonl").absolute())))
    command = [
        PYTHON, "-m", "lm_eval", "--model", "hf", "--model_args", "pretrained=out,dtype=float32",
        "--include_path", "task", "--tasks", "own_choices", "--device", "cpu", "--batch_size", "8",
    ]  # fmt: skip
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(Path("hf_home"))}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | offline)
    assert done.returncode == 0, done.stdout + done.stderr
    theirs = {
        name: float(value)
        for name, value in re.findall(r"\|(acc|acc_norm) *\|[^|]*\|\s*([\d.]+)\|", done.stdout)
    }
    capsys.readouterr()
    assert main(["evaluate", str(run_dir.path), "--choices", "q.jsonl", "--json"]) == 0
    (ours,) = json.loads(capsys.readouterr().out)
    with capsys.disabled():
        print(f"\n{done.stdout}\n{ours}")
    assert theirs["acc"] == pytest.approx(ours["accuracy"], abs=0.1)
    assert theirs["acc_norm"] == pytest.approx(ours["accuracy_per_byte"], abs=0.1)
