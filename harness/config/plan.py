"""The structured config: what may be configured, with types, and every check of it that needs no weights.

Each config group of ``conf/`` fills one field of :class:`RunConf`. Hydra checks names and types while it composes;
:func:`plan_run` then checks values, files, shapes and kernels against each other, before anything large is loaded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from harness import kv as kv_room
from harness.calib import conf as calib_conf
from harness.calib.conf import CalibConf
from harness.config.extras import missing_logger
from harness.config.flags import FlagError, register_flags
from harness.data import conf as data_conf
from harness.data.conf import DataConf
from harness.data.sources import ClipShape
from harness.kv import KVConf
from harness.measure import stability as stability_room
from harness.measure.stability import OnInstability, StabilityConf
from harness.models.bf16 import has_fast_bf16
from harness.models.config_io import dcae_config, gamerft_config, model_section, read_vae_scale
from harness.models.dcae import DCAEConfig
from harness.models.gamerft import GameRFTConfig, GameRFTCore
from harness.mx import conf as mx_conf
from harness.mx.conf import MXConf
from harness.mx.transform import check_mx
from harness.report import drift as drift_room
from harness.report import gates as gates_room
from harness.report.drift import DriftConf
from harness.report.gates import GatesConf
from harness.rollout import AttentionKind, CompileConf, DecoderGroups, RolloutSetup, SamplerConf
from harness.rollout import compile as compile_room
from harness.rollout import linears as linears_room
from harness.rollout import sampler as sampler_room
from harness.rollout.attention import check_attention

ROOT = Path(__file__).resolve().parents[2]
"""The repository. ``${repo:path}`` in a config is a path below it; other relative paths start where the user is."""


class ConfigError(ValueError):
    """A configuration that cannot run; the message lists every problem found and what to do about it."""


@dataclass
class ModelConf:
    """Which GameRFT runs.

    Attributes:
        config_file: upstream YAML with ``model:`` and ``train:`` sections, or null.
        arch: fields of :class:`GameRFTConfig`; those of ``config_file`` are replaced by these.
        checkpoint: weights, in any form that :mod:`harness.models.checkpoint` reads; null = seeded random weights.
        weights: key of the set of weights to take from a checkpoint that holds several, such as ``ema`` or ``model``;
            null = the averaged (EMA) one where there is one.
        seed: of random weights.
        window: frames a new frame sees, itself included, if the sampler does not say otherwise.
    """

    config_file: str | None = None
    arch: dict[str, Any] = field(default_factory=dict)
    checkpoint: str | None = None
    weights: str | None = None
    seed: int = 0
    window: int = MISSING


class DecoderDtype(Enum):
    """What a decoder may compute in."""

    bfloat16 = torch.bfloat16
    float32 = torch.float32


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
        fitting = DecoderDtype.bfloat16 if has_fast_bf16(device) else DecoderDtype.float32
        return (self.dtype or fitting).value


@dataclass
class AttentionConf:
    """How a frame attends to its window."""

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
    """

    warmup_frames: int = 2
    skip_frames: int = 1
    parts_frames: int = 4
    videos: bool = True
    numerics_rows: int = 64


