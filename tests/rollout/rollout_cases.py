"""Small models, inputs, and the sampler written out the obvious way: the reference of the rollout tests."""

import torch
from torch.nn.functional import scaled_dot_product_attention

from harness.kv import KVCache, KVConf
from harness.models.checkpoint import random_gamerft
from harness.models.gamerft import GameRFTConfig, rms_norm
from harness.models.rope import apply_rotary
from harness.rollout import AttentionKind, CompileConf, Rollout, SamplerConf, make_cache

CFG = GameRFTConfig(
    n_layers=3, n_heads=2, d_model=64, channels=8, sample_size=2, tokens_per_frame=4, n_frames=64,
    local_window=2, local_idx=2,
)  # fmt: skip
SAMPLER = SamplerConf(window=4)


def make_core(**fields):
    core = random_gamerft(GameRFTConfig(**{**vars(CFG), **fields}), seed=1)
    for block in core.blocks:  # gates of a fresh model hardly let anything through
        torch.nn.init.normal_(block.gate1.fc_c.bias, 1.0)
        torch.nn.init.normal_(block.gate2.fc_c.bias, 1.0)
    return core


def make_rollout(core, sampler=SAMPLER, conf=None, batch=2, attention=AttentionKind.sdpa, **compile_fields):
    cache = make_cache(core, sampler, conf or KVConf(), batch)
    return Rollout(core, cache, sampler, attention, CompileConf(**compile_fields))


def make_inputs(core, frames, window=4, batch=2, seed=0):
    """(history, mouse, btn, noise) of prefill, and (noise, mouse, btn) of each new frame."""
    cfg, gen = core.cfg, torch.Generator().manual_seed(seed)
    device = core.proj_in.weight.device

    def normal(*shape):
        return torch.randn(batch, *shape, generator=gen).to(device)

    latent = (cfg.channels, cfg.sample_size, cfg.sample_size)
    past = (normal(window, *latent), normal(window, 2), (normal(window, cfg.n_buttons) > 0).float())
    context = (*past, normal(window, *latent))
    return context, [(normal(*latent), normal(2), (normal(cfg.n_buttons) > 0).float()) for _ in range(frames)]


def play(rollout, context, frames):
    rollout.prefill(*context)
    return torch.stack([rollout.next_frame(*frame) for frame in frames], dim=1)


def filled_cache(conf, batch, heads, frames, tokens, dim, dtype, newer, device):
    """A cache of one layer at the start of frame ``frames + newer``."""
    generator = torch.Generator().manual_seed(frames)
    cache = KVCache(1, batch, heads, dim, tokens, [frames], conf, dtype, device)

    def normal(n):
        return torch.randn(batch, heads, n, dim, generator=generator).to(device, dtype)

    cache.load(0, normal(frames * tokens), normal(frames * tokens))
    for _ in range(newer):
        cache.advance()
        own = normal(tokens), normal(tokens)
        cache.window(0, *own)
        cache.store(0, *own)
    cache.advance()
    return cache


def own_rows(qkv, rotary, heads):
    """q, k and v ``[B, H, P, Dh]`` as the model makes them."""
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return *(apply_rotary(rms_norm(x), *rotary) for x in (q, k)), v


def exact_attention(cache, qkv, rotary, heads):
    """Float64 ``[B, P, H*Dh]`` from the projection ``qkv [B, P, 3*H*Dh]`` on, to the window as it is stored."""
    q, k, v = (cache.turned(name, 0, x) for name, x in zip("kkv", own_rows(qkv, rotary, heads), strict=True))
    window = (x.double() for x in cache.window(0, k, v))
    out = scaled_dot_product_attention(q.double(), *window)
    return cache.turned("v", 0, out).transpose(1, 2).flatten(2)


class NaiveRollout:
    """Keeps every K and V, concatenates, cuts to the window; conditions each step by itself."""

    def __init__(self, core, sampler):
        self.core, self.sampler = core, sampler
        self.kept = [([], []) for _ in core.blocks]

    def window(self, layer):
        limit = self.core.layer_window(layer)
        return self.sampler.window if limit is None else min(limit, self.sampler.window)

    @torch.no_grad()
    def prefill(self, history, mouse, btn, noise):
        a, masked, tokens = self.sampler.context_noise, self.core.full_attention(), self.core.cfg.tokens_per_frame

        def attend(layer, q, k, v):
            self.kept[layer] = (list(k.split(tokens, dim=2)), list(v.split(tokens, dim=2)))
            return masked(layer, q, k, v)

        self.frame = history.shape[1]
        t = torch.full(history.shape[:2], a)
        mod = self.core.modulation(self.core.conditioning(t, mouse, btn))
        rotary = self.core.rotary(torch.arange(self.frame))
        return self.core.denoise(history * (1 - a) + a * noise, mod, rotary, attend)

    @torch.no_grad()
    def next_frame(self, noise, mouse=None, btn=None):
        x, velocities, times = noise[:, None], [], [*self.sampler.timesteps, 0.0]
        mouse, btn = (None if c is None else c[:, None] for c in (mouse, btn))
        for i in range(len(times) - 1):
            own = {}

            def attend(layer, q, k, v, own=own):
                own[layer] = (k, v)
                keep = self.window(layer)
                kv = (torch.cat([*old, new][-keep:], 2) for old, new in zip(self.kept[layer], (k, v), strict=True))
                return scaled_dot_product_attention(q, *kv)

            t = torch.full((x.shape[0], 1), times[i])
            mod = self.core.modulation(self.core.conditioning(t, mouse, btn))
            velocities.append(self.core.denoise(x, mod, self.core.rotary(torch.tensor([self.frame])), attend))
            x = x - (times[i] - times[i + 1]) * velocities[-1]
        for layer, (k, v) in own.items():
            self.kept[layer][0].append(k)
            self.kept[layer][1].append(v)
        self.frame += 1
        return x[:, 0], [v[:, 0] for v in velocities]

    def cached(self, layer):
        """The last W frames of K and V, whatever the layer's own window."""
        return tuple(torch.cat(kept[-self.sampler.window :], dim=2) for kept in self.kept[layer])
