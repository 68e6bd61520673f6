"""What the model is shown for calibration: rollouts, as sequences that one layer at a time can be walked over.

The prefill, the first steps of frames (pure noise) and their last steps meet the model in different noise, so all of
them are rows. Once the latents that went into each step are known, a layer needs no rollout: frame f of any step
attends to what the last steps of the frames before it left in the cache, and to itself. So the residual stream of all
frames of all steps passes through one layer after the other, and each layer is shown what the ones before it, already
quantised, make of it.

This room knows the inside of a GameRFT block, as :meth:`harness.models.gamerft.Block.halves` has it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from harness.kv import KVCache, KVConf, KVStorage
from harness.kv.conf import TENSORS
from harness.models.attention import BlockCausalAttention
from harness.models.gamerft import Block, BlockModulation, GameRFTCore, gated, modulated_norm, rms_norm
from harness.models.rope import apply_rotary
from harness.rollout import AttentionKind, Rollout, SamplerConf, make_cache
from harness.rollout.attention import PrefillAttention, RingAttention

Multiply = Callable[[str, Tensor], Tensor]
"""The output of a block's Linear, by its name within the block, such as ``mlp.fc1``."""


@dataclass(frozen=True)
class Clips:
    """What rollouts start from, on the model's device.

    ``history``: latents ``[B, W, C, S, S]``; ``mouse [B, W + F, 2]``; ``btn [B, W + F, K]``; ``noise`` of the history
    and of the F new frames.
    """

    history: Tensor
    mouse: Tensor
    btn: Tensor
    noise: tuple[Tensor, Tensor]

    def __len__(self) -> int:
        return len(self.history)

    @property
    def frames(self) -> int:
        """Frames F that are rolled out."""
        return self.noise[1].shape[1]

    def split(self, size: int) -> Iterator[Clips]:
        """The same, at most ``size`` clips at a time."""
        parts = (x.split(size) for x in (self.history, self.mouse, self.btn, *self.noise))
        for history, mouse, btn, context, new in zip(*parts, strict=True):
            yield Clips(history, mouse, btn, (context, new))


@dataclass(frozen=True)
class Recorded:
    """Rollouts as the model met them: each part is the prefill, or one step of every generated frame.

    ``latents``: per part what went in, ``[B, N, C, S, S]``. ``conditions``: per part ``silu(cond) [B, N, D]``.
    """

    latents: list[Tensor]
    conditions: list[Tensor]


@torch.no_grad()
def record_rollout(core: GameRFTCore, sampler: SamplerConf, clips: Clips) -> Recorded:
    """Roll clips out with the BF16 ``core`` and an unquantised cache, and keep what goes into every step."""
    window, a = sampler.window, sampler.context_noise
    context, new = clips.noise
    rollout = Rollout(core, make_cache(core, sampler, KVConf(), len(clips)), sampler)
    rollout.prefill(clips.history, clips.mouse[:, :window], clips.btn[:, :window], context)
    times = [*sampler.timesteps, 0.0]
    steps: list[list[Tensor]] = [[] for _ in sampler.timesteps]
    for index in range(clips.frames):
        held, x = (clips.mouse[:, window + index], clips.btn[:, window + index]), new[:, index].float()
        for step, velocity in enumerate(rollout.next_frame_with_velocities(new[:, index], *held).velocities):
            steps[step].append(x)
            x = x - (times[step] - times[step + 1]) * velocity
    latents = [clips.history.float() * (1 - a) + a * context.float(), *(torch.stack(step, 1) for step in steps)]
    conditions: list[Tensor] = []
    for level, part in zip([a, *sampler.timesteps], latents, strict=True):
        rows = slice(0, window) if not conditions else slice(window, None)
        t = torch.full(part.shape[:2], level, device=part.device)
        conditions.append(F.silu(core.conditioning(t, clips.mouse[:, rows], clips.btn[:, rows])))
    return Recorded(latents, conditions)


def layer_cache_conf(conf: KVConf, layer: int, layers: int) -> KVConf:
    """``conf`` as it is for ``layer`` of ``layers``, for a cache of that layer alone."""
    own: dict[str, object] = {}
    for name in TENSORS:
        storage = conf.storage_of(name) if conf.quantises(name, layer, layers) else KVStorage.bf16
        own[f"{name}_storage"] = storage
        own[f"{name}_format"] = getattr(conf, f"{name}_format") if storage is KVStorage.mx else None
    alone = replace(conf, late_layers=None, k_late_layers=None, v_late_layers=None, **own)  # type: ignore[arg-type]
    if not alone.enabled:
        return KVConf()
    return alone if any(map(alone.is_4_bit, TENSORS)) else replace(alone, recent_frames=0)


