"""What quantisation did to Linears and to the KV cache: charts and tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from markupsafe import Markup

from harness.report.page.charts import Series, column_chart, line_chart
from harness.report.page.drawing import attempt, undrawn
from harness.report.page.figures import flatten, significant
from harness.report.record import RunRecord
from harness.report.sections import KVStored, Numerics, RingStored, ScaleSeries
from harness.report.sections.formats import spoken

READ_OUT = ("rel", "mae", "max", "sqnr_db", "bf16.rel")
"""Figures of a Linear's error that its column shows under the pointer."""
CATEGORIES = {"mlp": "c-mlp", "attn": "c-attention", "modulation": "c-modulation"}
"""CSS class of each category of Linears."""
LINEARS, CACHE = "MX Linears, layer by layer", "KV cache, layer by layer"
TENSORS = {"k": "s-bf16", "v": "s-cand"}
"""CSS class of K's and V's curves."""


def numerics_blocks(record: RunRecord) -> list[dict[str, Any]]:
    """Blocks of ``heading``, ``lead``, ``charts``, ``columns`` and ``rows``; none where nothing was sampled."""
    candidate = record.candidate
    blocks = [
        _attempted(LINEARS, lambda: _linears(candidate.numerics if candidate else None)),
        _attempted(CACHE, lambda: _kv(candidate.kv_stats if candidate else None)),
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


def _linears(section: Numerics | None) -> dict[str, Any] | None:
    if section is None or not section.layers:
        return None
    layers = section.layers
    rows = [{"name": name, **flatten(asdict(layer))} for name, layer in layers.items()]
    figures = {figure: [row.get(figure) for row in rows] for figure in READ_OUT}
    styles = [CATEGORIES.get(layer.category, "c-other") for layer in layers.values()]
    title = "Relative error of each Linear's output"
    chart = attempt(title, lambda: column_chart(title, list(layers), figures, "rel", styles))
    means = [
        f"{spoken(kind)} {significant(found.rel_mean)} (largest {significant(found.rel_max)})"
        for kind, found in section.categories.items()
    ]
    lead = f"{section.method}. Mean relative error: {', '.join(means)}." if means else ""
    return _block(LINEARS, lead, rows, [chart])


def _kv(stats: KVStored | None) -> dict[str, Any] | None:
    if stats is None or not stats.layers:
        return None
    layers = stats.layers
    charts = [
        _chart("Saturated elements, share by layer", _by_layer(layers, lambda ring: ring.saturated_share), "layer"),
        _chart("log2 of the scale by layer: mean, and extremes", _scales(layers), "layer"),
    ]
    if len(stats.frames) > 1:
        labels = [f"frame {frame}" for frame in stats.frames]
        for title, curve in OVER_TIME.items():
            lines = _over_time(layers, curve)
            if lines:
                charts.append(_chart(title, lines, "sampled frame", labels))
    rows = [{"name": f"layer {ring.layer} {ring.tensor.upper()}", **_plain(ring)} for ring in layers]
    broken = [f"layer {one.layer} {one.tensor.upper()} frame {one.frame}" for one in stats.nonfinite]
    lead = f"NaN or Inf stored: {', '.join(broken)}." if broken else ""
    return _block(CACHE, lead, rows, charts)


def _chart(title: str, lines: Sequence[Series], x_label: str, labels: Sequence[str] | None = None) -> Markup:
    return attempt(title, lambda: line_chart(title, lines, "", x_label, labels=labels, synced=False))


OVER_TIME: Mapping[str, Callable[[ScaleSeries], Sequence[float | None]]] = {
    "Saturated elements over time, mean of layers": lambda series: series.saturated_share,
    "log2 of the scale over time, mean of layers": lambda series: series.log2_scale_mean,
}
"""Charts over sampled frames."""


def _plain(ring: RingStored) -> dict[str, Any]:
    return {key: value for key, value in asdict(ring).items() if key not in ("layer", "tensor", "over_time")}


def _by_layer(
    layers: Sequence[RingStored], figure: Callable[[RingStored], float | None], faint: bool = False
) -> list[Series]:
    """A line over all layers for K and for V; layers that are not quantised leave a gap."""
    count = max(ring.layer for ring in layers) + 1
    series = []
    for tensor, style in TENSORS.items():
        values: list[float | None] = [None] * count
        for ring in layers:
            if ring.tensor == tensor:
                values[ring.layer] = figure(ring)
        if any(value is not None for value in values):
            series.append(Series(tensor.upper(), values, style, faint))
    return series


def _scales(layers: Sequence[RingStored]) -> list[Series]:
    lowest = _by_layer(layers, lambda ring: ring.log2_scale_min, faint=True)
    highest = _by_layer(layers, lambda ring: ring.log2_scale_max, faint=True)
    return [*lowest, *highest, *_by_layer(layers, lambda ring: ring.log2_scale_mean)]


def _over_time(layers: Sequence[RingStored], curve: Callable[[ScaleSeries], Sequence[float | None]]) -> list[Series]:
    """Per tensor the mean over layers; each layer faint behind it."""
    series = []
    for tensor, style in TENSORS.items():
        found = [curve(ring.over_time) for ring in layers if ring.tensor == tensor and ring.over_time is not None]
        curves = [values for values in found if values]
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
