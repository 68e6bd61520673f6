"""Speed and memory of both arms as bars."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from harness.measure.figures import Stats
from harness.report.page.figures import ARMS, number, ratio, size, times
from harness.report.record import RunRecord
from harness.report.sections import PARTS, Memory, Speed

MEMORY: Mapping[str, Callable[[Memory], float | None]] = {
    "Weights": lambda memory: memory.weight_bytes,
    "KV window": lambda memory: memory.kv_window_bytes,
    "KV window and the room it is read through, peak": lambda memory: memory.kv_peak_bytes,
    "Cache and graph, as allocated": lambda memory: memory.cache_and_graph_allocated,
    "Transient peak": lambda memory: memory.transient,
    "Peak allocated (both arms in)": lambda memory: memory.peak_allocated,
    "Peak reserved (both arms in)": lambda memory: memory.peak_reserved,
}
SPANS: Mapping[str, Callable[[Speed], Stats | None]] = {
    "DiT": lambda speed: speed.dit_ms,
    "Decoder": lambda speed: speed.decoder_ms,
    "Total": lambda speed: speed.total_ms,
    "Prefill": lambda speed: speed.prefill_ms,
}
RATES: Mapping[str, Callable[[Speed], float | None]] = {
    "DiT alone (pipeline)": lambda speed: speed.pipeline_fps,
    "With decode (total)": lambda speed: speed.total_fps,
    "With decode, overlapped (throughput)": lambda speed: speed.overlapped.fps if speed.overlapped else None,
}
"""What is shown of an arm's memory and speed, by what it is called."""


def _bars(
    record: RunRecord,
    name: str,
    figures: Mapping[str, float | Stats | None],
    word: Callable[[float], str],
    better: str,
) -> dict[str, Any] | None:
    """One figure by arm as bars of a common scale, of times their median; ``None`` where no arm has it."""
    bars: list[dict[str, Any]] = []
    for arm, style in ARMS:
        found = figures.get(arm)
        if found is not None:
            value, spread = (found.median, (found.p10, found.p90)) if isinstance(found, Stats) else (found, None)
            bars.append({"label": record.arms[arm].label, "style": style, "value": value, "spread": spread})
    if not bars:
        return None
    top = max(max(bar["value"], *(bar["spread"] or ())) if bar["spread"] else bar["value"] for bar in bars) or 1
    for bar in bars:
        bar["text"], bar["width"] = word(bar["value"]), 100 * bar["value"] / top
        if bar["spread"]:
            low, high = (100 * value / top for value in bar["spread"])
            bar |= {
                "low": low,
                "reach": high - low,
                "range": f"p10 {word(bar['spread'][0])}, p90 {word(bar['spread'][1])}",
            }
    change = times(ratio(bars[1]["value"], bars[0]["value"])) if len(bars) == 2 and bars[0]["value"] else ""
    return {"name": name, "bars": bars, "change": change, "better": better}


def _present(groups: Sequence[dict[str, Any] | None]) -> list[dict[str, Any]]:
    return [group for group in groups if group is not None]


def fps_bars(record: RunRecord) -> list[dict[str, Any]]:
    """Both FPS."""

    def word(value: float) -> str:
        return f"{number(value, 2)} fps"

    return _present(
        [
            _bars(record, name, {arm: rate(one.speed) for arm, one in record.arms.items()}, word, "higher is better")
            for name, rate in RATES.items()
        ]
    )


def span_bars(record: RunRecord) -> list[dict[str, Any]]:
    """Median, p10 and p90 of each span of a frame."""

    def word(value: float) -> str:
        return f"{number(value, 2)} ms"

    return _present(
        [
            _bars(record, name, {arm: span(one.speed) for arm, one in record.arms.items()}, word, "lower is better")
            for name, span in SPANS.items()
        ]
    )


def part_bars(record: RunRecord) -> dict[str, Any] | None:
    """The instrumented pass: each arm's frame as one bar, split into its parts."""
    rows: list[dict[str, Any]] = []
    arms = [record.arms[name] for name, _ in ARMS if name in record.arms]
    for arm in arms:
        found = arm.parts.ms if arm.parts else {}
        if found:
            parts = [*(part for part in PARTS if part in found), *sorted(set(found) - set(PARTS))]
            values = {part: found[part].median for part in parts}
            rows.append({"label": arm.label, "values": values, "total": sum(values.values())})
    if not rows:
        return None
    top = max(row["total"] for row in rows) or 1
    for row in rows:
        row["pieces"] = [
            {"part": part, "ms": value, "width": 100 * value / top, "share": 100 * value / (row["total"] or 1)}
            for part, value in row["values"].items()
        ]
    methods = [arm.parts.method for arm in arms if arm.parts]
    return {"arms": rows, "parts": list(rows[0]["values"]), "method": methods[0] if methods else ""}


def memory_bars(record: RunRecord) -> list[dict[str, Any]]:
    """What was measured of memory and is not zero in both arms."""
    groups = [
        _bars(record, name, {arm: figure(one.memory) for arm, one in record.arms.items()}, size, "lower is better")
        for name, figure in MEMORY.items()
    ]
    return [group for group in _present(groups) if any(bar["value"] for bar in group["bars"])]
