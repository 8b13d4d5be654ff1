"""What a TPU's compiler schedules: cycles and traffic of one instruction, by running its control.

A TPU core is a VLIW machine without caches or branch prediction: what its compiler writes down,
bundle by bundle, is what runs, one bundle a cycle, but for waiting for memory. libtpu prints the
final bundles of every instruction of a program, XLA's fusions and Pallas kernels alike, where
`FLAGS` ask for it. Here the scalar part of such a listing is run: loop counters, predicates,
branches (which take effect four bundles later), and copies to and from main memory, which start
and are waited for. What the vector and matrix units do is only counted.

A bundle takes a cycle, copies follow each other at the memory's bandwidth, and a wait lasts until
its copy is there: that is the estimate. It is no timing: the time that a memory takes to answer,
banks, refreshes, other traffic and stalls within the matrix unit are not in it.
"""

import dataclasses
import operator
import re
from collections import defaultdict, deque
from collections.abc import Callable
from typing import Any

# For LIBTPU_INIT_ARGS, before JAX loads libtpu: which listings, and into which folder.
FLAGS = (
    "--xla_jf_dump_llo_text=true --xla_jf_dump_hlo_text=false --xla_jf_dump_llo_html=false "
    "--xla_jf_dump_llo_proto=false --xla_jf_dump_llo_pass_label_regex=final_bundles "
    "--xla_jf_dump_to={folder}"
)
_GRANULE = 32  # bytes
_DELAY = 4  # bundles behind a branch that run before it is taken
_MOST_BUNDLES = 1 << 32

_BUNDLE = re.compile(r"^ *(?:0|0x[0-9a-f]+) +(?:[A-Z]{2})? *: *>* *\{", re.MULTILINE)
_REGION = re.compile(r"Start(?:/End empty)? region (\d+)")
_COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)
_SLOT = re.compile(r"\s*(?:%(\w+) = )?([a-z][\w.]*)(.*)", re.DOTALL)
_GUARD = re.compile(r"\((!?)(%\w+)\)")
_TARGET = re.compile(r"target = \$region(\d+)")
_INDEX = re.compile(r"\bindex: (\d+), kind: input")
_ADDRESS = re.compile(r"\[smem:(.*?\])\]")
_OPERAND = re.compile(r"%\w+|\[#allocation[^]]*\]|(?<![\w#$])-?\d+\b")
_MOVE_IF = re.compile(r"\s*\((!?)(%\w+), ([%\w]+)\), ([%\w]+)")

_MASK = 0xFFFFFFFF


def _signed(value: int) -> int:
    return (value & _MASK) - ((value & 0x80000000) << 1)


_ARITHMETIC: dict[str, Callable[..., Any]] = {
    "sadd.s32": operator.add,
    "ssub.s32": operator.sub,
    "smul.u32": operator.mul,
    "sand.u32": operator.and_,
    "sor.u32": operator.or_,
    "sxor.u32": operator.xor,
    "sshll.u32": lambda x, n: x << n,
    "sshrl.u32": lambda x, n: (x & _MASK) >> n,
    "sshra.s32": lambda x, n: x >> n,
    "smin.u32": lambda x, y: min(x & _MASK, y & _MASK),
    "sdivrem.u32": lambda x, y: (x & _MASK) % (y & _MASK),  # kRem is the only kind seen
    "spop.drf": lambda x: x,
    "scmp.eq.s32.totalorder": operator.eq,
    "scmp.ne.s32.totalorder": operator.ne,
    "scmp.lt.s32.totalorder": operator.lt,
    "scmp.le.s32.totalorder": operator.le,
    "scmp.gt.s32.totalorder": operator.gt,
    "scmp.ge.s32.totalorder": operator.ge,
    "scmp.lt.u32.totalorder": lambda x, y: (x & _MASK) < (y & _MASK),
    "pnand": lambda p, q: not (p and q),
    "pnor": lambda p, q: not (p or q),
    "pand": lambda p, q: bool(p and q),
    "por": lambda p, q: bool(p or q),
    "pneg": operator.not_,
    "pmov": bool,
}
# What only hands an address on.
_SAME_PLACE = ("scalar_lea.hbm", "int_to_ptr.hbm")
_PLACES = (*_SAME_PLACE, "scalar_lea.sflag")


