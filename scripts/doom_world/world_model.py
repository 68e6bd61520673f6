"""Training the world model: rectified flow with per-frame times, then the sampler's two steps on its own rollouts."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from harness.kv import KVConf
from harness.models.gamerft import GameRFTCore
from harness.rollout.sampler import Rollout, SamplerConf, make_cache
from scripts.doom_world.adversarial import PatchJudge, balanced, judge_loss, realism_loss
from scripts.doom_world.attention import StreamAttention
from scripts.doom_world.autoencoder import TimedModule
from scripts.doom_world.bank import SequenceBank


class WorldModelTask(TimedModule):
    """Common to both phases: the model, its average, and one pass over a sequence laid out in streams."""

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

    def trainable(self) -> list[Any]:
        """The model, not its average."""
        return list(self.core.parameters())

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

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """One step on random sequences."""
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


class RolloutTask(WorldModelTask):
    """Phase 2: the sampler's two steps, on states from its own rollouts.

    Every ``refresh`` steps the averaged model rolls ``batch * refresh`` sequences out with the harness's own sampler
    and cache. Each training pass then sees the states that rollout met (its noised context, its step-2 inputs) and is
    asked for the recorded frames: errors the model makes become errors it learns to undo. The first ``history``
    frames are recorded ones, noised to the context's level.

    Args:
        horizon: generated frames per sequence (the bank's sequences are ``window + horizon`` long).
    """

    def __init__(
        self,
        core: GameRFTCore,
        bank: SequenceBank,
        sampler: SamplerConf,
        seconds: float,
        batch: int,
        lr: float,
        refresh: int = 4,
    ) -> None:
        super().__init__(core, bank, sampler, seconds, batch, lr)
        if len(sampler.timesteps) != 2:
            raise ValueError(f"the rollout phase trains two-step samplers, given timesteps {sampler.timesteps}")
        self.refresh = refresh
        self.pool: list[tuple[Tensor, ...]] = []
        self._roll: Rollout | None = None

    @torch.no_grad()
    def collect(self) -> None:
        """Roll the averaged model out and keep what it met."""
        x0, mouse, btn = self.bank.sample(self.batch * self.refresh)
        window, middle = self.sampler.window, self.sampler.timesteps[1]
        noise = torch.randn_like(x0)
        states = x0 * (1 - middle) + noise * middle  # step-2 inputs; the generated frames' are replaced below
        history = slice(0, window)
        roll = self._rollout(len(x0))
        with torch.autocast(x0.device.type, enabled=False):
            roll.prefill(x0[:, history], mouse[:, history], btn[:, history], noise[:, history])
            first = self.sampler.timesteps[0]
            for i in range(window, x0.shape[1]):
                frame = roll.next_frame_with_velocities(noise[:, i], mouse[:, i], btn[:, i])
                states[:, i] = noise[:, i] - (first - middle) * frame.velocities[0]
        self.pool = list(zip(*(part.split(self.batch) for part in (x0, mouse, btn, noise, states)), strict=True))

    def _rollout(self, batch: int) -> Rollout:
        core = copy.deepcopy(self.averaged()).to(torch.bfloat16).eval().requires_grad_(False)
        if self._roll is None:
            cache = make_cache(core, self.sampler, KVConf(), batch)
            self._roll = Rollout(core, cache, self.sampler)
        else:
            self._roll.core.load_state_dict(core.state_dict())
        return self._roll

    def estimates(self) -> tuple[Tensor, Tensor, Tensor]:
        """Recorded latents and both steps' estimates of them, ``[B, N, C, S, S]``: ``(x0, step 1, step 2)``.

        One two-stream pass: context and step 2 in the first stream, step 1 in the second.
        """
        if not self.pool:
            self.collect()
        x0, mouse, btn, noise, states = self.pool.pop()
        first, middle = self.sampler.timesteps
        frames = x0.shape[1]
        t = x0.new_tensor([middle, first]).repeat_interleave(frames).expand(len(x0), -1)
        v = self.velocity(torch.cat((states, noise), dim=1), t, mouse, btn, streams=2)
        return x0, noise - first * v[:, frames:], states - middle * v[:, :frames]

    def regression(self, x0: Tensor, step1: Tensor, step2: Tensor) -> Tensor:
        """Squared error of both steps, over frames with at least half a window behind them."""
        judged = slice(self.sampler.window // 2, None)
        error1, error2 = ((step - x0)[:, judged].square().mean() for step in (step1, step2))
        own = (step2 - x0)[:, self.sampler.window :].square().mean()
        self.report(every=50, step1=error1, step2=error2, generated=own)
        return error1 + 2 * error2

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
        """One step of regression to the recording."""
        return self.regression(*self.estimates())


class SharpenTask(RolloutTask):
    """Phase 3: phase 2 beside a discriminator of pairs of successive latent frames, for detail that moves rightly.

    Args:
        weight: of the adversarial gradient beside the regression's.
    """

    automatic_optimization = False

    def __init__(self, *args: Any, weight: float = 0.5, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.weight = weight
        self.judge = PatchJudge(2 * self.core.cfg.channels, [192] * 5, [1] * 4)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:  # type: ignore[override]
        """One optimiser for the model, one for the discriminator."""
        judge = torch.optim.AdamW(self.judge.parameters(), lr=self.lr, betas=(0.5, 0.95), weight_decay=0.01)
        return [super().configure_optimizers(), judge]

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        """One step of the model, then one of the discriminator, on the generated frames."""
        model_opt, judge_opt = self.optimizers()  # type: ignore[misc, attr-defined]
        x0, step1, step2 = self.estimates()
        window = self.sampler.window
        real, fake = (
            torch.cat((x[:, window - 1 : -1], x[:, window:]), dim=2).flatten(0, 1)
            for x in (x0, torch.cat((x0[:, :window], step2[:, window:]), dim=1))
        )
        regression, realism = self.regression(x0, step1, step2), realism_loss(self.judge, real, fake)
        last = self.core.proj_out.proj.weight
        self.manual_step(model_opt, balanced(regression, realism, last, self.weight), self.core)
        verdict = judge_loss(self.judge, real, fake, sigma=0.1)
        self.manual_step(judge_opt, verdict, self.judge)
        self.report(every=50, realism=realism, verdict=verdict)
