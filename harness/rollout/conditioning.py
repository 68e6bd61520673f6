"""A frame's beginning by kernels of ours, of one clip whose layers are launches of ours alone.

Controls through their MLPs, the conditioning of every step, the cache's counter and the frame's rotation are two
launches (``conditioning.cu``); then come the modulation's products. Nothing is left to a compiler, and weights are on
their way before what they wait for is done (:mod:`harness.kernels.launch`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from harness.kernels.cuda import conditioning as kernels
from harness.kernels.cuda import linear as cuda_linear
from harness.kernels.cuda.conditioning import ConditioningShape, ControlWeights, FrameClock
from harness.kernels.cuda.linear import PackedLinear
from harness.kv import KVCache
from harness.models import bf16
from harness.models.embeddings import ButtonEmbedding, ControlEmbedding, MouseEmbedding, frequencies
from harness.models.gamerft import GameRFTCore, Modulation
from harness.models.world import WorldModel
from harness.rollout import steps
from harness.rollout.conf import AttentionKind, CompileConf
from harness.rollout.modulation import PlainProduct, StackedLinears, StackedModulation


def conditioning_unfit(
    core: WorldModel,
    cache: KVCache,
    attention: AttentionKind,
    conf: CompileConf,
    modulate: object,
    embedded: Tensor,
) -> str | None:
    """Why a frame does not begin by :class:`FrameConditioning`, or None: the only place that decides.

    Args:
        core: the model, in its final formats and on its device.
        cache: its cache.
        attention: of a frame.
        conf: how frames run.
        modulate: what makes modulation of conditioning.
        embedded: the steps' times, embedded, ``[B, steps, D]``.
    """
    if not isinstance(modulate, StackedModulation) or not steps.all_stream(core, cache, attention, conf):
        return "not all layers are launches of ours, of one clip in captured frames"
    reason = cuda_linear.unavailable(cache.device)
    if reason is not None:
        return reason
    if type(core) is not GameRFTCore:
        return f"the kernels are GameRFT's, the model is {type(core).__name__}"
    return model_unfit(core, cache, modulate.linears, embedded)


def model_unfit(core: GameRFTCore, cache: KVCache, linears: StackedLinears, embedded: Tensor) -> str | None:
    """Why the kernels cannot take a model's parts, wherever they are, or None."""
    if core.cfg.uncond:
        return "an unconditional model has no controls"
    shape = _shape(core, cache, embedded.shape[1])
    reason = shape.unfit() or kernels.unfit_times(shape, embedded[0])
    reason = reason or _embedding_unfit(core.control_embed, shape) or _clock(core, cache).unfit(shape)
    return reason or _linears_unfit(linears, shape)


