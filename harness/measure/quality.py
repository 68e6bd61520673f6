"""How far an arm's frames are from the recording, and a candidate's from BF16's.

Frames are float in [0, 1] (data range 1). PSNR and SSIM are torchmetrics', one value per frame, so that
drift is a curve; a clip's value is the mean over its frames and a run's the mean over clips, which keeps
every comparison paired.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from harness.measure.figures import FrameScores
from harness.measure.pictures import Shown

PSNR_CAP = 100.0
"""dB given to identical frames, whose PSNR is infinite and could be neither averaged nor written as JSON."""
CHUNK = 16
"""Frames scored at once: both need several float32 copies of what they score."""


def frame_psnr(frames: Tensor, reference: Tensor) -> list[float]:
    """PSNR in dB, at most ``PSNR_CAP``, of each of ``frames [N, 3, h, w]`` against ``reference``, as in
    ``score_frames``.

    Raises:
        ValueError: if the shapes differ.
    """
    if frames.shape != reference.shape:
        raise ValueError(f"frames {list(frames.shape)} and reference {list(reference.shape)} differ in shape")
    psnr: list[float] = []
    for ours, theirs in zip(frames.split(CHUNK), reference.split(CHUNK), strict=True):
        pair = ours.float(), theirs.float()
        decibels = peak_signal_noise_ratio(*pair, data_range=1.0, reduction="none", dim=(1, 2, 3))
        psnr += decibels.clamp(max=PSNR_CAP).reshape(-1).tolist()
    return psnr


def score_frames(frames: Shown, reference: Shown, device: torch.device | None = None) -> FrameScores:
    """PSNR and SSIM of ``frames [N, 3, h, w]`` against ``reference`` (same shape, both float in [0, 1]).

    Args:
        frames: anywhere. reference: likewise.
        device: where to compute; by default where each is. A GPU takes 1 ms for what a core takes 80 for, in float32
            there too: scores agree to the last few bits.

    Raises:
        ValueError: if the shapes differ.
    """
    psnr: list[float] = []
    ssim: list[float] = []
    if frames.shape != reference.shape:
        raise ValueError(f"frames {list(frames.shape)} and reference {list(reference.shape)} differ in shape")
    for first in range(0, len(frames), CHUNK):
        pair = (shown[first : first + CHUNK] for shown in (frames, reference))
        # SSIM's blur is a depthwise convolution, four times as fast on a CPU in this memory format.
        ours, theirs = (x.to(device).float().contiguous(memory_format=torch.channels_last) for x in pair)
        psnr += frame_psnr(ours, theirs)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            similarity = structural_similarity_index_measure(ours, theirs, data_range=1.0, reduction="none")
        assert isinstance(similarity, Tensor)
        ssim += similarity.reshape(-1).tolist()
    return FrameScores(psnr, ssim)
