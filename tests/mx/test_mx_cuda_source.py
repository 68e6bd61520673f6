"""`mx_linear.cu` itself, compiled for a CPU: every thread, barrier and copy of a cluster, without a GPU.

`mx_device_cpu.hpp` gives the instructions that the kernel is written in; it ends the process where their rules are
broken. What only a GPU can show (races in its memory model, speed) is left to test_mx_cuda.py.
"""

import ctypes
import re
import sys
from pathlib import Path
from typing import NamedTuple

import cpp
import pytest
import torch
import torch.nn.functional as F

from harness.formats.mx import E2M1, E4M3, E5M2, FORMATS, MXBlocks, decode, encode
from harness.kernels.cuda import packing as cuda_packing
from harness.kernels.cuda.ops import _StreamArguments as Arguments
from harness.kernels.cuda.shapes import CudaConfig, Role, defines, launch_grid, layout
from harness.kernels.cuda.stream import Squares

HERE = Path(__file__).parent
KERNELS = HERE.parent.parent / "harness" / "kernels" / "cuda"

pytestmark = [
    pytest.mark.skipif(cpp.COMPILER is None, reason="needs the compiler g++"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs ucontext, as Linux has it"),
]


def address(tensor):
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def write_source(path, kernel, runner):
    product = (KERNELS / "mx_product.cuh",) if kernel == "mx_linear.cu" else ()
    parts = (HERE / "mx_device_cpu.hpp", KERNELS / "mx_decode.cuh", *product, KERNELS / kernel, HERE / runner)
    path.write_text("".join(f'#include "{part}"\n' for part in parts))


def as_macros(parameters):
    return tuple(f"-D{name}={value}" for name, value in parameters.items())


@pytest.mark.parametrize("name", ["silu", "low_of", "high_of", "of_lanes"])
def test_what_the_emulation_repeats_is_what_kernels_have(name):
    """Functions of `mx_device.cuh` that are no instructions: a test of the one is a test of the other."""

    def body(path):
        found = re.search(rf"float {name}\([^)]*\) \{{(.*?)\}}", path.read_text(), re.DOTALL)
        return found.group(1).replace("std::fma(", "fmaf(").split()

    assert body(HERE / "mx_device_cpu.hpp") == body(KERNELS / "mx_device.cuh")


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    """Calls the kernel compiled for a CPU: (config, x, packed weight, bias, outputs, element format) to outputs."""
    folder = tmp_path_factory.mktemp("mx_linear")
    source = folder / "kernel.cpp"
    write_source(source, "mx_linear.cu", "mx_run_cpu.hpp")
    built = {}

    def call(config, x, weight, bias, n, fmt, seed=0, silu=False, role=Role.plain, rows=None, stream=None):
        (m, k), groups = x.shape, weight.tiles.shape[1]
        m = m if rows is None else rows
        parameters = defines(config, k, fmt.name, silu, role=role)
        macros = as_macros(parameters)
        if macros not in built:
            built[macros] = cpp.library(source, macros, folder / f"kernel{len(built)}.so")
        library = built[macros]
        assert library.shared_bytes() == layout(config, k, fmt.bits, role)[0]
        out = torch.full((m, n), torch.nan).bfloat16()
        tensors = [address(t) for t in (x, weight.tiles, bias, out)]
        stream = ctypes.byref(stream or Arguments())
        library.run(*tensors, m, n, k, groups, ctypes.c_float(weight.output_scale), stream, seed)
        return out

    return call


def operands(m, n, k, fmt, bias=True):
    torch.manual_seed(0)
    weight = (torch.randn(n, k) * torch.exp2(torch.randint(-6, 3, (n, 1)).float())).bfloat16()
    weight[n // 2] = 0
    x = (torch.randn(m, k) * torch.exp2(torch.randint(-4, 4, (m, 1)).float())).bfloat16()
    return x, encode(weight, fmt), torch.randn(n).bfloat16() if bias else None


def assert_equals_oracle(got, x, blocks, bias, fmt):
    weight = decode(blocks, fmt).double()
    want = F.linear(x.double(), weight, None if bias is None else bias.double())
    slack = 2**-8 * want.abs() + 2**-20 * F.linear(x.double().abs(), weight.abs())
    wrong = ~((got.double() - want).abs() <= slack)
    assert not wrong.any(), f"{int(wrong.sum())} of {wrong.numel()} values"


CASES = {
    "a cluster of 2, split K within a block": (CudaConfig(8, 1, 4, 2, 2, 1, 2), E4M3, 64, 64, 256),
    "4 bits, N and K that end early": (CudaConfig(4, 2, 4, 2, 2, 2, 1), E2M1, 30, 200, 352),
    "sums larger than operands": (CudaConfig(8, 3, 4, 1, 4, 2, 1), E4M3, 50, 72, 320),
    "one block alone, odd outputs": (CudaConfig(1, 1, 8, 1, 1, 2, 2), E2M1, 3, 39, 480),
    "E5M2, more rows than a tile": (CudaConfig(2, 1, 4, 3, 2, 1, 1), E5M2, 20, 50, 640),
    "more blocks than groups": (CudaConfig(2, 2, 4, 2, 7, 1, 1), E4M3, 16, 160, 96),
    "x shared by 2 clusters": (CudaConfig(8, 1, 4, 1, 2, 1, 2, share=2), E4M3, 64, 250, 320),
    "x shared by 4 blocks, one beyond the outputs": (
        CudaConfig(2, 1, 4, 2, 1, 1, 1, share=4),
        E2M1,
        16,
        180,
        256,
    ),
    "fewer tiles than warps": (CudaConfig(8, 1, 8, 1, 3, 1, 2, idle=2), E4M3, 64, 250, 320),
    "fewer tiles than warps, split K": (CudaConfig(4, 2, 4, 2, 2, 1, 1, idle=3), E2M1, 32, 160, 256),
    "fewer tiles than warps, one block alone": (CudaConfig(1, 2, 4, 1, 1, 1, 2, idle=3), E2M1, 7, 240, 192),
    "128 rows": (CudaConfig(16, 1, 4, 1, 2, 2, 1), E4M3, 100, 64, 256),
    "256 rows": (CudaConfig(32, 1, 8, 1, 1, 1, 1), E2M1, 250, 64, 192),
}


@pytest.mark.parametrize("name", CASES)
def test_the_product_is_that_of_the_decoded_operands(kernel, name):
    config, fmt, m, n, k = CASES[name]
    x, blocks, bias = operands(m, n, k, fmt, bias="odd" not in name)
    got = kernel(config, x, cuda_packing.pack(blocks, fmt), bias, n, fmt)
    assert_equals_oracle(got, x, blocks, bias, fmt)


class Plain(NamedTuple):
    """BF16 weights, as `kernel` takes an element format."""

    name: str = "bf16"
    bits: int = 16


@pytest.mark.parametrize(
    ("config", "m", "n", "k"),
    [(CudaConfig(8, 1, 4, 2, 3, 1, 2), 60, 72, 320), (CudaConfig(1, 2, 4, 1, 1, 2, 1), 3, 39, 480)],
)
def test_bf16_weights_are_multiplied_as_they_are(kernel, config, m, n, k):
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(*size).bfloat16() for size in ((m, k), (n, k), (n,)))
    tiles = cuda_packing.pack_plain(weight)
    assert torch.equal(cuda_packing.unpack_plain(tiles, n, k), weight)
    got = kernel(config, x, cuda_packing.CudaWeight(tiles, 1.0), bias, n, Plain())
    want = F.linear(x.double(), weight.double(), bias.double())
    slack = 2**-8 * want.abs() + 2**-20 * F.linear(x.double().abs(), weight.double().abs())
    assert ((got.double() - want).abs() <= slack).all()


def test_threads_may_run_in_any_order(kernel):
    config, fmt, m, n, k = CASES["a cluster of 2, split K within a block"]
    x, blocks, bias = operands(m, n, k, fmt)
    weight = cuda_packing.pack(blocks, fmt)
    results = [kernel(config, x, weight, bias, n, fmt, seed) for seed in range(3)]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("name", ["a cluster of 2, split K within a block", "one block alone, odd outputs"])
def test_silu_is_that_of_the_rounded_outputs(kernel, name):
    config, fmt, m, n, k = CASES[name]
    x, blocks, bias = operands(m, n, k, fmt)
    weight = cuda_packing.pack(blocks, fmt)
    plain = kernel(config, x, weight, bias, n, fmt)
    got = kernel(config, x, weight, bias, n, fmt, silu=True)
    assert_equals_oracle(plain, x, blocks, bias, fmt)
    assert not torch.equal(got, plain)
    assert torch.equal(got, F.silu(plain))


def test_silu_of_every_bf16_value_is_that_of_torch(kernel):
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    blocks = MXBlocks(torch.zeros(2**16, 16, dtype=torch.uint8), torch.full((2**16, 1), 127, dtype=torch.uint8))
    weight, x = cuda_packing.pack(blocks, E2M1), torch.zeros(1, 32).bfloat16()
    got = kernel(CudaConfig(1, 4, 4, 1, 1, 1, 1), x, weight, every, 2**16, E2M1, silu=True)[0]
    want = F.silu(every)
    assert torch.equal(got.isnan(), want.isnan())
    differing = every[(got != want) & ~want.isnan()]
    assert not len(differing), differing


NORMS = {
    "a cluster of 3, two groups of sums": (CudaConfig(8, 1, 4, 1, 3, 1, 2), E4M3, 64, 72, 320, 7),
    "split K within a block, 4 bits": (CudaConfig(8, 1, 4, 2, 2, 2, 1), E2M1, 49, 64, 256, 45),
    "more warps than tiles of rows": (CudaConfig(8, 1, 12, 1, 2, 1, 2), E4M3, 64, 200, 192, 1),
    "a block by itself, two row tiles": (CudaConfig(8, 2, 4, 1, 1, 1, 2), E4M3, 33, 100, 128, 3),
    "x shared by 2 clusters": (CudaConfig(8, 1, 4, 1, 2, 1, 2, share=2), E5M2, 64, 250, 320, 16),
    "fewer tiles than warps": (CudaConfig(8, 1, 8, 1, 4, 1, 2, idle=3), E2M1, 64, 240, 320, 6),
    "BF16": (CudaConfig(8, 1, 4, 1, 4, 1, 2), Plain(), 64, 64, 320, 24),
}


def packed(weight, fmt):
    """`weight` as the kernel reads it, and what that means."""
    if fmt.bits == 16:
        return cuda_packing.CudaWeight(cuda_packing.pack_plain(weight), 1.0), weight
    blocks = encode(weight, fmt)
    return cuda_packing.pack(blocks, fmt), decode(blocks, fmt)


def stream_of(m, k, parts):
    """A residual stream: h, its scale and shift, what a kernel in front leaves of it; what must not count is NaN."""
    h = (torch.randn(m, k) * torch.exp2(torch.randint(-4, 8, (m, 1)).float())).bfloat16()
    scale, shift = (0.5 * torch.randn(k)).bfloat16(), torch.randn(k).bfloat16()
    modulated = torch.full((65, k), torch.nan).bfloat16()
    modulated[:m], modulated[64] = (h.float() * (1 + scale.float())).bfloat16(), shift
    columns = torch.arange(k) * parts // k
    squares = torch.zeros(m, parts).index_add_(1, columns, h.float().square())
    return h, scale, shift, modulated, squares


def normed(h, scale, shift):
    """The modulated norm in float64."""
    h, scale, shift = (x.double() for x in (h, scale, shift))
    return h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-7) * (1 + scale) + shift


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("silu", [False, True])
def test_a_product_of_a_modulated_norm(kernel, name, silu):
    config, fmt, m, n, k, parts = NORMS[name]
    torch.manual_seed(0)
    bias = torch.randn(n).bfloat16()
    packed_weight, weight = packed((torch.randn(n, k) * 0.1).bfloat16(), fmt)
    h, scale, shift, modulated, squares = stream_of(m, k, parts)
    arguments = Arguments(given=Squares(squares.data_ptr(), parts, 1 / k, 1e-7))
    role = {"role": Role.norm, "rows": m, "stream": arguments}
    got = kernel(config, modulated, packed_weight, bias, n, fmt, **role)
    weight, bias = weight.double(), bias.double()
    inverse = torch.rsqrt(h.double().square().mean(-1, keepdim=True) + 1e-7)
    want = F.linear(modulated[:m].double() * inverse + shift.double(), weight, bias)
    slack = 2**-8 * want.abs() + 2**-18 * F.linear((modulated[:m] * inverse).abs() + shift.abs(), weight.abs())
    assert ((got.double() - want).abs() <= slack).all()
    # Of the norm itself it is no worse than one that is rounded to BF16.
    x = normed(h, scale, shift)
    want, rounded = F.linear(x, weight, bias), F.linear(x.bfloat16().double(), weight, bias).bfloat16()
    assert (got.double() - want).norm() < 1.1 * (rounded.double() - want).norm()
    if silu:
        args = modulated, packed_weight, bias.bfloat16(), n, fmt
        assert torch.equal(kernel(config, *args, silu=True, **role), F.silu(got))


