"""What a quantized policy means for the products of a layer: formats, and operands with a state.

A layer computes `output = input @ kernel`. `input`, `kernel` and `output_grad` are the operands
that its three products quantize:

                          float8                              int8
  output  = input, kernel     E4M3 x E4M3                     int8 x int8
  d input = output_grad, kernel   E5M2 x E4M3                 high precision
  d kernel = input, output_grad   E4M3 x E5M2                 high precision

Modes that quantize weights only, or in blocks, are for inference: their layers multiply float
weights in the compute dtype.

int8 gradients would lose whatever is below 1/254 of the largest, so they are not rounded.
"""

import dataclasses
import functools

import mpjax_kernels as mk

from ._policy import DTypePolicy
from ._quantized_policy import QuantizedDTypePolicy
from ._scaling import CurrentScaling, DelayedScaling, StaticScaling
from ._stored import Stored, stored_of
from ._target import Target

OPERANDS = ("input", "kernel", "output_grad")
_GRADIENT_FORMAT = "float8_e5m2"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How the products of a layer are quantized.

    Attributes:
      formats: of the three products of a float weight; None leaves them in the compute dtype.
      states: the operands whose scales are states, with the recipe and the format of each.
      stored: how a weight is stored for inference, and what multiplies it.
      profitable_on: the target on which a product that 8 bits would slow down is left as it is.
    """

    formats: mk.DotFormats | None
    states: tuple[tuple[str, DelayedScaling | StaticScaling, str], ...]
    stored: Stored
    profitable_on: Target | None = None


def attention_recipe_of(policy: DTypePolicy) -> Recipe | None:
    """The recipe of the two products inside attention; None where they stay as they are."""
    recipe = recipe_of(policy) if getattr(policy, "quantize_attention", False) else None
    return None if recipe is None or recipe.formats is None else recipe


@functools.cache
def recipe_of(policy: DTypePolicy) -> Recipe | None:
    """The recipe of a policy, or None if its layers multiply in the compute dtype."""
    if not isinstance(policy, QuantizedDTypePolicy):
        return None
    return dataclasses.replace(_recipe_of(policy), profitable_on=policy.profitable_on)


def _recipe_of(policy: QuantizedDTypePolicy) -> Recipe:
    stored = stored_of(policy)
    assert stored is not None
    scaling, format = policy.scaling, policy.scheme.weights
    # What is for inference alone.
    if scaling is None or format == "int4" or policy.scheme.granularity == "128x128":
        return Recipe(None, (), stored)
    if isinstance(scaling, StaticScaling):
        per_channel = mk.OperandFormat(format, "channel")
        formats = mk.DotFormats((mk.OperandFormat(format, "tensor"), per_channel))
        return Recipe(formats, (("input", scaling, format),), stored)
    granularity = scaling.granularity if isinstance(scaling, CurrentScaling) else "tensor"
    if format == "int8":
        operand = mk.OperandFormat(format, granularity)
        formats, operands = mk.DotFormats((operand, operand)), OPERANDS[:2]
    else:
        formats, operands = mk.DotFormats.float8(granularity=granularity), OPERANDS
    if not isinstance(scaling, DelayedScaling):
        return Recipe(formats, (), stored)
    of = {"input": format, "kernel": format, "output_grad": _GRADIENT_FORMAT}
    return Recipe(formats, tuple((name, scaling, of[name]) for name in operands), stored)
