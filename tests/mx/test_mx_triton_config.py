"""Packing and launch shapes of `kernel=triton`: plain Python and torch, so they are tested without Triton."""

import importlib.util

import pytest
import torch

from harness.formats.mx import BLOCK, E2M1, E4M3, E5M2, FORMATS, MXBlocks, decode, encode
from harness.formats.scales import ScaleMode
from harness.kernels import tuned as tuned_files
from harness.kernels.triton import shapes
from harness.kernels.triton.packing import pack, padded_inputs, unpack
from harness.kernels.triton.shapes import GemmConfig, Shape, candidates, choose, rule, shared_bytes, steps
from harness.mx.conf import Activation, KernelChoice
from harness.mx.dispatch import resolve_kernel
from harness.mx.linears import triton as triton_linear
from harness.mx.linears.base import LinearFormat
from harness.mx.weights import nearest

W8A16 = LinearFormat(E4M3, ScaleMode.rceil, Activation.bf16)
W4A8 = LinearFormat(E2M1, ScaleMode.rceil, Activation.mxfp8)
HOPPER, AMPERE = (9, 0), (8, 0)
SHAPES = [
    Shape(m, n, k, bits, path)
    for m in (1, 16, 64, 256, 3840)
    for n, k in ((4608, 1536), (1536, 6144), (10240, 2560), (40, 256))
    for bits in (8, 4)
    for path in ("bf16", "fp8")
]


