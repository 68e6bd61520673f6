"""However a run ends, what is finished stays: the one place that its end, an error and a signal all lead to."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

from lightning import Trainer

from harness.ab.module import RolloutModule
from harness.ab.processes import ProcessParts, stop_others
from harness.ab.recorder import Recorder
from harness.data.datamodule import ClipDataModule
from harness.report.record import RunRecord

Conclude = Callable[[RunRecord], list[Exception]]
"""What becomes of the record; gives back what went wrong on the way."""


class Ending:
    """A context in which clips are rolled out; ``record`` is there once it was left.

    The first process stops the others, takes over what they have and concludes. Another process that fails tells the
    first one, which then ends the run. What went wrong in concluding is raised if nothing else is, and added to it as a
    note otherwise.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: RolloutModule,
        data: ClipDataModule,
        parts: ProcessParts,
        recorder: Recorder,
        conclude: Conclude,
    ) -> None:
        self.trainer, self.module, self.data = trainer, module, data
        self.parts, self.recorder, self.conclude = parts, recorder, conclude
        self.record: RunRecord | None = None

    def __enter__(self) -> Ending:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if not self.trainer.is_global_zero:
            return self._told(error)
        try:
            problems = self._finish(error)
        finally:
            self.parts.clean()
        if problems and error is None:
            first, *others = problems
            for other in others:
                first.add_note(f"{other}")
            raise first
        for problem in problems:
            assert error is not None
            error.add_note(f"{problem}")
        return False

    def _told(self, error: BaseException | None) -> bool:
        """Whether another process than the first has told that one of its error: then it ends quietly."""
        if not (self.parts.started and isinstance(error, Exception)):
            return False
        self.parts.write(self.trainer, self.module, "failed", error)
        return True

    def _finish(self, error: BaseException | None) -> list[Exception]:
        if error is not None:
            stop_others(self.trainer)
        if not self.module.arms:
            return []  # it never came to a rollout
        self.parts.merge(self.trainer, self.module)
        self.record = self.recorder.finished(self.module, self.data, error)
        return self.conclude(self.record)
