"""Two runs side by side: figures, curves, what differs in their configs, and a swipe between their candidates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from harness.files.writing import write_text
from harness.report.journal import load_run
from harness.report.page.charts import Series, line_chart
from harness.report.page.drawing import Section, attempt, draw_page
from harness.report.page.figures import (
    ABSENT,
    EMULATED,
    curve_of,
    drop_of,
    emulated,
    fidelity_of,
    flatten,
    held_bytes,
    last_arm,
    means_of,
    number,
    over_all,
    shown,
    size,
    speed_ratio,
    tags_of,
    times,
    verdict,
)
from harness.report.page.players import embedded_bytes, panels, source, stage, video_path
from harness.report.page.run_page import EMBED_LIMIT, METRICS
from harness.report.record import RunRecord
from harness.report.sections import ClipRecord

PAGE = "comparison.html"
STYLES = ("s-bf16", "s-cand")
"""CSS class of each run's lines."""
ALIKE: dict[str, Callable[[RunRecord], str | None]] = {
    "environment.gpu.name": lambda record: record.environment.gpu.name if record.environment.gpu else None,
    "environment.cpu": lambda record: record.environment.cpu,
    "environment.packages.torch": lambda record: record.environment.packages.get("torch"),
    "model.weights": lambda record: record.model.weights,
    "data.summary": lambda record: record.data.summary,
}
"""Where two runs differ in these, their figures are no fair comparison."""

BOOKKEEPING = ("logger.save_dir", "stability.incident_log", "resume", "overwrite")
"""Fields that say where a run kept its files, and nothing about what it computed."""

Run = tuple[RunRecord, Path]


def write_compare_page(first: Path, second: Path) -> Path:
    """Write ``comparison.html`` into ``second``, from the records of both folders.

    Raises:
        RecordError: if a folder has no readable record.
        OSError: if the page cannot be written.
    """
    page = second / PAGE
    runs = [(load_run(folder), folder) for folder in (first, second)]
    write_text(page, compare_page(runs[0], runs[1], second))
    return page


def compare_page(first: Run, second: Run, folder: Path, embed_limit: int = EMBED_LIMIT) -> str:
    """The page of two runs, each a record and the folder its videos lie in; the page itself lies in ``folder``."""
    runs = [
        {"name": _name(record), "id": record.run_id, "folder": str(where), "style": style}
        for (record, where), style in zip((first, second), STYLES, strict=True)
    ]

    def verdicts() -> dict[str, Any]:
        found = (verdict(*run) for run in (first, second))
        return {"runs": [run | {"verdict": one} for run, one in zip(runs, found, strict=True)]}

    one, other = first[0], second[0]
    sections = [
        Section("verdicts", "Verdicts", verdicts),
        Section("doubts", "Not alike in both runs", lambda: {"doubts": _doubts(one, other)}),
        Section(
            "figures",
            "Figures",
            lambda: {"runs": runs, "figures": _figures(one, other), "emulated": _emulated(one, other)},
        ),
        Section("videos", "Side by side", lambda: {"videos": _videos(first, second, folder, embed_limit)}),
        Section("quality", "Quality over the rollout", lambda: {"curves": _curves(one, other)}),
        Section("setup", "Configs", lambda: {"runs": runs, "differences": _differences(one, other)}),
    ]
    title = f"{runs[0]['name']} against {runs[1]['name']}"
    return draw_page("compare.html.j2", title, Section("header", title, lambda: {"runs": runs}), sections)


def _name(record: RunRecord) -> str:
    return record.arms[last_arm(record)].label if record.arms else "no arm"


def _doubts(first: RunRecord, second: RunRecord) -> list[str]:
    found = []
    for path, read in ALIKE.items():
        one, other = read(first), read(second)
        if one != other:
            found.append(f"{path}: {shown(one)} against {shown(other)}.")
    ids = [{clip.clip_id for clip in record.clips} for record in (first, second)]
    if ids[0] != ids[1]:
        found.append(f"Clips: {len(ids[0] & ids[1])} in both runs, of {len(ids[0])} and {len(ids[1])}.")
    return found


def _figures(first: RunRecord, second: RunRecord) -> list[dict[str, str]]:
    """Rows of name, both runs' figures and the change from the first to the second."""
    one, other = _Figures.of(first), _Figures.of(second)
    marks = tuple(" *" if emulated(record) else "" for record in (first, second))
    rows = [
        _row("PSNR drop, dB", one.drop, other.drop, 3),
        _row("SSIM drop", one.ssim_drop, other.ssim_drop, 4),
        _row("Fidelity, dB", one.fidelity, other.fidelity, 2),
        _row("PSNR against the recording, dB", one.psnr, other.psnr, 2),
        _row("SSIM against the recording", one.ssim, other.ssim, 4),
        _row("Frames/s over BF16's, DiT", one.ratio, other.ratio, 2),
        _marked(_row("DiT, ms a frame, median", one.dit_ms, other.dit_ms, 2), marks),
        _marked(_row("Total, ms a frame, median", one.total_ms, other.total_ms, 2), marks),
        _row("Weights", one.weights, other.weights, None),
        _row("KV window", one.window, other.window, None),
        _row("Weights and KV window, at its peak", one.held, other.held, None),
    ]
    return [row for row in rows if row is not None]


