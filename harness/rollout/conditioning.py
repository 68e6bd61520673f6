"""A frame's conditioning by our kernels: few rows, whose products only stream their weights.

Host side of ``harness.kernels.triton.controls``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from harness.kernels import launch
from harness.models.embeddings import MouseEmbedding
from harness.models.gamerft import GameRFTCore
from harness.models.world import WorldModel

MOST_CLIPS = 4
"""Clips whose controls are embedded so; of more, a library's products are faster than rows one after the other."""

HIDDEN_BLOCK, OUTPUT_BLOCK = 16, 4
"""Outputs of a program: what it has of the weights fits its registers."""

Activated = Callable[[Tensor, Tensor], Tensor]
"""``activated(mouse [B, 2], btn [B, n_buttons])``: SiLU of the conditioning ``[B, N, D]`` of all N steps of a frame."""


def fused_conditioning(core: WorldModel, times: Tensor) -> Activated | None:
    """Conditioning of frames whose steps' embedded times are ``times [B, N, D]``; None where the kernels do not fit.

    They are for the control embedding of a :class:`GameRFTCore` as it stands in a checkpoint, in one dtype, with sizes
    that are whole blocks, and for few clips.
    """
    if not isinstance(core, GameRFTCore) or core.cfg.uncond or len(times) > MOST_CLIPS:
        return None
    mouse, button = core.control_embed.mouse, core.control_embed.button.proj
    linears = (mouse.angle_proj, mouse.mlp.fc1, mouse.mlp.fc2, button.fc1, button.fc2)
    plain = all(type(linear) is nn.Linear and linear.weight.dtype is times.dtype for linear in linears)
    hidden, width = mouse.mlp.fc1.out_features, mouse.mlp.fc2.out_features
    if not plain or hidden % HIDDEN_BLOCK or width % OUTPUT_BLOCK or button.fc1.out_features != hidden:
        return None
    times = times.contiguous()

    def activated(directions: Tensor, pressed: Tensor) -> Tensor:
        first = mouse_features(mouse, directions), (2 * pressed.float() - 1).to(times.dtype)
        middle = _hidden(*first, mouse.mlp.fc1.weight, mouse.mlp.fc1.bias, button.fc1.weight, button.fc1.bias)
        return _conditioning(
            middle, mouse.mlp.fc2.weight, mouse.mlp.fc2.bias, button.fc2.weight, button.fc2.bias, times
        )

    return activated


def mouse_features(embedding: MouseEmbedding, mouse: Tensor) -> Tensor:
    """What the MLP of a mouse embedding reads, ``[B, 512]``, of ``mouse [B, 2]``; a compiler makes one kernel of it."""
    weight = embedding.angle_proj.weight

    def projected(pair: Tensor) -> Tensor:
        pair = pair.float()
        return (pair[..., :1] * weight[:, 0].float() + pair[..., 1:] * weight[:, 1].float()).to(weight.dtype)

    return embedding.features(mouse, projected)


def _span(width: int) -> int:
    return 1 << (width - 1).bit_length()


def _options(dependent: bool) -> dict[str, int | bool]:
    return {"num_warps": 4, **({"launch_pdl": True} if dependent else {})}


@torch.library.custom_op("harness_mx::controls_hidden", mutates_args=())
def _hidden(
    mouse: Tensor,
    button: Tensor,
    mouse_weight: Tensor,
    mouse_bias: Tensor,
    button_weight: Tensor,
    button_bias: Tensor,
) -> Tensor:
    """``[2, B, hidden]``: SiLU of the first Linear of the mouse's and of the buttons' MLP."""
    from harness.kernels.triton.controls import hidden_kernel

    (rows, features), buttons, hidden = mouse.shape, button.shape[1], mouse_weight.shape[0]
    out = mouse.new_empty(2, rows, hidden)
    dependent = launch.dependent(mouse.device)
    hidden_kernel[2 * hidden // HIDDEN_BLOCK,](
        mouse.contiguous(), button.contiguous(), mouse_weight, mouse_bias, button_weight, button_bias, out,
        rows, features, _span(features), buttons, _span(buttons), hidden, HIDDEN_BLOCK, dependent,
        **_options(dependent),
    )  # fmt: skip
    return out


@_hidden.register_fake
def _(mouse: Tensor, button: Tensor, mouse_weight: Tensor, *_: Tensor) -> Tensor:
    return mouse.new_empty(2, mouse.shape[0], mouse_weight.shape[0])


@torch.library.custom_op("harness_mx::controls_conditioning", mutates_args=())
def _conditioning(
    hidden: Tensor,
    mouse_weight: Tensor,
    mouse_bias: Tensor,
    button_weight: Tensor,
    button_bias: Tensor,
    times: Tensor,
) -> Tensor:
    """``[B, N, D]``: SiLU of ``times`` plus what both MLPs give from ``hidden [2, B, hidden]``."""
    from harness.kernels.triton.controls import conditioning_kernel

    (rows, steps, width), size = times.shape, hidden.shape[2]
    out = torch.empty_like(times)
    dependent = launch.dependent(times.device)
    conditioning_kernel[width // OUTPUT_BLOCK,](
        hidden, mouse_weight, mouse_bias, button_weight, button_bias, times, out,
        rows, steps, size, _span(size), width, OUTPUT_BLOCK, dependent,
        **_options(dependent),
    )  # fmt: skip
    return out


@_conditioning.register_fake
def _(hidden: Tensor, mouse_weight: Tensor, *others: Tensor) -> Tensor:
    return torch.empty_like(others[-1])
