"""What the metadata of an instruction says: the module path, the direction, the decision, the line.

JAX writes the name stack of each operation into the program, outermost first:

    jit(step)/transpose(jvp(mpjax))/Model/up/mpjax.quantized/jit(_multiply)/dot_general

Modules are those of Linen's own scopes, or of ours for NNX. What transformations, control flow and
einsum add is left out; the word in `mpjax.<word>` is the decision of `_decisions.py`. The rule of a
custom derivative writes all that is around it once more:

    jit(step)/transpose(jvp(mpjax))/Model/up/mpjax.left/jvp(mpjax)/Model/up/mpjax.left/dot_general
"""

import dataclasses
import re
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from ._decisions import FLOATS, ROOT
from ._hlo_program import Instruction

_WRAPPERS = re.compile(r"(transpose|jvp|vmap|vjp|linearize)\((.*)\)$")
_FUNCTION = re.compile(r"(p?jit|xmap|shard_map|custom_\w+|checkpoint|remat|named)\(.*\)$")
_RECOMPUTED = {"rematted_computation", "remat"}
_CONTROL = {"closed_call", "checkpoint", "core_call", "pallas_call", "shard_map", "custom_vjp_call"}
_CONTROL |= {
    "custom_jvp_call",
    "eval_jaxpr",
    "custom_vjp_call_jaxpr",
    "custom_lin",
    "run_state",
} | _RECOMPUTED
# Of JAX, when XLA adds a name of its own; and a kernel of ours.
_OPERATIONS = {"ragged_dot_general", "mpjax_grouped_matmul"}
_METHOD = re.compile(r"\.[A-Za-z_]\w*$")


@dataclasses.dataclass(frozen=True)
class Name:
    """What is known of one instruction.

    Attributes:
      path: of the module, from the wrapped model (`"blocks/0/up"`), or with the model's class from
        the first module if none was wrapped; empty outside of all modules.
      direction: `"forward"`, `"backward"`, or `"recomputed"` for the forward pass once more.
      decision: the innermost word of a wrapped model, or None.
      primitive: JAX' operation, `"dot_general"`.
      wrapped: whether it is in a wrapped model.
      floats: whether that quantizes a float weight for it.
    """

    path: str
    direction: str
    decision: str | None
    primitive: str
    wrapped: bool
    floats: bool = False


def name_of(op_name: str) -> Name:
    """Reads a name stack."""
    parts = split(op_name)
    kept, decision, backward, wrapped, recomputed = [], None, False, False, False
    stack = parts[:-1]
    for i, whole in enumerate(stack):
        part, wrappers = _unwrapped(whole)
        backward |= "transpose" in wrappers
        recomputed |= part in _RECOMPUTED
        if part.startswith(f"{ROOT}."):
            decision = part.removeprefix(f"{ROOT}.")
        elif part == ROOT:
            # A wrapped model inside of another: its path goes on, if it is not the same once more.
            is_same = bool(wrappers) and _modules(stack[i + 1 :])[: len(kept)] == kept
            kept, wrapped = (kept if wrapped and not is_same else []), True
        else:
            kept += _modules([part], stack[i + 1 :], stack[:i])
    path = kept[1:] if wrapped else kept
    direction = "recomputed" if recomputed else "backward" if backward else "forward"
    floats = decision is not None and decision.endswith(FLOATS)
    decision = decision.removesuffix(FLOATS) if decision is not None else None
    return Name("/".join(path), direction, decision, parts[-1] if parts else "", wrapped, floats)


def _unwrapped(part: str) -> tuple[str, list[str]]:
    """A part without the transformations around it, and those."""
    wrappers = []
    while found := _WRAPPERS.match(part):
        wrappers.append(found[1])
        part = found[2]
    return part, wrappers


def _modules(parts: list[str], after: Sequence[str] = (), before: Sequence[str] = ()) -> list[str]:
    """The names of modules among the parts, of which these are after and before."""
    found, stack = [], [*before, *parts, *after]
    for i, whole in enumerate(parts, len(before)):
        part, _ = _unwrapped(whole)
        if part != ROOT and not part.startswith(f"{ROOT}."):
            is_control = _is_control(part, stack[i + 1 :], stack[:i])
            found += [] if is_control else [_METHOD.sub("", part)]
    return found


def _is_control(part: str, after: list[str], before: list[str]) -> bool:
    branch = r"branch_\d+_fun"
    return (
        part == ""
        or part in _CONTROL | _OPERATIONS
        or "->" in part
        or bool(_FUNCTION.match(part) or re.fullmatch(branch, part))
        or (part == "while" and after[:1] in (["body"], ["cond"]))
        or (part in ("body", "cond") and before[-1:] == ["while"])
        or (part == "cond" and bool(after) and bool(re.fullmatch(branch, after[0])))
    )


def split(op_name: str) -> list[str]:
    """A name stack's parts: those between slashes, but for those in parentheses."""
    parts, depth = [""], 0
    for character in op_name:
        depth += {"(": 1, ")": -1}.get(character, 0)
        if character == "/" and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


class Lines:
    """The source lines of a program's instructions, from the tables in its text.

    A line is the innermost one of the user's own: not of mpjax, nor of an installed package.
    """

    def __init__(self, text: str):
        self._files = dict(re.findall(r'^(\d+) "(.*)"$', _table(text, "FileNames"), re.MULTILINE))
        self._locations = {
            key: (file, int(line))
            for key, file, line in re.findall(
                r"^(\d+) \{file_name_id=(\d+) .*?\bline=(\d+)", _table(text, "FileLocations"), re.M
            )
        }
        frame = r"^(\d+) \{file_location_id=(\d+)(?: parent_frame_id=(\d+))?"
        found = re.findall(frame, _table(text, "StackFrames"), re.MULTILINE)
        self._frames = {key: (location, int(parent or 0)) for key, location, parent in found}
        # Some versions of XLA print the parent's number plus one: the first has no parent.
        self._shift = int(self._frames.get("1", ("", 0))[1] == 1)

    def line_of(self, instruction: Instruction) -> str:
        """`"model.py:12"`, with the path as Python had it; empty if the program does not say."""
        attributes = instruction.attributes
        frame = re.search(r"metadata=\{.*?stack_frame_id=(\d+)", attributes)
        if frame is None:
            file = re.search(r'source_file="([^"]*)"', attributes)
            line = re.search(r"source_line=(\d+)", attributes)
            return f"{file[1]}:{line[1]}" if file and line else ""
        lines = list(self._stack(int(frame[1])))
        own = [(file, line) for file, line in lines if not _is_library(file)]
        file, line = (own or lines or [("", 0)])[0]
        return f"{file}:{line}" if file else ""

    def _stack(self, frame: int):
        while (known := self._frames.get(str(frame))) is not None:
            location, parent = known
            if location in self._locations:
                file, line = self._locations[location]
                yield self._files.get(file, ""), line
            frame = parent - self._shift
            if parent == 0:
                return


_OURS = Path(__file__).parent
_KERNELS = "mpjax_kernels"
_INSTALLED = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}


def _is_library(file: str) -> bool:
    path = Path(file)
    ours = _OURS in path.parents or _KERNELS in path.parts
    return (
        ours
        or "site-packages" in path.parts
        or any(Path(each) in path.parents for each in _INSTALLED)
    )


def _table(text: str, title: str) -> str:
    start = text.find(f"\n{title}\n")
    return "" if start < 0 else text[start + len(title) + 2 :].partition("\n\n")[0]
