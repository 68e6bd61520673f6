"""GameRFT: a causal diffusion transformer that renders game frames from keyboard and mouse.

One frame is ``P = sample_size**2`` tokens. The model predicts a velocity (noise - data) per token. It knows neither
caches nor quantisation: K and V go through an :class:`~harness.models.attention.Attend`, and every matrix product of
a block is an ``nn.Linear`` that may be swapped from outside.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.models.attention import BlockCausalAttention, LayerAttend
from harness.models.embeddings import MLP, ControlEmbedding, TimestepEmbedding
from harness.models.rope import MotionRotary, OrthoRotary, apply_rotary
from harness.models.shapes import GameRFTConfig
from harness.models.world import LinearSpec, WorldModel

RMS_EPS = 1.1920928955078125e-07
"""float32 eps. ``F.rms_norm`` uses it by default for BF16 input too; explicit, so that fused kernels can match."""


class BlockModulation(NamedTuple):
    """Conditioning vectors of one block, each ``[B, N, D]``: scale, shift and gate of attention, then of the MLP."""

    attn_scale: Tensor
    attn_shift: Tensor
    attn_gate: Tensor
    mlp_scale: Tensor
    mlp_shift: Tensor
    mlp_gate: Tensor


class Modulation(NamedTuple):
    """All conditioning vectors of one forward: a :class:`BlockModulation` per block and the output's scale, shift.

    They depend on time and controls alone, never on the frame's content, so a frame's two steps share one computation.
    """

    blocks: tuple[BlockModulation, ...]
    out_scale: Tensor
    out_shift: Tensor

    def frames(self, start: int, stop: int) -> Modulation:
        """Rows ``start:stop`` of the N axis."""
        rows = slice(start, stop)
        blocks = tuple(BlockModulation(*(vector[:, rows] for vector in block)) for block in self.blocks)
        return Modulation(blocks, self.out_scale[:, rows], self.out_shift[:, rows])


def rms_norm(x: Tensor) -> Tensor:
    """RMS normalisation over the last axis, without weight."""
    return F.rms_norm(x, (x.shape[-1],), eps=RMS_EPS)


def modulated_norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """``rms_norm(x) * (1 + scale) + shift`` with ``scale, shift [B, N, D]`` broadcast over each frame's tokens."""
    per_frame = rms_norm(x).unflatten(1, (scale.shape[1], -1))
    return (per_frame * (1 + scale[:, :, None]) + shift[:, :, None]).flatten(1, 2)


def gated(x: Tensor, gate: Tensor) -> Tensor:
    """``gate * x`` with ``gate [B, N, D]`` broadcast over each frame's tokens."""
    return (x.unflatten(1, (gate.shape[1], -1)) * gate[:, :, None]).flatten(1, 2)


class AdaLN(nn.Module):
    """Holds what produces the scale and shift of a modulated norm: ``fc`` maps ``silu(cond)`` to both."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.fc = nn.Linear(d_model, 2 * d_model)


class Gate(nn.Module):
    """Holds what produces the gate of a residual branch: ``fc_c`` maps ``silu(cond)`` to it."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.fc_c = nn.Linear(d_model, d_model)


def attend_from_projection(
    attend: LayerAttend, layer: int, qkv: Tensor, heads: int, rotary: tuple[Tensor, Tensor]
) -> Tensor:
    """Attention ``[B, T, D]`` from a layer's fused projection ``qkv [B, T, 3*D]`` and ``(cos, sin) [T, Dh/2]``."""
    if hasattr(attend, "projected"):  # see ProjectedAttend
        return attend.projected(layer, qkv, rotary)
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    q, k = (apply_rotary(rms_norm(z), *rotary) for z in (q, k))
    return attend(layer, q, k, v).transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Multi-head attention with RMS-normalised, rotated queries and keys."""

    def __init__(self, layer: int, d_model: int, n_heads: int) -> None:
        super().__init__()
        self.layer = layer
        self.n_heads = n_heads
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.out = nn.Linear(d_model, d_model)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], attend: LayerAttend) -> Tensor:
        """Map ``x [B, T, D]`` to ``[B, T, D]``; ``rotary`` is ``(cos, sin) [T, Dh/2]``."""
        return self.out(attend_from_projection(attend, self.layer, self.qkv(x), self.n_heads, rotary))


class Block(nn.Module):
    """Pre-norm transformer block whose norms and residuals are modulated per frame."""

    def __init__(self, layer: int, d_model: int, n_heads: int) -> None:
        super().__init__()
        self.adaln1, self.gate1 = AdaLN(d_model), Gate(d_model)
        self.attn = Attention(layer, d_model, n_heads)
        self.adaln2, self.gate2 = AdaLN(d_model), Gate(d_model)
        self.mlp = MLP(d_model, 4 * d_model, d_model)

    def forward(self, x: Tensor, mod: BlockModulation, rotary: tuple[Tensor, Tensor], attend: LayerAttend) -> Tensor:
        """Map tokens ``x [B, N*P, D]`` to the same shape."""
        x, branch = self.halves(x, mod, rotary, attend)
        return x + gated(branch, mod.mlp_gate)

    def halves(
        self, x: Tensor, mod: BlockModulation, rotary: tuple[Tensor, Tensor], attend: LayerAttend
    ) -> tuple[Tensor, Tensor]:
        """``forward`` up to its last sum: the tokens after attention, and the MLP's output before its gate."""
        x = x + gated(self.attn(modulated_norm(x, mod.attn_scale, mod.attn_shift), rotary, attend), mod.attn_gate)
        return x, self.mlp(modulated_norm(x, mod.mlp_scale, mod.mlp_shift))


