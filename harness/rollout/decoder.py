"""The frame decoder as a rollout runs it: by our kernels or compiled, in a CUDA graph of its own."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import TypeVar

import torch
from torch import Tensor, nn

from harness.kernels.rehearsal import rehearsal
from harness.measure.timing import samples_ms
from harness.models.dcae import DCAEConfig, DCAEDecoder
from harness.rollout import fused_decoder
from harness.rollout.compile import CapturedGraph, compile_function, without_grad
from harness.rollout.conf import CompileConf, DecoderGroups
from harness.rollout.fused_decoder import FusedDecoder

MERGED = (64, 128)
"""Channels per group that ``auto`` tries between the trained ones and all of them."""


def validate(groups: DecoderGroups, cfg: DCAEConfig, device: torch.device, dtype: torch.dtype) -> None:
    """Raise ``ValueError`` if ``groups`` is ``fused`` and these kernels cannot run such a decoder on ``device``."""
    reason = fused_decoder.unavailable(cfg, device, dtype) if groups is DecoderGroups.fused else None
    if reason is not None:
        raise ValueError(f"decoder.groups=fused: {reason}; use decoder.groups=auto")


def regroup(conv: nn.Conv2d, groups: int) -> nn.Conv2d:
    """The same convolution with fewer groups: weights are block-diagonal, zero between the groups merged.

    Raises:
        ValueError: if ``groups`` does not divide the convolution's.
    """
    if conv.groups % groups:
        raise ValueError(f"{groups} groups do not divide the convolution's {conv.groups}")
    merge = conv.groups // groups
    old = conv.weight.detach().unflatten(0, (groups, merge, -1))
    new = old.new_zeros(groups, merge, old.shape[2], merge, *old.shape[3:])
    for i in range(merge):
        new[:, i, :, i] = old[:, i]
    size = (conv.in_channels, conv.out_channels, conv.kernel_size)
    merged = nn.utils.skip_init(
        nn.Conv2d, *size, stride=conv.stride, padding=conv.padding, groups=groups, bias=conv.bias is not None,
        device=old.device, dtype=old.dtype,
    )  # fmt: skip
    merged.weight.data = new.flatten(0, 2).flatten(1, 2)
    if conv.bias is not None:
        merged.bias.data = conv.bias.detach()  # type: ignore[union-attr]
    return merged.eval().requires_grad_(False)


Module = TypeVar("Module", bound=nn.Module)


def channels_last(module: Module) -> Module:
    """Put the weights of ``module``'s convolutions into channels-last memory, in place; returns it."""
    return module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def regroup_all(decoder: nn.Module, latent: Tensor, how: DecoderGroups) -> dict[str, int]:
    """Regroup ``decoder``'s grouped convolutions in place; returns each one's number of groups.

    Args:
        decoder: on the device it runs on.
        latent: an input, whose size ``auto`` measures at.
        how: see :class:`DecoderGroups`.
    """
    convs = _grouped(decoder)
    if how is DecoderGroups.grouped or (how is DecoderGroups.auto and latent.device.type == "cpu"):
        return {name: conv.groups for name, conv in convs.items()}
    shapes = _input_shapes(decoder, convs, latent) if how is DecoderGroups.auto else {}
    for name, conv in convs.items():
        chosen = regroup(conv, 1) if how is DecoderGroups.dense else _fastest(conv, shapes[name])
        decoder.set_submodule(name, chosen)
        convs[name] = chosen
    return {name: conv.groups for name, conv in convs.items()}


def _grouped(decoder: nn.Module) -> dict[str, nn.Conv2d]:
    return {name: m for name, m in decoder.named_modules() if isinstance(m, nn.Conv2d) and m.groups > 1}


def _input_shapes(decoder: nn.Module, convs: dict[str, nn.Conv2d], latent: Tensor) -> dict[str, torch.Size]:
    shapes: dict[str, torch.Size] = {}

    def note(name: str) -> Callable[..., None]:
        return lambda _, args: shapes.update({name: args[0].shape})

    hooks = [conv.register_forward_pre_hook(note(name)) for name, conv in convs.items()]
    decoder(latent)
    for hook in hooks:
        hook.remove()
    return shapes


