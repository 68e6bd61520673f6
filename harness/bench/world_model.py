"""Is a checkpoint really a world model? PSNR of its BF16 rollouts beside what they must beat.

    python scripts/check_world_model.py                      # the shipped demo
    python scripts/check_world_model.py model.checkpoint=my.safetensors 'data.paths=[my_clips]' future_frames=32

Rolls every ``motion`` clip out and compares its first frames with the recording, beside two baselines: the last context
frame repeated (a model that ignores time), and the same model fed another clip's future actions (a model that ignores
the player). A second table shows what PSNR hides: sharpness, texture and whether the picture moves as the actions ask.
Arguments are config overrides as ``harness/run.py`` takes them; ``future_frames=N`` is the number of
generated frames to judge (16). Exits 1 unless the model beats the first by 1.5 dB and the second at all, 2 on bad
input.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from harness.ab.arm import Arm
from harness.ab.module import RolloutModule
from harness.bench import arguments
from harness.config import RunPlan, plan_run, register
from harness.config.compose import compose
from harness.data.clips import ClipError, find_clips, probe_clip, read_clip
from harness.data.datamodule import ClipBatch
from harness.entries import count
from harness.measure.appearance import appearance
from harness.measure.figures import Appearance
from harness.measure.quality import frame_psnr
from harness.models.checkpoint import load_encoder
from harness.models.dcae import to_frames
from harness.streams import complain, patient

FRAMES = 16
"""Generated frames that are judged where no number is given."""
MARGIN_DB = 1.5
"""What the model must gain over the repeated frame."""


@dataclass(frozen=True)
class WorldModelFigures:
    """Mean PSNR in dB over clips and generated frames, and the per-clip values behind each.

    ``looks``: per clip what PSNR hides of the model's frames; ``disobeyed``: the action fidelity of those it made under
    another clip's actions, which ought to be far lower.
    """

    clip_ids: list[str]
    model: list[float]
    repeat: list[float]
    shuffled: list[float]
    looks: list[Appearance] = field(default_factory=list)
    disobeyed: list[float | None] = field(default_factory=list)

    def mean(self, arm: str) -> float:
        """Mean over clips of ``model``, ``repeat`` or ``shuffled``."""
        values = getattr(self, arm)
        return sum(values) / len(values)

    @property
    def passes(self) -> bool:
        """Whether the model earns its name."""
        gained = self.mean("model") - self.mean("repeat")
        return gained >= MARGIN_DB and self.mean("model") > self.mean("shuffled")


def plan(overrides: list[str], frames: int, clips: int) -> RunPlan:
    """A checked BF16 run over ``clips`` clips at once."""
    fixed = ["quant=bf16", "kv=bf16", f"data.batch_size={clips}", f"data.future_frames={frames}"]
    return plan_run(compose(*overrides, *fixed, folder="outputs"))


def clip_batch(run: RunPlan, paths: list[Path], frames: int) -> tuple[ClipBatch, Tensor]:
    """Clips for a rollout of ``frames`` new frames, and what was recorded, ``[B, W + F, 3, h, w]`` in [0, 1].

    Raises:
        ValueError: if the model has no encoder.
    """
    if run.encoder_file is None:
        raise ValueError("an encoder is needed to turn context frames into latents: set decoder.encoder")
    window = run.conf.sampler.window
    clips = [read_clip(path, 0, window + frames) for path in paths]
    pictures = torch.stack([clip.frames for clip in clips]).float() / 255
    mouse, btn = (torch.stack([getattr(clip, name) for clip in clips]).float() for name in ("mouse", "buttons"))
    encoder = load_encoder(run.encoder_file, run.dcae).to(run.device)
    context = torch.stack([encoder(clip.to(run.device) * 2 - 1) for clip in pictures[:, :window]]) / run.vae_scale
    batch = ClipBatch(
        clip_ids=[clip.id for clip in clips], tags=["motion"] * len(clips), fps=[clip.fps for clip in clips],
        latents_context=context, mouse=mouse.to(run.device), btn=btn.to(run.device), frames=None, latents_future=None,
    )  # fmt: skip
    return batch, pictures


def bf16_arm(run: RunPlan) -> tuple[RolloutModule, Arm]:
    """A run's BF16 arm, set up."""
    module = RolloutModule(run)
    with torch.inference_mode(False):  # compiled code keeps what is made here
        module.setup("predict")
    return module, module.arms["bf16"]


