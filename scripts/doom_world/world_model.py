"""Training the world model: rectified flow with per-frame times, then the sampler's two steps as it takes them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from doom_world.adversarial import PatchJudge, PyramidJudge, balanced, judge_loss, realism_loss
from doom_world.attention import StreamAttention
from doom_world.autoencoder import TimedModule
from doom_world.bank import SequenceBank
from doom_world.muon import StackedMuon
from harness.kv import KVConf
from harness.models.bf16 import has_fast_bf16
from harness.models.gamerft import GameRFTCore
from harness.rollout.sampler import Rollout, SamplerConf, make_cache


class WorldModelTask(TimedModule):
    """Common to all phases: the model, its average, and one pass over a sequence laid out in streams."""

    automatic_optimization = False  # two optimisers

    def __init__(
        self, core: GameRFTCore, bank: SequenceBank, sampler: SamplerConf, seconds: float, batch: int, lr: float
    ) -> None:
        super().__init__(seconds, lr)
        self.core = core.requires_grad_(True).train()
        self.ema = self.make_ema(self.core)
        self.bank, self.sampler, self.batch = bank, sampler, batch
        self._attention: dict[int, StreamAttention] = {}
        self._share_layers()

    def _share_layers(self) -> None:
        """Compile one block per kind of layer instead of one per layer.

        Blocks are told apart only by the index they hand to attention, which picks the window: give every global
        layer the first global layer's index, every local layer the first local one's.
        """
        first: dict[int | None, int] = {}
        for layer, block in enumerate(self.core.blocks):
            block.attn.layer = first.setdefault(self.core.layer_window(layer), layer)
            if torch.cuda.is_available():
                block.compile(dynamic=False)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:  # type: ignore[override]
        """Muon for the blocks' matrices, with updates of AdamW's size; AdamW for the rest."""
        matrices = [p for block in self.core.blocks for p in block.parameters() if p.ndim == 2]
        taken = {id(p) for p in matrices}
        rest = [p for p in self.core.parameters() if id(p) not in taken]
        muon = StackedMuon(matrices, lr=2 * self.lr, weight_decay=0.01)
        return [muon, torch.optim.AdamW(rest, lr=self.lr, betas=(0.9, 0.95), weight_decay=0.01)]

    def loss(self) -> Tensor:
        """This phase's loss on a batch it draws."""
        raise NotImplementedError

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        """One step of the model."""
        self.manual_step(self.optimizers(), self.loss(), self.core)

    def averaged(self) -> GameRFTCore:
        """The model with averaged weights."""
        core = self.ema.module
        assert isinstance(core, GameRFTCore)
        return core

    def velocity(self, x: Tensor, t: Tensor, mouse: Tensor, btn: Tensor, streams: int) -> Tensor:
        """Velocity of ``x [B, streams*N, C, S, S]`` at ``t [B, streams*N]``; controls ``[B, N, …]`` repeat."""
        frames = x.shape[1] // streams
        if streams not in self._attention:
            limits = [self.core.layer_window(layer) for layer in range(self.core.cfg.n_layers)]
            windows = [min(self.sampler.window, limit or self.sampler.window) for limit in limits]
            tokens = self.core.cfg.tokens_per_frame
            self._attention[streams] = StreamAttention(windows, frames, tokens, streams, x.device)
        mouse, btn = mouse.repeat(1, streams, 1), btn.repeat(1, streams, 1)
        position = torch.arange(frames, device=x.device).repeat(streams)
        modulation = self.core.modulation(self.core.conditioning(t, mouse, btn))
        rotary = self.core.rotary(position)
        return self.core.denoise(x, modulation, rotary, self._attention[streams]).float()

    def on_train_batch_end(self, outputs: object, batch: object, batch_idx: int) -> None:
        """Fold the new weights into the average."""
        self.ema.update_parameters(self.core)


class FlowTask(WorldModelTask):
    """Phase 1: rectified flow with an independent time per frame.

    A quarter of the frames sit at each of the sampler's own times (pure noise, and the context's noise level); the
    rest are uniform.
    """

    def loss(self) -> Tensor:
        """Squared error of the velocity on random sequences."""
        x0, mouse, btn = self.bank.sample(self.batch)
        t = torch.rand(x0.shape[:2], device=x0.device)
        choice = torch.rand_like(t)
        t = torch.where(choice < 0.25, 1.0, torch.where(choice < 0.6, self.sampler.context_noise, t))
        noise = torch.randn_like(x0)
        level = t[:, :, None, None, None]
        v = self.velocity((1 - level) * x0 + level * noise, t, mouse, btn, streams=1)
        error = (v - (noise - x0)).square().mean((2, 3, 4))
        start = (t == 1).float()
        self.report(loss=error.mean(), loss_t1=(error * start).sum() / start.sum())
        return error.mean()


