"""An einsum equation as labels, one for every axis of every operand and of the result."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from opt_einsum.parser import parse_einsum_input


@dataclass(frozen=True)
class Equation:
    """The labels of an equation, with those under an ellipsis spelled out.

    Attributes:
        inputs: For every operand, one character per axis. A diagonal has one twice.
        output: The labels of the result, each once.
        text: The equation as it was asked for, for messages.
    """

    inputs: tuple[str, ...]
    output: str
    text: str

    def used_once(self) -> set[str]:
        """The labels that are in a single operand and not in the output: those to sum."""
        count = Counter(label for term in self.inputs for label in set(term))
        return {label for label, terms in count.items() if terms == 1} - {*self.output}


def interleaved(arguments: Sequence[Any]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Splits the arguments of `einsum(x, [0, 1], w, [1, 2], [0, 2])` into operands and labels."""
    pairs = len(arguments) // 2 * 2
    return tuple(arguments[:pairs:2]), (*arguments[1:pairs:2], *arguments[pairs:])


def parse(equation: str | tuple[Any, ...], shapes: Sequence[tuple[int, ...]]) -> Equation:
    """Reads an equation for operands of these shapes, as `jnp.einsum` does.

    Args:
        equation: A string, or the lists of labels of the operands and, if wanted, of the result.
        shapes: The shapes of the operands; only their ranks matter.

    Raises:
        ValueError: If the equation makes no sense for operands of these ranks.
    """
    text, arguments = f"`equation` {equation!r}", [equation, *shapes]
    if not shapes:
        raise ValueError(f"{text} needs an operand at least")
    if not isinstance(equation, str):
        pairs = zip(shapes, equation, strict=False)
        arguments = [*(x for pair in pairs for x in pair), *equation[len(shapes) :]]
    try:
        inputs, output, _ = parse_einsum_input(arguments, shapes=True)
    except KeyError as error:
        raise ValueError(f"{text}: {error} is in the output but in no operand") from None
    except ValueError as error:
        raise ValueError(f"{text}: {error}") from None
    result = Equation(tuple(inputs.split(",")), output, text)
    for i, (term, shape) in enumerate(zip(result.inputs, shapes, strict=True)):
        if len(term) != len(shape):
            raise ValueError(
                f"{text}: {term!r} does not describe {len(shape)} axes: operand {i} has shape "
                f"{shape}"
            )
    return result


def label_sizes(equation: Equation, shapes: Sequence[tuple[int, ...]]) -> dict[str, int]:
    """The size of every label; an axis of size 1 broadcasts against any other operand's.

    Raises:
        ValueError: If a label has two sizes other than 1, or two in one operand.
    """
    sizes: dict[str, int] = {}
    first: dict[str, int] = {}  # the operand that the size is from
    for i, (term, shape) in enumerate(zip(equation.inputs, shapes, strict=True)):
        own = dict(zip(term, shape, strict=True))
        for label, size in zip(term, shape, strict=True):
            if own[label] != size:
                raise ValueError(
                    f"{equation.text}: {term!r} takes a diagonal of axes of sizes {size} and "
                    f"{own[label]} of operand {i} of shape {shape}"
                )
            if sizes.setdefault(label, size) != size and 1 not in (sizes[label], size):
                j = first[label]
                raise ValueError(
                    f"{equation.text}: operand {j} has shape {shapes[j]} but operand {i} has "
                    f"{shape}: {label!r} is {sizes[label]} in one and {size} in the other"
                )
            if label not in first or sizes[label] == 1:
                sizes[label], first[label] = size, i
    return sizes
