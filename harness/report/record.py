"""The run record: one JSON file that holds everything a report, a gate or a comparison needs.

``SCHEMA_VERSION`` changes when a field is renamed, removed or changes meaning; adding a field does not
change it. Times are milliseconds, sizes bytes, PSNR dB; what was not measured is ``null``. Its sections are the types
of :mod:`harness.report.sections`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.files.text import FileError, read_text
from harness.files.writing import write_text
from harness.report.codec import CodecError, decode, encode, read
from harness.report.files import FileRecord
from harness.report.sections import (
    ArmRecord,
    BatchTimes,
    ClipRecord,
    Data,
    Drift,
    Environment,
    FallbackRecord,
    IncidentRecord,
    Model,
    Quality,
)
from harness.report.verdict import Verdict

SCHEMA_VERSION = 1
COMPLETE, FAILED, INTERRUPTED, RUNNING = "complete", "failed", "interrupted", "running"
"""What a record's ``status`` may be."""


LARGEST = 1 << 27
"""Bytes of a record that is read at all: eight thousand clips of 64 frames stay below."""


class RecordError(ValueError):
    """A file that is no run record, or one of a schema this version cannot read."""


@dataclass
class RunRecord:
    """Everything about one run.

    ``arms`` has ``bf16`` and, unless the candidate is the baseline, ``candidate``. ``status`` is ``complete``;
    ``failed`` where clips were finished before an error that ``incidents`` names; ``interrupted`` where a signal ended
    it; or ``running``: saved by a run that goes on, or was killed.
    ``gates``: what :func:`harness.report.gates.evaluate` found; ``None`` where nothing was judged. ``fallbacks``:
    formats the candidate was rebuilt in after an instability, in order; a clip's ``fallback`` names the step in force
    when it was rolled. ``timings``: every frame's times, batch after batch. ``files``: the run's videos and
    ``frames.csv``, by path relative to its folder.
    """

    run_id: str
    started: str
    seconds: float
    status: str
    command: list[str]
    overrides: list[str]
    choices: dict[str, str]
    config: dict[str, Any]
    environment: Environment
    model: Model
    data: Data
    arms: dict[str, ArmRecord]
    quality: Quality | None
    clips: list[ClipRecord]
    incidents: list[IncidentRecord]
    notes: list[str] = field(default_factory=list)
    gates: Verdict | None = None
    drift: Drift | None = None
    fallbacks: list[FallbackRecord] = field(default_factory=list)
    timings: list[BatchTimes] = field(default_factory=list)
    files: dict[str, FileRecord] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    @property
    def first(self) -> ArmRecord:
        """The BF16 arm; the only arm where an exported checkpoint was rolled out alone."""
        return self.arms["bf16"] if "bf16" in self.arms else next(iter(self.arms.values()))

    @property
    def candidate(self) -> ArmRecord | None:
        """The candidate arm; ``None`` where the run measured the baseline alone."""
        return self.arms.get("candidate")


def save_record(record: RunRecord, path: Path) -> None:
    """Write ``record`` as strict JSON, atomically; see :mod:`harness.report.codec` for floats that JSON cannot hold.

    Raises:
        OSError: naming ``path``, if it cannot be written; it then holds what it held before.
    """
    write_text(path, encode(record, indent=1) + "\n")


def load_record(path: Path) -> RunRecord:
    """Read a record back, every value of the type its field has.

    Raises:
        RecordError: naming the file and the first thing wrong: missing, too large, no run record, another schema
            version, a field that is missing, unknown or of another type.
    """
    try:
        content = decode(read_text(path, "a run's record.json", LARGEST))
    except FileError as error:
        raise RecordError(str(error)) from error
    except CodecError as error:
        raise RecordError(f"{path}: not a readable run record: {error}") from error
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version != SCHEMA_VERSION:
        raise RecordError(f"{path}: schema_version {version!r:.40}; this version reads {SCHEMA_VERSION}")
    try:
        return read(RunRecord, content)
    except CodecError as error:
        raise RecordError(f"{path}: not a run record: {error}") from error
