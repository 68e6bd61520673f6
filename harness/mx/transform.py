"""Turns the selected Linears of a model into MX Linears, all of them or none.

Who chooses the blocks is for a ``WeightSource`` (``harness.mx.weights``) to say. To plug one in, write a class with its
two methods and pass it: ``apply_mx(model, conf, source=mine)``. A calibration reads the BF16 Linear that ``weight`` is
given and returns its own blocks in ``MXWeight(blocks, bias, fmt)``. A file needs no BF16 model at all:

    core = GameRFTCore.skeleton(arch, device)  # parameters on the meta device
    apply_mx(core, conf, source=FromFile(path), device=device)  # one Linear at a time
    core.load_state_dict(everything_else, strict=False, assign=True)

A module gives back what it was made of with ``module.mx_weight()``, packed however its kernel wants, and any kernel
builds its like from that: ``kernel.build(module.mx_weight())``.
"""

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

import torch
from torch import nn

from harness.formats.mx import BLOCK
from harness.models.bf16 import is_plain
from harness.mx.conf import MXConf, validate
from harness.mx.dispatch import Kernel, describe_device, resolve_kernel
from harness.mx.linears.base import LinearFormat, MXModule
from harness.mx.select import Candidate, MXTransformError, Selection, select
from harness.mx.weights import NearestRounding, WeightSource


@dataclass(frozen=True)
class TransformSummary:
    """What was transformed, and the numeric path it now takes. ``to_dict()`` is ready for JSON.

    ``kernel`` is the kernel in use, ``kernel_asked`` the one in the config. ``emulated`` says that the speed is none of
    MX's. ``kept_bf16`` maps Linears in scope that stay BF16 to the reason, ``other_kernels`` transformed ones that
    ``kernel`` cannot take to what computes them, and why. ``fused_activations`` maps transformed Linears whose kernel
    applies the activation behind them to its name. Bytes count weights, scales and biases of the transformed
    Linears. ``bits_by_category`` has every category that was transformed; ``bits`` and ``element`` are those
    of a category that the config does not name. ``places`` maps the transformed Linears to their category and layer; it
    is not in ``to_dict()``.
    """

    enabled: bool
    numeric_path: str
    architecture: str
    bits: int = 16
    element: str = "bf16"
    scale_mode: str | None = None
    activation: str = "bf16"
    scope: str | None = None
    late_layers: int | None = None
    kernel: str = "torch"
    kernel_asked: str = "torch"
    emulated: bool = False
    count: int = 0
    categories: dict[str, int] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    kept_bf16: dict[str, str] = field(default_factory=dict)
    other_kernels: dict[str, str] = field(default_factory=dict)
    fused_activations: dict[str, str] = field(default_factory=dict)
    weight_bytes_before: int = 0
    weight_bytes_after: int = 0
    bits_by_category: dict[str, int] = field(default_factory=dict)
    places: dict[str, tuple[str, int]] = field(default_factory=dict)

    def to_dict(self) -> dict:
        """Plain dicts, lists, strings and numbers."""
        return {name: value for name, value in asdict(self).items() if name != "places"}

    def listing(self) -> str:
        """For a person: every transformed Linear by category, layers folded together, and each kept one's reason."""
        if not self.enabled:
            return "Linears in MX: none (quant.enabled=false)"
        counts = ", ".join(f"{number} {name}" for name, number in self.categories.items())
        lines = [f"Linears in MX: {self.count} ({counts}), {self.numeric_path}"]
        lines += [f"  {kind:<10} {name}" for kind, name in _folded(self.names, self.places)]
        lines += [f"  {name}: {note}" for name, note in self.other_kernels.items()]
        for activation in dict.fromkeys(self.fused_activations.values()):
            names = [name for name, fused in self.fused_activations.items() if fused == activation]
            lines += [f"  {activation} in the kernel of {name}" for _, name in _folded(names, self.places)]
        lines += [f"In scope, kept BF16: {len(self.kept_bf16)}"]
        lines += [f"  {name}: {reason}" for name, reason in self.kept_bf16.items()]
        return "\n".join(lines)


def apply_mx(
    model: nn.Module, conf: MXConf, source: WeightSource | None = None, device: torch.device | None = None
) -> TransformSummary:
    """Replace the Linears of ``model`` that ``conf`` selects by MX Linears, in place, and say what was done.

    ``model`` is a GameRFT core or a module that holds one, in BF16, on the device it will run on; or on the meta
    device, to run on ``device``, where ``source`` needs no Linears. ``source`` chooses the blocks (None:
    ``NearestRounding``). With ``conf.enabled`` false nothing changes. Every check precedes the first change.

    Raises ValueError for a bad config or a kernel that cannot run on the model's device, MXTransformError (a
    ValueError) when nothing or something unsuitable is selected, with every such Linear named.
    """
    validate(conf)
    device, source = device or _device(model), source or NearestRounding()
    if not conf.enabled:
        return TransformSummary(enabled=False, numeric_path="BF16", architecture=describe_device(device))
    selection, targets = _checked(model, conf, device, source)
    before = after = 0
    other_kernels: dict[str, str] = {}
    for candidate in selection.chosen:
        linear, target = candidate.module, targets[candidate.category]
        assert isinstance(linear, nn.Linear)
        before += sum(p.nbytes for p in linear.parameters())
        replacement = target.kernel.build(source.weight(candidate.name, linear, target.fmt)).train(linear.training)
        after += replacement.weight_bytes()
        if replacement.note is not None:
            other_kernels[candidate.name] = replacement.note
        _replace(model, candidate.name, replacement)
    names = [c.name for c in selection.chosen]
    fmt = LinearFormat.of(conf)
    return TransformSummary(
        enabled=True,
        numeric_path=_numeric_path(targets, source.chosen_by),
        architecture=describe_device(device),
        bits=conf.bits,
        element=fmt.element.name,
        scale_mode=str(fmt.scale_mode),
        activation=str(fmt.activation),
        scope=str(conf.scope),
        late_layers=conf.late_layers,
        kernel=" + ".join(dict.fromkeys(str(target.kernel.name) for target in targets.values())),
        kernel_asked=str(conf.kernel),
        emulated=any(target.kernel.emulated for target in targets.values()),
        count=len(selection.chosen),
        categories=dict(Counter(c.category for c in selection.chosen)),
        names=names,
        kept_bf16=selection.kept_bf16,
        other_kernels=other_kernels,
        fused_activations=_fuse_activations(model, selection.chosen),
        weight_bytes_before=before,
        weight_bytes_after=after,
        bits_by_category={category: target.fmt.element.bits for category, target in targets.items()},
        places={c.name: (c.category, c.layer) for c in selection.chosen},
    )


