"""The fast path gives what the plain one gives: on the reference's own case, and on pictures of the demo model."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from harness.bench.parity import BOUND, Case, play
from harness.bench.world_model import bf16_arm, clip_batch, plan, psnr
from harness.data.clips import find_clips
from harness.models.checkpoint import load_gamerft
from harness.models.config_io import read_gamerft_config
from harness.models.dcae import to_frames
from harness.rollout import AttentionKind, CompileConf
from harness.rollout.linears import pack_where_faster

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a CUDA GPU")
PLAIN = AttentionKind.sdpa, CompileConf()
FAST = AttentionKind.fused, CompileConf(enabled=True, scope="block")


def reference_error(attention, compile, dtype, count=None):
    """Largest error of the first ``count`` frames of the shared case, and the norm of all relative to the frames'."""
    case = Case(Path(__file__).parents[1] / "parity" / "gamerft_motion")
    core = load_gamerft(case.weights, read_gamerft_config(case.config)).to(DEVICE, dtype).requires_grad_(False)
    expected = case.tensors["roll.frames"][:, :count]
    pack_where_faster(core, compile, attention, len(expected))
    error = play(case, core, attention, compile, count)[0]["roll.frames"] - expected
    return error.abs().max().item(), (error.norm() / expected.norm()).item()


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="the package triton is not installed")
@pytest.mark.skipif(
    not ON_GPU and np.lib.NumpyVersion(np.__version__) >= "2.4.0", reason="Triton's interpreter needs numpy below 2.4"
)
@pytest.mark.usefixtures("fresh_compiler")
def test_float32_matches_the_reference():
    conf = CompileConf(enabled=True, scope="block", backend="inductor" if ON_GPU else "eager")
    frames, bound = (None, 1e-3) if ON_GPU else (2, BOUND)  # of a GPU's products; the interpreter takes its time
    assert reference_error(AttentionKind.fused, conf, torch.float32, frames)[0] <= bound


@needs_gpu
@pytest.mark.gpu
@pytest.mark.usefixtures("fresh_compiler")
def test_bf16_is_as_close_to_the_reference_as_the_plain_path():
    plain, fast = (reference_error(*way, torch.bfloat16)[1] for way in (PLAIN, FAST))
    assert fast < 1.3 * plain


@torch.inference_mode()
def demo_frames(clips, *overrides):
    run = plan(list(overrides), 16, clips)
    batch, _ = clip_batch(run, find_clips(run.conf.data.paths)[:clips], 16)
    module, arm = bf16_arm(run)
    return to_frames(arm.roll(batch, module.noise(batch.clip_ids, 16), lambda: None).pictures.rgb())


@needs_gpu
@pytest.mark.gpu
@pytest.mark.usefixtures("no_flags", "fresh_compiler")
@pytest.mark.parametrize("clips", [1, 2])  # of one, norms are in the Linears' kernels
def test_pictures_of_the_demo_model_are_the_same(clips):
    plain = demo_frames(clips, "trainer=gpu", "attention=sdpa", "compile=off")
    fast = demo_frames(clips, "trainer=gpu", "attention=fused", "compile=on")
    assert all(value >= 50 for value in psnr(plain, fast))
