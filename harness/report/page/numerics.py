"""What quantisation did to Linears and to the KV cache: charts and tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from harness.report.page.charts import Series, column_chart, line_chart
from harness.report.page.figures import Record, flatten, pick

READ_OUT = ("rel", "mae", "max", "sqnr_db", "bf16.rel")
"""Figures of a Linear's error that its column shows under the pointer."""
TENSORS = {"k": "s-bf16", "v": "s-cand"}
"""CSS class of K's and V's curves."""


def numerics_blocks(record: Record) -> list[dict[str, Any]]:
    """Blocks of ``heading``, ``charts``, ``columns`` and ``rows``; empty where nothing was sampled."""
    candidate = record["arms"].get("candidate")
    found = pick(record, "numerics") or pick(candidate, "numerics") or {}
    blocks = [_linears(found.get("linears")), _kv(pick(candidate, "kv_stats"))]
    return [block for block in blocks if block is not None]


def _rows(section: Any, names: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of a mapping of mappings or a list of them, flattened, ``name`` made of the first of ``names`` found."""
    if isinstance(section, Mapping):
        section = [{"name": name, **row} for name, row in section.items()]
    rows = []
    for row in section or []:
        flat = {key: value for key, value in flatten(row).items() if not isinstance(value, list)}
        key = next(name for name in names if name in flat)
        rows.append({"name": str(flat.pop(key)), **flat})
    return rows


def _block(heading: str, rows: Sequence[Mapping[str, Any]], charts: Sequence[Markup]) -> dict[str, Any]:
    columns = list(dict.fromkeys(key for row in rows for key in row if key != "name"))
    table = [[row["name"], *(row.get(column) for column in columns)] for row in rows]
    return {"heading": heading, "columns": columns, "rows": table, "charts": charts}


def _linears(section: Any) -> dict[str, Any] | None:
    rows = _rows(section, ("name", "linear"))
    if not rows:
        return None
    figures = {figure: [row.get(figure) for row in rows] for figure in READ_OUT if any(figure in row for row in rows)}
    charts = []
    if "rel" in figures:
        names = [row["name"] for row in rows]
        styles = [_category(name) for name in names]
        charts.append(column_chart("Relative error of each Linear's output", names, figures, "rel", styles))
    return _block("MX Linears, layer by layer", rows, charts)


def _category(name: str) -> str:
    for part, style in (
        (".mlp", "c-mlp"),
        (".attn", "c-attention"),
        ("adaln", "c-modulation"),
        ("gate", "c-modulation"),
    ):
        if part in name:
            return style
    return "c-other"


def _kv(stats: Any) -> dict[str, Any] | None:
    layers = pick(stats, "layers")
    if not layers:
        return None
    charts = [
        line_chart(
            "Saturated elements, share by layer", _by_layer(layers, "saturated_share"), "", "layer", synced=False
        ),
        line_chart("log2 of the scale by layer: mean, and extremes", _scales(layers), "", "layer", synced=False),
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
                charts.append(line_chart(title, lines, "", "sampled frame", labels=labels, synced=False))
    rows = [{"name": f"layer {row['layer']} {row['tensor'].upper()}", **_plain(row)} for row in layers]
    return _block("KV cache, layer by layer", rows, charts)


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
