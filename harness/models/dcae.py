"""DCAE: the deep-compression autoencoder that turns frames into latents and back.

Checkpoints weight-normalise every convolution; here convolutions are plain and the loader folds the norm
(:func:`harness.models.checkpoint.fold_weight_norm`).
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.models.shapes import GROUP_CHANNELS, DCAEConfig


class ResBlock(nn.Module):
    """1×1 widening, grouped 3×3, 1×1 narrowing, plus the input."""

    def __init__(self, ch: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(ch, 2 * ch, 1)
        self.conv2 = nn.Conv2d(2 * ch, 2 * ch, 3, padding=1, groups=2 * ch // GROUP_CHANNELS)
        self.conv3 = nn.Conv2d(2 * ch, ch, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, ch, h, w]`` to the same shape."""
        hidden = F.leaky_relu(self.conv1(x), 0.01)
        return x + self.conv3(F.leaky_relu(self.conv2(hidden), 0.01))


def bicubic_matrix(size_in: int, size_out: int) -> Tensor:
    """Bicubic resampling of one axis as a float32 matrix ``[size_out, size_in]`` (no ``align_corners``, no antialias).

    Bicubic interpolation is linear and separable, so an image is resampled by one matrix per axis. Read off
    ``F.interpolate`` itself, borders included.
    """
    rows = torch.eye(size_in)[:, None, :, None]  # one impulse per position along the height
    picture = F.interpolate(rows, size=(size_out, 1), mode="bicubic", align_corners=False, antialias=False)
    return picture[:, 0, :, 0].T.contiguous()


def resample(x: Tensor, height: Tensor, width: Tensor) -> Tensor:
    """Apply one :func:`bicubic_matrix` per axis to ``x [B, C, h, w]``.

    Two matrix products on the channels-last layout: torch's own bicubic kernel runs one GPU thread per output pixel
    and loops over batch and channels in it, which at 16×16 pixels leaves the GPU idle.
    """
    rows = x.permute(0, 2, 3, 1)  # B, h, w, C
    wide = width.to(x.dtype) @ rows
    tall = height.to(x.dtype) @ wide.flatten(2)
    return tall.unflatten(2, (width.shape[0], -1)).permute(0, 3, 1, 2)


class Resample(nn.Module):
    """Bicubic resampling of a ``side``×``side`` map by ``scale``, after a 1×1 projection (absent when channels stay).

    The weights of ×2 and ×0.5 are multiples of 1/256: exact in BF16 but for the outermost pixels' 283/256.
    """

    matrix: Tensor

    def __init__(self, ch_in: int, ch_out: int, side: int, scale: float) -> None:
        super().__init__()
        if ch_in != ch_out:
            self.proj = nn.Conv2d(ch_in, ch_out, 1, bias=False)
        self.register_buffer("matrix", bicubic_matrix(side, int(side * scale)), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, ch_in, side, side]`` to ``[B, ch_out, scale*side, scale*side]``."""
        if hasattr(self, "proj"):
            x = self.proj(x)
        return resample(x, self.matrix, self.matrix)


class UpStage(nn.Module):
    """Doubles the side: resample and residual blocks, beside a pixel-shuffle shortcut."""

    def __init__(self, ch_in: int, ch_out: int, side: int, blocks: int) -> None:
        super().__init__()
        self.up = Resample(ch_in, ch_out, side, 2)
        self.blocks = nn.ModuleList(ResBlock(ch_out) for _ in range(blocks))
        self.tiles = 4 * ch_out // ch_in

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, ch_in, h, w]`` to ``[B, ch_out, 2h, 2w]``."""
        shortcut = F.pixel_shuffle(x, 2).repeat(1, self.tiles, 1, 1)
        x = self.up(x)
        for block in self.blocks:
            x = block(x)
        return x + shortcut


