import dataclasses

import pytest
import torch
from torch import nn

from harness.measure.conf import StabilityConf, validate
from harness.measure.stability import (
    BLACK,
    FROZEN,
    STRUCTURE,
    Signs,
    detect,
    finite_clips,
    first_run,
    watch_non_finite,
)

CONF = StabilityConf(frozen_frames=4, structure_frames=3)
MOVING = torch.ones(12, dtype=torch.bool)


@pytest.fixture
def game():
    """Twelve frames of a picture that moves: ``[12, 3, 16, 16]``."""
    picture = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))
    return torch.stack([picture.roll(frame, dims=2) for frame in range(12)])


def kinds(frames, reference=None, moving=MOVING, same_model=True):
    theirs = None if reference is None else Signs.of(reference)
    return {kind: frame for kind, frame, _ in detect(Signs.of(frames), moving, CONF, theirs, same_model)}


def test_a_sound_rollout_has_no_incident(game):
    assert kinds(game, game) == {}
    assert kinds(game, same_model=False) == {}
    assert kinds((game + 0.02 * torch.randn_like(game)).clamp(0, 1), game) == {}


def test_black_frames_are_seen_unless_the_reference_is_black_too(game):
    ours = game.clone()
    ours[7:] = 0.0
    assert kinds(ours, game)[BLACK] == 7
    dark = game.clone()
    dark[7:] = 0.01
    assert BLACK not in kinds(ours, dark)


def test_frozen_frames_need_a_moving_player_and_a_moving_reference(game):
    ours = game.clone()
    ours[5:] = ours[5]
    assert kinds(ours, game) == {FROZEN: 6}
    assert kinds(ours, game, moving=torch.zeros_like(MOVING)) == {}
    assert kinds(ours, ours) == {}
    ours = game.clone()
    ours[5:9] = ours[5]  # three unchanged frames are one too few
    assert kinds(ours, game) == {}


def test_structure_drops_against_bf16_frame_by_frame(game):
    ours = game.clone()
    ours[4:] = ours[4:].mean((2, 3), keepdim=True) + 0.2 * (ours[4:] - ours[4:].mean((2, 3), keepdim=True))
    assert kinds(ours, game) == {STRUCTURE: 4}
    assert kinds(ours, ours) == {}


def test_a_baseline_is_held_against_its_own_start_for_a_recording_is_sharper(game):
    blurred = game.mean((2, 3), keepdim=True) + 0.2 * (game - game.mean((2, 3), keepdim=True))
    assert kinds(blurred, game, same_model=False) == {}
    fading = blurred.clone()
    fading[6:] = fading[6:].mean((2, 3), keepdim=True) + 0.1 * (fading[6:] - fading[6:].mean((2, 3), keepdim=True))
    assert kinds(fading, game, same_model=False) == {STRUCTURE: 6}
    plain = game.clone()
    plain[6:] = plain[6:].mean((2, 3), keepdim=True)  # the recording looks at a wall
    assert kinds(fading, plain, same_model=False) == {}


def test_figures_of_frames():
    frames = torch.zeros(3, 3, 4, 4)
    frames[1] = 0.5
    assert Signs.of(frames).change.tolist() == [0.5, 0.5]
    assert Signs.of(frames).energy.tolist() == [0, 0, 0]
    frames[2, :, :, 2:] = 1.0  # one edge: of 12 horizontal differences in 4 rows, 4 are 1
    assert Signs.of(frames).energy[2] == pytest.approx(4 / 12)


def test_runs_of_frames():
    mask = torch.tensor([True, False, True, True, False])
    assert first_run(mask, 1) == 0
    assert first_run(mask, 2) == 2
    assert first_run(mask, 3) is None
    assert first_run(mask, 6) is None


def test_nan_and_inf_are_found_per_clip():
    latent = torch.zeros(3, 2, 2, 2)
    latent[0, 1, 0, 0], latent[2, 0, 0, 0] = torch.nan, torch.inf
    assert finite_clips(latent).tolist() == [False, True, False]


class Attention(nn.Module):
    def __init__(self, broken):
        super().__init__()
        self.qkv, self.out, self.broken = nn.Linear(2, 2), nn.Linear(2, 2), broken

    def forward(self, x):
        x = self.qkv(x)
        return self.out(x / 0 if self.broken else x)


def test_the_first_layer_with_nan_is_named():
    model = nn.Sequential(nn.Linear(2, 2), Attention(False), nn.Linear(2, 2))
    with watch_non_finite(model) as found:
        model(torch.ones(1, 2))
    assert found == []
    with torch.no_grad():
        model[1].qkv.weight[0, 0] = torch.inf
    with watch_non_finite(model) as found:
        model(torch.ones(1, 2))
    assert found == ["1.qkv"]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_nan_that_no_layer_made_is_named_by_the_layer_it_enters():
    model = nn.Sequential(nn.Linear(2, 2), Attention(True))
    with watch_non_finite(model) as found:
        model(torch.ones(1, 2))
    assert found == ["what enters 1.out"]


@pytest.mark.parametrize("change", [{"black_level": -1}, {"structure_ratio": 2}, {"frozen_frames": 0}])
def test_bounds_out_of_range_are_named(change):
    validate(CONF)
    with pytest.raises(ValueError, match=next(iter(change))):
        validate(dataclasses.replace(CONF, **change))
