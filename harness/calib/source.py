"""Calibrated weights as a source of MX weights: found where they were kept, or made now."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.progress import Progress
from torch import nn

from harness.calib.calibrate import calibrate
from harness.calib.clips import open_clips, read_clips
from harness.calib.conf import CalibConf
from harness.calib.sequences import Clips
from harness.calib.store import Facts, fingerprint, load, save
from harness.data.datamodule import Encoder
from harness.data.sources import ClipShape
from harness.files.kept import StaleError, locked
from harness.kv import KVConf
from harness.measure.memory import PeakProbe
from harness.models.bf16 import widen
from harness.models.gamerft import GameRFTCore
from harness.models.world import WorldModel
from harness.mx.conf import MXConf
from harness.mx.linears.base import LinearFormat, MXWeight
from harness.mx.select import select
from harness.rollout import SamplerConf


@dataclass(frozen=True)
class CalibratedWeights:
    """Weights that were chosen beforehand; a :class:`harness.mx.weights.WeightSource`.

    ``fingerprint``: of all that went into them. ``found``: they were kept from an earlier run.
    """

    weights: Mapping[str, MXWeight]
    facts: Facts
    fingerprint: str
    found: bool

    @property
    def chosen_by(self) -> str:
        """See :class:`~harness.mx.weights.WeightSource`."""
        return self.facts.method

    def unsuitable(self, name: str, linear: nn.Linear, fmt: LinearFormat) -> str | None:
        """See :class:`~harness.mx.weights.WeightSource`."""
        weight = self.weights.get(name)
        if weight is None or weight.fmt != fmt:
            return f"it was not calibrated for {fmt.numeric_path}"
        return None

    def weight(self, name: str, linear: nn.Linear, fmt: LinearFormat) -> MXWeight:
        """See :class:`~harness.mx.weights.WeightSource`."""
        return self.weights[name]


def formats_of(core: WorldModel, quant: MXConf) -> dict[str, LinearFormat]:
    """Format of each Linear that ``quant`` selects, by its name in ``core``."""
    return {chosen.name: LinearFormat.of(quant, chosen.category) for chosen in select(core, quant).chosen}


def calibrated_weights(
    core: WorldModel,
    quant: MXConf,
    kv: KVConf,
    sampler: SamplerConf,
    conf: CalibConf,
    shape: ClipShape,
    encoder: Encoder | None,
) -> CalibratedWeights:
    """The weights of ``core`` calibrated for these formats: kept ones where nothing has changed, else new ones.

    Args:
        core: in BF16, on the device it will run on; its Linears are widened where that is faster.
        quant: formats of the Linears.
        kv: formats of the cache.
        sampler: of the rollouts.
        conf: how to calibrate; enabled.
        shape: what the model expects of a clip.
        encoder: of recorded frames, if there is one.

    Raises:
        ValueError: if a clip cannot be used, or the model is of a family that calibration does not know.
        OSError: if the result cannot be kept.
    """
    if not isinstance(core, GameRFTCore):
        raise ValueError(f"calib={conf.method}: knows the layers of GameRFT, not of {type(core).__name__}")
    widen(core)
    formats, device = formats_of(core, quant), core.device
    data = open_clips(conf, shape, encoder)
    clips = read_clips(data, sampler, device)
    tensors = (clips.history, clips.mouse, clips.btn, *clips.noise)
    settings = {
        "formats": {name: str(fmt) for name, fmt in formats.items()},
        "kv": asdict(kv),
        "sampler": asdict(sampler),
        "settings": (str(conf.method), conf.damping, conf.sweeps),
        "device": device.type,
    }
    key = fingerprint(core, tensors, **settings)
    path = Path(conf.folder) / f"{key}.safetensors"
    there = path.exists()  # one that another process of this run makes meanwhile is not kept from an earlier run
    with locked(path):
        if path.exists():
            try:
                return CalibratedWeights(*load(path, core, formats), key, found=there)
            except StaleError as error:
                print(f"calibrating again: {error}")
        weights, facts = _calibrated(core, formats, clips, [entry.id for entry in data.entries], sampler, kv, conf)
        save(path, weights, facts)
    return CalibratedWeights(weights, facts, key, found=False)


def _calibrated(
    core: GameRFTCore,
    formats: Mapping[str, LinearFormat],
    clips: Clips,
    names: list[str],
    sampler: SamplerConf,
    kv: KVConf,
    conf: CalibConf,
) -> tuple[dict[str, MXWeight], Facts]:
    start, probe = time.perf_counter(), PeakProbe(core.device)
    with probe, Progress(transient=True) as bar:
        task = bar.add_task(f"calibrating {len(formats)} Linears", total=core.cfg.n_layers)
        settings = (conf.damping, conf.sweeps)
        weights = calibrate(core, formats, clips, sampler, kv, *settings, on_layer=lambda: bar.advance(task))
        if core.device.type == "cuda":
            torch.cuda.synchronize(core.device)
    peak = probe.result()
    facts = Facts(
        method=str(conf.method),
        clips=names,
        frames=clips.frames,
        seconds=time.perf_counter() - start,
        peak_bytes=peak.peak_allocated or peak.process_peak_rss,
        device=str(core.device),
        linears=len(weights),
    )
    return weights, facts
