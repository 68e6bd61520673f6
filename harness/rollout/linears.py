"""BF16 Linears of the blocks, modulation too, by our own kernel, over packed weights, where that makes a frame faster.

By itself a product of a frame's rows takes cuBLAS no longer. But cuBLAS begins when the kernel in front of it has
ended, and ours has its weights there by then (:mod:`harness.kernels.launch`). What MX Linears gain is told against the
faster.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeGuard

import torch
from torch import nn

from harness.kernels.cuda import linear as cuda_linear
from harness.kernels.cuda.linear import PackedBF16Linear, PackedLinear
from harness.models.world import WorldModel
from harness.rollout.conf import AttentionKind, CompileConf

WIDEST = {64: 2560, 128: 1536}
"""Rows (clips times tokens), and the widest model of which it is no slower at so many.

At 64 rows it is much faster at a width of 1536 and equal at 2560, at 128 faster at 1536, at 256 slower. Other widths
have not been measured."""


def validate(conf: CompileConf, device: torch.device) -> None:
    """Raise ``ValueError`` if ``conf`` asks for packed Linears and ``device`` cannot run them."""
    reason = cuda_linear.unavailable(device) if conf.linears == "packed" else None
    if reason is not None:
        raise ValueError(f"compile.linears=packed: {reason}; use compile.linears=auto")


def pack_where_faster(core: WorldModel, conf: CompileConf, attention: AttentionKind, batch: int) -> int:
    """Pack what BF16 Linears the blocks have, in place, as ``conf.linears`` says; returns how many.

    ``auto``: where frames are captured, attention is ours, the GPU is one of the kernel's and rows are few. For after
    all that asks for plain Linears: MX transforms, loading.
    """
    device, rows = core.device, batch * core.cfg.tokens_per_frame
    if conf.linears == "auto":
        captured = conf.captures(device) and attention is AttentionKind.fused
        few = any(rows <= most and core.cfg.d_model <= width for most, width in WIDEST.items())
        wanted = captured and few and cuda_linear.unavailable(device) is None
    else:
        wanted = conf.linears == "packed"
    return pack(core) if wanted else 0


def pack(core: WorldModel, make: Callable[[nn.Linear], nn.Module] = PackedBF16Linear.from_linear) -> int:
    """Pack BF16 Linears of the blocks, in place; returns how many. A SiLU behind one goes into its kernel.

    ``make``: what gives the kernel's form of a Linear, a :class:`PackedLinear` or another module.
    """
    packed = 0
    for path, layer, spec, linear in list(core.linears()):
        if type(linear) is nn.Linear and linear.weight.dtype is torch.bfloat16:
            made = make(linear)
            core.set_submodule(path, made)
            packed += 1
            if spec.activation is None or not isinstance(made, PackedLinear):
                continue
            block = core.blocks[layer]
            if made.absorb(block.get_submodule(spec.activation)):
                block.set_submodule(spec.activation, nn.Identity())
    return packed


def unpack(core: WorldModel) -> WorldModel:
    """Undo :func:`pack`, bit for bit, in place."""
    for path, layer, spec, packed in list(core.linears()):
        if is_packed(packed):
            core.set_submodule(path, packed.plain())
            if packed.silu and spec.activation is not None:
                core.blocks[layer].set_submodule(spec.activation, nn.SiLU())
    return core


def is_packed(module: nn.Module) -> TypeGuard[PackedBF16Linear]:
    """Whether :func:`pack` made it."""
    return isinstance(module, PackedBF16Linear)
