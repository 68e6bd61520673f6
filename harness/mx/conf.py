"""What a user may ask of the MX Linears. Standard library only: composing a config imports no torch."""

from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum

from harness.formats.scales import ScaleMode


class Scope(StrEnum):
    """Which Linears of the transformer blocks: one category, or all of them."""

    mlp = "mlp"
    attn = "attn"
    modulation = "modulation"
    all = "all"


class Activation(StrEnum):
    """What enters the product: BF16 as it is, or MX blocks encoded on the fly.

    ``mx``: in the weights' format. ``mxfp8``: in E4M3 whatever the weights' format (W4A8 with 4-bit weights).
    """

    bf16 = "bf16"
    mx = "mx"
    mxfp8 = "mxfp8"


class KernelChoice(StrEnum):
    """What computes the product. ``auto`` takes the fastest that can run and reports which one it was.

    ``cutlass``: the GPU's native MX path through torchao (Blackwell, activation ``mx``). ``cuda``: this package's own
    CUDA kernel, for few rows on Hopper. ``triton``: this package's own Triton kernels. ``emulated``: BF16 arithmetic on
    decoded values, any device; its speed says nothing about MX.
    """

    auto = "auto"
    cutlass = "cutlass"
    cuda = "cuda"
    triton = "triton"
    emulated = "emulated"


class Element8Bit(StrEnum):
    """Element format at 8 bits. At 4 bits it is always E2M1."""

    e4m3 = "e4m3"
    e5m2 = "e5m2"


@dataclass
class CategoryBits:
    """Bits of the Linears of one category, where they are to differ from ``MXConf.bits``.

    Attributes:
        mlp: 8, 4, or null = as ``bits``.
        attn: 8, 4, or null = as ``bits``.
        modulation: 8, 4, or null = as ``bits``.
    """

    mlp: int | None = None
    attn: int | None = None
    modulation: int | None = None


@dataclass
class MXConf:
    """MX Linears as config: simple field types, so that it serves as a Hydra structured config.

    Attributes:
        enabled: whether any Linear becomes MX.
        bits: of a weight's element, 8 or 4.
        scope: which Linears, see :class:`Scope`.
        kernel: what computes the product, see :class:`KernelChoice`.
        activation: what enters the product, see :class:`Activation`.
        scale_mode: how an E8M0 scale follows from amax; ``rceil`` is the default of torchao's
            ``MXDynamicActivationMXWeightConfig`` too.
        late_layers: only the last so many blocks, at least 1 (more than there are means all); null = all.
        include: glob patterns over module names that are taken whatever the scope; see ``harness.mx.select``.
        exclude: glob patterns over module names that stay BF16.
        element_8bit: element format at 8 bits.
        bits_by_category: bits of a category in scope where they are to differ from ``bits``.
        list: print what was transformed, and what was kept and why, once the model is set up; the run then goes on.
    """

    enabled: bool = False
    bits: int = 8
    scope: Scope = Scope.mlp
    kernel: KernelChoice = KernelChoice.auto
    activation: Activation = Activation.bf16
    scale_mode: ScaleMode = ScaleMode.rceil
    late_layers: int | None = None
    include: list[str] = field(default_factory=list)
    exclude: list[str] = field(default_factory=list)
    element_8bit: Element8Bit = Element8Bit.e4m3
    bits_by_category: CategoryBits = field(default_factory=CategoryBits)
    list: bool = False  # last: below it, list is no longer the type

    def bits_of(self, category: str) -> int:
        """Bits of the Linears of ``category``."""
        own = getattr(self.bits_by_category, category, None)
        return self.bits if own is None else int(own)

    @property
    def categories(self) -> tuple[str, ...]:
        """Categories in scope, in a fixed order."""
        every = tuple(item.name for item in fields(CategoryBits))
        return every if self.scope == Scope.all else (str(self.scope),)

    @property
    def has_4_bits(self) -> bool:
        """Whether any category in scope has 4 bits."""
        return self.enabled and 4 in map(self.bits_of, self.categories)


def validate(conf: MXConf) -> None:
    """Raise ValueError listing every field of ``conf`` with a value that is not allowed, and what is.

    Depends on the config alone. Whether the kernel can run on a device is for ``harness.mx.dispatch.resolve_kernel``,
    whether the patterns match a model for ``harness.mx.transform.apply_mx``.
    """
    problems = []
    if conf.bits not in (4, 8):
        problems.append(f"bits={conf.bits}: allowed are 8 and 4")
    for category, bits in asdict(conf.bits_by_category).items():
        if bits not in (None, 4, 8):
            problems.append(f"bits_by_category.{category}={bits}: allowed are 8, 4, and null for what bits says")
        elif bits is not None and conf.scope not in (Scope.all, category) and not conf.include:
            problems.append(
                f"bits_by_category.{category}={bits}: scope={conf.scope} leaves {category} BF16; use scope=all"
            )
    for name, choices in _CHOICES.items():
        if getattr(conf, name) not in list(choices):
            problems.append(f"{name}={getattr(conf, name)}: allowed are {', '.join(choices)}")
    if conf.late_layers is not None and conf.late_layers < 1:
        problems.append(f"late_layers={conf.late_layers}: must be at least 1, or null for every layer")
    for name in ("include", "exclude"):
        if any(not isinstance(p, str) or not p for p in getattr(conf, name)):
            problems.append(f"{name}={list(getattr(conf, name))}: must be a list of non-empty patterns")
    if problems:
        raise ValueError("quant config: " + "; ".join(problems))


_CHOICES: dict[str, type[StrEnum]] = {
    "scope": Scope,
    "kernel": KernelChoice,
    "activation": Activation,
    "scale_mode": ScaleMode,
    "element_8bit": Element8Bit,
}


class KeepDecoded(StrEnum):
    """``auto``: on a CPU, where they take at most half of the free memory; ``always``, on any device; ``never``."""

    auto = "auto"
    always = "always"
    never = "never"
