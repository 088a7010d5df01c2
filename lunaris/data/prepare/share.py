"""The share of one of several tasks that encode a corpus together, each without knowing the others.

The chunks of all sources are one series, which is cut into bundles at the same places by every
task. Bundle b belongs to task b mod N. A compressed file that is small next to a share belongs to
one task, and the others do not read it. The merging, `pipeline.write_shards`, takes the bundles and
encodes what is missing: the tasks decide how long it takes, never what comes out.
"""

from __future__ import annotations

import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace

from lunaris.atomic_files import file_lock
from lunaris.data import manifest as manifests
from lunaris.data.prepare import chunks as sizes
from lunaris.data.prepare.bundles import Bundles, BundleWriter, Stored, bundles_folder, digest_of
from lunaris.data.prepare.chunks import Chunk, Cursor, Source
from lunaris.data.prepare.encode import LOST_WORKER, Encoded, Job, encode_chunk, executor
from lunaris.data.prepare.file_source import FileSource
from lunaris.data.prepare.folder_tokenizer import folder_tokenizer
from lunaris.data.prepare.interleave import Progress
from lunaris.data.prepare.pipeline import cleaned_up, default_processes
from lunaris.data.prepare.spec import PrepareSpec, require_begun
from lunaris.errors import Stopped, UserError

# The most chunks of full size in a bundle: the most work that a kill can cost a task.
_MOST_CHUNKS = 16
# Bundles of a task at least, as far as there are chunks, so that the tasks end at the same time.
_LEAST_BUNDLES = 8
# The source of a bundle, its group of files or -1, and its number there.
_Key = tuple[int, int, int]
# Seconds between two lines about the progress.
_SAY_S = 10.0


@dataclass(frozen=True)
class Share:
    """The `task`-th of `tasks` shares, from 0."""

    task: int
    tasks: int


