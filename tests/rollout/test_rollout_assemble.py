"""The one place that puts rollouts together."""

import copy

import torch
from rollout_cases import CFG, SAMPLER, make_core, make_inputs, make_rollout, play

from harness.kv import KVConf
from harness.models import bf16
from harness.models.dcae import DCAEConfig, DCAEDecoder
from harness.mx.conf import MXConf
from harness.mx.linears.base import MXModule
from harness.mx.transform import apply_mx
from harness.mx.weights import NearestRounding
from harness.rollout import CompileConf, LatentDecoder, RolloutSetup, assemble, load_core, load_dcae

SETUP = RolloutSetup(batch=2, sampler=SAMPLER)
MLPS = MXConf(enabled=True, bits=8)
CPU = torch.device("cpu")
DCAE = DCAEConfig(
    sample_size=[16, 16], latent_size=2, latent_channels=8, ch_0=16, ch_max=32,
    encoder_blocks_per_stage=[1, 1, 1], decoder_blocks_per_stage=[1, 1, 1],
)  # fmt: skip


class Noted(NearestRounding):
    """Nearest rounding that remembers what it was asked for."""

    def __init__(self):
        self.names = []

    def weight(self, name, linear, fmt):
        self.names.append(name)
        return super().weight(name, linear, fmt)


def test_what_is_assembled_gives_the_frames_of_a_rollout_made_by_hand():
    core = make_core().to(torch.bfloat16)
    by_hand = copy.deepcopy(core)
    apply_mx(by_hand, MLPS)
    bf16.widen(by_hand)  # of what stays BF16, where the CPU lacks that
    made = assemble(core, MLPS, KVConf(), SETUP)
    context, frames = make_inputs(core, 3)
    assert torch.equal(play(made.rollout, context, frames), play(make_rollout(by_hand), context, frames))
    assert made.core is core
    assert made.summary.count == 6
    assert made.weight_bytes < sum(p.nbytes for p in make_core().to(torch.bfloat16).parameters())
    assert made.allocated_bytes is None  # no account of it on a CPU


def test_what_stays_bf16_is_widened_where_the_cpu_lacks_bf16(monkeypatch):
    monkeypatch.setattr(bf16, "CPU_HAS_BF16", False)
    core = assemble(make_core().to(torch.bfloat16), MLPS, KVConf(), SETUP).core
    assert all(isinstance(block.mlp.fc1, MXModule) for block in core.blocks)
    assert all(type(block.attn.qkv) is bf16.WideLinear for block in core.blocks)


def test_the_source_of_weights_is_handed_on():
    source = Noted()
    made = assemble(make_core().to(torch.bfloat16), MLPS, KVConf(), SETUP, source)
    assert source.names == made.summary.names


def test_model_and_decoder_without_a_checkpoint_are_seeded():
    one, two, other = (load_core(CFG, None, seed, CPU) for seed in (3, 3, 4))
    assert one.dtype is torch.bfloat16
    assert torch.equal(one.proj_in.weight, two.proj_in.weight)
    assert not torch.equal(one.proj_in.weight, other.proj_in.weight)
    first, second = (load_dcae(DCAE, None, 3, CPU).conv_out.weight for _ in range(2))
    assert torch.equal(first, second)


def test_latents_are_scaled_and_cast_for_the_decoder():
    decoder, latent = load_dcae(DCAE, None, 0, CPU), torch.randn(2, 8, 2, 2)
    assert isinstance(decoder, DCAEDecoder)
    want = copy.deepcopy(decoder).to(torch.bfloat16)((latent * 0.5).bfloat16())
    decode = LatentDecoder(decoder, 0.5, torch.bfloat16, CompileConf())
    assert decode.warmup(latent) > 0
    assert torch.equal(decode(latent), want)