@pytest.mark.parametrize("name", ["a cluster of 3, two groups of sums", "more warps than tiles of rows"])
def test_rows_of_a_norm_do_not_touch_each_other(kernel, name):
    config, fmt, m, n, k, parts = NORMS[name]
    torch.manual_seed(0)
    weight, _ = packed((torch.randn(n, k) * 0.1).bfloat16(), fmt)
    _, _, shift, modulated, squares = stream_of(m, k, parts)
    modulated[7], squares[7] = 0, 0  # of a row of zeros the norm is the shift

    def run():
        arguments = Arguments(given=Squares(squares.data_ptr(), parts, 1 / k, 1e-7))
        return kernel(config, modulated, weight, None, n, fmt, role=Role.norm, rows=m, stream=arguments)

    clean = run()
    zeros = torch.zeros(1, k).bfloat16()
    assert torch.equal(clean[7:8], kernel(config, torch.cat([shift[None], zeros]), weight, None, n, fmt)[:1])
    modulated[5, 3], squares[5] = torch.nan, torch.nan
    modulated[9, 2], squares[9] = torch.inf, torch.inf
    modulated[11], squares[11] = 2.0**100, torch.inf  # its squares overflow: divided by infinity
    got = run()
    assert got[5].isnan().all()
    assert got[9].isnan().all()
    assert not got[11].isinf().any()
    kept = [row for row in range(m) if row not in (5, 9, 11)]
    assert torch.equal(got[kept], clean[kept])


