"""Which number format each operand of a product, and of its derivative, is multiplied in."""

from dataclasses import dataclass
from typing import Any, Literal

import jax

from ._formats import FormatLike, get_format

Granularity = Literal["tensor", "channel"] | tuple[int, int] | list[int]


@jax.tree_util.register_static
@dataclass(frozen=True)
class OperandFormat:
    """How an operand is quantized before it is multiplied.

    Attributes:
        format: A `Format`, its name or its dtype.
        granularity: `"tensor"` is one scale; `"channel"` one for every entry of the axes that are
            not contracted (per row of an activation, per output channel of a weight);
            `(free, contracting)` one per block of that many neighbours along the last free and
            the last contracting axis: `(1, 128)` groups an activation, `(128, 128)` cuts a
            weight into blocks. A list is kept as a tuple.
        stochastic: Whether to round stochastically; needs a `key`.

    Raises:
        TypeError: If the format is no name, dtype or `Format`.
        ValueError: If the format or the granularity is unknown.
    """

    format: FormatLike
    granularity: Granularity = "channel"
    stochastic: bool = False

    def __post_init__(self):
        object.__setattr__(self, "format", get_format(self.format))
        if isinstance(self.granularity, list):
            object.__setattr__(self, "granularity", tuple(self.granularity))
        known = self.granularity in ("tensor", "channel")
        if not known and not _is_block(self.granularity):
            raise ValueError(
                f"unknown `granularity` {self.granularity!r}: it is 'tensor', 'channel' or the two "
                "positive sizes of a block, (free, contracting), as in (1, 128)"
            )


Operand = OperandFormat | FormatLike | None
Pair = tuple[Operand, Operand]
Resolved = tuple[OperandFormat | None, OperandFormat | None]  # a pair, as `DotFormats` keeps it


@jax.tree_util.register_static
@dataclass(frozen=True)
class DotFormats:
    """The formats of the three products of a differentiable dot.

    For `out = lhs @ rhs` and `g` the gradient of `out`::

        out  = lhs   @ rhs      formats in `out`,  (lhs, rhs)
        dlhs = g     @ rhs.T    formats in `dlhs`, (g, rhs)
        drhs = lhs.T @ g        formats in `drhs`, (lhs, g)

    Each is an `OperandFormat`, a format as `get_format` takes it (per channel, rounding to
    nearest even), or None, which keeps that operand of that product in high precision.

    A backward product multiplies `lhs` and `rhs` as the forward pass quantized them: they are
    saved in 8 bits and nothing else of them is. Where it names another format, or their scales vary
    along both a contracted and a free axis in runs of fewer than 32, they are dequantized and
    quantized anew; where it says None, dequantized. An operand that `out` leaves in
    high precision is saved in the format that the backward product names, or as it is.

    Raises:
        ValueError: If a format is unknown, or a member is not a pair.
    """

    out: Pair
    dlhs: Pair = (None, None)
    drhs: Pair = (None, None)

    def __post_init__(self):
        for name in ("out", "dlhs", "drhs"):
            object.__setattr__(self, name, _pair(name, getattr(self, name)))

    @classmethod
    def int8(cls, **kwargs: Any) -> "DotFormats":
        """int8 for both operands of all three products; `kwargs` are those of `OperandFormat`."""
        operand = OperandFormat("int8", **kwargs)
        return cls((operand, operand), (operand, operand), (operand, operand))

    @classmethod
    def float8(cls, **kwargs: Any) -> "DotFormats":
        """E4M3 for `lhs` and `rhs`, E5M2 for gradients; `kwargs` are those of `OperandFormat`.

        Micikevicius et al., FP8 Formats for Deep Learning, 2022, https://arxiv.org/abs/2209.05433
        """
        operand = OperandFormat("float8_e4m3fn", **kwargs)
        gradient = OperandFormat("float8_e5m2", **kwargs)
        return cls((operand, operand), (gradient, operand), (operand, gradient))

    @property
    def is_stochastic(self) -> bool:
        """Whether an operand is rounded stochastically."""
        operands = (*self.out, *self.dlhs, *self.drhs)
        return any(isinstance(o, OperandFormat) and o.stochastic for o in operands)


def _is_block(granularity: Any) -> bool:
    return (
        isinstance(granularity, tuple)
        and len(granularity) == 2
        and all(type(size) is int and size > 0 for size in granularity)
    )


def _pair(name: str, pair: Any) -> Resolved:
    if not isinstance(pair, tuple) or len(pair) != 2:
        raise ValueError(
            f"`{name}` must be a pair of formats, one per operand, as in ('int8', 'int8'), "
            f"got {pair!r}"
        )
    left, right = (OperandFormat(get_format(o)) if isinstance(o, FormatLike) else o for o in pair)
    for operand in (left, right):
        if operand is not None and not isinstance(operand, OperandFormat):
            raise ValueError(
                f"`{name}` must hold names of formats, OperandFormats or None, got {operand!r}"
            )
    return left, right
