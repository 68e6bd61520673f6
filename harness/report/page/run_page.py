"""A run's page, from its record (and its videos) alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup

from harness.files.writing import write_text
from harness.measure.trust import distrust
from harness.report import drift
from harness.report.files import PAGE
from harness.report.journal import load_run
from harness.report.page.charts import Series, line_chart
from harness.report.page.costs import fps_bars, memory_bars, part_bars, span_bars
from harness.report.page.drawing import Section, attempt, draw_page, each
from harness.report.page.figures import (
    ABSENT,
    ARMS,
    EMULATED,
    curve_of,
    drop_of,
    emulated,
    flatten,
    held_bytes,
    means_of,
    number,
    over_all,
    ratio,
    significant,
    size,
    speed_ratio,
    tags_of,
    times,
    verdict,
)
from harness.report.page.numerics import numerics_blocks
from harness.report.page.players import embedded_bytes, panels, source, stage, video_path
from harness.report.record import COMPLETE, RunRecord
from harness.report.sections import ClipRecord, QualitySection
from harness.report.verdict import Check

EMBED_LIMIT = 25 * 1024 * 1024
"""Bytes of base64 up to which the videos are put inside the page; beyond, the page links to them."""


def write_run_page(folder: Path) -> Path:
    """Write ``report.html`` of the run in ``folder`` from its ``record.json``.

    Returns:
        The page.

    Raises:
        RecordError: if there is no readable record.
        OSError: if the page cannot be written.
    """
    return write_page(load_run(folder), folder)


def write_page(record: RunRecord, folder: Path) -> Path:
    """As :func:`write_run_page`, of a record at hand."""
    page = folder / PAGE
    write_text(page, run_page(record, folder))
    return page


def run_page(record: RunRecord, folder: Path, embed_limit: int = EMBED_LIMIT) -> str:
    """The page of ``record``, whose videos lie below ``folder``."""
    labels = {name: arm.label or name for name, arm in record.arms.items()}
    title = labels.get("candidate") or "BF16"
    hatched = EMULATED if emulated(record) else ""
    stage_name = _stage_name(record)
    sections = [
        Section("verdict", "Verdict", lambda: {"verdict": verdict(record, folder), "tiles": _tiles(record)}),
        Section("gates", "Gates", lambda: {"checks": _checks(record)}),
        Section("incidents", "Incidents", lambda: _incidents(record)),
        Section("videos", stage_name, lambda: {"videos": _videos(record, folder, embed_limit), "heading": stage_name}),
        Section("quality", "Quality over the rollout", lambda: _quality(record)),
        Section("speed", "Speed", lambda: _speed(record) | {"labels": labels, "emulated": hatched}),
        Section("memory", "Memory", lambda: {"memory": memory_bars(record), "rss": _resident(record)}),
        Section("numerics", "Numerics", lambda: {"numerics": numerics_blocks(record)}),
        Section("setup", "What ran", lambda: _what_ran(record)),
    ]
    header = Section("header", title, lambda: {"record": record, "title": title, "labels": labels})
    return draw_page("run.html.j2", f"{title} · {record.run_id}", header, sections, NAV | {"videos": stage_name})


def _stage_name(record: RunRecord) -> str:
    """What the section of the videos is called: pictures lie side by side where there are several of a clip."""
    try:
        return "Side by side" if any(len(panels(record, clip)) > 1 for clip in record.clips) else "Clips"
    except Exception:  # what is wrong with a clip, the section itself says
        return NAV["videos"]


NAV = {
    "verdict": "Verdict",
    "videos": "Side by side",
    "quality": "Quality",
    "speed": "Speed",
    "memory": "Memory",
    "numerics": "Numerics",
    "setup": "What ran",
}


def _resident(record: RunRecord) -> int | None:
    """Peak resident set of the process, which both arms share."""
    return next((arm.memory.process_peak_rss for arm in record.arms.values()), None)


def _incidents(record: RunRecord) -> dict[str, Any]:
    """Each incident once, with how often it was said; ``mild``: all are BF16's own, and took nothing from the run."""
    found: dict[tuple[Any, ...], list[Any]] = {}
    for incident in record.incidents:
        said = (incident.kind, incident.message, incident.action)
        found.setdefault(said, [incident, 0])[1] += 1
    mild = record.status == COMPLETE and all(incident.arm == "bf16" for incident in record.incidents)
    return {"told": list(found.values()), "fallbacks": record.fallbacks, "mild": mild}


