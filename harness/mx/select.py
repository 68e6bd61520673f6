"""Which Linears of a model become MX: categories, scope, late layers, include and exclude patterns.

Only Linears inside the transformer blocks are ever candidates; input and output projections and embeddings stay BF16.
The model says what they are (``harness.models.world.LinearSpec``). A candidate is chosen when

    (its category is in ``scope`` and its block among the last ``late_layers``, or an ``include`` pattern matches it)
    and no ``exclude`` pattern matches it.

So ``include`` extends the choice (an early layer beside ``late_layers``, ``attn.out`` beside ``scope=mlp``) and
``exclude`` narrows it and wins. Patterns are shell globs (``*`` also crosses dots, ``[0-3]`` works) over the whole
module name; the prefix of a model that holds the world model (``core.``) may be left out. A pattern that matches no
candidate is an error.

At 4 bits the final output projections of the last block (``LinearSpec.final``: ``attn.out`` and ``mlp.fc2``) stay BF16
unless ``include`` matches them: nothing after them but the output head can absorb their error.
"""

from collections import Counter
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from harness.models.world import OTHER, LinearSpec, find_world
from harness.mx.conf import MXConf, Scope


class MXTransformError(ValueError):
    """The model cannot be transformed as asked. The message lists every problem; nothing was changed."""


@dataclass(frozen=True)
class Candidate:
    """A module of a block that can be asked for: ``name`` in the model, ``path`` in the world model itself."""

    name: str
    path: str
    layer: int
    spec: LinearSpec
    module: nn.Module

    @property
    def category(self) -> str:
        """By which a config chooses it."""
        return self.spec.category


@dataclass(frozen=True)
class Selection:
    """``chosen`` modules in model order, and those in scope that stay BF16 nevertheless, with the reason."""

    chosen: list[Candidate]
    kept_bf16: dict[str, str]


def candidates(model: nn.Module) -> list[Candidate]:
    """Every Linear of the transformer blocks, and every module in the place of one, in model order.

    A module reached under two names is listed twice. Empty where ``model`` is no world model and holds none.
    """
    found = find_world(model)
    if found is None:
        return []
    prefix, world = found
    specs = {spec.name: spec for spec in world.block_linears}
    places = []
    for path, module in world.named_modules(remove_duplicate=False):
        if not path.startswith(f"{world.blocks_path}."):
            continue
        layer, _, within = path.removeprefix(f"{world.blocks_path}.").partition(".")
        spec = specs.get(within)
        if spec is not None or isinstance(module, nn.Linear):
            places.append(Candidate(prefix + path, path, int(layer), spec or LinearSpec(within, OTHER), module))
    return places


def select(model: nn.Module, conf: MXConf) -> Selection:
    """The modules of ``model`` that ``conf`` asks for, by the rule at the top of this module.

    Raises MXTransformError when the model has no transformer blocks, when a pattern matches nothing, and when nothing
    is selected.
    """
    everything = candidates(model)
    if not everything:
        raise MXTransformError(
            f"{type(model).__name__} is no world model and holds none with Linears in its blocks, the only ones MX "
            f"transforms; pass the model's core or the full model. Its modules are "
            f"{', '.join(n for n, _ in model.named_children())}"
        )
    _check_patterns(conf, everything)
    last = max(c.layer for c in everything)
    first_late = 0 if conf.late_layers is None else last + 1 - conf.late_layers
    chosen, kept = [], {}
    for c in everything:
        included = _matches(c, conf.include)
        in_scope = conf.scope in (Scope.all, c.category) and c.layer >= first_late
        if not (included or in_scope):
            continue
        if _matches(c, conf.exclude):
            kept[c.name] = "excluded"
        elif conf.bits_of(c.category) == 4 and not included and c.layer == last and c.spec.final:
            kept[c.name] = "kept BF16 as a final output projection of a 4-bit model; name it in include to transform it"
        else:
            chosen.append(c)
    if not chosen:
        raise MXTransformError(_nothing_selected(conf, everything, kept))
    return Selection(chosen, kept)


def _matches(candidate: Candidate, patterns: list[str]) -> bool:
    return any(fnmatchcase(n, p) for p in patterns for n in (candidate.name, candidate.path))


def _check_patterns(conf: MXConf, everything: list[Candidate]) -> None:
    problems = [
        f"{field} pattern {pattern!r}"
        for field, patterns in (("include", conf.include), ("exclude", conf.exclude))
        for pattern in patterns
        if not any(_matches(c, [pattern]) for c in everything)
    ]
    if problems:
        raise MXTransformError(
            f"{', '.join(problems)} matches no Linear of the transformer blocks (proj_in, proj_out and embeddings "
            f"always stay BF16). Names look like {everything[0].path}; layers are 0 to {everything[-1].layer}"
        )


def _nothing_selected(conf: MXConf, everything: list[Candidate], kept: dict[str, str]) -> str:
    layers = "every layer" if conf.late_layers is None else f"the last {conf.late_layers} layers"
    reasons = "".join(f"; {n} {'were' if n > 1 else 'was'} {reason}" for reason, n in Counter(kept.values()).items())
    categories = ", ".join(sorted({c.category for c in everything}))
    return (
        f"scope={conf.scope} in {layers} with include={list(conf.include)} and exclude={list(conf.exclude)} selects "
        f"no Linear{reasons} (the blocks have the categories {categories}). Widen the scope, or set enabled=false"
    )
