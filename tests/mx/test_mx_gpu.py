"""On a GPU the formats and the weight-only Linear give the numbers of the CPU, eager and compiled."""

import pytest
import torch
from torch import nn

from harness.formats.mx import E2M1, E4M3, FORMATS, MXBlocks, decode, encode
from harness.formats.scales import ScaleMode
from harness.mx.conf import Activation, KernelChoice
from harness.mx.dispatch import available_kernels, resolve_kernel
from harness.mx.linears.base import LinearFormat, MXLinear
from harness.mx.weights import nearest

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.usefixtures("fresh_compiler"),
]


def every_scale(fmt) -> MXBlocks:
    elements = torch.arange(256, dtype=torch.uint8).repeat(256, 1)
    blocks = 256 * 8 // fmt.bits // 32
    return MXBlocks(elements, torch.arange(256, dtype=torch.uint8)[:, None].repeat(1, blocks))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda f: f.name)
def test_every_code_point_decodes_as_on_the_cpu(fmt, compiled):
    blocks = every_scale(fmt)

    def on_gpu(elements, scales):
        return decode(MXBlocks(elements, scales), fmt)

    run = torch.compile(on_gpu, fullgraph=True) if compiled else on_gpu
    got = run(*(t.cuda() for t in blocks)).cpu()
    rows = slice(16, 240)  # the ends of the range are subnormal or overflow, where compilers may flush
    torch.testing.assert_close(got[rows], decode(blocks, fmt)[rows], rtol=0, atol=0, equal_nan=True)


def same_blocks(got, want):
    """Equal, but for the elements of row 0's NaN block, which mean nothing."""
    assert torch.equal(got.scales.cpu(), want.scales)
    assert torch.equal(got.elements.cpu()[1:], want.elements[1:])


def special_rows(generator):
    x = torch.randn(64, 256, generator=generator).bfloat16()
    x[0, :3] = torch.tensor([torch.nan, torch.inf, 0.0])
    x[1] = 0
    return x


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("mode", ScaleMode)
@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda f: f.name)
def test_encoding_gives_the_bytes_of_the_cpu(fmt, mode, compiled):
    x = special_rows(torch.Generator().manual_seed(0))

    def on_gpu(x):
        return encode(x, fmt, mode)

    run = torch.compile(on_gpu, fullgraph=True) if compiled else on_gpu
    same_blocks(run(x.cuda()), encode(x, fmt, mode))


def test_one_function_compiles_for_every_format_and_mode():
    """Compiled again for another format, a function's numbers may become symbols; those of the formats must not."""
    x = special_rows(torch.Generator().manual_seed(0))

    def on_gpu(x, fmt, mode):
        return encode(x, fmt, mode)

    compiled = torch.compile(on_gpu, fullgraph=True)
    with torch._dynamo.config.patch(recompile_limit=len(FORMATS) * len(ScaleMode)):
        for fmt in FORMATS.values():
            for mode in ScaleMode:
                same_blocks(compiled(x.cuda(), fmt, mode), encode(x, fmt, mode))


@pytest.mark.parametrize("mode", ScaleMode)
@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda f: f.name)
def test_what_is_quantised_is_bf16_where_encoding_is_fused_with_what_made_it(fmt, mode):
    """A product of two BF16 values, exact in float32, which a fused kernel need not round."""
    generator = torch.Generator().manual_seed(1)
    x, y = special_rows(generator), torch.randn(64, 256, generator=generator).bfloat16()
    fused = torch.compile(lambda x, y: encode(x * y, fmt, mode), fullgraph=True)
    same_blocks(fused(x.cuda(), y.cuda()), encode(x * y, fmt, mode))


@pytest.mark.parametrize("fmt", [E4M3, E2M1], ids=lambda f: f.name)
def test_weight_only_linear_compiles_to_one_graph(fmt):
    torch.manual_seed(0)
    linear = nn.Linear(256, 512).bfloat16().cuda().requires_grad_(False)
    mx = MXLinear(nearest(linear, LinearFormat(fmt, ScaleMode.rceil, Activation.bf16)))
    x = torch.randn(64, 256, device="cuda").bfloat16()
    torch.testing.assert_close(torch.compile(mx, fullgraph=True)(x), mx(x), rtol=2**-7, atol=2**-7)


def test_auto_never_takes_a_native_kernel_before_blackwell():
    device = torch.device("cuda", 0)
    fmt = LinearFormat(E4M3, ScaleMode.rceil, Activation.mx)
    blackwell = torch.cuda.get_device_capability(device)[0] >= 10
    assert (available_kernels(device, fmt)["cutlass"] == "ok") == blackwell
    assert (resolve_kernel(KernelChoice.auto, device, fmt).name == "cutlass") == blackwell
