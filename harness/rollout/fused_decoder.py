"""The frame decoder with our kernels: a stage in one launch where its channels are few, in five elsewhere.

A convolution by itself writes what the next one reads, so that a decoder of 141 GFLOP moves 1.2 GB; here what lies
between those of a residual block stays on the multiprocessor (:mod:`harness.kernels.cuda.conv`). Products of 1 by 1
convolutions with many channels are cuBLAS's.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.kernels.cuda import conv, nvrtc
from harness.models.dcae import DCAEConfig, DCAEDecoder, ResBlock, ResizedOutput, UpStage

MOST_COLOURS = 4


def unavailable(cfg: DCAEConfig, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a decoder of ``cfg`` in ``dtype`` cannot run by these kernels on ``device``; None if it can."""
    if device.type != "cuda" or torch.version.hip is not None:
        return f"its kernels need an NVIDIA GPU; this decoder is on {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability[0] != 9:
        return f"its kernels are built for sm_90 (H100, H200); this GPU is sm_{capability[0]}{capability[1]}"
    reason = unfit(cfg, dtype)
    return reason if reason is not None else nvrtc.unavailable()


def unfit(cfg: DCAEConfig, dtype: torch.dtype) -> str | None:
    """Why these kernels cannot compute a decoder of ``cfg`` in ``dtype`` on any GPU; None if they can."""
    if dtype is not torch.bfloat16:
        return f"its kernels compute in bfloat16, this decoder in {str(dtype).removeprefix('torch.')}"
    if cfg.use_middle_block:
        return "a middle block (use_middle_block) is not among its kernels"
    if 2 * cfg.latent_size % conv.TILE:
        return f"tiles are {conv.TILE} pixels wide and high; the first stage has {2 * cfg.latent_size}"
    if cfg.channels > MOST_COLOURS:
        return f"{cfg.channels} colours; its last kernel makes at most {MOST_COLOURS}"
    widths = cfg.widths(len(cfg.decoder_blocks_per_stage))
    problems = [reason for width in widths if (reason := conv.unfit(width)) is not None]
    return "; ".join(problems) or None


class _Wide(nn.Module):
    """A residual block with many channels."""

    def __init__(self, block: ResBlock) -> None:
        super().__init__()
        self.channels = block.conv1.in_channels
        self.register_buffer("wide", block.conv1.weight.detach().flatten(1).contiguous())
        self.register_buffer("bias", block.conv1.bias.detach())  # type: ignore[union-attr]
        self.register_buffer("filters", conv.pack_grouped(block.conv2))
        self.register_buffer("narrow", block.conv3.weight.detach().flatten(1).contiguous())

    def forward(self, x: Tensor, base: Tensor) -> Tensor:
        """``base`` plus the branch of ``x``, both ``[B, h, w, C]``."""
        hidden = conv.grouped_conv(F.linear(x, self.wide, self.bias), self.filters)  # type: ignore[arg-type]
        sums = torch.addmm(base.flatten(0, 2), hidden.flatten(0, 2), self.narrow.t())  # type: ignore[operator]
        return sums.view(base.shape)