def check_mx(model: nn.Module, conf: MXConf, device: torch.device, source: WeightSource | None = None) -> None:
    """Every check of ``apply_mx`` but that of the weights' values: ``model`` may be on the meta device, to run on
    ``device``.

    Raises as ``apply_mx`` does.
    """
    validate(conf)
    if conf.enabled:
        _checked(model, conf, device, source or NearestRounding())


class _Target(NamedTuple):
    """How the Linears of a category are computed."""

    fmt: LinearFormat
    kernel: Kernel


def _checked(
    model: nn.Module, conf: MXConf, device: torch.device, source: WeightSource
) -> tuple[Selection, dict[str, _Target]]:
    """What will be transformed, and how, by category."""
    selection, targets = select(model, conf), {}
    for name in dict.fromkeys(c.category for c in selection.chosen):
        fmt = LinearFormat.of(conf, name)
        targets[name] = _Target(fmt, resolve_kernel(conf.kernel, device, fmt))
    _check_all(selection.chosen, targets, source)
    return selection, targets


def _numeric_path(targets: dict[str, _Target], chosen_by: str) -> str:
    """One path, or each with its categories."""
    categories: dict[str, list[str]] = {}
    for name, target in targets.items():
        categories.setdefault(f"{target.fmt.path_of(chosen_by)}, {target.kernel.name}", []).append(name)
    if len(categories) == 1:
        return next(iter(categories))
    return "; ".join(f"{' and '.join(names)} {path}" for path, names in categories.items())


def _folded(names: list[str], places: dict[str, tuple[str, int]]) -> list[tuple[str, str]]:
    """Category and name of Linears, those of several layers as one pattern, sorted."""
    layers: dict[tuple[str, str], list[int]] = {}
    for name in names:
        kind, layer = places[name]
        layers.setdefault((kind, name.replace(f".{layer}.", ".{}.", 1)), []).append(layer)
    return [(kind, name.format(_span(found))) for (kind, name), found in sorted(layers.items())]


def _span(layers: list[int]) -> str:
    """Ascending layers as a pattern, such as ``{0-3,7}``."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return "{" + ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs) + "}"


def _device(model: nn.Module) -> torch.device:
    first = next(model.parameters(), None)
    if first is None:
        raise MXTransformError(f"{type(model).__name__} has no parameters, so no Linear to transform")
    return first.device


def _check_all(chosen: list[Candidate], targets: dict[str, _Target], source: WeightSource) -> None:
    """Raise one MXTransformError that names every chosen module that cannot be transformed, and why."""
    times = Counter(id(c.module) for c in chosen)
    problems = []
    for candidate in chosen:
        reason = _unsuitable(candidate, targets[candidate.category], source)
        if reason is None and times[id(candidate.module)] > 1:
            reason = "the same module is used under several names"
        if reason is not None:
            problems.append(f"{candidate.name}: {reason}")
    if problems:
        raise MXTransformError(
            f"{len(problems)} of {len(chosen)} selected Linears cannot become MX (nothing was changed):\n  "
            + "\n  ".join(problems)
            + "\nFix the model, or name them in exclude."
        )


def _unsuitable(candidate: Candidate, target: _Target, source: WeightSource) -> str | None:
    module = candidate.module
    if not is_plain(module):
        return f"is of type {type(module).__name__}, not a plain nn.Linear"
    weight = module.weight
    if type(weight.data) is not torch.Tensor:
        return f"its weight is already a {type(weight.data).__name__}"
    if weight.dtype != torch.bfloat16 or (module.bias is not None and module.bias.dtype != torch.bfloat16):
        return f"its weight is {weight.dtype}, MX Linears take bfloat16 models; convert the model first"
    if module.in_features % BLOCK:
        return f"in_features={module.in_features} is not a multiple of {BLOCK}, the MX block"
    return source.unsuitable(candidate.name, module, target.fmt) or target.kernel.unfit(module)


def _fuse_activations(model: nn.Module, chosen: list[Candidate]) -> dict[str, str]:
    """Move the activation behind an MX Linear into it where its kernel can, an Identity in its place.

    Returns the names of such Linears with the activation's.
    """
    fused = {}
    for candidate in chosen:
        if candidate.spec.activation is None:
            continue
        behind = candidate.name.removesuffix(candidate.spec.name) + candidate.spec.activation
        linear, activation = model.get_submodule(candidate.name), model.get_submodule(behind)
        if isinstance(linear, MXModule) and linear.absorb(activation):
            _replace(model, behind, nn.Identity())
            fused[candidate.name] = type(activation).__name__
    return fused


def _replace(model: nn.Module, name: str, replacement: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, replacement)
