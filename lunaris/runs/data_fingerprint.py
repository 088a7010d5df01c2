"""Refuse to continue a run on other training data than it was started with. No torch.

The fingerprint of a run's data is a digest of the tokens of each source and a copy of the
tokenizer. It is saved in the run's folder before the first checkpoint.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lunaris.atomic_files import replace_file
from lunaris.errors import UserError
from lunaris.runs.facts import newest_facts, sha256_of
from lunaris.runs.run_dir import RunDir

if TYPE_CHECKING:
    from lunaris.data.base import Data


def save_data_fingerprint(data: Data, run_dir: RunDir) -> None:
    """Check the data against the run's fingerprint, and save what the fingerprint lacks.

    Only rank 0 may call this. A run without a checkpoint takes any data. Raises what
    `check_data_fingerprint` raises.
    """
    saved, path = run_dir.tokenizer_path, data.tokenizer_path
    if not _has_checkpoint(run_dir):
        saved.unlink(missing_ok=True)
    check_data_fingerprint(data, run_dir)
    if path is not None and sha256_of(saved) != sha256_of(path):
        replace_file(saved, path.read_bytes())
    if not _has_checkpoint(run_dir) or run_dir.noted("data") is None:
        run_dir.note(eot_id=data.eot_id, data=digests_of(data))


def check_data_fingerprint(data: Data, run_dir: RunDir) -> None:
    """Raise UserError when a run's checkpoints were trained on another tokenizer or other tokens.

    The tokens are compared by `Data.digests`, which reads only a small part of them, with those of
    a change of the data recorded since the newest checkpoint, else with those in this checkpoint
    (`lunaris.runs.facts`), or where it has none, in provenance.json.
    """
    if not _has_checkpoint(run_dir):
        return
    check_tokenizer(data.tokenizer_path, run_dir)
    old, new = _saved_digests(run_dir), digests_of(data)
    # Compared by position: a folder may have moved, and only its content counts.
    if not (old and new) or list(old.values()) == list(new.values()):
        return
    changed = [name for name, digest in new.items() if digest not in old.values()]
    raise UserError(
        f"{run_dir.path}: its checkpoints were trained on other tokens than its data now holds, "
        f"in {', '.join(changed or new)}; put the old shards back, or start a run with another "
        "`name=`"
    )


def check_tokenizer(path: Path | None, run_dir: RunDir) -> None:
    """Raise UserError when data was made with another tokenizer than the run's."""
    facts = newest_facts(run_dir.checkpoints)
    saved = run_dir.tokenizer_path
    expected = (facts.tokenizer if facts else None) or sha256_of(saved)
    if path is None or expected is None or sha256_of(path) == expected:
        return
    raise UserError(
        f"{path}: another tokenizer than the run's, {saved}: the same ids would mean other text"
    )


def intact_tokenizer(run_dir: RunDir) -> Path:
    """Return the run's tokenizer.json. Raises UserError when it is absent or not the run's own."""
    path = run_dir.tokenizer_path
    if not path.is_file():
        raise UserError(
            f"{path}: missing; data without a tokenizer, such as data=synthetic, gives no text to "
            "generate: train with data=stdlib, text, hf or shards"
        )
    facts = newest_facts(run_dir.checkpoints)
    if facts is not None and facts.tokenizer not in (None, sha256_of(path)):
        raise UserError(
            f"{path}: damaged: not the tokenizer that the run was trained with; `lunaris resume` "
            "copies it again from the data"
        )
    return path


def _saved_digests(run_dir: RunDir) -> dict[str, str] | None:
    """Return the digests of the data with which a run continues.

    Raises UserError when they were damaged.
    """
    facts = newest_facts(run_dir.checkpoints)
    changed = [c.data for c in run_dir.changes_since_checkpoint() if c.data is not None]
    if changed:
        return changed[-1]
    if facts is not None:
        return facts.data
    digests: dict[str, str] | None = run_dir.noted("data")
    aside = run_dir.provenance_path.with_name("provenance.json.damaged")
    damaged = run_dir.provenance_path if run_dir.fault_of("provenance.json") else aside
    if digests is None and damaged.exists():
        raise UserError(
            f"{damaged}: cannot be read, and it held the fingerprint of the tokens that the "
            "checkpoints were trained on; put an intact copy back as provenance.json, or remove "
            "the file to train on with the tokens as they are"
        )
    return digests


def digests_of(data: Data) -> dict[str, str]:
    """Return the data's digests; a custom class may have none."""
    return data.digests() if hasattr(data, "digests") else {}


def _has_checkpoint(run_dir: RunDir) -> bool:
    """Return whether the run has a complete checkpoint (`lunaris.checkpoint.complete`)."""
    return any(run_dir.checkpoints.glob("step_*/files.json"))