class ResizedOutput(nn.Module):
    """The output convolution of 16:9 models: 3×3 to RGB, then a bicubic resize to the frame."""

    def __init__(self, ch: int, channels: int, size: list[int]) -> None:
        super().__init__()
        self.size = tuple(size)
        self.proj = nn.Conv2d(ch, channels, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, ch, s, s]`` to ``[B, channels, h, w]``."""
        return F.interpolate(self.proj(x), size=self.size, mode="bicubic", align_corners=False, antialias=False)


class MiddleBlock(nn.Module):
    """Residual blocks at the latent's resolution."""

    def __init__(self, ch: int, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ResBlock(ch) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, ch, h, w]`` to the same shape."""
        for block in self.blocks:
            x = block(x)
        return x


class DCAEDecoder(nn.Module):
    """Latents to frames.

    Raises:
        ValueError: if ``cfg`` describes a decoder that cannot be built.
    """

    def __init__(self, cfg: DCAEConfig) -> None:
        super().__init__()
        cfg.validate()
        self.cfg = cfg
        stages = cfg.decoder_blocks_per_stage
        widths = [cfg.ch_max, *cfg.widths(len(stages))]
        self.conv_in = nn.Conv2d(cfg.latent_channels, cfg.ch_max, 1)
        self.repeats = cfg.ch_max // cfg.latent_channels
        if cfg.use_middle_block:
            self.middle_block = MiddleBlock(cfg.ch_max, stages[-1])
        self.blocks = nn.ModuleList(
            UpStage(wide, narrow, cfg.latent_size * 2**i, count)
            for i, ((wide, narrow), count) in enumerate(zip(pairwise(widths), stages, strict=True))
        )
        self.conv_out: nn.Module
        if cfg.is_16_9:
            self.conv_out = ResizedOutput(cfg.ch_0, cfg.channels, cfg.sample_size)
        else:
            self.conv_out = nn.Conv2d(cfg.ch_0, cfg.channels, 3, padding=1, bias=False)

    def forward(self, z: Tensor) -> Tensor:
        """Map latents ``[B, Cz, s, s]`` (model latents times ``vae_scale``) to RGB ``[B, 3, h, w]`` in [-1, 1].

        ``s`` is the config's ``latent_size``.
        """
        x = self.conv_in(z) + z.repeat(1, self.repeats, 1, 1)
        if self.cfg.use_middle_block:
            x = self.middle_block(x)
        for stage in self.blocks:
            x = stage(x)
        return self.conv_out(F.silu(x))


class DownStage(nn.Module):
    """Halves the side: residual blocks and a resample, beside a pixel-unshuffle shortcut. Mirrors :class:`UpStage`."""

    def __init__(self, ch_in: int, ch_out: int, side: int, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ResBlock(ch_in) for _ in range(blocks))
        self.down = Resample(ch_in, ch_out, side, 0.5)
        self.merge = 4 * ch_in // ch_out

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, ch_in, h, w]`` to ``[B, ch_out, h/2, w/2]``."""
        shortcut = F.pixel_unshuffle(x, 2).unflatten(1, (self.merge, -1)).mean(1)
        for block in self.blocks:
            x = block(x)
        return self.down(x) + shortcut


class DCAEEncoder(nn.Module):
    """Frames to latents: the mirror image of the decoder, for square frames.

    The published specification covers the decoder alone; this encoder is this package's own and serves the models it
    trains. Raises ``ValueError`` for a 16:9 config, whose frames would first have to be made square.
    """

    def __init__(self, cfg: DCAEConfig) -> None:
        super().__init__()
        cfg.validate()
        if cfg.is_16_9:
            raise ValueError(f"DCAE encoder: sample_size={list(cfg.sample_size)} is 16:9; only square frames encode")
        self.cfg = cfg
        stages = cfg.encoder_blocks_per_stage
        widths = [cfg.ch_max, *cfg.widths(len(stages))]
        self.conv_in = nn.Conv2d(cfg.channels, cfg.ch_0, 3, padding=1)
        pairs = list(enumerate(zip(pairwise(widths), stages, strict=True)))
        self.blocks = nn.ModuleList(
            DownStage(narrow, wide, cfg.latent_size * 2 ** (i + 1), count)
            for i, ((wide, narrow), count) in reversed(pairs)
        )
        self.conv_out = nn.Conv2d(cfg.ch_max, cfg.latent_channels, 1)
        self.merge = cfg.ch_max // cfg.latent_channels

    def forward(self, x: Tensor) -> Tensor:
        """Map RGB ``[B, 3, h, w]`` in [-1, 1] to latents ``[B, Cz, s, s]`` (divide by ``vae_scale`` for the model)."""
        x = self.conv_in(x)
        for stage in self.blocks:
            x = stage(x)
        return self.conv_out(F.silu(x)) + x.unflatten(1, (self.merge, -1)).mean(1)


def to_frames(rgb: Tensor) -> Tensor:
    """Map decoder output in [-1, 1] to float32 frames in [0, 1], clamped."""
    return ((rgb.to(torch.float32) + 1) / 2).clamp(0, 1)
