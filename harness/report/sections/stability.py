"""What went wrong, and what was done about it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class IncidentRecord:
    """What went wrong; of an instability also where, and what was done about it."""

    kind: str
    message: str
    arm: str | None = None
    clip: str | None = None
    frame: int | None = None
    layer: str | None = None
    action: str | None = None


@dataclass
class FallbackRecord:
    """Formats that the candidate was rebuilt in, and the clip and frame that made it necessary."""

    step: str
    clip: str
    frame: int
    quant: dict[str, Any] = field(default_factory=dict)
    kv: dict[str, Any] = field(default_factory=dict)