def random_blocks(n: int, k: int, fmt, low=100, high=134) -> MXBlocks:
    elements = torch.randint(0, 256, (n, k * fmt.bits // 8), dtype=torch.uint8)
    if fmt.bits == 8:
        elements &= 0xBB if fmt is E5M2 else 0xFE  # neither NaN nor infinity
    return MXBlocks(elements, torch.randint(low, high + 1, (n, k // BLOCK), dtype=torch.uint8))


@pytest.mark.parametrize("width", [32, 64, 128])
@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda f: f.name)
@pytest.mark.parametrize(("n", "k"), [(1, 32), (40, 96), (128, 256), (130, 544)])
def test_unpacking_gives_back_every_bit(n, k, fmt, width):
    blocks = random_blocks(n, k, fmt, 0, 255)
    packed = pack(blocks, fmt, width)
    assert packed.elements.numel() == -(-n // 128) * 128 * padded_inputs(k, fmt) * fmt.bits // 8
    for got, want in zip(unpack(packed, fmt, n, k), blocks, strict=True):
        assert torch.equal(got, want)


def test_a_tile_of_weights_is_contiguous_and_nibbles_split_k_in_halves():
    codes = (torch.arange(512) % 16).to(torch.uint8).repeat(2, 1)
    codes[1] = 15 - codes[1]
    blocks = MXBlocks(codes[:, 0::2] | codes[:, 1::2] << 4, torch.full((2, 16), 127, dtype=torch.uint8))
    packed = pack(blocks, E2M1, 32)
    assert packed.elements.shape == (8, 128, 32)
    assert packed.elements.is_contiguous()
    assert torch.equal(packed.elements[3, 1] & 15, codes[1, 96:128])
    assert torch.equal(packed.elements[3, 1] >> 4, codes[1, 256 + 96 : 256 + 128])


@pytest.mark.parametrize(
    ("change", "wide"),
    [
        (lambda b: None, False),
        (lambda b: b.scales[0, 0].fill_(254), True),
        (lambda b: b.scales[0, 0].fill_(255), True),
        (lambda b: b.scales[0, 0].fill_(0), True),
        (lambda b: (b.scales[0, 0].fill_(0), b.elements[0, :32].fill_(0x80)), False),
        (lambda b: b.elements[0, 0].fill_(0xFF), True),
    ],
    ids=["ordinary", "huge scale", "NaN scale", "tiny scale", "zero block", "NaN element"],
)
def test_special_weights_ask_for_the_wide_decoding(change, wide):
    blocks = random_blocks(4, 64, E4M3)
    blocks.elements[0, 0] = 1
    change(blocks)
    assert pack(blocks, E4M3, 128).wide is wide


def test_trained_looking_weights_take_the_short_decoding():
    weight = (torch.randn(64, 128) * 0.02).bfloat16()
    weight[3] = 0
    assert not any(pack(encode(weight, fmt), fmt, 128).wide for fmt in FORMATS.values())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_rule_gives_a_shape_that_fits_and_feeds_every_program(shape):
    config = rule(shape, HOPPER, 132)
    assert shared_bytes(shape, config) <= 227 * 1024
    assert steps(shape) >= config.split_k
    assert config.swap or config.block_m >= 64  # unswapped, rows of x are the tensor cores' 64


@pytest.mark.parametrize("shape", [s for s in SHAPES if s.m <= 256], ids=str)
def test_candidates_fit_and_are_distinct(shape):
    found = candidates(shape, HOPPER)
    assert found
    assert len(set(found)) == len(found)
    assert all(shared_bytes(shape, c) <= 227 * 1024 and steps(shape) >= c.split_k for c in found)
    assert all(c.block_m <= max(16, shape.m) for c in found)


def test_k_is_split_where_outputs_alone_leave_multiprocessors_idle():
    assert rule(Shape(64, 1536, 6144, 8, "bf16"), HOPPER, 132).split_k > 2
    assert rule(Shape(3840, 6144, 1536, 8, "bf16"), HOPPER, 132).split_k == 1


def test_a_measured_shape_wins_over_the_rule(monkeypatch):
    best = GemmConfig(64, 32, 7, 4, 2, True)
    found = {"path": "bf16", "bits": 8, "m": 64, "n": 4608, "k": 1536, "config": best.as_ints()}
    file = {"gpu": "NVIDIA H200", "capability": 90, "runs": [{"date": "", "commit": "", "shapes": [found]}]}
    monkeypatch.setattr(tuned_files, "read", lambda package: (file,))
    for cached in (tuned_files.shapes, shapes.tuned):
        cached.cache_clear()
    product = Shape(50, 4608, 1536, 8, "bf16")
    assert choose(product, HOPPER, 132, "NVIDIA H200") == best
    assert choose(product, HOPPER, 132, "NVIDIA H100") == best  # none of its own: of its compute capability
    assert choose(product, AMPERE, 108, "NVIDIA A100") != best
    for cached in (tuned_files.shapes, shapes.tuned):
        cached.cache_clear()
    assert GemmConfig.from_ints(best.as_ints()) == best


@pytest.fixture
def hopper(monkeypatch):
    """A machine with an H200 and Triton, as far as the choice of a kernel looks."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name == "triton" else find_spec(name))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    return torch.device("cuda", 0)


def test_where_the_kernels_run_and_why_not(hopper, monkeypatch):
    assert triton_linear.unavailable(hopper, W8A16) is None
    assert "the model is on cpu" in triton_linear.unavailable(torch.device("cpu"), W8A16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "sm_75" in triton_linear.unavailable(hopper, W8A16)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "not installed" in triton_linear.unavailable(hopper, W8A16)


@pytest.mark.parametrize("activation", Activation)
@pytest.mark.parametrize("element", FORMATS.values(), ids=lambda f: f.name)
def test_auto_emulates_nothing_that_the_kernels_can_compute(hopper, element, activation):
    kernel = resolve_kernel(KernelChoice.auto, hopper, LinearFormat(element, ScaleMode.rceil, activation))
    assert kernel.name in ("triton", "cuda")  # whichever of them runs here
    assert not kernel.emulated


def test_fp8_tensor_cores_are_for_mx_by_mx_that_e4m3_holds():
    assert triton_linear.paths(W4A8, HOPPER) == ("bf16", "fp8")
    assert triton_linear.paths(W4A8, AMPERE) == ("bf16",)
    assert triton_linear.paths(W8A16, HOPPER) == ("bf16",)
    assert triton_linear.paths(LinearFormat(E5M2, ScaleMode.rceil, Activation.mx), HOPPER) == ("bf16",)


def test_emulated_w4a8_multiplies_mxfp4_by_mxfp8():
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 16).bfloat16().requires_grad_(False)
    mx = resolve_kernel(KernelChoice.emulated, torch.device("cpu"), W4A8).build(nearest(linear, W4A8))
    x = torch.randn(5, 64).bfloat16()
    rounded, weight = (decode(encode(t, fmt), fmt) for t, fmt in ((x, E4M3), (linear.weight, E2M1)))
    assert torch.equal(mx(x), torch.nn.functional.linear(rounded, weight, linear.bias))
    assert "W4A8 E2M1 weights, E4M3 activations" in W4A8.numeric_path
