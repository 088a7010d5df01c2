"""The profiler of a run: records the steps of `trainer.profile_steps` and writes their files."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from lunaris.atomic_files import replace_file, write_json
from lunaris.config.schema.root import Config
from lunaris.data.loader import Loader
from lunaris.distributed import collectives, session
from lunaris.distributed.heartbeat import record_failure
from lunaris.errors import Stopped
from lunaris.metrics.throughput import Meter
from lunaris.model.transformer import Transformer
from lunaris.parallelism.base import Parallelism
from lunaris.profiling.account import Account, account_of
from lunaris.profiling.regions import STEP, region_name, regions_of
from lunaris.profiling.report import as_json, as_text, slowest_text, span
from lunaris.torch_internals import dump_memory_history, record_memory_history


class Profiler:
    """Records nothing: the profiler of a run without `trainer.profile_steps`."""

    def step(self, number: int) -> AbstractContextManager[None]:
        """Return the context in which the run loads and takes step `number`, from 1."""
        return nullcontext()

    def __enter__(self) -> Profiler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, *_: object
    ) -> None:
        """End a recording that the end of the run interrupts."""


@dataclass
class _Recording:
    """A recording that goes on.

    folder: None where it could not be made. fault: why it could not begin, or None.
    """

    folder: Path | None
    profile: profile
    open: ExitStack
    fault: str | None
    steps: list[int] = field(default_factory=list)
    data_s: list[float] = field(default_factory=list)


class StepProfiler(Profiler):
    """Records consecutive steps of a run in every process, and writes RUN/profile.

    That is rank*.trace.json.gz and on CUDA rank*.memory.pickle of each process, and steps.txt and
    steps.json of all. A later recording goes to RUN/profile_2 and so on. It reads nothing that
    training changes, and changes nothing that training reads. A recording that cannot be written is
    reported; the run continues.
    """

    def __init__(
        self,
        steps: list[int],
        run_path: Path,
        parallelism: Parallelism,
        model: Transformer,
        compiled: bool,
        loader: Loader,
        meter: Meter,
        message: Callable[[str], None],
    ) -> None:
        """steps: the first and the last, from 1. message: shows the person a line, on rank 0."""
        self._first, self._last = steps
        self._path = run_path
        self._parallelism = parallelism
        self._model, self._compiled = model, compiled
        self._loader, self._meter = loader, meter
        self._message = message
        self._recording: _Recording | None = None

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Record a step of the window; every process calls this."""
        if not self._first <= number <= self._last:
            yield
            return
        if self._recording is None:
            self._recording = self._begin()
        with record_function(region_name(STEP, number)):
            yield
            self._synchronize()
        self._recording.steps.append(number)
        self._recording.data_s.append(self._loader.wait_s)
        if number == self._last:
            self._finish()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, *_: object
    ) -> None:
        """End a recording: with every process after a signal or a pause, else in this one alone."""
        if self._recording is None:
            return
        if kind is None or isinstance(error, Stopped):
            self._finish()
            return
        recording, self._recording = self._recording, None
        if not isinstance(error, Exception):
            return  # A second Ctrl-C ends the process at once.
        # Before the trace is written, which takes long: the error that ends the run counts.
        record_failure(error)
        with suppress(Exception), session.excused():
            self._write_own(recording)

    def _begin(self) -> _Recording:
        with self._meter.paused():
            folder = _new_folder(self._path) if self._parallelism.is_writer else None
            folder = collectives.from_rank_0(folder)
            # Kineto reports each start and stop at its highest level. It reads this only once.
            os.environ.setdefault("KINETO_LOG_LEVEL", "6")
            activities = [ProfilerActivity.CPU]
            opened, fault = ExitStack(), None
            if self._parallelism.device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            recorded = profile(activities=activities)
            try:
                if self._parallelism.device.type == "cuda":
                    record_memory_history(True)
                    opened.callback(record_memory_history, False)
                opened.enter_context(regions_of(self._model, compiled=self._compiled))
                self._synchronize()
                recorded.start()
            except Exception as error:  # Another profiler may run; this run continues.
                fault = f"{type(error).__name__}: {error}"
        return _Recording(folder, recorded, opened, fault)

    def _finish(self) -> None:
        """Write what was recorded; every process calls this after the same step."""
        recording, self._recording = self._recording, None
        assert recording is not None
        with self._meter.paused():
            account, fault = None, None
            try:
                # The events of large models take torch minutes, in which it holds Python's lock.
                with session.excused():
                    account = self._write_own(recording)
            except Exception as error:
                fault = f"{type(error).__name__}: {error}"
            found = self._parallelism.gather((account, fault))
            if self._parallelism.is_writer:
                self._report(recording, found)

    def _write_own(self, recording: _Recording) -> Account | None:
        """Stop recording; write this process's files and return its account, None without a step.

        Raises OSError or RuntimeError where they cannot be written.
        """
        if recording.fault is not None:
            recording.open.close()
            raise RuntimeError(recording.fault)
        self._synchronize()
        try:
            recording.profile.stop()
            if recording.folder is not None:
                name = f"rank{session.rank()}"
                if self._parallelism.device.type == "cuda":
                    dump_memory_history(recording.folder / f"{name}.memory.pickle")
                unfinished = recording.folder / f".{name}.json.gz"
                recording.profile.export_chrome_trace(str(unfinished))
                unfinished.replace(recording.folder / f"{name}.trace.json.gz")
        finally:
            recording.open.close()
        if not recording.steps:
            return None
        return account_of(recording.profile.events() or [], recording.data_s)

    def _report(
        self, recording: _Recording, found: list[tuple[Account | None, str | None]]
    ) -> None:
        """Write the tables and say where they are; rank 0 alone calls this."""
        steps, folder = recording.steps, recording.folder
        accounts = [account for account, _ in found if account is not None]
        faults = [f"rank {rank}: {fault}" for rank, (_, fault) in enumerate(found) if fault]
        if folder is None:
            faults.append(f"no folder could be made in {self._path}")
        device = str(self._parallelism.device.type)
        if not faults and folder is not None and steps:
            try:
                text = as_text(accounts, steps, device)
                replace_file(folder / "steps.txt", text.encode())
                write_json(folder / "steps.json", as_json(accounts, steps, device))
            except OSError as error:
                faults.append(f"rank 0: {error}")
        if faults:
            self._message(f"profile: is not complete, the run continues: {faults[0]}")
        elif steps:
            self._message(f"profile: {span(steps)} in {folder} (steps.txt, a trace of each rank)")
            self._message(f"profile: {slowest_text(accounts)}")
            if device == "cuda" and not accounts[0].on_device:
                self._message("profile: without times of the GPU; CUPTI does not work here")

    def _synchronize(self) -> None:
        """Wait for the device, so that its work counts for the step that launched it."""
        if self._parallelism.device.type == "cuda":
            torch.cuda.synchronize(self._parallelism.device)


def profiler_of(
    cfg: Config,
    run_path: Path,
    parallelism: Parallelism,
    model: Transformer,
    loader: Loader,
    meter: Meter,
    message: Callable[[str], None],
) -> Profiler:
    """Return the profiler that `trainer.profile_steps` asks for. Arguments as of StepProfiler."""
    if not cfg.trainer.profile_steps:
        return Profiler()
    steps, compiled = cfg.trainer.profile_steps, cfg.trainer.compile_model
    return StepProfiler(steps, run_path, parallelism, model, compiled, loader, meter, message)


def _new_folder(run_path: Path) -> Path | None:
    """Make RUN/profile, or the first of RUN/profile_2, … that is not there; None where it fails."""
    number = 1
    while True:
        folder = run_path / ("profile" if number == 1 else f"profile_{number}")
        try:
            folder.mkdir()
        except FileExistsError:
            number += 1
        except OSError:
            return None
        else:
            return folder