def _fastest(conv: nn.Conv2d, shape: torch.Size) -> nn.Conv2d:
    """The fastest regrouping of ``conv`` for inputs of ``shape`` on a GPU, channels last."""
    weight = conv.weight
    x = torch.randn(shape, device=weight.device, dtype=weight.dtype).to(memory_format=torch.channels_last)
    merged = [conv.in_channels // width for width in MERGED if conv.in_channels % width == 0]
    candidates = {conv.groups, 1, *(groups for groups in merged if conv.groups % groups == 0)}
    timed = []
    for groups in sorted(candidates, reverse=True):
        candidate = channels_last(regroup(conv, groups))
        timed.append((median(samples_ms(partial(candidate, x), x.device, count=10, warmup=3)), groups, candidate))
    return min(timed, key=lambda entry: entry[:2])[2]


class FrameDecoder:
    """``latent [B, C, s, s] -> RGB [B, 3, h, w]`` without gradients, prepared for the first latent's size.

    Where frames are captured, so is this: its result is then one tensor, valid until the next call.

    Args:
        decoder: on its device, in its dtype; owned and changed from now on.
        compile: as for the rollout.
        groups: see :class:`DecoderGroups`.
        scale: what latents are multiplied by before they are rounded to the decoder's dtype.

    Raises:
        ValueError: if ``groups`` is ``fused`` and these kernels cannot run ``decoder`` where it is.
    """

    def __init__(
        self,
        decoder: nn.Module,
        compile: CompileConf,
        groups: DecoderGroups = DecoderGroups.auto,
        scale: float = 1.0,
    ) -> None:
        self.decoder, self.compile, self.how, self.scale = decoder, compile, groups, scale
        self.dtype = next(decoder.parameters()).dtype
        self.fused = self._fuses()
        """Whether our kernels decode."""
        self.groups: dict[str, int] = {}
        """Groups of each convolution that was trained with several; known after the first call."""
        self.prepare_s = 0.0
        """Seconds that the first call took to choose, compile and capture."""
        self._latent: Tensor | None = None
        self._decode: Callable[[Tensor], Tensor]
        self._graph: CapturedGraph[Tensor] | None = None

    def _fuses(self) -> bool:
        if self.how in (DecoderGroups.grouped, DecoderGroups.dense):
            return False
        if self.how is DecoderGroups.auto and not self.compile.enabled:
            return False
        if not isinstance(self.decoder, DCAEDecoder):
            return False
        weight, cfg = next(self.decoder.parameters()), self.decoder.cfg
        validate(self.how, cfg, weight.device, weight.dtype)
        return fused_decoder.unavailable(cfg, weight.device, weight.dtype) is None

    @without_grad
    def __call__(self, latent: Tensor) -> Tensor:
        """Decode. Raises ``ValueError`` for another size than the first latent's where a graph is replayed."""
        if self._latent is None:
            start = time.perf_counter()
            self._prepare((latent * self.scale).to(self.dtype))
            self.prepare_s = time.perf_counter() - start
        if self._graph is None:
            # Whatever mode the latent was made in, compiled code sees an ordinary tensor.
            latent = latent.clone() if latent.is_inference() else latent
            return self._decode((latent * self.scale).to(self.dtype))
        assert self._latent is not None
        if latent.shape != self._latent.shape:
            raise ValueError(
                f"latent has shape {tuple(latent.shape)}; this decoder was captured for {tuple(self._latent.shape)}"
            )
        torch.mul(latent, self.scale, out=self._latent)  # one launch, for which a picture waits
        return self._graph.replay()

    def _prepare(self, latent: Tensor) -> None:
        self._latent = latent.clone()
        if latent.device.type == "cuda":
            self._latent = self._latent.contiguous(memory_format=torch.channels_last)
        if self.fused:
            self.groups = {name: conv.groups for name, conv in _grouped(self.decoder).items()}
            assert isinstance(self.decoder, DCAEDecoder)
            self.decoder = self._decode = FusedDecoder(self.decoder)  # nothing is left for a compiler to fuse
            with rehearsal():
                self.decoder(self._latent)
        else:
            self._decode = self._compiled()
        decode, buffer = self._decode, self._latent
        if self.compile.captures(latent.device):
            self._graph = CapturedGraph(lambda: decode(buffer), latent.device)

    def _compiled(self) -> Callable[[Tensor], Tensor]:
        decoder, latent = self.decoder, self._latent
        assert latent is not None
        self.groups = regroup_all(decoder, latent, self.how)
        if latent.device.type == "cuda":
            channels_last(decoder)

        def decode(z: Tensor) -> Tensor:
            return decoder(z)

        return compile_function(decode, self.compile)
