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

from harness.ab.arm import DIGITS
from harness.ab.module import BatchOutcome, ClipOutcome, RolloutModule
from harness.measure.figures import FrameScores
from harness.report.record import write_atomically
from harness.report.sections import BatchTimes, ClipRecord
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

    ``clips`` holds all finished clips, ``times`` the frame times of all finished batches, ``rows`` the lines of
    ``frames.csv``.
    """

    def __init__(self, folder: Path, videos: bool, labels: dict[str, str]) -> None:
        self.folder, self.videos, self.labels = folder, videos, labels
        self.clips: list[ClipRecord] = []
        self.times: list[BatchTimes] = []
        self.rows: list[dict[str, Any]] = []

    def video_path(self, clip_id: str) -> Path:
        """Where a clip's A/B video goes."""
        return self.folder / "videos" / f"{clip_id}.mp4"

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Write what the batch's clips produced."""
        assert isinstance(outputs, BatchOutcome)
        self.times.append(outputs.times)
        for outcome in outputs.clips:
            clip = outcome.record
            if self.videos:
                path = self.video_path(clip.clip_id)
                write_comparison(path, self._panels(outcome), outcome.fps)
                clip.video = str(path.relative_to(self.folder))
            self.clips.append(clip)
            self.rows += _frame_rows(clip, outputs.times)
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
            scores = outcome.record.scores.get(name)
            notes = [f"{value:.1f} dB" for value in scores.frames.psnr] if scores else []
            label = self.labels.get(name, name)
            if name == "candidate" and outcome.record.fallback:
                label += f" ({outcome.record.fallback})"
            panels.append(Panel(label, to_uint8(outcome.frames[name]), notes))
        return panels


def _frame_rows(clip: ClipRecord, times: BatchTimes) -> list[dict[str, Any]]:
    """One row per arm and frame: its times and scores."""
    rows: list[dict[str, Any]] = []
    for arm, spans in times.arms.items():
        scored = {"": clip.scores.get(arm)}
        if arm == "candidate":
            scored["fidelity_"] = clip.scores.get("fidelity")
        for frame, (dit, decoder) in enumerate(zip(spans.dit_ms, spans.decoder_ms, strict=True)):
            row = {"clip_id": clip.clip_id, "tag": clip.tag, "arm": arm, "frame": frame}
            row |= {"dit_ms": dit, "decoder_ms": decoder, "total_ms": round(dit + decoder, DIGITS)}
            for prefix, scores in scored.items():
                row |= _scores_at(None if scores is None else scores.frames, frame, prefix)
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


def _logged(clip: ClipRecord) -> dict[str, float]:
    """One clip's figures for the logger."""
    figures = {f"{name}/psnr": scores.psnr for name, scores in clip.scores.items()}
    figures |= {f"{name}/ssim": scores.ssim for name, scores in clip.scores.items()}
    return figures | ({} if clip.drop is None else {"drop/psnr": clip.drop.psnr, "drop/ssim": clip.drop.ssim})
