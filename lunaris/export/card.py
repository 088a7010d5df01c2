"""The model card: what the weights are, where they come from, how to load them. No torch."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from lunaris.config.frozen import to_yaml
from lunaris.config.schema.root import Config
from lunaris.export.family import Family
from lunaris.metrics.records import read_rows
from lunaris.runs.run_dir import RunDir


def model_card(
    cfg: Config,
    run_dir: RunDir,
    family: Family,
    *,
    step: int,
    parameters: int,
    dtype: str,
    license_name: str,
    checked: str,
) -> str:
    """Return the text of README.md, with the fields that the Hugging Face Hub reads at its top.

    parameters: how many. checked: the sentence about the comparison of the logits.
    """
    remote = ", trust_remote_code=True" if family.code else ""
    origin = (
        f"Written from `{run_dir.path.name}` at step {step:,} by Lunaris Codex as "
        f"`{family.architecture}`: {parameters:,} parameters in {dtype}. {checked}"
    )
    return "\n".join(
        [
            "---",
            f"license: {license_name}",
            "library_name: transformers",
            "pipeline_tag: text-generation",
            "tags: [lunaris-codex]",
            "---",
            "",
            f"# {run_dir.path.name}",
            "",
            origin,
            "",
            "```python",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f'model = AutoModelForCausalLM.from_pretrained("."{remote})',
            'tokenizer = AutoTokenizer.from_pretrained(".")',
            "```",
            "",
            "The model was pre-trained on text alone. It was neither tuned to follow instructions",
            "nor tested for harmful output.",
            "",
            "## Data",
            "",
            *_data(cfg, run_dir),
            "",
            "## Results",
            "",
            *_results(run_dir.metrics_path, step),
            "",
            "## Training",
            "",
            *_training(run_dir.read_provenance()),
            "",
            "```yaml",
            to_yaml(cfg).decode().strip(),
            "```",
            "",
        ]
    )


def _data(cfg: Config, run_dir: RunDir) -> list[str]:
    sources = run_dir.noted("data") or {}
    tokens = f"Sequences of {cfg.model.max_seq_len} tokens"
    lines = [f"{tokens}, from:", "", "| source | digest of its tokens |", "|---|---|"]
    return [*lines, *(f"| `{name}` | `{digest}` |" for name, digest in sources.items())]


def _results(metrics: Path, step: int) -> list[str]:
    """Return the validation metrics of the last evaluation up to the checkpoint's step."""
    rows = [row for row in read_rows(metrics) if row["step"] <= step and row.get("val/loss")]
    if not rows:
        return ["The run has no validation loss up to this step."]
    found = {name: value for name, value in rows[-1].items() if name.startswith("val/")}
    lines = [f"At step {rows[-1]['step']:,}; losses in nats a token.", "", "| metric | value |"]
    return [*lines, "|---|---|", *(f"| {name} | {value:.4f} |" for name, value in found.items())]


def _training(provenance: dict[str, Any]) -> list[str]:
    versions = {k: v for k, v in provenance.get("versions", {}).items() if v}
    command = shlex.join(["lunaris", "train", *provenance.get("overrides", [])])
    return [f"`{command}`, with the versions `{json.dumps(versions)}` and the config:"]