def _shape(core: GameRFTCore, cache: KVCache, n_steps: int) -> ConditioningShape:
    return ConditioningShape(core.cfg.d_model, n_steps, core.cfg.n_buttons, cache.tokens, core.cfg.head_dim // 2)


def _embedding_unfit(embed: nn.Module, shape: ConditioningShape) -> str | None:
    """Of the controls' embedding: it is as trained, each Linear plain and BF16."""
    if type(embed) is not ControlEmbedding:
        return f"controls are embedded by {type(embed).__name__}"
    mouse, button = embed.mouse, embed.button
    if type(mouse) is not MouseEmbedding or type(button) is not ButtonEmbedding:
        return f"controls are embedded by {type(mouse).__name__} and {type(button).__name__}"
    for mlp in (mouse.mlp, button.proj):
        if type(mlp.act) is not nn.SiLU:
            return f"the activation of the controls' embedding is {type(mlp.act).__name__}"
    wide = (mouse.mlp.fc1, mouse.mlp.fc2, button.proj.fc1, button.proj.fc2)
    for linear in (mouse.angle_proj, *wide):
        if not bf16.is_plain(linear):
            return f"a Linear of the controls' embedding is a {type(linear).__name__}"
    if mouse.angle_proj.bias is not None or any(linear.bias is None for linear in wide):
        return "Linears of the controls' embedding have biases, and the mouse's direction none"
    return control_weights(embed).unfit(shape)


def control_weights(embed: ControlEmbedding) -> ControlWeights:
    """The weights of the controls' embedding as the kernels take them."""
    mouse, button = embed.mouse.mlp, embed.button.proj
    linears = (mouse.fc1, mouse.fc2, button.fc1, button.fc2)
    pairs = (parameter.detach() for linear in linears for parameter in (linear.weight, linear.bias))
    return ControlWeights(embed.mouse.angle_proj.weight.detach(), *pairs)


def _clock(core: GameRFTCore, cache: KVCache) -> FrameClock:
    base, uses_time, freqs, times, step = core.rotary.tables()
    return FrameClock(cache.frame, cache.slots, times, base, uses_time, freqs, step)


def _linears_unfit(linears: StackedLinears, shape: ConditioningShape) -> str | None:
    """Of the modulation's products: each is plain, or a packed one that reads what it is given."""
    for product, _, _ in linears.products:
        if isinstance(product, PlainProduct):
            reason = kernels.unfit_product(shape, product.weight, product.bias)
            if reason is not None:
                return reason
        elif not isinstance(product, PackedLinear) or steps.rounds_inputs(product):
            return f"a modulation product is a {type(product).__name__}"
    return None


class FrameConditioning:
    """Begins a frame: ``(mouse [1, 2], btn [1, n_buttons]) -> (each step's modulation, rotary)``, both float32.

    The cache advances as by :meth:`KVCache.advance`. For what :func:`conditioning_unfit` finds nothing against.

    Args:
        core: the model.
        cache: its cache.
        modulate: the stacked modulation, whose products are called here.
        embedded: the steps' times, embedded, BF16 ``[1, steps, D]``.
    """

    def __init__(self, core: GameRFTCore, cache: KVCache, modulate: StackedModulation, embedded: Tensor) -> None:
        self.core, self.linears = core, modulate.linears
        self.shape = _shape(core, cache, embedded.shape[1])
        with torch.inference_mode(False):  # what is made here outlives the mode it is made in
            self._embedded = embedded[0]
            self._freqs = frequencies(kernels.FREQUENCIES, cache.device)
            self._clock = _clock(core, cache)
        self._weights = control_weights(core.control_embed)
        if cache.device.type == "cuda":
            torch.cuda.synchronize(cache.device)  # kernels read all of this before what is in front of them has ended

    def __call__(self, mouse: Tensor, btn: Tensor) -> tuple[list[Modulation], tuple[Tensor, Tensor]]:
        """Queue the launches."""
        controls = mouse.view(-1), btn.view(-1)
        hidden, rotary = kernels.begin_frame(self.shape, self._weights, self._freqs, controls, self._clock)
        conditioning = kernels.add_controls(self.shape, self._weights, hidden, self._embedded, self._clock)
        modulation = self.core.modulation_of(self._modulated(conditioning))
        return [modulation.frames(step, step + 1) for step in range(self.shape.steps)], rotary

    def _modulated(self, conditioning: Tensor) -> Sequence[Tensor]:
        """Outputs ``[1, steps, out_features]`` of the modulation's Linears, in their order.

        Plain products, which are few, come first: behind them the others' weights are fetched.
        """
        results: dict[int, Tensor] = {}
        ordered = sorted(self.linears.products, key=lambda each: not isinstance(each[0], PlainProduct))
        for product, members, widths in ordered:
            if isinstance(product, PlainProduct):
                outputs = kernels.plain_product(self.shape, conditioning, product.weight, product.bias)
            else:
                outputs = product(conditioning)
            results.update(zip(members, outputs[None].split(widths, dim=-1), strict=True))
        return [results[i] for i in range(self.linears.count)]
