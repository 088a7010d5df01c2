"""Writes the folder of an export, and checks it before it takes its name."""

from __future__ import annotations

import json
import math
import os
import shutil
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from lunaris.atomic_files import write_json
from lunaris.checkpoint_reader import saved_vocab_size
from lunaris.data.tokenizer import TextTokenizer
from lunaris.errors import RunFailed, UserError, need
from lunaris.export.card import model_card
from lunaris.export.choose import choose
from lunaris.export.family import Family
from lunaris.export.settings import Settings, check_exportable
from lunaris.export.source import CheckpointSource
from lunaris.export.verify import (
    Difference,
    check_tokenizer_files,
    compare,
    folder_logits,
    run_logits,
    sample_tokens,
)
from lunaris.export.writer import DTYPES, write_weights
from lunaris.inference import tokenizer_of
from lunaris.runs.checkpoint_files import newest
from lunaris.runs.facts import step_of
from lunaris.runs.run_dir import RunDir

# Buffers that only training reads, and the modules of the objective.
_LEFT_OUT = (".load_shares", ".balance_bias")
_PREDICTORS = "predictors."


@dataclass(frozen=True)
class Export:
    """What an export wrote. difference: None where it was not compared."""

    family: Family
    step: int
    parameters: int
    bytes: int
    left_out: int
    difference: Difference | None


def export_run(
    run_dir: RunDir,
    out: Path,
    *,
    step: int | None = None,
    dtype: str = "fp32",
    shard_bytes: int = 5 * 10**9,
    license_name: str = "other",
    text: bytes | None = None,
    check: bool = True,
) -> Export:
    """Write a checkpoint as a folder that transformers loads, and compare the logits of both.

    dtype: "fp32" or "bf16". text: what to compare on. check: without it, no model is loaded, so
    that memory does not grow with the model. The folder appears complete or not at all. Raises
    UserError for a run that no architecture computes or an existing folder, and RunFailed when the
    comparison fails.
    """
    cfg = run_dir.read_config()
    check_exportable(cfg)
    _check_target(out)
    if check:
        need("transformers", "the check of lunaris export", extra="export")
    checkpoint = newest(run_dir.checkpoints, step)
    source = CheckpointSource(checkpoint)
    tokenizer = _tokenizer(run_dir)
    eot_id = None if tokenizer is None else tokenizer.eot_id
    settings = Settings(cfg, saved_vocab_size(checkpoint), eot_id)
    family = choose(settings)
    left_out = _check_complete(source, family)
    # Absolute, since `.` has no name.
    temporary = out.absolute().with_name(f".tmp-{out.absolute().name}.{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"--to {out}: cannot be written: {error.strerror}") from error
    try:
        size = write_weights(
            temporary, source, family.weights, dtype=DTYPES[dtype], shard_bytes=shard_bytes
        )
        _write_config(temporary, settings, family, dtype)
        if tokenizer is not None:
            _write_tokenizer(temporary, run_dir, tokenizer, cfg.model.max_seq_len)
        at = step_of(checkpoint)
        difference = None
        if check:
            difference = _check(temporary, settings, run_dir, family, at, dtype, text, tokenizer)
        made = Export(family, at, _parameters(source, family), size, left_out, difference)
        card = model_card(
            cfg, run_dir, family, step=at, parameters=made.parameters, dtype=dtype,
            license_name=license_name, checked=sentence(difference, text, tokenizer is not None),
        )  # fmt: skip
        (temporary / "README.md").write_text(card)
        temporary.replace(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return made


def _check_target(out: Path) -> None:
    """Raise UserError unless `out` can be made, or is an empty folder."""
    try:
        # A link that leads nowhere does not exist, and cannot be replaced by a folder either.
        taken = out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir())))
    except OSError as error:
        raise UserError(f"--to {out}: cannot be written: {error.strerror}") from error
    if taken:
        raise UserError(f"--to {out}: exists already; remove it, or name another folder")


