"""What the benchmark of rollouts measures, one row an arm, and what a row gave."""

from __future__ import annotations

import argparse
import itertools
import re
from dataclasses import dataclass, field
from typing import Any

from harness.bench.inputs import compose_plan
from harness.config import RunPlan

FORMATS = (("bf16", "bf16"), ("mxfp8_all", "mx_v_only"), ("mxfp8_all", "mx_kv"), ("mxfp4_all", "mx_v_only"))
"""(quant, kv) config groups."""


NAMED = ("model", "quant", "kv", "attention", "compile", "compile.linears", "trainer", "data.batch_size")
"""What a row sets, and no override may."""


COLUMNS = (
    "row", "DiT ms", "p10–p90", "of BF16", "floor ms", "decoder ms", "FPS", "FPS overlapped", "weights MB", "cache MB",
    "run MB",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One arm: config groups by name, the number of clips, and what multiplies BF16 Linears (compile.linears)."""

    model: str
    batch: int
    quant: str
    kv: str
    attention: str
    linears: str = "auto"

    @property
    def name(self) -> str:
        """How the row is named in results and in --match."""
        linears = "" if self.linears == "auto" else f"/{self.linears}"
        return f"{self.model}/B{self.batch}/{self.quant}+{self.kv}/{self.attention}{linears}"


@dataclass
class Result:
    """What a row gave; ``failed`` holds the reason if it gave nothing. Times in ms, sizes in bytes."""

    row: str
    failed: str | None = None
    setup_s: float | None = None
    numeric_path: str | None = None
    emulated: bool = False
    dit: dict[str, float] | None = None
    decoder: dict[str, float] | None = None
    fps: float | None = None
    fps_overlapped: float | None = None
    of_bf16: float | None = None
    floor_ms: float | None = None
    prefill_ms: float | None = None
    host_us: float | None = None
    decoder_floor_ms: float | None = None
    weight_bytes: int | None = None
    cache_bytes: int | None = None
    run_bytes: int | None = None
    clips: int = 1
    extra: dict[str, Any] = field(default_factory=dict)


def all_rows(args: argparse.Namespace) -> list[Row]:
    """Rows grouped by model and batch; BF16 first, since the others are compared with it.

    On a GPU BF16 with our attention is measured with each kind of Linears, whichever ``auto`` would take: what MX gains
    is told against the fastest.
    """
    product = itertools.product(args.models.split(","), args.batches, FORMATS, args.attention.split(","))
    rows = []
    for model, batch, formats, attention in product:
        both = formats == ("bf16", "bf16") and attention == "fused" and args.device == "cuda"
        rows += [
            Row(model, batch, *formats, attention, linears)
            for linears in (("library", "packed") if both else ("auto",))
        ]
    return [row for row in rows if re.search(args.match, row.name)]


def plan_of(row: Row, args: argparse.Namespace) -> RunPlan:
    """The checked config of a row."""
    groups = {"model": row.model, "quant": row.quant, "kv": row.kv, "attention": row.attention, "compile": args.compile}
    groups |= {"trainer": "gpu" if args.device == "cuda" else "cpu", "data.batch_size": str(row.batch)}
    groups |= {"compile.linears": row.linears}
    return compose_plan([*(f"{name}={value}" for name, value in groups.items()), *args.overrides], args.out)


def line(result: Result) -> str:
    """A row of the table, without the outer bars."""
    if result.failed is not None or result.dit is None or result.decoder is None:
        return f"{result.row} | failed: {result.failed} " + "| " * (len(COLUMNS) - 2)
    dit = result.dit

    def number(value: float | None, digits: int, unit: float = 1.0) -> str:
        return "–" if value is None else f"{value / unit:.{digits}f}"

    cells = (
        result.row + (" (emulated)" if result.emulated else ""),
        number(dit["median"], 3),
        f"{dit['p10']:.3f}–{dit['p90']:.3f}",
        number(result.of_bf16, 2),
        number(result.floor_ms, 3),
        number(result.decoder["median"], 3),
        number(result.fps, 0),
        number(result.fps_overlapped, 0),
        *(number(size, 0, 1e6) for size in (result.weight_bytes, result.cache_bytes, result.run_bytes)),
    )
    return " | ".join(cells)
