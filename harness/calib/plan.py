"""Calibration as a run's or a session's config asks for it."""

from __future__ import annotations

from harness.calib.source import CalibratedWeights, calibrated_weights
from harness.config import RunPlan
from harness.models.checkpoint import load_encoder
from harness.models.dcae import DCAEEncoder
from harness.models.world import WorldModel


def make_encoder(plan: RunPlan) -> DCAEEncoder | None:
    """What encodes recorded frames, on the plan's device; None where no checkpoint has it."""
    if plan.encoder_file is None:
        return None
    return load_encoder(plan.encoder_file, plan.dcae).to(plan.device)


def plan_weights(plan: RunPlan, core: WorldModel) -> CalibratedWeights | None:
    """The calibrated weights of a BF16 ``core`` that is to become the candidate; None for rounding to nearest.

    Raises as :func:`~harness.calib.source.calibrated_weights`.
    """
    conf = plan.conf
    if not conf.calib.enabled:
        return None
    formats = conf.quant, conf.kv, conf.sampler
    return calibrated_weights(core, *formats, conf.calib, plan.clip_shape, make_encoder(plan))
