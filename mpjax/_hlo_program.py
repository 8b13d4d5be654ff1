"""An optimized XLA program, read from its text.

The text is what `jax.stages.Compiled.as_text()` returns. It is the compiler's own account of what
it will run, after fusion, layout and scheduling; nothing else about it is public in JAX. One line
is one instruction:

    ROOT %name = shape opcode(%operand, %operand), attribute=value, metadata={op_name="..." ...}
"""

import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping

from ._hlo_shapes import Shape, shapes_in


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
      name: unique in its program, without `%`.
      opcode: such as `"dot"` or `"fusion"`.
      shapes: of the result; several where it is a tuple.
      is_tuple: whether the result is a tuple, be it of one array.
      operands: names of other instructions of its computation.
      argument: what stands in the parentheses where that is no operand: a parameter's number.
      attributes: the rest of the line.
      is_root: whether it is the result of its computation.
    """

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    is_tuple: bool
    operands: tuple[str, ...]
    argument: str
    attributes: str
    is_root: bool

    @property
    def shape(self) -> Shape:
        """Of the result, the first of a tuple."""
        return self.shapes[0]

    @functools.cached_property
    def op_name(self) -> str:
        """JAX' name stack, `"jit(f)/Model/layer/dot_general"`; empty if XLA made it up."""
        found = re.search(r'metadata=\{[^}]*?op_name="((?:[^"\\]|\\.)*)"', self.attributes)
        return found[1].replace("\\'", "'").replace('\\"', '"') if found else ""

    @functools.cached_property
    def called(self) -> tuple[str, ...]:
        """The names of the computations that it runs, but for those of a reduction."""
        names = re.findall(
            r"(?:calls|body|true_computation|false_computation)=%([\w.-]+)", self._own
        )
        if self.opcode in ("call", "async-start"):
            names += re.findall(r"to_apply=%([\w.-]+)", self._own)
        for branches in re.findall(r"branch_computations=\{([^}]*)\}", self._own):
            names += re.findall(r"%([\w.-]+)", branches)
        return tuple(dict.fromkeys(names))

    def text(self, name: str) -> str:
        """An attribute of a single word, or in braces, as it is printed; empty if it has none."""
        found = re.search(rf"(?<![\w]){name}=(\{{[^}}]*\}}|\"[^\"]*\"|[^\s,]+)", self._own)
        return found[1].strip('"') if found else ""

    def numbers(self, name: str) -> tuple[int, ...]:
        """An attribute that is a list of numbers, `lhs_contracting_dims={1}`."""
        return tuple(map(int, re.findall(r"-?\d+", self.text(name))))

    @functools.cached_property
    def backend_config(self) -> str:
        """What the compiler's back end added, a JSON text for the most part."""
        return self.attributes.partition("backend_config=")[2]

    @functools.cached_property
    def cycles(self) -> int | None:
        """The TPU compiler's estimate for one run; None of what it gives none for."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.backend_config)
        return int(found[1]) if found else None

    @functools.cached_property
    def _own(self) -> str:
        """The attributes without metadata and the back end's, which quote anything."""
        plain = re.sub(r'metadata=\{(?:[^"}]|"(?:[^"\\]|\\.)*")*\}', "", self.attributes)
        return plain.partition("backend_config=")[0]


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions that run as one, by name in the order of the text."""

    name: str
    instructions: Mapping[str, Instruction]

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions.values())

    @functools.cached_property
    def root(self) -> Instruction:
        """The instruction whose result is the computation's."""
        return next(each for each in self if each.is_root)

    @functools.cached_property
    def parameters(self) -> Mapping[int, Instruction]:
        """The parameters by their number."""
        return {int(each.argument): each for each in self if each.opcode == "parameter"}

    @functools.cached_property
    def users(self) -> Mapping[str, list[Instruction]]:
        """The instructions that take each as an operand."""
        users: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for each in self:
            for operand in dict.fromkeys(each.operands):
                users[operand].append(each)
        return users


@dataclasses.dataclass(frozen=True)
class Program:
    """The computations by name, the one that is run, and the text."""

    computations: Mapping[str, Computation]
    entry: Computation
    text: str


_HEAD = re.compile(r"(ENTRY )?%([\w.-]+) \(.*\) -> .*\{$")
_LINE = re.compile(r"\s+(ROOT )?%([\w.-]+) = (.*)$")


def parse(text: str) -> Program:
    """Reads the text of an optimized program."""
    computations: dict[str, Computation] = {}
    entry = name = ""
    lines: dict[str, Instruction] = {}
    for line in text.splitlines():
        head = _HEAD.match(line)
        if head:
            name, lines = head[2], {}
            entry = name if head[1] else entry
        elif line == "}" and name:
            computations[name] = Computation(name, lines)
            name = ""
        elif name and (found := _LINE.match(line)):
            instruction = _instruction(found[2], found[3], is_root=bool(found[1]))
            lines[instruction.name] = instruction
    if entry not in computations:
        raise ValueError(
            "this is not the text of a compiled XLA program, as `compiled.as_text()` returns it: "
            f"it has no ENTRY computation. It starts with {text[:80]!r}"
        )
    return Program(computations, computations[entry], text)


def _instruction(name: str, rest: str, *, is_root: bool) -> Instruction:
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opcode, _, rest = rest.partition("(")
    end = _closing("(" + rest, 0) - 1
    inside, attributes = rest[:end], rest[end + 1 :]
    operands = tuple(re.findall(r"%([\w.-]+)", inside)) if opcode != "constant" else ()
    return Instruction(
        name,
        opcode,
        shapes_in(shape),
        shape.startswith("("),
        operands,
        "" if operands else inside,
        attributes,
        is_root,
    )


def _closing(text: str, start: int) -> int:
    """The position of the parenthesis that closes the one at `start`; quotes are skipped."""
    depth = 0
    for found in re.compile(r'[()]|"(?:[^"\\]|\\.)*"').finditer(text, start):
        depth += {"(": 1, ")": -1}.get(found[0], 0)
        if depth == 0:
            return found.start()
    raise ValueError(f"a parenthesis is not closed in the line of a program {text[:200]!r}")
