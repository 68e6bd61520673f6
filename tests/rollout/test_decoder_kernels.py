"""The decoder's kernels themselves, compiled for a CPU: every thread, product and copy of a block, without a GPU."""

import ctypes
import sys
from pathlib import Path

import cpp
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from harness.kernels.cuda import conv
from harness.models.checkpoint import random_decoder
from harness.models.dcae import DCAEConfig, ResBlock, bicubic_matrix
from harness.rollout import fused_decoder
from harness.rollout.fused_decoder import FusedDecoder

HERE = Path(__file__).parent
KERNELS = HERE.parent.parent / "harness" / "kernels" / "cuda"

pytestmark = [
    pytest.mark.skipif(cpp.COMPILER is None, reason="needs the compiler g++"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs ucontext, as Linux has it"),
]


def address(tensor):
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


@pytest.fixture
def kernel(tmp_path):
    """Compiles a kernel: (file, name, parameters) to a library."""

    def build(file, name, parameters):
        number = len(list(tmp_path.iterdir()))  # a library that is loaded must not be written again
        source, library = tmp_path / f"{name}{number}.cpp", tmp_path / f"{name}{number}.so"
        device = (HERE.parent / "mx" / "mx_device_cpu.hpp", HERE / "conv_device_cpu.hpp")
        parts = (*device, KERNELS / "conv_tile.cuh", KERNELS / file, HERE / "conv_run_cpu.hpp")
        source.write_text("".join(f'#include "{part}"\n' for part in parts))
        macros = [f"-D{name}", *(f"-D{key}={value}" for key, value in parameters.items())]
        return cpp.library(source, macros, library)

    return build


def call(library, x, weights, shortcut, out, base, height, width, channels, wide=0):
    tensors = [address(tensor) for tensor in (x, weights, shortcut, out, base)]
    library.run(*tensors, x.shape[0], height, width, channels, wide)


def picture(*shape):
    """Random values of some size, channels last."""
    return torch.randn(*shape).bfloat16()


def first(x):
    return x.permute(0, 3, 1, 2)


def doubled(x):
    return F.interpolate(first(x.double()), scale_factor=2, mode="bicubic", align_corners=False)


def shuffled(x, channels):
    shortcut = F.pixel_shuffle(first(x.double()), 2)
    return shortcut.repeat(1, channels // shortcut.shape[1], 1, 1)


def block_of(channels):
    block = ResBlock(channels).bfloat16().eval().requires_grad_(False)
    block.conv1.bias.add_(0.3)  # so that zeros outside the picture show
    return block


def assert_close(got, want):
    """Within what rounding what lies between the convolutions to BF16 does."""
    error = (first(got).double() - want).norm() / want.norm()
    assert error < 4e-3, error


@pytest.mark.parametrize(
    ("channels", "wide", "double", "silu", "rows"),
    [
        (32, 64, True, False, 8),
        (32, None, False, True, 8),
        (64, 64, True, True, 8),
        (96, None, False, False, 8),
        (96, 192, True, True, 8),
        (128, 256, True, False, 8),
        (128, 256, True, False, 4),
        (128, None, False, True, 4),
    ],
)
def test_a_stage_is_doubling_a_residual_block_and_the_shortcut(channels, wide, double, silu, rows, kernel, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(conv, "rows_of", lambda _: rows)
    block, batch, height, width = block_of(channels), 2, 16, 32
    size = (batch, height // 2, width // 2) if double else (batch, height, width)
    x = picture(*size, channels)
    shortcut = None if wide is None else picture(batch, height // 2, width // 2, wide)
    defines = conv.resblock_defines(channels, wide or channels, double, wide is not None, silu)
    library = kernel("resblock.cu", "RESBLOCK", defines)
    assert library.shared_bytes() == conv.resblock_bytes(channels, double)
    out = torch.full((batch, height, width, channels), torch.nan).bfloat16()
    call(
        library,
        x,
        conv.pack_resblock(block.conv1, block.conv2, block.conv3),
        shortcut,
        out,
        None,
        height,
        width,
        channels,
    )
    inside = doubled(x).bfloat16().double() if double else first(x).double()
    want = block.double()(inside)
    if shortcut is not None:
        want = want + shuffled(shortcut, channels)
    assert_close(out, F.silu(want) if silu else want)


def test_a_grouped_convolution_between_activations(kernel):
    torch.manual_seed(0)
    channels, height, width = 64, 16, 32
    layer = nn.Conv2d(channels, channels, 3, padding=1, groups=channels // 16).bfloat16().requires_grad_(False)
    x, out = picture(2, height, width, channels), torch.full((2, height, width, channels), torch.nan).bfloat16()
    library = kernel("conv_stage.cu", "GROUPED", conv._STAGE)
    assert library.shared_bytes() == conv._stage_bytes()
    call(library, x, conv.pack_grouped(layer), None, out, None, height, width, channels)
    want = F.leaky_relu(layer.double()(F.leaky_relu(first(x).double(), 0.01)), 0.01)
    assert_close(out, want)


@pytest.mark.parametrize("wide", [32, 64])
def test_upsampling_equals_the_models_and_adds_the_shortcut(wide, kernel):
    torch.manual_seed(0)
    channels, h, w = 32, 8, 16
    small, shortcut = picture(2, h, w, channels), picture(2, h, w, wide)
    out, base = (torch.full((2, 2 * h, 2 * w, channels), torch.nan).bfloat16() for _ in range(2))
    library = kernel("conv_stage.cu", "UPSAMPLE", conv._STAGE)
    call(library, small, None, shortcut, out, base, 2 * h, 2 * w, channels, wide)
    want = doubled(small)
    slack = 2**-8 * want.abs() + 1e-6
    assert ((first(out).double() - want).abs() <= slack).all()
    rows = bicubic_matrix(h, 2 * h).double()
    assert torch.allclose(want[..., 0], (rows @ doubled_across(small))[..., 0], atol=1e-6)
    assert_close(base, want + shuffled(shortcut, channels))


def doubled_across(x):
    return first(x.double()) @ bicubic_matrix(x.shape[2], 2 * x.shape[2]).double().T


def test_the_last_convolution_gives_three_colours(kernel):
    torch.manual_seed(0)
    channels, height, width = 64, 16, 32
    layer = nn.Conv2d(channels, 3, 3, padding=1, bias=False).bfloat16().requires_grad_(False)
    x, out = picture(2, height, width, channels), torch.full((2, 3, height, width), torch.nan).bfloat16()
    library = kernel("conv_rgb.cu", "RGB", {"TH": 8, "WARPS": 4, "C": channels})
    assert library.shared_bytes() == conv._rgb_bytes(channels, 8)
    call(library, x, conv.pack_rgb(layer), None, out, None, height, width, 3)
    want = layer.double()(first(x).double())
    assert (out.double() - want).norm() / want.norm() < 4e-3


@pytest.mark.parametrize("colours", [1, 3, 4])
def test_a_last_stage_gives_what_each_tap_of_the_last_convolution_makes_of_a_pixel(colours, kernel):
    torch.manual_seed(0)
    block, channels, batch, height, width = block_of(32), 32, 2, 16, 32
    layer = nn.Conv2d(channels, colours, 3, padding=1, bias=False).bfloat16().requires_grad_(False)
    x, out = picture(batch, height, width, channels), torch.full((batch, 9, height, width, 4), torch.nan).bfloat16()
    library = kernel("resblock.cu", "RESBLOCK", conv.resblock_defines(channels, channels, False, False, True, rgb=True))
    packed = conv.pack_resblock(block.conv1, block.conv2, block.conv3)
    colour_weights = conv.pack_products(layer)
    library.behind(address(colour_weights), address(out))
    call(library, x, packed, None, None, None, height, width, channels)
    result = F.silu(block.double()(first(x).double()))
    want = torch.einsum("bchw,octs->btshwo", result, layer.weight.double()).flatten(1, 2)
    assert (out[..., :colours].double() - want).norm() / want.norm() < 6e-3
    assert (out[..., colours:] == 0).all()


@pytest.mark.parametrize("following", [32, 96])
def test_a_stage_projects_its_result_for_the_next_one(following, kernel):
    torch.manual_seed(0)
    block, channels, batch, height, width = block_of(64), 64, 2, 16, 32
    layer = nn.Conv2d(channels, following, 1, bias=False).bfloat16().requires_grad_(False)
    x, out = picture(batch, height, width, channels), torch.full((batch, height, width, channels), torch.nan).bfloat16()
    products = torch.full((batch, height, width, following), torch.nan).bfloat16()
    library = kernel("resblock.cu", "RESBLOCK", conv.resblock_defines(channels, 64, False, False, False, following))
    packed = conv.pack_resblock(block.conv1, block.conv2, block.conv3)
    weights = conv.fragments(layer.weight.flatten(1))
    library.behind(address(weights), address(products))
    call(library, x, packed, None, out, None, height, width, channels)
    assert_close(out, block.double()(first(x).double()))
    want = layer.double()(first(out).double())
    assert (first(products).double() - want).norm() / want.norm() < 4e-3


@pytest.mark.parametrize("size", [(18, 40), (9, 16), (33, 70)])
def test_resizing_adds_up_the_taps_and_is_torchs(size, kernel):
    torch.manual_seed(0)
    height, width = 16, 24
    x, out = picture(2, 9, height, width, 4), torch.full((2, 3, *size), torch.nan).bfloat16()
    library = kernel("conv_rgb.cu", "RESIZE", {**conv._RGB, "C": 32})
    call(library, x, None, None, out, None, height, width, *size)
    taps = F.pad(x.double(), (0, 0, 1, 1, 1, 1))  # each tap's neighbour, zeros outside
    moved = [taps[:, 3 * y + z, y : y + height, z : z + width, :3] for y in range(3) for z in range(3)]
    want = F.interpolate(first(sum(moved)), size=size, mode="bicubic", align_corners=False)
    assert ((out.double() - want).abs() <= 2**-8 * want.abs() + 1e-3).all()


@pytest.fixture
def kernels_on_a_cpu(kernel, monkeypatch):
    """Launches run the kernels compiled for a CPU."""
    built = {}

    def launch(file, name, defines, shared, grid, arguments):
        which = {"resblock": "RESBLOCK", "grouped_conv": "GROUPED", "upsample": "UPSAMPLE", "conv_rgb": "RGB"}
        key = (name, *defines.items())
        if key not in built:
            built[key] = kernel(file, which.get(name, "RESIZE"), defines)
        tensors = [a for a in arguments if not isinstance(a, int)]
        sizes = [a for a in arguments if isinstance(a, int)]
        if name == "upsample":
            small, shortcut, out, base = tensors
            call(built[key], small, None, shortcut, out, base, *sizes)
        elif name == "resize":
            products, out = tensors
            call(built[key], products, None, None, out, None, *sizes[:4])
        elif name == "resblock":
            x, weights, shortcut, after, out, products = tensors
            built[key].behind(address(after), address(products))
            call(built[key], x, weights, shortcut, out, None, *sizes[:2], 0)
        else:
            x, weights, out = tensors
            call(built[key], x, weights, None, out, None, *sizes[:3])

    monkeypatch.setattr(conv, "_launch", launch)
    monkeypatch.setattr(conv, "_multiprocessors", lambda _: 3)


@pytest.mark.parametrize(
    ("size", "stages", "widest"), [([32, 32], [1, 2], 192), ([18, 32], [2, 1], 32), ([32, 32], [1, 1], 0)]
)
def test_the_fused_decoder_gives_the_models_picture(size, stages, widest, kernels_on_a_cpu, monkeypatch):
    monkeypatch.setattr(conv, "WIDEST", widest)
    cfg = DCAEConfig(
        sample_size=size, latent_size=8, latent_channels=16, ch_0=32, ch_max=64, decoder_blocks_per_stage=stages
    )
    decoder = random_decoder(cfg, 0).bfloat16()
    assert fused_decoder.unfit(cfg, torch.bfloat16) is None
    z = torch.randn(2, 16, 8, 8).bfloat16()
    want = random_decoder(cfg, 0).double()
    for exact, rounded in zip(want.parameters(), decoder.parameters(), strict=True):
        exact.data = rounded.data.double()
    expected, got, eager = want(z.double()), FusedDecoder(decoder)(z).double(), decoder(z).double()
    assert got.shape == expected.shape
    error, usual = ((x - expected).norm() / expected.norm() for x in (got, eager))
    assert error < 1.3 * usual


def test_a_stage_is_one_kernel_where_tiles_of_it_fit():
    assert [c for c in range(32, 800, 32) if conv.one_launch(c)] == [32, 64, 96, 128, 160, 192, 256, 320, 384]


@pytest.mark.parametrize(
    ("fields", "dtype", "reason"),
    [
        ({}, torch.float32, "compute in bfloat16, this decoder in float32"),
        ({"use_middle_block": True}, torch.bfloat16, "middle block"),
        ({"latent_size": 4, "sample_size": [16, 16]}, torch.bfloat16, "tiles are 16 pixels"),
        ({"ch_0": 16, "ch_max": 32}, torch.bfloat16, "16 channels are not a multiple of 32"),
    ],
)
def test_a_decoder_that_does_not_fit_is_refused_with_the_reason(fields, dtype, reason):
    sizes = {"sample_size": [32, 32], "latent_size": 8, "latent_channels": 16, "ch_0": 32, "ch_max": 64}
    cfg = DCAEConfig(**{**sizes, **fields}, decoder_blocks_per_stage=[1, 1])
    assert reason in fused_decoder.unfit(cfg, dtype)
