"""Watches the arms for instabilities, and decides what each one means for the run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from omegaconf import OmegaConf
from torch import Tensor

from harness.ab.arm import Arm, Rolled
from harness.ab.fallback import Fallback, fallbacks
from harness.config import RunPlan
from harness.data.conf import BUTTON_NAMES
from harness.data.datamodule import ClipBatch
from harness.measure.conf import RUN_ENDED, OnInstability
from harness.measure.stability import NON_FINITE, Incident, InstabilityError, Signs, detect
from harness.report.sections import FallbackRecord, IncidentRecord

MOVES = [BUTTON_NAMES.index(name) for name in "WASD"]
ADVICE = "Check clip and checkpoint with quant=bf16 kv=bf16; if BF16 is clean, narrow quant.scope."
Noise = tuple[Tensor, Tensor]


class Guard:
    """Finds the incidents of each batch, keeps them for the record, and says what the candidate falls back to.

    Args:
        plan: the run; ``on_instability`` and the bounds of ``stability``.

    ``incidents``: all so far. ``taken``: fallbacks so far, as dicts for the record.
    """

    def __init__(self, plan: RunPlan) -> None:
        self.plan, self.policy = plan, plan.conf.on_instability
        self.incidents: list[Incident] = []
        self.taken: list[dict[str, Any]] = []
        self._left = fallbacks(plan.conf.quant, plan.conf.kv, plan.arch.n_layers)

    @property
    def patient(self) -> bool:
        """Whether a rollout goes on after NaN or Inf in a clip: the batch's other clips are still wanted."""
        return self.policy is OnInstability["record"]

    @property
    def fallback(self) -> str | None:
        """The fallback that is in force."""
        return self.taken[-1]["step"] if self.taken else None

    def take_over(self, incidents: list[IncidentRecord], fallbacks: list[FallbackRecord]) -> Fallback | None:
        """Go on from what another process, or an earlier run, met. Returns what the candidate must be rebuilt with."""
        self.incidents += [Incident(**asdict(incident)) for incident in incidents]
        self.taken += [asdict(fallback) for fallback in fallbacks]
        found = None
        for _ in fallbacks:
            found = self._left.pop(0)
        return found

    def check_finite(self, name: str, arm: Arm, rolled: Rolled, batch: ClipBatch, noise: Noise) -> None:
        """Raise ``InstabilityError`` at once where NaN or Inf end the run: in BF16 always."""
        if rolled.non_finite and (name == "bf16" or self.policy is OnInstability["raise"]):
            self._raise(self._non_finite(name, arm, rolled, batch, noise)[0])

    def note_baseline(self, rolled: Rolled, batch: ClipBatch, clips: int, recording: Sequence[Signs] | None) -> None:
        """Record what the BF16 arm does that the recording does not."""
        for clip in range(clips):
            reference = None if recording is None else recording[clip]
            self.incidents += self._visible("bf16", rolled, batch, clip, reference)

    def settle(
        self,
        arm: Arm,
        rolled: dict[str, Rolled],
        batch: ClipBatch,
        clips: int,
        noise: Noise,
        recording: Sequence[Signs] | None,
    ) -> Fallback | None:
        """Judge the candidate's rollout of the first ``clips`` clips of a batch against BF16's, or the recording's.

        Returns:
            What to rebuild the candidate with before it rolls the batch again; ``None`` to keep what it rolled.

        Raises:
            InstabilityError: if it is unstable and the run ends with that, or there is nothing left to fall back to.
        """
        ours = rolled["candidate"]
        found = self._non_finite("candidate", arm, ours, batch, noise)
        for clip in range(clips):
            if clip not in ours.non_finite:
                reference = None if recording is None else recording[clip]
                if "bf16" in rolled:
                    reference = rolled["bf16"].signs(clip)
                found += self._visible("candidate", ours, batch, clip, reference)
        lost = self._lost()
        # After BF16 itself was lost in a clip, what the candidate shows there proves nothing of it.
        idle = [one for one in found if one.kind != NON_FINITE and one.frame >= lost.get(one.clip, one.frame + 1)]
        own = [one for one in found if one not in idle]
        if not own or self.policy is OnInstability["record"]:
            self.incidents += found
            return None
        if self.policy is OnInstability["raise"] or not self._left:
            self._raise(own[0])
        fallback = self._left.pop(0)
        self.incidents += [replace(one, action=f"fallback: {fallback.step}") for one in own]
        formats = {
            name: OmegaConf.to_container(OmegaConf.structured(conf), enum_to_str=True)
            for name, conf in (("quant", fallback.quant), ("kv", fallback.kv))
        }
        self.taken.append({"step": fallback.step, "clip": own[0].clip, "frame": own[0].frame, **formats})
        return fallback

    def _lost(self) -> dict[str, int]:
        """The first frame, by clip, in which BF16 itself was black, frozen or without its structure."""
        lost: dict[str, int] = {}
        for one in self.incidents:
            if one.arm == "bf16" and one.kind != NON_FINITE:
                lost[one.clip] = min(one.frame, lost.get(one.clip, one.frame))
        return lost

    def _raise(self, incident: Incident) -> None:
        incident = replace(incident, action=RUN_ENDED)
        self.incidents.append(incident)
        raise InstabilityError(incident)

    def _non_finite(self, name: str, arm: Arm, rolled: Rolled, batch: ClipBatch, noise: Noise) -> list[Incident]:
        incidents: list[Incident] = []
        for clip, frame in rolled.non_finite.items():
            if batch.clip_ids[clip] in [incident.clip for incident in incidents]:
                continue  # a short batch repeats its last clip
            layer = None if clip in rolled.in_pictures else arm.locate_non_finite(batch, noise, frame)
            where = f"first in {layer}" if layer else "no layer shows it in an eager pass of that frame"
            if clip in rolled.in_pictures:
                where = "in the decoder's picture of finite latents"
            text = (
                f"arm {name}: clip {batch.clip_ids[clip]} has NaN or Inf in generated frame {frame} (0 = first after "
                f"the context), {where}. {ADVICE}"
            )
            incidents.append(Incident(NON_FINITE, name, batch.clip_ids[clip], frame, text, layer))
        return incidents

    def _visible(
        self, name: str, rolled: Rolled, batch: ClipBatch, clip: int, reference: Signs | None
    ) -> list[Incident]:
        window = self.plan.conf.sampler.window
        mouse, btn = batch.mouse[clip, window:], batch.btn[clip, window:]
        moving = (mouse.ne(0).any(1) | btn[:, MOVES].ne(0).any(1)).cpu()
        found = detect(
            rolled.signs(clip),
            moving,
            self.plan.conf.stability,
            reference,
            same_model=name == "candidate" and "bf16" in self.plan.arm_names,
        )
        clip_id = batch.clip_ids[clip]
        return [
            Incident(kind, name, clip_id, frame, f"arm {name}: clip {clip_id} has {seen} from generated frame {frame}")
            for kind, frame, seen in found
        ]
