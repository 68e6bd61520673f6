"""Time the parts of one frame by themselves: every Linear with every kernel, attention over the ring, cache updates.

    python scripts/microbench.py                                   # dit_v4 on the GPU
    python scripts/microbench.py --model dit_v4_5b --only linear --formats W8A16 W4A16
    python scripts/microbench.py --tune --only linear              # prints entries for the kernels' files in tuned/
    python scripts/microbench.py --tune --only linear --kernels cuda --products qkv mlp
    python scripts/microbench.py --model smoke --device cpu --seconds 20

Every kernel is checked against the product of the decoded operands before it is timed. Several copies of a weight, more
than the L2 cache holds, take turns, so that weights come from memory as they do in a frame. On a GPU all copies run in
one CUDA graph that is replayed; a figure is the median replay divided by the copies. ``floor`` is the time that weight,
input and output need at the bandwidth of a device copy measured first. Rows that the time limit leaves out say so.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict

import torch
from rich.console import Console
from rich.table import Table

from harness.bench import arguments
from harness.bench.inputs import read_model
from harness.bench.linears import bench_product, products
from harness.bench.measuring import Bench, OutOfTimeError
from harness.bench.rings import bench_attention, bench_kv
from harness.measure.environment import environment
from harness.models.gamerft import GameRFTConfig
from harness.streams import patient


def run_all(bench: Bench, args: argparse.Namespace, arch: GameRFTConfig, window: int) -> None:
    """Measure what was asked for into ``bench.rows``."""
    bench.measure_bandwidth()
    for batch in args.batch:
        for product in products(arch, batch) if "linear" in args.only else []:
            if not args.products or any(part in product.name for part in args.products):
                bench.check_time()
                bench_product(bench, product, args.formats, args.kernels, args.tune)
        if "attention" in args.only:
            bench_attention(bench, arch, window, batch)
        if "kv" in args.only:
            bench_kv(bench, arch, window, batch)


def report(bench: Bench, console: Console) -> None:
    """Print the table, and notes below it."""
    table = Table(title=f"copy bandwidth {bench.bandwidth:.0f} GB/s, times in µs per call")
    columns = ("name", "shape", "variant", "median", "p90", "of BF16", "floor", "× floor", "GB/s", "error")
    for column in columns:
        table.add_column(column, justify="left" if column in columns[:3] else "right")
    previous = ""
    for row in bench.rows:
        if row.us is None:
            table.add_row(row.name, row.shape, row.variant, row.note.split(";")[0][:24], *[""] * 6)
            continue
        ratios = (row.of_bf16, row.floor_us, row.us / row.floor_us if row.floor_us else None)
        figures = [f"{row.us:.2f}", f"{row.p90:.2f}", *("" if r is None else f"{r:.2f}" for r in ratios)]
        figures += ["" if row.gb_s is None else f"{row.gb_s:.0f}", "" if row.error is None else f"{row.error:.1e}"]
        if row.name != previous:
            table.add_section()
        previous = row.name
        table.add_row(row.name, row.shape, row.variant, *figures)
    console.print(table)
    for row in bench.rows:
        if row.note and row.us is not None:
            console.print(f"{row.name}, {row.variant}: {row.note}", markup=False, soft_wrap=True, highlight=False)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command's arguments; ends with exit code 2 where they make no sense here."""
    parser = arguments.micro()
    args = parser.parse_args(argv)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA GPU here; use --device cpu")
    if args.iterations < 1 or args.warmup < 0 or min(args.batch) < 1:
        parser.error("--iterations and --batch must be at least 1, --warmup at least 0")
    return args


@patient
@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write; 1 if a kernel's product was wrong."""
    args = parse(argv)
    console = Console(width=None if sys.stdout.isatty() else 160)
    torch.manual_seed(0)
    arch, window = read_model(args.model)
    bench = Bench(torch.device(args.device), args.iterations, args.warmup, time.perf_counter() + args.seconds)
    complete = True
    try:
        run_all(bench, args, arch, window)
    except OutOfTimeError:
        complete = False
        if bench.rows and bench.rows[-1].us is None:
            bench.rows[-1].note = "out of time"
    report(bench, console)
    if not complete:
        console.print(f"The rest was not measured: {args.seconds:.0f} s are over (--seconds).")
    if args.json:
        rows = [asdict(row) for row in bench.rows]
        figures = {"environment": environment(bench.device), "model": args.model, "complete": complete}
        args.json.write_text(
            json.dumps({**figures, "copy_gb_s": bench.bandwidth, "rows": rows, "tried": bench.tried}, indent=1)
        )
    return 1 if any("WRONG" in row.note for row in bench.rows) else 0


if __name__ == "__main__":
    sys.exit(main())