@dataclasses.dataclass(frozen=True)
class Schedule:
    """What one instruction of a program does.

    Attributes:
        bundles: How many run.
        cycles: The bundles and the waits.
        read: Bytes from main memory.
        written: Bytes to it.
        read_of: Bytes read of each operand that lies in main memory, by its number.
    """

    bundles: int
    cycles: float
    read: int
    written: int
    read_of: dict[int, int]


@dataclasses.dataclass(frozen=True)
class _InMemory:
    """An address in an operand of the instruction."""

    number: int | None  # None of a result


@dataclasses.dataclass(frozen=True)
class _Flag:
    """Where it is said that a copy is done: an entry of an allocation."""

    allocation: str
    entry: int = 0


@dataclasses.dataclass(frozen=True)
class _Slot:
    """A scalar operation, a branch or a copy of a bundle. An operand is a name or a constant."""

    result: str
    opcode: str
    operands: tuple[Any, ...]
    guard: tuple[bool, str] | None = None  # it is done if this predicate has this value
    place: str = ""  # a region, or an address in scalar memory


@dataclasses.dataclass(frozen=True)
class _Bundle:
    slots: tuple[_Slot, ...]


def schedule(listing: str, bytes_per_cycle: float) -> Schedule:
    """Runs the control of one listing of final bundles, beside a memory of this bandwidth.

    Raises:
        ValueError: A branch or a copy depends on what is not known, or there is no end to it.
    """
    bundles, regions = _parse(listing)
    core = _Core(bytes_per_cycle)
    at, total, came_back = 0, 0, False
    branches: list[tuple[int, int]] = []  # when and where to
    while at < len(bundles):
        bundle = bundles[at]
        core.now += 1
        for region in core.run(bundle, came_back):
            branches.append((total + _DELAY, regions[region]))
        following = at + 1
        if branches and branches[0][0] == total:
            following = branches.pop(0)[1]
        at, total, came_back = following, total + 1, following <= at
        if total > _MOST_BUNDLES:
            raise ValueError(f"no end after {total} bundles")
    return Schedule(total, core.now, core.read, core.written, core.read_of)


class _Core:
    """The scalar state, and what was counted."""

    def __init__(self, bytes_per_cycle: float) -> None:
        self.values: dict[str, Any] = {}
        self.memory: dict[str, Any] = {}
        self.bytes_per_cycle = bytes_per_cycle
        self.now = self.moved = 0.0  # the cycle, and that in which the last copy will be done
        self.copies: dict[Any, deque[tuple[float, int]]] = defaultdict(deque)
        self.read = self.written = 0
        self.read_of: dict[int, int] = {}

    def run(self, bundle: _Bundle, came_back: bool) -> list[str]:
        """Runs a bundle; returns the regions that its branches go to."""
        taken = []
        for slot in bundle.slots:
            if slot.opcode == "sphi":
                self.values[slot.result] = self._value(slot.operands[came_back])
            elif slot.opcode == "sbr.rel":
                taken += [slot.place] if self._holds(slot) else []
            elif slot.opcode == "dma.done.wait":
                self._wait(slot)
            elif slot.opcode.startswith("dma."):
                self._move(slot)
            elif slot.opcode == "sst":
                self.memory[slot.place] = self._value(slot.operands[0])
            elif slot.opcode == "sld":
                self.values[slot.result] = self.memory.get(slot.place)
            else:
                self.values[slot.result] = self._computed(slot)
        return taken

    def _value(self, operand: Any) -> Any:
        return self.values.get(operand) if isinstance(operand, str) else operand

    def _holds(self, slot: _Slot) -> bool:
        if slot.guard is None:
            return True
        wanted, name = slot.guard
        value = self._value(name)
        if value is None:
            raise ValueError(f"{slot.opcode} depends on {name}, which is not known")
        return bool(value) == wanted

    def _move(self, slot: _Slot) -> None:
        source, granules, target, flag = map(self._value, slot.operands)
        reads = slot.opcode == "dma.hbm_to_vmem" or isinstance(source, _InMemory)
        writes = slot.opcode == "dma.vmem_to_hbm" or isinstance(target, _InMemory)
        if not (reads or writes) or not self._holds(slot):
            return
        if granules is None:
            raise ValueError(f"{slot.opcode} moves {slot.operands[1]} granules: not known")
        size = granules * _GRANULE
        self.moved = max(self.now, self.moved) + size / self.bytes_per_cycle
        self.copies[flag].append((self.moved, granules))
        self.read += size * reads
        self.written += size * writes
        if isinstance(source, _InMemory) and source.number is not None:
            self.read_of[source.number] = self.read_of.get(source.number, 0) + size

    def _wait(self, slot: _Slot) -> None:
        flag, granules = map(self._value, slot.operands)
        if not isinstance(granules, int) or not self._holds(slot):
            return
        copies = self.copies[flag]
        while granules > 0 and copies:
            done, size = copies.popleft()
            self.now = max(self.now, done)
            granules -= size

    def _computed(self, slot: _Slot) -> Any:
        operands = [self._value(each) for each in slot.operands]
        if slot.opcode == "smov":
            moves = slot.guard is None or self._value(slot.guard[1]) == slot.guard[0]
            return operands[0 if moves else 1]
        if slot.opcode == "scalar_select":
            return None if operands[0] is None else operands[1 if operands[0] else 2]
        if slot.opcode == "inlined_call_operand.hbm" or slot.opcode in _SAME_PLACE:
            return operands[0]
        if slot.opcode == "scalar_lea.sflag" and isinstance(operands[0], _Flag):
            return _Flag(operands[0].allocation, operands[1])
        if slot.opcode == "sshll.u32" and isinstance(operands[0], _InMemory):
            return operands[0]  # in other units
        if not all(isinstance(each, int) for each in operands):
            return None
        result = _ARITHMETIC[slot.opcode](*operands)
        return result if isinstance(result, bool) else _signed(result)


