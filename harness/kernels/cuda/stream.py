"""The residual stream between products that have its norms in their kernels (``mx_linear.cu``)."""

from typing import NamedTuple

from torch import Tensor


class Stream(NamedTuple):
    """The stream h of one frame's M rows, and what the product behind makes its modulated norm of.

    Attributes:
        total: h, BF16 [M, D].
        modulated: BF16 [65, D]: ``h * (1 + scale)``, M rows at most 64, and in the last row ``shift``.
        squares: float32 [M, parts], sums of squares of parts of each row of h.
    """

    total: Tensor
    modulated: Tensor
    squares: Tensor


class Modulating(NamedTuple):
    """BF16 vectors of one frame, D numbers each: the gate of what is added to the stream, scale and shift of the norm
    behind."""

    gate: Tensor
    scale: Tensor
    shift: Tensor
