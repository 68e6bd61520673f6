"""The residual stream between products that have its norms in their kernels (``mx_linear.cu``)."""

import ctypes
from typing import NamedTuple, Self

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


class Squares(ctypes.Structure):
    """``Squares`` of ``mx_product.cuh``: what a product makes the norm in front of it of."""

    _fields_ = (("of", ctypes.c_void_p), ("parts", ctypes.c_int), ("width", ctypes.c_float), ("eps", ctypes.c_float))

    @classmethod
    def of_stream(cls, stream: Stream, eps: float) -> Self:
        """Those of ``stream``; the norm adds ``eps`` to the mean of squares."""
        return cls(stream.squares.data_ptr(), stream.squares.shape[1], 1 / stream.total.shape[1], eps)
