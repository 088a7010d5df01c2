"""Reads checkpoints without running code that they contain.

torch.distributed.checkpoint keeps a checkpoint's plan as a pickle (`.metadata`), and values that
are no tensors as files of `torch.save`. Its own reader runs what both contain. This one knows only
the types that it writes.
"""

from __future__ import annotations

import io
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException, DefaultLoadPlanner, Metadata
from torch.distributed.checkpoint.metadata import StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)

from lunaris.distributed import session
from lunaris.errors import UserError

OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)
_DCP = "torch.distributed.checkpoint."
_ALLOWED = {
    *((f"{_DCP}metadata", name) for name in (
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
        "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    )),
    (f"{_DCP}filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),  # Python 3.13
}  # fmt: skip


class UntrustedFile(UserError):
    """A file of a checkpoint has content that this package does not write; nothing of it ran."""


class CannotLoad(UserError):
    """A checkpoint whose checksums are right cannot be loaded."""


class _Unpickler(pickle.Unpickler):
    def __init__(self, content: bytes, path: Path) -> None:
        super().__init__(io.BytesIO(content))
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise UntrustedFile(
            f"{self._path}: asks for {module}.{name}, which no checkpoint of this package needs; "
            "nothing of it was run. Take the checkpoint from a source that you trust"
        )


def read_metadata(path: Path) -> Metadata:
    """Return the plan of the checkpoint in folder `path`.

    Raises UntrustedFile where it asks for other types than those of a plan, and CannotLoad where it
    is no plan.
    """
    file = path / ".metadata"
    try:
        found = _Unpickler(file.read_bytes(), file).load()
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 - a damaged pickle raises errors of many kinds
        raise CannotLoad(f"{file}: cannot be read ({type(error).__name__}: {error})") from error
    if not isinstance(found, Metadata):
        raise CannotLoad(f"{file}: is not the plan of a checkpoint")
    return found


class SafeReader(dcp.FileSystemReader):
    """A reader of torch.distributed.checkpoint that reads its plan by `read_metadata`."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        metadata = read_metadata(Path(self.path))
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = StorageMeta()
        assert metadata.storage_meta is not None
        metadata.storage_meta.load_id = self.load_id
        return metadata


class SafePlanner(DefaultLoadPlanner):
    """A load planner for which values that are no tensors are plain ones: numbers, text, lists."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Check the value before the planner loads it. Raises UntrustedFile."""
        assert read_item.type == LoadItemType.BYTE_IO
        name = read_item.dest_index.fqn
        try:
            torch.load(value, weights_only=True)
        except pickle.UnpicklingError as error:
            raise UntrustedFile(
                f"{name}: is not a plain value in the checkpoint; nothing of it was run"
            ) from error
        value.seek(0)
        super().load_bytes(read_item, value)


def load(tree: dict[str, Any], path: Path, processes: dict[str, Any]) -> None:
    """Load a checkpoint into `tree` in place, in any sharding; every process calls this.

    processes: the arguments of `dcp.load` that say which processes take part. Raises UntrustedFile,
    and CannotLoad for whatever else torch.distributed.checkpoint cannot do.
    """
    # Before torch.distributed.checkpoint reads it, which words every error in its own way.
    read_metadata(path)
    with plain_errors(path):
        dcp.load(tree, storage_reader=SafeReader(path), planner=SafePlanner(), **processes)


@contextmanager
def plain_errors(path: Path) -> Iterator[None]:
    """Raise the cause of an error of torch.distributed.checkpoint, or CannotLoad with its text."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except (CheckpointException, Exception) as error:  # noqa: BLE001 - of many kinds
        cause: BaseException = error
        if isinstance(error, CheckpointException):
            causes = [failure[0] for failure in error.failures.values()]
            cause = next((e for e in causes if isinstance(e, UserError)), causes[0])
        if isinstance(cause, UserError | MemoryError | torch.OutOfMemoryError):
            raise cause from None
        reason = f"{type(cause).__name__}: {cause}".splitlines()[0]
        raise CannotLoad(f"{path}: cannot be loaded ({reason})") from error


def saved_vocab_size(path: Path) -> int:
    """Return the vocabulary size of a checkpoint's model, from its metadata."""
    return saved_shapes(path)["embedding.weight"][0]


def saved_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor of a checkpoint's model by its name, from its metadata."""
    return {
        name.removeprefix("model."): tuple(value.size)
        for name, value in read_metadata(path).state_dict_metadata.items()
        if name.startswith("model.") and isinstance(value, TensorStorageMetadata)
    }


def load_tensors(path: Path, targets: dict[str, Tensor], *, alone: bool = False) -> None:
    """Load some tensors of a checkpoint's model into `targets`, in place, in any sharding.

    Every process calls this, unless `alone`: then each reads complete tensors by itself.
    """
    processes = _one_process() if alone else processes_of(session.cpu_group())
    if targets or not alone:
        load({"model": targets}, path, processes)


def load_weights(path: Path, model: nn.Module) -> None:
    """Load the weights of one checkpoint into `model`, in any parallelism."""
    state = {"model": get_model_state_dict(model)}
    load(state, path, processes_of(session.cpu_group()))
    set_model_state_dict(model, state["model"])


def restore(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load the weights and the optimizer's state of one checkpoint, in any parallelism.

    Raises UntrustedFile and CannotLoad.
    """
    model_state, optimizer_state = get_state_dict(model, optimizer, options=OPTIONS)
    tree: dict[str, Any] = {"model": model_state, "optimizer": optimizer_state}
    load(tree, path, processes_of(session.cpu_group()))
    with plain_errors(path):
        set_state_dict(
            model,
            optimizer,
            model_state_dict=tree["model"],
            optim_state_dict=tree["optimizer"],
            options=OPTIONS,
        )


def processes_of(group: dist.ProcessGroup | None) -> dict[str, Any]:
    """Return the arguments of DCP that say which processes take part."""
    if dist.is_initialized():
        return {"process_group": group}
    return _one_process()


def _one_process() -> dict[str, Any]:
    # Without a group DCP warns, also from its own thread, that it assumes a single process.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    return {"no_dist": True}
