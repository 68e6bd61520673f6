"""What happens around the rollouts: a progress bar, and the outputs of each clip as soon as it is finished."""

from __future__ import annotations

import csv
import io
import time
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from harness.ab.module import ClipOutcome, RolloutModule
from harness.measure.quality import ClipQuality, FrameScores, drop
from harness.report.record import write_atomically
from harness.report.video import Frames, Panel, write_comparison

REDRAW_S = 0.2
"""Seconds between two drawings of the progress bar."""


def to_uint8(frames: Tensor) -> Frames:
    """Float ``[N, 3, h, w]`` in [0, 1] to uint8 ``[N, h, w, 3]``."""
    return (frames * 255).round().byte().permute(0, 2, 3, 1).numpy()


class RolloutProgress(Callback):
    """One bar over all frames of all clips and arms."""

    def __init__(self) -> None:
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("frames"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            auto_refresh=False,  # a thread that draws while frames are timed would be part of their time
        )
        self._drawn = 0.0

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the bar and have the module advance it."""
        assert isinstance(pl_module, RolloutModule)
        self._batches = int(sum(trainer.num_predict_batches))
        frames = self._batches * len(pl_module.arms) * pl_module.plan.conf.data.future_frames
        self.progress.disable = not trainer.is_global_zero
        self._task = self.progress.add_task(self._description(0), total=frames)
        pl_module.on_frame = self._advance
        self.progress.start()

    def _advance(self) -> None:
        self.progress.advance(self._task)
        now = time.monotonic()
        if now - self._drawn > REDRAW_S:
            self.progress.refresh()
            self._drawn = now

    def _description(self, done: int) -> str:
        return f"clips {min(done + 1, self._batches)}/{self._batches}"

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Name the next batch."""
        self.progress.update(self._task, description=self._description(batch_idx + 1))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the full bar and leave it there."""
        self.progress.refresh()
        self.progress.stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the terminal as it was before the error is printed."""
        self.progress.stop()


class ClipOutputs(Callback):
    """Writes each finished clip's video and per-frame figures, so that they are kept if a later clip fails.

    Args:
        folder: of the run.
        videos: whether to write A/B videos.
        labels: caption of each arm.

    ``clips`` holds the scores of all finished clips, ``rows`` the lines of ``frames.csv``.
    """

    def __init__(self, folder: Path, videos: bool, labels: dict[str, str]) -> None:
        self.folder, self.videos, self.labels = folder, videos, labels
        self.clips: list[ClipQuality] = []
        self.rows: list[dict[str, Any]] = []

    def video_path(self, clip_id: str) -> Path:
        """Where a clip's A/B video goes."""
        return self.folder / "videos" / f"{clip_id}.mp4"

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Write what the batch's clips produced."""
        for outcome in outputs:
            if self.videos:
                write_comparison(self.video_path(outcome.quality.clip_id), self._panels(outcome), outcome.fps)
            self.clips.append(outcome.quality)
            self.rows += _frame_rows(outcome)
            if trainer.world_size == 1:
                self._log(trainer, len(self.clips) - 1)
        if trainer.is_global_zero:
            self.write_rows()

    def write_rows(self) -> None:
        """Write ``frames.csv``."""
        write_atomically(self.folder / "frames.csv", _csv(self.rows))

    def log_all(self, trainer: Trainer) -> None:
        """Log every clip, in order; a run of several processes has them together only at its end."""
        for index in range(len(self.clips)):
            self._log(trainer, index)

    def _log(self, trainer: Trainer, index: int) -> None:
        if trainer.logger is not None:
            trainer.logger.log_metrics(_logged(self.clips[index]), step=index)

    def _panels(self, outcome: ClipOutcome) -> list[Panel]:
        panels = []
        for name in ("recording", "bf16", "candidate"):
            if name not in outcome.frames:
                continue
            scores = outcome.quality.scores.get(name)
            notes = [f"{value:.1f} dB" for value in scores.psnr] if scores else []
            label = self.labels.get(name, name)
            if name == "candidate" and outcome.quality.fallback:
                label += f" ({outcome.quality.fallback})"
            panels.append(Panel(label, to_uint8(outcome.frames[name]), notes))
        return panels


def _frame_rows(outcome: ClipOutcome) -> list[dict[str, Any]]:
    """One row per arm and frame: its times and scores."""
    rows: list[dict[str, Any]] = []
    for arm, times in outcome.times.items():
        scored = {"": outcome.quality.scores.get(arm)}
        if arm == "candidate":
            scored["fidelity_"] = outcome.quality.scores.get("fidelity")
        for frame, spans in enumerate(times):
            row = {"clip_id": outcome.quality.clip_id, "tag": outcome.quality.tag, "arm": arm, "frame": frame}
            row |= {f"{span}_ms": round(value, 4) for span, value in spans.items()}
            for prefix, scores in scored.items():
                row |= _scores_at(scores, frame, prefix)
            rows.append(row)
    return rows


def _scores_at(scores: FrameScores | None, frame: int, prefix: str) -> dict[str, float]:
    if scores is None:
        return {}
    return {f"{prefix}psnr": round(scores.psnr[frame], 4), f"{prefix}ssim": round(scores.ssim[frame], 6)}


def _csv(rows: list[dict[str, Any]]) -> str:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _logged(quality: ClipQuality) -> dict[str, float]:
    """One clip's figures for the logger."""
    figures = {
        f"{name}/{metric}": value for name, scores in quality.scores.items() for metric, value in scores.mean().items()
    }
    dropped = drop(quality) or {}
    return figures | {f"drop/{metric}": value for metric, value in dropped.items()}
