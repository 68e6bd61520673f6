"""Every check of a config that needs no weights, before anything large is loaded.

Hydra checks names and types while it composes; :func:`plan_run` then checks values, files, shapes and kernels against
each other.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from harness.calib import conf as calib_conf
from harness.config.exports import differences, read_export
from harness.config.extras import missing_logger
from harness.config.flags import FlagError
from harness.config.places import of_demo, without_demo
from harness.config.problems import ConfigError, collect, unknown
from harness.config.schema import DecoderConf, RunConf, TrainerConf
from harness.config.sizes import needs_of, size_problems
from harness.config.slurm import slurm_problems
from harness.config.values import at_once, value_problems
from harness.data import conf as data_conf
from harness.data.sources import ClipShape
from harness.export.read import Export
from harness.files.writing import why_unwritable
from harness.kv import conf as kv_conf
from harness.measure import conf as measure_conf
from harness.models.config_io import dcae_config, gamerft_config, model_section, read_vae_scale
from harness.models.gamerft import GameRFTCore
from harness.models.shapes import DCAEConfig, GameRFTConfig
from harness.mx import conf as mx_conf
from harness.mx.transform import check_mx
from harness.report import drift as drift_room
from harness.report import gates as gates_room
from harness.rollout import RolloutSetup
from harness.rollout import compile as compile_room
from harness.rollout import decoder as decoder_room
from harness.rollout import linears as linears_room
from harness.rollout import sampler as sampler_room
from harness.rollout.attention import check_attention, check_storage


@dataclass(frozen=True)
class RunPlan:
    """A checked run: its config, the shapes it implies and the device it runs on."""

    conf: RunConf
    arch: GameRFTConfig
    dcae: DCAEConfig
    vae_scale: float
    device: torch.device
    export: Export | None = None
    """The exported checkpoint that the candidate is, where ``model.checkpoint`` is one; its formats are in ``conf``."""

    @property
    def arm_names(self) -> tuple[str, ...]:
        """The arms of the run, in the order they are built."""
        if self.export is not None and self.conf.model.baseline is None:
            return ("candidate",)
        return ("bf16",) if self.conf.is_baseline else ("bf16", "candidate")

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
        """Checkpoint that holds the encoder; ``None`` if there is none, or it is the demo's and the decoder is not."""
        return None if _of_another(self.conf.decoder) else self.conf.decoder.encoder or self.conf.decoder.checkpoint


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
    model, decoder = conf.model, conf.decoder
    files = {
        "model.config_file": model.config_file,
        "model.checkpoint": model.checkpoint,
        "decoder.config_file": decoder.config_file,
        "decoder.checkpoint": decoder.checkpoint,
        "decoder.encoder": decoder.encoder,
        "data.paths": next(filter(of_demo, conf.data.paths), None),
    }
    lacking = without_demo(files)
    if lacking:
        raise ConfigError(lacking)
    problems = list(value_problems(conf))
    device = _device(conf.trainer, problems)
    export = read_export(conf, problems)
    arch, dcae, vae_scale = _read_model(conf, problems)
    if export is not None and arch is not None and arch != export.arch:
        problems.append(f"model.checkpoint={conf.model.checkpoint}: {differences(arch, export.arch)}")
    if arch is not None and dcae is not None:
        _check_values(conf, arch, device, problems)
        with collect(problems):
            decoder_room.validate(conf.decoder.groups, dcae, device, conf.decoder.dtype_on(device))
        if not problems:
            decoded = conf.decoder.dtype_on(device).itemsize
            problems += size_problems(needs_of(conf, arch, dcae, decoded), device)
        if not problems:
            with collect(problems):
                _check_mx(conf, arch, device)
    if problems:
        raise ConfigError("\n".join(problems))
    assert arch is not None
    assert dcae is not None
    assert vae_scale is not None
    return RunPlan(conf, arch, dcae, vae_scale, device, export)


def plan_of(config: Mapping[str, Any]) -> RunPlan:
    """The plan of a run from the config that its record holds; nothing is exported again. Raises as plan_run does."""
    try:
        cfg = OmegaConf.merge(OmegaConf.structured(RunConf), OmegaConf.create({**config, "export": None}))
    except OmegaConfBaseException as error:
        raise ConfigError(f"the record's config: {str(error).splitlines()[0]}") from error
    assert isinstance(cfg, DictConfig)
    return plan_run(cfg)


