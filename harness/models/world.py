"""What the rest of the package asks of a world model, whatever its family.

A family is a folder or a file of this room: a config, a :class:`WorldModel`, and how its checkpoints are read. Formats,
packing, rollout and benchmarks take a model's Linears from :attr:`WorldModel.block_linears` and know none by name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.models.attention import BlockCausalAttention, LayerAttend

OTHER = "other"
"""Category of a Linear in a block that the model does not describe."""


@dataclass(frozen=True)
class LinearSpec:
    """What a Linear of every transformer block is.

    Attributes:
        name: within its block, such as ``mlp.fc1``.
        category: by which a config chooses it: ``mlp``, ``attn`` or ``modulation``.
        activation: the module, within the block, that takes all of its output, and that alone; None = none does.
        per_frame: it reads one row per frame and step and not one per token, the same in every layer: so those of all
            layers can be one product.
        final: in the last block nothing but the output head comes after it to absorb its error.
    """

    name: str
    category: str
    activation: str | None = None
    per_frame: bool = False
    final: bool = False


class BlockLinear(NamedTuple):
    """A module of a block, at a place where the block has a Linear: ``path`` is its name in the model."""

    path: str
    layer: int
    spec: LinearSpec
    module: nn.Module


class WorldConfig(Protocol):
    """Sizes of a world model: layers, heads, tokens and latents of a frame, controls."""

    @property
    def n_layers(self) -> int: ...  # noqa: D102
    @property
    def n_heads(self) -> int: ...  # noqa: D102
    @property
    def head_dim(self) -> int: ...  # noqa: D102
    @property
    def d_model(self) -> int: ...  # noqa: D102
    @property
    def tokens_per_frame(self) -> int: ...  # noqa: D102
    @property
    def channels(self) -> int: ...  # noqa: D102
    @property
    def sample_size(self) -> int: ...  # noqa: D102
    @property
    def n_mouse_axes(self) -> int: ...  # noqa: D102
    @property
    def n_buttons(self) -> int: ...  # noqa: D102
    @property
    def uncond(self) -> bool: ...  # noqa: D102


FrameModulation = Any
"""Conditioning vectors of all layers and N rows, frames or steps of one: a family's own kind of object.

Its ``frames(start, stop)`` gives rows ``start:stop``; nobody else looks inside."""


class WorldModel(nn.Module, ABC):
    """A velocity model of latents ``[B, N, C, S, S]``, N frames of S·S tokens, through transformer blocks.

    ``blocks_path``: name of the list of blocks in the model. ``block_linears``: the Linears that each of them has.
    ``block_parts``: parts of a frame that are modules of a block, by what a record calls them.
    ``t_embed(t [B, N]) -> [B, N, D]`` embeds noise levels; ``rotary(frames [N]) -> (cos, sin)`` gives the angles,
    float32 ``[N*P, Dh/2]``, of absolute frame indices.
    """

    blocks_path: ClassVar[str]
    block_linears: ClassVar[tuple[LinearSpec, ...]]
    block_parts: ClassVar[dict[str, str]]
    cfg: WorldConfig
    t_embed: nn.Module
    rotary: nn.Module

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The transformer blocks, first to last."""
        return list(self.get_submodule(self.blocks_path).children())

    def linears(self) -> Iterator[BlockLinear]:
        """What stands in the place of every block's Linears, block by block, of whatever kind it is by now."""
        for layer, block in enumerate(self.blocks):
            for spec in self.block_linears:
                path = f"{self.blocks_path}.{layer}.{spec.name}"
                yield BlockLinear(path, layer, spec, block.get_submodule(spec.name))

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """What it computes in."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where its weights are."""

    @abstractmethod
    def layer_window(self, layer: int) -> int | None:
        """Frames that ``layer`` sees, the current one included; None = no limit."""

    @abstractmethod
    def add_controls(self, cond: Tensor, mouse: Tensor | None = None, btn: Tensor | None = None) -> Tensor:
        """Conditioning ``[B, N, D]`` from the times' embedding and the controls of N frames."""

    def conditioning(self, t: Tensor, mouse: Tensor | None = None, btn: Tensor | None = None) -> Tensor:
        """Embed time ``t [B, N]`` and controls ``mouse [B, N, 2]``, ``btn [B, N, n_buttons]`` to ``[B, N, D]``."""
        return self.add_controls(self.t_embed(t), mouse, btn)

    @abstractmethod
    def modulation_linears(self) -> list[nn.Module]:
        """Every Linear that reads ``silu(cond)``, those of all layers and of the output, in a fixed order."""

    @abstractmethod
    def modulation_of(self, outputs: Sequence[Tensor]) -> FrameModulation:
        """The conditioning vectors from what :meth:`modulation_linears` give, in their order."""

    def modulation(self, cond: Tensor) -> FrameModulation:
        """Every block's and the output's conditioning vectors from ``cond [B, N, D]``."""
        silu = F.silu(cond)
        return self.modulation_of([linear(silu) for linear in self.modulation_linears()])

    @abstractmethod
    def denoise(self, x: Tensor, mod: FrameModulation, rotary: tuple[Tensor, Tensor], attend: LayerAttend) -> Tensor:
        """Velocity of noisy latents ``x [B, N, C, S, S]``."""

    @abstractmethod
    def full_attention(self) -> BlockCausalAttention:
        """The masked attention of a full pass over this model's layers."""


def find_world(model: nn.Module) -> tuple[str, WorldModel] | None:
    """The world model that ``model`` is or holds, and the prefix of its names there (``""`` or such as ``core.``)."""
    for name, module in model.named_modules():
        if isinstance(module, WorldModel):
            return (f"{name}." if name else ""), module
    return None