def most_tasks(spec: PrepareSpec) -> int:
    """Return for how many tasks there is work: one for each chunk, as far as sizes tell.

    A source of unknown size is read as a stream, by every task from its beginning: one task.
    """
    if not all(source.size for source in spec.sources):
        return 1
    return sum(-(-source.size // sizes.CHUNK_BYTES) for source in spec.sources)


def encode_share(spec: PrepareSpec, share: Share, stopped: Callable[[], bool]) -> None:
    """Encode the chunks of a share that are in no bundle yet.

    `read_note` has begun the folder. Of several tasks, the first loads or trains the tokenizer.
    stopped: whether to save and raise Stopped, asked after each chunk. Raises UserError when the
    input has changed since, or a document cannot be read.
    """
    folder = spec.folder
    if manifests.read(folder) is not None:
        return
    note = require_begun(spec)
    work = folder / manifests.UNFINISHED
    with cleaned_up(folder):
        with file_lock(work / "tokenizer.lock"):
            folder_tokenizer(spec)
        scratch = work / "tasks" / str(share.task)
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        bundles_folder(folder).mkdir(exist_ok=True)
        begun = note.get("sources") or [{} for _ in spec.sources]
        progress = [Progress(**values) for values in begun]
        _Task(spec, share, Job.of(spec, scratch), stopped).run(progress)
        shutil.rmtree(scratch, ignore_errors=True)


class _Task:
    """One run of a share's work."""

    def __init__(
        self, spec: PrepareSpec, share: Share, job: Job, stopped: Callable[[], bool]
    ) -> None:
        self._spec, self._share, self._job, self._stopped = spec, share, job, stopped
        self._processes = spec.keys.processes or default_processes()
        digest, folder = digest_of(spec), bundles_folder(spec.folder)
        self._bundles = Bundles(folder, digest, read=False)
        self._writer = BundleWriter(folder, job, digest)
        self._total = sum(source.size for source in spec.sources)
        most = _MOST_CHUNKS * sizes.CHUNK_BYTES
        least = share.tasks * _LEAST_BUNDLES
        # Bytes of input of a bundle.
        self._size = min(most, max(1, self._total // least)) if self._total else most
        self._groups = 0  # of compressed files that one task has
        # What was submitted and is in no bundle yet, oldest first, and the bundle that it is for.
        self._sent: deque[tuple[_Key, Chunk, Future[Encoded]]] = deque()
        self._writing: _Key | None = None  # the bundle of the chunk that was written last
        self._bytes, self._said = 0, time.monotonic()

    def run(self, progress: list[Progress]) -> None:
        """Encode what is left; progress: of the merging, which may have begun."""
        pool = executor(self._processes, self._job)
        try:
            for mine, key, found in self._series(progress):
                self._obey()
                if not mine:
                    continue
                if isinstance(found, Stored):
                    self._write(0)
                    self._writer.finish()  # A bundle holds no other chunks in between.
                    continue
                future = pool.submit(encode_chunk, found)
                self._sent.append((key, replace(found, payload=None), future))
                self._write(self._processes + 2)
            self._write(0)
        except BrokenProcessPool as error:
            raise RuntimeError(LOST_WORKER) from error
        finally:
            self._writer.finish()
            pool.shutdown(wait=True, cancel_futures=True)
        self._say()

    def _series(self, progress: list[Progress]) -> Iterator[tuple[bool, _Key, Chunk | Stored]]:
        """Yield the chunks that are not merged, without files that others have alone.

        With each comes whether it belongs to this share, and its bundle.
        """
        share, shared = self._share, 0
        for i, (source, at) in enumerate(zip(self._spec.sources, progress, strict=True)):
            groups = self._groups_of(source)
            if at.exhausted:
                continue
            if isinstance(source, FileSource):
                others = {f for f, group in groups.items() if group % share.tasks != share.task}
                source.left_out = frozenset(others)
            held, within, last, file = 0, 0, -1, at.file
            for found in self._bundles.chunks(i, source, Cursor(at.file, at.start, at.place)):
                chunk = found.chunk if isinstance(found, Stored) else replace(found, source=i)
                group = groups.get(chunk.cursor.file, -1)
                # Every task must count alike, also one that does not see the files of others.
                if group != last or any(f in groups for f in range(file + 1, chunk.cursor.file)):
                    shared += last < 0 and held > 0
                    held, within, last = 0, 0, group
                file = chunk.cursor.file
                owner = shared if group < 0 else group
                key = (i, group, shared if group < 0 else within)
                stored = isinstance(found, Stored)
                yield owner % share.tasks == share.task, key, found if stored else chunk
                held += _extent(chunk)
                if held >= self._size:
                    shared += group < 0
                    held, within = 0, within + 1
            shared += last < 0 and held > 0

    def _groups_of(self, source: Source) -> dict[int, int]:
        """Return the compressed files of a source that one task has alone, and their groups.

        A group is of files next to each other, about as large as a bundle. Larger files are
        shared, so that the tasks end at the same time.
        """
        groups: dict[int, int] = {}
        held, before = 0, -2
        for file, size in source.compressed().items() if isinstance(source, FileSource) else ():
            if 2 * size * self._share.tasks > self._total:
                continue
            if file != before + 1 or held + size > self._size:
                self._groups, held = self._groups + 1, 0
            groups[file], held, before = self._groups, held + size, file
        return groups

    def _write(self, most: int) -> None:
        """Write chunks into bundles until at most `most` are left. Raises Stopped if asked to."""
        while len(self._sent) > most:
            key, chunk, future = self._sent.popleft()
            encoded = future.result()
            self._refuse_problems(chunk, encoded)
            if key != self._writing:
                self._writer.finish()
                self._writing = key
            self._writer.add(chunk, encoded)
            self._bytes += chunk.size
            if time.monotonic() - self._said >= _SAY_S:
                self._say()
            self._obey()

    def _obey(self) -> None:
        if self._stopped():
            raise Stopped(f"at {self._spec.folder}; run the same command to continue")

    def _refuse_problems(self, chunk: Chunk, encoded: Encoded) -> None:
        """Raise UserError for a document on which the merging would stop.

        Where it ends with the first source, it may not get so far.
        """
        keys = self._spec.keys
        if not encoded.problems or keys.on_error == "skip" or keys.on_exhausted == "stop":
            return
        problem = encoded.problems[0]
        unit = {"parquet": "row group", "documents": "document"}.get(chunk.kind, "byte")
        where = f" of the part from {unit} {chunk.start} on" if chunk.start else ""
        raise UserError(
            f"{chunk.path}: line {problem.line}{where}: {problem.message}; data.on_error=skip "
            "leaves such documents out"
        )

    def _say(self) -> None:
        """Print how much this process has encoded."""
        self._said = time.monotonic()
        print(
            f"task {self._share.task} of {self._share.tasks}: encoded {self._bytes / 1e6:,.1f} MB "
            "of the input",
            flush=True,
        )


def _extent(chunk: Chunk) -> int:
    """Return how many bytes of text a chunk has, the same for every task.

    The `size` of a chunk of a compressed file depends on where the reading began.
    """
    return chunk.size if chunk.kind in ("parquet", "documents") else chunk.stop - chunk.start
