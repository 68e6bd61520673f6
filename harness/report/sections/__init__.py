"""The sections of a run record, as types: what :mod:`harness.report.record` writes and reads back.

Times are milliseconds, sizes bytes, PSNR dB; ``None`` where something was not measured. ``docs/record.md`` explains
every field.
"""

from harness.report.sections.arm import ArmRecord
from harness.report.sections.environment import Environment, Git, Gpu
from harness.report.sections.formats import Calibration, NumericPath, Transform
from harness.report.sections.inputs import ClipName, Data, Model
from harness.report.sections.memory import Memory
from harness.report.sections.numerics import (
    BlockUse,
    CategoryNumerics,
    KVStored,
    LinearError,
    LinearNumerics,
    NonFiniteStored,
    Numerics,
    RingStored,
    ScaleSeries,
)
from harness.report.sections.quality import (
    ClipRecord,
    ClipScores,
    Curve,
    Drift,
    MeanScores,
    Quality,
    QualitySection,
    Scores,
    StandStill,
)
from harness.report.sections.speed import (
    PARTS,
    BatchTimes,
    Compilation,
    FramesFrom,
    FrameTimes,
    Overlapped,
    Parts,
    Speed,
    timed,
)
from harness.report.sections.stability import FallbackRecord, IncidentRecord

__all__ = [
    "PARTS",
    "ArmRecord",
    "BatchTimes",
    "BlockUse",
    "Calibration",
    "CategoryNumerics",
    "ClipName",
    "ClipRecord",
    "ClipScores",
    "Compilation",
    "Curve",
    "Data",
    "Drift",
    "Environment",
    "FallbackRecord",
    "FrameTimes",
    "FramesFrom",
    "Git",
    "Gpu",
    "IncidentRecord",
    "KVStored",
    "LinearError",
    "LinearNumerics",
    "MeanScores",
    "Memory",
    "Model",
    "NonFiniteStored",
    "NumericPath",
    "Numerics",
    "Overlapped",
    "Parts",
    "Quality",
    "QualitySection",
    "RingStored",
    "ScaleSeries",
    "Scores",
    "Speed",
    "StandStill",
    "Transform",
    "timed",
]
