"""Shapes of the models, as their configs give them. Without torch, see ``harness/config/schema.py``."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

MOST_TIMES = 2**20
"""Time positions that an ``ortho`` RoPE may have a table of; rollouts may be longer."""


@dataclass
class GameRFTConfig:
    """Shape of a GameRFT. Field names are those of upstream ``model:`` YAML sections.

    Attributes:
        model_id: a name; nothing depends on it.
        n_layers: transformer blocks, at least 1.
        n_heads: attention heads, at least 1; ``d_model`` must be divisible by it, into heads divisible by 8.
        d_model: width of a token, in numbers.
        channels: of a latent.
        sample_size: side of a latent, in tokens.
        tokens_per_frame: ``sample_size`` squared.
        n_frames: frames of a training sample: only sets the time scale of ``ortho`` RoPE; rollouts may be longer.
        n_buttons: buttons of an action, at least 1.
        n_mouse_axes: of an action: 2.
        local_window: frames that a local layer sees, its own included, at least 1; null = no limit.
        global_window: frames that a global layer sees; null = no limit.
        local_idx: every so many layers one is global, the first among them; at least 1.
        rope_impl: rotary position embedding, ``motion`` or ``ortho``.
        rope_ats_delta: pixels by which ``motion`` RoPE shifts space a frame.
        causal: whether a frame sees earlier frames alone.
        uncond: whether the model ignores the controls.
        cfg_prob: chance of dropping the conditioning in training; accepted, without effect at inference.
        backbone: only ``dit`` is supported.
        has_audio: only false is supported.
    """

    model_id: str = "game_rft"
    n_layers: int = 16
    n_heads: int = 24
    d_model: int = 1536
    channels: int = 128
    sample_size: int = 8
    tokens_per_frame: int = 64
    n_frames: int = 1536
    n_buttons: int = 11
    n_mouse_axes: int = 2
    local_window: int | None = 16
    global_window: int | None = None
    local_idx: int = 4
    rope_impl: str = "motion"
    rope_ats_delta: float = 2.0
    causal: bool = True
    uncond: bool = False
    cfg_prob: float = 0.0
    backbone: str = "dit"
    has_audio: bool = False

    @property
    def head_dim(self) -> int:
        """Size of one attention head."""
        return self.d_model // self.n_heads

    def validate(self) -> None:
        """Raise ``ValueError`` listing every field that describes a model this package cannot build."""
        problems = []
        positive = ("n_layers", "n_heads", "d_model", "channels", "sample_size", "n_frames", "local_idx", "n_buttons")
        problems += [
            f"{name}={getattr(self, name)}: must be at least 1" for name in positive if getattr(self, name) < 1
        ]
        problems += [
            f"{name}={value}: must be at least 1 frame, or null for no limit"
            for name in ("local_window", "global_window")
            if (value := getattr(self, name)) is not None and value < 1
        ]
        if not problems:
            problems = self._shape_problems()
        if self.rope_impl == "ortho" and self.n_frames > MOST_TIMES:
            problems.append(f"n_frames={self.n_frames}: ortho RoPE keeps a table of them, of at most {MOST_TIMES}")
        if self.rope_impl not in ("motion", "ortho"):
            problems.append(f"rope_impl={self.rope_impl!r}: allowed are motion, ortho")
        if self.backbone != "dit":
            problems.append(f"backbone={self.backbone!r}: only dit is supported")
        if self.has_audio:
            problems.append("has_audio=true: audio is not supported; use a video-only checkpoint")
        if self.n_mouse_axes != 2:
            problems.append(f"n_mouse_axes={self.n_mouse_axes}: the mouse embedding takes 2 axes")
        if problems:
            raise ValueError("GameRFT config: " + "; ".join(problems))

    def _shape_problems(self) -> list[str]:
        problems = []
        if self.d_model % self.n_heads:
            problems.append(f"d_model={self.d_model} is not divisible by n_heads={self.n_heads}")
        elif self.head_dim % 8:
            problems.append(f"head size {self.head_dim} (d_model/n_heads) is not divisible by 8, as RoPE needs")
        if self.tokens_per_frame != self.sample_size**2:
            problems.append(f"tokens_per_frame={self.tokens_per_frame} is not sample_size² = {self.sample_size**2}")
        return problems


GROUP_CHANNELS = 16
"""Channels per group of a residual block's 3×3 convolution."""
MOST_STAGES, MOST_BLOCKS = 16, 256
"""Of an autoencoder: far more than any has, and few enough to be made."""


