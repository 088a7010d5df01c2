from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lunaris.commands.generate import main
from lunaris.errors import UserError
from lunaris.rundir import RunDir


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


def test_a_run_without_a_tokenizer_is_refused(
    tiny: Callable[..., Any], run_here: Callable[[Any], RunDir]
) -> None:
    run_dir = run_here(tiny("trainer.max_steps=1"))
    with pytest.raises(UserError, match="without a tokenizer"):
        main([str(run_dir.path), "--prompt", "x"])


@pytest.mark.parametrize(
    ("flag", "value"), [("--temperature", "-1"), ("--top-p", "0"), ("--top-k", "0")]
)
def test_sampling_options_out_of_range_are_refused(tmp_path: Path, flag: str, value: str) -> None:
    with pytest.raises(UserError, match=f"{flag} {value}"):
        main([str(tmp_path), "--prompt", "x", flag, value])
