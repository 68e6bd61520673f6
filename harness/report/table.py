"""The table a run ends with: BF16 and candidate side by side, for a person."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from io import StringIO

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from harness.measure.figures import Appearance, Stats
from harness.measure.trust import distrust
from harness.report import drift
from harness.report import gates as gates_room
from harness.report.record import COMPLETE, RunRecord
from harness.report.sections import ArmRecord, Memory, Numerics
from harness.report.sections.formats import spoken

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


def _median(stats: Stats | None) -> float | None:
    return None if stats is None else stats.median


class _Rows:
    """Builds rows that show the same figure of both arms."""

    def __init__(self, record: RunRecord) -> None:
        self.first, self.candidate = record.first, record.candidate if len(record.arms) == 2 else None

    def row(self, name: str, figure: Callable[[ArmRecord], float | None], show: Show, change: Change) -> Row:
        first = figure(self.first)
        if self.candidate is None:
            return name, show(first), "", ""
        candidate = figure(self.candidate)
        return name, show(first), show(candidate), change(first, candidate)


def _speed_rows(record: RunRecord) -> Iterator[Row]:
    rows, show = _Rows(record), _number(2)
    figures: list[tuple[str, Callable[[ArmRecord], float | None]]] = [
        ("FPS, pipeline (DiT)", lambda arm: arm.speed.pipeline_fps),
        ("FPS, total (with decode)", lambda arm: arm.speed.total_fps),
        ("DiT ms/frame, median", lambda arm: _median(arm.speed.dit_ms)),
        ("decoder ms/frame, median", lambda arm: _median(arm.speed.decoder_ms)),
        ("total ms/frame, median", lambda arm: _median(arm.speed.total_ms)),
        ("total ms/frame, p90", lambda arm: None if arm.speed.total_ms is None else arm.speed.total_ms.p90),
        ("prefill ms, median", lambda arm: _median(arm.speed.prefill_ms)),
        ("cold start s (compile, warm-up)", lambda arm: arm.compile.cold_start_s),
    ]
    if record.first.speed.overlapped is not None:
        figures.append(("FPS, decoding overlapped", _overlapped))
    for name, figure in figures:
        yield rows.row(name, figure, show, _ratio)


def _overlapped(arm: ArmRecord) -> float | None:
    return None if arm.speed.overlapped is None else arm.speed.overlapped.fps


def _part_rows(record: RunRecord) -> Iterator[Row]:
    parts = record.first.parts
    if parts is None:
        return
    rows = _Rows(record)
    yield f"parts ms/frame ({parts.frames} eager frames)", "", "", ""
    for part in parts.ms:
        yield rows.row(f"  {part}", lambda arm, part=part: _part(arm, part), _number(3), _ratio)  # type: ignore[misc]


def _part(arm: ArmRecord, part: str) -> float | None:
    return _median(arm.parts.ms.get(part)) if arm.parts else None


def _memory_rows(record: RunRecord) -> Iterator[Row]:
    rows = _Rows(record)
    figures: list[tuple[str, Callable[[Memory], int | None]]] = [
        ("weights", lambda memory: memory.weight_bytes),
        ("KV window", lambda memory: memory.kv_window_bytes),
        ("KV window and room to read it", lambda memory: memory.kv_peak_bytes),
        ("transient peak", lambda memory: memory.transient),
        ("peak allocated (both arms in)", lambda memory: memory.peak_allocated),
        ("peak reserved (both arms in)", lambda memory: memory.peak_reserved),
    ]
    memory = record.first.memory
    for name, figure in figures:
        if figure(memory) is not None:
            yield rows.row(name, lambda arm, figure=figure: figure(arm.memory), bytes_text, _ratio)  # type: ignore[misc]
    if memory.peak_allocated is None:
        yield "process peak RSS (everything)", bytes_text(memory.process_peak_rss), "", ""


def _quality_rows(record: RunRecord) -> Iterator[Row]:
    if record.quality is None:
        return
    sections = {"all clips": record.quality.all}
    if len(record.quality.by_tag) > 1:
        sections |= record.quality.by_tag
    for name, section in sections.items():
        where = f"{name} ({section.clips})"
        drop = section.drop
        first = section.bf16 if "bf16" in record.arms else section.candidate
        second = section.candidate if len(record.arms) == 2 else None
        if first is not None:
            for metric, digits, ours, theirs in (
                ("PSNR dB", 2, first.psnr, None if second is None else second.psnr),
                ("SSIM", 4, first.ssim, None if second is None else second.ssim),
            ):
                show, change = _number(digits), _difference(digits)
                shown = show(theirs) if len(record.arms) == 2 else ""
                yield f"{metric}, {where}", show(ours), shown, change(ours, theirs)
        yield from _appearance_rows(section.appearance, where)
        if section.fidelity is not None:
            shown = f"{section.fidelity.psnr:.2f} dB / {section.fidelity.ssim:.4f}"
            yield f"fidelity, {where}", "", shown, f"drop {drop.psnr:+.2f} dB" if drop else ""


def _appearance_rows(looks: dict[str, Appearance], where: str) -> Iterator[Row]:
    """What PSNR hides; see :mod:`harness.measure.appearance`."""
    first, second = ("bf16", "candidate") if "bf16" in looks else ("candidate", "")
    if first not in looks:
        return
    for metric, name, digits in (
        ("sharpness", "sharpness", 3),
        ("texture distance", "texture", 2),
        ("action fidelity", "action_fidelity", 3),
    ):
        ours, show = getattr(looks[first], name), _number(digits)
        if ours is None:
            continue
        theirs = getattr(looks[second], name) if second in looks else None
        shown = show(theirs) if second in looks else ""
        yield f"{metric}, {where}", show(ours), shown, _difference(digits)(ours, theirs)


def _path_text(arm: ArmRecord) -> str:
    path = arm.numeric_path
    return f"Linears {path.linears}; KV {path.kv}; attention {path.attention}; on {path.architecture}"


def _compile_text(arm: ArmRecord) -> str:
    found = arm.compile
    graph = ", replayed as one CUDA graph" if found.cuda_graph else ""
    count = found.packed_linears
    packed = f"; {count} BF16 Linears by our kernel over packed weights" if count else ""
    made = f"{found.graphs} graphs" if found.graphs else "nothing but kernels of ours"
    return (
        f"Compiled {arm.label}: {made} ({found.mode}{graph}), {found.graph_breaks} breaks, "
        f"{found.recompiles_after_warmup} recompiles after warm-up{packed}."
    )


def _numerics_text(numerics: Numerics) -> str:
    """The worst MX Linear, and each category."""
    layer = numerics.layers[numerics.worst]
    shares = ", ".join(
        f"{spoken(kind)} {_percent(found.rel_mean)} (at most {_percent(found.rel_max)})"
        for kind, found in numerics.categories.items()
    )
    return (
        f"Error of the Linears on real inputs, against float64: {shares}; worst {numerics.worst}: relative "
        f"{_percent(layer.rel)}, BF16 alone {_percent(layer.bf16.rel)}, MAE {_short(layer.mae)}, "
        f"max {_short(layer.max)}."
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
        transform = candidate.transform
        categories = ", ".join(f"{count} {spoken(name)}" for name, count in transform.categories.items())
        kept = f"; {len(transform.kept_bf16)} in scope kept BF16" * bool(transform.kept_bf16)
        yield f"Linears in MX: {transform.count} ({categories}){kept}."
        if candidate.numerics is not None:
            yield _numerics_text(candidate.numerics)
    for arm in record.arms.values():
        if arm.compile.enabled:
            yield _compile_text(arm)
    parts = record.first.parts
    if parts:
        yield f"Parts: {parts.method}."
    if candidate is not None and len(record.arms) == 2:
        yield "Drop = BF16 - candidate, paired clip by clip; fidelity = candidate against BF16."
    if record.drift is not None:
        yield from drift.sentences(record.drift)
    for fallback in record.fallbacks:
        yield f"Fallback from clip {fallback.clip} on: {fallback.step}."
    yield from record.notes
    yield from distrust({name: arm.speed for name, arm in record.arms.items()})
    for said, times in Counter(f"{incident.kind}: {incident.message}" for incident in record.incidents).items():
        yield f"Incident: {said}" + (f" ({times} times)" if times > 1 else "")


def _attempted(name: str, rows: Callable[[], Iterable[tuple[str, ...]]]) -> Iterator[tuple[str, ...]]:
    """Rows up to one that cannot be made, and then why: the table's other parts are wanted whatever is wrong."""
    try:
        yield from rows()
    except Exception as error:
        yield (f"{name} could not be shown: {type(error).__name__}: {error}",)


