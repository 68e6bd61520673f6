"""What is seen of a run while it lasts: a bar on a terminal, a line now and then elsewhere, and ``run.log``."""

from __future__ import annotations

import logging
import time
from typing import Any

from lightning import Callback, LightningModule, Trainer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from harness.ab.module import BatchOutcome, RolloutModule

REDRAW_S = 0.2
"""Seconds between two drawings of the progress bar."""
LINE_S = 15.0
"""Seconds between two lines of progress where there is no terminal."""

log = logging.getLogger(__name__)


class RolloutProgress(Callback):
    """How far the rollouts are, over all frames of all clips and arms."""

    def __init__(self) -> None:
        self.console = Console()
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("frames"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            auto_refresh=False,  # a thread that draws while frames are timed would be part of their time
        )
        self._seen = 0.0

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin, and have the module tell of every frame."""
        assert isinstance(pl_module, RolloutModule)
        self._batches, self._batch, self._frames = int(sum(trainer.num_predict_batches)), 0, 0
        self._total = self._batches * len(pl_module.arms) * pl_module.plan.conf.data.future_frames
        self._quiet = not trainer.is_global_zero
        self._drawn = self.console.is_terminal and not self._quiet
        self._started = self._seen = time.monotonic()
        self.progress.disable = not self._drawn
        self._task = self.progress.add_task(self._description(), total=self._total)
        pl_module.on_frame = self._advance
        self.progress.start()

    def _advance(self) -> None:
        self._frames += 1
        self.progress.advance(self._task)
        now = time.monotonic()
        if now - self._seen > (REDRAW_S if self._drawn else LINE_S):
            self._seen = now
            self._show()

    def _show(self) -> None:
        if self._drawn:
            self.progress.refresh()
        elif not self._quiet:
            print(self._line(), flush=True)

    def _line(self) -> str:
        passed = time.monotonic() - self._started
        left = passed * (self._total - self._frames) / self._frames if self._frames else None
        ahead = "" if left is None else f", about {_duration(left)} left"
        return f"{self._description()}: {self._frames} of {self._total} frames in {_duration(passed)}{ahead}"

    def _description(self) -> str:
        return f"clips {min(self._batch + 1, self._batches)}/{self._batches}"

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Name the next batch, and note this one in the log."""
        assert isinstance(outputs, BatchOutcome)
        self._batch = batch_idx + 1
        self.progress.update(self._task, description=self._description())
        for done in outputs.clips:
            scores = done.record.scores
            told = ", ".join(f"{name} {score.psnr:.2f} dB" for name, score in scores.items()) or "no scores"
            log.info("clip %s (%d/%d): %s", done.record.clip_id, self._batch, self._batches, told)
        for clip in set(outputs.times.clips) - {done.record.clip_id for done in outputs.clips}:
            log.warning("clip %s (%d/%d): NaN or Inf, not scored", clip, self._batch, self._batches)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the full bar and leave it there."""
        self._show()
        self.progress.stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the terminal as it was before the error is printed."""
        self.progress.stop()


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