def test_a_shift_that_is_not_finite_is_in_every_row(kernel):
    config, fmt, m, n, k, parts = NORMS["a cluster of 3, two groups of sums"]
    torch.manual_seed(0)
    weight, _ = packed((torch.randn(n, k) * 0.1).bfloat16(), fmt)
    modulated, squares = stream_of(m, k, parts)[3:]
    modulated[64, 1] = torch.nan
    arguments = Arguments(given=Squares(squares.data_ptr(), parts, 1 / k, 1e-7))
    assert kernel(config, modulated, weight, None, n, fmt, role=Role.norm, rows=m, stream=arguments).isnan().all()


RESIDUALS = {
    "a cluster of 3": (CudaConfig(8, 1, 4, 1, 3, 1, 2), E4M3, 64, 80, 320),
    "a cluster of 7, split K within a block": (CudaConfig(8, 1, 4, 2, 7, 1, 1), E2M1, 49, 64, 896),
    "a cluster of 8, outputs that end early": (CudaConfig(8, 1, 8, 1, 8, 1, 2), E4M3, 60, 144, 512),
    "a block by itself, two row tiles": (CudaConfig(8, 2, 4, 1, 1, 1, 2), E4M3, 33, 96, 128),
    "split K within one block": (CudaConfig(8, 1, 4, 3, 1, 1, 2), E5M2, 64, 64, 256),
    "x shared by 2 clusters": (CudaConfig(8, 1, 4, 1, 2, 1, 2, share=2), E4M3, 64, 144, 320),
    "fewer tiles than warps": (CudaConfig(8, 1, 8, 1, 5, 1, 2, idle=1), E4M3, 60, 240, 320),
    "BF16": (CudaConfig(8, 1, 4, 1, 4, 1, 2), Plain(), 64, 64, 320),
}


