"""From sources of documents to a folder of shards: parallel, streaming, and safe to kill.

The parent process cuts the sources into chunks, worker processes encode them, and the parent merges
the results in an order that depends on the input only. From time to time it saves a note of how far
it got. So the shards are the same bytes whatever the number of processes, and however often the
work was interrupted.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TextIO

from lunaris.atomic_files import FileInUse, file_lock, remove_temporaries, write_durably
from lunaris.data import manifest as manifests
from lunaris.data.manifest import Manifest, SourceEntry
from lunaris.data.prepare.bundles import Bundles, Stored, bundles_folder, digest_of
from lunaris.data.prepare.chunks import Chunk, Cursor
from lunaris.data.prepare.encode import LOST_WORKER, Encoded, Job, encode_chunk, executor
from lunaris.data.prepare.folder_tokenizer import folder_tokenizer
from lunaris.data.prepare.interleave import SourceInterleaver
from lunaris.data.prepare.shard_writer import MaskedShardWriter, ShardWriter, close_all
from lunaris.data.prepare.spec import PrepareSpec, read_note
from lunaris.data.tokenizer import TextTokenizer
from lunaris.errors import Stopped, UserError
from lunaris.runs.preparation import NOTE

# Seconds between two notes of the progress: the most work that a kill can cost.
NOTE_S = 2.0
# Seconds between two lines of the progress in a log.
_LOG_S = 10.0


def write_shards(
    spec: PrepareSpec,
    *,
    wait_for_lock: bool = False,
    stopped: Callable[[], bool] = lambda: False,
) -> Manifest:
    """Write the folder's shards and manifest, or continue to; return the manifest.

    Chunks that other processes have left in bundles are taken from there. wait_for_lock: wait while
    another process writes the folder. stopped: whether to save and raise Stopped, asked after each
    chunk. Raises UserError when the folder is in use (without waiting), holds something else, or a
    document cannot be read.
    """
    folder = spec.folder
    with cleaned_up(folder), folder_lock(folder, wait=wait_for_lock):
        made = manifests.read(folder)
        if made is not None:
            manifests.require_same(folder, made.settings, spec.settings)
            shutil.rmtree(folder / manifests.UNFINISHED, ignore_errors=True)
            return made
        note = read_note(spec)
        remove_temporaries(folder)
        made = _Preparation(spec, folder_tokenizer(spec), note, stopped).run()
        made.write(folder)
        shutil.rmtree(folder / manifests.UNFINISHED)
        return made


def folder_lock(folder: Path, *, wait: bool) -> TextIO:
    """Create a folder and lock it until the returned file is closed or the process ends.

    wait: until another process releases it. Raises UserError when the folder is in use, or cannot
    be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return file_lock(folder / ".lock", wait=wait)
    except FileInUse as error:
        raise UserError(f"{folder}: another `lunaris prepare` is writing this folder") from error
    except OSError as error:
        raise UserError(f"data.dir={folder}: cannot be written: {error.strerror}") from error


@contextmanager
def cleaned_up(folder: Path) -> Iterator[None]:
    """Remove a new folder if a mistake left nothing useful in it; explain a full disk."""
    new = not folder.exists()
    try:
        yield
    except UserError:
        if new and not (folder / manifests.TOKENIZER).exists():
            shutil.rmtree(folder, ignore_errors=True)
        raise
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        raise UserError(
            f"data.dir={folder}: cannot be written: {error.strerror}; correct that and run the "
            "same command to continue"
        ) from error


