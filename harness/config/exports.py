"""What a config says of exported checkpoints: one to roll out, whose formats then hold, or one to write."""

from __future__ import annotations

from pathlib import Path

from harness.config.problems import collect
from harness.config.schema import RunConf
from harness.export.read import Export, is_export
from harness.files.writing import why_unwritable
from harness.measure.conf import OnInstability
from harness.models.shapes import GameRFTConfig


def read_export(conf: RunConf, problems: list[str]) -> Export | None:
    """The export that ``model.checkpoint`` is, its formats taken over into ``conf``; checks what concerns exports."""
    if conf.export is not None:
        _check_target(conf, problems)
    if not is_export(conf.model.checkpoint):
        if conf.model.baseline is not None:
            problems.append("model.baseline is what an exported checkpoint is compared with; model.checkpoint is none")
        return None
    with collect(problems):
        export = Export(conf.model.checkpoint or "")
        for name, own, theirs in (("quant", conf.quant, export.quant), ("kv", conf.kv, export.kv)):
            if own.enabled and not export.agrees(name, own):
                problems.append(
                    f"{name}: {conf.model.checkpoint} holds other formats than these ({export.header.label}); leave "
                    f"{name}= out, they are taken from the file"
                )
            setattr(conf, name, export.taken_over(name, own, theirs))
        if conf.calib.enabled:
            problems.append(f"calib: the blocks in {conf.model.checkpoint} are chosen already; leave calib= out")
        if conf.model.baseline is None:
            if conf.gates.enabled and not conf.gates.implied:
                problems.append("gates compare with BF16, which an export lacks: give model.baseline=CHECKPOINT")
            if conf.on_instability is OnInstability["fallback"]:
                problems.append("on_instability=fallback needs the BF16 weights: give model.baseline, or use raise")
        return export
    return None


def _check_target(conf: RunConf, problems: list[str]) -> None:
    target = Path(conf.export or "")
    if target.suffix != ".safetensors":
        problems.append(f"export={target}: name a .safetensors file")
    elif target.exists() and not conf.resume:
        problems.append(f"export={target}: exists; name another file, or delete it")
    elif (why := why_unwritable(target)) is not None:
        problems.append(f"export={target}: cannot be written ({why}); name another file")
    if not conf.quant.enabled:
        problems.append(f"export={target}: nothing is MX with quant=bf16; choose a quant, or copy the checkpoint")


def differences(ours: GameRFTConfig, theirs: GameRFTConfig) -> str:
    """Fields in which the config of an export is another than the one asked for."""
    pairs = [(name, getattr(ours, name), value) for name, value in vars(theirs).items()]
    told = ", ".join(f"{name}={own} (the file: {value})" for name, own, value in pairs if own != value)
    return f"another model than the config says: {told}; use the config it was exported with"
