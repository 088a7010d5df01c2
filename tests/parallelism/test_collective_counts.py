"""The collectives of an optimizer step are those of the golden file, and of the documentation."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def counts() -> ModuleType:
    """Return the script that counts collectives."""
    path = Path(__file__).with_name("collective_counts.py")
    spec = importlib.util.spec_from_file_location("collective_counts", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_a_step_issues_the_collectives_of_the_golden_file(
    counts: ModuleType, tmp_path: Path
) -> None:
    """More of them, larger ones or later ones are slower: change the file only on purpose.

    `python tests/parallelism/collective_counts.py` writes it again.
    """
    assert counts.count(tmp_path) == json.loads(counts.GOLDEN.read_text())


def test_the_documentation_has_the_table(counts: ModuleType) -> None:
    page = Path(__file__).parents[2] / "docs" / "parallelism.md"
    assert counts.table(json.loads(counts.GOLDEN.read_text())) in page.read_text()
