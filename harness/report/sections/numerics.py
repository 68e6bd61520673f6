"""What quantisation did to Linears, and what the KV cache stored."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class ScaleSeries:
    """What a ring stored, frame by frame, beside the frames of :class:`KVStored`."""

    saturated_share: list[float]
    log2_scale_min: list[float | None]
    log2_scale_mean: list[float | None]
    log2_scale_max: list[float | None]


@dataclass
class RingStored:
    """K or V of one layer, as stored in its format over all sampled frames."""

    layer: int
    tensor: str
    format: str
    elements: int
    saturated: int
    saturated_share: float
    nonfinite: int
    log2_scale_min: float | None = None
    log2_scale_mean: float | None = None
    log2_scale_max: float | None = None
    over_time: ScaleSeries | None = None


@dataclass
class NonFiniteStored:
    """NaN or Inf in a ring."""

    frame: int
    layer: int
    tensor: str
    count: int


@dataclass
class KVStored:
    """What the KV cache stored; ``layers`` has an entry per quantised ring, ``nonfinite`` the first of all rings."""

    frames: list[int]
    layers: list[RingStored]
    nonfinite: list[NonFiniteStored]


@dataclass
class LinearError:
    """Of an output against float64; see :func:`harness.mx.numerics.error`."""

    mae: float | None
    rel: float | None
    max: float | None
    sqnr_db: float | None


@dataclass
class BlockUse:
    """How MX blocks use their format; see :func:`harness.mx.numerics.block_stats`. ``clipped``: values beyond it."""

    saturated: int
    saturated_fraction: float
    scale_min: float | None
    scale_mean: float | None
    scale_max: float | None
    nan_blocks: int
    clipped: int


@dataclass
class LinearNumerics(LinearError):
    """Error of one MX Linear on sampled inputs; see :func:`harness.ab.numerics.layer_numerics`."""

    category: str
    rows: int
    in_features: int
    out_features: int
    bf16: LinearError
    weight: BlockUse
    activation: BlockUse | None = None


@dataclass
class CategoryNumerics:
    """Mean and largest relative error of a category's Linears."""

    layers: int
    rel_mean: float | None
    rel_max: float | None


@dataclass
class Numerics:
    """Error of every MX Linear; ``worst`` names the one with the largest ``rel``."""

    method: str
    clip: str
    layers: dict[str, LinearNumerics]
    categories: dict[str, CategoryNumerics]
    worst: str
