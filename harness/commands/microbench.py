#!/usr/bin/env python3
"""Time the parts of one frame by themselves: every Linear with every kernel, attention over the ring, cache updates.

    python scripts/microbench.py                                   # dit_v4 on the GPU
    python scripts/microbench.py --model dit_v4_5b --only linear --formats W8A16 W4A16
    python scripts/microbench.py --tune --only linear              # prints entries for the kernels' files in tuned/
    python scripts/microbench.py --tune --only linear --kernels cuda --products qkv mlp
    python scripts/microbench.py --model smoke --device cpu --seconds 20

Every kernel is checked against the product of the decoded operands before it is timed. Several copies of a weight, more
than the L2 cache holds, take turns, so that weights come from memory as they do in a frame. On a GPU all copies run in
one CUDA graph that is replayed; a figure is the median replay divided by the copies. `floor` is the time that weight,
input and output need at the bandwidth of a device copy measured first. Rows that the time limit leaves out say so.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from harness.commands import tune_cuda
from harness.config import register
from harness.config.compose import compose
from harness.formats.mx import E2M1, E4M3, decode, encode
from harness.formats.scales import ScaleMode
from harness.kernels.triton import shapes as triton_config
from harness.kernels.triton.shapes import GemmConfig, candidates
from harness.kernels.tuned import entry, gpu_name
from harness.kv import KVCache
from harness.kv.conf import KVConf, KVFormat, KVStorage
from harness.measure.environment import environment
from harness.measure.timing import samples_ms
from harness.models.attention import LayerAttend
from harness.models.config_io import gamerft_config, model_section
from harness.models.gamerft import GameRFTConfig, GameRFTCore, attend_from_projection, rms_norm
from harness.models.rope import apply_rotary
from harness.mx.conf import Activation, KernelChoice
from harness.mx.dispatch import KERNELS, available_kernels
from harness.mx.linears import cuda as cuda_linear
from harness.mx.linears.base import LinearFormat, MXModule
from harness.mx.linears.cuda import CudaLinear, CudaMXLinear
from harness.mx.linears.triton import TritonMXLinear, paths
from harness.mx.weights import nearest
from harness.rollout.attention import AttentionKind, check_attention, frame_attention
from harness.rollout.compile import CompileConf, compile_function

FORMATS = {
    "W8A16": LinearFormat(E4M3, ScaleMode.rceil, Activation.bf16),
    "W8A8": LinearFormat(E4M3, ScaleMode.rceil, Activation.mx),
    "W4A16": LinearFormat(E2M1, ScaleMode.rceil, Activation.bf16),
    "W4A8": LinearFormat(E2M1, ScaleMode.rceil, Activation.mxfp8),
    "W4A4": LinearFormat(E2M1, ScaleMode.rceil, Activation.mx),
}
CACHES = {
    "bf16": KVConf(),
    "mx_v_only": KVConf(storage=KVStorage.mx),
    "mx_kv": KVConf(storage=KVStorage.mx, quantize_k=True),
    "mxfp4_kv": KVConf(storage=KVStorage.mx, quantize_k=True, k_format=KVFormat.e2m1, v_format=KVFormat.e2m1),
}
ATTENTION_LAYERS = 4
"""Rings that take turns: of a 60-frame window in BF16 they are larger than any L2."""


@dataclass
class Row:
    """One measurement. Times in µs per call; `error` is relative, in the Euclidean norm, to float64."""

    part: str
    name: str
    shape: str
    way: str
    n: int = 0
    us: float | None = None
    p90: float | None = None
    floor_us: float | None = None
    of_bf16: float | None = None
    gb_s: float | None = None
    error: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Product:
    """A Linear of the model as a frame runs it: M rows by [N, K]."""

    name: str
    m: int
    n: int
    k: int

    @property
    def shape(self) -> str:
        return f"{self.m}×{self.k}→{self.n}"


class OutOfTimeError(Exception):
    """The time limit was reached."""


@dataclass
class Bench:
    """How to measure, and what was measured."""

    device: torch.device
    iterations: int
    warmup: int
    deadline: float
    bandwidth: float = 0.0
    rows: list[Row] = field(default_factory=list)
    tried: list[dict[str, Any]] = field(default_factory=list)

    @property
    def over(self) -> bool:
        return time.perf_counter() > self.deadline

    def check_time(self) -> None:
        if self.over:
            raise OutOfTimeError

    def synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def copies(self, size: int) -> int:
        """Copies of something of `size` bytes that together exceed twice the L2 cache (1 on a CPU)."""
        if self.device.type != "cuda":
            return 1
        return max(1, min(128, -(-2 * torch.cuda.get_device_properties(self.device).L2_cache_size // size)))

    def time(self, calls: Sequence[Callable[[], object]]) -> tuple[float, float]:
        """Median and 90th percentile in µs per call over `iterations` rounds of all `calls`."""

        def round_of_calls() -> None:
            for call in calls:
                call()

        run: Callable[[], object] = round_of_calls
        if self.device.type == "cuda":
            stream = torch.cuda.Stream(self.device)
            with torch.cuda.stream(stream):  # a first run builds what capturing must not
                round_of_calls()
            self.synchronise()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                round_of_calls()
            run = graph.replay
        times = sorted(1e3 * ms for ms in samples_ms(run, self.device, self.iterations, self.warmup))
        median, p90 = statistics.median(times), times[int(0.9 * (len(times) - 1))]
        return median / len(calls), p90 / len(calls)

    def measure_bandwidth(self) -> None:
        """GB/s of a copy on the device, bytes read plus bytes written."""
        size = 2**30 if self.device.type == "cuda" else 2**26
        a = torch.ones(size, dtype=torch.uint8, device=self.device)
        b = torch.empty_like(a)
        self.bandwidth = 2 * size / self.time([lambda: b.copy_(a)])[0] / 1e3


def read_model(name: str) -> tuple[GameRFTConfig, int]:
    """Architecture and window (frames) of a model config by name, or of a YAML file with a `model:` section."""
    if name.endswith((".yaml", ".yml")):
        return gamerft_config(model_section(name), name), 60
    register()
    conf = OmegaConf.to_container(compose(f"model={name}").model, resolve=True)
    assert isinstance(conf, dict)
    fields = model_section(conf["config_file"]) if conf["config_file"] else {}
    return gamerft_config({**fields, **conf["arch"]}, name), int(conf["window"])


def products(arch: GameRFTConfig, batch: int, steps: int = 2) -> list[Product]:
    """Every shape of Linear in the blocks; modulation rows are those of a frame's steps, for one layer and for all."""
    with torch.device("meta"):
        core = GameRFTCore(arch)
    rows = {False: batch * arch.tokens_per_frame, True: batch * steps}
    found: dict[tuple[int, int, int], Product] = {}
    for _, layer, spec, linear in core.linears():
        assert isinstance(linear, nn.Linear)
        if layer == 0:
            sizes = rows[spec.per_frame], linear.out_features, linear.in_features
            found.setdefault(sizes, Product(spec.name, *sizes))
    stacked = [linear for _, _, spec, linear in core.linears() if spec.per_frame]
    outputs = sum(linear.out_features for linear in stacked if isinstance(linear, nn.Linear))
    return [*found.values(), Product("modulation, all layers", rows[True], outputs, arch.d_model)]


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


