"""One denoising step of a frame: as one function, or layer by layer, where layers of one kind share compiled code.

Where all of a layer's Linears are kernels of ours and a frame is one clip's, their norms are in them (see
:func:`through_layer_streamed`), and what lies before the first layer and behind the last is a kernel each.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from harness.kernels.cuda import ends
from harness.kernels.cuda.ends import StepEnds
from harness.kernels.cuda.linear import PackedLinear
from harness.kernels.cuda.shapes import NORM_TILES
from harness.kernels.cuda.stream import Modulating, Stream
from harness.kv import KVCache
from harness.models import bf16
from harness.models.attention import LayerAttend
from harness.models.gamerft import (
    RMS_EPS,
    Block,
    BlockModulation,
    GameRFTCore,
    Modulation,
    gated,
)
from harness.models.world import WorldModel
from harness.rollout.attention import FusedAttention, frame_attention, layer_attention, meeting_of
from harness.rollout.compile import compile_function, keep_in_place
from harness.rollout.conf import AttentionKind, CompileConf
from harness.rollout.fused import ring_view
from harness.rollout.norms import residual_norm

STREAMED: dict[int, int] = {16: 1536, 8: 1536, 4: 1536}
"""Bits of a weight, and the widest model whose layers are faster with their norms in their products' kernels.

At 2560 they were slower, with shared memory full without them."""

Rotary = tuple[Tensor, Tensor]
Step = Callable[[Tensor, Modulation, Rotary, Tensor], tuple[Tensor, Tensor]]
"""``step(x, modulation, rotary, drop) -> (x - drop * velocity, velocity)``, both float32 ``[B, C, S, S]``."""

Layer = Callable[[Block, LayerAttend, Tensor, Tensor, Tensor, BlockModulation, Rotary], tuple[Tensor, Tensor]]


def make_step(core: WorldModel, cache: KVCache, attention: AttentionKind, store: bool, conf: CompileConf) -> Step:
    """A step of ``core`` over ``cache``, compiled as ``conf`` says; ``store``: the last one, whose K and V are kept.

    Raises ``ValueError`` if it is to be compiled layer by layer and the model has none to be cut so.
    """
    if conf.enabled and conf.scope_on(cache.device) == "block":
        if not isinstance(core, GameRFTCore):
            raise ValueError(f"compile.scope=block: {type(core).__name__} is not cut into layers; use scope=frame")
        return _step_by_layers(core, cache, attention, store, conf)
    attend = frame_attention(cache, attention, store)
    if isinstance(attend, FusedAttention):
        keep_in_place([*attend.meeting], conf)

    def step(x: Tensor, modulation: Modulation, rotary: Rotary, drop: Tensor) -> tuple[Tensor, Tensor]:
        velocity = core.denoise(x[:, None], modulation, rotary, attend)[:, 0].float()
        return x - drop * velocity, velocity

    return compile_function(step, conf)


def _through_layer(
    block: Block,
    attend: LayerAttend,
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    mod: BlockModulation,
    rotary: Rotary,
) -> tuple[Tensor, Tensor]:
    """From the middle of one residual sum to that of the next: ``x`` and the MLP's output yet to be gated and added.

    Cut there, the sum ends up in one kernel with the norm of the layer that follows, as if all were compiled as one.
    """
    return block.halves(x + gated(branch, gate), mod, rotary, attend)


def through_layer_fused(
    block: Block,
    attend: LayerAttend,
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    mod: BlockModulation,
    rotary: Rotary,
) -> tuple[Tensor, Tensor]:
    """:func:`_through_layer` with our kernel for each sum and norm."""
    x, normed = residual_norm(x, branch, gate, mod.attn_scale, mod.attn_shift)
    attended = block.attn(normed, rotary, attend)
    x, normed = residual_norm(x, attended, mod.attn_gate, mod.mlp_scale, mod.mlp_shift)
    return x, block.mlp(normed)


def through_layer_streamed(
    block: Block,
    attend: FusedAttention,
    stream: Stream,
    mod: BlockModulation,
    norm: tuple[Tensor, Tensor],
    rotary: Rotary,
) -> Stream:
    """A layer from residual stream to residual stream, of a block that :func:`streams`.

    In four launches, or in five where attention is none of :func:`~harness.rollout.attention.joined`.

    Args:
        block: the layer.
        attend: attention of all layers.
        stream: its norm modulated by the layer's ``attn_scale`` and ``attn_shift``.
        mod: conditioning, of one clip's frame.
        norm: scale and shift of the norm behind the layer.
        rotary: of the frame.
    """
    qkv, out, fc1, fc2 = packed_linears(block)
    attended = attend.streamed(block.attn.layer, qkv, stream, rotary)
    stream = out.added(attended, stream.total, Modulating(mod.attn_gate, mod.mlp_scale, mod.mlp_shift))
    return fc2.added(fc1.normed(stream, RMS_EPS), stream.total, Modulating(mod.mlp_gate, *norm))


def packed_linears(block: Block) -> list[PackedLinear]:
    """Those of ``attn.qkv``, ``attn.out``, ``mlp.fc1`` and ``mlp.fc2`` that are kernels of ours."""
    linears: tuple[nn.Module, ...] = (block.attn.qkv, block.attn.out, block.mlp.fc1, block.mlp.fc2)
    return [linear for linear in linears if isinstance(linear, PackedLinear)]


def streams(block: Block, rows: int) -> bool:
    """Whether ``block`` runs as :func:`through_layer_streamed` for a frame of so many rows: by what its Linears are."""
    ours = packed_linears(block)
    if len(ours) < 4 or any(rounds_inputs(linear) for linear in ours):
        return False
    (_, out, fc1, _), widest = ours, min(STREAMED.get(linear.bits, 0) for linear in ours)
    return fc1.silu and rows <= 8 * NORM_TILES and out.out_features % 16 == 0 and out.out_features <= widest


def _layer_function(block: Block, attention: AttentionKind) -> Layer:
    """Our kernels for sums and norms where attention is ours; but not in front of what quantises their results."""
    rounds = rounds_inputs(block.attn.qkv) or rounds_inputs(block.mlp.fc1)
    return _through_layer if rounds or attention is not AttentionKind.fused else through_layer_fused


def rounds_inputs(linear: nn.Module) -> bool:
    """Whether ``linear`` quantises what it is given, which Inductor does in one kernel with the norm in front."""
    fmt = getattr(linear, "fmt", None)
    return fmt is not None and fmt.activation_element is not None


def _step_by_layers(
    core: GameRFTCore, cache: KVCache, attention: AttentionKind, store: bool, conf: CompileConf
) -> Step:
    def enter(x: Tensor) -> tuple[Tensor, Tensor]:
        tokens = core.embed(x[:, None])
        return tokens, tokens.new_zeros(tokens.shape)

    def leave(
        x: Tensor, tokens: Tensor, branch: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, drop: Tensor
    ) -> tuple[Tensor, Tensor]:
        velocity = core.velocity(tokens + gated(branch, gate), scale, shift)[:, 0].float()
        return x - drop * velocity, velocity

    if all_stream(core, cache, attention, conf):
        return _step_by_streams(core, cache, store)
    first, last = compile_function(enter, conf), compile_function(leave, conf)
    layers: dict[str, Layer] = {}
    calls: list[tuple[Layer, Block, LayerAttend]] = []
    meeting = meeting_of(cache) if attention is AttentionKind.fused else None
    for number, block in enumerate(core.blocks):
        kind = _kind(block, cache, number)
        if kind not in layers:
            function = _layer_function(block, attention)
            ready = conf.captures(cache.device) and function is through_layer_fused and _is_ready(block, cache, number)
            layers[kind] = function if ready else compile_function(function, conf)
        calls.append((layers[kind], block, layer_attention(cache, number, attention, store, meeting)))

    def step(x: Tensor, modulation: Modulation, rotary: Rotary, drop: Tensor) -> tuple[Tensor, Tensor]:
        tokens, branch = first(x)
        gate = modulation.blocks[0].mlp_gate  # of a branch of zeros: nothing comes before the first layer
        for (layer, block, attend), mod in zip(calls, modulation.blocks, strict=True):
            tokens, branch = layer(block, attend, tokens, branch, gate, mod, rotary)
            gate = mod.mlp_gate
        return last(x, tokens, branch, gate, modulation.out_scale, modulation.out_shift, drop)

    return step


def all_stream(core: WorldModel, cache: KVCache, attention: AttentionKind, conf: CompileConf) -> bool:
    """Whether a frame's layers run as :func:`through_layer_streamed`: of one clip, and launches of ours alone."""
    captured = conf.enabled and conf.captures(cache.device) and conf.scope_on(cache.device) == "block"
    if not (captured and cache.batch == 1 and attention is AttentionKind.fused and isinstance(core, GameRFTCore)):
        return False
    blocks = enumerate(core.blocks)
    ready = all(streams(block, cache.tokens) and _is_ready(block, cache, layer) for layer, block in blocks)
    return ready and has_ends(core, cache.tokens)


