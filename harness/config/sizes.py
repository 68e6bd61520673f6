"""What a run needs at the very least, in bytes, against what there is: known before anything is allocated.

Lower bounds: weights as loaded, caches as stored, pictures and latents as kept. A run that fits may still need more.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from harness.config.schema import RunConf
from harness.models.shapes import DCAEConfig, GameRFTConfig

BF16, FLOAT32 = 2, 4
CLIP_ENTRY_BYTES = 200
"""Of a clip's entry in the list of clips."""
UNITS = ("bytes", "KB", "MB", "GB", "TB", "PB", "EB")


@dataclass(frozen=True)
class Need:
    """What takes ``size`` bytes at the least, and the fields that say so; ``host``: beside the CPU, not on the GPU."""

    what: str
    size: int
    fields: str
    host: bool = False


def bytes_text(size: int) -> str:
    """Bytes in a unit that leaves few digits, however many there are."""
    value, unit = float(min(size, 10**300)), 0
    while value >= 1000 and unit < len(UNITS) - 1:
        value, unit = value / 1000, unit + 1
    return f"{value:.3g} {UNITS[unit]}"


def model_bytes(arch: GameRFTConfig) -> int:
    """BF16 weights of a model: those of its ends, and ``n_layers`` times those of a layer."""
    d, mlp, tokens = arch.d_model, 4, arch.channels
    layer = (4 + 2 * mlp + 6) * d * d  # qkv and out, fc1 and fc2, four modulation Linears of widths 2, 1, 2, 1
    ends = 2 * tokens * d + 2 * d * d + (arch.n_buttons + arch.n_mouse_axes) * d
    return BF16 * (arch.n_layers * layer + ends)


def cache_bytes(arch: GameRFTConfig, window: int, batch: int) -> int:
    """K and V of one BF16 cache."""
    cycle = min(arch.local_idx, arch.n_layers)
    shared, local = (min(window, limit or window) for limit in (arch.global_window, arch.local_window))
    shared_layers = -(-arch.n_layers // cycle) if cycle == arch.local_idx else 1
    frames = shared_layers * shared + (arch.n_layers - shared_layers) * local
    return 2 * BF16 * batch * frames * arch.tokens_per_frame * arch.d_model


def decoder_bytes(dcae: DCAEConfig) -> int:
    """Weights of a decoder in BF16, its 1×1 convolutions alone."""
    widths = dcae.widths(len(dcae.decoder_blocks_per_stage))
    pairs = zip(dcae.decoder_blocks_per_stage, widths, strict=True)
    return BF16 * (sum(blocks * 4 * width * width for blocks, width in pairs) + dcae.latent_channels * dcae.ch_max)


def available(device: torch.device) -> int | None:
    """Bytes free on ``device``; ``None`` where that cannot be told."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    limits = list(_cgroup_room())
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        limits += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    except (OSError, ValueError, IndexError):
        pass
    return min(limits, default=None)


def _cgroup_room() -> Iterator[int]:
    """What a container may still take."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit, used = ((folder / f"memory.{name}").read_text().strip() for name in ("max", "current"))
        if limit.isdigit():
            yield int(limit) - int(used) + _reclaimable(folder)
    except (OSError, ValueError):
        return


def _reclaimable(folder: Path) -> int:
    """Bytes of files in memory, which the system gives up when they are needed."""
    lines = (folder / "memory.stat").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("inactive_file ", "active_file ")))


def size_problems(needs: list[Need], device: torch.device) -> Iterator[str]:
    """One message if ``needs`` exceed what there is on ``device``, or beside the CPU."""
    places = [(device, [need for need in needs if device.type == "cpu" or not need.host])]
    if device.type != "cpu":
        places.append((torch.device("cpu"), [need for need in needs if need.host]))
    for place, there in places:
        total, room = sum(need.size for need in there), available(place)
        if room is not None and total > room:
            largest = sorted((need for need in there if need.size * 100 > total), key=lambda need: -need.size)
            parts = "; ".join(f"{need.what} {bytes_text(need.size)} ({need.fields})" for need in largest)
            name = "this machine's memory" if place.type == "cpu" else f"the GPU {place}"
            yield f"needs at least {bytes_text(total)}, and {name} has {bytes_text(room)} free: {parts}"


def needs_of(conf: RunConf, arch: GameRFTConfig, dcae: DCAEConfig, decoded: int) -> list[Need]:
    """What a run needs; ``decoded``: bytes of a number that the decoder puts out. Every size in it is at least 1."""
    data, window = conf.data, conf.sampler.window
    batch, frames = data.batch_size, data.future_frames
    height, width = dcae.sample_size
    side = dcae.latent_size * 2 ** len(dcae.decoder_blocks_per_stage)
    latent = arch.channels * arch.sample_size**2
    arms = 1 if conf.is_baseline else 2
    clips = data.synthetic_clips if data.source == "synthetic" else 0
    drawn = data.start if data.source == "synthetic" else 0  # a synthetic clip is drawn from its first frame on
    cache = cache_bytes(arch, window, batch)
    return [
        Need("weights of the model", model_bytes(arch), "model.arch: n_layers, d_model, channels, n_buttons"),
        Need("the BF16 arm's KV cache", cache, "sampler.window, data.batch_size, model.arch: n_layers, d_model"),
        Need("weights of the decoder", decoder_bytes(dcae), "decoder.arch: ch_0, ch_max, *_blocks_per_stage"),
        Need("a decoded frame", BF16 * batch * dcae.ch_0 * side**2, "data.batch_size, decoder.arch: ch_0, latent_size"),
        Need(
            "generated pictures of a batch",
            arms * decoded * batch * frames * 3 * height * width,
            "data.future_frames, data.batch_size, decoder.arch.sample_size",
            host=True,
        ),
        Need(
            "latents and noise of a batch",
            FLOAT32 * (2 * batch * (window + frames) + drawn) * latent,
            "sampler.window, data.start, data.future_frames, data.batch_size, model.arch: channels, sample_size",
            host=True,
        ),
        *_needs_of_calibration(conf, latent),
        Need("the list of clips", CLIP_ENTRY_BYTES * clips, "data.synthetic_clips", host=True),
        Need("bootstrap", 8 * conf.gates.resamples * conf.gates.enabled, "gates.resamples", host=True),
    ]


def _needs_of_calibration(conf: RunConf, latent: int) -> Iterator[Need]:
    """What the clips that it learns from take: all of them are held at once."""
    clips, window = conf.calib.clips, conf.sampler.window
    if not conf.calib.enabled:
        return
    synthetic = clips.source == "synthetic"
    held = min(clips.limit or clips.synthetic_clips, clips.synthetic_clips) if synthetic else 1
    frames = held * (window + clips.future_frames) * 2 + (clips.start if synthetic else 0)
    fields = "sampler.window, calib.clips: limit, synthetic_clips, start, future_frames"
    yield Need("latents and noise of the clips to calibrate on", FLOAT32 * frames * latent, fields, host=True)
    if synthetic:
        size = CLIP_ENTRY_BYTES * clips.synthetic_clips
        yield Need("the list of clips to calibrate on", size, "calib.clips.synthetic_clips", host=True)