def oracle(mx: MXModule, x: Tensor) -> Tensor:
    """The product of the decoded operands, float64, for the first 512 outputs."""
    element, blocks = mx.fmt.activation_element, mx.weight_blocks()
    if element is not None:
        x = decode(encode(x, element, mx.fmt.scale_mode), element)
    weight = decode(type(blocks)(*(part[:512].contiguous() for part in blocks)), mx.fmt.element)
    return F.linear(x.double(), weight.double(), None if mx.bias is None else mx.bias[:512].double())


def ways(
    linear: nn.Linear, fmt: LinearFormat, device: torch.device, names: Sequence[str] | None
) -> Iterator[tuple[str, MXModule]]:
    """Each kernel of `names` that can run `fmt` here, Triton by every path. Of all, emulated ones only by need."""
    verdicts = available_kernels(device, fmt)
    real = [k for k in KERNELS if verdicts[k.name] == "ok" and not k.emulated]
    for kernel in KERNELS:
        wanted = kernel.name in names if names is not None else not (kernel.emulated and real)
        if verdicts[kernel.name] != "ok" or not wanted:
            continue
        if kernel.name != "triton":
            yield str(kernel.name), kernel.build(nearest(linear, fmt))
            continue
        for path in paths(fmt, torch.cuda.get_device_capability(device)):
            yield f"triton {path}", TritonMXLinear.from_weight(nearest(linear, fmt), path)


