"""RGB to YUV 4:2:0 and back, exactly and alike on every machine.

Video libraries round and place colour samples differently from version to version and from CPU to CPU (swscale's
default darkens pictures by about one level on the way), which would show in every PSNR.

Limited range, 8 bit (ITU-R BT.601 and BT.709): ``Y = 16 + 219 y``, ``Cb = 128 + 224 (b - y) / (2 (1 - Kb))``,
``Cr = 128 + 224 (r - y) / (2 (1 - Kr))`` with ``y = Kr r + (1 - Kr - Kb) g + Kb b`` and r, g, b in [0, 1].
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

BT601 = (0.299, 0.114)
"""(Kr, Kb)."""
BT709 = (0.2126, 0.0722)


def rgb_to_yuv420(rgb: NDArray[np.uint8], matrix: tuple[float, float] = BT601) -> NDArray[np.uint8]:
    """RGB ``[h, w, 3]`` (h and w even) to planes Y, Cb, Cr in one ``[3h/2, w]``; colour averaged over 2×2 pixels."""
    height, width, _ = rgb.shape
    kr, kb = matrix
    r, g, b = np.moveaxis(rgb.astype(np.float32) / 255, 2, 0)
    y = kr * r + (1 - kr - kb) * g + kb * b
    planes = [16 + 219 * y]
    for value, k in ((b, kb), (r, kr)):
        colour = (value - y) / (2 * (1 - k))
        planes.append(128 + 224 * colour.reshape(height // 2, 2, width // 2, 2).mean((1, 3)))
    flat = np.concatenate([plane.ravel() for plane in planes])
    return np.rint(flat).astype(np.uint8).reshape(height * 3 // 2, width)


def yuv420_to_rgb(yuv: NDArray[np.uint8], matrix: tuple[float, float] = BT601) -> NDArray[np.float32]:
    """Planes ``[3h/2, w]`` to RGB ``[h, w, 3]`` float32, about 0 to 255, neither rounded nor clipped.

    Each colour sample serves its 2×2 pixels.
    """
    height, width = yuv.shape[0] * 2 // 3, yuv.shape[1]
    kr, kb = matrix
    flat = yuv.ravel().astype(np.float32)
    y = (flat[: height * width].reshape(height, width) - 16) / 219
    cb, cr = (flat[height * width :].reshape(2, height // 2, width // 2) - 128) / 224
    r = y + 2 * (1 - kr) * cr.repeat(2, 0).repeat(2, 1)
    b = y + 2 * (1 - kb) * cb.repeat(2, 0).repeat(2, 1)
    g = (y - kr * r - kb * b) / (1 - kr - kb)
    return 255 * np.stack((r, g, b), axis=2)
