"""The incident log: a text file to which each run appends what it ran on, what it measured and what went wrong."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from harness.files import writing as files
from harness.measure.figures import Stats
from harness.report.record import RunRecord
from harness.report.sections import ArmRecord, Environment

SAMPLE = 3
"""Names of transformed Linears that an entry shows."""


def entry(record: RunRecord) -> str:
    """One run's entry, from its record."""
    title = f"## {record.started} {record.run_id} ({record.status})"
    lines = {
        "Hardware/Software": _software(record.environment),
        "Config": " ".join(record.overrides) or "defaults",
        "Transform summary": _transform(record.candidate),
        "Metrics": "; ".join(_metrics(arm) for arm in record.arms.values()),
        "Quality": "; ".join(_quality(record)) or "not measured",
        "Issues": "".join(f"\n  - {issue}" for issue in _issues(record)) or "none",
    }
    return "\n".join([title, *(f"- {name}: {text}" for name, text in lines.items())]) + "\n\n"


def append(path: Path, record: RunRecord) -> None:
    """Append a run's entry to the log at ``path``, in one write, so that runs side by side do not mix.

    An entry that is there already is not written twice: a run that was killed while it ended ends again.

    Raises:
        OSError: if the file cannot be written.
    """
    text = entry(record).encode()
    if not (path.is_file() and text in path.read_bytes()):
        files.append(path, text)


def _software(environment: Environment) -> str:
    gpu, packages = environment.gpu, environment.packages
    device = f"{gpu.name}, driver {gpu.driver}, CUDA {environment.cuda}" if gpu else str(environment.cpu)
    return f"{device}, torch {packages.get('torch')}, torchao {packages.get('torchao')}"


def _transform(candidate: ArmRecord | None) -> str:
    if candidate is None:
        return "none, BF16 alone"
    path, transform = candidate.numeric_path, candidate.transform
    count = f"{transform.count} Linears" if transform else "no Linears"
    names = ", ".join(transform.names[:SAMPLE]) if transform else ""
    return f"{count}{f' ({names}, …)' if names else ''}, {path.linears}; KV {path.kv}"


def _metrics(arm: ArmRecord) -> str:
    speed, memory = arm.speed, arm.memory
    figures = [f"FPS {_figure(speed.pipeline_fps)} (DiT), {_figure(speed.total_fps)} (total)"]
    for part in ("attention", "mlp"):
        figures.append(f"{part}_ms {_median(arm.parts.ms.get(part) if arm.parts else None)}")
    figures.append(f"decoder_ms {_median(speed.decoder_ms)}")
    figures.append(f"weights {memory.weight_bytes} B, KV {memory.kv_window_bytes} B")
    emulated = "" if arm.speed_is_meaningful else " (emulated kernel: its times say nothing about MX)"
    return f"{arm.label}: {', '.join(figures)}{emulated}"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _median(stats: Stats | None) -> str:
    return _figure(None if stats is None else stats.median)


def _quality(record: RunRecord) -> Iterator[str]:
    if record.quality is not None:
        section = record.quality.all
        for name, scores in (
            ("bf16", section.bf16),
            ("candidate", section.candidate),
            ("fidelity", section.fidelity),
        ):
            if scores is not None:
                yield f"{name} PSNR {scores.psnr:.2f} dB, SSIM {scores.ssim:.4f}"
        if section.drop is not None:
            yield f"drop {section.drop.psnr:+.2f} dB"
    if record.drift and record.drift.horizons:
        yield f"drift: {record.drift.decohered} of {len(record.drift.horizons)} clips decohere"
    if record.gates:
        yield f"verdict: {record.gates.verdict}"


def _issues(record: RunRecord) -> Iterator[str]:
    for incident in record.incidents:
        action = f" [{incident.action}]" if incident.action else ""
        yield f"{incident.kind}: {incident.message}{action}"
