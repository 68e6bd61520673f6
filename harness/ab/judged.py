"""Exports what a run judged: at its end, from the arm that rolled out, or later, from its folder.

Later, the candidate is set up again from the run's own config, and must have the very weights that were judged: their
SHA-256 is in the record.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from harness.ab.arms import load_arms
from harness.config import RunPlan, plan_of
from harness.export.layout import ExportError, ExportHeader
from harness.export.write import weights_fingerprint, write_export
from harness.kv import KVConf
from harness.models.world import WorldModel
from harness.mx.conf import MXConf
from harness.report.record import COMPLETE, RunRecord
from harness.report.verdict import Verdict
from harness.rollout.assembly import put_into_formats


def header_of(plan: RunPlan, quant: MXConf, kv: KVConf, record: RunRecord) -> ExportHeader:
    """What an export says of the run that judged it; formats and digests are filled in when it is written."""
    candidate = record.candidate
    return ExportHeader(
        model=asdict(plan.arch),
        vae_scale=plan.vae_scale,
        quant=_plain(quant) | {"kernel": "auto", "list": False},
        kv=_plain(kv),
        sampler=_plain(plan.conf.sampler),
        label="" if candidate is None else candidate.label,
        calibration=_calibration(record),
        verdict=_verdict(record.gates),
        quantization_config={},
    )


def _calibration(record: RunRecord) -> dict[str, Any]:
    """What chose the blocks, without how long it took: the same weights are to be the same file."""
    made = None if record.candidate is None else record.candidate.calibration
    if made is None:
        return {}
    return {name: getattr(made, name) for name in ("method", "clips", "frames", "linears", "fingerprint")}


def _verdict(gates: Verdict | None) -> dict[str, Any]:
    """What was said of the run. Without a gate nothing was, and the file says so."""
    return (
        {"verdict": "none"}
        if gates is None
        else {name: getattr(gates, name) for name in ("title", "verdict", "against")}
    )


def _plain(conf: Any) -> dict[str, Any]:
    found: Any = OmegaConf.to_container(OmegaConf.structured(conf), enum_to_str=True)
    return found


def export_run(record: RunRecord, path: Path) -> ExportHeader:
    """Set the candidate of a finished run up again and write it to ``path``.

    Raises:
        ExportError: if the run is not complete, had no MX candidate, or its weights are not those that were judged any
            more: a checkpoint has changed.
        ValueError: if its config cannot be set up here.
        OSError: if the file cannot be written.
    """
    candidate = record.candidate
    if record.status != COMPLETE or candidate is None:
        raise ExportError(
            f"run {record.run_id} is {record.status} and has {', '.join(record.arms)}: nothing was judged"
        )
    if candidate.weights_sha256 is None:
        raise ExportError(f"run {record.run_id}: no Linear of its candidate is MX; take its checkpoint away")
    if record.fallbacks:
        raise ExportError(f"run {record.run_id} fell back while it ran; run again with export={path}")
    plan = plan_of(record.config)
    core, source = load_arms(plan, ["candidate"])["candidate"]
    put_into_formats(core, plan.conf.quant, plan.setup, source)
    check_judged(core, candidate.weights_sha256, record.run_id)
    return write_export(core, header_of(plan, plan.conf.quant, plan.conf.kv, record), path)


def check_judged(core: WorldModel, judged: str, run_id: str) -> None:
    """Raise :class:`ExportError` if ``core`` has other weights than the run that judged them."""
    if weights_fingerprint(core) != judged:
        raise ExportError(
            f"run {run_id}: these are not the weights that it judged (a checkpoint or a calibration has changed); "
            "run it again, with export=FILE to write them at its end"
        )
