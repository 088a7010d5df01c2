"""TensorBoard: event files in the folder `tensorboard` of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lunaris.config.frozen import to_yaml
from lunaris.config.schema.root import Config
from lunaris.errors import need
from lunaris.metrics.loggers import Logger
from lunaris.metrics.records import Row, expert_shares, scalars
from lunaris.runs.run_dir import RunDir

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoardLogger(Logger):
    """Writes scalars, and with each validation loss one histogram of expert use a layer.

    Raises UserError when the extra `tensorboard` is not installed.
    """

    def __init__(self) -> None:
        need("tensorboard", "logger=tensorboard", extra="tensorboard")

    def start(self, run_dir: RunDir, cfg: Config, step: int) -> None:
        """Open a new event file; it hides the rows of earlier ones that the run writes again."""
        # Only a run that logs here waits for this import.
        from torch.utils.tensorboard import SummaryWriter

        self._writer: SummaryWriter = SummaryWriter(  # type: ignore[no-untyped-call]
            str(run_dir.path / "tensorboard"), purge_step=step + 1 if step else 0
        )
        if step == 0:
            # As Markdown, whose code blocks are indented.
            text = "".join(f"    {line}\n" for line in to_yaml(cfg).decode().splitlines())
            self._add("add_text", "config", text, 0)

    def log(self, row: Row) -> None:
        """Write the row under its names; lists but the experts' shares are left out."""
        step = row["step"]
        for name, value in scalars(row).items():
            self._add("add_scalar", name, value, step)
        for name, share in expert_shares(row).items():
            self._add(
                "add_histogram_raw",
                name,
                min=0,
                max=len(share),
                num=1,
                sum=sum((i + 0.5) * part for i, part in enumerate(share)),
                sum_squares=sum((i + 0.5) ** 2 * part for i, part in enumerate(share)),
                bucket_limits=list(range(1, len(share) + 1)),
                bucket_counts=share,
                global_step=step,
            )

    def flush(self) -> None:
        """Write the rows to the file."""
        self._writer.flush()  # type: ignore[no-untyped-call]

    def finish(self) -> None:
        """Close the file."""
        self._writer.close()  # type: ignore[no-untyped-call]

    def _add(self, method: str, *args: Any, **keys: Any) -> None:
        getattr(self._writer, method)(*args, **keys)
