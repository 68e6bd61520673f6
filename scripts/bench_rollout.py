#!/usr/bin/env python3
"""Measure rollouts side by side: formats, attention and batch sizes on one machine in one process.

    python scripts/bench_rollout.py                                  # dit_v4, everything
    python scripts/bench_rollout.py --models dit_v4_5b --match 'B1/.*/fused'
    python scripts/bench_rollout.py --models smoke --device cpu --compile off --frames 4

Weights are random (seeded): speed is real, quality is not. Arms of one model and batch size stand ready together and
take turns frame by frame, so that ratios see the same machine. A time is a CUDA event's, around work that is waited
for after every frame; figures are medians over all frames. Every row's result is in OUT/bench.json as soon as it is
known, OUT/bench.md holds the table.
"""

from __future__ import annotations

import argparse
import copy
import gc
import itertools
import json
import re
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from harness.config import RunPlan, plan_run, register
from harness.config.compose import compose
from harness.measure.environment import environment
from harness.measure.figures import summarise
from harness.measure.memory import PeakProbe, module_bytes
from harness.measure.timing import FrameTimer
from harness.models.dcae import DCAEDecoder
from harness.models.gamerft import GameRFTCore
from harness.rollout import LatentDecoder, OverlappedDecoding, Rollout, assemble

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


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="dit_v4", help="comma-separated configs of conf/model")
    parser.add_argument("--batches", default="1,4,16", help="comma-separated numbers of clips")
    parser.add_argument("--attention", default="sdpa,flex,fused", help="comma-separated configs of conf/attention")
    # Not --only: Inductor takes the value of an option of that name into the names of its kernels.
    parser.add_argument("--match", default="", help="regular expression; rows whose name it finds are measured")
    parser.add_argument("--compile", default="on", help="config of conf/compile")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--frames", type=int, default=200, help="timed frames of each row")
    parser.add_argument("--limit", type=float, default=240.0, help="seconds that setting up one row may take")
    parser.add_argument("--total", type=float, default=1e9, help="seconds after which no further group begins")
    parser.add_argument("--bandwidth", type=float, default=4.0, help="TB/s that the floor assumes")
    parser.add_argument("--out", type=Path, default=Path("outputs/bench"))
    parser.add_argument("overrides", nargs="*", help="further overrides of every row's config")
    args = parser.parse_args(argv)
    if args.frames < 1:
        parser.error("--frames: at least 1")
    for override in args.overrides:
        if override.split("=")[0].lstrip("+~") in NAMED:
            parser.error(
                f"{override}: rows are named by this and set it; choose rows with --models, --batches, --match"
            )
    return args


def all_rows(args: argparse.Namespace) -> list[Row]:
    """Rows grouped by model and batch; BF16 first, since the others are compared with it.

    On a GPU BF16 with our attention is measured with each kind of Linears, whichever ``auto`` would take: what MX gains
    is told against the fastest.
    """
    batches = [int(batch) for batch in args.batches.split(",")]
    product = itertools.product(args.models.split(","), batches, FORMATS, args.attention.split(","))
    rows = []
    for model, batch, formats, attention in product:
        both = formats == ("bf16", "bf16") and attention == "fused" and args.device == "cuda"
        rows += [Row(model, batch, *formats, attention, way) for way in (("library", "packed") if both else ("auto",))]
    return [row for row in rows if re.search(args.match, row.name)]


def compose_plan(overrides: list[str], out: Path) -> RunPlan:
    """The checked config that ``overrides`` of ``conf/run.yaml`` give."""
    return plan_run(compose(*overrides, folder=out))