class _Preparation:
    """One run of the work, from where the last note says that it stands."""

    def __init__(
        self,
        spec: PrepareSpec,
        tokenizer: TextTokenizer,
        note: dict[str, Any],
        stopped: Callable[[], bool],
    ) -> None:
        """note: the result of `read_note`. stopped: see `write_shards`."""
        from tqdm import tqdm

        self._spec, self._tokenizer, self._stopped = spec, tokenizer, stopped
        self._processes = spec.keys.processes or default_processes()
        self._work = spec.folder / manifests.UNFINISHED
        chunks = self._work / "units"
        shutil.rmtree(chunks, ignore_errors=True)
        chunks.mkdir(parents=True)
        self._job = Job.of(spec, chunks)
        self._bundles = Bundles(bundles_folder(spec.folder), digest_of(spec), read=True)
        # Each of several sources has its own validation shards, so that its loss can be logged.
        several = len(spec.sources) > 1
        self._val = [f"val{i}" for i in range(len(spec.sources))] if several else ["val"]
        writer = MaskedShardWriter if spec.masked else ShardWriter
        self._writers: dict[str, ShardWriter | MaskedShardWriter] = {
            part: writer(
                spec.folder,
                part,
                tokenizer.dtype,
                spec.keys.shard_tokens,
                note.get("writers", {}).get(part),
                # There may be more sources than files that a process may open.
                keep_open=part == "train" or not several,
            )
            for part in ["train", *self._val]
        }
        total = sum(source.size for source in spec.sources) or None
        self._bar = tqdm(
            total=total, desc="prepare", unit="B", unit_scale=True, smoothing=0.05,
            # A log keeps every line.
            mininterval=0.1 if sys.stderr.isatty() else _LOG_S,
        )  # fmt: skip
        # Bytes of input that were merged before this process started.
        self._merged_before: int = note.get("input_bytes", 0)
        val = [self._writers[part] for part in self._val]
        self._interleaver = SourceInterleaver(
            spec, self._writers["train"], val, chunks, note.get("sources")
        )
        # What yields each source's remaining chunks; None after the last.
        self._planners: list[Iterator[Chunk | Stored] | None] = [
            None
            if p.exhausted
            else self._bundles.chunks(i, source, Cursor(p.file, p.start, p.place))
            for i, (source, p) in enumerate(
                zip(spec.sources, self._interleaver.progress, strict=True)
            )
        ]
        # Each source's chunks that were submitted and are not yet merged, oldest first.
        self._sent: list[list[tuple[Chunk, Future[Encoded]]]] = [[] for _ in spec.sources]
        self._sent_bytes = [0] * len(spec.sources)
        self._noted = time.monotonic()

    def run(self) -> Manifest:
        """Encode and merge everything that is left; return the manifest."""
        pool = executor(self._processes, self._job)
        try:
            with self._bar:
                self._loop(pool)
            return self._manifest()
        except BrokenProcessPool as error:
            raise RuntimeError(LOST_WORKER) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            close_all(self._writers.values())

    def _loop(self, pool: Executor) -> None:
        began, before = time.monotonic(), self._tokens()
        waiting = self._interleaver.advance()
        while waiting is not None:
            self._send(pool, waiting)
            if self._sent[waiting]:
                self._collect(waiting)
            else:
                self._interleaver.end(waiting)
            bytes_before = self._interleaver.bytes_read
            try:
                waiting = self._interleaver.advance()
            except UserError:
                # Before the first token there is nothing to keep, and the input may be corrected.
                if self._tokens():
                    self._note()
                raise
            self._bar.update(self._interleaver.bytes_read - bytes_before)
            rate = (self._tokens() - before) / max(time.monotonic() - began, 1e-9)
            self._bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
            stopped = self._stopped()
            if stopped or time.monotonic() - self._noted >= NOTE_S:
                self._note()
            if stopped:
                raise Stopped(f"at {self._spec.folder}; run the same command to continue")

    def _send(self, pool: Executor, waiting: int) -> None:
        """Submit the chunks that the interleaver will ask for next, to keep the workers busy.

        waiting: the source whose next chunk the interleaver needs now.
        """
        processes = self._processes
        while True:
            unfinished = sum(not future.done() for sent in self._sent for _, future in sent)
            # Chunks that are encoded and wait for their turn count too; otherwise a source of small
            # weight would run ahead of the others without bound.
            room = [
                i
                for i, planner in enumerate(self._planners)
                if planner is not None
                and len(self._sent[i]) + self._interleaver.waiting(i) < processes + 2
            ]
            # The source that is waited for always gets its turn, or all would wait for ever.
            starving = waiting in room and not self._sent[waiting]
            if not room or (unfinished >= processes + 2 and not starving):
                return
            source = (
                waiting
                if starving
                else min(room, key=lambda i: self._sent_bytes[i] / self._spec.weights[i])
            )
            planner = self._planners[source]
            assert planner is not None
            found = next(planner, None)
            if found is None:
                self._planners[source] = None
                continue
            if isinstance(found, Stored):
                chunk, future = found.chunk, _ready(found.encoded)
            else:
                chunk = replace(found, source=source)
                future = pool.submit(encode_chunk, chunk)
            self._sent[source].append((replace(chunk, payload=None), future))
            self._sent_bytes[source] += max(chunk.size, 1)

    def _collect(self, waiting: int) -> None:
        """Pass finished chunks to the interleaver in each source's order; wait for the next."""
        if not self._sent[waiting][0][1].done():
            # Wait for any chunk, not only this one, so that no worker runs out of work meanwhile.
            pending = [future for chunks in self._sent for _, future in chunks if not future.done()]
            wait(pending, return_when=FIRST_COMPLETED)
        for chunks in self._sent:
            while chunks and chunks[0][1].done():
                chunk, future = chunks.pop(0)
                self._interleaver.add(chunk, future.result())

    def _note(self) -> None:
        """Make durable what is merged, and the state to continue from."""
        note = {
            "settings": self._spec.settings,
            "writers": {part: writer.state() for part, writer in self._writers.items()},
            "sources": [asdict(progress) for progress in self._interleaver.progress],
            "input_bytes": self._merged_before + self._interleaver.bytes_read,
        }
        write_durably(self._work / NOTE, json.dumps(note).encode())
        self._bundles.remove(self._interleaver.progress)
        self._noted = time.monotonic()

    def _tokens(self) -> int:
        return sum(progress.taken for progress in self._interleaver.progress)

    def _manifest(self) -> Manifest:
        spec = self._spec
        train = self._writers["train"].finish()
        if not train:
            raise UserError(
                f"data.dir={spec.folder}: no training document in the input; lower "
                f"data.val_fraction={spec.keys.val_fraction} or give more input"
            )
        val = [
            replace(entry, source=source.name if len(spec.sources) > 1 else None)
            for part, source in zip(self._val, spec.sources, strict=True)
            for entry in self._writers[part].finish()
        ]
        total = sum(spec.weights)
        return Manifest(
            tokenizer_hash=manifests.sha256(self._job.tokenizer),
            vocab_size=self._tokenizer.vocab_size,
            eot_id=self._tokenizer.eot_id,
            dtype=str(self._tokenizer.dtype),
            shards={"train": train, "val": val},
            sources=[
                SourceEntry(source.name, weight / total, p.documents, p.taken, p.bytes, p.skipped)
                for source, weight, p in zip(
                    spec.sources, spec.weights, self._interleaver.progress, strict=True
                )
            ],
            settings=spec.settings,
        )


def _ready(encoded: Encoded | None) -> Future[Encoded]:
    assert encoded is not None
    future: Future[Encoded] = Future()
    future.set_result(encoded)
    return future


def default_processes() -> int:
    """Return how many processors this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
