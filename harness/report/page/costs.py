"""Speed and memory of both arms as bars."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from harness.report.page.figures import ARMS, Record, number, pick, ratio, size, times
from harness.report.sections import PARTS

MEMORY = (
    ("Weights", "weight_bytes"),
    ("KV window", "kv_window_bytes"),
    ("KV window and the room it is read through, peak", "kv_peak_bytes"),
    ("Cache and graph, as allocated", "cache_and_graph_allocated"),
    ("Transient peak", "transient"),
    ("Peak allocated (both arms in)", "peak_allocated"),
    ("Peak reserved (both arms in)", "peak_reserved"),
)


def _bars(
    record: Record, name: str, path: str, word: Callable[[float], str], better: str, stats: bool = False
) -> dict[str, Any] | None:
    """One figure of each arm as bars of a common scale; ``None`` where no arm has it.

    With ``stats`` the figure is a section with ``median``, ``p10`` and ``p90``.
    """
    bars = []
    for arm, style in ARMS:
        found = pick(record["arms"].get(arm), path)
        value = pick(found, "median") if stats else found
        if value is not None:
            spread = (found["p10"], found["p90"]) if stats else None
            bars.append({"label": record["arms"][arm]["label"], "style": style, "value": value, "spread": spread})
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


def fps_bars(record: Record) -> list[dict[str, Any]]:
    """Both FPS."""

    def word(value: float) -> str:
        return f"{number(value, 2)} fps"

    return _present(
        [
            _bars(record, "DiT alone (pipeline)", "speed.pipeline_fps", word, "higher is better"),
            _bars(record, "With decode (total)", "speed.total_fps", word, "higher is better"),
            _bars(record, "With decode, overlapped (throughput)", "speed.overlapped.fps", word, "higher is better"),
        ]
    )


def span_bars(record: Record) -> list[dict[str, Any]]:
    """Median, p10 and p90 of each span of a frame."""

    def word(value: float) -> str:
        return f"{number(value, 2)} ms"

    names = (("DiT", "dit_ms"), ("Decoder", "decoder_ms"), ("Total", "total_ms"), ("Prefill", "prefill_ms"))
    return _present([_bars(record, name, f"speed.{key}", word, "lower is better", stats=True) for name, key in names])


def part_bars(record: Record) -> dict[str, Any] | None:
    """The instrumented pass: each arm's frame as one bar, split into its parts."""
    rows: list[dict[str, Any]] = []
    for name, _ in ARMS:
        found = pick(record["arms"].get(name), "parts.ms")
        if found:
            parts = [*(part for part in PARTS if part in found), *sorted(set(found) - set(PARTS))]
            values = {part: pick(found, f"{part}.median") or 0.0 for part in parts}
            rows.append({"label": record["arms"][name]["label"], "values": values, "total": sum(values.values())})
    if not rows:
        return None
    top = max(row["total"] for row in rows) or 1
    for row in rows:
        row["pieces"] = [
            {"part": part, "ms": value, "width": 100 * value / top, "share": 100 * value / (row["total"] or 1)}
            for part, value in row["values"].items()
        ]
    methods = [method for name, _ in ARMS if (method := pick(record, f"arms.{name}.parts.method"))]
    return {"arms": rows, "parts": list(rows[0]["values"]), "method": methods[0] if methods else ""}


def memory_bars(record: Record) -> list[dict[str, Any]]:
    """What was measured of memory and is not zero in both arms."""
    groups = [_bars(record, name, f"memory.{key}", size, "lower is better") for name, key in MEMORY]
    return [group for group in _present(groups) if any(bar["value"] for bar in group["bars"])]