def time_linear(bench: Bench, row: Row, linear: nn.Module, size: int, x: Tensor, plain_us: float | None) -> None:
    """Time calls of copies of `linear`, whose weight takes `size` bytes; `plain_us` is what BF16 takes."""
    modules: list[Any] = [linear, *(copy.deepcopy(linear) for _ in range(bench.copies(size) - 1))]
    row.us, row.p90 = bench.time([partial(module, x) for module in modules])
    moved = size + x.nbytes * (1 + row.n / x.shape[1])
    row.floor_us, row.gb_s = moved / bench.bandwidth / 1e3, moved / row.us / 1e3
    row.of_bf16 = row.us / (plain_us or row.us)
    if isinstance(linear, TritonMXLinear | CudaMXLinear) and linear.fmt.activation != Activation.bf16:
        operands = linear.operands(x) if isinstance(linear, TritonMXLinear) else (linear.operand(x),)
        given, _ = bench.time([partial(module.product, *operands) for module in modules])
        row.note = f"{row.note}  [{given:.2f} µs with x encoded beforehand]"


def bench_product(
    bench: Bench, product: Product, formats: Sequence[str], kernels: Sequence[str] | None, tune: bool
) -> None:
    """BF16 through torch, then every kernel of every format."""
    linear = nn.Linear(product.k, product.n, device=bench.device, dtype=torch.bfloat16).requires_grad_(False)
    x = torch.randn(product.m, product.k, device=bench.device).bfloat16()
    plain = Row("linear", product.name, product.shape, "torch BF16", product.n)
    bench.rows.append(plain)
    time_linear(bench, plain, linear, linear.weight.nbytes, x, None)
    bench_packed(bench, product, linear, x, plain.us, kernels, tune)
    for name in formats:
        for way, mx in ways(linear, FORMATS[name], bench.device, kernels):
            row = Row("linear", product.name, product.shape, f"{name} {way}", product.n)
            bench.rows.append(row)
            bench.check_time()
            row.error = relative_error(mx(x)[:, :512], oracle(mx, x))
            if not row.error < 2e-2:
                row.note = "WRONG, not timed"
                continue
            if tune and isinstance(mx, TritonMXLinear):
                row.note = tune_module(bench, mx, x)
            elif tune and isinstance(mx, CudaMXLinear):
                row.note = tune_cuda.tune(bench, mx, x)
            time_linear(bench, row, mx, mx.weight_bytes(), x, plain.us)


def bench_packed(
    bench: Bench,
    product: Product,
    linear: nn.Linear,
    x: Tensor,
    plain_us: float | None,
    kernels: Sequence[str] | None,
    tune: bool,
) -> None:
    """BF16 through the kernel of kernel=cuda, where it runs and is asked for."""
    asked = kernels is None or KernelChoice.cuda in kernels
    if not asked or cuda_linear.unavailable(bench.device, FORMATS["W8A16"]) is not None:
        return
    packed = CudaLinear.from_linear(linear)
    row = Row("linear", product.name, product.shape, "BF16 cuda", product.n)
    bench.rows.append(row)
    bench.check_time()
    row.error = relative_error(packed(x), F.linear(x.double(), linear.weight.double(), linear.bias.double()))
    if not row.error < 2e-2:
        row.note = "WRONG, not timed"
        return
    if tune:
        row.note = tune_cuda.tune(bench, packed, x)
    time_linear(bench, row, packed, packed.weight_bytes(), x, plain_us)


