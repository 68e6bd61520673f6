"""How far an MX Linear is from the Linear it stands for, and how its blocks are used."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.formats.mx import BLOCK, SCALE_NAN, ElementFormat, MXBlocks, decode, encode
from harness.mx.linears.base import MXModule


def linear_error(linear: nn.Linear, mx: MXModule, x: Tensor) -> dict[str, Any]:
    """Error of ``mx`` on the BF16 input ``x`` [..., K] against ``linear`` (BF16 weight [N, K]) computed in float64.

    An activation that ``mx`` has absorbed is left out, so the figures are those of any other kernel. Returns the
    figures of ``error`` for the MX Linear; under ``bf16`` the same for ``linear`` itself, the error BF16 alone makes;
    under ``weight`` the ``block_stats`` of the MX weight, with the count of weights ``clipped`` beyond the largest
    element; and under ``activation``, for dynamic activations, the same of ``x``.
    """
    weight = linear.weight.detach()
    bias = None if linear.bias is None else linear.bias.detach().double()
    with torch.no_grad():
        reference = F.linear(x.double(), weight.double(), bias)
        result: dict[str, Any] = error(mx.linear(x), reference)
        result["bf16"] = error(linear(x), reference)
    blocks = mx.weight_blocks()
    result["weight"] = block_stats(blocks, mx.fmt.element) | {"clipped": clipped(weight, blocks, mx.fmt.element)}
    if (element := mx.fmt.activation_element) is not None:
        blocks = encode(x, element, mx.fmt.scale_mode)
        result["activation"] = block_stats(blocks, element) | {"clipped": clipped(x, blocks, element)}
    return result


def error(got: Tensor, reference: Tensor) -> dict[str, float]:
    """Mean absolute error ``mae``, largest ``max``, relative ``rel`` and ``sqnr_db``, in float64.

    rel = |got - reference| / |reference| in the Euclidean norm, sqnr_db = -20 log10(rel). A reference of zeros makes
    rel 0 when got is zero too, infinite otherwise.
    """
    difference = (got.double() - reference.double()).abs()
    noise, signal = difference.norm().item(), reference.double().norm().item()
    rel = noise / signal if signal else (math.inf if noise else 0.0)
    return {
        "mae": difference.mean().item(),
        "rel": rel,
        "max": difference.max().item(),
        "sqnr_db": -20 * math.log10(rel) if rel else math.inf,
    }


def block_stats(blocks: MXBlocks, fmt: ElementFormat) -> dict[str, float]:
    """How ``blocks`` use their format.

    ``saturated``: elements at the largest magnitude (rounded to it or clipped), and ``saturated_fraction`` of all;
    ``scale_min``, ``scale_mean``, ``scale_max``: scales as factors, over the blocks that are not NaN (nan if none is);
    ``nan_blocks``: blocks with a NaN scale.
    """
    elements = decode(MXBlocks(blocks.elements, torch.full_like(blocks.scales, 127)), fmt, torch.float32)
    saturated = int((elements.abs() == fmt.max).sum())
    scales = blocks.scales[blocks.scales != SCALE_NAN].view(torch.float8_e8m0fnu).double()
    spread = (scales.min(), scales.mean(), scales.max()) if scales.numel() else (torch.tensor(math.nan),) * 3
    return {
        "saturated": saturated,
        "saturated_fraction": saturated / elements.numel(),
        "scale_min": spread[0].item(),
        "scale_mean": spread[1].item(),
        "scale_max": spread[2].item(),
        "nan_blocks": blocks.scales.numel() - scales.numel(),
    }


def clipped(x: Tensor, blocks: MXBlocks, fmt: ElementFormat) -> int:
    """How many values of ``x`` [..., K] lie beyond the largest element times their block's scale."""
    limit = fmt.max * blocks.scales.view(torch.float8_e8m0fnu).double().unsqueeze(-1)
    return int((x.double().unflatten(-1, (-1, BLOCK)).abs() > limit).sum())
