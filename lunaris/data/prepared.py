"""What the kinds of data that `lunaris prepare` builds have in common when training reads them.

The classes here only read a finished folder. `lunaris.data.prepare.build` builds it from their
`keys`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from lunaris.config.schema.data import PreparedDataConfig
from lunaris.data.folders import require_prepared
from lunaris.data.shards import ShardsData, checked_keys
from lunaris.errors import UserError


class PreparedFolder(ShardsData):
    """One folder of shards with a manifest, which is built before it is read."""

    def __init__(self, folder: Path, *, verify: bool = False, document_masking: bool) -> None:
        super().__init__(dir=str(folder), verify=verify, document_masking=document_masking)
        self.folder = folder

    def ensure_ready(self) -> None:
        """Inspect the folder, once. Raises UserError when it is not built or has changed."""
        require_prepared(self.folder)
        super().ensure_ready()


class PreparedData(PreparedFolder):
    """Shards that `lunaris prepare` builds in `data.dir`. A subclass names the schema of its keys.

    Training uses `dir`, `verify` and `document_masking` only; the other keys say what to build.
    """

    schema: ClassVar[type[PreparedDataConfig]]

    def __init__(self, **keys: Any) -> None:
        """keys: of the schema. Raises UserError for one that is out of range."""
        self.keys = checked_keys(self.schema, keys)
        if not self.keys.dir.strip():
            raise UserError("data.dir=: must be the path of a folder")
        super().__init__(
            Path(self.keys.dir),
            verify=self.keys.verify,
            document_masking=self.keys.document_masking,
        )
