"""What takes the place of an ``nn.Linear``: the interface of every MX Linear, and the weight-only emulated one."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from harness.formats.mx import BLOCK, E2M1, E4M3, FORMATS, ElementFormat, MXBlocks, decode, encode
from harness.formats.scales import ScaleMode
from harness.models import bf16
from harness.mx.conf import Activation, MXConf


@dataclass(frozen=True)
class LinearFormat:
    """Numeric format of an MX Linear: its elements, how scales are derived, and what the activations are."""

    element: ElementFormat
    scale_mode: ScaleMode
    activation: Activation

    @classmethod
    def of(cls, conf: MXConf, category: str = "") -> "LinearFormat":
        """The format that a valid ``conf`` describes for Linears of ``category``."""
        element = E2M1 if conf.bits_of(category) == 4 else FORMATS[conf.element_8bit]
        return cls(element, ScaleMode(conf.scale_mode), Activation(conf.activation))

    @property
    def activation_element(self) -> ElementFormat | None:
        """Element format of the activations, None where they stay BF16."""
        return {Activation.bf16: None, Activation.mx: self.element, Activation.mxfp8: E4M3}[self.activation]

    @property
    def numeric_path(self) -> str:
        """Such as ``W4A16 E2M1 weights, floor scales``: of weights rounded to nearest."""
        return self.path_of("")

    def path_of(self, chosen_by: str) -> str:
        """``numeric_path`` of weights that ``chosen_by`` chose, with their scales: ``W4A16 E2M1 weights by gptq``."""
        bits, name, other = self.element.bits, self.element.name.upper(), self.activation_element
        scales = f"{self.scale_mode} scales"
        if other is None:
            return f"W{bits}A16 {name} weights" + (f" by {chosen_by}" if chosen_by else f", {scales}")
        head = f"W{bits}A{other.bits} {name} weights"
        if chosen_by:
            return f"{head} by {chosen_by}, {other.name.upper()} activations, {scales}"
        if other is self.element:
            return f"{head} and activations, {scales}"
        return f"{head}, {other.name.upper()} activations, {scales}"


class MXWeight(NamedTuple):
    """All that an MX Linear is made of, whoever chose it: ``blocks`` of the weight [N, K], ``bias`` BF16 [N] or None.

    Sources of such weights are in ``harness.mx.weights``. The module keeps the tensors, or packs them; it does not
    write to them.
    """

    blocks: MXBlocks
    bias: Tensor | None
    fmt: LinearFormat

    @property
    def sizes(self) -> tuple[int, int]:
        """N = out_features and K = in_features."""
        return self.blocks.scales.shape[0], self.blocks.scales.shape[1] * BLOCK


class MXModule(nn.Module, ABC):
    """What every MX Linear offers beside ``forward``: its sizes, its format ``fmt``, and its weight.

    ``note``: what computes it, and why, where that is not the kernel that was asked for.
    """

    fmt: LinearFormat
    in_features: int
    out_features: int
    bias: Tensor | None
    note: str | None = None

    def absorb(self, activation: nn.Module) -> bool:
        """Apply ``activation`` to the outputs of ``forward`` from now on, if the kernel can; whether it will."""
        return False

    def linear(self, x: Tensor) -> Tensor:
        """``forward`` without an activation that it has absorbed: what any other MX Linear of this format gives."""
        return self(x)

    @abstractmethod
    def weight_blocks(self) -> MXBlocks:
        """The weight [N, K] in MX form, scales row-major."""

    def mx_weight(self) -> MXWeight:
        """What it was made of: any kernel builds its like from this."""
        return MXWeight(self.weight_blocks(), self.bias, self.fmt)

    @abstractmethod
    def weight_bytes(self) -> int:
        """Bytes in memory of weight, scales and bias."""

    def extra_repr(self) -> str:
        """Sizes and format, for printing."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{self.fmt.numeric_path}"
        )


class MXLinear(MXModule):
    """Linear with MX weights, emulated: decodes its weight at every call, then ``bf16.linear``.

    Activations that are not to stay BF16 are rounded to MX first. Decoding is exact, so this is what any kernel must
    match up to summation order. No BF16 copy of the weight outlives a call. For inference: the weight takes no
    gradient.

    Buffers: ``elements`` uint8 [N, K] (8 bit) or [N, K/2] (4 bit), ``scales`` uint8 [N, K/32], ``bias`` BF16 [N] or
    None, with N = out_features and K = in_features.
    """

    elements: Tensor
    scales: Tensor
    bias: Tensor | None

    def __init__(self, weight: MXWeight) -> None:
        super().__init__()
        self.fmt = weight.fmt
        self.out_features, self.in_features = weight.sizes
        self.register_buffer("elements", weight.blocks.elements)
        self.register_buffer("scales", weight.blocks.scales)
        self.register_buffer("bias", weight.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map BF16 [..., K] to BF16 [..., N]."""
        element = self.fmt.activation_element
        if element is not None:
            x = decode(encode(x, element, self.fmt.scale_mode), element)
        return bf16.linear(x, decode(self.weight_blocks(), self.fmt.element), self.bias)

    def weight_blocks(self) -> MXBlocks:
        """The buffers, as they are."""
        return MXBlocks(self.elements, self.scales)

    def weight_bytes(self) -> int:
        """Elements, scales and bias."""
        bias = 0 if self.bias is None else self.bias.nbytes
        return self.elements.nbytes + self.scales.nbytes + bias
