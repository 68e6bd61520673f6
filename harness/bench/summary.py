"""Everything that says how fast this is, from one command: Linears, attention, whole frames, decoder, memory.

    python scripts/bench_summary.py                       # about six minutes on one GPU
    python scripts/bench_summary.py --models dit_v4       # without the 5 B model

Runs scripts/microbench.py, bench_attention.py and bench_rollout.py one after the other, each in a process of its own,
and puts what they measured into one table: OUT/summary.md, beside their own files. Ratios are within one run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness.bench import rollout
from harness.bench.child import child
from harness.entries import command_parser, count, output_folder
from harness.streams import patient

LINEARS = {"dit_v4": ("mlp.fc1", "1536→6144"), "dit_v4_5b": ("mlp.fc1", "2560→10240")}
"""One Linear of each model by its name in microbench, and its size."""

ROWS = r"/B1/(bf16\+bf16|mxfp[48]_all\+mx_v_only)/fused"
MAIN_ROWS = r"/B1/(bf16\+bf16/sdpa|mxfp8_all\+mx_kv/fused)"
"""Rows of bench_rollout: of every model, and more of the main one."""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command's arguments."""
    parser = command_parser(__doc__)
    parser.add_argument("--models", nargs="+", default=list(LINEARS), help="model configs; the first is the main one")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--frames", type=count, default=200, help="timed frames of each rollout")
    parser.add_argument("--window", type=count, default=60, help="frames that attention is timed over")
    parser.add_argument("--out", type=output_folder, default="outputs/bench")
    parser.add_argument("overrides", nargs="*", help="further config overrides of the rollouts")
    return parser.parse_args(argv)


def jobs(args: argparse.Namespace) -> dict[str, list[str]]:
    """Each result file, and the module of this room with the words that write it."""
    device = ["--device", args.device]
    found = {}
    for model in args.models:
        name = LINEARS.get(model, ("mlp.fc1",))[0]
        linear = ["--model", model, "--only", "linear", "--products", name, "--formats", "W8A16", "W4A16"]
        file = args.out / f"linear_{model}.json"
        found[file.name] = ["micro", *device, *linear, "--json", str(file)]
    file = args.out / "attention.json"
    attention = ["--frames", str(args.window), "--kinds", "flex,sdpa,fused", "--storages", "bf16,mx_v_only,mx_kv"]
    found[file.name] = ["attention", *device, *attention, "--out", str(file)]
    rows = f"{ROWS}|{args.models[0]}{MAIN_ROWS}"
    rollouts = ["--models", ",".join(args.models), "--batches", "1", "--frames", str(args.frames), "--match", rows]
    compile = [] if args.device == "cuda" else ["--compile", "off"]
    found["bench.json"] = ["rollout", *device, *rollouts, *compile, "--out", str(args.out), *args.overrides]
    return found


def run(args: argparse.Namespace) -> bool:
    """Run every job; whether all ended well."""
    well = True
    args.out.mkdir(parents=True, exist_ok=True)
    for file, command in jobs(args).items():
        (args.out / file).unlink(missing_ok=True)  # never report an older run's figures
        print(f"== python -m harness.bench.{' '.join(command)}", flush=True)
        done = subprocess.run(**child(*command), check=False)
        well &= done.returncode == 0
    return well


def read(path: Path) -> list[dict[str, Any]]:
    """Rows of a result file; none if its job wrote none."""
    return json.loads(path.read_text())["rows"] if path.is_file() else []


def number(value: float | None, digits: int = 2, unit: str = "") -> str:
    """A figure as text, a dash where there is none."""
    return "–" if value is None else f"{value:.{digits}f}{unit}"


def ratio(value: float | None, base: float | None) -> float | None:
    """``value / base``, where there are both."""
    return None if value is None or not base else value / base