@torch.inference_mode()
def world_model_figures(overrides: list[str] | None = None, frames: int = 16) -> WorldModelFigures:
    """Roll every motion clip out with its own and with another clip's actions.

    Raises:
        ValueError: if the model has no encoder, or fewer than two motion clips are found or usable.
    """
    overrides = overrides or []
    first = plan(overrides, frames, 1)
    paths = [path for path in find_clips(first.conf.data.paths) if probe_clip(path).tag == "motion"]
    if len(paths) < 2:
        raise ValueError(f"{len(paths)} motion clips in {list(first.conf.data.paths)}: give at least 2")
    run = plan(overrides, frames, len(paths))
    window = run.conf.sampler.window
    batch, pictures = clip_batch(run, paths, frames)
    other_mouse, other_btn = batch.mouse.clone(), batch.btn.clone()
    other_mouse[:, window:] = batch.mouse[:, window:].roll(1, 0)
    other_btn[:, window:] = batch.btn[:, window:].roll(1, 0)
    module, arm = bf16_arm(run)
    noise = module.noise(batch.clip_ids, frames)

    def roll(batch: ClipBatch) -> Tensor:
        return to_frames(arm.roll(batch, noise, lambda: None).pictures.rgb())

    recorded = pictures[:, window:]
    repeated = pictures[:, window - 1 : window].expand(-1, frames, -1, -1, -1)
    model, shuffled = roll(batch), roll(replace(batch, mouse=other_mouse, btn=other_btn))
    looks, others = (
        [appearance(*pair) for pair in zip(arms.cpu(), recorded, strict=True)] for arms in (model, shuffled)
    )
    return WorldModelFigures(
        clip_ids=batch.clip_ids,
        model=psnr(model, recorded),
        repeat=psnr(repeated, recorded),
        shuffled=psnr(shuffled, recorded),
        looks=looks,
        disobeyed=[look.action_fidelity for look in others],
    )


def psnr(frames: Tensor, recorded: Tensor) -> list[float]:
    """Mean PSNR over the frames of each clip."""
    return [statistics.fmean(frame_psnr(a, b)) for a, b in zip(frames.cpu(), recorded, strict=True)]


def looks_table(figures: WorldModelFigures) -> Table:
    """What PSNR hides, clip by clip."""
    table = Table(title="What PSNR hides (see docs/quality.md)", title_justify="left")
    for column in ("clip", "sharpness", "texture distance", "action fidelity", "…, another clip's actions"):
        table.add_column(column, justify="left" if column == "clip" else "right", no_wrap=column == "clip")

    def add(name: str, *values: float | None) -> None:
        table.add_row(name, *("-" if value is None else f"{value:.2f}" for value in values))

    for name, look, other in zip(figures.clip_ids, figures.looks, figures.disobeyed, strict=True):
        add(name, look.sharpness, look.texture, look.action_fidelity, other)
    table.add_section()
    mean = Appearance.mean(figures.looks)
    others = [other for other in figures.disobeyed if other is not None]
    add("mean", mean.sharpness, mean.texture, mean.action_fidelity, statistics.fmean(others) if others else None)
    return table


@patient
def _frames(counts: list[str]) -> int:
    """The last of the numbers that were given. Raises ``ValueError`` if it is none."""
    try:
        return count(counts[-1]) if counts else FRAMES
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"future_frames={error}") from error


def main(argv: list[str] | None = None) -> int:
    """Print the tables; 0 if it is a world model, 1 if not, 2 on bad input."""
    words = arguments.world_model().parse_args(argv).words
    counts = [word.removeprefix("future_frames=") for word in words if word.startswith("future_frames=")]
    overrides = [word for word in words if not word.startswith("future_frames=")]
    register()
    try:
        figures = world_model_figures(overrides, _frames(counts))
    except (ValueError, ClipError) as error:
        complain(error)
        return 2
    table = Table(title="PSNR dB against the recording", title_justify="left")
    for column in ("clip", "model", "repeat last frame", "another clip's actions"):
        table.add_column(column, justify="left" if column == "clip" else "right", no_wrap=column == "clip")
    for row in zip(figures.clip_ids, figures.model, figures.repeat, figures.shuffled, strict=True):
        table.add_row(row[0], *(f"{value:.2f}" for value in row[1:]))
    table.add_section()
    table.add_row("mean", *(f"{figures.mean(arm):.2f}" for arm in ("model", "repeat", "shuffled")))
    Console().print(table, looks_table(figures))
    print("a world model" if figures.passes else f"not a world model: it must beat 'repeat' by {MARGIN_DB} dB")
    return 0 if figures.passes else 1


if __name__ == "__main__":
    sys.exit(main())
