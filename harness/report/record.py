"""The run record: one JSON file that holds everything a report, a gate or a comparison needs.

``SCHEMA_VERSION`` changes when a field is renamed, removed or changes meaning; adding a field does not
change it. Times are milliseconds, sizes bytes, PSNR dB; what was not measured is ``null``.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SCHEMA_VERSION = 1


class RecordError(ValueError):
    """A file that is no run record, or one of a schema this version cannot read."""


@dataclass
class ArmRecord:
    """One arm (``bf16`` or ``candidate``).

    Attributes:
        label: what a person calls it, such as ``mxfp8_all + mx_v_only``. numeric_path: weight, activation
        and KV formats, scale mode, kernel and architecture that really ran. speed_is_meaningful: false where
        a kernel is emulated: its times say nothing about the format. transform: which Linears were replaced;
        ``None`` where none were meant to be. speed: per-frame ``Stats`` of ``dit_ms``, ``decoder_ms`` and
        ``total_ms``, ``prefill_ms``, the two FPS. parts: ``Stats`` per part from the instrumented eager
        pass; ``None`` if it was not asked for. memory: bytes of weights and KV window, allocator figures.
        compile: set-up times and counters of compilation. kv_stats: what the KV cache stored, frame by frame, as
        :meth:`harness.kv.KVStats.report` gives it. numerics: error of each MX Linear on sampled inputs, as
        :func:`harness.ab.numerics.layer_numerics` gives it.
    """

    label: str
    numeric_path: dict[str, Any]
    speed_is_meaningful: bool
    transform: dict[str, Any] | None
    speed: dict[str, Any]
    parts: dict[str, Any] | None
    memory: dict[str, Any]
    compile: dict[str, Any]
    kv_stats: dict[str, Any] | None = None
    numerics: dict[str, Any] | None = None


@dataclass
class RunRecord:
    """Everything about one run. ``arms`` has ``bf16`` and, unless the candidate is the baseline,
    ``candidate``.

    ``status`` is ``complete``, or ``failed`` where clips were finished before an error that ``incidents``
    names, or ``running``: saved after a batch by a run that goes on, or was killed.
    ``gates``: what :func:`harness.report.gates.evaluate` found; ``None`` where nothing was judged.
    ``drift``: see :func:`harness.report.drift.summarise_drift`. ``fallbacks``: formats the candidate was rebuilt in
    after an instability, in order; a clip's ``fallback`` names the step in force when it was rolled.
    """

    run_id: str
    started: str
    seconds: float
    status: str
    command: list[str]
    overrides: list[str]
    choices: dict[str, str]
    config: dict[str, Any]
    environment: dict[str, Any]
    model: dict[str, Any]
    data: dict[str, Any]
    arms: dict[str, ArmRecord]
    quality: dict[str, Any] | None
    clips: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)
    incidents: list[dict[str, Any]] = field(default_factory=list)
    gates: dict[str, Any] | None = None
    drift: dict[str, Any] | None = None
    fallbacks: list[dict[str, Any]] = field(default_factory=list)
    schema_version: int = SCHEMA_VERSION

    @property
    def candidate(self) -> ArmRecord | None:
        """The candidate arm; ``None`` where the run measured the baseline alone."""
        return self.arms.get("candidate")


def write_atomically(path: Path, text: str) -> None:
    """Write ``text`` so that ``path`` holds either all of it or what it held before.

    Raises:
        OSError: naming ``path``, if the folder cannot be written or the disk is full; nothing half-written is left
            behind.
    """
    try:
        _write_atomically(path, text)
    except OSError as error:
        raise OSError(error.errno, f"cannot write: {error.strerror}", str(path)) from error


def _write_atomically(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def save_record(record: RunRecord, path: Path) -> None:
    """Write ``record`` as JSON, atomically.

    Raises:
        ValueError: if it holds NaN or Inf, which JSON has no words for.
        OSError: see :func:`write_atomically`.
    """
    write_atomically(path, json.dumps(asdict(record), indent=1, allow_nan=False) + "\n")


def load_record(path: Path) -> RunRecord:
    """Read a record back.

    Raises:
        RecordError: if the file is missing, not a run record, or of another schema version.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecordError(f"{path}: not a readable run record: {error}") from error
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version != SCHEMA_VERSION:
        raise RecordError(f"{path}: schema_version {version!r}; this version reads {SCHEMA_VERSION}")
    try:
        arms = {name: ArmRecord(**arm) for name, arm in content.pop("arms").items()}
        return RunRecord(arms=arms, **content)
    except (TypeError, KeyError, AttributeError) as error:
        raise RecordError(f"{path}: not a run record: {error}") from error
