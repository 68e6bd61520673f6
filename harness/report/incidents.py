"""The incident log: a text file to which each run appends what it ran on, what it measured and what went wrong."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

Record = Mapping[str, Any]
SAMPLE = 3
"""Names of transformed Linears that an entry shows."""


def entry(record: Record) -> str:
    """One run's entry, from its record."""
    title = f"## {record['started']} {record['run_id']} ({record['status']})"
    lines = {
        "Hardware/Software": _software(record["environment"]),
        "Config": " ".join(record["overrides"]) or "defaults",
        "Transform summary": _transform(record),
        "Metrics": "; ".join(_metrics(record)),
        "Quality": "; ".join(_quality(record)) or "not measured",
        "Issues": "".join(f"\n  - {issue}" for issue in _issues(record)) or "none",
    }
    return "\n".join([title, *(f"- {name}: {text}" for name, text in lines.items())]) + "\n\n"


def append(path: Path, record: Record) -> None:
    """Append a run's entry to the log at ``path``, in one write, so that runs side by side do not mix.

    Raises:
        OSError: if the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as log:
        log.write(entry(record))


def _software(environment: Record) -> str:
    gpu, packages = environment["gpu"], environment["packages"]
    device = f"{gpu['name']}, driver {gpu['driver']}, CUDA {environment['cuda']}" if gpu else str(environment["cpu"])
    return f"{device}, torch {packages['torch']}, torchao {packages['torchao']}"


def _transform(record: Record) -> str:
    candidate = record["arms"].get("candidate")
    if candidate is None:
        return "none, BF16 alone"
    path, transform = candidate["numeric_path"], candidate["transform"]
    count = f"{transform['count']} Linears" if transform else "no Linears"
    names = ", ".join(str(name) for name in (transform or {}).get("names", [])[:SAMPLE])
    return f"{count}{f' ({names}, …)' if names else ''}, {path['linears']}; KV {path['kv']}"


def _metrics(record: Record) -> Iterator[str]:
    for arm in record["arms"].values():
        speed, parts, memory = arm["speed"], arm["parts"], arm["memory"]
        figures = [f"FPS {_figure(speed['pipeline_fps'])} (DiT), {_figure(speed['total_fps'])} (total)"]
        for part in ("attention", "mlp"):
            figures.append(f"{part}_ms {_figure(parts['ms'][part]['median'] if parts else None)}")
        decoder = speed["decoder_ms"]
        figures.append(f"decoder_ms {_figure(decoder['median'] if decoder else None)}")
        figures.append(f"weights {memory['weight_bytes']} B, KV {memory['kv_window_bytes']} B")
        emulated = "" if arm["speed_is_meaningful"] else " (emulated kernel: its times say nothing about MX)"
        yield f"{arm['label']}: {', '.join(figures)}{emulated}"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _quality(record: Record) -> Iterator[str]:
    section = (record["quality"] or {}).get("all", {})
    for name in ("bf16", "candidate", "fidelity"):
        if name in section:
            yield f"{name} PSNR {section[name]['psnr']:.2f} dB, SSIM {section[name]['ssim']:.4f}"
    if "drop" in section:
        yield f"drop {section['drop']['psnr']:+.2f} dB"
    drift = record["drift"]
    if drift and drift["horizons"]:
        yield f"drift: {drift['decohered']} of {len(drift['horizons'])} clips decohere"
    if record["gates"]:
        yield f"verdict: {record['gates']['verdict']}"


def _issues(record: Record) -> Iterator[str]:
    for incident in record["incidents"]:
        action = f" [{incident['action']}]" if incident.get("action") else ""
        yield f"{incident['kind']}: {incident['message']}{action}"