def _parse(listing: str) -> tuple[list[_Bundle], dict[str, int]]:
    """The bundles, and where each region starts."""
    heads = list(_BUNDLE.finditer(listing))
    ends = [head.start() for head in heads[1:]] + [len(listing)]
    bundles, regions = [], {}
    for i, (head, end) in enumerate(zip(heads, ends, strict=True)):
        text = listing[head.end() : end]
        regions |= dict.fromkeys(_REGION.findall(text), i)
        slots = [_slot(part) for part in _COMMENT.sub("", text).split(";;")]
        known = [slot for slot in slots if slot is not None]
        known.sort(key=lambda slot: slot.opcode != "sphi")  # the others of a bundle read them
        bundles.append(_Bundle(tuple(known)))
    return bundles, regions


def _slot(text: str) -> _Slot | None:
    """Reads one slot; None for what does not steer."""
    found = _SLOT.match(text)
    if found is None:
        return None
    result, opcode, rest = _name(found[1] or ""), found[2], found[3]
    if opcode == "smov" and (move := _MOVE_IF.match(rest)):
        operands = (_operand(move[4]), _operand(move[3]))
        return _Slot(result, opcode, operands, (not move[1], _name(move[2])))
    if opcode == "inlined_call_operand.hbm":
        number = _INDEX.search(rest)
        return _Slot(result, opcode, (_InMemory(int(number[1]) if number else None),))
    guard = _GUARD.search(rest)
    guarded = None if guard is None else (not guard[1], _name(guard[2]))
    if opcode == "sbr.rel":
        return _Slot(result, opcode, (), guarded, _TARGET.findall(rest)[0])
    address = _ADDRESS.search(rest) if opcode in ("sst", "sld") else None
    plain = _GUARD.sub("", _ADDRESS.sub("", rest).replace("[thread:", ""))
    operands = tuple(map(_operand, _OPERAND.findall(plain)))
    if opcode.startswith("dma."):
        return _Slot(result, opcode, operands[: 2 if opcode == "dma.done.wait" else 4], guarded)
    if address is not None:
        return _Slot(result, opcode, operands, None, address[1])
    if opcode in _ARITHMETIC or opcode in ("smov", "sphi", "scalar_select", *_PLACES):
        return _Slot(result, opcode, operands)
    return None


def _operand(text: str) -> str | int | _Flag:
    if text.startswith("["):
        name, _, entry = text.strip("[]").partition(" + $")
        return _Flag(name, int(entry or "0", 16))
    return _name(text) if text.startswith("%") else _signed(int(text))


def _name(text: str) -> str:
    """A value without the register that holds it."""
    return re.sub(r"_[a-z]+\d+$", "", text.removeprefix("%"))
