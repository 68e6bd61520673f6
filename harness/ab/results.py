"""What a run has finished, and where each finished batch goes at once: videos, ``frames.csv``, the journal."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer

from harness.ab.arm import DIGITS
from harness.ab.module import BatchOutcome, ClipOutcome, RolloutModule
from harness.files.writing import append, write_text
from harness.measure.figures import FrameScores
from harness.measure.pictures import Shown
from harness.report.files import FRAMES, VIDEOS, FileRecord
from harness.report.journal import FinishedBatch, Journal, Line, in_order
from harness.report.sections import BatchTimes, ClipRecord, ClipScores, FallbackRecord, FrameTimes, IncidentRecord
from harness.report.video import Panel, Picture, write_comparison

COLUMNS = (
    *("clip_id", "tag", "arm", "frame", "dit_ms", "decoder_ms", "total_ms"),
    *("psnr", "ssim", "fidelity_psnr", "fidelity_ssim"),
)
"""Of ``frames.csv``."""
FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")
"""What a spreadsheet takes for the start of a formula, blanks before it left out; in full width too."""


class Results(Callback):
    """Keeps each finished batch, so that a later one that fails takes nothing of it along.

    Args:
        folder: of the run.
        videos: whether to write A/B videos.
        labels: caption of each arm.

    ``batches``: all finished ones; in the first process, once the others are merged, theirs too. ``incidents_told``:
    how many of the guard's incidents are in them.
    """

    def __init__(self, folder: Path, videos: bool, labels: dict[str, str]) -> None:
        self.folder, self.videos, self.labels = folder, videos, labels
        self.batches: list[FinishedBatch] = []
        self.incidents_told = self._fallbacks_told = 0
        self._journal: Journal | None = None

    @property
    def clips(self) -> list[ClipRecord]:
        """All clips that were scored."""
        return [clip for batch in self.batches for clip in batch.clips]

    @property
    def times(self) -> list[BatchTimes]:
        """Of all batches."""
        return [batch.times for batch in self.batches]

    @property
    def files(self) -> dict[str, FileRecord]:
        """By path, relative to the folder."""
        return {name: file for batch in self.batches for name, file in batch.files.items()}

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Write what the batch's clips produced."""
        assert isinstance(pl_module, RolloutModule)
        assert isinstance(outputs, BatchOutcome)
        finished = self._finished(pl_module, outputs)
        self.batches.append(finished)
        if self._journal is None:
            self._journal = Journal(self.folder, trainer.global_rank)
        self._journal.append(Line(batch=finished))
        if trainer.is_global_zero:
            self._append_rows(finished)
        if trainer.world_size == 1:
            log_clips(trainer, finished.clips, len(self.clips) - len(finished.clips))

    def _finished(self, module: RolloutModule, outcome: BatchOutcome) -> FinishedBatch:
        clips, files = [], {}
        for done in outcome.clips:
            clip = done.record
            if self.videos:
                path = self.folder / VIDEOS / f"{clip.clip_id}.mp4"
                write_comparison(path, self._panels(done), done.fps)
                clip.video = path.relative_to(self.folder).as_posix()
                files[clip.video] = FileRecord.of(path)
            clips.append(clip)
        incidents, taken = module.guard.incidents[self.incidents_told :], module.guard.taken[self._fallbacks_told :]
        self.incidents_told, self._fallbacks_told = len(module.guard.incidents), len(module.guard.taken)
        return FinishedBatch(
            done=outcome.times.clips,
            clips=clips,
            times=outcome.times,
            arms=outcome.arms,
            incidents=[IncidentRecord(**asdict(incident)) for incident in incidents],
            fallbacks=[FallbackRecord(**one) for one in taken],
            files=files,
        )

    def _append_rows(self, batch: FinishedBatch) -> None:
        path = self.folder / FRAMES
        new = not path.exists()
        append(path, _csv(_rows(batch), heading=new).encode())

    def take_over(self, module: RolloutModule, batches: Sequence[FinishedBatch], clips: Sequence[str]) -> None:
        """Make batches of other processes, or of an earlier run, this one's; ``clips`` say in what order."""
        self.batches = in_order([*self.batches, *batches], clips)
        fallback = None
        for batch in batches:
            fallback = module.guard.take_over(batch.incidents, batch.fallbacks) or fallback
        if fallback is not None:
            module.rebuild(fallback)
        for batch in batches:
            for name, figures in batch.arms.items():
                if name == "bf16" or batch.times.fallback == module.guard.fallback:
                    module.arms[name].take_over(figures)
        self.incidents_told, self._fallbacks_told = len(module.guard.incidents), len(module.guard.taken)
        write_text(self.folder / FRAMES, _csv((row for batch in self.batches for row in _rows(batch)), True))

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
            panels.append(Panel(label, _Uint8(outcome.frames[name]), notes))
        return panels


