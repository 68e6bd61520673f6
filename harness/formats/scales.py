"""How large a block is and how its scale is chosen. Without torch, so that configs can be composed quickly."""

from enum import StrEnum

BLOCK = 32
"""Values that share one scale."""


class ScaleMode(StrEnum):
    """How a block's scale is derived from amax, the largest magnitude in it. Names and results as in torchao.

    With emax the exponent of the largest element (E4M3 8, E5M2 15, E2M1 2) and max its value:

    * ``floor``: 2^(floor(log2 amax) - emax), the rule of the MX specification; amax may saturate.
    * ``rceil``: 2^ceil(log2(amax / max)), the smallest scale that never saturates; the rule of NVIDIA's cuBLAS.
    * ``ceil``: 2^(ceil(log2 amax) - emax); never saturates, up to one step coarser than ``rceil``.
    * ``even``: ``floor`` after rounding amax to the element's mantissa; saturates less than ``floor``.
    """

    floor = "floor"
    rceil = "rceil"
    ceil = "ceil"
    even = "even"
