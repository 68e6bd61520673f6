"""Training the world model: rectified flow with per-frame times, then the sampler's own two steps on its own rollouts."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from harness.kv import KVCache, KVConf
from harness.models.gamerft import GameRFTConfig, GameRFTCore
from harness.rollout import Rollout, SamplerConf
from scripts.doom_world.attention import StreamAttention
from scripts.doom_world.autoencoder import TimedModule
from scripts.doom_world.bank import SequenceBank


def layer_windows(core: GameRFTCore, window: int) -> list[int]:
    """Frames each layer attends to when the sampler's window is ``window``."""
    return [min(window, core.layer_window(i) or window) for i in range(core.cfg.n_layers)]


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
        self._compiled: nn.Module | None = None

    def trainable(self) -> list[nn.Parameter]:
        """The model, not its average."""
        return list(self.core.parameters())

    def velocity(self, x: Tensor, t: Tensor, mouse: Tensor, btn: Tensor, streams: int) -> Tensor:
        """Velocity of ``x [B, streams*N, C, S, S]`` at ``t [B, streams*N]``; controls ``[B, N, …]`` repeat per stream."""
        frames = x.shape[1] // streams
        if streams not in self._attention:
            windows = layer_windows(self.core, self.sampler.window)
            tokens = self.core.cfg.tokens_per_frame
            self._attention[streams] = StreamAttention(windows, frames, tokens, streams, x.device)
        mouse, btn = mouse.repeat(1, streams, 1), btn.repeat(1, streams, 1)
        position = torch.arange(frames, device=x.device).repeat(streams)
        return self._forward(x, t, mouse, btn, position, self._attention[streams])

    def _forward(
        self, x: Tensor, t: Tensor, mouse: Tensor, btn: Tensor, position: Tensor, attend: StreamAttention
    ) -> Tensor:
        core = self.core
        if self._compiled is None:

            def run(x: Tensor, t: Tensor, mouse: Tensor, btn: Tensor, position: Tensor) -> Tensor:
                modulation = core.modulation(core.conditioning(t, mouse, btn))
                return core.denoise(x, modulation, core.rotary(position), attend)

            self._compiled = torch.compile(run, dynamic=False) if x.is_cuda else run  # type: ignore[assignment]
        assert self._compiled is not None
        return self._compiled(x, t, mouse, btn, position).float()

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
        self.report(loss=error.mean(), loss_t1=error[t == 1].mean())
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
                _, velocities = roll.next_frame(noise[:, i], mouse[:, i], btn[:, i], return_velocities=True)
                states[:, i] = noise[:, i] - (first - middle) * velocities[0].float()
        self.pool = list(zip(*(part.split(self.batch) for part in (x0, mouse, btn, noise, states)), strict=True))

    def _rollout(self, batch: int) -> Rollout:
        core = copy.deepcopy(self.ema.module).to(torch.bfloat16).eval().requires_grad_(False)
        if self._roll is None:
            cfg: GameRFTConfig = core.cfg
            cache = KVCache(
                layers=cfg.n_layers,
                batch=batch,
                heads=cfg.n_heads,
                head_dim=cfg.head_dim,
                tokens=cfg.tokens_per_frame,
                windows=layer_windows(core, self.sampler.window),
                conf=KVConf(),
                dtype=torch.bfloat16,
                device=self.device,
            )
            self._roll = Rollout(core, cache, self.sampler)
        else:
            self._roll.core.load_state_dict(core.state_dict())
        return self._roll

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """One two-stream step: context and step 2 in the first stream, step 1 in the second."""
        if not self.pool:
            self.collect()
        x0, mouse, btn, noise, states = self.pool.pop()
        first, middle = self.sampler.timesteps
        frames = x0.shape[1]
        t = torch.cat((torch.full_like(x0[:, :, 0, 0, 0], middle), torch.full_like(x0[:, :, 0, 0, 0], first)), dim=1)
        v = self.velocity(torch.cat((states, noise), dim=1), t, mouse, btn, streams=2)
        refined, guess = states - middle * v[:, :frames], noise - first * v[:, frames:]
        window = self.sampler.window
        step1 = (guess - x0)[:, window // 2 :].square().mean()
        step2 = (refined - x0)[:, window // 2 :].square().mean()
        own = (refined - x0)[:, window:].square().mean()
        self.report(every=50, step1=step1, step2=step2, generated=own)
        return step1 + 2 * step2
