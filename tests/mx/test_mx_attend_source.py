"""`mx_attend.cu` itself, compiled for a CPU (see test_mx_cuda_source.py), against float64 and what a ring stores."""

import ctypes
import math
import sys
from pathlib import Path

import cpp
import pytest
import torch
import torch.nn.functional as F

from harness.formats.mx import FORMATS, MXBlocks, decode, encode
from harness.formats.scales import ScaleMode
from harness.kernels.cuda import packing as cuda_packing
from harness.kernels.cuda.attend import AttendShape, Window
from harness.kernels.cuda.stream import Squares

HERE = Path(__file__).parent
KERNELS = HERE.parent.parent / "harness" / "kernels" / "cuda"
PARTS = [HERE / "mx_device_cpu.hpp", *(KERNELS / name for name in ("mx_decode.cuh", "mx_product.cuh", "mx_attend.cu"))]
TOKENS = DIM = 64
EPS = 1e-6

pytestmark = [
    pytest.mark.skipif(cpp.COMPILER is None, reason="needs the compiler g++"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs ucontext, as Linux has it"),
]


def address(tensor):
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


class Case:
    """Random operands of a layer; ``shape`` says of which kernel."""

    def __init__(self, shape, heads, frames, slot):
        torch.manual_seed(0)
        self.shape, self.heads, self.frames = shape, heads, frames
        k = shape.inputs
        weight, self.bias = (torch.randn(3 * heads * DIM, k) * 0.1).bfloat16(), torch.randn(3 * heads * DIM).bfloat16()
        if shape.element == "bf16":
            self.packed, self.weight = cuda_packing.CudaWeight(cuda_packing.pack_plain(weight), 1.0), weight
        else:
            fmt = FORMATS[shape.element]
            blocks = encode(weight, fmt)
            self.packed, self.weight = cuda_packing.pack(blocks, fmt), decode(blocks, fmt)
        self.x = torch.full((65, k), torch.nan).bfloat16()
        self.x[:64], self.x[64] = torch.randn(64, k).bfloat16(), torch.randn(k).bfloat16()
        self.squares = torch.rand(64, 7) * k / 7
        angles = torch.rand(TOKENS, DIM // 2) * 6
        self.cos, self.sin = angles.cos(), angles.sin()
        self.slot = torch.tensor([slot])
        self.rings, self.stored = zip(*(self.ring(fmt) for fmt in (shape.k, shape.v)), strict=True)

    def ring(self, fmt):
        """What is stored (data, scales), and what that means."""
        values = F.normalize(torch.randn(self.heads, self.frames, TOKENS, DIM), dim=-1) * 8
        values = values.bfloat16()
        if fmt == "plain":
            return (values.clone(), None), values
        blocks = encode(values, FORMATS[fmt])
        return (blocks.elements.clone(), blocks.scales.clone()), decode(blocks, FORMATS[fmt])

    def run(self, library, seed=0):
        out = torch.full((TOKENS, self.heads * DIM), torch.nan).bfloat16()
        squares = Squares(self.squares.data_ptr(), self.squares.shape[1], 1 / self.shape.inputs, EPS)
        rings = [None if t is None else t.data_ptr() for ring in self.rings for t in ring]
        scale = math.log2(math.e) / math.sqrt(DIM)
        places = (self.slot.data_ptr(), self.cos.data_ptr(), self.sin.data_ptr())
        window = Window(*rings, *places, self.heads, self.frames, scale, EPS)
        library.run(
            address(self.x), self.shape.inputs, address(self.packed.tiles), address(self.bias), address(out),
            self.packed.tiles.shape[1], ctypes.c_float(self.packed.output_scale), ctypes.byref(squares),
            ctypes.byref(window), seed,
        )  # fmt: skip
        return out

    def projected(self):
        """Queries, keys and values [H, 64, 64] as a projection rounds them, the first two normalised and rotated."""
        x, weight = self.x.double(), self.weight.double()
        inverse = torch.rsqrt(self.squares.double().sum(1, keepdim=True) / self.shape.inputs + EPS)
        rows = x[:64] * inverse + x[64]
        qkv = F.linear(rows, weight, self.bias.double()).bfloat16()
        q, k, v = qkv.view(TOKENS, 3, self.heads, DIM).permute(1, 2, 0, 3)
        return rotated(q, self.cos, self.sin), rotated(k, self.cos, self.sin), v

    def want(self):
        q, k, v = (t.double() for t in self.projected())
        past = [f for f in range(self.frames) if f != int(self.slot)]
        keys, values = (
            torch.cat([t[:, past].flatten(1, 2).double(), own], 1) for t, own in zip(self.stored, (k, v), strict=True)
        )
        out = F.scaled_dot_product_attention(q, keys, values)
        return out.transpose(0, 1).flatten(1)


def rotated(x, cos, sin):
    normed = (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + EPS)).bfloat16().float()
    even, odd = normed[..., 0::2], normed[..., 1::2]
    return torch.cat([even * cos - odd * sin, odd * cos + even * sin], -1).bfloat16()


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The kernel of an AttendShape, compiled for a CPU."""
    folder = tmp_path_factory.mktemp("mx_attend")
    source, built = folder / "kernel.cpp", {}
    source.write_text("".join(f'#include "{part}"\n' for part in (*PARTS, HERE / "mx_attend_cpu.hpp")))

    def of(shape):
        if shape not in built:
            macros = tuple(f"-D{name}={value}" for name, value in shape.defines().items())
            built[shape] = cpp.library(source, macros, folder / f"kernel{len(built)}.so")
            assert built[shape].shared_bytes() == shape.shared_bytes(shape.stages())
        return built[shape]

    return of


R = ScaleMode.rceil
CASES = {
    "BF16, a cluster of 5": (AttendShape(320, "bf16", "plain", "plain", True, True, R, 5), 2, 17, 3),
    "MXFP8, V in MX": (AttendShape(384, "e4m3", "plain", "e4m3", True, True, R, 4), 1, 6, 5),
    "MXFP4, both in MX": (AttendShape(256, "e2m1", "e5m2", "e2m1", True, True, ScaleMode.floor, 3), 2, 5, 0),
    "K in MX alone, stores nothing": (AttendShape(128, "e5m2", "e4m3", "plain", False, False, R, 2), 1, 9, 8),
    "more blocks than groups": (AttendShape(128, "bf16", "e2m1", "e5m2", True, True, ScaleMode.even, 8), 1, 3, 1),
    "no other frame": (AttendShape(192, "bf16", "plain", "plain", True, True, R, 2), 1, 1, 0),
}


def slots(case):
    """Of each ring and its scales, what the frame's slot holds, and the rest."""
    slot = int(case.slot)
    rest = [f for f in range(case.frames) if f != slot]
    tensors = [t.view(torch.uint8) for ring in case.rings for t in ring if t is not None]
    return [t[:, slot].clone() for t in tensors], [t[:, rest].clone() for t in tensors]


@pytest.mark.parametrize("name", CASES)
def test_attention_is_that_of_the_projected_rows(compiled, name):
    case = Case(*CASES[name])
    for ring in case.rings:  # what has left the window is read by nobody
        for t in ring:
            if t is not None:
                t[:, int(case.slot)].view(torch.uint8).fill_(0xFF)
    before, others = slots(case)
    got, want = case.run(compiled(case.shape)).double(), case.want()
    assert (got - want).norm() < 4e-3 * want.norm()
    assert ((got - want).abs() < 0.05 * want.abs().max()).all()
    after, others_after = slots(case)
    assert all(torch.equal(a, b) for a, b in zip(others, others_after, strict=True))
    if not case.shape.k_stores:
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        return
    for ring, fmt, own in zip(case.rings, (case.shape.k, case.shape.v), case.projected()[1:], strict=True):
        slot = [None if t is None else t[:, int(case.slot)] for t in ring]
        kept = slot[0] if fmt == "plain" else decode(MXBlocks(*slot), FORMATS[fmt])
        again = own if fmt == "plain" else decode(encode(own, FORMATS[fmt], case.shape.mode), FORMATS[fmt])
        # A sum that rounds the other way may move an element by a step, of few.
        assert (kept.float() - again.float()).norm() < 0.02 * own.float().norm()


def test_threads_may_run_in_any_order(compiled):
    case = Case(*CASES["MXFP4, both in MX"])
    first, *others = (case.run(compiled(case.shape), seed) for seed in range(3))
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("mode", ScaleMode)
@pytest.mark.parametrize("fmt", FORMATS)
def test_values_are_stored_as_they_are_encoded_elsewhere(compiled, fmt, mode):
    """Rows of x are unit vectors whose norm is 1, so that values are columns of the weight, exactly."""
    shape = AttendShape(64, "bf16", fmt, fmt, True, True, mode, 2)
    case = Case(shape, 1, 2, 1)
    torch.manual_seed(1)
    weight = torch.randn(192, 64) * torch.exp2(torch.randint(-40, 40, (192, 64)).float() / 4)
    weight[128:160, 0], weight[160:, 1] = 0, 2.0**-130
    weight[130, 2], weight[170, 3], weight[140, 4] = torch.nan, torch.inf, 2.0**120
    case.bias, case.squares = torch.zeros(192).bfloat16(), torch.full((64, 1), 64.0)
    case.x[:64], case.x[64] = torch.eye(64).bfloat16(), 0
    case.packed = cuda_packing.CudaWeight(cuda_packing.pack_plain(weight.bfloat16()), 1.0)
    case.run(compiled(shape))
    # A product with a value that is not finite is NaN for every token.
    values = F.linear(case.x[:64].float(), weight[128:].bfloat16().float())
    want, (data, scales) = encode(values.bfloat16(), FORMATS[fmt], mode), case.rings[1]
    assert torch.equal(scales[0, 1], want.scales)
    finite = want.scales != 255
    width = data.shape[-1] // 2
    assert torch.equal(data[0, 1].view(64, 2, width)[finite], want.elements.view(64, 2, width)[finite])


@pytest.mark.parametrize("fmt", FORMATS)
def test_every_stored_code_is_decoded_under_every_scale(compiled, fmt):
    """To BF16, rounded once where BF16's smallest numbers are too coarse."""
    shape = AttendShape(64, "bf16", fmt, fmt, True, True, R, 2)
    library, width = compiled(shape), DIM * FORMATS[fmt].bits // 8
    codes = torch.randint(0, 256, (64, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    codes[: 256 * 2 // width] = torch.arange(256, dtype=torch.uint8).repeat(2).view(-1, width)
    none = {"e4m3": 0x7F, "e5m2": 0x7C, "e2m1": 0x80}[
        fmt
    ]  # from here on codes that encoding gives under no finite scale
    codes[(codes & 0x7F) >= none] = none - 1
    for first in range(0, 256, 128):
        for turn in (0, 1):  # each code is in both blocks of a row
            scales = torch.arange(first, first + 128, dtype=torch.uint8).roll(turn).view(64, 2)
            got = torch.full((64, DIM), torch.nan).bfloat16()
            library.decode_values(address(codes), address(scales), address(got))
            want = decode(MXBlocks(codes, scales), FORMATS[fmt]).bfloat16()
            assert torch.equal(got.isnan(), want.isnan())
            assert torch.equal(got.nan_to_num(), want.nan_to_num())


def test_values_that_are_not_finite_stay_in_their_heads_and_columns(compiled):
    shape = AttendShape(128, "bf16", "plain", "e4m3", True, True, R, 2)
    case = Case(shape, 3, 3, 1)
    clean = case.run(compiled(shape)).view(TOKENS, 3, DIM)
    case.rings[1][1][0, 2, 5, 1] = 255  # a block of values of the first head: its upper columns
    case.rings[0][0][1, 0, 9, 3] = torch.nan  # a key of the second
    got = case.run(compiled(shape)).view(TOKENS, 3, DIM)
    assert torch.equal(got[:, 0, :32], clean[:, 0, :32])
    assert got[:, 0, 32:].isnan().all()
    assert got[:, 1].isnan().all()
    assert torch.equal(got[:, 2], clean[:, 2])
    case.x[7, 3] = torch.nan  # of a row of the stream, whose keys and values all others see
    assert case.run(compiled(shape)).isnan().all()
