import pytest
import torch
from rollout_cases import make_core, make_inputs, make_rollout, play
from torch import nn

from harness.kernels.cuda import conv
from harness.measure.memory import module_bytes
from harness.models.checkpoint import random_decoder
from harness.models.dcae import DCAEConfig
from harness.rollout import CompileConf, DecoderGroups, FrameDecoder, OverlappedDecoding, SamplerConf
from harness.rollout.decoder import regroup
from harness.rollout.modulation import StackedLinears, StackedModulation

CFG = DCAEConfig(
    sample_size=[32, 32], latent_size=8, latent_channels=16, ch_0=32, ch_max=64,
    encoder_blocks_per_stage=[1, 1], decoder_blocks_per_stage=[1, 1],
)  # fmt: skip
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU on this machine")


def latent(batch=1, device="cpu"):
    return torch.randn(batch, 16, 8, 8, generator=torch.Generator().manual_seed(0)).to(device)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_regrouping_changes_no_value(groups):
    torch.manual_seed(0)
    layer = nn.Conv2d(32, 64, 3, padding=1, groups=4)
    x = torch.randn(2, 32, 5, 5)
    merged = regroup(layer, groups)
    assert merged.groups == groups
    torch.testing.assert_close(merged(x), layer(x))


def test_regrouping_needs_a_divisor():
    with pytest.raises(ValueError, match="3 groups do not divide the convolution's 4"):
        regroup(nn.Conv2d(32, 32, 3, groups=4), 3)


LIBRARY = [DecoderGroups.grouped, DecoderGroups.dense, DecoderGroups.auto]
"""What decodes in float32, too."""


@pytest.mark.parametrize("how", LIBRARY)
def test_decoder_groups_change_no_picture(how):
    expected = random_decoder(CFG, 0)(latent())
    decode = FrameDecoder(random_decoder(CFG, 0), CompileConf(), how)
    torch.testing.assert_close(decode(latent()), expected)
    assert set(decode.groups.values()) == ({1} if how is DecoderGroups.dense else {4, 8})


def test_our_kernels_are_refused_where_they_do_not_run():
    with pytest.raises(ValueError, match=r"decoder\.groups=fused: .*NVIDIA GPU.*on cpu; use decoder\.groups=auto"):
        FrameDecoder(random_decoder(CFG, 0), CompileConf(), DecoderGroups.fused)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("widest", [192, 384])
def test_our_kernels_give_the_picture_that_bf16_gives(stages, batch, widest, monkeypatch):
    """Stages of one kernel (32 to 384 channels) and of five (384), a resized picture; captured and replayed."""
    monkeypatch.setattr(conv, "WIDEST", widest)
    for ch_0, ch_max, size in ((96, 384, [36, 64]), (32, 64, [64, 64])):
        cfg = DCAEConfig(
            sample_size=size, latent_size=8, latent_channels=16, ch_0=ch_0, ch_max=ch_max,
            decoder_blocks_per_stage=[stages] * 3,
        )  # fmt: skip
        decoder = random_decoder(cfg, 0).cuda().bfloat16()
        z = [torch.randn(batch, 16, 8, 8, device="cuda").bfloat16() for _ in range(2)]
        exact = random_decoder(cfg, 0).cuda().double()
        for mine, theirs in zip(exact.parameters(), decoder.parameters(), strict=True):
            mine.data = theirs.data.double()
        expected, eager = exact(z[1].double()), decoder(z[1]).double()
        decode = FrameDecoder(decoder, CompileConf(enabled=True), DecoderGroups.auto)
        assert decode.fused
        decode(z[0])
        ours = decode(z[1]).double()
        error, usual = ((x - expected).norm() / expected.norm() for x in (ours, eager))
        assert error < 1.3 * usual


