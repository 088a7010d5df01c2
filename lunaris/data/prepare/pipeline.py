"""From sources of documents to a folder of shards: parallel, streaming, and safe to kill.

The parent cuts the sources into units, worker processes encode them, the parent merges the results
in an order that only the input decides, and notes from time to time how far it came. So the shards
are the same bytes whatever the number of processes and however often the work was interrupted.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from lunaris.atomic_files import write_durably
from lunaris.data import manifest as manifests
from lunaris.data.manifest import Manifest, SourceEntry
from lunaris.data.prepare.chunks import Cursor, Source, Unit
from lunaris.data.prepare.encode import Encoded, Job, encode_unit, executor
from lunaris.data.prepare.interleave import Merger
from lunaris.data.prepare.sample import sample_texts
from lunaris.data.prepare.shard_writer import ShardWriter
from lunaris.data.prepare.spec import Recipe, read_note, require_same, settings_of
from lunaris.data.prepared import folder_lock
from lunaris.data.tokenizer import TextTokenizer, load_tokenizer, train_bpe
from lunaris.errors import UserError

# Seconds between notes of how far the merging came: what a kill costs at most.
NOTE_S = 2.0
# A text with what tokenizers lose: case, spaces, breaks of lines, accents, rare characters.
_PROBE = "A  b\n\tc\u00e9 \u6f22 \U0001f600"


def prepare(recipe: Recipe, sources: Sequence[Source], weights: list[float]) -> Manifest:
    """Make the folder's shards and manifest, or go on making them; return the manifest.

    Raises UserError when the folder is in use, holds something else, or a document cannot be read.
    """
    folder = recipe.folder
    asked = settings_of(recipe, sources, weights)
    with _left_clean(folder), folder_lock(folder / ".lock", wait=False):
        made = manifests.read(folder)
        if made is not None:
            require_same(folder, made.settings, asked)
            shutil.rmtree(folder / manifests.UNFINISHED, ignore_errors=True)
            return made
        note = read_note(folder, asked)
        tokenizer = _tokenizer(recipe, sources, weights)
        made = _Preparation(recipe, sources, weights, asked, tokenizer, note).run()
        made.write(folder)
        shutil.rmtree(folder / manifests.UNFINISHED)
        return made


@contextmanager
def _left_clean(folder: Path) -> Iterator[None]:
    """Take away a new folder in which a mistake left nothing of worth; say so of a full disk."""
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
            f"data.dir={folder}: cannot be written on: {error.strerror}; once it can, the same "
            "command goes on"
        ) from error


class _Preparation:
    """One run of the work, from where the last note says it stands."""

    def __init__(
        self,
        recipe: Recipe,
        sources: Sequence[Source],
        weights: list[float],
        asked: dict[str, Any],
        tokenizer: TextTokenizer,
        note: dict[str, Any],
    ) -> None:
        self._recipe, self._sources, self._weights = recipe, sources, weights
        self._asked, self._tokenizer = asked, tokenizer
        self._work = recipe.folder / manifests.UNFINISHED
        units = self._work / "units"
        shutil.rmtree(units, ignore_errors=True)
        units.mkdir(parents=True)
        states = note.get("writers", {})
        # Of several sources each has validation shards of its own, for a loss of its own.
        self._val = ["val"] if len(sources) == 1 else [f"val{i}" for i in range(len(sources))]
        self._writers = {
            part: ShardWriter(
                recipe.folder,
                part,
                tokenizer.dtype,
                recipe.shard_tokens,
                states.get(part),
                keep_open=part == "train" or len(sources) == 1,
            )
            for part in ["train", *self._val]
        }
        self._bar = _bar(sources)
        self._merger = Merger(
            [source.name for source in sources],
            weights,
            self._writers["train"],
            [self._writers[part] for part in self._val],
            units,
            seed=recipe.seed,
            skip_problems=recipe.on_error == "skip",
            stop_at_first=recipe.on_exhausted == "stop",
            report=lambda text: self._bar.write(text, file=sys.stderr),
            state=note.get("sources"),
        )
        self._planners: list[Iterator[Unit] | None] = [
            None if p.exhausted else source.units(i, Cursor(p.file, p.start, p.place))
            for i, (source, p) in enumerate(zip(sources, self._merger.progress, strict=True))
        ]
        for i, planner in enumerate(self._planners):
            if planner is None:
                self._merger.end(i)
        # Units of each source that are sent and not yet merged, oldest first.
        self._sent: list[list[tuple[Unit, Future[Encoded]]]] = [[] for _ in sources]
        self._sent_bytes = [0] * len(sources)
        self._noted = time.monotonic()
        self._job = Job(
            recipe.folder / manifests.TOKENIZER,
            recipe.eot,
            tuple(source.text_key for source in sources),
            recipe.val_fraction,
            recipe.seed,
            units,
        )

    def run(self) -> Manifest:
        """Encode and merge all that is left; return what the manifest will say."""
        pool = executor(self._recipe.processes, self._job)
        try:
            with self._bar:
                self._loop(pool)
            return self._manifest()
        except BrokenProcessPool as error:
            raise RuntimeError(
                "a process of the preparation was ended from outside, perhaps for want of memory; "
                "the same command goes on, fewer data.processes take less"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            for writer in self._writers.values():
                writer.close()

    def _loop(self, pool: Executor) -> None:
        began, before = time.monotonic(), self._tokens()
        waiting = self._merger.advance()
        while waiting is not None:
            self._send(pool, waiting)
            self._collect(waiting)
            bytes_before = self._merger.bytes_read
            try:
                waiting = self._merger.advance()
            except UserError:
                # Before the first token nothing is worth keeping: the input may be mended.
                if self._tokens():
                    self._note()
                raise
            self._bar.update(self._merger.bytes_read - bytes_before)
            rate = (self._tokens() - before) / max(time.monotonic() - began, 1e-9)
            self._bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
            if time.monotonic() - self._noted >= NOTE_S:
                self._note()

    def _send(self, pool: Executor, waiting: int) -> None:
        """Keep the workers busy with the units that the merger will ask for next."""
        processes = self._recipe.processes
        while True:
            unfinished = sum(not future.done() for sent in self._sent for _, future in sent)
            # Units that are encoded and wait for their turn count: a source of small weight would
            # run ahead of the others without end.
            room = [
                i
                for i, planner in enumerate(self._planners)
                if planner is not None
                and len(self._sent[i]) + self._merger.waiting(i) < processes + 2
            ]
            # The one that is waited for is sent in any case, or all would wait for ever.
            starving = waiting in room and not self._sent[waiting]
            if not room or (unfinished >= processes + 2 and not starving):
                return
            source = (
                waiting
                if starving
                else min(room, key=lambda i: self._sent_bytes[i] / self._weights[i])
            )
            planner = self._planners[source]
            assert planner is not None
            unit = next(planner, None)
            if unit is None:
                self._planners[source] = None
                if not self._sent[source]:
                    self._merger.end(source)
                    if source == waiting:
                        return
                continue
            future = pool.submit(encode_unit, unit)
            self._sent[source].append((replace(unit, payload=None), future))
            self._sent_bytes[source] += max(unit.size, 1)

    def _collect(self, waiting: int) -> None:
        """Give the merger what is finished, each source's units in order; wait for the next."""
        sent = self._sent[waiting]
        if sent and not sent[0][1].done():
            # For any, not for this one alone: no worker may run dry meanwhile.
            pending = [future for units in self._sent for _, future in units if not future.done()]
            wait(pending, return_when=FIRST_COMPLETED)
        for source, units in enumerate(self._sent):
            while units and units[0][1].done():
                unit, future = units.pop(0)
                self._merger.add(unit, future.result())
            if not units and self._planners[source] is None:
                self._merger.end(source)

    def _note(self) -> None:
        """Make durable what is merged, and how to go on from there."""
        note = {
            "settings": self._asked,
            "writers": {part: writer.state() for part, writer in self._writers.items()},
            "sources": self._merger.state(),
        }
        write_durably(self._work / "note.json", json.dumps(note).encode())
        self._noted = time.monotonic()

    def _tokens(self) -> int:
        return sum(progress.taken for progress in self._merger.progress)

    def _manifest(self) -> Manifest:
        train = self._writers["train"].finish()
        if not train:
            raise UserError(
                f"data.dir={self._recipe.folder}: no training document in the input; lower "
                f"data.val_fraction={self._recipe.val_fraction} or give more"
            )
        val = [
            replace(entry, source=source.name if len(self._sources) > 1 else None)
            for part, source in zip(self._val, self._sources, strict=True)
            for entry in self._writers[part].finish()
        ]
        return Manifest(
            tokenizer_hash=manifests.sha256(self._job.tokenizer),
            vocab_size=self._tokenizer.vocab_size,
            eot_id=self._tokenizer.eot_id,
            dtype=str(self._tokenizer.dtype),
            shards={"train": train, "val": val},
            sources=[
                SourceEntry(
                    source.name,
                    weight / sum(self._weights),
                    p.documents,
                    p.taken,
                    p.bytes,
                    p.skipped,
                )
                for source, weight, p in zip(
                    self._sources, self._weights, self._merger.progress, strict=True
                )
            ],
            settings=self._asked,
        )


