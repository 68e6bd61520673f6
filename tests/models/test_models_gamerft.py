"""Properties of the model that no reference file is needed for."""

import pytest
import torch
import torch.nn.functional as F

from harness.models.attention import frame_mask
from harness.models.checkpoint import random_gamerft
from harness.models.dcae import DCAEConfig, DCAEDecoder, DCAEEncoder, Resample, to_frames
from harness.models.gamerft import GameRFTConfig
from harness.models.rope import MotionRotary, OrthoRotary, apply_rotary


def config(**changes):
    base = {
        "n_layers": 3, "n_heads": 2, "d_model": 32, "channels": 4, "sample_size": 2, "tokens_per_frame": 4,
        "n_frames": 8, "local_window": 2,
    }  # fmt: skip
    return GameRFTConfig(**{**base, **changes})


def inputs(n=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, t = torch.randn(2, n, 4, 2, 2, generator=g), torch.rand(2, n, generator=g)
    return x, t, torch.randn(2, n, 2, generator=g), (torch.rand(2, n, 11, generator=g) > 0.5).float()


@pytest.mark.parametrize("rope", ["motion", "ortho"])
def test_no_frame_sees_the_future(rope):
    core = random_gamerft(config(rope_impl=rope), 0)
    x, t, mouse, btn = inputs()
    before = core(x, t, mouse, btn)
    x[:, 3:], mouse[:, 3:] = 9.0, -9.0
    after = core(x, t, mouse, btn)
    torch.testing.assert_close(after[:, :3], before[:, :3])
    assert (after[:, 3:] - before[:, 3:]).abs().max() > 1e-3


def test_windows_limit_what_a_frame_sees():
    # every layer local with window 2: three layers reach back three frames, no further
    core = random_gamerft(config(local_idx=10**9, global_window=2), 0)
    x, t, mouse, btn = inputs(n=6)
    before = core(x, t, mouse, btn)
    x[:, 0] = 9.0
    after = core(x, t, mouse, btn)
    changed = (after - before).abs().amax((0, 2, 3, 4)) > 1e-6
    assert changed.tolist() == [True, True, True, True, False, False]


def test_layers_alternate_between_global_and_local():
    core = random_gamerft(config(n_layers=9, global_window=7), 0)
    assert [core.layer_window(i) for i in range(9)] == [7, 2, 2, 2, 7, 2, 2, 2, 7]


def test_masks_are_causal_windowed_and_full_inside_a_frame():
    mask = frame_mask(frames=3, tokens=2, window=2, causal=True, device=torch.device("cpu"))
    frames = mask.view(3, 2, 3, 2).permute(0, 2, 1, 3).flatten(2)
    assert (frames.all(-1) == frames.any(-1)).all()
    assert frames.all(-1).tolist() == [[True, False, False], [True, True, False], [False, True, True]]
    assert frame_mask(3, 2, 2, False, torch.device("cpu")).sum() == 7 * 4


def test_an_unconditional_model_needs_no_controls_and_a_conditional_one_says_so():
    x, t, mouse, btn = inputs()
    free = random_gamerft(config(uncond=True), 0)
    assert not any("control" in name for name, _ in free.named_parameters())
    torch.testing.assert_close(free(x, t), free(x, t, mouse, btn))
    with pytest.raises(ValueError, match="pass mouse and btn"):
        random_gamerft(config(), 0)(x, t)


def test_modulation_of_steps_stacked_equals_modulation_one_by_one():
    core = random_gamerft(config(), 0)
    _, t, mouse, btn = inputs(n=2)
    both = core.modulation(core.conditioning(t, mouse, btn))
    for i in range(2):
        one = core.modulation(core.conditioning(t[:, i : i + 1], mouse[:, i : i + 1], btn[:, i : i + 1]))
        part = both.frames(i, i + 1)
        for a, b in zip(part.blocks, one.blocks, strict=True):
            for u, w in zip(a, b, strict=True):
                torch.testing.assert_close(u, w)
        torch.testing.assert_close(part.out_scale, one.out_scale)


def test_motion_rotary_follows_the_published_positions():
    head_dim, side, delta = 16, 2, 2.0
    cos, sin = MotionRotary(head_dim, side, delta)(torch.tensor([3]))
    freqs = [10000 ** (-2 * i / head_dim) for i in range(head_dim // 2)]
    for token, (r, c) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        pt = 3 * delta
        px, py = pt + c - 0.5, pt + r - 0.5
        position = [px, py, px, py, px, py, pt, pt]
        angle = torch.tensor([p * f for p, f in zip(position, freqs, strict=True)])
        torch.testing.assert_close(cos[token], angle.cos(), atol=1e-5, rtol=0)
        torch.testing.assert_close(sin[token], angle.sin(), atol=1e-5, rtol=0)


def test_ortho_rotary_equals_its_table_and_goes_on_beyond_it():
    n_frames = 9
    rotary = OrthoRotary(head_dim=32, side=2, n_frames=n_frames)
    inside = rotary.time_position(torch.arange(n_frames))
    assert torch.equal(inside, torch.linspace(-1, 1, n_frames))
    beyond = rotary.time_position(torch.arange(n_frames, n_frames + 3))
    torch.testing.assert_close(beyond, torch.tensor([1.25, 1.5, 1.75]))
    cos, sin = rotary(torch.arange(n_frames + 3))
    assert cos.shape == ((n_frames + 3) * 4, 16)
    assert torch.equal(cos[:, 12:], torch.ones_like(cos[:, 12:]))  # the last quarter is not rotated
    assert torch.equal(sin[:, 12:], torch.zeros_like(sin[:, 12:]))


@pytest.mark.parametrize("n_frames", [1, 2, 60, 511, 1536, 4097])
def test_ortho_angles_are_those_of_the_time_table_to_the_last_bit(n_frames):
    """Whatever this machine's linspace rounds to: 400 rad times one bit of it would be beyond 1e-5 in K."""
    rotary = OrthoRotary(head_dim=64, side=4, n_frames=n_frames)
    cos, sin = rotary(torch.arange(n_frames))
    time, freqs = torch.linspace(-1, 1, n_frames), torch.pi * torch.linspace(1, 128, 8)
    angle = (time[:, None] * freqs).repeat_interleave(16, dim=0)
    assert torch.equal(cos[:, :8], angle.cos())
    assert torch.equal(sin[:, :8], angle.sin())


def test_rotation_takes_adjacent_pairs_and_concatenates_halves():
    x = torch.arange(4.0).view(1, 1, 1, 4)
    cos, sin = torch.zeros(1, 2), torch.ones(1, 2)  # a quarter turn
    assert apply_rotary(x, cos, sin).flatten().tolist() == [-1.0, -3.0, 0.0, 2.0]


@pytest.mark.parametrize("middle", [False, True])
def test_16_9_decoders_resize_and_have_their_own_output_name(middle):
    cfg = DCAEConfig(
        sample_size=[18, 32], latent_size=4, latent_channels=4, ch_0=8, ch_max=16,
        encoder_blocks_per_stage=[1, 1], decoder_blocks_per_stage=[1, 2], use_middle_block=middle,
    )  # fmt: skip
    decoder = DCAEDecoder(cfg)
    assert decoder(torch.randn(2, 4, 4, 4)).shape == (2, 3, 18, 32)
    names = dict(decoder.named_parameters())
    assert "conv_out.proj.weight" in names
    assert ("middle_block.blocks.1.conv1.weight" in names) == middle  # as many as the last stage's
    with pytest.raises(ValueError, match="only square"):
        DCAEEncoder(cfg)


def test_frames_are_clamped_to_the_unit_range():
    assert to_frames(torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0])).tolist() == [0.0, 0.0, 0.5, 1.0, 1.0]


@pytest.mark.parametrize("rope", ["motion", "ortho"])
def test_angles_stay_exact_when_the_model_is_cast_to_bf16(rope):
    core = random_gamerft(config(rope_impl=rope, d_model=64), 0)
    frames = torch.tensor([1000])
    expected = core.rotary(frames)
    for a, b in zip(expected, core.to(torch.bfloat16).rotary(frames), strict=True):
        assert b.dtype == torch.float32
        assert torch.equal(a, b)


@pytest.mark.parametrize(("side", "scale"), [(4, 2.0), (8, 2.0), (8, 0.5)])
def test_resampling_by_matrices_is_bicubic_interpolation(side, scale):
    x = torch.randn(2, 3, side, side)
    stage = Resample(3, 3, side, scale)
    expected = F.interpolate(x, scale_factor=scale, mode="bicubic", align_corners=False, antialias=False)
    torch.testing.assert_close(stage(x), expected, atol=2e-6, rtol=0)
    assert (stage.matrix.bfloat16().float() - stage.matrix).abs().max() <= 1 / 256