Batch = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""Latents, mouse, buttons, noise, and the states at the middle timestep: context and inputs of step 2."""


class ForcedTask(WorldModelTask):
    """Phase 2: the sampler's two steps, after recorded frames.

    Where flow sees frames at any mix of times, this sees what the sampler sees: a context at the context's noise
    level, each next frame from pure noise. Sequences are ``window + horizon`` frames long.
    """

    def __init__(
        self, core: GameRFTCore, bank: SequenceBank, sampler: SamplerConf, seconds: float, batch: int, lr: float
    ) -> None:
        super().__init__(core, bank, sampler, seconds, batch, lr)
        if len(sampler.timesteps) != 2:
            raise ValueError(f"these phases train two-step samplers, given timesteps {sampler.timesteps}")

    def draw(self) -> Batch:
        """A batch of recorded sequences, noised to the middle timestep."""
        x0, mouse, btn = self.bank.sample(self.batch)
        noise, middle = torch.randn_like(x0), self.sampler.timesteps[1]
        return x0, mouse, btn, noise, x0 * (1 - middle) + noise * middle

    def estimates(self) -> tuple[Tensor, Tensor, Tensor]:
        """Recorded latents and both steps' estimates of them, ``[B, N, C, S, S]``: ``(x0, step 1, step 2)``.

        One two-stream pass: context and step 2 in the first stream, step 1 in the second.
        """
        x0, mouse, btn, noise, states = self.draw()
        return x0, *self.both_steps(mouse, btn, noise, states)

    def both_steps(self, mouse: Tensor, btn: Tensor, noise: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        """The two steps' estimates of the latents, ``[B, N, C, S, S]``, from one two-stream pass."""
        first, middle = self.sampler.timesteps
        frames = states.shape[1]
        t = states.new_tensor([middle, first]).repeat_interleave(frames).expand(len(states), -1)
        v = self.velocity(torch.cat((states, noise), dim=1), t, mouse, btn, streams=2)
        return noise - first * v[:, frames:], states - middle * v[:, :frames]

    def regression(self, x0: Tensor, step1: Tensor, step2: Tensor) -> Tensor:
        """Squared error of both steps, over frames with at least half a window behind them."""
        judged = slice(self.sampler.window // 2, None)
        error1, error2 = ((step - x0)[:, judged].square().mean() for step in (step1, step2))
        own1, own2 = ((step - x0)[:, self.sampler.window :].square().mean() for step in (step1, step2))
        self.report(every=50, step1=error1, step2=error2, generated1=own1, generated2=own2)
        return error1 + 2 * error2

    def loss(self) -> Tensor:
        """Regression to the recording."""
        return self.regression(*self.estimates())


class UnrollTask(ForcedTask):
    """Phase 2 with every frame of the context imagined: all frames of a sequence are sampled at once, several times.

    Each round replaces all states but the first few frames' by those that step 1 reaches from the round before. After k
    rounds a frame's ancestors were imagined k deep, so the whole context is as worn as after k frames of a rollout, yet
    the recording is still near enough to be asked for. Rounds cost a third of a training pass, a rollout many.

    Args:
        rounds: the most; each batch draws its own number from 0 on.
    """

    def __init__(self, *args: Any, rounds: int = 3, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rounds = rounds

    def draw(self) -> Batch:
        """A batch of recorded sequences with the states that the model reaches by itself."""
        x0, mouse, btn, noise, recorded = super().draw()
        first, middle = self.sampler.timesteps
        frames, states = x0.shape[1], recorded
        known = int(torch.randint(1, self.sampler.window // 2 + 1, ()))
        is_known = (torch.arange(frames, device=x0.device) < known)[:, None, None, None]
        # weights cast without gradients must not be kept for the pass with gradients
        fast = has_fast_bf16(x0.device)
        with torch.no_grad(), torch.autocast(x0.device.type, torch.bfloat16, fast, cache_enabled=False):
            for _ in range(int(torch.randint(self.rounds + 1, ()))):
                step1, _ = self.both_steps(mouse, btn, noise, states)
                reached = noise + (first - middle) / first * (step1 - noise)
                states = torch.where(is_known, recorded, reached)
        return x0, mouse, btn, noise, states


class RolloutTask(ForcedTask):
    """Phase 3: the same on states from the sampler's own rollouts.

    Every ``refresh`` steps the averaged model rolls ``batch * refresh`` sequences out with the harness's own sampler
    and cache. Each training pass then sees the states that rollout met (its noised context, its step-2 inputs) and is
    asked for the recorded frames: errors the model makes become errors it learns to undo. The first ``window``
    frames are recorded ones.
    """

    def __init__(self, *args: Any, refresh: int = 4, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.refresh = refresh
        self.pool: list[Batch] = []

    def draw(self) -> Batch:
        """A batch the model has rolled out."""
        if not self.pool:
            self.collect()
        return self.pool.pop()

    @torch.no_grad()
    def collect(self) -> None:
        """Roll the averaged model out and keep what it met."""
        x0, mouse, btn = self.bank.sample(self.batch * self.refresh)
        window, (first, middle) = self.sampler.window, self.sampler.timesteps
        noise = torch.randn_like(x0)
        states = x0 * (1 - middle) + noise * middle  # the generated frames' are replaced below
        history = slice(0, window)
        roll = self._rollout(len(x0))
        with torch.autocast(x0.device.type, enabled=False):
            roll.prefill(x0[:, history], mouse[:, history], btn[:, history], noise[:, history])
            for i in range(window, x0.shape[1]):
                frame = roll.next_frame_with_velocities(noise[:, i], mouse[:, i], btn[:, i])
                states[:, i] = noise[:, i] - (first - middle) * frame.velocities[0]
        self.pool = list(zip(*(part.split(self.batch) for part in (x0, mouse, btn, noise, states)), strict=True))

    def _rollout(self, batch: int) -> Rollout:
        """A sampler over the averaged model as it is now: made anew, since one keeps what it computed from weights."""
        core = copy.deepcopy(self.averaged()).to(torch.bfloat16).eval().requires_grad_(False)
        return Rollout(core, make_cache(core, self.sampler, KVConf(), batch), self.sampler)


class SharpenTask(RolloutTask):
    """Phase 4: phase 3 beside a discriminator of pairs of successive pictures, for detail that moves rightly.

    Args:
        decode: latents in the model's scale to pictures ``[B, 3, h, w]``; frozen. Recorded and generated latents
            both go through it, so that nobody is blamed for what the autoencoder loses.
        weight: of the adversarial gradient beside the regression's.
        pairs: pictures judged per sequence, each with the one before it.
    """

    def __init__(
        self, *args: Any, decode: Callable[[Tensor], Tensor], weight: float = 0.5, pairs: int = 2, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.decode, self.weight, self.pairs = decode, weight, pairs
        self.judge = PatchJudge(6, [32, 64, 128, 256], [2, 2, 2])

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:  # type: ignore[override]
        """The model's optimisers and one for the discriminator."""
        judge = torch.optim.AdamW(self.judge.parameters(), lr=5e-4, betas=(0.5, 0.95), weight_decay=0.01)
        return [*super().configure_optimizers(), judge]

    def pictures(self, latents: Tensor, index: Tensor) -> Tensor:
        """Frames ``index [B, pairs]`` of ``latents [B, N, …]``, each beside the one before: ``[B*pairs, 6, h, w]``."""
        rows = torch.arange(len(latents), device=latents.device)[:, None]
        chosen = torch.stack((latents[rows, index - 1], latents[rows, index]), dim=2)
        return self.decode(chosen.flatten(0, 2)).float().unflatten(0, (-1, 2)).flatten(1, 2)

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        """One step of the model, then one of the discriminator, on the generated frames."""
        *model_opts, judge_opt = self.optimizers()  # type: ignore[misc, attr-defined]
        x0, step1, step2 = self.estimates()
        window, frames = self.sampler.window, x0.shape[1]
        index = torch.randint(window, frames, (len(x0), self.pairs), device=x0.device)
        with torch.no_grad():
            real = self.pictures(x0, index)
        fake = self.pictures(torch.cat((x0[:, :window], step2[:, window:]), dim=1), index)
        regression, realism = self.regression(x0, step1, step2), realism_loss(self.judge, real, fake)
        last = self.core.proj_out.proj.weight
        self.manual_step(model_opts, balanced(regression, realism, last, self.weight), self.core)
        verdict = judge_loss(self.judge, real, fake, sigma=0.05)
        self.manual_step(judge_opt, verdict, self.judge)
        self.report(every=50, realism=realism, verdict=verdict)


class RoamTask(RolloutTask):
    """Phase 5: long rollouts beside a discriminator, which compares pictures at any time with recorded ones.

    A rollout soon leaves the recording, and regression to it then averages; what a picture far from the start should be
    is a picture of the game that moved as the player asked. So the recording is asked for in the first ``near``
    generated frames alone, and the discriminator sees pairs of successive pictures and the controls between them, early
    and late.

    Args:
        decode: see :class:`SharpenTask`.
        weight: of the adversarial gradient beside the regression's.
        near: generated frames that are held against the recording.
        span: frames trained on after each window; a rollout gives one early and one late sequence.
    """

    def __init__(
        self,
        *args: Any,
        decode: Callable[[Tensor], Tensor],
        weight: float = 0.5,
        near: int = 5,
        span: int = 8,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.decode, self.weight, self.near, self.span = decode, weight, near, span
        cfg = self.core.cfg
        self.judge = PyramidJudge(6 + cfg.n_mouse_axes + cfg.n_buttons, [32, 64, 128, 256, 256, 256], heads=[1, 3, 4])

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:  # type: ignore[override]
        """The model's optimisers and one for the discriminator."""
        judge = torch.optim.AdamW(self.judge.parameters(), lr=5e-4, betas=(0.5, 0.95), weight_decay=0.01)
        return [*super().configure_optimizers(), judge]

    @torch.no_grad()
    def collect(self) -> None:
        """Roll out, then cut the start of each rollout and a later part of it."""
        super().collect()
        rolled = [torch.cat(part) for part in zip(*self.pool, strict=True)]
        length, frames = self.sampler.window + self.span, rolled[0].shape[1]
        count, device = len(rolled[0]), rolled[0].device
        late = torch.randint(1, frames - length + 1, (count,), device=device)
        order = torch.stack((torch.arange(count, device=device),) * 2, dim=1).flatten()  # early and late take turns
        start = torch.stack((torch.zeros_like(late), late), dim=1).flatten()
        index = start[:, None] + torch.arange(length, device=device)
        cut = [part[order[:, None], index] for part in rolled]
        self.pool = list(zip(*(part.split(self.batch) for part in cut), strict=True))

    def pairs(self, latents: Tensor, controls: Tensor, index: Tensor) -> Tensor:
        """Frame ``index [B]`` beside the one before and its controls ``[B, N, n]``: ``[B, 6 + n, h, w]``."""
        rows = torch.arange(len(latents), device=latents.device)
        chosen = torch.stack((latents[rows, index - 1], latents[rows, index]), dim=1)
        pictures = self.decode(chosen.flatten(0, 1)).float().unflatten(0, (-1, 2)).flatten(1, 2)
        held = controls[rows, index][:, :, None, None].expand(-1, -1, *pictures.shape[2:])
        return torch.cat((pictures, held), dim=1)

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        """One step of the model, then one of the discriminator, on the generated frames."""
        *model_opts, judge_opt = self.optimizers()  # type: ignore[misc, attr-defined]
        x0, mouse, btn, noise, states = self.draw()
        step1, step2 = self.both_steps(mouse, btn, noise, states)
        window, frames = self.sampler.window, x0.shape[1]
        early = slice(0, None, 2)
        known = slice(0, window + self.near)
        regression = self.regression(*(part[early, known] for part in (x0, step1, step2)))
        index = torch.randint(window, frames, (len(x0),), device=x0.device)
        controls = torch.cat((mouse, btn), dim=2)
        with torch.no_grad():
            real = self.pairs(x0, controls, index)
        fake = self.pairs(step2, controls, index)
        realism = realism_loss(self.judge, real, fake)
        last = self.core.proj_out.proj.weight
        self.manual_step(model_opts, balanced(regression, realism, last, self.weight), self.core)
        verdict = judge_loss(self.judge, real, fake, sigma=0.05)
        self.manual_step(judge_opt, verdict, self.judge)
        sharp = [x.detach()[1::2, 3:6].diff(dim=3).abs().mean() for x in (fake, real)]
        self.report(every=50, realism=realism, verdict=verdict, late_sharpness=sharp[0] / sharp[1])
