"""What a preparation has made, in words."""

from __future__ import annotations

from shlex import quote

from lunaris.data.manifest import Manifest


def summary(made: Manifest, folder: str, seconds: float) -> str:
    """Return the lines about a finished folder: its sources, its tokens and the next command."""
    lines = []
    for source in made.sources:
        skipped = f", {source.skipped:,} skipped" if source.skipped else ""
        lines.append(
            f"{source.name}: {source.documents:,} documents, {source.tokens:,} tokens "
            f"of {source.bytes:,} bytes{skipped}"
        )
    tokens = {part: sum(entry.tokens for entry in shards) for part, shards in made.shards.items()}
    shards = sum(len(entries) for entries in made.shards.values())
    lines.append(
        f"{folder}: {tokens.get('train', 0):,} tokens for training, {tokens.get('val', 0):,} for "
        f"validation, {shards} shards of {made.dtype}, vocabulary {made.vocab_size:,} "
        f"({seconds:.1f} s)"
    )
    if not tokens.get("val"):
        few = sum(source.documents for source in made.sources) < 10
        lines.append(
            "note: no document fell into the validation part, so training will have no val/loss; "
            + (
                "a text file is one document: cut it into files (`split -l 200 FILE pieces/`), or "
                "take its lines (data.format=lines), with data.val_fraction=0.1"
                if few
                else "raise data.val_fraction or give more text"
            )
            + ", in another data.dir"
        )
    lines.append(f"next: lunaris train data=shards {quote(f'data.dir={folder}')}")
    return "\n".join(lines)
