"""Frames as they travel: compressed, compared, and the difference of two of them made visible."""

from __future__ import annotations

import io
import math

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch import Tensor

GAIN = 8
"""Differences are shown so many times as large."""
PSNR_CAP = 100.0
"""dB of two equal pictures."""


def compress(picture: Tensor, codec: str, quality: int) -> bytes:
    """A picture uint8 ``[h, w, 3]`` as JPEG or WebP. Other threads run meanwhile: Pillow's JPEG would not let them."""
    pixels = picture.contiguous().numpy()
    if codec == "jpeg":
        # Colour at full resolution: pictures are small, and a format's error is what one looks for in them.
        return bytes(simplejpeg.encode_jpeg(pixels, quality, "RGB", "444", fastdct=False))
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "WEBP", quality=quality, method=0)
    return out.getvalue()


def difference(one: Tensor, other: Tensor) -> Tensor:
    """|one - other| enlarged ``GAIN`` times, uint8 ``[h, w, 3]``; black where they agree."""
    apart = np.abs(one.numpy().astype(np.int16) - other.numpy().astype(np.int16))
    return torch.from_numpy(np.minimum(apart * GAIN, 255).astype(np.uint8))


def psnr(one: Tensor, other: Tensor) -> float:
    """PSNR of two uint8 pictures in dB, capped at ``PSNR_CAP``."""
    error = float(np.mean((one.numpy().astype(np.float32) - other.numpy().astype(np.float32)) ** 2))
    return PSNR_CAP if error == 0 else min(PSNR_CAP, 10 * math.log10(255**2 / error))
