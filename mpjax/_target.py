"""Hardware, as far as a policy has to know it: what it multiplies, how fast, and how fast it reads.

8 bits are not one dtype: TPU v5 and v6 multiply int8, TPU7x float8, Hopper both, and CPUs int8 if
they have an instruction for it. The figures are the vendors', each with its source; none of them
was measured by us.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping

import jax

DtypeRates = Mapping[str, float] | tuple[tuple[str, float], ...]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """One accelerator chip, or the CPU of one machine.

    Attributes:
        name: What `target=` takes, such as `"v6e"` or `"h200"`.
        platform: JAX' name of the platform: `"cpu"`, `"tpu"`, `"cuda"` or `"rocm"`.
        peak: Operations per second (a multiplication and an addition are two) of a matrix product
            without sparsity, for each dtype that the hardware multiplies by itself, both operands
            alike. A dict at construction, sorted pairs afterwards. float32 is at JAX' default
            precision: one bfloat16 pass on TPUs, TensorFloat-32 on NVIDIA GPUs.
        bandwidth: Bytes per second that its memory reads or writes.
        memory_bytes: The size of its memory; None where the name does not say it.
        tile: The contracting and the output axis of an 8-bit product are padded to multiples of
            this.
        weight_layout: The order in which the axes of an 8-bit weight are best stored: `"KN"`, or
            `"NK"`, the contracting axis last.
        devices: How many devices JAX shows for one chip; the figures are of the whole chip.
        kinds: Regular expressions of the `device_kind`s that JAX gives it.
        source: Where the figures are from, and what is special.
    """

    name: str
    platform: str
    peak: DtypeRates
    bandwidth: float
    memory_bytes: int | None = None
    tile: int = 1
    weight_layout: str = "KN"
    devices: int = 1
    kinds: tuple[str, ...] = ()
    source: str = ""

    def __post_init__(self):
        rates = dict(self.peak)
        if "float32" not in rates or not all(
            rate > 0 for rate in [*rates.values(), self.bandwidth]
        ):
            raise ValueError(
                f"Target {self.name!r} has peak={rates} and bandwidth={self.bandwidth}: they must "
                "be positive, and `peak` must have 'float32', in which everything else is computed"
            )
        object.__setattr__(self, "peak", tuple(sorted(rates.items())))

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The dtypes that it multiplies by itself."""
        return tuple(dict(self.peak))

    def rate(self, dtype: str) -> float:
        """Operations per second of a product of two operands of `dtype`.

        One that is not native is computed in the widest native dtype of at most 32 bits that holds
        it: float32, or bfloat16 for 8 bits where that is native.
        """
        rates = dict(self.peak)
        if dtype in rates:
            return rates[dtype]
        is_8_bit = dtype.startswith(("float8", "int8", "uint8", "int4", "uint4"))
        return max(rates["float32"], rates.get("bfloat16", 0) if is_8_bit else 0)

    @property
    def eight_bits(self) -> str | None:
        """The 8-bit dtype to multiply in: float8 (E4M3) before int8, None if it has neither.

        Where both run at one rate float8 needs no calibration and keeps a wide range.
        """
        return next((d for d in ("float8_e4m3fn", "int8") if d in self.dtypes), None)


def targets() -> tuple[Target, ...]:
    """Returns the hardware that `target=` knows by name: TPUs, GPUs, and CPUs by instruction set.

    The CPU of this machine, with its number of cores, is `mp.resolve_target("cpu")`.
    """
    return tuple(_table().values())


def resolve_target(target: "str | Target | None" = None) -> Target:
    """Returns the `Target` that is meant.

    Args:
        target: A name of `mp.targets()`; a `device_kind` of JAX, such as `"TPU v6 lite"`; `"cpu"`
            for the CPU at hand; None for the device at hand, `jax.devices()[0]`; or a `Target`.

    Raises:
        TypeError: If `target` is something else.
        ValueError: If no target has this name, or the device at hand is not in the table.
    """
    if isinstance(target, Target):
        return target
    if target is None:
        device = jax.devices()[0]
        return _named("cpu" if device.platform == "cpu" else device.device_kind, at_hand=True)
    if isinstance(target, str):
        return _named(target, at_hand=False)
    raise TypeError(
        f"`target` is {target!r} of type {type(target).__name__}: give a name such as 'v6e', a "
        "mp.Target, or None for the device at hand"
    )


def _named(name: str, at_hand: bool) -> Target:
    if name.lower() == "cpu":
        from ._target_cpu import cpu_at_hand

        return cpu_at_hand()
    table = _table()
    if name.lower() in table:
        return table[name.lower()]
    for each in table.values():
        if any(re.fullmatch(kind, name, re.IGNORECASE) for kind in each.kinds):
            return each
    what = "the device at hand is" if at_hand else "`target` is"
    known = ", ".join(map(repr, ("cpu", *table)))
    raise ValueError(
        f"{what} {name!r}, of which nothing is known. Known are {known}. For other hardware, give "
        "its figures: mp.Target(name=..., platform=..., peak=..., bandwidth=...)"
    )


@functools.cache
def _table() -> dict[str, Target]:
    from ._target_cpu import CPUS
    from ._target_table import ACCELERATORS

    return {each.name: each for each in (*ACCELERATORS, *CPUS)}