def has_ends(core: GameRFTCore, tokens: int) -> bool:
    """Whether the kernels at a step's ends are for frames of ``core`` of so many tokens."""
    linears = core.proj_in, core.proj_out.proj
    plain = all(bf16.is_plain(linear) and linear.weight.dtype is torch.bfloat16 for linear in linears)
    return plain and ends.unfit(core.cfg.d_model, core.cfg.channels, tokens) is None


def step_ends(core: GameRFTCore, tokens: int) -> StepEnds:
    """Those of a model that :func:`has_ends`."""
    return StepEnds(core.proj_in, core.proj_out.proj, tokens, RMS_EPS)


def _step_by_streams(core: GameRFTCore, cache: KVCache, store: bool) -> Step:
    attend, both = FusedAttention(cache, store), step_ends(core, cache.tokens)

    def step(x: Tensor, modulation: Modulation, rotary: Rotary, drop: Tensor) -> tuple[Tensor, Tensor]:
        mods = modulation.blocks
        stream = both.enter(x, mods[0].attn_scale, mods[0].attn_shift)
        norms = [(mod.attn_scale, mod.attn_shift) for mod in mods[1:]]
        norms.append((modulation.out_scale, modulation.out_shift))
        for block, mod, norm in zip(core.blocks, mods, norms, strict=True):
            stream = through_layer_streamed(block, attend, stream, mod, norm, rotary)
        return both.leave(stream.total, modulation.out_scale, modulation.out_shift, x, drop)

    return step


def _is_ready(block: Block, cache: KVCache, layer: int) -> bool:
    """Whether a layer with our kernels is nothing but launches, of ours and of libraries.

    A compiler finds nothing to fuse in it then, and in a captured graph its calls from Python cost nothing.
    """
    linears = (block.attn.qkv, block.attn.out, block.mlp.fc1, block.mlp.fc2)
    launches = all(bf16.is_plain(x) or (isinstance(x, PackedLinear) and not rounds_inputs(x)) for x in linears)
    return launches and all(ring_view(ring).stores for ring in cache.rings[layer].values())


def _kind(block: Block, cache: KVCache, layer: int) -> str:
    """Layers of one kind run the same code: Linears of the same formats, and rings of the same size and storage."""
    rings = [(name, ring.format_name, tuple(ring.shape)) for name, ring in cache.rings[layer].items()]
    return f"{block} {rings}"
