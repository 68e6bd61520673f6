"""The sections of a run record, as types: what :mod:`harness.report.record` writes and reads back.

Times are milliseconds, sizes bytes, PSNR dB; ``None`` where something was not measured. ``docs/record.md`` explains
every field.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from harness.measure.figures import Appearance, FrameScores, Stats

PARTS = ("attention", "mlp", "modulation", "kv_get", "kv_update", "other")
"""Parts of a frame in the instrumented pass; ``other`` is what remains of the frame."""


@dataclass
class Gpu:
    """One GPU, as its driver describes it."""

    name: str
    count: int
    compute_capability: str
    memory_bytes: int
    driver: str | None = None


@dataclass
class Git:
    """The checkout that ran; both ``None`` where there is none."""

    commit: str | None = None
    dirty: bool | None = None


@dataclass
class Environment:
    """Where a run ran. ``packages``: version by name, ``None`` for one that is absent."""

    device: str = "cpu"
    gpu: Gpu | None = None
    cuda: str | None = None
    cpu: str | None = None
    cpu_count: int | None = None
    torch_threads: int | None = None
    platform: str = ""
    python: str = ""
    packages: dict[str, str | None] = field(default_factory=dict)
    git: Git = field(default_factory=Git)
    processes: int = 1


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


@dataclass
class NumericPath:
    """The formats and kernels that really ran, in words."""

    linears: str
    kv: str
    attention: str
    architecture: str
    emulated: bool


@dataclass
class Transform:
    """Which Linears were replaced and by what; see :class:`harness.mx.transform.TransformSummary`."""

    count: int
    enabled: bool = True
    numeric_path: str = ""
    architecture: str = ""
    bits: int = 16
    element: str = "bf16"
    scale_mode: str | None = None
    activation: str = "bf16"
    scope: str | None = None
    late_layers: int | None = None
    kernel: str = "torch"
    kernel_asked: str = "torch"
    emulated: bool = False
    categories: dict[str, int] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    kept_bf16: dict[str, str] = field(default_factory=dict)
    other_kernels: dict[str, str] = field(default_factory=dict)
    fused_activations: dict[str, str] = field(default_factory=dict)
    weight_bytes_before: int = 0
    weight_bytes_after: int = 0
    bits_by_category: dict[str, int] = field(default_factory=dict)


@dataclass
class Overlapped:
    """Throughput with each frame decoded while the next is denoised: of all clips together, ``frames`` frames each."""

    fps: float
    frames: int
    same_pixels: bool


@dataclass
class Speed:
    """Per frame, around synchronised work; the first frames of each clip and compilation left out.

    ``pipeline_fps`` is the DiT alone, ``total_fps`` with decoding, both from medians.
    """

    pipeline_fps: float | None
    total_fps: float | None
    dit_ms: Stats | None
    decoder_ms: Stats | None
    total_ms: Stats | None
    prefill_ms: Stats | None = None
    batch: int = 1
    skipped_frames_per_clip: int = 0
    overlapped: Overlapped | None = None


@dataclass
class Parts:
    """A frame split into its :data:`PARTS`, by a separate instrumented pass."""

    method: str
    frames: int
    ms: dict[str, Stats]


@dataclass
class Memory:
    """Bytes of weights and KV window, and the allocator's figures; ``None`` where a device keeps no such account.

    ``peaks``: of each batch, ``peak_allocated``, ``peak_reserved`` and ``transient``.
    """

    weight_bytes: int
    kv_window_bytes: int
    kv_window_bytes_computed: int | None = None
    kv_window_bytes_unquantised: int | None = None
    kv_bytes_by_format: dict[str, int] = field(default_factory=dict)
    kv_scratch_bytes: int = 0
    kv_peak_bytes: int | None = None
    kv_dequantised_bytes_per_step: int | None = None
    cache_and_graph_allocated: int | None = None
    peak_allocated: int | None = None
    peak_reserved: int | None = None
    transient: int | None = None
    process_peak_rss: int | None = None
    peaks: list[dict[str, int]] = field(default_factory=list)


@dataclass
class Compilation:
    """Set-up times and counters of compilation."""

    enabled: bool
    mode: str
    cuda_graph: bool
    cold_start_s: float | None
    scope: str | None = None
    packed_linears: int = 0
    graphs: int = 0
    graph_breaks: int = 0
    recompiles_after_warmup: int = 0


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


@dataclass
class Calibration:
    """How the weights of MX Linears were chosen; see ``docs/calibration.md``.

    ``peak_bytes``: the allocator's peak on a GPU, the process's resident peak on a CPU. ``found``: made by an earlier
    run, and kept; ``seconds`` and ``peak_bytes`` are then of that one.
    """

    method: str
    clips: list[str]
    frames: int
    seconds: float
    peak_bytes: int
    device: str
    linears: int
    fingerprint: str
    found: bool


@dataclass
class ArmRecord:
    """One arm (``bf16`` or ``candidate``).

    ``label``: what a person calls it, such as ``mxfp8_all + mx_v_only``. ``speed_is_meaningful``: false where a kernel
    is emulated: its times say nothing about the format. ``transform``: ``None`` where no Linear was meant to be MX.
    ``parts``, ``kv_stats``, ``numerics``: ``None`` if not asked for. ``calibration``: ``None`` where weights were
    rounded to nearest. ``weights_sha256``: of all weights in their formats, by which an export is known to be what was
    judged; ``None`` without MX Linears.
    """

    label: str
    numeric_path: NumericPath
    speed_is_meaningful: bool
    transform: Transform | None
    speed: Speed
    parts: Parts | None
    memory: Memory
    compile: Compilation
    kv_stats: KVStored | None = None
    numerics: Numerics | None = None
    calibration: Calibration | None = None
    weights_sha256: str | None = None


@dataclass
class FrameTimes:
    """Milliseconds of one arm's frames of a batch, in order, none left out."""

    dit_ms: list[float]
    decoder_ms: list[float]
    prefill_ms: float | None = None