class Transformer(nn.Module):
    """The stack of blocks (a module of its own for the parameter names)."""

    def __init__(self, cfg: GameRFTConfig) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(i, cfg.d_model, cfg.n_heads) for i in range(cfg.n_layers))


class FinalLayer(nn.Module):
    """AdaLN, SiLU and the projection back to latent channels."""

    def __init__(self, d_model: int, channels: int) -> None:
        super().__init__()
        self.norm = AdaLN(d_model)
        self.proj = nn.Linear(d_model, channels)

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """Map tokens ``[B, N*P, D]`` to ``[B, N*P, C]``."""
        return self.proj(F.silu(modulated_norm(x, scale, shift)))


def make_rotary(cfg: GameRFTConfig) -> MotionRotary | OrthoRotary:
    """The position embedding that ``cfg`` names; its tables, which no checkpoint holds, never on the meta device."""
    with torch.device("cpu") if torch.get_default_device().type == "meta" else nullcontext():
        if cfg.rope_impl == "motion":
            return MotionRotary(cfg.head_dim, cfg.sample_size, cfg.rope_ats_delta)
        return OrthoRotary(cfg.head_dim, cfg.sample_size, cfg.n_frames)


class GameRFTCore(WorldModel):
    """The velocity model.

    ``weights_choice``: which of several sets of weights its checkpoint held it was given, in words; else ``None``.

    Raises:
        ValueError: if ``cfg`` describes a model that cannot be built (see :meth:`GameRFTConfig.validate`).
    """

    blocks_path = "transformer.blocks"
    block_linears = (
        LinearSpec("adaln1.fc", "modulation", per_frame=True),
        LinearSpec("gate1.fc_c", "modulation", per_frame=True),
        LinearSpec("attn.qkv", "attn"),
        LinearSpec("attn.out", "attn", final=True),
        LinearSpec("adaln2.fc", "modulation", per_frame=True),
        LinearSpec("gate2.fc_c", "modulation", per_frame=True),
        LinearSpec("mlp.fc1", "mlp", activation="mlp.act"),
        LinearSpec("mlp.fc2", "mlp", final=True),
    )
    block_parts: ClassVar[dict[str, str]] = {"attention": "attn", "mlp": "mlp"}
    cfg: GameRFTConfig  # type: ignore[assignment]  # a plain attribute
    rotary: MotionRotary | OrthoRotary

    def __init__(self, cfg: GameRFTConfig) -> None:
        super().__init__()
        cfg.validate()
        self.cfg = cfg
        self.weights_choice: str | None = None
        self.proj_in = nn.Linear(cfg.channels, cfg.d_model, bias=False)
        self.t_embed = TimestepEmbedding(cfg.d_model)
        if not cfg.uncond:
            self.control_embed = ControlEmbedding(cfg.n_buttons, cfg.d_model)
        self.transformer = Transformer(cfg)
        self.proj_out = FinalLayer(cfg.d_model, cfg.channels)
        self.rotary = make_rotary(cfg)

    @classmethod
    def skeleton(cls, cfg: GameRFTConfig, device: torch.device) -> GameRFTCore:
        """A BF16 core to run on ``device`` whose parameters are on the meta device: they take no memory.

        For weights that come from elsewhere, one at a time; what no checkpoint holds (the rotary tables) is in place.
        """
        with torch.device("meta"):
            core = cls(cfg).to(torch.bfloat16)
        core.rotary.to(device)
        return core.eval().requires_grad_(False)

    @property
    def blocks(self) -> list[Block]:
        """The transformer blocks, first to last."""
        return list(self.transformer.blocks)  # type: ignore[arg-type]

    @property
    def dtype(self) -> torch.dtype:
        """Compute dtype: that of the input projection, which is never quantised."""
        return self.proj_in.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the input projection is."""
        return self.proj_in.weight.device

    def layer_window(self, layer: int) -> int | None:
        """Window of ``layer`` in frames, the current one included; ``None`` = unlimited.

        Layers with ``layer % local_idx != 0`` are local, the others global.
        """
        return self.cfg.local_window if layer % self.cfg.local_idx else self.cfg.global_window

    def add_controls(self, cond: Tensor, mouse: Tensor | None = None, btn: Tensor | None = None) -> Tensor:
        """:meth:`conditioning` from the time's embedding ``cond [B, N, D]`` on.

        An unconditional model ignores the controls; any other raises ``ValueError`` without them.
        """
        if self.cfg.uncond:
            return cond
        if mouse is None or btn is None:
            raise ValueError("this model is conditioned on controls: pass mouse and btn (or use uncond: true)")
        return cond + self.control_embed(mouse, btn)

    def modulation_linears(self) -> list[nn.Module]:
        """Four of each block, the output's last."""
        blocks = [[block.adaln1.fc, block.gate1.fc_c, block.adaln2.fc, block.gate2.fc_c] for block in self.blocks]
        return [*(linear for block in blocks for linear in block), self.proj_out.norm.fc]

    def modulation_of(self, outputs: Sequence[Tensor]) -> Modulation:
        """See :class:`~harness.models.world.WorldModel`."""
        *vectors, out = outputs
        blocks = []
        for adaln1, gate1, adaln2, gate2 in zip(*(vectors[i::4] for i in range(4)), strict=True):
            scale1, shift1 = adaln1.chunk(2, dim=-1)
            scale2, shift2 = adaln2.chunk(2, dim=-1)
            blocks.append(BlockModulation(scale1, shift1, gate1, scale2, shift2, gate2))
        return Modulation(tuple(blocks), *out.chunk(2, dim=-1))

    def denoise(self, x: Tensor, mod: Modulation, rotary: tuple[Tensor, Tensor], attend: LayerAttend) -> Tensor:
        """Velocity of noisy latents.

        Args:
            x: ``[B, N, C, S, S]``, any float dtype; computed in the model's.
            mod: conditioning of the same N frames.
            rotary: ``(cos, sin)`` float32 ``[N*P, Dh/2]`` of the frames' absolute positions.
            attend: where the queries find keys and values.

        Returns:
            noise - data, ``[B, N, C, S, S]`` in the model's dtype.
        """
        tokens = self.embed(x)
        for block, block_mod in zip(self.blocks, mod.blocks, strict=True):
            tokens = block(tokens, block_mod, rotary, attend)
        return self.velocity(tokens, mod.out_scale, mod.out_shift)

    def embed(self, x: Tensor) -> Tensor:
        """Tokens ``[B, N*P, D]`` of latents ``[B, N, C, S, S]``, in the model's dtype."""
        return self.proj_in(x.to(self.dtype).flatten(3).transpose(2, 3).flatten(1, 2))

    def velocity(self, tokens: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """Velocity ``[B, N, C, S, S]`` from the last block's tokens and the output's ``scale, shift [B, N, D]``."""
        out, side = self.proj_out(tokens, scale, shift), self.cfg.sample_size
        return out.unflatten(1, (scale.shape[1], -1)).transpose(2, 3).unflatten(3, (side, side))

    def full_attention(self) -> BlockCausalAttention:
        """The masked attention of a full pass over this model's layers."""
        windows = [self.layer_window(i) for i in range(self.cfg.n_layers)]
        return BlockCausalAttention(windows, self.cfg.tokens_per_frame, self.cfg.causal)

    def forward(self, x: Tensor, t: Tensor, mouse: Tensor | None = None, btn: Tensor | None = None) -> Tensor:
        """Velocity of a whole sequence ``x [B, N, C, S, S]`` at times ``t [B, N]``, frames 0 … N-1."""
        mod = self.modulation(self.conditioning(t, mouse, btn))
        rotary = self.rotary(torch.arange(x.shape[1], device=x.device))
        return self.denoise(x, mod, rotary, self.full_attention())


class GameRFT(nn.Module):
    """The full model as checkpoints name it: the velocity model sits under ``core.``."""

    def __init__(self, cfg: GameRFTConfig) -> None:
        super().__init__()
        self.core = GameRFTCore(cfg)

    def forward(self, x: Tensor, t: Tensor, mouse: Tensor | None = None, btn: Tensor | None = None) -> Tensor:
        """See :meth:`GameRFTCore.forward`."""
        return self.core(x, t, mouse, btn)
