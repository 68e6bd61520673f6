"""What a user chooses about the clips. Standard library only: composing a config imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

BUTTON_NAMES = ("W", "A", "S", "D", "LSHIFT", "SPACE", "R", "F", "E", "LMB", "RMB")
"""The buttons of an action, in the order of the model's input."""


class Source(StrEnum):
    """Where clips come from: recorded ``clips``, an upstream ``owl_cache`` of latents, or ``synthetic`` noise."""

    clips = "clips"
    owl_cache = "owl_cache"
    synthetic = "synthetic"


class Tag(StrEnum):
    """What the player of a clip does."""

    motion = "motion"
    stand_still = "stand_still"


@dataclass
class DataConf:
    """Which clips, and which of their frames. Fits an OmegaConf structured config.

    Attributes:
        source: see :class:`Source`.
        paths: folders or files to read clips from; none for ``synthetic``.
        tag: only clips with this tag; null = all.
        limit: the first so many clips, in an order in which the tags alternate; null = all.
        batch_size: clips in a batch.
        start: the first frame of a clip to use.
        future_frames: frames to generate after the context.
        fps: frames a second of sources that do not say (``owl_cache``, ``synthetic``).
        synthetic_clips: how many synthetic clips there are.
        seed: of synthetic clips.
        num_workers: processes that read clips; 0 reads in the main one.
    """

    source: Source = Source.clips
    paths: list[str] = field(default_factory=list)
    tag: Tag | None = None
    limit: int | None = None
    batch_size: int = 1
    start: int = 0
    future_frames: int = 64
    fps: float = 60.0
    synthetic_clips: int = 4
    seed: int = 0
    num_workers: int = 0


def validate(conf: DataConf) -> None:
    """Raise ``ValueError`` listing every field of ``conf`` with a value that is not allowed, and what is.

    Depends on the config alone; the clips themselves are checked by
    :meth:`harness.data.datamodule.ClipDataModule.check`.
    """
    problems = []
    for name, kind in (("source", Source), ("tag", Tag)):
        value = getattr(conf, name)
        if value not in list(kind) and not (name == "tag" and value is None):
            problems.append(f"{name}={value}: allowed are {', '.join(kind)}")
    at_least = {"batch_size": 1, "start": 0, "future_frames": 1, "synthetic_clips": 1, "num_workers": 0, "limit": 1}
    for name, least in at_least.items():
        value = getattr(conf, name)
        if value is not None and value < least:
            problems.append(f"{name}={value}: must be at least {least}" + ", or null for all" * (name == "limit"))
    if not conf.fps > 0:
        problems.append(f"fps={conf.fps}: must be above 0")
    if conf.source == Source.synthetic and conf.paths:
        problems.append(f"paths={list(conf.paths)} with source=synthetic, which reads no files; drop one of them")
    if conf.source != Source.synthetic and not conf.paths:
        problems.append(f"paths is empty: source={conf.source} needs a folder or files of clips")
    if problems:
        raise ValueError("data config: " + "; ".join(problems))