@dataclass
class _Figures:
    """What is compared of a run: its last arm's figures; ``None`` where something was not measured."""

    drop: float | None
    ssim_drop: float | None
    fidelity: float | None
    psnr: float | None
    ssim: float | None
    ratio: float | None
    dit_ms: float | None
    total_ms: float | None
    weights: int | None
    window: int | None
    held: int | None

    @classmethod
    def of(cls, record: RunRecord) -> _Figures:
        arm, every = record.arms.get(last_arm(record)), over_all(record)
        scores = means_of(every, last_arm(record))
        dit, total = (arm.speed.dit_ms, arm.speed.total_ms) if arm else (None, None)
        return cls(
            drop=drop_of(record),
            ssim_drop=every.drop.ssim if every.drop else None,
            fidelity=fidelity_of(record),
            psnr=scores.psnr if scores else None,
            ssim=scores.ssim if scores else None,
            ratio=None if emulated(record) else speed_ratio(record),
            dit_ms=dit.median if dit else None,
            total_ms=total.median if total else None,
            weights=arm.memory.weight_bytes if arm else None,
            window=arm.memory.kv_window_bytes if arm else None,
            held=held_bytes(arm),
        )


def _row(name: str, one: float | None, other: float | None, digits: int | None) -> dict[str, str] | None:
    """A figure in both runs, bytes where it has no ``digits``; ``None`` where neither has it."""
    if one is None and other is None:
        return None
    if digits is None:
        change = times(other / one) if one and other is not None else ""
        return {"name": name, "first": size(one), "second": size(other), "change": change}
    change = number(other - one, digits, sign=True) if one is not None and other is not None else ""
    return {"name": name, "first": number(one, digits), "second": number(other, digits), "change": change}


def _marked(row: dict[str, str] | None, marks: tuple[str, ...]) -> dict[str, str] | None:
    """A row of times, those of emulated kernels marked; where one is, the difference says nothing and is left out."""
    if row is None or not any(marks):
        return row
    first, second = (f"{row[name]}{mark}" for name, mark in zip(("first", "second"), marks, strict=True))
    return row | {"first": first, "second": second, "change": ABSENT}


def _emulated(*records: RunRecord) -> str:
    return EMULATED if any(map(emulated, records)) else ""


def _curves(first: RunRecord, second: RunRecord) -> list[dict[str, Any]]:
    """Per tag both runs' curves in one chart: against the recording, and fidelity."""
    blocks = []
    for tag in dict.fromkeys([*tags_of(first), *tags_of(second)]):
        charts = []
        for fidelity, title in ((False, "against the recording"), (True, "of candidate against BF16")):
            for metric, name, unit in METRICS:
                lines = [
                    Series(f"{_name(record)} ({letter})", curve, style)
                    for record, letter, style in zip((first, second), "AB", STYLES, strict=True)
                    if tag in tags_of(record)
                    and (curve := curve_of(tags_of(record)[tag], "fidelity" if fidelity else last_arm(record), metric))
                ]
                if lines:
                    charts.append(attempt(f"{name} {title}", partial(line_chart, f"{name} {title}", lines, unit)))
        if charts:
            blocks.append({"tag": tag.replace("_", " ").capitalize(), "charts": charts})
    return blocks


def _videos(first: Run, second: Run, folder: Path, embed_limit: int) -> dict[str, Any]:
    """Players of the clips that both runs have a video of: all panels of both."""
    theirs = {clip.clip_id: clip for clip in second[0].clips}
    found = []
    for clip in first[0].clips:
        other = theirs.get(clip.clip_id)
        if other is None or not clip.video or not other.video:
            continue
        pair = [video_path(*run, one) for run, one in ((first, clip), (second, other))]
        if None not in pair:
            found.append((clip, other, [path for path in pair if path is not None]))
    total = sum(embedded_bytes(path) for *_, pair in found for path in pair)
    players = [
        {
            "id": clip.clip_id,
            "tag": clip.tag,
            "drop": None,
            "fidelity": None,
            "panels": _both(first[0], clip, second[0], other),
            "sources": [source(path, folder, total <= embed_limit) for path in pair],
        }
        for clip, other, pair in found
    ]
    frames = min(record.data.future_frames or 0 for record, _ in (first, second))
    return stage(players, frames, total, total <= embed_limit)


def _both(first: RunRecord, clip: ClipRecord, second: RunRecord, other: ClipRecord) -> list[dict[str, Any]]:
    """Panels of both videos, the runs' last ones at the end: those the swipe starts with."""
    groups = [
        [panel | {"label": f"{panel['label']} ({letter})"} for panel in panels(record, one, video)]
        for record, one, video, letter in ((first, clip, 0, "A"), (second, other, 1, "B"))
    ]
    return [*groups[0][:-1], *groups[1][:-1], groups[0][-1], groups[1][-1]]


def _differences(first: RunRecord, second: RunRecord) -> list[tuple[str, str, str]]:
    """Fields of the configs that differ."""
    one, other = flatten(first.config), flatten(second.config)
    return [
        (str(key), shown(one.get(key)), shown(other.get(key)))
        for key in dict.fromkeys([*one, *other])
        if one.get(key) != other.get(key) and not str(key).startswith(BOOKKEEPING)
    ]
