"""A sweep's page: its runs side by side, and which of them give most quality for their speed and memory.

``conf/run.yaml`` hooks :class:`SweepPage` into Hydra, so a multirun ends with its page whatever its launcher, and
however it ends.
"""

from __future__ import annotations

import atexit
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import CompactHydraException
from hydra.experimental.callback import Callback
from markupsafe import Markup
from omegaconf import DictConfig, OmegaConf

from harness.files.text import FileError, check_yaml
from harness.files.writing import write_text
from harness.report.files import CONFIG, ERROR, PAGE, RECORD, is_running
from harness.report.journal import load_run
from harness.report.page.charts import Point, pareto, scatter
from harness.report.page.drawing import Section, attempt, draw_page, each
from harness.report.page.figures import (
    ABSENT,
    EMULATED,
    drop_of,
    emulated,
    fidelity_of,
    held_bytes,
    last_arm,
    means_of,
    number,
    over_all,
    ratio,
    size,
    speed_ratio,
    times,
    verdict,
)
from harness.report.page.run_page import write_run_page
from harness.report.page.sweep_verdict import Judged, sweep_verdict
from harness.report.record import COMPLETE, RUNNING, RunRecord
from harness.streams import complain

REJECTED = "rejected: "
"""Begins what ended a job that never ran: its command, config or files were wrong."""


class SweepError(ValueError):
    """A folder that holds no runs."""


COLUMNS = (
    "PSNR dB",
    "drop dB",
    "fidelity dB",
    "speed",
    "total fps",
    "held",
    "weights",
    "KV window",
    "peak allocated",
)
"""Figures of the table; those that no run has are left out."""


@dataclass(frozen=True)
class Run:
    """One run of a sweep.

    ``record`` is ``None`` where the run left none; ``reason`` says why a run failed, empty if it did not.
    ``overrides`` are those that not all runs of the sweep share.
    """

    folder: Path
    overrides: list[str]
    record: RunRecord | None
    reason: str

    @property
    def name(self) -> str:
        """What a person calls it: the candidate, or the folder."""
        arm = self.record.arms.get(last_arm(self.record)) if self.record else None
        return arm.label if arm else self.folder.name

    @property
    def page(self) -> str | None:
        """Link to the run's own page, relative to the sweep's."""
        return f"{quote(self.folder.name)}/{PAGE}" if (self.folder / PAGE).is_file() else None


def read_sweep(folder: Path) -> list[Run]:
    """The runs in ``folder``, in the order of their job numbers.

    Raises:
        SweepError: if there is none.
    """
    runs = [path for path in folder.iterdir() if _is_run(path)] if folder.is_dir() else []
    if not runs:
        raise SweepError(f"{folder}: no runs here; give the folder of a multirun, such as outputs/multirun/<date>")
    found = [(path, _overrides(path), *_outcome(path)) for path in sorted(runs, key=_job_number)]
    shared = set.intersection(*(set(overrides) for _, overrides, _, _ in found)) if len(found) > 1 else set()
    return [
        Run(path, [override for override in overrides if override not in shared], record, reason)
        for path, overrides, record, reason in found
    ]


def _is_run(path: Path) -> bool:
    return any((path / name).exists() for name in (RECORD, CONFIG, ERROR))


def _job_number(path: Path) -> tuple[int, str]:
    first = path.name.split("_")[0]
    return (int(first) if first.isdecimal() else 1 << 30), path.name


def _overrides(path: Path) -> list[str]:
    file = path / CONFIG / "overrides.yaml"
    try:
        check_yaml(file, "what was typed")
        words = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (FileError, OSError, yaml.YAMLError, ValueError):
        return []  # it is for the caption alone
    return [str(word) for word in words] if isinstance(words, list) else []


def _outcome(path: Path) -> tuple[RunRecord | None, str]:
    """A run's record, if it left one, and why it failed, if it did."""
    error_file = path / ERROR
    error = error_file.read_text(encoding="utf-8").strip() if error_file.is_file() else ""
    running = is_running(path)
    if not (path / RECORD).is_file():
        return None, error or ("still runs" if running else "was killed before its first clip was finished")
    try:
        record = load_run(path)
    except ValueError as unreadable:
        return None, str(unreadable)
    if record.status == COMPLETE:
        return record, error
    if record.status == RUNNING:
        found = "still runs" if running else "was killed"
        return record, error or f"{found}: these are the clips finished until then"
    incidents = "; ".join(incident.message for incident in record.incidents)
    return record, error or incidents or record.status


def write_sweep_page(folder: Path, rebuild_runs: bool = False) -> Path:
    """Write ``report.html`` of the sweep in ``folder``; with ``rebuild_runs`` that of each of its runs first.

    Returns:
        The page.

    Raises:
        SweepError: if the folder holds no runs.
        OSError: if a page cannot be written.
    """
    runs = read_sweep(folder)
    if rebuild_runs:
        for run in runs:
            if run.record is not None:
                write_run_page(run.folder)
    page = folder / PAGE
    write_text(page, sweep_page(folder.resolve().name, runs))
    return page