def _quality(record: RunRecord) -> dict[str, Any]:
    clips, unread = each(record.clips, lambda clip: clip.clip_id, _clip)
    return {
        "curves": _curves(record),
        "drift": list(drift.sentences(record.drift)) if record.drift else [],
        "looks": _looks(record),
        "clips": clips,
        "unread": unread,
        "has_videos": any(clip.video for clip in record.clips),
        "compared": len(record.arms) > 1,
    }


def _speed(record: RunRecord) -> dict[str, Any]:
    return {
        "doubts": distrust({name: arm.speed for name, arm in record.arms.items()}),
        "fps": fps_bars(record),
        "spans": span_bars(record),
        "parts": part_bars(record),
    }


def _what_ran(record: RunRecord) -> dict[str, Any]:
    config = _config_lines(record.config)
    return {"setup": _setup(record), "record": record, "facts": _facts(record), "config": config}


DIFFERS = 0.005
"""dB that show in a drop of two decimals."""


def _tiles(record: RunRecord) -> list[dict[str, str]]:
    """The figures that a decision rests on."""
    if len(record.arms) < len(ARMS):
        return _lone_tiles(record)
    every = over_all(record)
    bf16, candidate = record.arms["bf16"], record.arms["candidate"]
    tiles = []
    drop, fidelity = drop_of(record), every.fidelity
    if drop is not None:
        scores = (number(means.psnr if means else None) for means in (every.bf16, every.candidate))
        note = f"{' → '.join(scores)} dB against the recording"
        tiles.append({"name": _drop_name(record, drop), "value": f"{number(drop, 2, sign=True)} dB", "note": note})
    if fidelity is not None:
        note = f"candidate against BF16; SSIM {number(fidelity.ssim, 4)}"
        tiles.append({"name": "Fidelity", "value": f"{number(fidelity.psnr, 1)} dB", "note": note})
    speed = speed_ratio(record)
    if emulated(record):
        note = f"{EMULATED} ({times(speed)} here)"
        tiles.append({"name": "Speed", "value": "not measured", "note": note, "muted": "muted"})
    elif speed is not None:
        frames = (number(arm.speed.pipeline_fps, 1) for arm in (bf16, candidate))
        tiles.append({"name": "Speed", "value": times(speed), "note": f"{' → '.join(frames)} frames/s, DiT"})
    held, of_bf16 = candidate.memory, bf16.memory
    for name, before, after in (
        ("Weights", of_bf16.weight_bytes, held.weight_bytes),
        ("KV window", of_bf16.kv_window_bytes, held.kv_window_bytes),
    ):
        tiles.append({"name": name, "value": times(ratio(after, before)), "note": f"{size(before)} → {size(after)}"})
    return tiles


def _drop_name(record: RunRecord, drop: float) -> str:
    """What the drop over all frames is called where the gate judged another one: it left out what BF16 had lost."""
    check = record.gates.check("psnr") if record.gates and record.gates.baseline is None else None
    other = check is not None and check.value is not None and abs(check.value - drop) > DIFFERS
    return "PSNR drop, all frames" if other else "PSNR drop"


def _lone_tiles(record: RunRecord) -> list[dict[str, str]]:
    """Those of a run of one arm: the baseline's, or a candidate's that was loaded alone."""
    if not record.arms:
        return []
    name, arm = next(iter(record.arms.items()))
    scores = means_of(over_all(record), name)
    scored = []
    if scores is not None:
        note = f"SSIM {number(scores.ssim, 4)}, against the recording"
        scored = [{"name": "PSNR", "value": f"{number(scores.psnr)} dB", "note": note}]
    decoded = f"{number(arm.speed.total_fps, 1)} with decode"
    speed = {"name": "Speed", "value": f"{number(arm.speed.pipeline_fps, 1)} fps", "note": f"DiT; {decoded}"}
    if emulated(record):
        speed |= {"value": "not measured", "note": EMULATED, "muted": "muted"}
    held = {"name": "Held", "value": size(held_bytes(arm)), "note": "weights and KV window"}
    return [*scored, speed, held]


