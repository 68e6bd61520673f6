"""The least time that memory allows for what a frame reads and writes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from harness.config import RunPlan
from harness.measure.memory import module_bytes
from harness.models.dcae import DCAEDecoder
from harness.rollout import Rollout


def floor_ms(rollout: Rollout, bandwidth: float) -> float:
    """Least time to read what a frame reads: the blocks' weights and the cache at each step, modulation once."""
    steps = len(rollout.sampler.timesteps)
    each_step = rollout.cache.nbytes().allocated
    once = 0
    for _, _, spec, linear in rollout.core.linears():
        if spec.per_frame:
            # Where these are stacked their weights are views of one storage: count parameters, not storages.
            once += sum(x.nbytes for x in (*linear.parameters(), *linear.buffers()))
        else:
            each_step += module_bytes(linear)
    return (steps * each_step + once) / (bandwidth * 1e9)


def decoder_floor_ms(plan: RunPlan, bandwidth: float) -> float:
    """Least time for every convolution of the decoder to read its input and weight and write its output, once a frame.

    What stands between convolutions counts as fused with them.
    """
    moved = 0

    def count(conv: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal moved
        moved += sum(x.numel() for x in (*inputs, output, *conv.parameters()))

    arch = plan.arch
    with torch.device("meta"), torch.no_grad():
        decoder = DCAEDecoder(plan.dcae)
        for module in decoder.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(count)
        decoder(torch.empty(plan.conf.data.batch_size, arch.channels, arch.sample_size, arch.sample_size))
    return moved * plan.conf.decoder.dtype_on(plan.device).itemsize / (bandwidth * 1e9)