class _Uint8:
    """Pictures ``[F, 3, h, w]`` in [0, 1] as uint8 ``[F, h, w, 3]``, each made when it is asked for."""

    def __init__(self, shown: Shown) -> None:
        self._shown = shown

    @property
    def shape(self) -> tuple[int, ...]:
        """F, h, w, 3."""
        frames, channels, height, width = self._shown.shape
        return frames, height, width, channels

    def __getitem__(self, index: int) -> Picture:
        (frame,) = self._shown[index : index + 1]
        return (frame * 255).round().byte().permute(1, 2, 0).numpy()


def log_clips(trainer: Trainer, clips: Sequence[ClipRecord], first: int = 0) -> None:
    """Give the clips' figures to the run's logger; ``first``: how many it has had before."""
    if trainer.logger is not None:
        for step, clip in enumerate(clips, first):
            trainer.logger.log_metrics(_logged(clip), step=step)


def _logged(clip: ClipRecord) -> dict[str, float]:
    figures = {f"{name}/psnr": scores.psnr for name, scores in clip.scores.items()}
    figures |= {f"{name}/ssim": scores.ssim for name, scores in clip.scores.items()}
    return figures | ({} if clip.drop is None else {"drop/psnr": clip.drop.psnr, "drop/ssim": clip.drop.ssim})


def _rows(batch: FinishedBatch) -> Iterable[dict[str, Any]]:
    """One row per clip, arm and frame: its times, where it was rolled out, and scores."""
    for clip in batch.clips:
        for arm in sorted({*batch.times.arms, *batch.arms}):
            spans, scored = batch.times.arms.get(arm), {"": clip.scores.get(arm)}
            if arm == "candidate":
                scored["fidelity_"] = clip.scores.get("fidelity")
            for frame in range(_frames(spans, scored[""])):
                row: dict[str, Any] = {"clip_id": clip.clip_id, "tag": clip.tag, "arm": arm, "frame": frame}
                if spans is not None:
                    dit, decoder = spans.dit_ms[frame], spans.decoder_ms[frame]
                    row |= {"dit_ms": dit, "decoder_ms": decoder, "total_ms": round(dit + decoder, DIGITS)}
                for prefix, scores in scored.items():
                    row |= _scores_at(None if scores is None else scores.frames, frame, prefix)
                yield row


def _frames(spans: FrameTimes | None, scores: ClipScores | None) -> int:
    if spans is not None:
        return len(spans.dit_ms)
    return 0 if scores is None else len(scores.frames.psnr)


def _plain(text: str) -> str:
    """Text that no spreadsheet runs."""
    return f"'{text}" if text.startswith(FORMULA) or text.lstrip().startswith(FORMULA) else text


def _scores_at(scores: FrameScores | None, frame: int, prefix: str) -> dict[str, float]:
    if scores is None:
        return {}
    return {f"{prefix}psnr": round(scores.psnr[frame], 4), f"{prefix}ssim": round(scores.ssim[frame], 6)}


def _csv(rows: Iterable[dict[str, Any]], heading: bool) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n")
    if heading:
        writer.writeheader()
    writer.writerows(
        {name: _plain(value) if isinstance(value, str) else value for name, value in row.items()} for row in rows
    )
    return text.getvalue()
