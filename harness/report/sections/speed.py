"""Times: a frame's, those of its parts, and of setting up; milliseconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from harness.measure.figures import Stats

PARTS = ("attention", "mlp", "modulation", "kv_get", "kv_update", "other")
"""Parts of a frame in the instrumented pass; ``other`` is what remains of the frame."""


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
class FrameTimes:
    """Milliseconds of one arm's frames of a batch, in order, none left out."""

    dit_ms: list[float]
    decoder_ms: list[float]
    prefill_ms: float | None = None


@dataclass
class FramesFrom:
    """Frames that an earlier run rolled out: its name, and when (ISO 8601, UTC)."""

    run: str
    rolled: str


@dataclass
class BatchTimes:
    """Both arms' times of one batch of clips, frame by frame: frame i of one arm and of the other are a pair.

    ``order``: in which the arms were rolled out. An arm that broke off has fewer frames. ``fallback``: in force.
    ``bf16_from``: whose frames BF16's are, where it was not rolled out; it is not among the ``arms`` then.
    """

    clips: list[str]
    order: list[str]
    arms: dict[str, FrameTimes]
    fallback: str | None = None
    bf16_from: FramesFrom | None = None


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
