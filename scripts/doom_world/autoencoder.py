"""Training the DCAE: L1 and gradient loss on pixels, unit-variance latents, noise on the latent."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.optim.swa_utils import AveragedModel

from doom_world.adversarial import PatchJudge, balanced, judge_loss, realism_loss
from harness.models.bf16 import has_fast_bf16
from harness.models.dcae import DCAEConfig, DCAEDecoder, DCAEEncoder


def time_cosine(elapsed: float, budget: float, warmup: float = 0.02, floor: float = 0.02) -> float:
    """Learning-rate factor after ``elapsed`` of ``budget`` seconds: linear warm-up, then a half cosine to ``floor``."""
    done = min(elapsed / budget, 1.0)
    if done < warmup:
        return done / warmup
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))


class TimedModule(LightningModule):
    """Trains for a budget of seconds, its learning rate following the clock, with an EMA of the weights.

    The clock starts after the third step, so that compilation costs no schedule.
    """

    def __init__(self, seconds: float, lr: float, ema_decay: float = 0.999) -> None:
        super().__init__()
        self.seconds, self.lr, self.ema_decay = seconds, lr, ema_decay
        self.started: float | None = None
        self.steps = 0

    def make_ema(self, module: nn.Module) -> AveragedModel:
        """An exponential moving average of ``module``'s weights."""

        def average(averaged: Any, current: Any, _: object) -> None:
            decay = min(self.ema_decay, (1 + self.steps) / (10 + self.steps))  # short memory while everything moves
            torch._foreach_lerp_(averaged, current, 1 - decay)

        return AveragedModel(module, multi_avg_fn=average)

    def trainable(self) -> list[nn.Parameter]:
        """The parameters to optimise; overridden where not all are."""
        return [p for p in self.parameters() if p.requires_grad]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW on :meth:`trainable`."""
        return torch.optim.AdamW(self.trainable(), lr=self.lr, betas=(0.9, 0.95), weight_decay=0.01)

    def on_train_batch_start(self, batch: object, batch_idx: int) -> int | None:
        """Set the learning rate by the clock; end the fit when the budget is spent."""
        self.steps += 1
        if self.steps == 4:
            self.started = time.monotonic()
        elapsed = time.monotonic() - self.started if self.started else 0.0
        if elapsed > self.seconds:
            self.trainer.should_stop = True
            return -1
        for optimizer in self.trainer.optimizers:
            for group in optimizer.param_groups:
                peak = group.setdefault("peak_lr", group["lr"])
                group["lr"] = peak * max(time_cosine(elapsed, self.seconds), 1e-3)
        return None

    def manual_step(self, optimizers: Any, loss: Tensor, module: nn.Module) -> None:
        """One clipped step of ``module`` by its optimiser or optimisers, for tasks with several."""
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss)
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()

    def report(self, every: int = 200, **values: Tensor) -> None:
        """Print a line of figures now and then."""
        if self.steps % every == 0 or self.steps < 3:
            elapsed = time.monotonic() - self.started if self.started else 0.0
            text = "  ".join(f"{name} {float(value.detach()):.4f}" for name, value in values.items())
            print(f"[{type(self).__name__}] step {self.steps}  {elapsed:.0f} s  {text}", flush=True)


class AutoencoderTask(TimedModule):
    """Fits encoder and decoder on single frames.

    The latent is pushed to zero mean and unit variance per channel, and noised before decoding, so that the decoder
    forgives the world model's small errors.
    """

    def __init__(self, cfg: DCAEConfig, frames: Tensor, seconds: float, batch: int = 256, lr: float = 2e-3) -> None:
        super().__init__(seconds, lr)
        self.encoder, self.decoder = DCAEEncoder(cfg), DCAEDecoder(cfg)
        for module in (self.encoder, self.decoder):
            densify(module)
            for layer in module.modules():
                if isinstance(layer, nn.Conv2d):
                    weight_norm(layer)
        self.ema = self.make_ema(nn.ModuleDict({"encoder": self.encoder, "decoder": self.decoder}))
        self.frames, self.batch = frames, batch
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def trainable(self) -> list[nn.Parameter]:
        """Encoder and decoder, not their average."""
        return [*self.encoder.parameters(), *self.decoder.parameters()]

    def reconstruct(self) -> tuple[Tensor, Tensor, Tensor]:
        """Random frames, their clean latents and their decoding from noised ones."""
        index = torch.randint(len(self.frames), (self.batch,), device=self.frames.device)
        x = (self.frames[index].float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        z = self.encoder(x).float()
        sigma = 0.15 * torch.rand(len(z), 1, 1, 1, device=z.device)
        return x, z, self.decoder(z + sigma * torch.randn_like(z)).float()

    def pixel_loss(self, x: Tensor, y: Tensor) -> Tensor:
        """L1, L2 and the L1 of image gradients."""
        error = y - x
        edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        self.report(psnr=-10 * torch.log10((error / 2).square().mean()), edges=edges)
        return error.abs().mean() + 2 * error.square().mean() + 0.5 * edges

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
        """One step on random frames."""
        x, z, y = self.reconstruct()
        mean, var = z.mean((0, 2, 3)), z.var((0, 2, 3))
        return self.pixel_loss(x, y) + 0.05 * (mean.square() + (var - 1).square()).mean()

    def on_train_batch_end(self, outputs: object, batch: object, batch_idx: int) -> None:
        """Fold the new weights into the average."""
        self.ema.update_parameters(nn.ModuleDict({"encoder": self.encoder, "decoder": self.decoder}))


class DecoderTask(AutoencoderTask):
    """Fits the decoder on beside a discriminator of pictures; the encoder, and so the latents, stay as they are.

    Args:
        encoder, decoder: state dicts as :class:`AutoencoderTask` saves them.
        weight: of the adversarial gradient beside the regression's.
    """

    automatic_optimization = False

    def __init__(self, *args: Any, encoder: dict, decoder: dict, weight: float = 0.5, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.encoder.load_state_dict(encoder)
        self.decoder.load_state_dict(decoder)
        self.encoder.requires_grad_(False)
        self.ema = self.make_ema(nn.ModuleDict({"encoder": self.encoder, "decoder": self.decoder}))
        self.judge = PatchJudge(3, [32, 64, 128, 256], [2, 2, 2])
        self.weight = weight

    def trainable(self) -> list[nn.Parameter]:
        """The decoder alone."""
        return list(self.decoder.parameters())

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:  # type: ignore[override]
        """One optimiser for the decoder, one for the discriminator."""
        judge = torch.optim.AdamW(self.judge.parameters(), lr=self.lr, betas=(0.5, 0.95), weight_decay=0.01)
        return [super().configure_optimizers(), judge]

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        """One step of the decoder, then one of the discriminator."""
        decoder_opt, judge_opt = self.optimizers()  # type: ignore[misc, attr-defined]
        x, _, y = self.reconstruct()
        regression, realism = self.pixel_loss(x, y), realism_loss(self.judge, x, y)
        last: Any = self.decoder.conv_out.parametrizations.weight.original1  # type: ignore[union-attr]
        self.manual_step(decoder_opt, balanced(regression, realism, last, self.weight), self.decoder)
        verdict = judge_loss(self.judge, x, y, sigma=0.05)
        self.manual_step(judge_opt, verdict, self.judge)
        self.report(realism=realism, verdict=verdict)


def load_shallower(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Load the weights of an autoencoder half with fewer blocks: the blocks it lacks begin as nearly the identity.

    Raises:
        ValueError: if ``state`` holds what ``module`` has no place for, or lacks more than residual blocks.
    """
    missing, unexpected = module.load_state_dict(state, strict=False)
    strange = [*unexpected, *(name for name in missing if not name.startswith("blocks."))]
    if strange:
        raise ValueError(f"not a shallower half of this autoencoder: {', '.join(strange[:4])}")
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name in missing and name.endswith("conv3.parametrizations.weight.original0"):
                parameter.mul_(0.01)  # not 0, at which the weight norm's gain has no gradient


