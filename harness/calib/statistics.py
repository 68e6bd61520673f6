"""Second moments of what enters a Linear, gathered part by part."""

from __future__ import annotations

import torch
from torch import Tensor

from harness.calib.gptq import DOUBLE_INPUTS

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

    def add(self, y: Tensor, x: Tensor) -> None:
        """Rows ``y, x [..., K]`` of the same places."""
        y, x = (z.flatten(0, -2)[:: self.stride].float() for z in (y, x))
        difference = x - y
        self.rows += len(y)
        self._second.addmm_(y.T, y)
        self._cross.addmm_((difference @ self.weight.float().T).T, y)
        self._sum_y += y.sum(0, dtype=torch.float64)
        self._sum_difference += difference.sum(0, dtype=torch.float64)

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
        """The weight ``[N, K]`` that makes most nearly W x of y; ``inverse``: of the damped covariance."""
        cross = self._cross.to(inverse.dtype) / self.rows
        cross -= torch.outer(self.weight.double() @ self.mean_difference, self.mean).to(inverse.dtype)
        return self.weight.to(inverse.dtype) + cross @ inverse

    def fitted_bias(self, weight: Tensor) -> Tensor | None:
        """The bias with which ``weight [N, K]`` has the mean of BF16's outputs, in the dtype of b; None without b."""
        if self.bias is None:
            return None
        lost = (self.weight.double() - weight.double()) @ self.mean
        return (self.bias.double() + lost + self.weight.double() @ self.mean_difference).to(self.bias.dtype)