def _root(error: BaseException) -> BaseException:
    """The flag's own error where a resolver raised one: OmegaConf wraps it twice."""
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, FlagError):
            return inner
        inner = inner.__context__
    key = getattr(error, "full_key", None)
    return ValueError(f"{key + ': ' if key else ''}{str(error).splitlines()[0]}")


def _device(conf: TrainerConf, problems: list[str]) -> torch.device:
    if conf.accelerator not in ("cpu", "gpu"):
        problems.append(f"trainer.accelerator={conf.accelerator}: allowed are cpu, gpu")
    for name in ("devices", "num_nodes"):
        if getattr(conf, name) < 1:
            problems.append(f"trainer.{name}={getattr(conf, name)}: must be at least 1")
    if conf.accelerator == "cpu":
        problems += at_once("trainer.devices", conf.devices)
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
    wrong = [f"{name}.arch.{other}: {unknown('field', other, known)}" for other in sorted(set(arch) - set(known))]
    if wrong:
        raise ConfigError("\n".join(wrong))
    if file is None and not arch:
        raise ConfigError(f"{name}: give {name}.config_file or {name}.arch")
    given = model_section(file) if file else {}
    width = arch.get("d_model")
    if width is not None and given.get("d_model", width) != width:
        raise ConfigError(
            f"{name}.config_file={file} has d_model={str(given['d_model'])[:20]}, {name}.arch d_model={width}: a named "
            f"model (model=smoke, dit_v4, …) brings its own shape; leave model= out, and {name}.arch.d_model, "
            f"or give no {name}.config_file"
        )
    return {**given, **arch}


def _read_model(conf: RunConf, problems: list[str]) -> tuple[GameRFTConfig | None, DCAEConfig | None, float | None]:
    """Shapes of model and decoder, checked against each other; checkpoints only have to exist yet."""
    arch = dcae = vae_scale = None
    model, decoder = conf.model, conf.decoder
    with collect(problems):
        fields = _fields("model", model.config_file, model.arch, GameRFTConfig)
        arch = gamerft_config(fields, model.config_file or "model.arch")
    with collect(problems):
        fields = _fields("decoder", decoder.config_file, decoder.arch, DCAEConfig)
        dcae = dcae_config(fields, decoder.config_file or "decoder.arch")
    if arch and dcae:
        with collect(problems):
            vae_scale = _vae_scale(conf)
    for name, path in (
        ("model.checkpoint", model.checkpoint),
        ("model.baseline", model.baseline),
        ("decoder.checkpoint", decoder.checkpoint),
        ("decoder.encoder", decoder.encoder),
    ):
        if path is not None and not Path(path).is_file():
            kind = "a folder, not a file" if Path(path).is_dir() else "not a regular file"
            problems.append(f"{name}={path}: {kind if Path(path).exists() else 'no such file'}")
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
    with collect(problems):
        sampler_room.validate(conf.sampler)
    with collect(problems):
        compile_room.validate(conf.compile, device)
    with collect(problems):
        linears_room.validate(conf.compile, device)
    with collect(problems):
        check_attention(conf.attention.kind, device, arch.head_dim)
    with collect(problems):
        data_conf.validate(conf.data)
    with collect(problems):
        kv_conf.validate(conf.kv, head_dim=arch.head_dim)
        check_storage(conf.attention.kind, conf.kv, arch.head_dim)
    with collect(problems):
        mx_conf.validate(conf.quant)
    with collect(problems):
        calib_conf.validate(conf.calib)
    if conf.calib.enabled and not conf.quant.enabled:
        problems.append(f"calib={conf.calib.method} chooses MX weights, and quant=bf16 has none; use calib=none")
    with collect(problems):
        measure_conf.validate(conf.stability)
    log = conf.stability.incident_log
    if log is not None and (why := why_unwritable(Path(log))) is not None:
        problems.append(f"stability.incident_log={log}: cannot be written ({why}); name another file, or null")
    with collect(problems):
        drift_room.validate(conf.drift)
    with collect(problems):
        if conf.gates.enabled:
            gates_room.validate(conf.gates)
    if conf.gates.enabled and not conf.gates.implied and conf.is_baseline:
        problems.append("gates judge a candidate, and quant=bf16 kv=bf16 is the baseline; use gates=none")
    problems += _encoder_problems(conf)
    problems += _logger_problems(conf.logger)
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
    problems += _reuse_problems(conf, device)
    if conf.model.weights is not None and conf.model.checkpoint is None:
        problems.append(f"model.weights={conf.model.weights} chooses a set of model.checkpoint, and there is none")
    if conf.resume and conf.overwrite:
        problems.append("resume=true goes on with what is in the folder and overwrite=true removes it: use one of them")
    problems += at_once("threads", conf.threads, null=", or null for torch's own choice")
    problems += slurm_problems(conf.trainer.devices, conf.trainer.num_nodes, os.environ)
    problems += at_once("data.num_workers", conf.data.num_workers, 0)