class _Stage(nn.Module):
    """A stage: doubles the side. ``silu``: of the result too, where the stage is one kernel (``does_silu``)."""

    def __init__(self, stage: UpStage, silu: bool) -> None:
        super().__init__()
        blocks: list[Any] = list(stage.blocks)
        channels = blocks[0].conv1.in_channels
        self.small = conv.one_launch(channels)
        self.does_silu = silu and self.small
        proj = stage.up.proj.weight.detach().flatten(1).contiguous() if hasattr(stage.up, "proj") else None
        self.register_buffer("proj", proj)
        if self.small:
            packed = [conv.pack_resblock(block.conv1, block.conv2, block.conv3) for block in blocks]
            self.register_buffer("packed", torch.stack(packed))
        else:
            self.blocks = nn.ModuleList(_Wide(block) for block in blocks)

    def forward(self, x: Tensor, small: Tensor | None = None) -> Tensor:
        """Map ``[B, h, w, CI]`` to ``[B, 2h, 2w, C]``; ``small``: ``x`` projected, where that has been done."""
        small = self.projected(x) if small is None else small
        if not self.small:
            return self._by_parts(small, x)
        small, double, weights = self._to_last(small)
        return conv.resblock(small, weights, double, x, self.does_silu)

    def followed_by(self, x: Tensor, small: Tensor | None, projection: Tensor) -> tuple[Tensor, Tensor]:
        """The same of a stage of one kernel, and the result projected for the next one."""
        small, double, weights = self._to_last(self.projected(x) if small is None else small)
        return conv.resblock_projected(small, weights, double, x, projection)

    def products(self, x: Tensor, small: Tensor | None, colours: Tensor) -> Tensor:
        """What the last convolution adds up, of a stage of one kernel: see ``conv.resblock_products``."""
        small, double, weights = self._to_last(self.projected(x) if small is None else small)
        return conv.resblock_products(small, weights, double, x, colours)

    def projected(self, x: Tensor) -> Tensor:
        """``x`` with this stage's channels."""
        return x if self.proj is None else F.linear(x, self.proj)  # type: ignore[arg-type]

    def _to_last(self, small: Tensor) -> tuple[Tensor, bool, Tensor]:
        """What the last residual block gets: its input, whether that is to be doubled, its weights."""
        *front, last = self.packed  # type: ignore[misc]
        for number, weights in enumerate(front):
            small = conv.resblock(small, weights, number == 0)
        return small, not front, last

    def _by_parts(self, small: Tensor, x: Tensor) -> Tensor:
        out, base = conv.upsample(small, x)
        if len(self.blocks) == 1:
            return self.blocks[0](out, base)
        for block in self.blocks:
            out = block(out, out)
        shortcut = F.pixel_shuffle(x.permute(0, 3, 1, 2), 2)  # it joins behind the last block
        return out + shortcut.repeat(1, out.shape[-1] // shortcut.shape[1], 1, 1).permute(0, 2, 3, 1)


class FusedDecoder(nn.Module):
    """``DCAEDecoder.forward`` by our kernels; holds packed copies of its weights.

    Args:
        decoder: in BF16, on a GPU that :func:`unavailable` accepts.
    """

    def __init__(self, decoder: DCAEDecoder) -> None:
        super().__init__()
        self.register_buffer("weight", decoder.conv_in.weight.detach().flatten(1).contiguous())
        self.register_buffer("bias", decoder.conv_in.bias.detach())  # type: ignore[union-attr]
        self.repeats = decoder.repeats
        stages: list[Any] = list(decoder.blocks)
        self.stages = nn.ModuleList(_Stage(stage, number == len(stages) - 1) for number, stage in enumerate(stages))
        out: Any = decoder.conv_out
        self.size = out.size if isinstance(out, ResizedOutput) else None
        proj = out.proj if isinstance(out, ResizedOutput) else out
        self.colours = proj.out_channels
        self.resizes = self.size is not None and self.stages[-1].does_silu
        """Whether the last stage does the last convolution's products, too."""
        self.register_buffer("rgb", conv.pack_products(proj) if self.resizes else conv.pack_rgb(proj))
        made: list[Any] = list(self.stages)
        for number, (stage, following) in enumerate(pairwise(made)):
            fits = stage.small and following.proj is not None
            self.register_buffer(f"projection{number}", conv.fragments(following.proj) if fits else None)

    def projection(self, number: int) -> Tensor | None:
        """The next stage's projection, where stage ``number`` does it."""
        return getattr(self, f"projection{number}")

    def _entered(self, rows: Tensor) -> Tensor:
        """``conv_in`` of ``rows [B, s, s, Cz]``, and these repeated: ``[B, s, s, C]``, in two launches."""
        repeated = rows.unsqueeze(-2) + self.bias.view(self.repeats, -1)  # type: ignore[operator]
        sums = torch.addmm(repeated.flatten(0, 2).flatten(1), rows.flatten(0, 2), self.weight.t())  # type: ignore[operator]
        return sums.view(*rows.shape[:3], -1)

    def forward(self, z: Tensor) -> Tensor:
        """Map BF16 latents ``[B, Cz, s, s]`` to RGB ``[B, 3, h, w]`` in [-1, 1]."""
        x = self._entered(z.permute(0, 2, 3, 1))
        front: list[Any] = list(self.stages)
        last, small = front.pop(), None
        for number, stage in enumerate(front):
            projection = self.projection(number)
            x, small = (stage(x, small), None) if projection is None else stage.followed_by(x, small, projection)
        if self.resizes:
            return conv.resize(last.products(x, small, self.rgb), self.colours, self.size)  # type: ignore[arg-type]
        x = last(x, small)
        if not last.does_silu:
            x = F.silu(x)
        picture = conv.conv_rgb(x, self.rgb, self.colours)  # type: ignore[arg-type]
        if self.size is None:
            return picture
        return F.interpolate(picture, size=self.size, mode="bicubic", align_corners=False)
