"""When a frame of a rollout counts as unstable, and what follows. Without torch, see ``harness/config/schema.py``."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

RUN_ENDED = "run ended"
"""The ``action`` of an incident that broke its run off."""

OnInstability = StrEnum("OnInstability", ["raise", "fallback", "record"])
"""What an instability of the candidate does: end the run, rebuild the candidate in safer formats, or be written down.

One of the BF16 arm is written down; NaN and Inf there always end the run, since nothing safer is left.
"""


@dataclass
class StabilityConf:
    """When a frame counts as unstable. Fits an OmegaConf structured config.

    Attributes:
        black_level: a frame is black if its mean, in [0, 1], is below.
        frozen_change: a frame is frozen if its mean absolute change from the one before, in [0, 1], is below
            although the player moves. frozen_frames: so many in a row are an incident.
        structure_ratio: a frame has lost its structure if its gradient energy is below this times the reference's.
            structure_frames: so many in a row are an incident.
        incident_log: text file to which each run appends what it ran on, its figures and its incidents; null = none.
    """

    black_level: float = 0.02
    frozen_change: float = 1e-4
    frozen_frames: int = 16
    structure_ratio: float = 0.25
    structure_frames: int = 8
    incident_log: str | None = None


def validate(conf: StabilityConf) -> None:
    """Raise ``ValueError`` naming every field of ``conf`` that is out of range."""
    problems = [
        f"{name}={getattr(conf, name)}: must lie between 0 and 1"
        for name in ("black_level", "frozen_change", "structure_ratio")
        if not 0 <= getattr(conf, name) <= 1
    ]
    problems += [
        f"{name}={getattr(conf, name)}: must be at least 1"
        for name in ("frozen_frames", "structure_frames")
        if getattr(conf, name) < 1
    ]
    if problems:
        raise ValueError("stability config: " + "; ".join(problems))
