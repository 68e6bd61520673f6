"""Pictures of a rollout: what is looked at piece by piece is what would be seen all at once."""

import pytest
import torch

from harness.measure import appearance as looks
from harness.measure import pictures as held
from harness.measure.conf import StabilityConf
from harness.measure.motion import image_motion
from harness.measure.pictures import Pictures
from harness.measure.quality import score_frames
from harness.measure.stability import Signs, detect
from harness.models.dcae import to_frames


@pytest.fixture
def rollout():
    """Two clips of twenty pictures that drift: ``[2, 20, 3, 48, 40]`` in [-1, 1]."""
    generator = torch.Generator().manual_seed(0)
    start = torch.rand(2, 3, 48, 40, generator=generator) * 2 - 1
    noise = 0.1 * torch.randn(2, 20, 3, 48, 40, generator=generator)
    return (torch.stack([start.roll(frame, dims=3) for frame in range(20)], 1) + noise).clamp(-1, 1)


def small(monkeypatch, piece=7, in_memory=3 * 2 * 3 * 48 * 40 * 4):
    for module in (held, looks):
        monkeypatch.setattr(module, "PIECE", piece)
    monkeypatch.setattr(held, "IN_MEMORY", in_memory)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_went_to_the_file_comes_back_bit_for_bit(monkeypatch, rollout, dtype):
    small(monkeypatch)
    pictures = Pictures.of(rollout.to(dtype))
    assert pictures._file is not None
    assert pictures._held == []
    assert len(pictures) == 20
    assert torch.equal(pictures.rgb(), rollout.to(dtype))
    shown = pictures.clip(1, to_frames)
    assert shown.shape == (20, 3, 48, 40)
    assert torch.equal(shown[5:9], to_frames(rollout[1, 5:9].to(dtype)))
    assert torch.equal(shown[18:99], to_frames(rollout[1, 18:].to(dtype)))


def test_its_file_has_no_name_and_lies_where_the_run_is(monkeypatch, rollout, tmp_path):
    small(monkeypatch, in_memory=0)
    opened = []
    plain = held.tempfile.TemporaryFile
    monkeypatch.setattr(held.tempfile, "TemporaryFile", lambda dir, **kw: opened.append(dir) or plain(dir=dir, **kw))
    Pictures(tmp_path).append(rollout[:, 0])
    assert opened == [tmp_path]
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_named(monkeypatch, rollout, tmp_path):
    small(monkeypatch, in_memory=0)
    monkeypatch.setattr(held.tempfile, "TemporaryFile", lambda **_: open("/dev/full", "wb", buffering=0))  # noqa: SIM115
    with pytest.raises(OSError, match=rf"cannot keep a rollout's pictures: No space left on device: '{tmp_path}'"):
        Pictures(tmp_path).append(rollout[:, 0])


def test_every_figure_of_pieces_is_that_of_the_whole(monkeypatch, rollout):
    whole, other = to_frames(rollout).unbind(0)
    moving = torch.ones(20, dtype=torch.bool)
    conf = StabilityConf(frozen_frames=2, structure_frames=1, structure_ratio=0.99999)

    def figures(ours, theirs):
        return {
            "scores": score_frames(ours, theirs),
            "signs": [sign.tolist() for sign in vars(Signs.of(ours)).values()],
            "motion": image_motion(ours).tolist(),
            "seen": detect(Signs.of(ours), moving, conf, Signs.of(theirs), same_model=True),
            "texture": looks.texture_distance(ours, theirs),
        }

    at_once, sharp = figures(whole, other), looks.sharpness(whole, other)
    small(monkeypatch)
    pictures = Pictures.of(rollout)
    ours, theirs = (pictures.clip(clip, to_frames) for clip in range(2))
    assert figures(ours, theirs) == at_once
    assert looks.sharpness(ours, theirs) == pytest.approx(sharp, rel=3e-7)  # a sum of sums
