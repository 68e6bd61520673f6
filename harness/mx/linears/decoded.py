"""Weights of emulated MX Linears kept decoded, for play on a CPU: the same bits, without decoding at every call.

What is held beside the MX weight is its exact BF16 value, so memory then says nothing about MX; speed never did, the
kernel is emulated. A run does not do this: it measures what the formats promise.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from harness.formats.mx import decode, encode
from harness.models import bf16
from harness.mx.conf import KeepDecoded
from harness.mx.linears.base import MXLinear

SHARE = 0.5
"""Of the memory that is free, as much as ``auto`` lets decoded weights take."""


@dataclass(frozen=True)
class Kept:
    """How many Linears hold a decoded weight, and the bytes of those weights; ``note`` says so, or why none does."""

    linears: int
    nbytes: int
    note: str


class DecodedMXLinear(MXLinear):
    """An emulated MX Linear that keeps its decoded weight, BF16 ``[N, K]``, beside the MX one."""

    dense: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """What :class:`MXLinear` gives, bit for bit."""
        element = self.fmt.activation_element
        if element is not None:
            x = decode(encode(x, element, self.fmt.scale_mode), element)
        return bf16.linear(x, self.dense, self.bias)

    def weight_bytes(self) -> int:
        """The decoded weight too."""
        return super().weight_bytes() + self.dense.nbytes


def keep_decoded(model: nn.Module, keep: KeepDecoded) -> Kept:
    """Let the emulated weight-only MX Linears of ``model`` keep their decoded weights, in place, as ``keep`` says."""
    linears = [module for module in model.modules() if type(module) is MXLinear]
    needed = sum(2 * linear.out_features * linear.in_features for linear in linears)
    if not linears:
        return Kept(0, 0, "no emulated weights to decode")
    if keep is KeepDecoded.never:
        return Kept(0, 0, "emulated weights decoded at every call")
    if keep is KeepDecoded.auto:
        if linears[0].elements.device.type != "cpu":
            return Kept(0, 0, "emulated weights decoded at every call, as ever on a GPU")
        free = free_memory()
        if needed > SHARE * free:
            return Kept(0, 0, f"emulated weights decoded at every call: {needed >> 20} MiB decoded, {free >> 20} free")
    with torch.inference_mode(False):
        for linear in linears:
            linear.__class__ = DecodedMXLinear
            linear.register_buffer("dense", decode(linear.weight_blocks(), linear.fmt.element), persistent=False)
    return Kept(
        len(linears), needed, f"{len(linears)} emulated weights kept decoded ({needed / 2**20:.0f} MiB beside MX)"
    )


def free_memory() -> int:
    """Bytes of memory that this machine can still give."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            sizes = dict(line.split(":") for line in file)
        return int(sizes["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
