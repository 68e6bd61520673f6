"""Muon over stacks of equal matrices: what ``torch.optim.Muon`` computes, in far fewer kernel launches."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration of Jordan et al., "Muon" (2024)."""


def orthogonalised(update: Tensor, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrices, roughly, of ``update [n, rows, cols]``, in BF16."""
    a, b, c = NEWTON_SCHULZ
    x = update.bfloat16()
    wide = x.shape[1] > x.shape[2]
    if wide:
        x = x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if wide else x


class StackedMuon(Optimizer):
    """Muon with Nesterov momentum, decoupled weight decay and updates of AdamW's size, 0.2·√(larger side)·lr.

    A small model has many small matrices of few shapes; one by one they leave a GPU waiting: on an H100 the
    `flow` stage went from 9.3 to 16.2 steps a second with this.

    Args:
        params: matrices.
        lr: learning rate.
        momentum: of the gradient's average.
        weight_decay: times ``lr``.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.01) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update of every matrix that has a gradient."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            for shape, same in shapes.items():
                grad = torch.stack([p.grad for p in same]).float()  # type: ignore[misc]
                state = self.state[same[0]]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(grad)
                average = state["momentum"].lerp_(grad, 1 - group["momentum"])
                update = orthogonalised(grad.lerp(average, group["momentum"]))
                size = group["lr"] * 0.2 * max(shape) ** 0.5
                torch._foreach_mul_(same, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(same, list(update.to(same[0].dtype).unbind(0)), alpha=-size)
