"""A step's two ends against float64: the kernels themselves compiled for a CPU, and on a GPU."""

import ctypes
import sys
from pathlib import Path

import cpp
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.kernels import launch
from harness.kernels.cuda import ends
from harness.kernels.cuda import linear as kernels_linear

HERE = Path(__file__).parent
KERNELS = HERE.parent.parent / "harness" / "kernels" / "cuda"
EPS = 1e-6
ON_GPU = torch.cuda.is_available()
REASON = kernels_linear.unavailable(torch.device("cuda", 0)) if ON_GPU else "needs a CUDA GPU"

on_a_cpu = [
    pytest.mark.skipif(cpp.COMPILER is None, reason="needs the compiler g++"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs ucontext, as Linux has it"),
]
hopper = [pytest.mark.gpu, pytest.mark.skipif(REASON is not None, reason=str(REASON))]


class Case:
    """Random operands of both ends, for D features, C channels and P tokens; vectors are views, as modulation's are."""

    def __init__(self, width, channels, tokens, device="cpu"):
        torch.manual_seed(0)
        side = int(tokens**0.5) if int(tokens**0.5) ** 2 == tokens else 1
        self.x = torch.randn(1, channels, side, tokens // side, device=device)
        self.drop = torch.tensor(0.625, device=device)
        self.total = (3 * torch.randn(tokens, width, device=device)).bfloat16()
        self.scale, self.shift = torch.randn(1, 2, 2 * width, device=device).bfloat16()[:, 1:].chunk(2, dim=-1)
        proj_in, proj_out = nn.Linear(channels, width, bias=False), nn.Linear(width, channels)
        self.proj_in, self.proj_out = (
            linear.bfloat16().requires_grad_(False).to(device) for linear in (proj_in, proj_out)
        )
        self.ends = ends.StepEnds(self.proj_in, self.proj_out, tokens, EPS)

    def entered(self):
        return self.ends.enter(self.x, self.scale, self.shift)

    def left(self):
        return self.ends.leave(self.total, self.scale, self.shift, self.x, self.drop)

    def tokens(self):
        """Float64 tokens of the latents, which the model rounds first."""
        rows = self.x.bfloat16().double().flatten(2)[0].t()
        return F.linear(rows, self.proj_in.weight.double())

    def velocity(self):
        """Float64 velocity ``[P, C]``, and what its terms add up to."""
        h, scale, shift = self.total.double(), self.scale.flatten().double(), self.shift.flatten().double()
        normed = h * torch.rsqrt(h.square().mean(1, keepdim=True) + EPS)
        y, weight = F.silu(normed * (1 + scale) + shift), self.proj_out.weight.double()
        return F.linear(y, weight, self.proj_out.bias.double()), F.linear(y.abs(), weight.abs())

    def check_entering(self):
        stream, want = self.entered(), self.tokens()
        total = stream.total.double()
        assert ((total - want).abs() <= 2**-8 * want.abs() + 1e-5).all()
        modulated = total * (1 + self.scale.flatten().double())
        assert ((stream.modulated[: len(total)].double() - modulated).abs() <= 2**-8 * modulated.abs()).all()
        assert torch.equal(stream.modulated[64], self.shift.flatten())
        torch.testing.assert_close(stream.squares.double().sum(1), total.square().sum(1), rtol=1e-5, atol=0)

    def check_leaving(self):
        (after, velocity), (want, terms) = self.left(), self.velocity()
        got = velocity.flatten(2)[0].t().double()
        assert torch.equal(velocity, velocity.bfloat16().float())
        assert ((got - want).abs() <= 2**-8 * want.abs() + 2**-8 * terms / 4).all()
        stepped = self.x.double() - self.drop.double() * velocity.double()
        torch.testing.assert_close(after.double(), stepped, rtol=1e-6, atol=1e-6)
        return got, want


SIZES = [(1536, 128, 64), (256, 16, 64), (320, 48, 16), (96, 32, 8), (2048, 256, 8)]


class TestSource:
    pytestmark = on_a_cpu

    @pytest.fixture(autouse=True)
    def without_a_gpu(self, tmp_path, monkeypatch):
        """Launches run the kernel's source on a CPU."""

        def run(step_ends, name, defines, shared, grid, arguments):
            parts = (HERE.parent / "mx" / "mx_device_cpu.hpp", HERE / "conv_device_cpu.hpp", KERNELS / f"{name}.cu")
            source = tmp_path / f"{name}.cpp"
            source.write_text("".join(f'#include "{part}"\n' for part in (*parts, HERE / "ends_run_cpu.hpp")))
            macros = [f"-D{name.upper()}", *(f"-D{key}={value}" for key, value in defines.items())]
            library = cpp.library(source, macros, tmp_path / f"{name}.so")
            assert library.shared_bytes() == shared
            library.run(*grid, *map(given, arguments))

        def given(argument):
            if isinstance(argument, Tensor):
                return ctypes.c_void_p(argument.data_ptr())
            return ctypes.byref(argument) if isinstance(argument, ctypes.Structure) else argument

        monkeypatch.setattr(ends.StepEnds, "_launch", run)

    @pytest.mark.parametrize("size", SIZES[1:])
    def test_latents_become_the_residual_stream(self, size):
        Case(*size).check_entering()

    @pytest.mark.parametrize("size", SIZES[1:])
    def test_the_stream_becomes_velocity_and_the_next_latents(self, size):
        Case(*size).check_leaving()

    def test_what_is_not_finite_stays_in_its_token(self):
        case = Case(96, 32, 8)
        case.total[3, 5] = torch.nan
        case.x[0, 7].view(-1)[2] = torch.inf
        (after, velocity), stream = case.left(), case.entered()
        finite = velocity.flatten(2)[0].isfinite()
        assert not finite[:, 3].any()
        assert finite[:, [0, 1, 2, 4, 5, 6, 7]].all()
        assert not stream.total[2].isfinite().any()
        assert stream.total[[0, 1, 3]].isfinite().all()
        assert after.flatten(2)[0, 7, 2] == torch.inf

    def test_large_and_small_values(self):
        case = Case(96, 32, 8)
        case.total *= torch.exp2(torch.arange(-40.0, 40, 10)).bfloat16()[:, None]
        case.check_leaving()
        case.shift[..., ::2] = 300
        case.shift[..., 1::2] = -300
        case.check_leaving()


def test_what_fits():
    assert ends.unfit(1536, 128, 64) is None
    refused = {
        (1536, 128, 4): "4 tokens",
        (1536, 128, 72): "72 tokens",
        (1552, 128, 64): "1552 features",
        (2560, 128, 64): "2560 features",
        (1536, 8, 64): "8 channels",
        (64, 272, 64): "272 channels",
    }
    for sizes, named in refused.items():
        assert named in str(ends.unfit(*sizes))
    with pytest.raises(ValueError, match="multiples of 16 up to 256"):
        Case(64, 24, 8)


@pytest.mark.parametrize("dependent", [False, True])
@pytest.mark.parametrize("size", SIZES)
class TestKernels:
    pytestmark = hopper

    def test_they_are_no_further_from_float64_than_eager_code_and_always_the_same(self, size, dependent, monkeypatch):
        monkeypatch.setattr(launch, "ENABLED", dependent)
        case, tokens = Case(*size, "cuda"), size[2]
        case.check_entering()
        got, want = case.check_leaving()
        normed = F.rms_norm(case.total, size[:1], eps=EPS)
        eager = case.proj_out(F.silu(normed * (1 + case.scale.flatten()) + case.shift.flatten())).double()
        assert (got - want).norm() < 1.1 * (eager - want).norm()
        (total, modulated, squares), again = case.entered(), case.entered()
        assert torch.equal(total, again.total)
        assert torch.equal(squares, again.squares)
        assert torch.equal(modulated[:tokens], again.modulated[:tokens])
        assert all(torch.equal(*both) for both in zip(case.left(), case.left(), strict=True))