@dataclass
class BatchTimes:
    """Both arms' times of one batch of clips, frame by frame: frame i of one arm and of the other are a pair.

    ``order``: in which the arms were rolled out. An arm that broke off has fewer frames. ``fallback``: in force.
    """

    clips: list[str]
    order: list[str]
    arms: dict[str, FrameTimes]
    fallback: str | None = None


@dataclass
class Scores:
    """PSNR and SSIM: a clip's, or a difference of two."""

    psnr: float
    ssim: float


@dataclass
class ClipScores:
    """A clip's scores: means over its frames, and the ``frames``."""

    psnr: float
    ssim: float
    frames: FrameScores

    @classmethod
    def of(cls, frames: FrameScores) -> ClipScores:
        """The scores of these frames."""
        return cls(frames.mean("psnr"), frames.mean("ssim"), frames)


@dataclass
class ClipRecord:
    """One finished clip.

    ``scores``: ``bf16`` and ``candidate`` against the recording, ``fidelity`` of the candidate against BF16; what has
    no reference is left out. ``drop``: BF16 minus candidate, ``None`` unless both were scored. ``change``: mean change
    from frame to frame, in [0, 1], of the recording and each arm. ``fallback``: in force when it was rolled. ``video``:
    path relative to the run's folder. ``appearance``: of ``bf16`` and ``candidate``, and ``drop``, what the candidate
    loses (positive = worse); empty without a recording.
    """

    clip_id: str
    tag: str
    scores: dict[str, ClipScores] = field(default_factory=dict)
    drop: Scores | None = None
    change: dict[str, list[float]] = field(default_factory=dict)
    fallback: str | None = None
    video: str | None = None
    appearance: dict[str, Appearance] = field(default_factory=dict)

    @classmethod
    def of(cls, clip_id: str, tag: str, scores: dict[str, FrameScores], **more: Any) -> ClipRecord:
        """A clip from the scores of its frames."""
        found = {name: ClipScores.of(frames) for name, frames in scores.items()}
        drop = None
        if {"bf16", "candidate"} <= found.keys():
            bf16, candidate = found["bf16"], found["candidate"]
            drop = Scores(bf16.psnr - candidate.psnr, bf16.ssim - candidate.ssim)
        return cls(clip_id, tag, found, drop, **more)


@dataclass
class Curve:
    """A value per generated frame of each metric."""

    psnr: list[float]
    ssim: list[float]


@dataclass
class MeanScores:
    """Means over clips, and frame by frame."""

    psnr: float
    ssim: float
    curve: Curve | None = None


@dataclass
class QualitySection:
    """Means over ``clips`` clips; ``None`` for what has no reference. ``appearance``: as in :class:`ClipRecord`."""

    clips: int
    bf16: MeanScores | None = None
    candidate: MeanScores | None = None
    fidelity: MeanScores | None = None
    drop: Scores | None = None
    appearance: dict[str, Appearance] = field(default_factory=dict)


@dataclass
class Quality:
    """Over all clips, and over those of each tag."""

    all: QualitySection
    by_tag: dict[str, QualitySection] = field(default_factory=dict)


@dataclass
class StandStill:
    """Mean change from frame to frame of the recording and each arm while the player stands still."""

    clips: int
    change: dict[str, float]


@dataclass
class Drift:
    """How long rollouts stay together; see :func:`harness.report.drift.summarise_drift`."""

    fidelity_psnr: float
    frames: int | None
    horizons: dict[str, int | None]
    decohered: int
    first_horizon: int | None
    median_horizon: float | None
    stand_still: StandStill | None


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


def timed(blocks: Sequence[BatchTimes], arm: str, skip: int) -> dict[str, list[float]]:
    """An arm's frame times of all ``blocks`` by span (``dit``, ``decoder``, ``total``).

    The first ``skip`` frames of each block are left out; of a shorter block its last frame is kept.
    """
    spans: dict[str, list[float]] = {"dit": [], "decoder": [], "total": []}
    for times in (block.arms[arm] for block in blocks if arm in block.arms):
        first = max(0, min(skip, len(times.dit_ms) - 1))
        dit, decoder = times.dit_ms[first:], times.decoder_ms[first:]
        spans["dit"] += dit
        spans["decoder"] += decoder
        spans["total"] += [one + two for one, two in zip(dit, decoder, strict=True)]
    return spans
