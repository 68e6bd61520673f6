"""Every Linear of a model with every kernel that can run its formats."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.bench import tune_cuda, tune_triton
from harness.bench.measuring import Bench, Row
from harness.formats.mx import E2M1, E4M3, decode, encode
from harness.formats.scales import ScaleMode
from harness.kernels.cuda.linear import PackedBF16Linear, unavailable
from harness.models.gamerft import GameRFTConfig, GameRFTCore
from harness.mx.conf import Activation, KernelChoice
from harness.mx.dispatch import KERNELS, available_kernels
from harness.mx.linears.base import LinearFormat, MXModule
from harness.mx.linears.cuda import CudaMXLinear
from harness.mx.linears.triton import TritonMXLinear, paths
from harness.mx.weights import nearest

FORMATS = {
    "W8A16": LinearFormat(E4M3, ScaleMode.rceil, Activation.bf16),
    "W8A8": LinearFormat(E4M3, ScaleMode.rceil, Activation.mx),
    "W4A16": LinearFormat(E2M1, ScaleMode.rceil, Activation.bf16),
    "W4A8": LinearFormat(E2M1, ScaleMode.rceil, Activation.mxfp8),
    "W4A4": LinearFormat(E2M1, ScaleMode.rceil, Activation.mx),
}


@dataclass(frozen=True)
class Product:
    """A Linear of the model as a frame runs it: M rows by [N, K]."""

    name: str
    m: int
    n: int
    k: int

    @property
    def shape(self) -> str:
        """Rows×inputs→outputs, as tables show it."""
        return f"{self.m}×{self.k}→{self.n}"


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
    """Euclidean norm of the difference, relative to ``want``'s (float64)."""
    return float((got.double() - want).norm() / want.norm())


def oracle(mx: MXModule, x: Tensor) -> Tensor:
    """The product of the decoded operands, float64, for the first 512 outputs."""
    element, blocks = mx.fmt.activation_element, mx.weight_blocks()
    if element is not None:
        x = decode(encode(x, element, mx.fmt.scale_mode), element)
    weight = decode(type(blocks)(*(part[:512].contiguous() for part in blocks)), mx.fmt.element)
    return F.linear(x.double(), weight.double(), None if mx.bias is None else mx.bias[:512].double())


def variants(
    linear: nn.Linear, fmt: LinearFormat, device: torch.device, names: Sequence[str] | None
) -> Iterator[tuple[str, MXModule]]:
    """Each kernel of ``names`` that can run ``fmt`` here, Triton by every path. Of all, emulated ones only by need."""
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
    """Time calls of copies of ``linear``, whose weight takes ``size`` bytes; ``plain_us`` is what BF16 takes."""
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
        for variant, mx in variants(linear, FORMATS[name], bench.device, kernels):
            row = Row("linear", product.name, product.shape, f"{name} {variant}", product.n)
            bench.rows.append(row)
            bench.check_time()
            row.error = relative_error(mx(x)[:, :512], oracle(mx, x))
            if not row.error < 2e-2:
                row.note = "WRONG, not timed"
                continue
            if tune and isinstance(mx, TritonMXLinear):
                row.note = tune_triton.tune(bench, mx, x)
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
    if not asked or unavailable(bench.device) is not None:
        return
    packed = PackedBF16Linear.from_linear(linear)
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