def rollout_rows(rows: list[dict[str, Any]], models: list[str]) -> Iterator[tuple[str, str]]:
    """Figures of whole frames: every row against the fastest BF16 one of its model."""
    for model in models:
        mine = {row["row"].split("/", 2)[2]: row for row in rows if row["row"].startswith(f"{model}/B1/")}
        measured = {name: row for name, row in mine.items() if row["dit"]}
        plain = [row["dit"]["median"] for name, row in measured.items() if name.startswith("bf16+bf16/")]
        for name, row in mine.items():
            if name not in measured:
                yield f"DiT, `{model}`, {name}", f"failed: {row['failed']}"
                continue
            ms, mark = row["dit"]["median"], " (emulated)" if row["emulated"] else ""
            share = "" if not plain else f", {ms / min(plain):.2f}× of BF16"
            above = f", {ms / row['floor_ms']:.1f}× its floor of {row['floor_ms']:.2f}"
            yield f"DiT, `{model}`, {name}", f"{ms:.2f} ms a frame{share}{above}{mark}"
        for name, row in measured.items():
            host = "" if row["host_us"] is None else f"; {row['host_us']:.0f} µs of a frame are the host's"
            yield f"prefill, `{model}`, {name}", f"{row['prefill_ms']:.1f} ms{host}"
        for name, row in measured.items():
            fps = f"{row['fps']:.0f}, overlapped {number(row['fps_overlapped'], 0)}"
            yield f"FPS with decoding, `{model}`, {name}", fps
        if measured:
            row = next(iter(measured.values()))
            decoder, floor = row["decoder"]["median"], row["decoder_floor_ms"]
            yield f"decoder, `{model}`", f"{decoder:.2f} ms, {decoder / floor:.1f}× its floor of {floor:.2f}"
        for name, row in measured.items():
            sizes = (row[key] for key in ("weight_bytes", "cache_bytes", "run_bytes"))
            weights, cache, peak = (number(size and size / 1e6, 0) for size in sizes)
            yield (
                f"memory, `{model}`, {name}",
                f"weights {weights} MB, cache {cache} MB, cache and a frame's peak {peak} MB",
            )


def linear_rows(rows: list[dict[str, Any]], model: str) -> Iterator[tuple[str, str]]:
    """Speed of one Linear against torch's BF16."""
    plain = next((row["us"] for row in rows if row["variant"] == "torch BF16"), None)
    for row in rows:
        speed = ratio(plain, row["us"])
        text = f"{number(row['us'])} µs, {number(speed)}× the speed of BF16, floor {number(row['floor_us'])} µs"
        yield f"Linear {row['shape']}, `{model}`, {row['variant']}", text


def attention_rows(rows: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """A layer's attention against FlexAttention over BF16."""
    flex = next((row.get("us") for row in rows if row["attention"] == "flex"), None)
    for row in rows:
        speed = ratio(flex, row.get("us"))
        times = f"{number(row.get('us'), 1)} µs, {number(speed, 1)}× the speed of FlexAttention on BF16"
        text = row.get("failed") or times
        yield f"attention over {row.get('frames', '?')} frames, {row['attention']}, ring {row['storage']}", text


def summary(args: argparse.Namespace) -> str:
    """The table, as Markdown."""
    lines = list(rollout_rows(read(args.out / "bench.json"), args.models))
    for model in args.models:
        lines += linear_rows(read(args.out / f"linear_{model}.json"), model)
    lines += attention_rows(read(args.out / "attention.json"))
    return "".join(f"| {name} | {text} |\n" for name, text in [("what", "measured"), ("---", "---"), *lines])


@patient
def main(argv: list[str] | None = None) -> int:
    """Run, print, write; 1 if a job or one of its rows failed."""
    args = parse(argv)
    rollout.parse(jobs(args)["bench.json"][1:])  # ends here if it would only end after minutes
    well = run(args)
    table = summary(args)
    (args.out / "summary.md").write_text(table)
    print(table)
    return int(not well)


if __name__ == "__main__":
    sys.exit(main())
