"""What rotary embeddings give to kernels is what they compute themselves."""

import pytest
import torch

from harness.models.rope import MotionRotary, OrthoRotary

ROTARIES = {
    "motion": MotionRotary(64, 8, 2.0),
    "motion, a third of a pixel a frame": MotionRotary(128, 7, 1 / 3),
    "ortho": OrthoRotary(64, 8, 1536),
    "ortho of few frames": OrthoRotary(32, 5, 60),
    "ortho of one": OrthoRotary(64, 4, 1),
}
FRAMES = [0, 1, 59, 60, 61, 1534, 1535, 1536, 1537, 100_000, 16_777_217]


@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize("name", ROTARIES)
def test_tables_give_a_frames_angles_bit_for_bit(name, frame):
    rotary = ROTARIES[name]
    base, uses_time, freqs, times, step = rotary.tables()
    last = len(times) - 1
    beyond = times[-1] + torch.tensor(step) * torch.tensor(frame - last).to(torch.float32)
    angle = (base + (times[frame] if frame <= last else beyond) * uses_time) * freqs
    assert {x.dtype for x in (base, uses_time, freqs, times)} == {torch.float32}
    want = rotary(torch.tensor([frame]))
    assert all(torch.equal(got, x) for got, x in zip((angle.cos(), angle.sin()), want, strict=True))


@pytest.mark.parametrize("name", ["motion", "ortho"])
def test_tables_are_those_of_float32_whatever_the_models_dtype(name):
    made = ROTARIES[name]
    core = torch.nn.ModuleList([made]).to(torch.bfloat16)
    assert core
    tables, again = made.tables(), ROTARIES[name].tables()
    tables.times.zero_(), tables.freqs.zero_(), tables.base.zero_()  # copies, which whoever has them may change
    assert all(torch.equal(x, y) for x, y in zip(again[:4], made.tables()[:4], strict=True))
