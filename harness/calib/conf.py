"""What a user chooses about calibration. Standard library only: composing a config imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from harness.data import conf as data_conf
from harness.data.conf import DataConf


class CalibMethod(StrEnum):
    """Who chooses MX weights: ``none`` rounds to nearest, ``gptq`` makes up for its errors (docs/calibration.md)."""

    none = "none"
    gptq = "gptq"


@dataclass
class CalibConf:
    """Calibration of the candidate's MX weights. Fits an OmegaConf structured config.

    Attributes:
        method: see :class:`CalibMethod`.
        clips: what it learns from, as ``data`` says what is judged: source and paths, ``limit`` clips, ``start``, and
            ``future_frames`` frames rolled out after the window. Clips that are judged too are refused.
        damping: share of the inputs' mean power that is added to each input's: more trusts the statistics less.
        sweeps: passes over a weight after GPTQ in which every element is chosen again, all others as they are.
        folder: where results are kept and found again.
    """

    method: CalibMethod = CalibMethod.none
    clips: DataConf = field(default_factory=lambda: DataConf(limit=8, future_frames=16, seed=1))
    damping: float = 0.1
    sweeps: int = 2
    folder: str = "outputs/calibration"

    @property
    def enabled(self) -> bool:
        """Whether weights are calibrated."""
        return self.method != CalibMethod.none


def validate(conf: CalibConf) -> None:
    """Raise ``ValueError`` listing every field of ``conf`` with a value that is not allowed, and what is.

    Nothing is checked where nothing is calibrated.
    """
    if not conf.enabled:
        return
    problems = []
    if not 0 <= conf.damping < 1:
        problems.append(f"damping={conf.damping}: must be at least 0 and below 1 (0.1, say)")
    if conf.sweeps < 0:
        problems.append(f"sweeps={conf.sweeps}: must be at least 0")
    try:
        data_conf.validate(conf.clips)
    except ValueError as error:
        problems.append(f"clips: {str(error).removeprefix('data config: ')}")
    if problems:
        raise ValueError("calib config: " + "; ".join(problems))