@dataclass
class DCAEConfig:
    """Shape of a DCAE. Field names are those of upstream ``model:`` YAML sections.

    Channels double from ``ch_0`` at the frame to at most ``ch_max`` at the latent, one stage per entry of
    ``*_blocks_per_stage``.

    Attributes:
        model_id: a name; nothing depends on it.
        sample_size: height and width of a frame, in pixels.
        channels: of a frame: 3.
        latent_size: side of a latent, in tokens, at least 1.
        latent_channels: of a latent, at least 1; ``ch_max`` must be a multiple of it.
        ch_0: channels at the frame, at least 1.
        ch_max: the most channels of a stage, at least 1.
        encoder_blocks_per_stage: residual blocks of each stage of the encoder, read from the latent side.
        decoder_blocks_per_stage: the same of the decoder; each stage doubles the side.
        use_middle_block: whether residual blocks follow at the latent's resolution.
    """

    model_id: str = "dcae"
    sample_size: list[int] = field(default_factory=lambda: [360, 640])
    channels: int = 3
    latent_size: int = 8
    latent_channels: int = 128
    ch_0: int = 96
    ch_max: int = 1536
    encoder_blocks_per_stage: list[int] = field(default_factory=lambda: [1, 1, 1, 1, 1, 1])
    decoder_blocks_per_stage: list[int] = field(default_factory=lambda: [1, 1, 1, 1, 1, 1])
    use_middle_block: bool = False

    def widths(self, stages: int) -> list[int]:
        """Output channels of each of ``stages`` stages, from the latent side."""
        return [min(self.ch_0 * 2**i, self.ch_max) for i in reversed(range(stages))]

    @property
    def is_16_9(self) -> bool:
        """Whether frames are 16:9 and so decoded square, then resized."""
        height, width = self.sample_size
        return abs(width / height - 16 / 9) < 0.01

    def _small(self) -> list[str]:
        """Sizes below what there can be of anything, or lists of another length."""
        one = ("channels", "latent_size", "latent_channels", "ch_0", "ch_max")
        problems = [f"{name}={getattr(self, name)}: must be at least 1" for name in one if getattr(self, name) < 1]
        if len(self.sample_size) != 2 or min(self.sample_size) < 1:
            problems.append(f"sample_size={list(self.sample_size)}: give [height, width], each at least 1")
        for name in ("encoder_blocks_per_stage", "decoder_blocks_per_stage"):
            blocks = list(getattr(self, name))
            if not 1 <= len(blocks) <= MOST_STAGES or min(blocks) < 1 or max(blocks) > MOST_BLOCKS:
                problems.append(f"{name}={blocks}: give 1 to {MOST_STAGES} stages, each of 1 to {MOST_BLOCKS} blocks")
        return problems

    def validate(self) -> None:
        """Raise ``ValueError`` listing every field that describes an autoencoder this package cannot build."""
        problems = self._small()
        if problems:
            raise ValueError("DCAE config: " + "; ".join(problems))
        if self.channels != 3:
            problems.append(f"channels={self.channels}: a frame has 3, red, green and blue")
        if self.ch_max % self.latent_channels:
            problems.append(f"ch_max={self.ch_max} is not a multiple of latent_channels={self.latent_channels}")
        widths = [self.ch_max, *self.widths(len(self.decoder_blocks_per_stage))]
        problems += [
            f"a stage from {wide} to {narrow} channels: each stage must halve them or keep them"
            for wide, narrow in pairwise(widths)
            if wide not in (narrow, 2 * narrow)
        ]
        if any(2 * width % GROUP_CHANNELS for width in widths):
            problems.append(f"channels {widths}: twice each must be divisible by {GROUP_CHANNELS}")
        if not problems and not self.is_16_9:
            side = self.latent_size * 2 ** len(self.decoder_blocks_per_stage)
            if list(self.sample_size) != [side, side]:
                problems.append(
                    f"sample_size={list(self.sample_size)}: {len(self.decoder_blocks_per_stage)} stages over latent "
                    f"size {self.latent_size} give {side}×{side}"
                )
        if problems:
            raise ValueError("DCAE config: " + "; ".join(problems))