def _tokenizer(recipe: Recipe, sources: Sequence[Source], weights: list[float]) -> TextTokenizer:
    """Return the folder's tokenizer; load or train it first where there is none."""
    path = recipe.folder / manifests.TOKENIZER
    if not path.is_file():
        beside = recipe.folder / manifests.UNFINISHED / manifests.TOKENIZER
        if recipe.tokenizer is not None:
            load_tokenizer(recipe.tokenizer, beside)
        else:
            texts = sample_texts(sources, weights, recipe.sample_mb * 2**20)
            train_bpe(texts, recipe.vocab_size, beside)
        _check(beside, recipe)  # refused before anything is written
        write_durably(path, beside.read_bytes())
    return TextTokenizer(path, recipe.eot)


def _check(path: Path, recipe: Recipe) -> None:
    """Raise UserError for a tokenizer that cannot serve; say so of one that loses text."""
    said = f"data.tokenizer={recipe.tokenizer or 'null'}"
    try:
        tokenizer = TextTokenizer(path, recipe.eot)
    except UserError as error:
        raise UserError(str(error).replace(str(path), said)) from error
    back = tokenizer.decode_bytes(tokenizer.encode([_PROBE.encode()])[0]).decode("utf-8", "replace")
    if back != _PROBE:
        print(
            f"note: {said} does not keep every text: {_PROBE!r} becomes {back!r}", file=sys.stderr
        )


def _bar(sources: Sequence[Source]) -> Any:
    from tqdm import tqdm

    total = sum(source.size for source in sources) or None
    return tqdm(total=total, desc="prepare", unit="B", unit_scale=True, smoothing=0.05)


def default_processes() -> int:
    """Return how many processors this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