@dataclass
class RunConf:
    """A whole run.

    ``logger``: ``_target_``, one of Lightning's loggers, and its arguments.
    ``flags``: the old environment flags that are set, see :mod:`harness.config.flags`. ``threads``: CPU threads of
    torch, for jobs that share a machine; null = torch's own choice, at most the cores this process may use.
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

    @property
    def is_baseline(self) -> bool:
        """Whether the candidate would be BF16 itself."""
        return not (self.quant.enabled or self.kv.enabled)


@dataclass(frozen=True)
class RunPlan:
    """A checked run: its config, the shapes it implies and the device it runs on."""

    conf: RunConf
    arch: GameRFTConfig
    dcae: DCAEConfig
    vae_scale: float
    device: torch.device

    @property
    def setup(self) -> RolloutSetup:
        """What the rollouts of both arms have in common."""
        conf = self.conf
        batch, warmup = conf.data.batch_size, conf.measure.warmup_frames
        return RolloutSetup(batch, conf.sampler, conf.attention.kind, conf.compile, warmup)

    @property
    def clip_shape(self) -> ClipShape:
        """What the model expects of a clip."""
        height, width = self.dcae.sample_size
        return ClipShape(
            window=self.conf.sampler.window,
            buttons=self.arch.n_buttons,
            channels=self.arch.channels,
            side=self.arch.sample_size,
            frame_size=(height, width),
            vae_scale=self.vae_scale,
        )

    @property
    def encoder_file(self) -> str | None:
        """Checkpoint that holds the encoder."""
        return self.conf.decoder.encoder or self.conf.decoder.checkpoint


def register() -> None:
    """Put the schema and the resolvers where Hydra finds them. May be called again."""
    OmegaConf.register_new_resolver("repo", lambda path: str(ROOT / path), replace=True)
    register_flags()
    ConfigStore.instance().store(name="run_schema", node=RunConf)


@contextmanager
def _collect(problems: list[str]) -> Iterator[None]:
    """Turn a check's ``ValueError`` into one more problem, so that a user sees all of them at once."""
    try:
        yield
    except ValueError as error:
        problems.append(str(error))


def plan_run(cfg: DictConfig) -> RunPlan:
    """Check a composed config and work out what it implies.

    Raises:
        ConfigError: listing every problem: values out of range, files that are missing, a model, decoder, cache or
            kernel that do not fit each other or the device.
    """
    try:
        conf = OmegaConf.to_object(cfg)
    except OmegaConfBaseException as error:
        raise ConfigError(f"config: {_root(error)}") from error
    assert isinstance(conf, RunConf)
    problems: list[str] = []
    device = _device(conf.trainer, problems)
    arch, dcae, vae_scale = _read_model(conf, problems)
    if not problems:
        assert arch is not None
        _check_values(conf, arch, device, problems)
    if problems:
        raise ConfigError("\n".join(problems))
    assert arch is not None
    assert dcae is not None
    assert vae_scale is not None
    return RunPlan(conf, arch, dcae, vae_scale, device)


def _root(error: BaseException) -> BaseException:
    """The flag's own error where a resolver raised one: OmegaConf wraps it twice."""
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, FlagError):
            return inner
        inner = inner.__context__
    return error


def _device(conf: TrainerConf, problems: list[str]) -> torch.device:
    if conf.accelerator not in ("cpu", "gpu"):
        problems.append(f"trainer.accelerator={conf.accelerator}: allowed are cpu, gpu")
    for name in ("devices", "num_nodes"):
        if getattr(conf, name) < 1:
            problems.append(f"trainer.{name}={getattr(conf, name)}: must be at least 1")
    if conf.strategy not in ("auto", "ddp"):
        problems.append(f"trainer.strategy={conf.strategy}: allowed are auto, ddp")
    if conf.accelerator == "gpu":
        if 0 < torch.cuda.device_count() < conf.devices:
            problems.append(f"trainer.devices={conf.devices}: torch sees {torch.cuda.device_count()} GPUs here")
        if torch.cuda.is_available():
            return torch.device("cuda", 0)
        problems.append("trainer=gpu: no CUDA GPU is visible to torch here; use trainer=cpu")
    return torch.device("cpu")


def _fields(name: str, file: str | None, arch: dict[str, Any], kind: type) -> dict[str, Any]:
    known = sorted(item.name for item in dataclasses.fields(kind))
    unknown = sorted(set(arch) - set(known))
    if unknown:
        raise ConfigError(f"{name}.arch: unknown {', '.join(unknown)}; allowed are {', '.join(known)}")
    if file is None and not arch:
        raise ConfigError(f"{name}: give {name}.config_file or {name}.arch")
    return {**(model_section(file) if file else {}), **arch}


