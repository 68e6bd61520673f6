"""Instabilities of a rollout: NaN and Inf, black frames, frozen frames, structure that drops away.

Found after a rollout, outside all timed spans, and named by arm, clip and frame. The reference of the candidate is the
BF16 arm, that of BF16 the recording: what the reference does too is the clip's or the model's doing, not the arm's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from harness.measure.conf import StabilityConf
from harness.measure.pictures import Shown, pieces

NON_FINITE, BLACK, FROZEN, STRUCTURE = "non_finite", "black", "frozen", "structure"
START_FRAMES = 4
"""First frames of a clip whose mean gradient energy is the BF16 arm's own start."""
LUMA = (0.299, 0.587, 0.114)
"""Weights of R, G and B (ITU-R BT.601)."""


@dataclass(frozen=True)
class Incident:
    """One instability; ``frame`` 0 is the first generated one, ``layer`` is known for NaN and Inf alone.

    ``action``: what was done about it.
    """

    kind: str
    arm: str
    clip: str
    frame: int
    message: str
    layer: str | None = None
    action: str = "recorded"


class InstabilityError(RuntimeError):
    """An arm became unstable, and the run was not told to go on."""

    def __init__(self, incident: Incident) -> None:
        super().__init__(incident.message)
        self.incident = incident


def _change(frames: Tensor) -> Tensor:
    return (frames[1:] - frames[:-1]).abs().flatten(1).mean(1)


def _gradient_energy(frames: Tensor) -> Tensor:
    luma = torch.einsum("fchw,c->fhw", frames.float(), torch.tensor(LUMA))
    down, right = luma.diff(dim=1), luma.diff(dim=2)
    return down.square().flatten(1).mean(1) + right.square().flatten(1).mean(1)


def first_run(mask: Tensor, length: int) -> int | None:
    """Index at which the first ``length`` consecutive true values of ``mask [F]`` begin; ``None`` if there are none."""
    if length > len(mask):
        return None
    runs = mask.unfold(0, length, 1).all(1).nonzero()
    return int(runs[0]) if len(runs) else None


@dataclass(frozen=True)
class Signs:
    """What shows an instability, of the F frames of one clip, float32.

    Attributes:
        brightness: ``[F]``, the mean of each frame.
        change: ``[F - 1]``, mean absolute change of each frame from the one before.
        energy: ``[F]``, mean squared difference of neighbouring pixels' luma. Blur lowers it.
    """

    brightness: Tensor
    change: Tensor
    energy: Tensor

    @classmethod
    def of(cls, frames: Shown) -> Signs:
        """Of ``[F, 3, h, w]`` in [0, 1], read once: to read pictures takes as long as to look at them."""
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        for (piece,) in pieces(frames, before=1):
            new = piece[1:] if found else piece
            found.append((new.float().flatten(1).mean(1), _change(piece.float()), _gradient_energy(new)))
        return cls(*map(torch.cat, zip(*found, strict=True)))


def detect(
    shown: Signs, moving: Tensor, conf: StabilityConf, reference: Signs | None, same_model: bool
) -> list[tuple[str, int, str]]:
    """Black frames, frozen frames and dropped structure of one finite rollout.

    Args:
        shown: of its F frames.
        moving: bool ``[F]``, whether the player moves while the frame is produced.
        conf: the bounds.
        reference: of as many frames, that show which of this is not the arm's doing.
        same_model: whether ``reference`` is the same model in BF16. Then structure is held against the reference's,
            frame by frame; a recording is sharper than its model, so against one it is held against the clip's start.

    Returns:
        (kind, first frame, what was seen), at most one per kind.
    """
    found = []
    black = first_run(_black(shown, conf) & ~_black(reference, conf), 1)
    if black is not None:
        found.append((BLACK, black, f"black frames (mean below {conf.black_level})"))
    still = _frozen(shown, conf) & ~_frozen(reference, conf) & moving[1:]
    frozen = first_run(still, conf.frozen_frames)
    if frozen is not None:
        text = f"frozen frames ({conf.frozen_frames} in a row change by less than {conf.frozen_change} while moving)"
        found.append((FROZEN, frozen + 1, text))
    dropped = first_run(_dropped(shown, reference, conf, same_model), conf.structure_frames)
    if dropped is not None:
        against = "BF16's" if same_model else "its start's"
        text = f"dropped structure (gradient energy below {conf.structure_ratio} of {against} for "
        found.append((STRUCTURE, dropped, text + f"{conf.structure_frames} frames)"))
    return found


def _black(shown: Signs | None, conf: StabilityConf) -> Tensor:
    return torch.tensor(False) if shown is None else shown.brightness < conf.black_level


def _frozen(shown: Signs | None, conf: StabilityConf) -> Tensor:
    return torch.tensor(False) if shown is None else shown.change < conf.frozen_change


def _dropped(shown: Signs, reference: Signs | None, conf: StabilityConf, same_model: bool) -> Tensor:
    ours = shown.energy
    theirs = None if reference is None else reference.energy
    if same_model and theirs is not None:
        return ours < conf.structure_ratio * theirs
    lost = ours < conf.structure_ratio * ours[:START_FRAMES].mean()
    return lost if theirs is None else lost & (theirs >= conf.structure_ratio * theirs[:START_FRAMES].mean())


def finite_clips(values: Tensor) -> Tensor:
    """Which clips of ``values [B, C, h, w]``, latents or pictures, hold neither NaN nor Inf: bool ``[B]``."""
    return torch.isfinite(values).flatten(1).all(1)


@contextmanager
def watch_non_finite(model: nn.Module) -> Iterator[list[str]]:
    """Within the context, the first module of ``model`` that takes in or gives out NaN or Inf is noted in the list.

    A module that takes in what no module gave out names what lies before it: attention, the KV cache, a scale.
    Reads every output, so it waits for the device at every module.
    """
    found: list[str] = []

    def before(name: str) -> Callable[..., None]:
        return lambda module, inputs: _note(found, f"what enters {name}", inputs)

    def after(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: _note(found, name, output)

    hooks = []
    for name, module in model.named_modules():
        if name and not any(True for _ in module.children()):  # its parents would say the same later and less exactly
            hooks += [module.register_forward_pre_hook(before(name)), module.register_forward_hook(after(name))]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _note(found: list[str], name: str, value: Any) -> None:
    if not found and not _finite(value):
        found.append(name)


def _finite(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(torch.isfinite(value).all())
    return all(map(_finite, value)) if isinstance(value, tuple | list) else True
