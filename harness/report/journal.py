"""The journal of a run: a line for every batch, as soon as it is finished.

It makes a run that is killed lose nothing: the record is rewritten now and then, the journal only ever grows. Each
process of a run keeps one; from them the first process puts the record together, a reader completes the record of a run
that was killed, and ``resume=true`` goes on. A finished run has none: all of it is in its record.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from harness.files.text import check_file
from harness.files.writing import append
from harness.report.codec import CodecError, decode, encode, read
from harness.report.drift import DriftConf, summarise_drift
from harness.report.files import JOURNAL, RECORD, FileRecord
from harness.report.quality import summarise_quality
from harness.report.record import LARGEST, RUNNING, RunRecord, load_record
from harness.report.sections import BatchTimes, ClipRecord, Data, FallbackRecord, IncidentRecord


@dataclass
class ArmFigures:
    """What one arm counted during a batch; ``kv_figures`` as :class:`harness.kv.stats.KVSamples` has them."""

    recompiles: int = 0
    graph_breaks: int = 0
    kv_frames: list[int] = field(default_factory=list)
    kv_figures: list[list[list[float]]] = field(default_factory=list)


@dataclass
class FinishedBatch:
    """A batch that was rolled out.

    ``done``: its clips, those that could not be scored too. ``incidents`` and ``fallbacks``: what it added. ``files``:
    by path, relative to the run's folder.
    """

    done: list[str]
    clips: list[ClipRecord]
    times: BatchTimes
    arms: dict[str, ArmFigures] = field(default_factory=dict)
    incidents: list[IncidentRecord] = field(default_factory=list)
    fallbacks: list[FallbackRecord] = field(default_factory=list)
    files: dict[str, FileRecord] = field(default_factory=dict)


@dataclass
class Head:
    """What a run must have in common with one that goes on after it: its config, its clips and what computes them."""

    config: dict[str, Any]
    clips: list[str]
    machine: dict[str, Any]


@dataclass
class End:
    """How a process ended: ``complete``, or ``failed`` with its error."""

    status: str
    error: str | None = None
    incidents: list[IncidentRecord] = field(default_factory=list)


@dataclass
class Line:
    """One of the three."""

    head: Head | None = None
    batch: FinishedBatch | None = None
    end: End | None = None


class Journal:
    """Writes and reads one process's journal.

    Args:
        folder: of the run.
        rank: of the process.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self.path = folder / JOURNAL / f"{rank}.jsonl"
        self._read_to = 0

    def append(self, line: Line) -> None:
        """Add a line, whole or not at all.

        Raises:
            OSError: naming the file, if it cannot be written or the disk is full.
        """
        append(self.path, encode(line).encode() + b"\n")

    def new_lines(self) -> list[Line]:
        """Lines that are complete and were not read before; none if there is no file.

        Raises:
            ValueError: naming the file and the line, if one is no line of a journal.
        """
        try:
            if not self.path.exists():
                return []
            check_file(self.path, "a run's journal", LARGEST)
            with self.path.open("rb") as file:
                file.seek(self._read_to)
                text = file.read()
        except FileNotFoundError:
            return []
        whole = text[: text.rfind(b"\n") + 1]  # a process that was killed may leave half a line
        self._read_to += len(whole)
        return [self._line(raw) for raw in whole.splitlines()]

    def _line(self, raw: bytes) -> Line:
        try:
            return read(Line, decode(raw.decode()))
        except (CodecError, UnicodeDecodeError) as error:
            raise ValueError(f"{self.path}: not a run's journal: {error}") from error


def read_journals(folder: Path) -> tuple[Head | None, list[FinishedBatch]]:
    """Of the run in ``folder``: its head, and the batches of all its processes in the order of its clips.

    Raises:
        ValueError: naming the file, if one is no journal.
    """
    ranks = sorted(int(path.stem) for path in (folder / JOURNAL).glob("*.jsonl") if path.stem.isdecimal())
    lines = [line for rank in ranks for line in Journal(folder, rank).new_lines()]
    head = next((line.head for line in lines if line.head is not None), None)
    batches = {batch.done[0]: batch for line in lines if (batch := line.batch) is not None}  # of several the last
    return head, in_order(list(batches.values()), [] if head is None else head.clips)


def in_order(batches: Sequence[FinishedBatch], clips: Sequence[str]) -> list[FinishedBatch]:
    """``batches`` in the order of ``clips``."""
    position = {clip: index for index, clip in enumerate(clips)}
    return sorted(batches, key=lambda batch: position.get(batch.done[0], len(position)))


def remove_journals(folder: Path) -> None:
    """Remove them, once all of them is in the record."""
    for path in (folder / JOURNAL).glob("*.jsonl"):
        path.unlink()
    if (folder / JOURNAL).is_dir():
        (folder / JOURNAL).rmdir()


def clips_summary(data: Data, done: int) -> str:
    """``data`` in a sentence."""
    return (
        f"{done} of {len(data.clips)} clips, {data.context_frames} context + {data.future_frames} generated frames, "
        f"reference: {data.reference}"
    )


def load_run(folder: Path) -> RunRecord:
    """The record of the run in ``folder``; of one that lasts or was killed, with the clips only its journal has.

    Raises:
        RecordError: see :func:`harness.report.record.load_record`.
        ValueError: if the journal is damaged.
    """
    record = load_record(folder / RECORD)
    if record.status != RUNNING:
        return record
    _, batches = read_journals(folder)
    if len(batches) <= len(record.timings):
        return record
    clips = [clip for batch in batches for clip in batch.clips]
    conf = DriftConf(**record.config.get("drift", {}))
    return replace(
        record,
        clips=clips,
        timings=[batch.times for batch in batches],
        files=dict(_files(batches)),
        incidents=[incident for batch in batches for incident in batch.incidents],
        fallbacks=[fallback for batch in batches for fallback in batch.fallbacks],
        quality=summarise_quality(clips),
        drift=summarise_drift(clips, conf),
        data=replace(record.data, summary=clips_summary(record.data, len(clips))),
    )


def _files(batches: Sequence[FinishedBatch]) -> Iterator[tuple[str, FileRecord]]:
    for batch in batches:
        yield from batch.files.items()
