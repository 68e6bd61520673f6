"""What quantisation did to Linears and to the KV cache: charts and tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from harness.report.page.charts import Series, column_chart, line_chart
from harness.report.page.drawing import attempt, undrawn
from harness.report.page.figures import Record, flatten, pick, significant

READ_OUT = ("rel", "mae", "max", "sqnr_db", "bf16.rel")
"""Figures of a Linear's error that its column shows under the pointer."""
CATEGORIES = {"mlp": "c-mlp", "attn": "c-attention", "modulation": "c-modulation"}
"""CSS class of each category of Linears."""
LINEARS, CACHE = "MX Linears, layer by layer", "KV cache, layer by layer"
TENSORS = {"k": "s-bf16", "v": "s-cand"}
"""CSS class of K's and V's curves."""


def numerics_blocks(record: Record) -> list[dict[str, Any]]:
    """Blocks of ``heading``, ``lead``, ``charts``, ``columns`` and ``rows``; none where nothing was sampled."""
    candidate = record["arms"].get("candidate")
    blocks = [
        _attempted(LINEARS, lambda: _linears(pick(candidate, "numerics"))),
        _attempted(CACHE, lambda: _kv(pick(candidate, "kv_stats"))),
    ]
    return [block for block in blocks if block is not None]


def _attempted(heading: str, make: Callable[[], dict[str, Any] | None]) -> dict[str, Any] | None:
    """The block; where it cannot be made, its ``heading`` and why it ``failed``."""
    try:
        return make()
    except Exception as error:
        return {"heading": heading, "failed": undrawn("This part", error)}


def _block(heading: str, lead: str, rows: Sequence[Mapping[str, Any]], charts: Sequence[Markup]) -> dict[str, Any]:
    columns = list(dict.fromkeys(key for row in rows for key in row if key != "name"))
    table = [[row["name"], *(row.get(column) for column in columns)] for row in rows]
    return {"heading": heading, "lead": lead, "columns": columns, "rows": table, "charts": charts}


def _linears(section: Any) -> dict[str, Any] | None:
    layers: Mapping[str, Any] = pick(section, "layers") or {}
    if not layers:
        return None
    rows = [{"name": name, **flatten(layer)} for name, layer in layers.items()]
    figures = {figure: [row.get(figure) for row in rows] for figure in READ_OUT}
    styles = [CATEGORIES.get(row.get("category", ""), "c-other") for row in rows]
    title = "Relative error of each Linear's output"
    chart = attempt(title, lambda: column_chart(title, list(layers), figures, "rel", styles))
    kinds = pick(section, "categories") or {}
    means = [
        f"{kind} {significant(found['rel_mean'])} (largest {significant(found['rel_max'])})"
        for kind, found in kinds.items()
    ]
    lead = f"{pick(section, 'method') or ''}. Mean relative error: {', '.join(means)}." if means else ""
    return _block(LINEARS, lead, rows, [chart])


def _kv(stats: Any) -> dict[str, Any] | None:
    layers = pick(stats, "layers")
    if not layers:
        return None
    charts = [
        _chart("Saturated elements, share by layer", _by_layer(layers, "saturated_share"), "layer"),
        _chart("log2 of the scale by layer: mean, and extremes", _scales(layers), "layer"),
    ]
    frames = pick(stats, "frames") or []
    if len(frames) > 1:
        labels = [f"frame {frame}" for frame in frames]
        for key, title in (
            ("saturated_share", "Saturated elements over time, mean of layers"),
            ("log2_scale_mean", "log2 of the scale over time, mean of layers"),
        ):
            lines = _over_time(layers, key)
            if lines:
                charts.append(_chart(title, lines, "sampled frame", labels))
    rows = [{"name": f"layer {row['layer']} {row['tensor'].upper()}", **_plain(row)} for row in layers]
    broken = [
        f"layer {one['layer']} {one['tensor'].upper()} frame {one['frame']}" for one in stats.get("nonfinite") or []
    ]
    lead = f"NaN or Inf stored: {', '.join(broken)}." if broken else ""
    return _block(CACHE, lead, rows, charts)


def _chart(title: str, lines: Sequence[Series], x_label: str, labels: Sequence[str] | None = None) -> Markup:
    return attempt(title, lambda: line_chart(title, lines, "", x_label, labels=labels, synced=False))


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in ("layer", "tensor", "over_time")}


def _by_layer(layers: Sequence[Mapping[str, Any]], key: str, name: str = "", faint: bool = False) -> list[Series]:
    """A line over all layers for K and for V; layers that are not quantised leave a gap."""
    count = max(row["layer"] for row in layers) + 1
    series = []
    for tensor, style in TENSORS.items():
        values: list[float | None] = [None] * count
        for row in layers:
            if row["tensor"] == tensor:
                values[row["layer"]] = row.get(key)
        if any(value is not None for value in values):
            series.append(Series(f"{tensor.upper()}{name}", values, style, faint))
    return series


def _scales(layers: Sequence[Mapping[str, Any]]) -> list[Series]:
    extremes = [line for end in ("min", "max") for line in _by_layer(layers, f"log2_scale_{end}", faint=True)]
    return [*extremes, *_by_layer(layers, "log2_scale_mean")]


def _over_time(layers: Sequence[Mapping[str, Any]], key: str) -> list[Series]:
    """Per tensor the mean over layers; each layer faint behind it."""
    series = []
    for tensor, style in TENSORS.items():
        curves = [curve for row in layers if row["tensor"] == tensor and (curve := pick(row, f"over_time.{key}"))]
        if not curves:
            continue
        means: list[float | None] = []
        for values in zip(*curves, strict=True):
            known = [value for value in values if value is not None]
            means.append(sum(known) / len(known) if known else None)
        if any(mean is not None for mean in means):
            series += [Series("", curve, style, faint=True) for curve in curves] if len(curves) > 1 else []
            series.append(Series(tensor.upper(), means, style))
    return series