def sentence(difference: Difference | None, text: bytes | None, has_tokenizer: bool) -> str:
    """Return what was compared, and how far the logits differ."""
    if difference is None:
        return "Its logits were not compared with the run's."
    where = "random tokens" if not has_tokenizer else "tokens of text"
    said = (
        f"On {difference.tokens:,} {where} its logits differ by at most {difference.largest:.2g} "
        f"from the run's with the same weights ({difference.relative:.1e} of the largest), both in "
        "float32."
    )
    if difference.rounding:
        said += f" Rounding the weights changed logits by at most {difference.rounding:.2g}."
    return said


def _check(
    folder: Path,
    settings: Settings,
    run_dir: RunDir,
    family: Family,
    step: int,
    dtype: str,
    text: bytes | None,
    tokenizer: TextTokenizer | None,
) -> Difference:
    """Compare the folder with the run; one model is in memory at a time."""
    cfg = settings.cfg
    tokens = sample_tokens(
        tokenizer, text, vocab_size=settings.vocab_size, length=cfg.model.max_seq_len
    )
    exact, rounded = run_logits(cfg, run_dir, step, tokens, family.weights, DTYPES[dtype])
    loaded = folder_logits(folder, tokens, own_code=bool(family.code))
    if tokenizer is not None:
        sample = tokenizer.decode_bytes(tokens[0].tolist()).decode(errors="ignore")
        check_tokenizer_files(folder, tokenizer, sample)
    return compare(exact, rounded, loaded)


def _check_complete(source: CheckpointSource, family: Family) -> int:
    """Return how many tensors of the objective's modules are left out.

    Raises RunFailed when another tensor of the checkpoint is, or one is missing.
    """
    used = {weight.source for weight in family.weights}
    missing = sorted(used - source.names())
    if missing:
        raise RunFailed(f"the checkpoint lacks {missing[0]}, which its config asks for")
    unused = {name for name in source.names() - used if not name.endswith(_LEFT_OUT)}
    predictors = {name for name in unused if name.startswith(_PREDICTORS)}
    if unused - predictors:
        raise RunFailed(f"{family.architecture} has no place for {min(unused - predictors)}")
    return len(predictors)


def _parameters(source: CheckpointSource, family: Family) -> int:
    names = {weight.source for weight in family.weights}
    return sum(math.prod(source.empty(name).shape) for name in names)


def _tokenizer(run_dir: RunDir) -> TextTokenizer | None:
    if not run_dir.tokenizer_path.is_file():
        return None
    return tokenizer_of(run_dir)


def _write_config(folder: Path, settings: Settings, family: Family, dtype: str) -> None:
    names = {"fp32": "float32", "bf16": "bfloat16"}
    config = family.config | {"architectures": [family.architecture], "dtype": names[dtype]}
    write_json(folder / "config.json", config)
    generation: dict[str, Any] = {"do_sample": False}
    if settings.eot_id is not None:
        # A batch is padded with it, behind an attention mask.
        generation |= {"eos_token_id": settings.eot_id, "pad_token_id": settings.eot_id}
    write_json(folder / "generation_config.json", generation)
    for name in family.code:
        code = resources.files("lunaris.export") / "shipped" / name
        (folder / name).write_bytes(code.read_bytes())


def _write_tokenizer(
    folder: Path, run_dir: RunDir, tokenizer: TextTokenizer, max_seq_len: int
) -> None:
    raw = run_dir.tokenizer_path.read_bytes()
    (folder / "tokenizer.json").write_bytes(raw)
    end = _token_of(json.loads(raw), tokenizer.eot_id)
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": end,
            "pad_token": end,
            "model_max_length": max_seq_len,
            "clean_up_tokenization_spaces": False,
        },
    )


def _token_of(content: dict[str, Any], token_id: int) -> str | None:
    """Return the text of an added token of a `tokenizer.json`, or of one of its vocabulary."""
    added = {row["id"]: row["content"] for row in content.get("added_tokens", [])}
    if token_id in added:
        return str(added[token_id])
    vocabulary = content["model"].get("vocab", {})
    pairs = vocabulary.items() if isinstance(vocabulary, dict) else ()
    return next((text for text, i in pairs if i == token_id), None)
