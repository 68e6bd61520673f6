"""What a player does during one frame."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Action:
    """What is held while one frame is produced.

    ``buttons``: names, as in ``Engine.button_names``. ``mouse``: (dx, dy) in the unit of the model's clips; the demo's
    are degrees of turn.
    """

    buttons: tuple[str, ...] = ()
    mouse: tuple[float, float] = (0.0, 0.0)

    def rows(self, names: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Mouse float32 ``[2]`` and buttons float32 ``[K]`` of 0 and 1.

        Raises:
            ValueError: for a button that the model does not have, or a mouse that is not two finite numbers.
        """
        unknown = sorted(set(self.buttons) - set(names))
        if unknown:
            raise ValueError(f"buttons {', '.join(unknown)}: the model has {', '.join(names)}")
        if len(self.mouse) != 2 or not all(math.isfinite(moved) for moved in self.mouse):
            raise ValueError(f"mouse={self.mouse}: give two finite numbers")
        return torch.tensor(self.mouse, dtype=torch.float32), torch.tensor([float(n in self.buttons) for n in names])

    @classmethod
    def of_rows(cls, mouse: Tensor, btn: Tensor, names: Sequence[str]) -> Action:
        """The action of a clip's rows, ``mouse [2]`` and ``btn [K]``."""
        held = tuple(name for name, value in zip(names, btn.tolist(), strict=True) if value)
        dx, dy = mouse.tolist()
        return cls(held, (dx, dy))
