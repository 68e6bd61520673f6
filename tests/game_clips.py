"""Clips of noise for tests, in the format the harness reads."""

import torch

from harness.data.clips import Clip, write_clip


def write_game_clip(folder, name, tag, frames=10):
    """A clip of ``frames`` frames of smooth noise, 32×32."""
    generator = torch.Generator().manual_seed(sum(name.encode()))
    coarse = torch.rand(frames, 3, 4, 4, generator=generator)
    pictures = torch.nn.functional.interpolate(coarse, size=(32, 32), mode="bilinear")
    buttons = torch.zeros(frames, 11, dtype=torch.uint8)
    buttons[:, 0] = int(tag == "motion")
    write_clip(
        folder,
        Clip(
            id=name,
            frames=(pictures * 255).byte(),
            buttons=buttons,
            mouse=torch.zeros(frames, 2),
            fps=10.0,
            tag=tag,
            scenario="noise",
        ),
    )