def _read_model(conf: RunConf, problems: list[str]) -> tuple[GameRFTConfig | None, DCAEConfig | None, float | None]:
    """Shapes of model and decoder, checked against each other; checkpoints only have to exist yet."""
    arch = dcae = vae_scale = None
    model, decoder = conf.model, conf.decoder
    with _collect(problems):
        fields = _fields("model", model.config_file, model.arch, GameRFTConfig)
        arch = gamerft_config(fields, model.config_file or "model.arch")
    with _collect(problems):
        fields = _fields("decoder", decoder.config_file, decoder.arch, DCAEConfig)
        dcae = dcae_config(fields, decoder.config_file or "decoder.arch")
    if arch and dcae:
        with _collect(problems):
            vae_scale = _vae_scale(conf)
    for name, path in (
        ("model.checkpoint", model.checkpoint),
        ("decoder.checkpoint", decoder.checkpoint),
        ("decoder.encoder", decoder.encoder),
    ):
        if path is not None and not Path(path).is_file():
            problems.append(f"{name}={path}: no such file")
    if arch and dcae and (arch.channels, arch.sample_size) != (dcae.latent_channels, dcae.latent_size):
        problems.append(
            f"the model's latents are {arch.channels}×{arch.sample_size}×{arch.sample_size}, the decoder takes "
            f"{dcae.latent_channels}×{dcae.latent_size}×{dcae.latent_size}; use the decoder trained with the model"
        )
    return arch, dcae, vae_scale


def _vae_scale(conf: RunConf) -> float:
    scale = conf.decoder.vae_scale
    for file in (conf.model.config_file, conf.decoder.config_file):
        if scale is None and file is not None:
            scale = read_vae_scale(file)
    if scale is None:
        raise ConfigError("decoder.vae_scale is not given and no config file has train.vae_scale; set it (0.63, say)")
    if not scale > 0:
        raise ConfigError(f"decoder.vae_scale={scale}: must be above 0")
    return scale


def _check_values(conf: RunConf, arch: GameRFTConfig, device: torch.device, problems: list[str]) -> None:
    with _collect(problems):
        sampler_room.validate(conf.sampler)
    with _collect(problems):
        compile_room.validate(conf.compile, device)
    with _collect(problems):
        linears_room.validate(conf.compile, device)
    with _collect(problems):
        check_attention(conf.attention.kind, device, arch.head_dim)
    with _collect(problems):
        data_conf.validate(conf.data)
    with _collect(problems):
        kv_room.validate(conf.kv, head_dim=arch.head_dim)
    with _collect(problems):
        if conf.quant.enabled:
            with torch.device("meta"):
                core = GameRFTCore(arch).to(torch.bfloat16)
            check_mx(core, conf.quant, device)
        else:
            mx_conf.validate(conf.quant)
    with _collect(problems):
        calib_conf.validate(conf.calib)
    if conf.calib.enabled and not conf.quant.enabled:
        problems.append(f"calib={conf.calib.method} chooses MX weights, and quant=bf16 has none; use calib=none")
    with _collect(problems):
        stability_room.validate(conf.stability)
    with _collect(problems):
        drift_room.validate(conf.drift)
    with _collect(problems):
        if conf.gates.enabled:
            gates_room.validate(conf.gates)
    if conf.gates.enabled and not conf.gates.implied and conf.is_baseline:
        problems.append("gates judge a candidate, and quant=bf16 kv=bf16 is the baseline; use gates=none")
    sources = {"data": conf.data.source} | ({"calib.clips": conf.calib.clips.source} if conf.calib.enabled else {})
    if not (conf.decoder.encoder or conf.decoder.checkpoint):
        problems += [
            f"{name}.source=clips: recorded frames must be encoded; give decoder.encoder"
            for name, source in sources.items()
            if source == data_conf.Source.clips
        ]
    if (missing := missing_logger(conf.logger.get("_target_", ""))) is not None:
        problems.append(missing)
    problems += [
        f"measure.{name}={value}: must be at least {least}"
        for name, value, least in (
            ("warmup_frames", conf.measure.warmup_frames, 1),
            ("skip_frames", conf.measure.skip_frames, 0),
            ("parts_frames", conf.measure.parts_frames, 0),
            ("numerics_rows", conf.measure.numerics_rows, 0),
        )
        if value < least
    ]
    if conf.threads is not None and conf.threads < 1:
        problems.append(f"threads={conf.threads}: must be at least 1, or null for torch's own choice")


register()  # on import: a launcher's worker imports this module, but does not run the command