def plan_of(row: Row, args: argparse.Namespace) -> RunPlan:
    """The checked config of a row."""
    groups = {"model": row.model, "quant": row.quant, "kv": row.kv, "attention": row.attention, "compile": args.compile}
    groups |= {"trainer": "gpu" if args.device == "cuda" else "cpu", "data.batch_size": str(row.batch)}
    groups |= {"compile.linears": row.linears}
    return compose_plan([*(f"{name}={value}" for name, value in groups.items()), *args.overrides], args.out)


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise ``TimeoutError`` in this thread after ``seconds``."""

    def expire(*_: object) -> None:
        raise TimeoutError(f"not ready within {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def build(module: Callable[[], Any], plan: RunPlan) -> Any:
    """A BF16 module with seeded random weights, made on the device."""
    torch.manual_seed(plan.conf.seed)
    with torch.device(plan.device):
        built = module().eval().requires_grad_(False)
    for parameter in built.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    return built


def random_inputs(plan: RunPlan, batch: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """(history, mouse, btn, noise) of a prefill and (noise, mouse, btn) of a frame, on the device."""
    arch, window, device = plan.arch, plan.conf.sampler.window, plan.device
    latent = (arch.channels, arch.sample_size, arch.sample_size)

    def controls(*shape: int) -> tuple[Tensor, Tensor]:
        return torch.randn(*shape, 2, device=device), (torch.rand(*shape, arch.n_buttons, device=device) > 0.5).float()

    past, now = controls(batch, window), controls(batch)
    history, noise = (torch.randn(batch, window, *latent, device=device) for _ in range(2))
    return (history, *past, noise), (torch.randn(batch, *latent, device=device), *now)


def floor_ms(rollout: Rollout, bandwidth: float) -> float:
    """Least time to read what a frame reads: the blocks' weights and the cache at each step, modulation once."""
    steps = len(rollout.sampler.timesteps)
    each_step = rollout.cache.nbytes().allocated
    once = 0
    for _, _, spec, linear in rollout.core.linears():
        if spec.per_frame:
            # Where these are stacked their weights are views of one storage: count parameters, not storages.
            once += sum(x.nbytes for x in (*linear.parameters(), *linear.buffers()))
        else:
            each_step += module_bytes(linear)
    return (steps * each_step + once) / (bandwidth * 1e9)