def _of_another(decoder: DecoderConf) -> bool:
    """Whether the encoder is the demo's, which ``conf/decoder/doom.yaml`` brings, and the decoder is not."""
    return of_demo(decoder.encoder) and not of_demo(decoder.checkpoint)


def _encoder_problems(conf: RunConf) -> Iterator[str]:
    """Whether recorded frames can be encoded, and into the latents that the decoder decodes."""
    decoder = conf.decoder
    sources = {"data": conf.data.source} | ({"calib.clips": conf.calib.clips.source} if conf.calib.enabled else {})
    encoded = [f"{name}.source=clips" for name, source in sources.items() if source == data_conf.Source.clips]
    if not encoded:
        return
    if not (decoder.encoder or decoder.checkpoint):
        yield from (f"{said}: recorded frames must be encoded; give decoder.encoder" for said in encoded)
    elif _of_another(decoder):
        yield (
            f"decoder.encoder={decoder.encoder}: the demo's encoder beside decoder.checkpoint="
            f"{decoder.checkpoint or 'null'}, which is not the demo's: its latents mean something else. Give "
            "decoder.encoder=FILE, the encoder trained with your decoder, or decoder.encoder=null where "
            "decoder.checkpoint has both"
        )


def _reuse_problems(conf: RunConf, device: torch.device) -> Iterator[str]:
    """Why BF16's frames cannot be an earlier run's: what is asked for takes a rollout beside the candidate's."""
    if not conf.measure.reuse_bf16:
        return
    if device.type != "cpu":
        yield "measure.reuse_bf16=true: on a CPU alone; a GPU's runs are for speed, which needs both arms side by side"
    if conf.gates.enabled and conf.gates.asks("speed"):
        yield (
            "measure.reuse_bf16=true and a gate that asks for speed, for which BF16 must be timed beside the "
            "candidate: leave it out by name ('gates.without=[speed]'), or reuse nothing"
        )


def _logger_problems(logger: dict[str, Any]) -> Iterator[str]:
    """Whether there is such a logger, and each argument is one that it has."""
    if not logger:
        return  # a session logs nothing
    target = str(logger.get("_target_", ""))
    if (missing := missing_logger(target)) is not None:
        yield missing
        return
    try:
        module, _, name = target.rpartition(".")
        kind = getattr(importlib.import_module(module), name)
        parameters = inspect.signature(kind).parameters
    except (ImportError, AttributeError, ValueError, TypeError):
        yield f"logger._target_={target}: no such class; choose one of the group: logger=csv"
        return
    if not (isinstance(kind, type) and issubclass(kind, Logger)):  # a config calls nothing else
        yield f"logger._target_={target}: is no logger of Lightning's; choose one of the group: logger=csv"
        return
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    for name in sorted(set(logger) - {"_target_"} - set(parameters)):
        yield f"logger.{name}: {unknown('argument', name, list(parameters))}"


def _check_mx(conf: RunConf, arch: GameRFTConfig, device: torch.device) -> None:
    """Whether the Linears of the model can become MX here; it is built without memory. Raises ``ValueError``."""
    if conf.quant.enabled:
        with torch.device("meta"):
            core = GameRFTCore(arch).to(torch.bfloat16)
        check_mx(core, conf.quant, device)