def tune_module(bench: Bench, mx: TritonMXLinear, x: Tensor) -> str:
    """Set `mx.config` to the fastest found, one dimension of a shape after the other; an entry for `tuned/`."""
    from triton.runtime.errors import OutOfResources  # not on machines without a GPU

    shape = mx.shape(x.shape[0])
    allowed = set(candidates(shape, mx.capability))
    modules = [mx, *(copy.deepcopy(mx) for _ in range(bench.copies(mx.weight_bytes()) - 1))]
    timed: dict[GemmConfig, float] = {}

    operands = mx.operands(x)

    def measure(config: GemmConfig) -> float:
        if config not in timed and timed and bench.over:
            return float("inf")
        if config not in timed:
            for module in modules:
                module.config = config
            try:
                timed[config] = bench.time([partial(module.product, *operands) for module in modules])[0]
            except OutOfResources:
                timed[config] = float("inf")
        return timed[config]

    start = triton_config.choose(shape, *triton_config.machine(bench.device), gpu_name(bench.device)).as_ints()
    best = min(allowed, key=lambda c: [abs(a - b) for a, b in zip(c.as_ints(), start, strict=True)])
    for _ in range(2):
        for dimension in ("split_k", "block_n", "warps", "swap", "stages"):
            others = {replace(best, **{dimension: getattr(c, dimension)}) for c in allowed} & allowed
            best = min({best, *others}, key=measure)
    mx.config = best
    key = {"path": mx.path, "bits": shape.bits, "m": shape.bucket, "n": shape.n, "k": shape.k}
    return entry(key | {"config": best.as_ints()})


def make_kv(arch: GameRFTConfig, window: int, batch: int, conf: KVConf, device: torch.device) -> KVCache:
    sizes = (ATTENTION_LAYERS, batch, arch.n_heads, arch.head_dim, arch.tokens_per_frame)
    cache = KVCache(*sizes, [window] * ATTENTION_LAYERS, conf, torch.bfloat16, device)
    for layer in range(ATTENTION_LAYERS):
        shape = (batch, arch.n_heads, window * arch.tokens_per_frame, arch.head_dim)
        cache.load(layer, *(torch.randn(shape, device=device).bfloat16() for _ in range(2)))
    cache.advance()
    return cache


def heads_of(arch: GameRFTConfig, batch: int, device: torch.device) -> list[Tensor]:
    shape = (batch, arch.n_heads, arch.tokens_per_frame, arch.head_dim)
    return [torch.randn(shape, device=device).bfloat16() for _ in range(3)]


