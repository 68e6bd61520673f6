import subprocess
import sys
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.data.noise import batch_noise, clip_noise


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**40), st.text(max_size=8), st.integers(0, 4), st.integers(0, 4))
def test_a_longer_rollout_begins_with_the_noise_of_a_shorter_one(seed, clip_id, future, more):
    context, short = clip_noise(seed, clip_id, 2, future, 3, 2)
    again, long = clip_noise(seed, clip_id, 2, future + more, 3, 2)
    assert torch.equal(context, again)
    assert torch.equal(short, long[:future])


def test_noise_does_not_depend_on_the_other_clips_of_a_batch():
    context, frames = batch_noise(7, ["a", "b", "c"], 2, 3, 4, 2)
    assert context.shape == (3, 2, 4, 2, 2)
    assert frames.shape == (3, 3, 4, 2, 2)
    for index, clip_id in enumerate("abc"):
        alone = clip_noise(7, clip_id, 2, 3, 4, 2)
        assert torch.equal(context[index], alone[0])
        assert torch.equal(frames[index], alone[1])


def test_every_frame_clip_and_seed_has_its_own_noise():
    tensors = [part for seed in (0, 1) for clip_id in "ab" for part in clip_noise(seed, clip_id, 3, 3, 8, 4)]
    frames = torch.cat(tensors)
    distances = torch.cdist(frames.flatten(1), frames.flatten(1)) + 100 * torch.eye(len(frames))
    assert distances.min() > 10  # independent: about sqrt(2 * 8 * 4 * 4) = 16


def test_noise_is_standard_normal_and_leaves_the_global_generator_alone():
    state = torch.random.get_rng_state()
    _, frames = clip_noise(0, "a", 0, 64, 32, 8)
    assert torch.equal(state, torch.random.get_rng_state())
    assert frames.dtype == torch.float32
    assert abs(float(frames.mean())) < 0.01
    assert abs(float(frames.std()) - 1) < 0.01


def test_noise_is_the_same_in_another_process():
    code = "from harness.data.noise import clip_noise; print(clip_noise(3, 'clip', 1, 2, 2, 1)[1].flatten().tolist())"
    root = Path(__file__).parents[2]
    other = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout
    assert other.strip() == str(clip_noise(3, "clip", 1, 2, 2, 1)[1].flatten().tolist())