def decoder_floor_ms(plan: RunPlan, bandwidth: float) -> float:
    """Least time for every convolution of the decoder to read its input and weight and write its output, once a frame.

    What stands between convolutions counts as fused with them.
    """
    moved = 0

    def count(conv: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal moved
        moved += sum(x.numel() for x in (*inputs, output, *conv.parameters()))

    arch = plan.arch
    with torch.device("meta"), torch.no_grad():
        decoder = DCAEDecoder(plan.dcae)
        for module in decoder.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(count)
        decoder(torch.empty(plan.conf.data.batch_size, arch.channels, arch.sample_size, arch.sample_size))
    return moved * plan.conf.decoder.dtype_on(plan.device).itemsize / (bandwidth * 1e9)


class Stand:
    """An arm that stands ready: set up, warm and prefilled."""

    def __init__(self, row: Row, plan: RunPlan, core: GameRFTCore, decode: Callable[[Tensor], Tensor]) -> None:
        start = time.perf_counter()
        self.plan, self.decode = plan, decode
        assembled = assemble(copy.deepcopy(core), plan.conf.quant, plan.conf.kv, plan.setup)
        self.rollout, summary = assembled.rollout, assembled.summary
        self.context, self.frame = random_inputs(plan, row.batch)
        self.rollout.prefill(*self.context)
        self.timer = FrameTimer(plan.device, ("dit", "decoder"))
        self.probe = PeakProbe(plan.device)
        self.result = Result(row.name, clips=row.batch, numeric_path=summary.numeric_path, emulated=summary.emulated)
        self.result.weight_bytes = assembled.weight_bytes
        self.result.cache_bytes = assembled.cache.nbytes().allocated
        self.result.run_bytes = assembled.allocated_bytes
        warmup = assembled.warmup._asdict()
        self.result.extra = {"warmup": warmup, "kernel": summary.kernel, "packed": assembled.packed}
        self.result.setup_s = time.perf_counter() - start

    def play(self, frames: int) -> None:
        """Time ``frames`` frames, each waited for."""
        with self.probe:
            for _ in range(frames):
                self.timer.start()
                latent = self.rollout.next_frame(*self.frame)
                self.timer.lap()
                self.decode(latent)
                self.timer.lap()

    def overlapped_fps(self, frames: int) -> float | None:
        """Frames per second of all clips when decoding overlaps with the next frame; None on a CPU."""
        if self.plan.device.type != "cuda":
            return None
        pipeline = OverlappedDecoding(self.rollout, self.decode)
        for timed in (False, True):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(frames if timed else 5):
                pipeline.next_frame(*self.frame)
            torch.cuda.synchronize()
        return frames * self.result.clips / (time.perf_counter() - start)

    def _prefill_ms(self, runs: int = 5) -> float:
        """Median ms of a prefill, waited for."""
        timer = FrameTimer(self.plan.device, ("prefill",))
        for _ in range(runs):
            timer.start()
            self.rollout.prefill(*self.context)
            timer.lap()
        return statistics.median(row["prefill"] for row in timer.rows)

    def _host_us(self, runs: int = 50) -> float:
        """What a frame takes beyond its graph's replay, in µs: medians of both, which take turns."""
        graph = self.rollout.graph
        assert graph is not None, "nothing was captured"
        frame, replay = (FrameTimer(self.plan.device, ("ms",)) for _ in range(2))
        for _ in range(runs):
            for timer, run in ((frame, partial(self.rollout.next_frame, *self.frame)), (replay, graph.replay)):
                timer.start()
                run()
                timer.lap()
        whole, graphs = (statistics.median(row["ms"] for row in timer.rows) for timer in (frame, replay))
        return 1e3 * (whole - graphs)

    def finish(self, bandwidth: float, frames: int) -> Result:
        """Fill the result in."""
        columns = {part: summarise([row[part] for row in self.timer.rows]) for part in ("dit", "decoder", "total")}
        dit, decoder, total = columns["dit"], columns["decoder"], columns["total"]
        assert dit is not None
        assert decoder is not None
        assert total is not None
        result = self.result
        result.dit, result.decoder = asdict(dit), asdict(decoder)
        result.fps = 1e3 * result.clips / total.median
        result.fps_overlapped = self.overlapped_fps(frames)
        result.floor_ms = floor_ms(self.rollout, bandwidth)
        result.prefill_ms = self._prefill_ms()
        if self.rollout.graph is not None:
            result.host_us = self._host_us()
        transient = self.probe.result().transient
        if result.run_bytes is not None and transient is not None:
            result.run_bytes += transient
        return result


class Bench:
    """Measures groups of rows and writes down what is known after each."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.results: list[Result] = []
        self._core: tuple[str, GameRFTCore] | None = None

    def run(self, rows: list[Row]) -> None:
        """Measure ``rows``, those of one model and batch together."""
        started = time.monotonic()
        for (model, batch), group in itertools.groupby(rows, key=lambda row: (row.model, row.batch)):
            if time.monotonic() - started > self.args.total:
                self.results += [Result(row.name, failed="no time left (--total)") for row in group]
            else:
                print(f"== {model}, {batch} clips", flush=True)
                self._group(list(group))
            self.write()

    def _group(self, rows: list[Row]) -> None:
        decoder: Callable[[Tensor], Tensor] | None = None
        stands = []
        for row in rows:
            try:
                with time_limit(self.args.limit):
                    plan = plan_of(row, self.args)
                    core = self._shared_core(row, plan)
                    decoder = decoder or self._decoder(plan)
                    stands.append(Stand(row, plan, core, decoder))
                print(f"{row.name}: ready after {stands[-1].result.setup_s:.1f} s", flush=True)
            except Exception as error:  # whatever stops one row is that row's result; the others still count
                self._fail(Result(row.name), error)
        ready = self._play(stands)
        baseline = min(
            (stand.result.dit["median"] for stand in ready if "/bf16+bf16/" in stand.result.row and stand.result.dit),
            default=None,
        )
        decoder_floor = decoder_floor_ms(ready[0].plan, self.args.bandwidth) if ready else None
        for stand in ready:
            stand.result.decoder_floor_ms = decoder_floor
            if baseline is not None and stand.result.dit is not None:
                stand.result.of_bf16 = stand.result.dit["median"] / baseline
            self.results.append(stand.result)
            print(line(stand.result), flush=True)
        stands.clear()
        ready.clear()
        gc.collect()
        if self.args.device == "cuda":
            torch.cuda.empty_cache()

    def _play(self, stands: list[Stand]) -> list[Stand]:
        """Let the arms take turns of a few frames until each has its number; those that fail drop out."""
        turn = max(1, self.args.frames // 20)
        playing = list(stands)
        for first in range(0, self.args.frames, turn):
            frames = min(turn, self.args.frames - first)
            for stand in list(playing):
                self._attempt(stand, playing, partial(stand.play, frames))
        for stand in list(playing):
            self._attempt(stand, playing, partial(stand.finish, self.args.bandwidth, self.args.frames))
        return playing

    def _attempt(self, stand: Stand, playing: list[Stand], action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:  # as above
            playing.remove(stand)
            self._fail(stand.result, error)

    def _fail(self, result: Result, error: Exception) -> None:
        first = str(error).strip().splitlines()
        result.failed = f"{type(error).__name__}: {first[0][:300] if first else ''}"
        self.results.append(result)
        print(f"{result.row}: FAILED {result.failed}", flush=True)

    def _shared_core(self, row: Row, plan: RunPlan) -> GameRFTCore:
        """The model's weights, made once; arms that change them take a copy."""
        if self._core is None or self._core[0] != row.model:
            self._core = None
            self._core = (row.model, build(lambda: GameRFTCore(plan.arch), plan))
        return self._core[1]

    def _decoder(self, plan: RunPlan) -> Callable[[Tensor], Tensor]:
        start = time.perf_counter()
        conf = plan.conf.decoder
        module = build(lambda: DCAEDecoder(plan.dcae), plan)
        decode = LatentDecoder(module, plan.vae_scale, conf.dtype_on(plan.device), plan.conf.compile, conf.groups)
        (_, _, _, noise), _ = random_inputs(plan, plan.setup.batch)
        decode.warmup(noise[:, 0])
        print(f"decoder: ready after {time.perf_counter() - start:.1f} s, groups {decode.groups}", flush=True)
        return decode

    def write(self) -> None:
        """Write ``bench.json`` and ``bench.md``."""
        self.args.out.mkdir(parents=True, exist_ok=True)
        arguments = {name: str(value) for name, value in vars(self.args).items()}
        record = {
            "environment": environment(torch.device(self.args.device)),
            "arguments": arguments,
            "rows": [asdict(result) for result in self.results],
        }
        (self.args.out / "bench.json").write_text(json.dumps(record, indent=1, default=str) + "\n")
        table = [" | ".join(COLUMNS), " | ".join("---" for _ in COLUMNS), *(line(r) for r in self.results)]
        (self.args.out / "bench.md").write_text("\n".join(f"| {text} |" for text in table) + "\n")


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


def main(argv: list[str] | None = None) -> int:
    """Measure; 0 if every row gave a result."""
    args = parse(argv)
    register()
    rows = all_rows(args)
    if not rows:
        print(f"no row matches --match {args.match!r}", file=sys.stderr)
        return 2
    bench = Bench(args)
    bench.run(rows)
    print((args.out / "bench.md").read_text())
    return int(any(result.failed is not None for result in bench.results))


if __name__ == "__main__":
    sys.exit(main())
