"""Charts as inline SVG, with the numbers that the page's script shows under the pointer.

Every chart is a ``<figure>``; ``data-chart`` carries what a read-out needs: the x positions in the drawing's own
units, the series' names, units and values.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from markupsafe import Markup

WIDTH, WIDE, HEIGHT = 560.0, 1150.0, 210.0
PHONE = 340.0
"""Width of a drawing in which text keeps its size on a phone."""
LEFT, RIGHT, TOP, BOTTOM = 46.0, 12.0, 12.0, 34.0
LOG_FROM = 30.0
"""Columns whose heights differ by more than this factor get a logarithmic axis."""
MARGIN_SHARE = 0.06
"""Share of the range of values that stays free above and below them."""

Values = Sequence[float | None]


@dataclass(frozen=True)
class Series:
    """One line: ``values`` at x = 0, 1, 2 …; ``style`` is a CSS class.

    ``faint`` lines have no read-out; those of ``clip`` stand out while that clip is on the page's stage.
    """

    name: str
    values: Values
    style: str
    faint: bool = False
    clip: str = ""


@dataclass(frozen=True)
class Point:
    """One point of a scatter plot; ``details`` are lines of its read-out, ``href`` where a click leads."""

    name: str
    x: float
    y: float
    style: str
    details: Sequence[str] = ()
    href: str | None = None
    on_front: bool = False


@dataclass(frozen=True)
class Axis:
    """Maps values to positions in the drawing; ``end`` lies before ``start`` on an axis that points up."""

    low: float
    high: float
    start: float
    end: float
    ticks: list[float] = field(default_factory=list)

    def at(self, value: float) -> float:
        """Where ``value`` is drawn."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def _known(values: Values) -> Values:
    """``values`` with a gap where one is NaN or infinite: there is no place for it in a drawing."""
    return [value if value is None or math.isfinite(value) else None for value in values]


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About ``count`` multiples of 1, 2 or 5 times a power of ten within [low, high]."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [round(number * step, 12) for number in range(first, math.floor(high / step + 1e-9) + 1)]


def make_axis(values: Sequence[float], start: float, end: float, count: int = 5) -> Axis:
    """An axis that holds ``values`` (at least one) with a margin."""
    low, high = min(values), max(values)
    spread = (high - low) or max(abs(high) * 0.02, 1e-6)
    low, high = low - spread * MARGIN_SHARE, high + spread * MARGIN_SHARE
    return Axis(low, high, start, end, nice_ticks(low, high, count))


def tick_text(value: float) -> str:
    """A tick's label, without trailing zeros."""
    return f"{value:.6g}"


