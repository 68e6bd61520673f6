"""Sharpness, texture and obedience say what they claim, on pictures made for it."""

import pytest
import torch
import torch.nn.functional as F

from harness.measure.appearance import appearance, sharpness, texture_distance
from harness.measure.figures import Appearance
from harness.measure.motion import action_fidelity, image_motion


def wallpaper(side: int = 160) -> torch.Tensor:
    """A random texture of blobs a few pixels wide, ``[1, 3, side, side]``."""
    noise = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(1))
    return F.avg_pool2d(noise, 5, stride=1, padding=2).sub(0.5).mul(3).add(0.5).clamp(0, 1)


def camera(motions: list[tuple[float, float, float]], side: int = 128) -> torch.Tensor:
    """The wallpaper seen by a camera: each motion (pixels right, down, wider at the border) leads to the next frame."""
    paper, half, frames, view = wallpaper(), side / 2, [], torch.tensor([0.0, 0.0, 1.0])
    axis = torch.arange(side) - half + 0.5
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij")[::-1], dim=-1)
    for right, down, wider in [(0.0, 0.0, 0.0), *motions]:
        scale = 1 + wider / half
        view = torch.stack((view[0] - view[2] * right / scale, view[1] - view[2] * down / scale, view[2] / scale))
        frames.append(F.grid_sample(paper, ((grid * view[2] + view[:2]) / 80)[None], align_corners=False))
    return torch.cat(frames)


@pytest.mark.parametrize("motion", [(2.0, 0.0, 0.0), (0.0, -1.5, 0.0), (-0.4, 0.3, 0.0), (0.5, 0.0, 1.5), (5.0, 0, 0)])
def test_the_motion_of_a_picture_is_found_to_a_tenth_of_a_pixel(motion):
    torch.testing.assert_close(image_motion(camera([motion]))[0], torch.tensor(motion), atol=0.15, rtol=0)


def test_a_plain_wall_does_not_move():
    assert image_motion(torch.full((3, 3, 128, 128), 0.4)).abs().max() == 0


def test_action_fidelity_is_one_for_the_same_motion_of_another_scene_and_none_without_motion():
    path = [(1.5, 0.0, 0.5), (1.0, 0.5, 0.0), (-1.0, 0.0, 1.0)]
    moving, other = camera(path), 1 - camera(path).flip(1) * 0.7
    motion = image_motion(moving)
    assert action_fidelity(image_motion(other), motion) > 0.98
    assert action_fidelity(torch.zeros_like(motion), motion) == 0
    assert action_fidelity(-motion, motion) == pytest.approx(-3)
    assert action_fidelity(motion, torch.zeros_like(motion)) is None


def test_blur_lowers_sharpness_and_moves_textures_apart_and_place_does_not_matter():
    sharp = camera([(0.0, 0.0, 0.0)])
    blurred = F.avg_pool2d(sharp, 3, stride=1, padding=1, count_include_pad=False)
    assert sharpness(sharp, sharp) == 1
    assert sharpness(blurred, sharp) < 0.8
    elsewhere = sharp.roll(37, -1)
    assert texture_distance(sharp, sharp) == 0
    assert texture_distance(elsewhere, sharp) < 0.5 * texture_distance(blurred, sharp)
    assert sharpness(sharp, torch.zeros_like(sharp)) is None


def test_small_pictures_and_single_frames_have_what_figures_they_can():
    frame = torch.rand(1, 3, 5, 6, generator=torch.Generator().manual_seed(0))
    found = appearance(frame, frame)
    assert (found.sharpness, found.texture, found.action_fidelity) == (1.0, 0.0, None)
    with pytest.raises(ValueError, match="differ in shape"):
        appearance(frame, frame[..., 1:])


def test_a_loss_is_positive_where_the_candidate_is_worse():
    bf16, candidate = Appearance(0.9, 2.0, 0.8), Appearance(0.7, 5.0, None)
    lost = candidate.worse_than(bf16)
    assert (lost.sharpness, lost.texture, lost.action_fidelity) == (pytest.approx(0.2), 3.0, None)
    assert Appearance.mean([bf16, candidate]) == Appearance(pytest.approx(0.8), 3.5, 0.8)
