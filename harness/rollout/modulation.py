"""The conditioning vectors of all layers as few big products.

A frame's conditioning is one row per clip and step, so each of a block's modulation Linears only streams its weight,
and dozens of small products leave the memory idle between them. Linears that can be stacked become one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.models import bf16
from harness.models.world import FrameModulation, WorldModel

Product = Callable[[Tensor], Tensor]


@runtime_checkable
class Stackable(Protocol):
    """A Linear of another kind that can be stacked with its like."""

    def stacked(self, others: Sequence[nn.Module]) -> Product | None:
        """One product whose output is that of this Linear, then those of ``others``; None if they do not fit."""
        ...


class PlainProduct:
    """``x @ weight.T + bias``, of ``weight [N, K]`` and ``bias [N]`` or None."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        """Map ``[..., K]`` to ``[..., N]``."""
        return bf16.linear(x, self.weight, self.bias)


def stack_plain(linears: Sequence[nn.Linear]) -> PlainProduct:
    """One product for Linears of equal ``in_features``; their weights become views of its weight, so none is doubled.

    Called again on Linears whose weights are such views already, it reuses them.
    """
    weights = [linear.weight for linear in linears]
    adjacent = all(
        a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr() and a.data_ptr() + a.nbytes == b.data_ptr()
        for a, b in pairwise(weights)
    )
    rows = [weight.shape[0] for weight in weights]
    with torch.no_grad(), torch.inference_mode(False):
        if not adjacent:
            joined = torch.cat([weight.detach() for weight in weights])
            for weight, view in zip(weights, joined.split(rows), strict=True):
                weight.data = view
        stacked = weights[0].detach().as_strided((sum(rows), weights[0].shape[1]), (weights[0].shape[1], 1))
        bias = None if linears[0].bias is None else torch.cat([linear.bias.detach() for linear in linears])
    return PlainProduct(stacked, bias)


def _like(linear: nn.Module) -> tuple[object, ...]:
    """Linears that may be stacked have the same of this."""
    if bf16.is_plain(linear):
        return nn.Linear, linear.in_features, linear.weight.dtype, linear.bias is None
    return type(linear), getattr(linear, "in_features", None), getattr(linear, "bias", None) is None


def _product(linears: list[nn.Module]) -> Product | None:
    if all(bf16.is_plain(linear) for linear in linears):
        return stack_plain(linears)  # type: ignore[arg-type]
    first = linears[0]
    return first.stacked(linears[1:]) if isinstance(first, Stackable) else None


class StackedLinears:
    """Linears that read the same input, evaluated together; those that cannot be stacked run one by one.

    Args:
        linears: of any kinds, each ``[..., K] -> [..., out_features]``.
    """

    def __init__(self, linears: Sequence[nn.Module]) -> None:
        alike: dict[tuple[object, ...], list[int]] = {}
        for index, linear in enumerate(linears):
            alike.setdefault(_like(linear), []).append(index)
        self.count = len(linears)
        self.products: list[tuple[Product, list[int], list[int]]] = []
        """Each product, the Linears it stands for, and their output sizes."""
        for members in alike.values():
            product = _product([linears[i] for i in members])
            if product is None:
                self.products += [(linears[i], [i], [self._width(linears[i])]) for i in members]
            else:
                self.products.append((product, members, [self._width(linears[i]) for i in members]))

    @staticmethod
    def _width(linear: nn.Module) -> int:
        width = linear.out_features
        assert isinstance(width, int)
        return width

    def __call__(self, x: Tensor) -> list[Tensor]:
        """The Linears' outputs for ``x [..., K]``, in their order."""
        results: dict[int, Tensor] = {}
        for product, members, widths in self.products:
            results.update(zip(members, product(x).split(widths, dim=-1), strict=True))
        return [results[i] for i in range(self.count)]


class StackedModulation:
    """:meth:`WorldModel.modulation` with all layers' Linears stacked.

    Args:
        core: the model, in its final formats and on its device; plain weights become views of stacked ones.
    """

    def __init__(self, core: WorldModel) -> None:
        self.core, self.linears = core, StackedLinears(core.modulation_linears())

    def __call__(self, cond: Tensor) -> FrameModulation:
        """Every block's and the output's conditioning vectors from ``cond [B, N, D]``."""
        return self.core.modulation_of(self.linears(F.silu(cond)))