def sweep_page(name: str, runs: Sequence[Run]) -> str:
    """The page that compares ``runs``."""
    failed: dict[str, list[Run]] = {}
    for run in runs:
        if run.reason:
            failed.setdefault(run.reason, []).append(run)
    failures = sum(map(len, failed.values()))
    header = Section("header", f"Sweep {name}", lambda: {"name": name, "count": len(runs), "failures": failures})
    sections = [
        Section("verdict", "Verdict", lambda: {"verdict": sweep_verdict(_judged(runs), len(runs))}),
        Section("pareto", "What quality costs", lambda: {"plots": _all_plots(runs), "emulated": _emulated(runs)}),
        Section("failed", "Failed", lambda: {"failed": failed}),
        Section("runs", "Runs", lambda: _table(runs)),
    ]
    return draw_page("sweep.html.j2", f"Sweep {name}", header, sections)


def _judged(runs: Sequence[Run]) -> list[Judged]:
    return [(run.name, run.page, run.record, run.record.gates) for run in runs if run.record and run.record.gates]


def _emulated(runs: Sequence[Run]) -> str:
    return EMULATED if any(run.record and emulated(run.record) for run in runs) else ""


def _all_plots(runs: Sequence[Run]) -> list[Markup]:
    compared = [run for run in runs if run.record is not None and run.record.quality]
    return [plot for name, group in _alike(compared).items() for plot in _plots(group, name)]


def _table(runs: Sequence[Run]) -> dict[str, Any]:
    rows, unread = each(runs, lambda run: run.folder.name, _row)
    used = [number for number in range(len(COLUMNS)) if any(row["cells"][number]["sort"] for row in rows)]
    return {
        "columns": [COLUMNS[number] for number in used],
        "rows": [{**row, "cells": [row["cells"][number] for number in used]} for row in rows],
        "unread": unread,
        "notes": list(dict.fromkeys(note for run in runs if run.record for note in run.record.notes)),
        "emulated": _emulated(runs),
        "judged": bool(_judged(runs)),
    }


def _cell(value: float | None, text: str) -> dict[str, str]:
    """Text for the reader and the number to sort by."""
    return {"text": text, "sort": "" if value is None else repr(value)}


def _row(run: Run) -> dict[str, Any]:
    record = run.record
    return {
        "name": run.name,
        "page": run.page,
        "overrides": run.overrides,
        "status": record.status if record and not run.reason else "failed",
        "verdict": verdict(record) if record and record.gates else None,
        "cells": _cells(record) if record and record.arms else [_cell(None, ABSENT) for _ in COLUMNS],
    }


def _cells(record: RunRecord) -> list[dict[str, str]]:
    """The figures of :data:`COLUMNS`."""
    arm, scores = record.arms[last_arm(record)], means_of(over_all(record), last_arm(record))
    psnr = scores.psnr if scores else None
    drop, fidelity, fps = drop_of(record), fidelity_of(record), arm.speed.total_fps
    held, speed = _held_ratio(record), speed_ratio(record)
    mark = " *" if emulated(record) else ""
    return [
        _cell(psnr, number(psnr)),
        _cell(drop, number(drop, 3, sign=True)),
        _cell(fidelity, number(fidelity)),
        _cell(speed, times(speed) + (mark if speed is not None else "")),
        _cell(fps, number(fps, 2) + (mark if fps is not None else "")),
        _cell(held, times(held)),
        _cell(arm.memory.weight_bytes, size(arm.memory.weight_bytes)),
        _cell(arm.memory.kv_window_bytes, size(arm.memory.kv_window_bytes)),
        _cell(arm.memory.peak_allocated, size(arm.memory.peak_allocated)),
    ]


def _held_ratio(record: RunRecord) -> float | None:
    return ratio(held_bytes(record.candidate), held_bytes(record.arms.get("bf16")))


def _compared(runs: Sequence[Run]) -> list[tuple[Run, RunRecord]]:
    """Those runs that left a record."""
    return [(run, run.record) for run in runs if run.record is not None]