def _checks(record: RunRecord) -> list[dict[str, Any]]:
    """The gates' table."""
    rows = []
    for check in record.gates.checks if record.gates else []:
        interval = check.interval
        rows.append(
            {
                "figure": check.figure,
                "value": significant(check.value),
                "threshold": f"{check.relation.replace('<=', '≤').replace('>=', '≥')} {check.threshold:g}",
                "margin": ABSENT if check.margin is None else f"{check.margin:+.3g}",
                "interval": "" if interval is None else f"{interval[0]:.3g} … {interval[1]:.3g}",
                "status": check.status,
                "note": check.note,
                "axis": _axis(check),
            }
        )
    return rows


AXIS_ROOM = 0.12
"""Share of an axis left free on either side."""


def _axis(check: Check) -> dict[str, float] | None:
    """Where figure, interval and threshold lie on one axis, in percent; ``None`` without an interval to show."""
    interval, value, threshold = check.interval, check.value, check.threshold
    if interval is None or value is None:
        return None
    low, high = min(value, threshold, *interval), max(value, threshold, *interval)
    reach = (high - low) or abs(high) or 1.0
    start, width = low - AXIS_ROOM * reach, (1 + 2 * AXIS_ROOM) * reach

    def at(figure: float) -> float:
        return 100 * (figure - start) / width

    from_, to = at(interval[0]), at(interval[1])
    allowed = (0.0, at(threshold)) if check.relation == "<=" else (at(threshold), 100.0)
    return {
        "low": from_,
        "width": to - from_,
        "value": at(value),
        "threshold": at(threshold),
        "allowed": allowed[0],
        "allowed_width": allowed[1] - allowed[0],
    }


FIDELITY, OF_WHAT = "Fidelity", "of candidate against BF16"
METRICS = (("psnr", "PSNR", "dB"), ("ssim", "SSIM", ""))
"""Key, name and unit."""


def _curves(record: RunRecord) -> list[dict[str, Any]]:
    """Per tag: charts of both arms against the recording, then of fidelity, alike in range from tag to tag."""
    tags = tags_of(record)
    ranges = {metric: _range(tags, metric) for metric, _, _ in METRICS}
    blocks = []
    for tag, section in tags.items():
        charts = [
            attempt(title, partial(_curve, record, tag, kind, metric, title, unit, ranges[metric]))
            for kind in ("arms", "fidelity")
            for metric, name, unit in METRICS
            if _lines(section, metric, kind)
            for title in [f"{name} against the recording" if kind == "arms" else f"{FIDELITY}: {name} {OF_WHAT}"]
        ]
        if charts:
            blocks.append({"tag": tag.replace("_", " ").capitalize(), "clips": section.clips, "charts": charts})
    return blocks


def _lines(section: QualitySection, metric: str, kind: str) -> dict[str, list[float]]:
    names = ("bf16", "candidate") if kind == "arms" else ("fidelity",)
    found = {name: curve_of(section, name, metric) for name in names}
    return {name: curve for name, curve in found.items() if curve}


def _range(tags: Mapping[str, QualitySection], metric: str) -> tuple[float, float] | None:
    lines = [line for section in tags.values() for line in _lines(section, metric, "fidelity").values()]
    values = [value for line in lines for value in line if value is not None and math.isfinite(value)]
    return (min(values), max(values)) if values else None


def _curve(
    record: RunRecord, tag: str, kind: str, metric: str, title: str, unit: str, limits: tuple[float, float] | None
) -> Markup:
    lines = _lines(tags_of(record)[tag], metric, kind)
    if kind == "arms":
        shown = [
            (arm, record.arms[arm].label, f"s-{style}")
            for arm, style in ARMS
            if arm in lines.keys() & record.arms.keys()
        ]
        drop = {"drop": [a - b for a, b in zip(*lines.values(), strict=True)]} if len(lines) == 2 else {}
    else:
        shown, drop = [("fidelity", "fidelity", "s-fid")], {}
    faint = [line for arm, _, style in shown for line in _single_clips(record, tag, arm, metric, style)]
    means = [Series(label, lines[arm], style) for arm, label, style in shown]
    return line_chart(title, [*faint, *means], unit, y_range=limits if kind != "arms" else None, read_out=drop)


SINGLE_CLIPS = 100
"""Lines of single clips that a chart holds at most: more of them are a blot, and megabytes of page."""


