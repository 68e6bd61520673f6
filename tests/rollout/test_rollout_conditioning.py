"""A frame's conditioning by our kernels against the model's. Without a GPU Triton's interpreter runs them."""

# ruff: noqa: E402  (what follows the skips needs the package triton)
import importlib.util

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

if importlib.util.find_spec("triton") is None:
    pytest.skip("the package triton is not installed", allow_module_level=True)
ON_GPU = torch.cuda.is_available()
if not ON_GPU and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
    pytest.skip("Triton's interpreter needs numpy below 2.4", allow_module_level=True)

from rollout_cases import make_core

from harness.rollout.conditioning import MOST_CLIPS, fused_conditioning

DEVICE = torch.device("cuda", 0) if ON_GPU else torch.device("cpu")


def case(dtype, batch, steps=2, buttons=11):
    torch.manual_seed(batch)
    core = make_core(d_model=32, n_heads=1, n_buttons=buttons).to(DEVICE, dtype).requires_grad_(False)
    times = torch.randn(batch, steps, 32, device=DEVICE).to(dtype)
    mouse = 30 * torch.randn(batch, 2, device=DEVICE)
    pressed = (torch.rand(batch, buttons, device=DEVICE) > 0.5).float()
    return core, times, mouse, pressed


def expected(core, times, mouse, pressed):
    steps = times.shape[1]
    return F.silu(core.add_controls(times, *(x[:, None].expand(-1, steps, -1) for x in (mouse, pressed))))


@pytest.mark.parametrize(("batch", "steps", "buttons"), [(1, 2, 11), (3, 1, 2), (4, 4, 16)])
def test_it_is_the_models(batch, steps, buttons):
    core, times, mouse, pressed = case(torch.float32, batch, steps, buttons)
    activated = fused_conditioning(core, times)
    torch.testing.assert_close(activated(mouse, pressed), expected(core, times, mouse, pressed), rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA GPU: Triton's interpreter cuts BF16 off where a GPU rounds")
def test_in_bf16_it_is_as_close_to_float32_as_the_models():
    core, times, mouse, pressed = case(torch.bfloat16, 2)
    exact = expected(core.float(), times.float(), mouse, pressed)
    core.to(torch.bfloat16)
    ours, eager = fused_conditioning(core, times)(mouse, pressed), expected(core, times, mouse, pressed)
    error, its = ((x.float() - exact).norm() / exact.norm() for x in (ours, eager))
    assert error < 1.3 * its


@pytest.mark.parametrize(("mouse", "buttons"), [((0.0, 0.0), 0.0), ((-1e4, 1e4), 1.0), ((0.0, -0.5), 1.0)])
def test_a_mouse_at_rest_and_one_thrown_far_are_the_models(mouse, buttons):
    core, times, _, pressed = case(torch.float32, 1)
    mouse, pressed = torch.tensor([mouse], device=DEVICE), torch.full_like(pressed, buttons)
    got = fused_conditioning(core, times)(mouse, pressed)
    torch.testing.assert_close(got, expected(core, times, mouse, pressed), rtol=1e-4, atol=1e-4)


def test_what_the_kernels_are_not_for_is_left_to_the_model():
    core, times, _, _ = case(torch.float32, 1)
    assert fused_conditioning(core, times) is not None
    assert fused_conditioning(core, times.expand(MOST_CLIPS + 1, -1, -1)) is None
    assert fused_conditioning(core, times.double()) is None
    assert fused_conditioning(make_core(d_model=32, n_heads=1, uncond=True), times) is None

    class Other(nn.Linear):
        pass

    core.control_embed.button.proj.fc1.__class__ = Other
    assert fused_conditioning(core, times) is None
