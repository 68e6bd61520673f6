"""Second moments of what enters a Linear, gathered part by part."""

from __future__ import annotations

import torch
from torch import Tensor

from harness.calib.gptq import DOUBLE_INPUTS

CAUGHT_UP = 0.5
"""Share of what the residual stream lags behind that a target catches up with (docs/calibration.md: all of it is worse,
since a gate is another for every frame, and its mean stands for it)."""

FEW_ROWS = 4
"""Rows for each input up to which nothing is caught up with; with more, as much less as these are a share of them."""

ROWS_PER_INPUT = 128
"""Rows that are enough, for each input (docs/calibration.md tells what fewer cost the demo)."""


def every(rows: int, inputs: int) -> int:
    """Which of so many rows to count: every how manieth. Odd, so that it is not always the same tokens of a frame."""
    stride = max(1, rows // (ROWS_PER_INPUT * inputs))
    return stride - (stride % 2 == 0)


class Moments:
    """Moments of the inputs y that a candidate's Linear gets, and of how BF16's inputs x in their place differ.

    BF16 gives W x + b. What gives most nearly the same from y is the regression of it on y: about the means, since the
    bias takes care of those, it is the weight W (1 + cov(x - y, y) cov(y)⁻¹). So errors of the layers before are not
    only seen, they are answered (Li et al., GPTAQ, 2504.02692, without the regression's mean).

    What writes into the residual stream, through a gate g, can do more. The candidate's stream is behind BF16's by r
    when it gets there, and whatever of r shows in y can be caught up with: the least squares of g (W y + b) against
    g (W x + b) + r. With the mean of g^2 in place of g^2, the regression of g r / E[g^2] on y is added.

    Args:
        weight: W ``[N, K]``, BF16.
        bias: b ``[N]``, or None.
        stride: of the rows that it is given every ``stride``-th counts.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, stride: int = 1) -> None:
        self.weight, self.bias, self.stride, self.rows = weight, bias, stride, 0
        inputs, device = weight.shape[1], weight.device
        self._second = torch.zeros(inputs, inputs, device=device)
        self._cross = torch.zeros_like(weight, dtype=torch.float32)  # of W (x - y) with y
        self._sum_y = torch.zeros(inputs, device=device, dtype=torch.float64)
        self._sum_difference = torch.zeros_like(self._sum_y)
        self._lag_cross = torch.zeros_like(self._cross)  # of g r with y
        self._lag_sum = torch.zeros(len(weight), device=device, dtype=torch.float64)  # of g r
        self._gate_power = torch.zeros_like(self._lag_sum)

    def add(self, y: Tensor, x: Tensor, lag: tuple[Tensor, Tensor] | None = None) -> None:
        """Rows ``y, x [..., K]`` of the same places; ``lag``: their g and r ``[..., N]``."""
        y, x = (self._counted(z) for z in (y, x))
        difference = x - y
        self.rows += len(y)
        self._second.addmm_(y.T, y)
        self._cross.addmm_((difference @ self.weight.float().T).T, y)
        self._sum_y += y.sum(0, dtype=torch.float64)
        self._sum_difference += difference.sum(0, dtype=torch.float64)
        if lag is not None:
            gate, behind = (self._counted(z) for z in lag)
            missing = gate * behind
            self._lag_cross.addmm_(missing.T, y)
            self._lag_sum += missing.sum(0, dtype=torch.float64)
            self._gate_power += gate.square().sum(0, dtype=torch.float64)

    def _counted(self, rows: Tensor) -> Tensor:
        return rows.flatten(0, -2)[:: self.stride].float()

    @property
    def _catch_up(self) -> Tensor:
        """Factor of E[g r], float64 ``[N]``; 0 for what has no gate, or one that is shut.

        From few rows a regression learns by heart what they lag behind by, and layer after layer adds to it.
        """
        share = CAUGHT_UP * max(0.0, 1 - FEW_ROWS * len(self._second) / self.rows)
        return torch.where(self._gate_power > 0, share * self.rows / self._gate_power, 0)

    @property
    def mean(self) -> Tensor:
        """Mean of y, float64 ``[K]``; zeros where no bias could make up for it."""
        return self._sum_y / self.rows * (self.bias is not None)

    @property
    def mean_difference(self) -> Tensor:
        """Mean of x - y, float64 ``[K]``; likewise."""
        return self._sum_difference / self.rows * (self.bias is not None)

    def covariance(self) -> Tensor:
        """Covariance of y, ``[K, K]``: float64 up to 4096 inputs, else float32."""
        second = self._second.double() if len(self._second) <= DOUBLE_INPUTS else self._second
        mean = self.mean.to(second.dtype)
        return second / self.rows - torch.outer(mean, mean)

    def target(self, inverse: Tensor) -> Tensor:
        """The weight ``[N, K]`` that makes the most of y; ``inverse``: of the damped covariance."""
        cross = self._cross.to(inverse.dtype) / self.rows
        cross -= torch.outer(self.weight.double() @ self.mean_difference, self.mean).to(inverse.dtype)
        lag = self._lag_cross.double() / self.rows - torch.outer(self._lag_sum / self.rows, self.mean)
        cross += (self._catch_up[:, None] * lag).to(inverse.dtype)
        return self.weight.to(inverse.dtype) + cross @ inverse

    def fitted_bias(self, weight: Tensor) -> Tensor | None:
        """The bias with which ``weight [N, K]`` has the target's mean, in the dtype of b; None without b."""
        if self.bias is None:
            return None
        lost = (self.weight.double() - weight.double()) @ self.mean
        moved = self.weight.double() @ self.mean_difference + self._catch_up * self._lag_sum / self.rows
        return (self.bias.double() + lost + moved).to(self.bias.dtype)