@pytest.mark.parametrize("name", RESIDUALS)
def test_a_product_added_to_the_residual_stream(kernel, name):
    config, fmt, m, n, k = RESIDUALS[name]
    torch.manual_seed(0)
    bias, x = torch.randn(n).bfloat16(), torch.randn(m, k).bfloat16()
    weight, _ = packed((torch.randn(n, k) * 0.1).bfloat16(), fmt)
    before = torch.randn(m, n).bfloat16()
    gate, scale, shift = (torch.randn(n).bfloat16() for _ in range(3))
    parts = launch_grid(config, m, n)[0] // config.cluster
    modulated, squares = torch.full((65, n), torch.nan).bfloat16(), torch.full((m, parts), torch.nan)
    pointers = (t.data_ptr() for t in (before, gate, scale, shift, modulated, squares))
    got = kernel(config, x, weight, bias, n, fmt, role=Role.residual, stream=Arguments(*pointers))
    branch = kernel(config, x, weight, bias, n, fmt)
    want = (before.double() + gate.double() * branch.double()).float().bfloat16()
    assert torch.equal(got, want)
    assert torch.equal(modulated[:m], (got.double() * (1 + scale.double())).float().bfloat16())
    assert torch.equal(modulated[64], shift)
    assert modulated[m:64].isnan().all()
    assert torch.allclose(squares.sum(1), got.float().square().sum(1), rtol=1e-5)