@needs_gpu
@pytest.mark.gpu
def test_a_captured_decoder_scales_latents_as_eager_code_does():
    cfg = DCAEConfig(sample_size=[64, 64], latent_size=8, latent_channels=16, ch_0=32, ch_max=64,
                     decoder_blocks_per_stage=[1] * 3)  # fmt: skip
    plain, scaled = (
        FrameDecoder(random_decoder(cfg, 0).cuda().bfloat16(), CompileConf(enabled=True), scale=scale)
        for scale in (1.0, 0.7)
    )
    for _ in range(2):  # prepared, then replayed
        x = torch.randn(1, 16, 8, 8, device="cuda")
        assert torch.equal(scaled(x), plain((x * 0.7).bfloat16()))


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("how", LIBRARY)
def test_captured_decoder_gives_the_eager_picture(how):
    expected = random_decoder(CFG, 0)(latent())
    decode = FrameDecoder(random_decoder(CFG, 0).cuda(), CompileConf(enabled=True), how)
    decode(torch.zeros_like(latent(device="cuda")))
    picture = decode(latent(device="cuda"))
    assert (picture.cpu() - expected).norm() / expected.norm() < 1e-2  # convolutions may use TF32
    with pytest.raises(ValueError, match="captured for"):
        decode(latent(2, "cuda"))


@needs_gpu
@pytest.mark.gpu
def test_overlapped_decoding_gives_the_same_frames():
    core = make_core(channels=16, sample_size=8, tokens_per_frame=64, d_model=128, n_layers=2).cuda()
    context, frames = make_inputs(core, 12, 6)
    rollout = make_rollout(core, SamplerConf(window=6), enabled=True)
    rollout.warmup()
    decode = FrameDecoder(random_decoder(CFG, 0).cuda(), CompileConf(enabled=True))
    decode(torch.zeros(2, 16, 8, 8, device="cuda"))
    expected = [decode(x).clone() for x in play(rollout, context, frames).unbind(1)]
    rollout.prefill(*context)
    inputs = [tuple(x.cuda() for x in frame) for frame in frames]
    pictures, seconds = OverlappedDecoding(rollout, decode).play(inputs)
    assert seconds > 0
    assert all(torch.equal(a, b) for a, b in zip(pictures, expected, strict=True))


def test_overlapped_decoding_needs_a_gpu():
    rollout = make_rollout(make_core(n_layers=1))
    with pytest.raises(ValueError, match="needs CUDA streams; this rollout is on cpu"):
        OverlappedDecoding(rollout, lambda latent: latent)


def test_stacked_modulation_equals_the_models_and_doubles_no_weight():
    core = make_core(n_layers=2)
    cond = torch.randn(2, 3, core.cfg.d_model, generator=torch.Generator().manual_seed(0))
    expected, size = core.modulation(cond), module_bytes(core)
    stacked = StackedModulation(core)
    assert len(stacked.linears.products) == 1
    for ours, theirs in zip((*stacked(cond).blocks, stacked(cond)[1:]), (*expected.blocks, expected[1:]), strict=True):
        torch.testing.assert_close(tuple(ours), tuple(theirs))
    assert module_bytes(core) == size
    pointer = core.blocks[1].gate2.fc_c.weight.data_ptr()
    StackedModulation(core)  # a second rollout of the same model
    assert core.blocks[1].gate2.fc_c.weight.data_ptr() == pointer


class Doubling(nn.Linear):
    """A Linear of another kind, which cannot be stacked."""

    def forward(self, x):
        return 2 * super().forward(x)


def test_linears_of_other_kinds_run_beside_stacked_ones():
    torch.manual_seed(0)
    linears = [nn.Linear(8, 4), Doubling(8, 2), nn.Linear(8, 6), Doubling(8, 2), nn.Linear(4, 2, bias=False)]
    linears[-1] = nn.Linear(8, 2, bias=False)
    x = torch.randn(3, 8)
    expected = [linear(x) for linear in linears]
    stacked = StackedLinears(linears)
    assert [len(members) for _, members, _ in stacked.products] == [2, 1, 1, 1]
    torch.testing.assert_close(stacked(x), expected)