def _grid(x: Axis, y: Axis, x_label: str, y_label: str, width: float = WIDTH) -> list[Markup]:
    right, bottom = width - RIGHT, HEIGHT - BOTTOM
    parts = []
    for tick in y.ticks:
        at = y.at(tick)
        parts.append(Markup('<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(LEFT, right, at, at))
        parts.append(
            Markup('<text class="tick" x="{}" y="{:.1f}" text-anchor="end">{}</text>').format(
                LEFT - 7, at + 3.5, tick_text(tick)
            )
        )
    for tick in x.ticks:
        parts.append(
            Markup('<text class="tick" x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(
                x.at(tick), bottom + 15, tick_text(tick)
            )
        )
    parts.append(Markup('<line class="base" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(LEFT, right, bottom, bottom))
    parts.append(
        Markup('<text class="label" x="{}" y="{}" text-anchor="end">{}</text>').format(right, HEIGHT - 3, x_label)
    )
    parts.append(Markup('<text class="label" x="{}" y="{}">{}</text>').format(2, HEIGHT - 3, y_label))
    return parts


def _path(values: Values, x: Axis, y: Axis) -> str:
    """SVG path of a line; a value that is missing interrupts it."""
    commands, pen = [], "M"
    for index, value in enumerate(values):
        if value is None:
            pen = "M"
            continue
        commands.append(f"{pen}{x.at(index):.1f} {y.at(value):.1f}")
        pen = "L"
    return "".join(commands)


def _figure(
    title: str, legend: Markup, drawing: Sequence[Markup], data: dict[str, Any], kind: str, width: float = WIDTH
) -> Markup:
    return Markup(
        '<figure class="chart {}" tabindex="0" data-chart="{}"><figcaption><span>{}</span>{}</figcaption>'
        '<svg viewBox="0 0 {:g} {:g}" role="img" aria-label="{}">{}</svg></figure>'
    ).format(kind, json.dumps(data, allow_nan=False), title, legend, width, HEIGHT, title, Markup("").join(drawing))


def line_chart(
    title: str,
    series: Sequence[Series],
    unit: str,
    x_label: str = "generated frame",
    y_range: tuple[float, float] | None = None,
    read_out: Mapping[str, Values] | None = None,
    labels: Sequence[str] | None = None,
    synced: bool = True,
) -> Markup:
    """Lines over frames.

    Args:
        title: what the chart shows.
        series: at least one, with at least one value; NaN and infinities are gaps.
        unit: of the values.
        x_label: what x counts.
        y_range: values that the y axis must hold besides the series' own, so that charts side by side compare.
        read_out: figures that only the read-out shows, by name.
        labels: what the read-out calls each x; "frame 0" and so on if not given.
        synced: whether x is the frame of the videos, so that both follow each other.

    Raises:
        ValueError: if there is no value to draw.
    """
    series = [replace(line, values=_known(line.values)) for line in series]
    read_out = {name: _known(values) for name, values in (read_out or {}).items()}
    length = max(len(line.values) for line in series)
    values = [value for line in series for value in line.values if value is not None]
    if not values:
        raise ValueError("none of its figures is a finite number")
    x = Axis(0, max(length - 1, 1), LEFT + 6, WIDTH - RIGHT - 6, _frame_ticks(length))
    y = make_axis([*values, *(y_range or ())], HEIGHT - BOTTOM, TOP, 4)
    drawing = _grid(x, y, x_label, "")
    for line in series:
        style = f"line {line.style}{' faint' if line.faint else ''}"
        clip = Markup(' data-clip="{}"').format(line.clip) if line.clip else ""
        drawing.append(Markup('<path class="{}"{} d="{}"/>').format(style, clip, _path(line.values, x, y)))
    shown = [line for line in series if not line.faint]
    names = [(line.style, line.name) for line in shown]
    legend = Markup("").join(Markup('<b><i class="key {}"></i>{}</b>').format(*name) for name in names)
    data = {
        "x": [round(x.at(index), 1) for index in range(length)],
        "labels": labels or [f"{x_label.removeprefix('generated ')} {index}" for index in range(length)],
        "series": [
            {
                "name": line.name,
                "style": line.style,
                "values": [None if value is None else round(value, 4) for value in line.values],
                "y": [None if value is None else round(y.at(value), 1) for value in line.values],
            }
            for line in shown
        ]
        + [
            {"name": name, "style": "", "values": [None if v is None else round(v, 4) for v in values], "y": []}
            for name, values in read_out.items()
        ],
        "unit": unit,
        "frames": synced,
        "top": TOP,
        "bottom": HEIGHT - BOTTOM,
    }
    return _figure(f"{title}, {unit}" if unit else title, legend, drawing, data, "lines")


def _frame_ticks(length: int) -> list[float]:
    return [tick for tick in nice_ticks(0, max(length - 1, 1), 8) if tick == int(tick)]


def column_chart(
    title: str, names: Sequence[str], columns: Mapping[str, Values], drawn: str, styles: Sequence[str]
) -> Markup:
    """One column per name across the whole page, whose read-out shows every figure of that name.

    Args:
        title: what the chart shows.
        names: what the columns stand for.
        columns: figures by name of the figure, each as long as ``names``.
        drawn: the figure that the columns show; values that are not above 0 have no column.
        styles: CSS class of each column.
    """
    columns = {name: _known(values) for name, values in columns.items()}
    positive = [value for value in columns[drawn] if value is not None and value > 0] or [1.0]
    logarithmic = max(positive) > LOG_FROM * min(positive)
    y = _log_axis(positive) if logarithmic else _axis_from_zero(max(positive))
    x = Axis(-0.5, len(names) - 0.5, LEFT + 2, WIDE - RIGHT)
    drawing = _grid(x, Axis(y.low, y.high, y.start, y.end), "layer", "", WIDE)
    drawing += _layer_ticks(names, x)
    for tick in y.ticks:
        drawing += _y_tick(y.at(tick), tick_text(10.0**tick if logarithmic else tick))
    width = (x.end - x.start) / len(names)
    for index, value in enumerate(columns[drawn]):
        if value is not None and value > 0:
            top = y.at(math.log10(value) if logarithmic else value)
            drawing.append(
                Markup('<rect class="column {}" x="{:.2f}" y="{:.1f}" width="{:.2f}" height="{:.1f}"/>').format(
                    styles[index], x.at(index) - width * 0.38, top, width * 0.76, HEIGHT - BOTTOM - top
                )
            )
    legend = Markup("").join(
        Markup('<b><i class="key {}"></i>{}</b>').format(style, style.removeprefix("c-"))
        for style in dict.fromkeys(styles)
    )
    data = {
        "x": [round(x.at(index), 1) for index in range(len(names))],
        "labels": list(names),
        "series": [{"name": name, "style": "", "values": list(values), "y": []} for name, values in columns.items()],
        "unit": "",
        "top": TOP,
        "bottom": HEIGHT - BOTTOM,
    }
    return _figure(title, legend, drawing, data, "columns", WIDE)


LABEL_ROOM = 26.0
"""Width that the label of a layer needs below a column chart, in the drawing's units."""


def _layer_ticks(names: Sequence[str], x: Axis) -> list[Markup]:
    """Below the columns the layer they belong to: the first number in a Linear's name, as in ``blocks.7.mlp.fc1``."""
    layers = [found.group() if (found := re.search(r"(?<![^.])\d+(?![^.])", name)) else "" for name in names]
    bottom, drawn, free = HEIGHT - BOTTOM, [], LEFT - LABEL_ROOM
    first = 0
    for layer, group in itertools.groupby(layers):
        last = first + len(list(group)) - 1
        start, middle = x.at(first - 0.5), x.at((first + last) / 2)
        if first:
            line = Markup('<line class="layer" x1="{0:.1f}" x2="{0:.1f}" y1="{1}" y2="{2}"/>')
            drawn.append(line.format(start, TOP, bottom + 5))
        if layer and middle - free >= LABEL_ROOM:
            text = Markup('<text class="tick" x="{:.1f}" y="{}" text-anchor="middle">{}</text>')
            drawn.append(text.format(middle, bottom + 15, layer))
            free = middle
        first = last + 1
    return drawn


def _axis_from_zero(high: float) -> Axis:
    return Axis(0.0, high * (1 + MARGIN_SHARE), HEIGHT - BOTTOM, TOP, nice_ticks(0.0, high, 4))


def _log_axis(values: Sequence[float]) -> Axis:
    """An axis of exponents of ten."""
    low, high = math.floor(math.log10(min(values)) - 0.1), math.ceil(math.log10(max(values)))
    return Axis(low, high, HEIGHT - BOTTOM, TOP, [float(power) for power in range(low, high + 1)])


def _y_tick(at: float, text: str) -> list[Markup]:
    line = Markup('<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>')
    tick = Markup('<text class="tick" x="{}" y="{:.1f}" text-anchor="end">{}</text>')
    return [line.format(LEFT, WIDE - RIGHT, at, at), tick.format(LEFT - 7, at + 3.5, text)]


def scatter(title: str, points: Sequence[Point], x_label: str, y_label: str, flip_y: bool = False) -> Markup:
    """Points with their Pareto front.

    Args:
        title: what the plot shows.
        points: at least one; those ``on_front`` are joined by a line in order of x.
        x_label: of the horizontal axis.
        y_label: of the vertical axis.
        flip_y: draw small y at the top, for figures that are better when small.
    """
    drawings = [_points(points, x_label, y_label, flip_y, width) for width in (WIDTH, PHONE)]
    data = {
        "labels": [point.name for point in points],
        "series": [
            {"name": name, "values": values}
            for name, values in ((x_label, [point.x for point in points]), (y_label, [point.y for point in points]))
        ],
    }
    svg = '<svg class="{}" viewBox="0 0 {:g} {:g}" role="img" aria-label="{}">{}</svg>'
    caption = "<figcaption><span>{}</span></figcaption>"
    return Markup(f'<figure class="chart scatter" data-points="{{}}">{caption}{svg}{svg}</figure>').format(
        json.dumps(data, allow_nan=False),
        title,
        *("for-desk", WIDTH, HEIGHT, title, drawings[0]),
        *("for-phone", PHONE, HEIGHT, title, drawings[1]),
    )


def _points(points: Sequence[Point], x_label: str, y_label: str, flip_y: bool, width: float) -> Markup:
    """What a scatter plot of this width shows: names lie where there is room at this size."""
    x = make_axis([point.x for point in points], LEFT + 14, width - RIGHT - 14, 5 if width == WIDTH else 3)
    top, bottom = (HEIGHT - BOTTOM - 10, TOP + 10) if flip_y else (TOP + 10, HEIGHT - BOTTOM - 10)
    y = make_axis([point.y for point in points], bottom, top, 4)
    drawing = _grid(x, y, x_label, y_label, width)
    front = sorted((point for point in points if point.on_front), key=lambda point: point.x)
    if len(front) > 1:
        corners = "".join(
            f"{'L' if index else 'M'}{x.at(point.x):.1f} {y.at(point.y):.1f}" for index, point in enumerate(front)
        )
        drawing.append(Markup('<path class="front" d="{}"/>').format(corners))
    drawing += _names([(point.name, x.at(point.x), y.at(point.y)) for point in points], width)
    for point in points:
        style = f"dot {point.style}{' on-front' if point.on_front else ''}"
        circle = Markup('<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="6" data-tip="{}"/>').format(
            style, x.at(point.x), y.at(point.y), "\n".join((point.name, *point.details))
        )
        if point.href is not None:
            circle = Markup('<a href="{}">{}</a>').format(point.href, circle)
        drawing.append(circle)
    return Markup("").join(drawing)


LETTER = 7.2
"""Room for a letter of a name, in the drawing's units: what most fonts take at its size, and a little air."""


def _names(points: Sequence[tuple[str, float, float]], room: float) -> list[Markup]:
    """Names beside their points, in a drawing ``room`` wide; where there is none for one, its read-out has it."""
    taken = [(x - 7, y - 7, x + 7, y + 7) for _, x, y in points]
    drawn = []
    for name, x, y in points:
        width = LETTER * len(name)
        beside = ((x + 11, y), (x - 11 - width, y))
        starts = (
            x - width / 2,
            x - 7,
            x + 7 - width,
        )  # above and below
        for left, middle in (*beside, *((start, at) for start in starts for at in (y - 14, y + 15))):
            box = (left, middle - 6, left + width, middle + 6)
            inside = box[0] >= LEFT and box[2] <= room and box[1] >= 0 and box[3] <= HEIGHT - BOTTOM
            if inside and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                text = Markup('<text class="name" x="{:.1f}" y="{:.1f}">{}</text>')
                drawn.append(text.format(left, middle + 4, name))
                break
    return drawn


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def pareto(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which of ``points`` no other dominates; larger is better in both coordinates."""
    return [
        not any(other[0] >= point[0] and other[1] >= point[1] and other != point for other in points)
        for point in points
    ]
