"""The table a run ends with: BF16 and candidate side by side, for a person."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from io import StringIO
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from harness.report import drift
from harness.report.gates import build_table
from harness.report.record import ArmRecord, RunRecord

WIDTH = 100
ABSENT = "-"

Row = tuple[str, str, str, str]
Show = Callable[[float | None], str]
Change = Callable[[float | None, float | None], str]


def _number(digits: int) -> Show:
    def show(value: float | None) -> str:
        return ABSENT if value is None else f"{value:,.{digits}f}"

    return show


def bytes_text(value: float | None) -> str:
    """A size in the largest binary unit that keeps it at least 1."""
    if value is None:
        return ABSENT
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{value:,.0f} {unit}" if unit == "B" else f"{value:,.1f} {unit}"


def _ratio(bf16: float | None, candidate: float | None) -> str:
    if not bf16 or candidate is None:
        return ""
    return f"{candidate / bf16:.2f}x"


def _difference(digits: int) -> Change:
    def show(bf16: float | None, candidate: float | None) -> str:
        return "" if bf16 is None or candidate is None else f"{candidate - bf16:+.{digits}f}"

    return show


def _pick(section: Any, path: str) -> Any:
    """The value at a dotted ``path``; ``None`` where a step of it is ``None``."""
    for key in path.split("."):
        if section is None:
            return None
        section = section[key]
    return section


class _Rows:
    """Builds rows that show the same figure of both arms."""

    def __init__(self, arms: dict[str, Any]) -> None:
        self.bf16 = arms["bf16"]
        self.candidate = arms.get("candidate")

    def row(self, name: str, path: str, show: Show, change: Change) -> Row:
        bf16 = _pick(self.bf16, path)
        if self.candidate is None:
            return name, show(bf16), "", ""
        candidate = _pick(self.candidate, path)
        return name, show(bf16), show(candidate), change(bf16, candidate)


def _arms(record: RunRecord) -> dict[str, Any]:
    return {name: asdict(arm) for name, arm in record.arms.items()}


def _speed_rows(record: RunRecord) -> Iterator[Row]:
    rows, show = _Rows(_arms(record)), _number(2)
    for name, path in (
        ("FPS, pipeline (DiT)", "speed.pipeline_fps"),
        ("FPS, total (with decode)", "speed.total_fps"),
        ("DiT ms/frame, median", "speed.dit_ms.median"),
        ("decoder ms/frame, median", "speed.decoder_ms.median"),
        ("total ms/frame, median", "speed.total_ms.median"),
        ("total ms/frame, p90", "speed.total_ms.p90"),
        ("prefill ms, median", "speed.prefill_ms.median"),
        ("cold start s (compile, warm-up)", "compile.cold_start_s"),
    ):
        yield rows.row(name, path, show, _ratio)
    if rows.bf16["speed"].get("overlapped") is not None:
        yield rows.row("FPS, decoding overlapped", "speed.overlapped.fps", show, _ratio)


def _part_rows(record: RunRecord) -> Iterator[Row]:
    parts = record.arms["bf16"].parts
    if parts is None:
        return
    rows = _Rows(_arms(record))
    yield f"parts ms/frame ({parts['frames']} eager frames)", "", "", ""
    for part in parts["ms"]:
        yield rows.row(f"  {part}", f"parts.ms.{part}.median", _number(3), _ratio)


def _memory_rows(record: RunRecord) -> Iterator[Row]:
    rows = _Rows(_arms(record))
    memory = record.arms["bf16"].memory
    for key, name in (
        ("weight_bytes", "weights"),
        ("kv_window_bytes", "KV window"),
        ("kv_peak_bytes", "KV window and room to read it"),
        ("transient", "transient peak"),
        ("peak_allocated", "peak allocated (both arms in)"),
        ("peak_reserved", "peak reserved (both arms in)"),
    ):
        if memory.get(key) is not None:
            yield rows.row(name, f"memory.{key}", bytes_text, _ratio)
    if memory["peak_allocated"] is None:
        yield "process peak RSS (everything)", bytes_text(memory["process_peak_rss"]), "", ""


def _quality_rows(record: RunRecord) -> Iterator[Row]:
    if record.quality is None:
        return
    sections = {"all clips": record.quality["all"]}
    if len(record.quality["by_tag"]) > 1:
        sections |= record.quality["by_tag"]
    for name, section in sections.items():
        where = f"{name} ({section['clips']})"
        if "bf16" in section:
            rows = _Rows(section)
            yield rows.row(f"PSNR dB, {where}", "psnr", _number(2), _difference(2))
            yield rows.row(f"SSIM, {where}", "ssim", _number(4), _difference(4))
        if "fidelity" in section:
            fidelity, drop = section["fidelity"], section.get("drop")
            shown = f"{fidelity['psnr']:.2f} dB / {fidelity['ssim']:.4f}"
            yield f"fidelity, {where}", "", shown, f"drop {drop['psnr']:+.2f} dB" if drop else ""


def _path_text(arm: ArmRecord) -> str:
    path = arm.numeric_path
    return f"Linears {path['linears']}; KV {path['kv']}; attention {path['attention']}; on {path['architecture']}"


def _compile_text(arm: ArmRecord) -> str:
    found = arm.compile
    graph = ", replayed as one CUDA graph" if found["cuda_graph"] else ""
    count = found.get("packed_linears")  # not in older records
    packed = f"; {count} BF16 Linears by our kernel over packed weights" if count else ""
    return (
        f"Compiled {arm.label}: {found['graphs']} graphs ({found['mode']}{graph}), {found['graph_breaks']} breaks, "
        f"{found['recompiles_after_warmup']} recompiles after warm-up{packed}."
    )


def _numerics_text(numerics: dict[str, Any]) -> str:
    """The worst MX Linear, and each category."""
    name = numerics["worst"]
    layer = numerics["layers"][name]
    shares = ", ".join(
        f"{kind} {_percent(found['rel_mean'])} (at most {_percent(found['rel_max'])})"
        for kind, found in numerics["categories"].items()
    )
    return (
        f"Error of the Linears on real inputs, against float64: {shares}; worst {name}: relative "
        f"{_percent(layer['rel'])}, BF16 alone {_percent(layer['bf16']['rel'])}, MAE {_short(layer['mae'])}, "
        f"max {_short(layer['max'])}."
    )


def _percent(value: float | None) -> str:
    return ABSENT if value is None else f"{100 * value:.2g} %"


def _short(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.2g}"


def _notes(record: RunRecord) -> Iterator[str]:
    for arm in record.arms.values():
        yield f"{arm.label}: {_path_text(arm)}."
    candidate = record.candidate
    if candidate is None:
        yield "The candidate is the baseline (quant=bf16 kv=bf16): one arm ran."
    elif candidate.transform:
        categories = ", ".join(f"{count} {name}" for name, count in candidate.transform["categories"].items())
        kept = f"; {len(candidate.transform['kept_bf16'])} in scope kept BF16" * bool(candidate.transform["kept_bf16"])
        yield f"Linears in MX: {candidate.transform['count']} ({categories}){kept}."
        if candidate.numerics is not None:
            yield _numerics_text(candidate.numerics)
    for arm in record.arms.values():
        if arm.compile["enabled"]:
            yield _compile_text(arm)
    parts = record.arms["bf16"].parts
    if parts:
        yield f"Parts: {parts['method']}."
    if candidate is not None:
        yield "Drop = BF16 - candidate, paired clip by clip; fidelity = candidate against BF16."
    if record.drift is not None:
        yield from drift.sentences(record.drift)
    for fallback in record.fallbacks:
        yield f"Fallback from clip {fallback['clip']} on: {fallback['step']}."
    yield from record.notes
    for incident in record.incidents:
        yield f"Incident: {incident['kind']}: {incident['message']}"


def build(record: RunRecord) -> RenderableType:
    """The table and its notes as something ``rich`` can print."""
    title = f"{record.choices.get('model', 'model')} on {record.data['name']}: {record.data['summary']}"
    if record.status != "complete":
        title += f" ({record.status})"
    table = Table(title=title, title_justify="left")
    table.add_column("")
    candidate = record.candidate
    if candidate is None:
        headings = ["BF16", "", ""]
    else:
        mark = "" if candidate.speed_is_meaningful else " *"
        headings = ["BF16", candidate.label + mark, "candidate / BF16"]
    for heading in headings:
        table.add_column(heading, justify="right")
    sections = (_speed_rows, _part_rows, _memory_rows, _quality_rows)
    for section in sections:
        for row in section(record):
            table.add_row(*row)
        table.add_section()
    notes: list[RenderableType] = [Text(note) for note in _notes(record)]
    if candidate is not None and not candidate.speed_is_meaningful:
        notes.insert(0, Text("* emulated kernel: its speed says nothing about MX on hardware that runs it."))
    if record.gates is not None:
        notes += [build_table(record.gates), *map(Text, record.gates["notes"])]
    return Group(table, *notes)


def render(record: RunRecord) -> str:
    """The table as plain text, for a file."""
    console = Console(file=StringIO(), width=WIDTH, color_system=None)
    console.print(build(record))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.splitlines()) + "\n"
