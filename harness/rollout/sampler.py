"""Rolling a world model out: prefill a window of frames, then denoise one new frame at a time against the cache."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from harness.kernels.cuda import nvrtc
from harness.kernels.cuda.inputs import InputCopies
from harness.kernels.rehearsal import finish, rehearsal
from harness.kv import KVCache, KVConf
from harness.models.gamerft import GameRFTCore
from harness.models.world import FrameModulation, WorldModel
from harness.rollout.attention import PrefillAttention, check_attention
from harness.rollout.compile import (
    CapturedGraph,
    CompileCounters,
    begin_frame,
    compile_function,
    keep_in_place,
    without_grad,
)
from harness.rollout.compile import validate as validate_compile
from harness.rollout.conditioning import FrameConditioning, conditioning_unfit
from harness.rollout.conf import AttentionKind, CompileConf, SamplerConf
from harness.rollout.modulation import StackedModulation
from harness.rollout.prefill import fits as prefill_fits
from harness.rollout.prefill import prefill_fused
from harness.rollout.steps import Rotary, Step, make_step

Prepare = Callable[[Tensor, Tensor], tuple[list[FrameModulation], Rotary]]
"""``prepare(mouse, btn) -> (each step's modulation, rotary)``: begins a frame in the cache."""

NO_CONTROLS = "this model is conditioned on controls: pass mouse and btn"


def validate(conf: SamplerConf) -> None:
    """Raise ``ValueError`` naming every field of ``conf`` that is out of range."""
    problems = []
    times = list(conf.timesteps)
    if conf.window < 1:
        problems.append(f"window={conf.window}: must be at least 1 frame")
    falling = all(a > b for a, b in pairwise(times))
    if not times or not falling or not 0 < times[-1] <= times[0] <= 1:
        problems.append(f"timesteps={times}: give at least one, falling, each above 0 and at most 1")
    if not 0 <= conf.context_noise <= 1:
        problems.append(f"context_noise={conf.context_noise}: must lie between 0 and 1")
    if problems:
        raise ValueError("sampler config: " + "; ".join(problems))


class Frame(NamedTuple):
    """A new frame: its latent ``[B, C, S, S]`` and each step's velocity, all float32."""

    latent: Tensor
    velocities: tuple[Tensor, ...]


class Warmup(NamedTuple):
    """What :meth:`Rollout.warmup` took: wall time in seconds, graphs compiled, graph breaks, CUDA graph or not."""

    seconds: float
    graphs: int
    graph_breaks: int
    cuda_graph: bool


def make_cache(core: WorldModel, sampler: SamplerConf, conf: KVConf, batch: int) -> KVCache:
    """A cache for ``batch`` clips of ``core``, in its dtype and on its device.

    Layer l keeps R_l frames: the sampler's window, or the layer's own if that is shorter. Raises ``ValueError`` if
    ``conf`` does not fit the model.
    """
    cfg = core.cfg
    limits = [core.layer_window(layer) for layer in range(cfg.n_layers)]
    windows = [sampler.window if limit is None else min(sampler.window, limit) for limit in limits]
    device = core.device
    sizes = (cfg.n_layers, batch, cfg.n_heads, cfg.head_dim, cfg.tokens_per_frame)
    return KVCache(*sizes, windows, conf, core.dtype, device)


class Rollout:
    """The sampler over a model and its cache.

    A frame is: its noise, one evaluation of the model per timestep against the cached window and the frame's own K
    and V, ``x -= (t_i - t_{i+1}) * velocity`` after each, K and V kept at the last. Conditioning and modulation
    depend on time and controls alone and are computed once for all steps. The latent stays float32 between the
    steps and is cast to the model's dtype on the way in, so that BF16 rounds what the model sees, not the state it
    refines. Frame positions keep counting for as long as the rollout lasts; the counter is the cache's.

    Whatever mode the caller is in (gradients on, off, inference mode), everything here runs without gradients, on
    ordinary tensors and fixed buffers: so nothing is compiled twice, and results may be used anywhere.

    Args:
        core: the model, on the device and in the dtype it runs in.
        cache: made for it by :func:`make_cache`.
        sampler: timesteps, window and noise level of the history.
        attention: how a frame attends to its window.
        compile: compile the steps, capture the frame.

    Raises:
        ValueError: if a config is out of range, or does not fit the device.
    """

    def __init__(
        self,
        core: WorldModel,
        cache: KVCache,
        sampler: SamplerConf,
        attention: AttentionKind = AttentionKind.sdpa,
        compile: CompileConf | None = None,
    ) -> None:
        self.compile = CompileConf() if compile is None else compile
        validate(sampler)
        validate_compile(self.compile, cache.device)
        check_attention(attention, cache.device, core.cfg.head_dim)
        self.core, self.cache, self.sampler, self.attention = core, cache, sampler, attention
        self.cuda_graph = self.compile.captures(cache.device)
        keep_in_place(cache.buffers(), self.compile)
        fused = self.compile.enabled and attention is AttentionKind.fused
        self._layers = core if fused and prefill_fits(core) else None
        """Whose layers prefill runs by our kernels; None: as the model itself does."""
        self._modulate = StackedModulation(core) if self.compile.enabled else core.modulation
        self._make_buffers()
        parts = (core, cache, attention, self.compile, self._modulate, self._embedded_times)
        self.conditioning_unfit = conditioning_unfit(*parts)
        """Why a frame does not begin by kernels of ours alone; None: it does."""
        self._prepare = self._make_prepare()
        self._steps = self._make_steps()
        self._append_step: Step | None = None
        self.graph: CapturedGraph[Frame] | None = None
        """The captured frame, once warm, where frames are captured."""
        self._copies: InputCopies | None = None
        self._prefilled = self._rehearsed = False

    def _make_buffers(self) -> None:
        cfg, batch, device = self.core.cfg, self.cache.batch, self.cache.device
        times = [*self.sampler.timesteps, 0.0]
        with torch.inference_mode(False):  # buffers outlive the mode they are made in
            self._noise = torch.zeros(batch, cfg.channels, cfg.sample_size, cfg.sample_size, device=device)
            self._mouse = torch.zeros(batch, cfg.n_mouse_axes, device=device)
            self._btn = torch.zeros(batch, cfg.n_buttons, device=device)
            # Of the steps' times, which are every frame's: embedded once.
            embed = without_grad(self.core.t_embed)
            self._embedded_times = embed(torch.tensor(times[:-1], device=device).repeat(batch, 1))
            drops = [a - b for a, b in pairwise(times)]
            self._drops = [torch.tensor(drop, device=device) for drop in drops]

    def _make_prepare(self) -> Prepare:
        core, cache, embedded, steps = self.core, self.cache, self._embedded_times, len(self._drops)
        modulate = self._modulate
        if self.conditioning_unfit is None:
            assert isinstance(core, GameRFTCore)
            assert isinstance(modulate, StackedModulation)
            return FrameConditioning(core, cache, modulate, embedded)

        def prepare(mouse: Tensor, btn: Tensor) -> tuple[list[FrameModulation], Rotary]:
            cache.advance()
            mouse, btn = (x[:, None].expand(-1, steps, -1) for x in (mouse, btn))
            modulation = modulate(core.add_controls(embedded, mouse, btn))
            return [modulation.frames(i, i + 1) for i in range(steps)], core.rotary(cache.frame)

        return compile_function(prepare, self.compile, tune=False)

    def _make_steps(self) -> list[Step]:
        parts = (self.core, self.cache, self.attention)
        last = make_step(*parts, store=True, conf=self.compile)
        if len(self._drops) == 1 or self.cache.store_is_free:
            return [last] * len(self._drops)  # where nothing is left to store, all steps are the same code
        earlier = make_step(*parts, store=False, conf=self.compile)
        return [earlier] * (len(self._drops) - 1) + [last]

    def _frame(self) -> Frame:
        """One whole frame from the input buffers; waits for nothing, so it can be captured."""
        begin_frame(self.compile)
        modulations, rotary = self._prepare(self._mouse, self._btn)
        x, velocities = self._noise, []
        for step, modulation, drop in zip(self._steps, modulations, self._drops, strict=True):
            x, velocity = step(x, modulation, rotary, drop)
            velocities.append(velocity)
        return Frame(x, tuple(velocities))

    @without_grad
    def rehearse(self) -> None:
        """Have threads compile the kernels of ours that prefill and frames launch, and go on meanwhile.

        Leaves an empty cache behind, as :meth:`warmup` does, which begins with this unless it was done. FlexAttention
        is the compiler's, and cannot be run without it.
        """
        if self._rehearsed or self.cache.device.type != "cuda" or self.attention is AttentionKind.flex:
            return
        self._rehearsed = True
        self._empty()
        with rehearsal():
            self._prefill_zeros()
            self._frame()
        self._empty()

    def _empty(self) -> None:
        for buffer in (self._noise, self._mouse, self._btn):
            buffer.zero_()
        self.cache.reset()
        self._prefilled = False

    @without_grad
    def warmup(self, frames: int = 2) -> Warmup:
        """Compile, capture and run a few frames on zeros, so that no later frame pays for it.

        Leaves an empty cache behind, so call it before :meth:`prefill`. Required before the first frame when a CUDA
        graph is used; otherwise the first frame compiles.
        """
        start, counted = time.perf_counter(), CompileCounters()
        self.rehearse()
        self._empty()
        if self._rehearsed and self.cuda_graph and self.conditioning_unfit is not None:
            self._prepare(self._mouse, self._btn)  # Inductor's part, while threads compile the rest
        if self._layers is not None:
            self._prefill_zeros()  # a player's first frame waits for no compiler
        for _ in range(frames):
            self._frame()
        if self.cuda_graph:
            self.graph = CapturedGraph(self._frame, self.cache.device)
            if nvrtc.unavailable() is None:
                buffers = [self._noise] if self.core.cfg.uncond else [self._noise, self._mouse, self._btn]
                self._copies = InputCopies(buffers)
        finish()
        self._empty()
        if self.cache.device.type == "cuda":
            torch.cuda.synchronize(self.cache.device)
        return Warmup(time.perf_counter() - start, counted.graphs, counted.graph_breaks, self.cuda_graph)

    def _prefill_zeros(self) -> None:
        shape = (self.cache.batch, self.sampler.window)
        history = self._noise.new_zeros(*shape, *self._noise.shape[1:])
        mouse, btn = (x[:, None].expand(*shape, -1) for x in (self._mouse, self._btn))
        self.prefill(history, mouse, btn, history)

    @without_grad
    def prefill(
        self,
        history: Tensor,
        mouse: Tensor | None = None,
        btn: Tensor | None = None,
        noise: Tensor | None = None,
        *,
        first: int = 0,
    ) -> Tensor:
        """Start a rollout from W known frames, which become frames ``first`` … ; any earlier rollout is forgotten.

        Args:
            history: latents ``[B, W, C, S, S]``, oldest first.
            mouse: ``[B, W, 2]``; unconditional models take None.
            btn: ``[B, W, n_buttons]``, likewise.
            noise: noise of the history, of its shape; may be None if ``context_noise`` is 0.
            first: absolute index of the oldest frame: what another rollout has played is taken over in its place.

        Returns:
            The model's velocity of the noised history, ``[B, W, C, S, S]``.

        Raises:
            ValueError: if a shape does not fit the model, the window or the cache's number of clips.
        """
        window = self.sampler.window
        x = self._noised(history, noise, (window,))
        mouse, btn = self._checked_controls(mouse, btn, (window,))
        modulation = self._known_modulation(x, mouse, btn)
        rotary = self.core.rotary(torch.arange(first, first + window, device=self.cache.device))
        if self._layers is not None:
            velocity = prefill_fused(self._layers, self.cache, x, modulation, rotary, first)
        else:
            attend = PrefillAttention(self.cache, self.core.full_attention(), first)
            velocity = self.core.denoise(x, modulation, rotary, attend)
        self._prefilled = True
        return velocity

    @without_grad
    def append(
        self, latent: Tensor, noise: Tensor | None = None, mouse: Tensor | None = None, btn: Tensor | None = None
    ) -> None:
        """Make a known frame the next one, in place of one rolled out: teacher forcing.

        It is noised and evaluated once at the history's noise level, as prefill does, but against the cache, and its
        K and V are kept. Runs eagerly, also where frames are captured.

        Args:
            latent: ``[B, C, S, S]``.
            noise: of its shape; may be None if ``context_noise`` is 0.
            mouse: ``[B, 2]``; unconditional models take None.
            btn: ``[B, n_buttons]``, likewise.

        Raises:
            RuntimeError: before :meth:`prefill`.
            ValueError: if a shape does not fit.
        """
        self._check_prefilled()
        x = self._noised(latent, noise, ())
        mouse, btn = self._checked_controls(mouse, btn, ())
        mouse, btn = (None if control is None else control[:, None] for control in (mouse, btn))
        modulation = self._known_modulation(x[:, None], mouse, btn)
        if self._append_step is None:
            self._append_step = make_step(self.core, self.cache, self.attention, store=True, conf=CompileConf())
        self.cache.advance()
        self._append_step(x, modulation, self.core.rotary(self.cache.frame), self._drops[-1])

    def _noised(self, known: Tensor, noise: Tensor | None, frames: tuple[int, ...]) -> Tensor:
        """Known latents at the history's noise level, float32 on the device."""
        a, device = self.sampler.context_noise, self.cache.device
        if noise is None:
            if a:
                raise ValueError(f"context_noise={a}: prefill needs the history's noise, as append does the frame's")
            noise = torch.zeros_like(known)
        self._check("history", known, (*frames, *self._noise.shape[1:]))
        self._check("noise", noise, (*frames, *self._noise.shape[1:]))
        return known.to(device, torch.float32) * (1 - a) + a * noise.to(device, torch.float32)

    def _known_modulation(self, x: Tensor, mouse: Tensor | None, btn: Tensor | None) -> FrameModulation:
        times = torch.full(x.shape[:2], self.sampler.context_noise, device=self.cache.device)
        return self._modulate(self.core.conditioning(times, mouse, btn))

    @property
    def frame_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of a frame of all clips: its ``latents``, ``mouse`` and ``btn``."""
        buffers = {"latents": self._noise, "mouse": self._mouse, "btn": self._btn}
        return {name: tuple(buffer.shape) for name, buffer in buffers.items()}

    @without_grad
    def saved(self) -> list[Tensor]:
        """A copy of all that the next frames depend on beside the model: the cache and its counters."""
        self._check_prefilled()
        return self.cache.saved()

    @without_grad
    def restore(self, saved: Sequence[Tensor]) -> None:
        """Go back to what :meth:`saved` kept, bit for bit. Raises ``ValueError`` if it is of another cache."""
        self.cache.restore(saved)
        self._prefilled = True

    def next_frame(self, noise: Tensor, mouse: Tensor | None = None, btn: Tensor | None = None) -> Tensor:
        """Roll out one more frame.

        Args:
            noise: ``[B, C, S, S]``.
            mouse: ``[B, 2]``; unconditional models take None.
            btn: ``[B, n_buttons]``, likewise.

        Returns:
            The new latent, float32 ``[B, C, S, S]``.

        Raises:
            RuntimeError: before :meth:`prefill`, or before :meth:`warmup` if a CUDA graph is used.
            ValueError: if a shape does not fit.
        """
        return self._copied([self._next(noise, mouse, btn).latent])[0]

    def next_frame_with_velocities(
        self, noise: Tensor, mouse: Tensor | None = None, btn: Tensor | None = None
    ) -> Frame:
        """:meth:`next_frame` that also returns the velocity of every step, each float32 ``[B, C, S, S]``."""
        frame = self._next(noise, mouse, btn)
        latent, *velocities = self._copied([frame.latent, *frame.velocities])
        return Frame(latent, tuple(velocities))

    @without_grad
    def _copied(self, tensors: list[Tensor]) -> list[Tensor]:
        return [x.clone() for x in tensors]

    def _next(self, noise: Tensor, mouse: Tensor | None, btn: Tensor | None) -> Frame:
        """Where a frame is captured it is on its way before anything that can wait: contexts, copies of its results."""
        self._check_prefilled()
        self._take(noise, mouse, btn)
        if not self.cuda_graph:
            return without_grad(self._frame)()
        if self.graph is None:
            raise RuntimeError("this rollout replays a CUDA graph: call warmup() before prefill() to capture it")
        return self.graph.replay()

    def _take(self, noise: Tensor, mouse: Tensor | None, btn: Tensor | None) -> None:
        """Copy a frame's inputs to where frames read them: in one launch, since a player waits for each.

        On the device, in float32, as its noise is, they take our own kernel, which the host is sooner done with.
        """
        given, buffers = [noise], [self._noise]
        if not self.core.cfg.uncond:
            if mouse is None or btn is None:
                raise ValueError(NO_CONTROLS)
            given, buffers = [noise, mouse, btn], [self._noise, self._mouse, self._btn]
        if self._copies is not None and self._copies(given):
            return
        for name, x, buffer in zip(("noise", "mouse", "btn"), given, buffers, strict=False):
            if x.shape != buffer.shape:
                self._check(name, x, buffer.shape[1:])
        without_grad(torch._foreach_copy_)(buffers, given)

    def _check_prefilled(self) -> None:
        if not self._prefilled:
            raise RuntimeError(
                "no frames to go on from: call prefill() first (after warmup(), which empties the cache)"
            )

    def _checked_controls(
        self, mouse: Tensor | None, btn: Tensor | None, frames: tuple[int, ...]
    ) -> tuple[Tensor | None, Tensor | None]:
        if self.core.cfg.uncond:
            return None, None
        if mouse is None or btn is None:
            raise ValueError(NO_CONTROLS)
        self._check("mouse", mouse, (*frames, self._mouse.shape[1]))
        self._check("btn", btn, (*frames, self._btn.shape[1]))
        return mouse.to(self.cache.device), btn.to(self.cache.device)

    def _check(self, name: str, x: Tensor, shape: tuple[int, ...]) -> None:
        expected = (self.cache.batch, *shape)
        if tuple(x.shape) != expected:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}, this rollout takes {expected} "
                f"({self.cache.batch} clips, window {self.sampler.window})"
            )