class Stream:
    """The residual stream of some clips on its way through the layers: one tensor ``[B, N*P, D]`` per part.

    Args:
        core: the model.
        sampler: of the rollouts.
        kv: how K and V are stored between frames.
        recorded: what goes in.
    """

    def __init__(self, core: GameRFTCore, sampler: SamplerConf, kv: KVConf, recorded: Recorded) -> None:
        self.core, self.sampler, self.kv, self.conditions = core, sampler, kv, recorded.conditions
        self.tokens = [core.embed(part) for part in recorded.latents]
        self.frames = recorded.latents[-1].shape[1]
        self._attended: list[Tensor] = []

    def enter(self, layer: int, multiply: Multiply) -> None:
        """Begin ``layer``, whose Linears are ``multiply``."""
        self.layer, self.multiply = layer, multiply
        self.block: Block = self.core.blocks[layer]
        self._mods = [self._modulation(silu) for silu in self.conditions]

    def _modulation(self, silu: Tensor) -> BlockModulation:
        adaln1, gate1, adaln2, gate2 = (
            self.multiply(name, silu) for name in ("adaln1.fc", "gate1.fc_c", "adaln2.fc", "gate2.fc_c")
        )
        (scale1, shift1), (scale2, shift2) = adaln1.chunk(2, -1), adaln2.chunk(2, -1)
        return BlockModulation(scale1, shift1, gate1, scale2, shift2, gate2)

    def inputs(self, name: str) -> Iterator[Tensor]:
        """What the layer's Linear ``name`` gets, part by part; the Linears before it are done with."""
        if name == "attn.out":
            yield from self._attended
            return
        for tokens, mod in zip(self.tokens, self._mods, strict=True):
            if name == "attn.qkv":
                yield modulated_norm(tokens, mod.attn_scale, mod.attn_shift)
                continue
            x = modulated_norm(tokens, mod.mlp_scale, mod.mlp_shift)
            yield x if name == "mlp.fc1" else self.block.mlp.act(self.multiply("mlp.fc1", x))

    def lags(self, name: str | None, other: Stream) -> Iterator[tuple[Tensor, Tensor] | None]:
        """Part by part, the gate through which ``name`` adds to this stream, and what that is behind ``other`` by.

        Each ``[B, N*P, D]``; None for a Linear that does not add to it.
        """
        gates = self._gates(name)
        if gates is None:
            yield from (None for _ in self.tokens)
            return
        for ours, theirs, gate in zip(self.tokens, other.tokens, gates, strict=True):
            yield gate.repeat_interleave(self.core.cfg.tokens_per_frame, 1), theirs.float() - ours.float()

    def _gates(self, name: str | None) -> list[Tensor] | None:
        """Gates through which the layer's Linear ``name`` adds to the stream, if it does."""
        if name == "attn.out":
            return [mod.attn_gate for mod in self._mods]
        return [mod.mlp_gate for mod in self._mods] if name == "mlp.fc2" else None

    def leave(self, name: str) -> None:
        """Go on past the layer's Linear ``name``."""
        gates = self._gates(name)
        if name == "attn.qkv":
            self._attend()
        elif gates is not None:
            parts = zip(self.tokens, self.inputs(name), gates, strict=True)
            self.tokens = [tokens + gated(self.multiply(name, x), gate) for tokens, x, gate in parts]
            self._attended = []

    def _attend(self) -> None:
        """Attention of every part, through a cache of this layer as a rollout fills it, frame after frame."""
        cfg, core, window = self.core.cfg, self.core, self.sampler.window
        limit = core.layer_window(self.layer)
        batch, device = len(self.tokens[0]), self.tokens[0].device
        windows = [window if limit is None else min(window, limit)]
        conf = layer_cache_conf(self.kv, self.layer, cfg.n_layers)
        cache = KVCache(1, batch, cfg.n_heads, cfg.head_dim, cfg.tokens_per_frame, windows, conf, core.dtype, device)
        starts = [(0, window)] + [(window, window + self.frames)] * (len(self.tokens) - 1)
        split = []
        for x, (first, last) in zip(self.inputs("attn.qkv"), starts, strict=True):
            rotary = core.rotary(torch.arange(first, last, device=device))
            qkv = self.multiply("attn.qkv", x).unflatten(-1, (3, cfg.n_heads, -1))
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
            split.append((*(apply_rotary(rms_norm(z), *rotary) for z in (q, k)), v))
        masked = BlockCausalAttention([limit], cfg.tokens_per_frame, cfg.causal)
        prefill = PrefillAttention(cache, masked)(0, *split[0])
        last_step = len(split) - 2
        steps = [RingAttention(cache, AttentionKind.sdpa, store=step == last_step) for step in range(last_step + 1)]
        seen: list[list[Tensor]] = [[] for _ in steps]
        for frame in range(self.frames):
            cache.advance()
            rows = slice(frame * cfg.tokens_per_frame, (frame + 1) * cfg.tokens_per_frame)
            for attend, part, outputs in zip(steps, split[1:], seen, strict=True):
                outputs.append(attend(0, *(z[:, :, rows].contiguous() for z in part)))
        parts = [prefill, *(torch.cat(outputs, 2) for outputs in seen)]
        self._attended = [part.transpose(1, 2).flatten(2) for part in parts]


@torch.no_grad()
def velocities(core: GameRFTCore, sampler: SamplerConf, kv: KVConf, recorded: Recorded) -> list[Tensor]:
    """What ``core``, in whatever formats, gives for what a BF16 rollout went through.

    Float32 ``[B, N, C, S, S]`` for each part. So no error grows from frame to frame: each meets the latents that BF16
    made, in a cache of ``kv``.
    """
    stream = Stream(core, sampler, kv, recorded)
    for layer, block in enumerate(core.blocks):
        stream.enter(layer, partial(_submodule_of, block))
        for spec in core.block_linears:
            if not spec.per_frame:
                stream.leave(spec.name)
    found = []
    for tokens, silu in zip(stream.tokens, recorded.conditions, strict=True):
        scale, shift = core.proj_out.norm.fc(silu).chunk(2, dim=-1)
        found.append(core.velocity(tokens, scale, shift).float())
    return found


def _submodule_of(block: Block, name: str, x: Tensor) -> Tensor:
    output: Tensor = block.get_submodule(name)(x)
    return output
