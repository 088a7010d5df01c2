"""What a run keeps of its data, so that it never goes on with other tokens unseen. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lunaris.atomic_files import replace_file
from lunaris.errors import UserError
from lunaris.runs.run_dir import RunDir

if TYPE_CHECKING:
    from lunaris.data.base import Data


def keep(data: Data, run_dir: RunDir) -> None:
    """Hold a run to its data's tokenizer and tokens, and keep what is new; rank 0 only.

    A run that has trained nothing yet takes what it is given. Raises what `hold` raises.
    """
    kept, path = run_dir.tokenizer_path, data.tokenizer_path
    if not _begun(run_dir):
        kept.unlink(missing_ok=True)
    hold(data, run_dir)
    if path is not None and not kept.is_file():
        replace_file(kept, path.read_bytes())
    if not _begun(run_dir) or run_dir.noted("data") is None:
        run_dir.note(eot_id=data.eot_id, data=_digests(data))


def hold(data: Data, run_dir: RunDir) -> None:
    """Raise UserError when a run's checkpoints were trained on another tokenizer or other tokens.

    The tokens are compared by `Data.digests`, which reads little of them.
    """
    if not _begun(run_dir):
        return
    check_tokenizer(data.tokenizer_path, run_dir)
    old, new = run_dir.noted("data"), _digests(data)
    # By position: a folder may have moved, and only what is in it counts.
    if not (isinstance(old, dict) and old and new) or list(old.values()) == list(new.values()):
        return
    changed = [name for name, digest in new.items() if digest not in old.values()]
    raise UserError(
        f"{run_dir.path}: its checkpoints were trained on other tokens than its data now holds, "
        f"in {', '.join(changed or new)}; put the old shards back, or begin a run of another name"
    )


def check_tokenizer(path: Path | None, run_dir: RunDir) -> None:
    """Raise UserError when data was made with another tokenizer than the run's own."""
    kept = run_dir.tokenizer_path
    if path is None or not kept.is_file() or path.read_bytes() == kept.read_bytes():
        return
    raise UserError(
        f"{path}: another tokenizer than the run's, {kept}: the same ids would be other text"
    )


def _digests(data: Data) -> dict[str, str]:
    """Return the data's digests; of a class of one's own that gives none, nothing."""
    return data.digests() if hasattr(data, "digests") else {}


def _begun(run_dir: RunDir) -> bool:
    """Return whether the run has a complete checkpoint (`lunaris.checkpoint.complete`)."""
    return any(run_dir.checkpoints.glob("step_*/files.json"))
