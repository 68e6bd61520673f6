"""From the words of a command line to an engine and a session."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from harness.ab.recorder import arm_labels
from harness.config import RunPlan, plan_run
from harness.config.compose import choices_of, compose
from harness.config.play import PlayConf, PlayRunConf, register_play, validate
from harness.session.engine import Engine
from harness.session.session import Session


def plan_play(words: Sequence[str]) -> tuple[RunPlan, dict[str, str]]:
    """The checked config of play from Hydra's words, such as ``model=doom quant=mxfp4_mlp``; nothing is loaded.

    Returns:
        The plan, and what to call each arm.

    Raises:
        ValueError: listing every word that names nothing, or everything in the config that cannot be.
    """
    register_play()
    cfg = compose(*words, name="play")
    plan = plan_run(cfg)
    validate(play_conf(plan).play)
    return plan, arm_labels(plan, choices_of(cfg))


def load_play(words: Sequence[str]) -> tuple[Engine, PlayConf, dict[str, str]]:
    """The engine of :func:`open_engine` with the config of play, and what to call each arm."""
    plan, labels = plan_play(words)
    conf = play_conf(plan).play
    return Engine(plan, keep=conf.keep_decoded), conf, labels


def play_conf(plan: RunPlan) -> PlayRunConf:
    """The config of a plan that :func:`plan_play` made."""
    return cast(PlayRunConf, plan.conf)


def open_engine(*words: str, arms: Sequence[str] | None = None) -> Engine:
    """Load a model by the words that a run takes: groups (``quant``, ``kv``, ``attention``, ``compile`` …) and fields.

    Args:
        words: as on the command line of a run; the config is ``conf/play.yaml``.
        arms: which of ``bf16`` and ``candidate`` to load; both by default, if ``quant`` or ``kv`` ask for a candidate.

    Raises:
        ValueError: if the config cannot run here or its files do not fit.
    """
    plan, _ = plan_play(words)
    return Engine(plan, arms, play_conf(plan).play.keep_decoded)


def open_session(*words: str, arm: str | None = None, batch: int | None = None) -> Session:
    """:func:`open_engine`, and a session of its own; see :class:`Session`."""
    return Session(open_engine(*words), arm, batch)
