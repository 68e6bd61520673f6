"""Does the model predict play? PSNR on held-out play, beside two things it must beat."""

from __future__ import annotations

from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from record_doom import HELD_OUT_SEEDS, SCENARIOS, record_arrays
from torch import Tensor, nn

from doom_world.autoencoder import encode_all
from harness.kv import KVConf
from harness.measure.appearance import sharpness
from harness.measure.stability import STRUCTURE, Signs, StabilityConf, detect
from harness.models.dcae import to_frames
from harness.models.gamerft import GameRFTCore
from harness.rollout.sampler import Rollout, SamplerConf, make_cache

JUDGED = 64
"""Generated frames whose PSNR, sharpness and structure are judged."""
FREE_PLAY = 350
"""Generated frames of which the last 50 must still be pictures of a map."""


def _play(job: tuple[str, int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The unbroken stretch of one held-out game in which the player moves most."""
    scenario, seed, length = job
    frames, buttons, mouse, segment = record_arrays(scenario, seed, 4 * length)
    moving = (buttons.any(1) | (np.abs(mouse).sum(1) > 0)).astype(np.float64)
    unbroken = [i for i in range(0, len(frames) - length, 16) if segment[i] == segment[i + length - 1]]
    if not unbroken:
        raise ValueError(f"{scenario}, seed {seed}: no episode of {length} frames")
    start = max(unbroken, key=lambda i: moving[i : i + length].mean())
    return tuple(part[start : start + length] for part in (frames, buttons, mouse))  # type: ignore[return-value]


def held_out_play(clips: int, length: int, workers: int) -> dict[str, Tensor]:
    """Held-out motion: ``frames`` uint8 ``[clips, length, 3, h, w]``, ``btn``, ``mouse``."""
    names = list(SCENARIOS)
    jobs = [(names[i % len(names)], HELD_OUT_SEEDS + 500_000 + i, length) for i in range(clips)]
    with get_context("spawn").Pool(workers) as pool:
        parts = pool.map(_play, jobs)
    frames, btn, mouse = (torch.from_numpy(np.stack(part)) for part in zip(*parts, strict=True))
    return {"frames": frames.permute(0, 1, 4, 2, 3).contiguous(), "btn": btn.float(), "mouse": mouse.float()}


def psnr(prediction: Tensor, reference: Tensor) -> Tensor:
    """PSNR in dB per frame, ``[B, F]``, of frames ``[B, F, 3, h, w]`` in [0, 1]."""
    return -10 * torch.log10((prediction - reference).square().mean((2, 3, 4)).clamp_min(1e-10))


@torch.no_grad()
def roll_out(
    core: GameRFTCore, history: Tensor, mouse: Tensor, btn: Tensor, frames: int, sampler: SamplerConf
) -> Tensor:
    """Generated latents ``[B, frames, C, S, S]`` after ``history [B, W, C, S, S]``; controls cover both."""
    batch, window = len(history), sampler.window
    roll = Rollout(core, make_cache(core, sampler, KVConf(), batch), sampler)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(batch, window + frames, *history.shape[2:], generator=generator).to(history.device)
    roll.prefill(history, mouse[:, :window], btn[:, :window], noise[:, :window])
    out = []
    for i in range(window, window + frames):
        out.append(roll.next_frame(noise[:, i], mouse[:, i], btn[:, i]))
    return torch.stack(out, dim=1)


@torch.no_grad()
def evaluate(
    core: GameRFTCore,
    encoder: nn.Module,
    decoder: nn.Module,
    play: dict[str, Tensor],
    sampler: SamplerConf,
    vae_scale: float,
    device: torch.device,
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Figures over held-out play, and the pictures behind them.

    Mean PSNR over the first 16 and over :data:`JUDGED` generated frames: the model, baselines and the autoencoder's own
    bound; sharpness against the recording, over those and over the last 50 of free play; clips that lost their
    structure.
    """
    window = sampler.window
    frames, btn, mouse = (play[key].to(device) for key in ("frames", "btn", "mouse"))
    future = frames.shape[1] - window
    reference = frames[:, window:].float() / 255
    z = torch.stack([encode_all(encoder, clip).float() for clip in frames])

    def decode(latents: Tensor) -> Tensor:
        return torch.stack([torch.cat([to_frames(decoder(x.float())) for x in clip.split(64)]) for clip in latents])

    history = z[:, :window] / vae_scale
    shuffled_btn, shuffled_mouse = btn.clone(), mouse.clone()
    shuffled_btn[:, window:], shuffled_mouse[:, window:] = btn[:, window:].roll(1, 0), mouse[:, window:].roll(1, 0)
    generated = decode(roll_out(core, history, mouse, btn, future, sampler) * vae_scale)
    arms = {
        "model": generated,
        "repeat": frames[:, window - 1 : window].float().div(255).expand_as(reference),
        "shuffled": decode(roll_out(core, history, shuffled_mouse, shuffled_btn, 16, sampler) * vae_scale),
        "autoencoder": decode(z[:, window : window + JUDGED]),
    }
    figures: dict[str, float] = {}
    for name, arm in arms.items():
        curve = psnr(arm[:, :JUDGED], reference[:, : min(JUDGED, arm.shape[1])])
        figures[f"{name}_16"] = round(float(curve[:, :16].mean()), 3)
        figures[f"{name}_all"] = round(float(curve.mean()), 3)
    parts = {
        "autoencoder_sharpness": (arms["autoencoder"], slice(0, JUDGED)),
        "sharpness": (generated, slice(0, JUDGED)),
        "sharpness_64": (generated, slice(JUDGED - 16, JUDGED)),
        "sharpness_350": (generated, slice(-50, None)),
    }
    for name, (arm, part) in parts.items():
        pairs = zip(arm[:, part].cpu(), reference[:, part].cpu(), strict=True)
        ratios = [ratio for pair in pairs if (ratio := sharpness(*pair)) is not None]
        figures[name] = round(sum(ratios) / len(ratios), 4)
    figures["lost_structure"] = sum(
        _lost(arm, recorded) for arm, recorded in zip(generated[:, :JUDGED], reference[:, :JUDGED], strict=True)
    )
    return figures, {"recording": reference, **arms}


def _lost(frames: Tensor, recorded: Tensor) -> bool:
    """Whether a clip's frames ``[F, 3, h, w]`` lose their structure, as the harness finds it."""
    moving = torch.ones(len(frames), dtype=torch.bool)
    found = detect(Signs.of(frames.cpu()), moving, StabilityConf(), Signs.of(recorded.cpu()), same_model=False)
    return any(kind == STRUCTURE for kind, _, _ in found)


def contact_sheet(pictures: dict[str, Tensor], path: Path, clips: int = 6) -> None:
    """A PNG: per clip a row of recorded frames over a row of generated ones."""
    from PIL import Image

    columns = [0, 15, 63, 149, 349]
    rows = []
    for clip in range(min(clips, len(pictures["recording"]))):
        for name in ("recording", "model"):
            picked = [pictures[name][clip, i] for i in columns if i < pictures[name].shape[1]]
            rows.append(torch.cat(picked, dim=-1))
    sheet = (torch.cat(rows, dim=-2).permute(1, 2, 0) * 255).round().byte().cpu().numpy()
    Image.fromarray(sheet).save(path)
