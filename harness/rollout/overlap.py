"""Decoding a frame while the next one is denoised: throughput where nobody waits for the single frame."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from harness.rollout.sampler import Rollout


class OverlappedDecoding:
    """Runs the rollout on the current stream and the decoder on one of its own, one frame behind.

    A frame's own latency is what it is without overlap, or more: both share the GPU.

    Args:
        rollout: warm and prefilled, on a CUDA device.
        decode: latent ``[B, C, S, S]`` to RGB; already warm.

    Raises:
        ValueError: on a CPU, which has no streams.
    """

    def __init__(self, rollout: Rollout, decode: Callable[[Tensor], Tensor]) -> None:
        device = rollout.cache.device
        if device.type != "cuda":
            raise ValueError(f"overlapped decoding needs CUDA streams; this rollout is on {device.type}")
        self.rollout, self.decode = rollout, decode
        self._stream = torch.cuda.Stream(device)

    def next_frame(
        self, noise: Tensor, mouse: Tensor | None = None, btn: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Queue the next frame and its decoding; waits for neither.

        Returns:
            The latent, ready for the current stream, and the picture, ready for :attr:`stream` alone; where the
            decoder is captured the picture is valid until it decodes again, so copy it on that stream.
        """
        latent = self.rollout.next_frame(noise, mouse, btn)
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            latent.record_stream(self._stream)
            picture = self.decode(latent)
        return latent, picture

    def play(self, inputs: Sequence[tuple[Tensor, Tensor, Tensor]]) -> tuple[list[Tensor], float]:
        """Roll out and decode frame after frame.

        Args:
            inputs: noise, mouse and buttons of each frame, on the device.

        Returns:
            The pictures, and the seconds from the first frame's start until the last one is decoded.
        """
        pictures = []
        torch.cuda.synchronize(self._stream.device)
        start = time.perf_counter()
        for frame in inputs:
            _, picture = self.next_frame(*frame)
            with torch.cuda.stream(self._stream):
                pictures.append(picture.clone())
        torch.cuda.synchronize(self._stream.device)
        return pictures, time.perf_counter() - start

    @property
    def stream(self) -> torch.cuda.Stream:
        """The decoder's stream."""
        return self._stream
