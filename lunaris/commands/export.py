"""`lunaris export`: write a run's checkpoint as a folder that Hugging Face transformers loads."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

from lunaris.config.trust import add_flag, allow
from lunaris.errors import UserError, not_installed
from lunaris.runs.run_dir import RunDir


def main(argv: list[str]) -> int:
    """Write the folder, compare its logits with the run's, and print both; return the exit code."""
    args = _parser().parse_args(argv)
    allow(args.trust)
    if args.max_shard_mb < 1:
        raise UserError(f"--max-shard-mb {args.max_shard_mb}: must be at least 1")
    text = _read(args.text)
    run_dir = RunDir(args.dir)
    run_dir.read_config()
    out = Path(args.to)
    if not args.no_check and importlib.util.find_spec("transformers") is None:
        raise UserError(not_installed("transformers", "the check of lunaris export", "export"))

    # Imports torch, which `--help` does not need.
    from lunaris.export.folder import export_run, sentence

    made = export_run(
        run_dir,
        out,
        step=args.at,
        dtype=args.dtype,
        shard_bytes=args.max_shard_mb * 10**6,
        license_name=args.license,
        text=text,
        check=not args.no_check,
    )
    code = "with its own modelling file" if made.family.code else "no remote code"
    print(f"folder     {out}, from step {made.step}")
    print(f"model      {made.family.architecture} ({code})")
    print(f"weights    {made.parameters:,} parameters, {made.bytes:,} bytes in {args.dtype}")
    if made.left_out:
        print(f"left out   {made.left_out} tensors of objective=multi_token, which only drafts")
    print(f"check      {sentence(made.difference, text, run_dir.tokenizer_path.is_file())}")
    return 0


def _read(path: str | None) -> bytes | None:
    if path is None:
        return None
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"--text {path}: cannot be read: {error.strerror}") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lunaris export",
        description="Write a checkpoint as a folder that Hugging Face transformers loads, and "
        "compare the logits of both.",
        epilog="example: lunaris export runs/default --to exported/default --dtype bf16",
    )
    parser.add_argument("dir", help="the run's folder")
    parser.add_argument("--to", required=True, metavar="OUT", help="the folder to write")
    parser.add_argument(
        "--dtype", choices=("fp32", "bf16"), default="fp32", help="of the weights (default: fp32)"
    )
    parser.add_argument(
        "--at", "--step", type=int, metavar="STEP", help="the checkpoint (default: the newest)"
    )
    parser.add_argument(
        "--license", default="other", help="the licence field of the model card (default: other)"
    )
    parser.add_argument(
        "--text", metavar="FILE", help="compare on this text (default: a source file of Python)"
    )
    parser.add_argument(
        "--max-shard-mb", type=int, default=5000, help="megabytes of a file (default: 5000)"
    )
    parser.add_argument(
        "--no-check", action="store_true", help="load no model, whose memory may not suffice"
    )
    add_flag(parser)
    return parser