class DeepenTask(AutoencoderTask):
    """Fits a deeper encoder and decoder on from a shallower pair, its latents held near the old ones.

    So a world model of the old latents needs little to learn the new ones.

    Args:
        encoder, decoder: state dicts of the shallower pair as :class:`AutoencoderTask` saves them.
        anchor: the shallower encoder.
        pull: weight of the squared distance from its latents.
    """

    def __init__(
        self, *args: Any, encoder: dict, decoder: dict, anchor: nn.Module, pull: float = 0.02, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        load_shallower(self.encoder, encoder)
        load_shallower(self.decoder, decoder)
        self.ema = self.make_ema(nn.ModuleDict({"encoder": self.encoder, "decoder": self.decoder}))
        self.anchor, self.pull = anchor.requires_grad_(False), pull

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
        """One step on random frames."""
        x, z, y = self.reconstruct()
        with torch.no_grad():
            old = self.anchor(x).float()
        away = (z - old).square().mean()
        self.report(away=away)
        return self.pixel_loss(x, y) + 0.02 * z.mean((0, 2, 3)).square().mean() + self.pull * away


@torch.no_grad()
def encode_all(encoder: nn.Module, frames: Tensor, batch: int = 512) -> Tensor:
    """Latents of every frame, ``[T, Cz, s, s]`` BF16; ``frames`` uint8 ``[T, 3, h, w]``."""
    out = []
    for chunk in frames.split(batch):
        x = (chunk.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        with torch.autocast(frames.device.type, torch.bfloat16, has_fast_bf16(frames.device)):
            out.append(encoder(x).to(torch.bfloat16))
    return torch.cat(out)


@torch.no_grad()
def reconstruction_psnr(encoder: nn.Module, decoder: nn.Module, frames: Tensor) -> float:
    """Mean PSNR in dB of decoded against recorded frames (clamped, data range 1)."""
    z = encode_all(encoder, frames).float()
    rgb = torch.cat([decoder(part) for part in z.split(64)])
    error = ((rgb.float() + 1) / 2).clamp(0, 1) - frames.float() / 255
    return float((-10 * torch.log10(error.square().mean((1, 2, 3)).clamp_min(1e-10))).mean())


class DenseGroups(nn.Conv2d):
    """A grouped convolution computed as a dense one with a block-diagonal weight.

    More arithmetic, far less time: grouped BF16 convolutions miss the GPU's matrix units. Training took 1.6 s a step
    with grouped ones. Same parameters, same result.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, ch_in, h, w]`` to ``[B, ch_out, h, w]``."""
        groups = self.groups
        weight = self.weight.unflatten(0, (groups, -1))  # group, out, in, 3, 3
        eye = torch.eye(groups, device=weight.device, dtype=weight.dtype)
        dense = torch.einsum("goikl,gh->gohikl", weight, eye).flatten(2, 3).flatten(0, 1)
        return nn.functional.conv2d(x, dense, self.bias, padding=self.padding)


def densify(module: nn.Module) -> nn.Module:
    """Make every grouped convolution of ``module`` a :class:`DenseGroups`, in place; before weight norm is applied.

    On a CPU, where grouped ones are the faster, this does nothing.
    """
    if not torch.cuda.is_available():
        return module
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d) and layer.groups > 1:
            layer.__class__ = DenseGroups
    return module
