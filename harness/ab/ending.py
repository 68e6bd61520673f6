"""However a run ends, what is finished stays: the one place that its end, an error and a signal all lead to."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import TracebackType

from lightning import Trainer

from harness.ab.module import RolloutModule
from harness.ab.processes import Processes
from harness.ab.recorder import Recorder
from harness.data.datamodule import ClipDataModule
from harness.report.journal import remove_journals
from harness.report.record import COMPLETE, RunRecord
from harness.signals import Signals, Stopped

log = logging.getLogger(__name__)

Conclude = Callable[[RunRecord], list[Exception]]
"""What becomes of the record; gives back what went wrong on the way."""


class Ending:
    """A context in which clips are rolled out; ``record`` is there once it was left.

    The first process stops the others, takes over what they have and concludes; signals wait until it has. Another
    process that fails tells the first one, which then ends the run. What went wrong in concluding is raised if nothing
    else is, and added to it as a note otherwise.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: RolloutModule,
        data: ClipDataModule,
        processes: Processes,
        recorder: Recorder,
        signals: Signals,
        conclude: Conclude,
    ) -> None:
        self.trainer, self.module, self.data, self.signals = trainer, module, data, signals
        self.processes, self.recorder, self.conclude = processes, recorder, conclude
        self.record: RunRecord | None = None

    def __enter__(self) -> Ending:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if not self.trainer.is_global_zero:
            return self._told(error)
        with self.signals.held(drop=isinstance(error, Stopped)):
            problems = self._finish(error)
        if problems and error is None:
            first, *others = problems
            for other in others:
                first.add_note(str(other))
            raise first
        for problem in problems:
            assert error is not None
            error.add_note(str(problem))
        return False

    def _told(self, error: BaseException | None) -> bool:
        """Whether another process than the first has told that one of its error: then it ends quietly."""
        if isinstance(error, Exception) and self.processes.orphaned:
            return True  # its error is that the first one was killed
        if not (self.processes.started and isinstance(error, Exception)):
            return False
        self.processes.fail(self.trainer, self.module, error)
        return True

    def _finish(self, error: BaseException | None) -> list[Exception]:
        if error is not None:
            log.error("%s: %s", type(error).__name__, error, exc_info=not isinstance(error, Stopped))
            self.processes.stop(self.trainer)
        if not self.module.arms:
            return []  # it never came to a rollout
        problems: list[Exception] = []
        try:
            self.processes.merge(self.trainer, self.module)
        except (OSError, ValueError) as problem:
            problems.append(problem)
        self.record = self.recorder.finished(self.module, self.data, error)
        problems += self.conclude(self.record)
        log.info("%s after %d clips", self.record.status, len(self.record.clips))
        if self.record.status == COMPLETE and not problems:
            remove_journals(self.recorder.results.folder)
        return problems