def test_values_that_are_not_finite_stay_in_their_rows_and_columns(kernel):
    config, fmt, m, n, k = RESIDUALS["a cluster of 3"]
    torch.manual_seed(0)
    weight, _ = packed((torch.randn(n, k) * 0.1).bfloat16(), fmt)
    x, before = torch.randn(m, k).bfloat16(), torch.randn(m, n).bfloat16()
    vectors = [torch.randn(n).bfloat16() for _ in range(3)]
    parts = launch_grid(config, m, n)[0] // config.cluster

    def run():
        modulated, squares = torch.full((65, n), torch.nan).bfloat16(), torch.full((m, parts), torch.nan)
        pointers = [t.data_ptr() for t in (before, *vectors, modulated, squares)]
        out = kernel(config, x, weight, None, n, fmt, role=Role.residual, stream=Arguments(*pointers))
        return out, modulated[:m], squares

    clean = run()
    before[3, 5], x[8, 2] = torch.nan, torch.inf
    out, modulated, squares = run()
    for got in (out, modulated):
        assert got[3].isnan().nonzero().flatten().tolist() == [5]
        assert not got[8].isfinite().any()
    assert squares[3].isnan().sum() == 1
    kept = [row for row in range(m) if row not in (3, 8)]
    assert all(torch.equal(got[kept], want[kept]) for got, want in zip((out, modulated, squares), clean, strict=True))


def every_value(fmt, low, high):
    """[N, 64] weights with each finite code point under each scale byte from `low` to `high`."""
    codes = torch.arange(2**fmt.bits).repeat(32 // 2**fmt.bits or 1)
    codes = codes[(codes & 0x7F) < {"e4m3": 0x7F, "e5m2": 0x7C, "e2m1": 0x80}[fmt.name]]
    codes = codes[: len(codes) // 32 * 32] if len(codes) > 32 else codes
    scales = torch.arange(low, high + 1, dtype=torch.uint8)
    rows = codes.to(torch.uint8).view(-1, 32).repeat(len(scales), 1)
    scales = scales.repeat_interleave(len(codes) // 32)
    elements = rows if fmt.bits == 8 else rows[:, 0::2] | rows[:, 1::2] << 4
    return MXBlocks(elements, scales[:, None])


@pytest.mark.parametrize("high", [130, 150])
@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda f: f.name)
def test_every_code_point_is_decoded_under_every_scale(kernel, fmt, high):
    blocks = every_value(fmt, 97, high)
    n = blocks.scales.shape[0]
    weight = cuda_packing.pack(blocks, fmt)
    config = CudaConfig(4, 1, 4, 1, 1, 1, 1)
    got = kernel(config, torch.eye(32).bfloat16(), weight, None, n, fmt)
    assert torch.equal(got, decode(blocks, fmt).t())


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda f: f.name)
def test_an_unpacked_weight_is_the_decoded_one(fmt, tmp_path):
    write_source(tmp_path / "unpack.cpp", "mx_unpack.cu", "mx_unpack_cpu.hpp")
    macros = as_macros(cuda_packing.decoding(fmt.name) | {"WARPS": 8, "PDL": 0})
    library = cpp.library(tmp_path / "unpack.cpp", macros, tmp_path / "unpack.so")
    _, random, _ = operands(1, 39, 352, fmt)  # N and K end within a tile
    for blocks in (random, every_value(fmt, 97, 150)):
        weight, (n, scales) = cuda_packing.pack(blocks, fmt), blocks.scales.shape
        out = torch.full((n, 32 * scales), torch.nan).bfloat16()
        rows, groups = weight.tiles.shape[:2]
        library.run(address(weight.tiles), address(out), n, 32 * scales, groups, -(-rows * groups // 8))
        assert torch.equal(out * weight.output_scale, decode(blocks, fmt))


def test_a_layout_has_every_block_of_outputs_once():
    config = CudaConfig(8, 2, 4, 1, 4, 1, 1)
    assert launch_grid(config, 64, 8 * 16 * 5) == (20, 1)
    assert launch_grid(config, 65, 8 * 16 * 5 + 1) == (24, 2)