def bench_attention(bench: Bench, arch: GameRFTConfig, window: int, batch: int) -> None:
    """One frame against a full ring, from a layer's projection on; checked against SDPA on what is stored.

    Per storage and per kind of attention.
    """
    q, k, v = heads_of(arch, batch, bench.device)
    qkv = torch.cat([x.transpose(1, 2).flatten(2) for x in (q, k, v)], -1)
    angles = torch.rand(arch.tokens_per_frame, arch.head_dim // 2, device=bench.device)
    rotary = (angles.cos(), angles.sin())
    q, k = (apply_rotary(rms_norm(x), *rotary) for x in (q, k))
    shape = f"{arch.tokens_per_frame} tokens × {window} frames, {batch * arch.n_heads} heads"
    for storage, conf in CACHES.items():
        cache = make_kv(arch, window, batch, conf, bench.device)
        want = F.scaled_dot_product_attention(q, *cache.window(0, k, v)).double().transpose(1, 2).flatten(2)
        size = cache.nbytes().allocated / ATTENTION_LAYERS
        for kind in AttentionKind:
            row = Row("attention", f"ring {storage}", shape, kind.value)
            bench.rows.append(row)
            bench.check_time()
            try:
                check_attention(kind, bench.device, arch.head_dim)
            except ValueError as error:
                row.note = str(error)
                continue
            attend = frame_attention(cache, kind, store=False)

            def layers(attend: LayerAttend = attend) -> list[Tensor]:
                ways = (qkv, arch.n_heads, rotary)
                return [attend_from_projection(attend, layer, *ways) for layer in range(ATTENTION_LAYERS)]

            run = compile_function(layers, CompileConf(enabled=bench.device.type == "cuda"))
            with torch.no_grad():
                row.error = relative_error(run()[0], want)
                us, p90 = bench.time([run])
            row.us, row.p90 = us / ATTENTION_LAYERS, p90 / ATTENTION_LAYERS
            row.floor_us, row.gb_s = size / bench.bandwidth / 1e3, size / row.us / 1e3
            row.note = "" if row.error < 2e-2 else "WRONG"


def bench_kv(bench: Bench, arch: GameRFTConfig, window: int, batch: int) -> None:
    """Storing one frame's K and V, and handing the window out as a plain tensor, per storage."""
    _, k, v = heads_of(arch, batch, bench.device)
    for storage, conf in CACHES.items():
        cache = make_kv(arch, window, batch, conf, bench.device)

        def store(cache: KVCache = cache, k: Tensor = k, v: Tensor = v) -> None:
            for layer in range(ATTENTION_LAYERS):
                cache.window(layer, k, v) if cache.store_is_free else cache.store(layer, k, v)

        def read(cache: KVCache = cache, k: Tensor = k, v: Tensor = v) -> list[tuple[Tensor, Tensor]]:
            return [cache.window(layer, k, v) for layer in range(ATTENTION_LAYERS)]

        for way, function in (("store a frame", store), ("read the window", read)):
            bench.check_time()
            run = compile_function(function, CompileConf(enabled=bench.device.type == "cuda"))
            row = Row("kv", f"ring {storage}", f"{window} frames", way)
            with torch.no_grad():
                us, p90 = bench.time([run])
            row.us, row.p90 = us / ATTENTION_LAYERS, p90 / ATTENTION_LAYERS
            bench.rows.append(row)


def report(bench: Bench, console: Console) -> None:
    table = Table(title=f"copy bandwidth {bench.bandwidth:.0f} GB/s, times in µs per call")
    columns = ("name", "shape", "way", "median", "p90", "of BF16", "floor", "× floor", "GB/s", "error")
    for column in columns:
        table.add_column(column, justify="left" if column in columns[:3] else "right")
    previous = ""
    for row in bench.rows:
        if row.us is None:
            table.add_row(row.name, row.shape, row.way, row.note.split(";")[0][:24], *[""] * 6)
            continue
        ratios = (row.of_bf16, row.floor_us, row.us / row.floor_us if row.floor_us else None)
        figures = [f"{row.us:.2f}", f"{row.p90:.2f}", *("" if r is None else f"{r:.2f}" for r in ratios)]
        figures += ["" if row.gb_s is None else f"{row.gb_s:.0f}", "" if row.error is None else f"{row.error:.1e}"]
        if row.name != previous:
            table.add_section()
        previous = row.name
        table.add_row(row.name, row.shape, row.way, *figures)
    console.print(table)
    for row in bench.rows:
        if row.note and row.us is not None:
            console.print(f"{row.name}, {row.way}: {row.note}", markup=False, soft_wrap=True, highlight=False)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="dit_v4", help="a model config by name, or a YAML file")
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="clips")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--only", nargs="+", choices=("linear", "attention", "kv"), default=["linear", "attention", "kv"]
    )
    parser.add_argument("--products", nargs="+", help="only Linears whose name contains one of these")
    parser.add_argument("--formats", nargs="+", choices=tuple(FORMATS), default=list(FORMATS))
    named = [str(kernel) for kernel in KernelChoice if kernel != KernelChoice.auto]
    parser.add_argument("--kernels", nargs="+", choices=named, help="only these (default: all but emulated ones)")
    parser.add_argument(
        "--tune",
        action="store_true",
        help="search launch shapes of kernel=triton and cuda; prints entries for tuned/",
    )
    parser.add_argument("--iterations", type=int, default=50)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=150.0, help="start nothing new after this long")
    parser.add_argument("--json", type=Path, help="where to write every figure")
    args = parser.parse_args(argv)
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA GPU here; use --device cpu")
    if args.iterations < 1 or args.warmup < 0 or min(args.batch) < 1:
        parser.error("--iterations and --batch must be at least 1, --warmup at least 0")
    return args


def run_all(bench: Bench, args: argparse.Namespace, arch: GameRFTConfig, window: int) -> None:
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


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> int:
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