def _alike(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs that may stand on one front, those of the same model over the same clips, by what tells them apart.

    The name is empty where all are alike.
    """
    groups: dict[str, list[Run]] = {}
    for run, record in _compared(runs):
        model = [record.model.checkpoint, record.model.arch, record.model.decoder_checkpoint]
        clips = sorted(clip.clip_id for clip in record.clips)
        frames = [record.data.context_frames, record.data.future_frames]
        groups.setdefault(json.dumps([model, clips, frames], sort_keys=True, default=str), []).append(run)
    if len(groups) == 1:
        return {"": list(runs)}
    named: dict[str, list[Run]] = {}
    for group in groups.values():
        record = _compared(group)[0][1]
        what = f"{len(record.clips)} clips × {record.data.future_frames} frames"
        name = f"{record.choices.get('model', 'model')}, {what}"
        named[name if name not in named else f"{name} ({len(named) + 1})"] = group
    return named


def _plots(runs: Sequence[Run], name: str = "") -> list[Markup]:
    """Quality, as drop and as fidelity, against speed and against memory; BF16 itself is the point (1, 0).

    ``name``: of the runs, where a sweep holds several that do not compare.
    """
    plots = []
    for quality, better, y_label in (("drop", -1, "PSNR drop, dB"), ("fidelity", 1, "fidelity, dB")):
        for cost, sense, x_label in (
            ("speed", 1, "DiT frames/s, × BF16 (right: faster)"),
            ("held", -1, "weights + KV held, × BF16 (left: less)"),
        ):
            points = _points(runs, quality, better, cost, sense)
            if points:
                title = f"{'PSNR drop' if quality == 'drop' else 'Fidelity to BF16'} against "
                title += ("speed" if cost == "speed" else "memory") + (f": {name}" if name else "")
                plots.append(attempt(title, partial(scatter, title, points, x_label, y_label, quality == "drop")))
    return plots


def _labels(runs: Sequence[Run]) -> dict[Path, str]:
    """A run's name; where several share it, with what they differ in: ``mxfp8_all, floor`` or ``mxfp8_all, bits=4``."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.name, []).append(run)
    labels = {}
    for name, group in groups.items():
        common = set.intersection(*(set(run.overrides) for run in group))
        for run in group:
            own = [_short(override) for override in run.overrides if len(group) > 1 and override not in common]
            labels[run.folder] = ", ".join([name, *own])
    return labels


def _short(override: str) -> str:
    """``floor`` for ``quant.scale_mode=floor``; a number or a switch keeps its field's name: ``bits=4``."""
    field, _, value = override.partition("=")
    says_enough = re.fullmatch(r"[a-z]\w*", value) and value not in ("true", "false", "null")
    return value if says_enough else f"{field.rpartition('.')[2]}={value}"


def _points(runs: Sequence[Run], quality: str, better: int, cost: str, sense: int) -> list[Point]:
    """Points of one plot. An emulated kernel's speed is no speed, so it competes in no front over speed."""
    found: list[tuple[Run, float, float, bool]] = []
    for run, record in _compared(runs):
        y = drop_of(record) if quality == "drop" else fidelity_of(record)
        x = speed_ratio(record) if cost == "speed" else _held_ratio(record)
        if x is not None and y is not None and math.isfinite(x) and math.isfinite(y):
            found.append((run, x, y, cost == "held" or not emulated(record)))
    competing = [(sense * x, better * y) for _, x, y, competes in found if competes]
    fronts = iter(pareto([*competing, (sense * 1.0, 0.0)] if quality == "drop" else competing))
    labels = _labels(runs)
    points = [
        Point(
            labels[run.folder],
            x,
            y,
            "s-cand" if competes else "s-cand hollow",
            _details(run.record) if run.record else [],
            run.page,
            next(fronts) if competes else False,
        )
        for run, x, y, competes in found
    ]
    if points and quality == "drop":
        points.append(Point("BF16", 1.0, 0.0, "s-bf16", ["the baseline, by definition"], None, next(fronts)))
    return points


def _details(record: RunRecord) -> list[str]:
    speed = f"speed {times(speed_ratio(record))}" + (f" ({EMULATED})" if emulated(record) else "")
    return [
        f"drop {number(drop_of(record), 3, sign=True)} dB, fidelity {number(fidelity_of(record))} dB",
        speed,
        f"held {times(_held_ratio(record))}: {size(held_bytes(record.candidate))}",
        *([f"verdict: {record.gates.verdict}"] if record.gates else []),
    ]


class SweepPage(Callback):
    """Hydra's hook: notes why jobs fail, and writes the sweep's page when the sweep is over.

    Hydra calls ``on_multirun_end`` only where every job succeeded, hence the exit handler; ``on_job_end`` runs where
    the job ran, be that another process or machine.
    """

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Make sure of a page even if a job's error or Ctrl-C ends the sweep."""
        self._folder = Path(config.hydra.sweep.dir).resolve()
        atexit.register(self._write)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        """Keep the reason of a failure, which otherwise only the terminal saw."""
        if job_return.status is JobStatus.FAILED:
            error = job_return._return_value  # the property would raise it
            # What the user can put right says all there is to say; of anything else the type may be the best clue.
            kind = "" if isinstance(error, CompactHydraException) else f"{type(error).__name__}: "
            folder = Path(config.hydra.runtime.output_dir)
            rejected = REJECTED if isinstance(error.__cause__, ValueError) and not (folder / RECORD).exists() else ""
            write_text(folder / ERROR, f"{rejected}{kind}{str(error).removeprefix('error: ')}\n")
            overrides = OmegaConf.to_yaml(config.hydra.overrides.task)
            write_text(folder / CONFIG / "overrides.yaml", overrides)

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Write the page."""
        atexit.unregister(self._write)
        self._write()

    def _write(self) -> None:
        try:
            page = write_sweep_page(self._folder)
        except SweepError:
            return  # not one job began: whatever ended the sweep has been said
        except OSError as error:
            complain(error)  # at exit nobody is left to raise it to
            return
        print(f"Comparison of the sweep: {page}")
