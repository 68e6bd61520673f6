"""Calibration as a run's or a session's config asks for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from harness.calib.source import CalibratedWeights, calibrated_weights
from harness.config import RunConf, RunPlan
from harness.data.kept import KeptEncoder
from harness.measure.environment import what_computes
from harness.models.checkpoint import load_encoder
from harness.models.dcae import DCAEEncoder
from harness.models.world import WorldModel
from harness.threads import usable_cores


def make_encoder(plan: RunPlan) -> DCAEEncoder | KeptEncoder | None:
    """What encodes recorded frames, on the plan's device; None where no checkpoint has it."""
    if plan.encoder_file is None:
        return None
    encoder = load_encoder(plan.encoder_file, plan.dcae).to(plan.device)
    conf = plan.conf.measure
    return KeptEncoder(encoder, Path(conf.kept) / "latents", what_computes()) if conf.reuse_bf16 else encoder


def plan_weights(plan: RunPlan, core: WorldModel) -> CalibratedWeights | None:
    """The calibrated weights of a BF16 ``core`` that is to become the candidate; None for rounding to nearest.

    Raises as :func:`~harness.calib.source.calibrated_weights`.
    """
    conf = plan.conf
    if not conf.calib.enabled:
        return None
    formats = conf.quant, conf.kv, conf.sampler
    with _every_core(conf):
        return calibrated_weights(core, *formats, conf.calib, plan.clip_shape, make_encoder(plan))


@contextmanager
def _every_core(conf: RunConf) -> Iterator[None]:
    """Of several processes one calibrates and the others wait: meanwhile it has the cores of all."""
    own = torch.get_num_threads()
    if conf.trainer.devices > 1 and conf.threads is None:
        torch.set_num_threads(max(own, usable_cores()))
    try:
        yield
    finally:
        torch.set_num_threads(own)
