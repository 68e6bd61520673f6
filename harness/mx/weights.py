"""Where the weights of MX Linears come from: the one place in which an ``nn.Linear`` becomes MX blocks.

Kernels are built from an ``MXWeight`` and do not ask who chose its blocks. ``NearestRounding`` encodes the Linear as it
is; a calibration chooses better blocks, a file brings those of an earlier run. Each is a ``WeightSource``, given to
``harness.mx.transform.apply_mx``.
"""

from typing import Protocol

from torch import nn

from harness.formats.mx import encode
from harness.mx.linears.base import LinearFormat, MXWeight


class WeightSource(Protocol):
    """Chooses the blocks and the bias of every MX Linear. ``name`` is the Linear's in the model.

    ``chosen_by``: what chooses them, in a word, for labels; empty for rounding to nearest.
    """

    @property
    def chosen_by(self) -> str: ...  # noqa: D102

    def unsuitable(self, name: str, linear: nn.Linear, fmt: LinearFormat) -> str | None:
        """Why it has no weight in ``fmt`` for ``linear``, or None; asked of every Linear before the first is replaced.

        ``linear`` may be on the meta device: before the model is loaded, or because a file brings its weight.
        """
        ...

    def weight(self, name: str, linear: nn.Linear, fmt: LinearFormat) -> MXWeight:
        """Blocks, bias and format of the module that takes the place of ``linear``, on the device it will run on.

        ``fmt`` is what the config asks for. Called once a Linear, in model order, each just before its module is built,
        with those before it already in place. So a file need hold no more than one at a time.
        """
        ...


class NearestRounding:
    """Every value to the nearest element under its block's scale (``formats.mx.encode``), the bias as it is."""

    chosen_by = ""

    def unsuitable(self, name: str, linear: nn.Linear, fmt: LinearFormat) -> str | None:
        """See ``WeightSource``."""
        if not linear.weight.is_meta and not linear.weight.isfinite().all():
            return "its weight holds NaN or infinity"
        return None

    def weight(self, name: str, linear: nn.Linear, fmt: LinearFormat) -> MXWeight:
        """See ``WeightSource``."""
        return nearest(linear, fmt)


def nearest(linear: nn.Linear, fmt: LinearFormat) -> MXWeight:
    """A BF16 ``linear`` [N, K] rounded to the nearest in ``fmt``. Raises ValueError when K is not a multiple of 32."""
    bias = None if linear.bias is None else linear.bias.detach().clone()
    return MXWeight(encode(linear.weight.detach(), fmt.element, fmt.scale_mode), bias, fmt)
