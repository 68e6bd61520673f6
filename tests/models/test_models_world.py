"""What the package knows of a model it takes from the model: another family, with other names, rolls out in MX."""

from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from harness.kv import KVConf, KVStorage
from harness.models.attention import BlockCausalAttention
from harness.models.gamerft import GameRFTConfig, GameRFTCore
from harness.models.world import LinearSpec, WorldModel, find_world
from harness.mx.conf import MXConf
from harness.mx.linears.base import MXModule
from harness.mx.select import select
from harness.mx.transform import apply_mx
from harness.rollout import CompileConf, RolloutSetup, SamplerConf, assemble
from harness.rollout.modulation import StackedModulation


@dataclass
class PondConfig:
    """A model of another make: no rotation, no time embedding to speak of, biases instead of scales and shifts."""

    n_layers: int = 3
    n_heads: int = 2
    head_dim: int = 32
    d_model: int = 64
    tokens_per_frame: int = 4
    channels: int = 8
    sample_size: int = 2
    n_mouse_axes: int = 2
    n_buttons: int = 11
    uncond: bool = False


class PondLayer(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.mix = nn.ModuleDict({"all": nn.Linear(d, 3 * d), "back": nn.Linear(d, d)})
        self.ff = nn.ModuleDict({"up": nn.Linear(d, 2 * d), "bend": nn.SiLU(), "down": nn.Linear(2 * d, d)})
        self.shift = nn.Linear(d, d)


class Shifts(NamedTuple):
    layers: tuple[torch.Tensor, ...]

    def frames(self, start, stop):
        return Shifts(tuple([shift[:, start:stop] for shift in self.layers]))


class Pond(WorldModel):
    blocks_path = "stack"
    block_linears = (
        LinearSpec("mix.all", "attn"),
        LinearSpec("mix.back", "attn", final=True),
        LinearSpec("ff.up", "mlp", activation="ff.bend"),
        LinearSpec("ff.down", "mlp", final=True),
        LinearSpec("shift", "modulation", per_frame=True),
    )
    block_parts = {"attention": "mix", "mlp": "ff"}  # noqa: RUF012

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.stack = nn.ModuleList(PondLayer(cfg.d_model) for _ in range(cfg.n_layers))
        self.enter, self.leave = nn.Linear(cfg.channels, cfg.d_model), nn.Linear(cfg.d_model, cfg.channels)
        self.controls = nn.Linear(13, cfg.d_model)
        self.t_embed = nn.Unflatten(1, (-1, 1))
        self.rotary = nn.Identity()

    dtype = property(lambda self: self.enter.weight.dtype)
    device = property(lambda self: self.enter.weight.device)

    def layer_window(self, layer):
        return None

    def add_controls(self, cond, mouse=None, btn=None):
        return self.controls(torch.cat((mouse, btn), -1).to(self.dtype)) + cond.to(self.dtype)

    def modulation_linears(self):
        return [block.shift for block in self.stack]

    def modulation_of(self, outputs):
        return Shifts(tuple(outputs))

    def denoise(self, x, mod, rotary, attend):
        frames, side = x.shape[1], x.shape[-1]
        tokens = self.enter(x.to(self.dtype).flatten(3).transpose(2, 3).flatten(1, 2))
        for layer, (block, shift) in enumerate(zip(self.stack, mod.layers, strict=True)):
            shifted = tokens + shift.repeat_interleave(side * side, dim=1)
            q, k, v = block.mix["all"](shifted).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4).unbind(0)
            tokens = tokens + block.mix["back"](attend(layer, q, k, v).transpose(1, 2).flatten(2))
            tokens = tokens + block.ff["down"](block.ff["bend"](block.ff["up"](tokens)))
        return self.leave(tokens).unflatten(1, (frames, -1)).transpose(2, 3).unflatten(3, (side, side))

    def full_attention(self):
        return BlockCausalAttention([None] * 3, self.cfg.tokens_per_frame)


@pytest.fixture
def pond():
    torch.manual_seed(0)
    return Pond(PondConfig()).to(torch.bfloat16).eval().requires_grad_(False)


def test_its_linears_are_chosen_by_what_it_says_of_them(pond):
    chosen = [c.path for c in select(pond, MXConf(enabled=True, bits=4, scope="all")).chosen]
    assert "stack.1.mix.all" in chosen
    assert len(chosen) == 15 - 2  # the last layer's final projections stay BF16 at 4 bits
    assert {c.category for c in select(pond, MXConf(enabled=True, scope="mlp")).chosen} == {"mlp"}
    summary = apply_mx(pond, MXConf(enabled=True, scope="all"))
    assert summary.categories == {"attn": 6, "mlp": 6, "modulation": 3}
    assert "attn       stack.{0-2}.mix.all" in summary.listing()
    assert all(isinstance(place.module, MXModule) for place in pond.linears())


def test_it_rolls_out_in_mx_over_a_quantised_cache(pond):
    setup = RolloutSetup(2, SamplerConf(window=3), compile=CompileConf(enabled=True, backend="eager"))
    made = assemble(pond, MXConf(enabled=True, scope="all"), KVConf(storage=KVStorage.mx), setup)
    latents = torch.randn(2, 3, 8, 2, 2)
    made.rollout.prefill(latents, torch.randn(2, 3, 2), torch.ones(2, 3, 11), torch.randn_like(latents))
    frames = [made.rollout.next_frame(torch.randn(2, 8, 2, 2), torch.randn(2, 2), torch.ones(2, 11)) for _ in range(4)]
    assert all(frame.isfinite().all() for frame in frames)
    assert not torch.equal(frames[0], frames[1])


def test_what_reads_one_row_a_frame_is_one_product(pond):
    cond = torch.randn(2, 3, 64).bfloat16()
    want = pond.modulation(cond)
    got = StackedModulation(pond)(cond)
    assert all(torch.equal(a, b) for a, b in zip(got.layers, want.layers, strict=True))
    silu = F.silu(cond)
    assert torch.equal(want.layers[1], pond.stack[1].shift(silu))


def test_layers_are_compiled_one_by_one_only_where_the_model_is_cut_so(pond):
    conf = CompileConf(enabled=True, backend="eager", scope="block")
    with pytest.raises(ValueError, match=r"scope=block: Pond is not cut into layers; use scope=frame"):
        assemble(pond, MXConf(), KVConf(), RolloutSetup(1, SamplerConf(window=2), compile=conf))


def test_a_world_model_is_found_under_any_prefix(pond):
    assert find_world(pond) == ("", pond)
    assert find_world(nn.ModuleDict({"core": pond})) == ("core.", pond)
    assert find_world(nn.Linear(2, 2)) is None


def test_a_gamerft_describes_every_linear_of_its_blocks():
    with torch.device("meta"):
        core = GameRFTCore(GameRFTConfig(n_layers=2))
    described = {place.path for place in core.linears()}
    linears = {name for name, module in core.named_modules() if isinstance(module, nn.Linear)}
    assert described == {name for name in linears if name.startswith("transformer.blocks.")}
    behind = [spec.activation for spec in core.block_linears if spec.activation]
    assert [type(core.blocks[0].get_submodule(name)) for name in behind] == [nn.SiLU]
