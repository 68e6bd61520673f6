"""What was rolled out: the model, and the clips."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Model:
    """What was rolled out, and the decoder of both arms. ``weights``: ``checkpoint`` or ``random``."""

    parameters: int
    weights: str
    checkpoint: str | None = None
    arch: dict[str, Any] = field(default_factory=dict)
    decoder_weights: str = "random"
    decoder_checkpoint: str | None = None
    decoder_arch: dict[str, Any] = field(default_factory=dict)
    decoder_cold_start_s: float | None = None
    decoder_groups: dict[str, int] = field(default_factory=dict)
    decoder_dtype: str | None = None
    vae_scale: float | None = None


@dataclass
class ClipName:
    """A clip that was asked for; ``tag`` is ``motion`` or ``stand_still``."""

    id: str
    tag: str


@dataclass
class Data:
    """Which clips, and what rollouts are compared with. ``summary``: the same in a sentence.

    ``available``: clips there are of the tag that was asked for.
    """

    name: str
    summary: str
    source: str | None = None
    reference: str | None = None
    quality_is_meaningful: bool = True
    clips: list[ClipName] = field(default_factory=list)
    start: int = 0
    context_frames: int | None = None
    future_frames: int | None = None
    available: int | None = None
