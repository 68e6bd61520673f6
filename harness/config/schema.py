"""The structured config: what may be configured, with types. Each group of ``conf/`` fills one field of RunConf.

Neither this module nor what it imports needs torch, which takes seconds: ``--help``, ``--fields`` and misspelt words
are answered at once (``tests/test_imports.py``).
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from functools import cache
from typing import TYPE_CHECKING, Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, OmegaConf

from harness.calib.conf import CalibConf
from harness.config.flags import register_flags
from harness.config.labels import register_label
from harness.config.places import asset
from harness.data.conf import DataConf
from harness.entries import entry
from harness.kv.conf import KVConf
from harness.measure.conf import OnInstability, StabilityConf
from harness.mx.conf import MXConf
from harness.report.drift import DriftConf
from harness.report.gates.conf import GatesConf
from harness.rollout.conf import AttentionKind, CompileConf, DecoderGroups, SamplerConf

if TYPE_CHECKING:
    import torch

SCHEMAS: dict[str, type] = {}
"""The schema of each config at the top of ``conf/``, by its name: what is registered so far."""


@dataclass
class ModelConf:
    """Which GameRFT runs.

    Attributes:
        config_file: upstream YAML with ``model:`` and ``train:`` sections, or null.
        arch: fields of :class:`GameRFTConfig`; those of ``config_file`` are replaced by these.
        checkpoint: weights, in any form that :mod:`harness.models.checkpoint` reads; null = seeded random weights.
        weights: key of the set of weights to take from a checkpoint that holds several, such as ``ema`` or ``model``;
            null = the averaged (EMA) one where there is one.
        baseline: BF16 checkpoint that an exported ``checkpoint`` is compared with; null = it is rolled out alone.
        seed: of random weights.
        window: frames a new frame sees, itself included, if the sampler does not say otherwise.
        calibration: clips to calibrate on, if ``calib`` does not say otherwise.
    """

    config_file: str | None = None
    arch: dict[str, Any] = field(default_factory=dict)
    checkpoint: str | None = None
    weights: str | None = None
    baseline: str | None = None
    seed: int = 0
    window: int = MISSING
    calibration: list[str] = field(default_factory=list)


class DecoderDtype(StrEnum):
    """What a decoder may compute in."""

    bfloat16 = "bfloat16"
    float32 = "float32"


@dataclass
class DecoderConf:
    """Which DCAE decodes latents to frames, and encodes recorded ones.

    Attributes:
        config_file: YAML with a ``model:`` section, or null.
        arch: fields of :class:`DCAEConfig`; those of ``config_file`` are replaced by these.
        checkpoint: decoder or whole autoencoder; null = seeded random weights.
        encoder: encoder or whole autoencoder, needed for recorded frames; null = ``checkpoint``.
        vae_scale: the decoder's latents are this times the model's; null = as the config files say.
        seed: of random weights.
        groups: how its grouped convolutions run, see :class:`DecoderGroups`.
        dtype: what it computes in, in both arms: bfloat16, float32, or null = bfloat16 where the device has it
            (every GPU; CPUs with instructions for it), else float32.
    """

    config_file: str | None = None
    arch: dict[str, Any] = field(default_factory=dict)
    checkpoint: str | None = None
    encoder: str | None = None
    vae_scale: float | None = None
    seed: int = 0
    groups: DecoderGroups = DecoderGroups.auto
    dtype: DecoderDtype | None = None

    def dtype_on(self, device: torch.device) -> torch.dtype:
        """``dtype``, or what null stands for on ``device``."""
        import torch

        from harness.models.bf16 import has_fast_bf16

        fitting = DecoderDtype.bfloat16 if has_fast_bf16(device) else DecoderDtype.float32
        return getattr(torch, self.dtype or fitting)


@dataclass
class AttentionConf:
    """How a frame attends to its window.

    Attributes:
        kind: see :class:`AttentionKind`.
    """

    kind: AttentionKind = AttentionKind.sdpa


@dataclass
class TrainerConf:
    """Arguments of Lightning's ``Trainer``.

    Attributes:
        accelerator: ``cpu`` or ``gpu``.
        devices: processes on each machine, each with its own GPU (or share of the CPUs) and its share of the clips.
        num_nodes: machines; more than one are started by SLURM or torchrun.
        strategy: ``auto``, or ``ddp`` for several processes.
    """

    _target_: str = "lightning.Trainer"
    accelerator: str = "cpu"
    devices: int = 1
    num_nodes: int = 1
    strategy: str = "auto"


@dataclass
class MeasureConf:
    """What is measured beside quality.

    Attributes:
        warmup_frames: frames run on zeros before anything is timed.
        skip_frames: first frames of each clip that are not timed (at least one is).
        parts_frames: frames of the instrumented pass that splits a frame into its parts; 0 = none.
        videos: write an A/B video per clip.
        numerics_rows: input rows on which the error of each MX Linear is measured, after the rollouts; 0 = none.
        reuse_bf16: take BF16's frames, and the latents of recorded ones, from an earlier run on this CPU with the same
            weights, clips, noise, settings and code, and keep them for later ones. Times are never reused: refused on a
            GPU, and with a gate that asks for speed.
        kept: where such frames and latents are kept.
    """

    warmup_frames: int = 2
    skip_frames: int = 1
    parts_frames: int = 4
    videos: bool = True
    numerics_rows: int = 64
    reuse_bf16: bool = False
    kept: str = "outputs/kept"


@dataclass
class RunConf:
    """A whole run.

    Attributes:
        model: which GameRFT runs.
        decoder: which DCAE decodes latents to frames.
        data: which clips, and which of their frames.
        quant: MX Linears of the candidate.
        kv: storage of the candidate's K and V.
        calib: how MX weights are chosen.
        attention: how a frame attends to its window.
        compile: how a frame runs.
        sampler: how frames are sampled.
        trainer: where it runs.
        logger: ``_target_``, one of Lightning's loggers, and its arguments.
        measure: what is measured beside quality.
        gates: the thresholds of the verdict.
        on_instability: what an instability of the candidate does, see
            :data:`harness.measure.stability.OnInstability`.
        stability: when a frame counts as unstable.
        drift: where two rollouts count as apart.
        seed: of all noise and synthetic clips, 0 to 2^64 - 1.
        flags: the old environment flags that are set, see :mod:`harness.config.flags`; read, never typed.
        threads: CPU threads of torch, for jobs that share a machine, at least 1; null = torch's own choice, at most
            the cores this process may use.
        export: file (.safetensors) to write the candidate's packed weights to once the run is complete, see
            docs/export.md; null = none.
        resume: go on after the last clip that an earlier run of the same command finished in the same folder.
        overwrite: remove what an earlier run left in the run's folder.
    """

    model: ModelConf = field(default_factory=ModelConf)
    decoder: DecoderConf = field(default_factory=DecoderConf)
    data: DataConf = field(default_factory=DataConf)
    quant: MXConf = field(default_factory=MXConf)
    kv: KVConf = field(default_factory=KVConf)
    calib: CalibConf = field(default_factory=CalibConf)
    attention: AttentionConf = field(default_factory=AttentionConf)
    compile: CompileConf = field(default_factory=CompileConf)
    sampler: SamplerConf = field(default_factory=SamplerConf)
    trainer: TrainerConf = field(default_factory=TrainerConf)
    logger: dict[str, Any] = field(default_factory=dict)
    measure: MeasureConf = field(default_factory=MeasureConf)
    gates: GatesConf = field(default_factory=GatesConf)
    on_instability: OnInstability = OnInstability["raise"]
    stability: StabilityConf = field(default_factory=StabilityConf)
    drift: DriftConf = field(default_factory=DriftConf)
    seed: int = 0
    flags: dict[str, str] = field(default_factory=dict)
    threads: int | None = None
    export: str | None = None
    resume: bool = False
    overwrite: bool = False

    @property
    def is_baseline(self) -> bool:
        """Whether the candidate would be BF16 itself."""
        return not (self.quant.enabled or self.kv.enabled)


@cache
def started() -> str:
    """When this process was first asked, to the millisecond: a run's folder is named so, and two runs do not meet.

    Processes that SLURM or torchrun start for one run ask at different times, so for those it is the job's name.
    """
    for job, processes in (("SLURM_JOB_ID", "SLURM_NTASKS"), ("TORCHELASTIC_RUN_ID", "WORLD_SIZE")):
        if job in os.environ and os.environ.get(processes, "1") != "1":
            step = os.environ.get("SLURM_STEP_ID", os.environ.get("MASTER_PORT", "0"))
            return f"job_{os.environ[job]}.{step}"
    return f"{datetime.now():%Y-%m-%d_%H-%M-%S.%f}"[:-3]


def register() -> None:
    """Put the schema and the resolvers where Hydra finds them. May be called again."""
    OmegaConf.register_new_resolver("repo", asset, replace=True)
    OmegaConf.register_new_resolver("entry", entry, replace=True)
    OmegaConf.register_new_resolver("started", started, replace=True)
    register_flags()
    register_label()
    register_schema("run", RunConf)


def register_schema(name: str, schema: type) -> None:
    """Make ``schema`` the type of ``conf/<name>.yaml``, which names it ``<name>_schema``."""
    if SCHEMAS.get(name) is not schema or f"{name}_schema.yaml" not in ConfigStore.instance().repo:
        ConfigStore.instance().store(name=f"{name}_schema", node=schema)
    SCHEMAS[name] = schema


register()  # on import: a launcher's worker imports this module, but does not run the command
