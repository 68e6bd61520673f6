"""The model of each arm of a plan, and who chooses its weights: a BF16 checkpoint, or an exported file."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from harness.calib.plan import plan_weights
from harness.config import RunPlan
from harness.models.world import WorldModel
from harness.mx.weights import WeightSource
from harness.rollout.assembly import load_core


def load_arms(plan: RunPlan, names: Sequence[str]) -> dict[str, tuple[WorldModel, WeightSource | None]]:
    """The models of the arms ``names`` on the plan's device, not yet in their formats, and the blocks' sources.

    A checkpoint is read once for both arms; calibration chooses the candidate's blocks where the config asks for it.
    The candidate of an exported checkpoint has no BF16 weights to be put into formats: its source brings the blocks,
    one Linear at a time.

    Raises:
        ValueError: if a checkpoint cannot be read or does not fit.
    """
    conf, device = plan.conf.model, plan.device
    if plan.export is None:
        core = load_core(plan.arch, conf.checkpoint, conf.seed, device, conf.weights)
        cores = {name: core if name == names[-1] else copy.deepcopy(core) for name in names}
        return {name: (own, plan_weights(plan, own) if name == "candidate" else None) for name, own in cores.items()}
    loaded: dict[str, tuple[WorldModel, WeightSource | None]] = {}
    for name in names:
        if name == "candidate":
            loaded[name] = plan.export.skeleton(device), plan.export.source(device)
        else:
            loaded[name] = load_core(plan.arch, conf.baseline, conf.seed, device, conf.weights), None
    return loaded
