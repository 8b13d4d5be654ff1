"""CPUs, by the widest instruction set that multiplies, and which of them this machine is.

A CPU's name does not say how many cores a process gets, or at what clock. So the named targets are
one core at a nominal 2 GHz with a nominal 10 GB/s (a server of 32 cores with eight channels of
DDR5-4800 has 307 GB/s): their ratios are what decides anything. The operations per cycle are two
vector units' of every core:

    bits of a register / bits of an operand * 2 (multiply, add) * 2 (units)

and the same again as often as an instruction adds up neighbouring products.
"""

import dataclasses
import functools
import os
import platform
from pathlib import Path

from ._target import Target

HERTZ = 2e9
BANDWIDTH = 10e9
_CPUINFO = Path("/proc/cpuinfo")


def _cpu(name: str, flags: str, source: str, **per_cycle: int) -> tuple[frozenset[str], Target]:
    target = Target(
        name=f"cpu-{name}",
        platform="cpu",
        peak={dtype: operations * HERTZ for dtype, operations in per_cycle.items()},
        bandwidth=BANDWIDTH,
        weight_layout="NK",
        source=f"{source}; one core at a nominal 2 GHz and 10 GB/s",
    )
    return frozenset(flags.split()), target


_INTEL = "Intel 64 Software Developer's Manual, volume 2"
_ARM = "Arm Architecture Reference Manual for A-profile"

# The flags of /proc/cpuinfo that a CPU must have, the most capable first.
_BY_FLAGS = (
    _cpu(
        "amx",
        "amx_tile amx_int8 amx_bf16",
        f"{_INTEL}, TDPBSSD and TDPBF16PS: 16 cycles a tile of 16 x 64 bytes by 16",
        float32=64,
        bfloat16=1024,
        int8=2048,
    ),
    _cpu(
        "avx512-bf16",
        "avx512f avx512_vnni avx512_bf16",
        f"{_INTEL}, VPDPBUSD and VDPBF16PS",
        float32=64,
        bfloat16=128,
        int8=256,
    ),
    _cpu("avx512-vnni", "avx512f avx512_vnni", f"{_INTEL}, VPDPBUSD (EVEX)", float32=64, int8=256),
    _cpu("avx-vnni", "avx2 avx_vnni", f"{_INTEL}, VPDPBUSD (VEX)", float32=32, int8=128),
    _cpu("avx512", "avx512f", f"{_INTEL}, VFMADD231PS; no dot product of bytes", float32=64),
    _cpu("avx2", "avx2 fma", f"{_INTEL}, VFMADD231PS; no dot product of bytes", float32=32),
    _cpu(
        "arm-i8mm", "asimd i8mm bf16", f"{_ARM}, SMMLA, BFMMLA", float32=16, bfloat16=64, int8=128
    ),
    _cpu("arm-dotprod", "asimd asimddp", f"{_ARM}, SDOT", float32=16, int8=64),
)
_GENERIC = _cpu("generic", "", "vectors of 128 bits, no dot product of bytes", float32=16)[1]

CPUS = (*(target for _, target in _BY_FLAGS), _GENERIC)


@functools.cache
def cpu_at_hand() -> Target:
    """This machine's CPU: the target of its instruction set, times the cores of this process."""
    named = target_of_flags(_flags())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores = cores or 1
    return dataclasses.replace(
        named,
        peak={dtype: rate * cores for dtype, rate in named.peak},
        bandwidth=named.bandwidth * cores,
        memory_bytes=_memory_bytes(),
        source=f"{named.source}, times {cores}",
    )


def target_of_flags(flags: frozenset[str]) -> Target:
    """The CPU target of the first set of flags that are all there."""
    return next((target for needed, target in _BY_FLAGS if needed <= flags), _GENERIC)


def _flags() -> frozenset[str]:
    """What Linux says that the CPU can do; of Apple's Arm CPUs, all of which have SDOT, that."""
    if platform.system() == "Darwin" and platform.machine() == "arm64":
        return frozenset(("asimd", "asimddp"))
    if not _CPUINFO.exists():
        return frozenset()
    lines = _CPUINFO.read_text().splitlines()
    features = (line for line in lines if line.lower().startswith(("flags", "features")))
    return frozenset(next(features, ":").partition(":")[2].split())


def _memory_bytes() -> int | None:
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
