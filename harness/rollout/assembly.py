"""Where a rollout is put together: model, MX Linears, packing, cache, compilation, warm-up, and the decoder beside it.

Whatever rolls out, an arm of an A/B run, a session someone plays, a benchmark, is assembled here, in the one order that
works: MX Linears before anything packs or widens what is left of them, the cache before what is compiled over it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from harness.kv import KVCache, KVConf
from harness.measure.memory import AllocationMeter, module_bytes
from harness.models.bf16 import widen
from harness.models.checkpoint import load_decoder, load_gamerft, random_decoder, random_gamerft
from harness.models.dcae import DCAEConfig, DCAEDecoder
from harness.models.gamerft import GameRFTConfig, GameRFTCore
from harness.models.world import WorldModel
from harness.mx.conf import MXConf
from harness.mx.transform import TransformSummary, apply_mx
from harness.mx.weights import WeightSource
from harness.rollout.conf import AttentionKind, CompileConf, DecoderGroups, SamplerConf
from harness.rollout.decoder import FrameDecoder
from harness.rollout.linears import pack_where_faster
from harness.rollout.sampler import Rollout, Warmup, make_cache


@dataclass(frozen=True)
class RolloutSetup:
    """What rollouts that are to be compared have in common.

    Attributes:
        batch: clips B that are rolled out at once.
        sampler: window, timesteps and context noise.
        attention: how a frame attends to its window.
        compile: how a frame runs.
        warmup_frames: frames run on zeros before the first that counts.
    """

    batch: int
    sampler: SamplerConf
    attention: AttentionKind = AttentionKind.sdpa
    compile: CompileConf = field(default_factory=CompileConf)
    warmup_frames: int = 2


@dataclass(frozen=True)
class Assembled:
    """A rollout that is warm and waits for its first prefill.

    Attributes:
        rollout: the sampler.
        summary: what was transformed to MX.
        packed: how many BF16 Linears our own kernel multiplies.
        warmup: what compiling and capturing took.
        allocated_bytes: what the CUDA allocator handed out for cache, buffers and captured graph, by the end of the
            warm-up; None on a CPU.
    """

    rollout: Rollout
    summary: TransformSummary
    packed: int
    warmup: Warmup
    allocated_bytes: int | None

    @property
    def core(self) -> WorldModel:
        """The model, in its formats."""
        return self.rollout.core

    @property
    def cache(self) -> KVCache:
        """Its rings of K and V."""
        return self.rollout.cache

    @property
    def weight_bytes(self) -> int:
        """Weights as stored, packed formats included."""
        return module_bytes(self.core)


@dataclass(frozen=True)
class Prepared:
    """A rollout over weights in their formats, for which threads compile kernels; see :class:`Assembled`.

    Several that are to stand side by side are all prepared before the first is warmed up.
    """

    rollout: Rollout
    summary: TransformSummary
    packed: int
    allocated_bytes: int | None
    warmup_frames: int

    def warm(self) -> Assembled:
        """Warm it up."""
        meter, before = AllocationMeter(self.rollout.core.device), self.allocated_bytes
        warmup, taken = self.rollout.warmup(self.warmup_frames), meter.taken()
        allocated = None if before is None or taken is None else before + taken
        return Assembled(self.rollout, self.summary, self.packed, warmup, allocated)


def assemble(
    core: WorldModel, quant: MXConf, kv: KVConf, setup: RolloutSetup, source: WeightSource | None = None
) -> Assembled:
    """Put a rollout of ``core`` together, and warm it up; arguments and errors are those of :func:`prepare`."""
    return prepare(core, quant, kv, setup, source).warm()


def prepare(
    core: WorldModel, quant: MXConf, kv: KVConf, setup: RolloutSetup, source: WeightSource | None = None
) -> Prepared:
    """Put a rollout of ``core`` together, and have its kernels compiled meanwhile.

    Args:
        core: a BF16 model on the device it will run on; owned and changed from now on.
        quant: formats of its Linears.
        kv: formats of its cache.
        setup: everything else.
        source: who chooses the blocks of MX Linears; None rounds to nearest.

    Raises:
        ValueError: if the formats do not fit the model, or the kernel or the setup the device.
    """
    summary, packed = put_into_formats(core, quant, setup, source)
    meter = AllocationMeter(core.device)
    rollout = _rollout(core, kv, setup)
    rollout.rehearse()
    return Prepared(rollout, summary, packed, meter.taken(), setup.warmup_frames)


def put_into_formats(
    core: WorldModel, quant: MXConf, setup: RolloutSetup, source: WeightSource | None = None
) -> tuple[TransformSummary, int]:
    """The beginning of :func:`prepare`: the weights, in place; returns what is MX and how many Linears are packed."""
    summary = apply_mx(core, quant, source)
    packed = pack_where_faster(core, setup.compile, setup.attention, setup.batch)
    widen(core)
    return summary, packed


def warm_rollout(core: WorldModel, kv: KVConf, setup: RolloutSetup) -> tuple[Rollout, Warmup]:
    """The rest of :func:`assemble`: a cache and a rollout over weights in their formats, which several may share."""
    rollout = _rollout(core, kv, setup)
    return rollout, rollout.warmup(setup.warmup_frames)


def _rollout(core: WorldModel, kv: KVConf, setup: RolloutSetup) -> Rollout:
    cache = make_cache(core, setup.sampler, kv, setup.batch)
    return Rollout(core, cache, setup.sampler, setup.attention, setup.compile)


def load_core(
    arch: GameRFTConfig, checkpoint: str | Path | None, seed: int, device: torch.device, weights: str | None = None
) -> GameRFTCore:
    """The model in BF16 on ``device``: of ``checkpoint`` (its set ``weights``), or with random weights of ``seed``.

    Raises :class:`~harness.models.checkpoint.CheckpointError` if the checkpoint cannot be read or does not fit.
    """
    core = load_gamerft(checkpoint, arch, weights) if checkpoint else random_gamerft(arch, seed, device)
    return core.to(device, torch.bfloat16)


class LatentDecoder:
    """The model's latents ``[B, C, S, S]`` to RGB ``[B, 3, h, w]`` in [-1, 1], in ``dtype``.

    Args:
        decoder: on its device; owned and changed from now on.
        vae_scale: its latents are this times the model's.
        dtype: what it computes in.
        compile: as for the rollout.
        groups: see :class:`DecoderGroups`.
    """

    def __init__(
        self,
        decoder: DCAEDecoder,
        vae_scale: float,
        dtype: torch.dtype,
        compile: CompileConf,
        groups: DecoderGroups = DecoderGroups.auto,
    ) -> None:
        self.dtype, self._decode = dtype, FrameDecoder(decoder.to(dtype), compile, groups, vae_scale)

    def __call__(self, latent: Tensor) -> Tensor:
        """Decode; valid until the next call. The first call chooses, compiles and captures."""
        return self._decode(latent)

    @property
    def groups(self) -> dict[str, int]:
        """Groups in which each grouped convolution runs; known after the first call."""
        return self._decode.groups

    def weights(self) -> dict[str, Tensor]:
        """What it decodes with, by name."""
        return dict(self._decode.decoder.state_dict())

    @torch.inference_mode()
    def warmup(self, latent: Tensor) -> float:
        """Decode latents like ``latent`` until no later call pays for it; returns the seconds that took."""
        start = time.perf_counter()
        for _ in range(2):
            self(latent).cpu()
        return time.perf_counter() - start


def load_dcae(cfg: DCAEConfig, checkpoint: str | Path | None, seed: int, device: torch.device) -> DCAEDecoder:
    """The decoder on ``device``: of ``checkpoint``, or with random weights of ``seed``. Raises as :func:`load_core`."""
    decoder = load_decoder(checkpoint, cfg) if checkpoint else random_decoder(cfg, seed, device)
    return decoder.to(device)