def headline(record: RunRecord) -> list[RenderableType]:
    """The first lines: the verdict and why, in one sentence, and the next command."""
    if record.gates is not None:
        return [
            Text(gates_room.verdict_line(record.gates), style="bold"),
            # A command to paste stays in one line, however long.
            *(Text(line, no_wrap=True, overflow="ignore") for line in gates_room.next_lines(record.gates)),
        ]
    if record.status != COMPLETE:
        return [Text(f"No verdict: the run is {record.status}.", style="bold")]
    return []


def build(record: RunRecord) -> RenderableType:
    """The verdict, the table and its notes as something ``rich`` can print."""
    title = f"{record.choices.get('model', 'model')} on {record.data.name}: {record.data.summary}"
    if record.status != "complete":
        title += f" ({record.status})"
    table = Table(title=Text(title), title_justify="left")
    table.add_column("")
    candidate = record.candidate
    headings = [arm.label + ("" if arm.speed_is_meaningful else " *") for arm in record.arms.values()]
    if len(headings) == 2:
        headings.append("candidate / BF16")
    for heading in headings:
        table.add_column(Text(heading), justify="right")
    sections = {"speed": _speed_rows, "parts": _part_rows, "memory": _memory_rows, "quality": _quality_rows}
    for name, section in sections.items():
        for row in _attempted(name, lambda section=section: section(record)):  # type: ignore[misc]
            table.add_row(*map(Text, row[: len(headings) + 1]))
        table.add_section()
    notes: list[RenderableType] = [Text(row[0]) for row in _attempted("notes", lambda: ((n,) for n in _notes(record)))]
    if candidate is not None and not candidate.speed_is_meaningful:
        notes.insert(0, Text("* emulated kernel: its speed says nothing about MX on hardware that runs it."))
    if record.gates is not None:
        notes += [gates_room.build_table(record.gates), *map(Text, record.gates.notes)]
    return Group(*headline(record), table, *notes)


def render(record: RunRecord) -> str:
    """The table as plain text, for a file."""
    console = Console(file=StringIO(), width=WIDTH, color_system=None)
    console.print(build(record), crop=False)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.splitlines()) + "\n"
