"""How weights are stored for inference, and what multiplies them, under a quantized policy.

mode                weight                          activation
int8                int8, per output channel        int8, per row, at every call
int8_static         the same                        int8, one calibrated scale
int8_delayed        the same                        int8, one scale as training left it
int8_weight_only    the same                        compute dtype
int4/128            int4, per 128 inputs            compute dtype
w4a8/128            int4, per 128 inputs            int8, per row, at every call
float8              E4M3, per tensor                E4M3, one scale as training left it
float8_current      E4M3, per tensor                E4M3, per tensor, at every call
float8/row          E4M3, per output channel        E4M3, per row, at every call
float8/128x128      E4M3, per block of 128 x 128    E4M3, per 128 of a row, at every call
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Literal

from ._modes import AUTO8
from ._policy import DTypePolicy
from ._quantized_policy import QuantizedDTypePolicy

_BLOCK = 128


@dataclasses.dataclass(frozen=True)
class Activation:
    """What becomes of the other operand of a stored weight.

    Attributes:
      format: what it is quantized to.
      granularity: what shares a scale: the tensor, a row, or so many entries of a row.
    """

    format: str
    granularity: Literal["tensor", "row"] | int


@dataclasses.dataclass(frozen=True)
class Stored:
    """How a weight is stored.

    Attributes:
      format: of the values.
      granularity: what shares a scale: `"tensor"`, `"channel"` (an output channel), `"group"`
        (`group_size` inputs of an output channel) or `"block"` (`group_size` x `group_size`).
      group_size: of a group or a block; else None.
      symmetric: whether there is no zero point.
      activation: how the other operand is quantized; None leaves it in the compute dtype.
    """

    format: str
    granularity: Literal["tensor", "channel", "group", "block"]
    group_size: int | None
    symmetric: bool
    activation: Activation | None


@functools.cache
def stored_of(policy: DTypePolicy) -> Stored | None:
    """How the weights of a policy are stored, or None if they stay floats."""
    if not isinstance(policy, QuantizedDTypePolicy):
        return None
    mode = policy.scheme
    if mode.weights == AUTO8:
        raise ValueError(
            f"{policy!r} is not resolved: call policy.resolve(target), or mp.wrap(model, policy, "
            "target=...), which decides between int8 and float8"
        )
    size, granularity = None, "channel"
    if mode.granularity == "128x128":
        size, granularity = _BLOCK, "block"
    elif mode.granularity == "group":
        size, granularity = mode.group_size, "group"
    elif mode.granularity == "tensor" and mode.weights != "int8":
        granularity = "tensor"
    return Stored(mode.weights, granularity, size, mode.symmetric, _activation_of(policy))


def _activation_of(policy: QuantizedDTypePolicy) -> Activation | None:
    mode = policy.scheme
    format = mode.activation_format
    if format is None:
        return None
    if mode.activations == "dynamic" and mode.granularity in ("channel", "row", "group"):
        return Activation(format, "row")
    return Activation(format, _BLOCK if mode.granularity == "128x128" else "tensor")


class CannotStoreError(ValueError):
    """A weight does not go into the granularity that its policy asks for; says why."""


def cut(
    stored: Stored, shape: Sequence[int], contracting: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """The axes of a weight that share a scale, counted from the end, and their group sizes.

    Args:
      stored: how it is stored.
      shape: of the weight as one layer sees it.
      contracting: axes that the product sums over, from the front.

    Raises:
      CannotStoreError: a group or a block does not divide an axis.
    """
    ndim = len(shape)
    summed = tuple(axis - ndim for axis in contracting)
    if stored.granularity == "tensor":
        return tuple(range(-ndim, 0)), None
    if stored.granularity == "channel":
        return summed, None
    assert stored.group_size is not None
    sizes = runs([shape[a] for a in summed], stored.group_size)
    if stored.granularity == "group":
        return summed, sizes
    free = [axis - ndim for axis in range(ndim) if axis not in contracting]
    last = free[-1:]
    return (*summed, *last), (*sizes, *runs([shape[a] for a in last], stored.group_size))


def runs(shape: Sequence[int], size: int) -> tuple[int, ...]:
    """The group size along each axis, so that a group is `size` neighbours in the last ones.

    Raises:
      CannotStoreError: the axes cannot be cut so.
    """
    sizes, left = [], size
    for length in reversed(shape):
        run = math.gcd(length, left)
        if run not in (length, left):
            raise CannotStoreError(
                f"groups of {size} do not divide its {math.prod(shape)} inputs or outputs, "
                f"axes of {tuple(shape)}"
            )
        sizes.append(run)
        left //= run
    if left != 1:
        raise CannotStoreError(
            f"it has {math.prod(shape)} inputs or outputs, fewer than a group of {size}"
        )
    return tuple(reversed(sizes))