def _single_clips(record: RunRecord, tag: str, name: str, metric: str, style: str) -> list[Series]:
    """A faint line for each clip of ``tag``, where there are several; of very many, an even choice.

    Args:
        record: of the run.
        tag: of the clips.
        name: of their scores: an arm, or ``fidelity``.
        metric: ``psnr`` or ``ssim``.
        style: CSS class.
    """
    scored = [clip for clip in record.clips if clip.tag == tag and name in clip.scores]
    curves = [(clip.clip_id, getattr(clip.scores[name].frames, metric)) for clip in scored]
    step = -(-len(curves) // SINGLE_CLIPS) or 1
    chosen = curves[::step] if len(curves) > 1 else []
    return [Series("", frames, style, faint=True, clip=clip) for clip, frames in chosen]


def _looks(record: RunRecord) -> list[dict[str, Any]]:
    """What PSNR hides, over all clips; see ``harness/measure/appearance.py``."""
    looks = over_all(record).appearance
    rows = []
    for name, figure, scale, digits in (
        ("sharpness", "sharpness", "1 = as the recording", 3),
        ("texture", "texture distance", "0 = as the recording", 2),
        ("action_fidelity", "action fidelity", "1 = moves as the recording", 3),
    ):
        values = {arm: getattr(looks[arm], name) if arm in looks else None for arm in ("bf16", "candidate", "drop")}
        if values["bf16"] is not None or values["candidate"] is not None:
            rows.append({"figure": figure, "scale": scale, "digits": digits, **values})
    return rows


def _clip(clip: ClipRecord) -> dict[str, Any]:
    """A row of the table of clips."""
    row: dict[str, Any] = {"id": clip.clip_id, "tag": clip.tag, "drop": clip.drop.psnr if clip.drop else None}
    for name in ("bf16", "candidate", "fidelity"):
        scores = clip.scores.get(name)
        row[f"{name}_psnr"], row[f"{name}_ssim"] = (scores.psnr, scores.ssim) if scores else (None, None)
    return row


def _videos(record: RunRecord, folder: Path, embed_limit: int) -> dict[str, Any]:
    """Players of the clips' videos: inside the page if all of them together stay within ``embed_limit``."""
    found, missing = [], []
    for clip in record.clips:
        if clip.video:
            path = video_path(record, folder, clip)
            if path is None:
                missing.append(clip.video)
            else:
                found.append((clip, path))
    total = sum(embedded_bytes(path) for _, path in found)

    def player(clip: ClipRecord, path: Path) -> dict[str, Any]:
        return {
            "id": clip.clip_id,
            "tag": clip.tag,
            "drop": clip.drop.psnr if clip.drop else None,
            "fidelity": clip.scores["fidelity"].psnr if "fidelity" in clip.scores else None,
            "panels": panels(record, clip),
            "sources": [source(path, folder, total <= embed_limit)],
        }

    players, failed = each(found, lambda one: one[0].clip_id, lambda one: player(*one))
    return stage(players, record.data.future_frames or 0, total, total <= embed_limit) | {
        "missing": missing,
        "failed": failed,
    }


def _setup(record: RunRecord) -> list[dict[str, Any]]:
    """What ran in each arm: formats, kernels, transformed Linears, compilation."""
    return [
        {
            "label": arm.label,
            "style": style,
            "path": asdict(arm.numeric_path),
            "compile": asdict(arm.compile),
            "transform": arm.transform,
        }
        for name, style in ARMS
        if (arm := record.arms.get(name)) is not None
    ]


def _config_lines(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The resolved config as YAML, each line split into its key and the rest."""
    text = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True, width=110)
    lines = []
    for line in text.splitlines():
        key, colon, rest = line.partition(":")
        lines.append((key + colon, rest) if colon else ("", line))
    return lines


def _facts(record: RunRecord) -> list[tuple[str, dict[str, Any]]]:
    model = {key: value for key, value in asdict(record.model).items() if key not in ("arch", "decoder_arch")}
    data = {key: value for key, value in asdict(record.data).items() if key not in ("clips", "summary")}
    return [
        ("Environment", flatten(asdict(record.environment))),
        ("Model and decoder", flatten(model)),
        ("Clips", flatten(data)),
    ]
