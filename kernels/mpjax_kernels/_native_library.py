"""The library of native CPU kernels (`native/*.cc`), if the package was built with one.

It is loaded when this package is imported, and nothing is compiled then. Two variables of the
environment are read at that time: `MPJAX_NATIVE=0` leaves it alone, and `MPJAX_NATIVE_ISA` names
an instruction set to use instead of the best that the CPU has, to test it. What a CPU has not is
refused by name, with a warning. Machines that are not x86 have `portable`, plain C++, alone.
"""

import ctypes
import os
import platform
import re
import warnings
from functools import cache
from pathlib import Path

import jax

_PATH = Path(__file__).parent / "libmpjax_native.so"
_TARGETS = ("mpjax_attention_output", "mpjax_attention_scores")
_TARGETS += ("mpjax_dynamic_grouped_dot", "mpjax_dynamic_int8_dot", "mpjax_float8_dot")
_TARGETS += ("mpjax_grouped_dot", "mpjax_int8_dot", "mpjax_quantize", "mpjax_weight_dot")

# The dtypes of arrays that kernels take, and of what they return.
REALS = ("float32", "bfloat16", "float16")
# The formats that kernels of an instruction set multiply faster than XLA, which is what counts
# where the environment does not ask for it.
FLOAT8, INT8, INT4 = ("float8_e4m3fn", "float8_e5m2"), ("int8",), ("int4",)
_FASTER: dict[str, tuple[str, ...]] = {
    "portable": (),
    "avx2": INT8 + INT4,
    "avx_vnni": INT8 + INT4,
    "avx512_vnni": INT8 + INT4,
    "avx512_bf16": INT8 + INT4 + FLOAT8,
}
_LEAST = "AVX2, FMA and F16C"
_NEEDS = dict.fromkeys(FLOAT8, "AVX512-BF16 and AVX512-VBMI")
_NEEDS |= dict.fromkeys(INT8 + INT4, _LEAST)


# Outputs and inputs of a tile of int8, and who multiplies tiles.
TILE = (16, 4)
_READS_TILES = ("avx512_vnni", "avx512_bf16")


def reads_tiles() -> bool:
    """Whether the native kernels of this machine multiply int8 that is stored in tiles."""
    return tiles_refusal() is None


def tiles_refusal() -> str | None:
    """Why the native kernels of this machine do not, or why there are none; None if they do."""
    isa, refusal = _load()
    if refusal is not None or isa in _READS_TILES:
        return refusal
    return f"tiles are read by AVX512-VNNI, and the native kernels use {isa} here"


@cache
def native_refusal(format: str = FLOAT8[0], by_array: bool = False) -> str | None:
    """Why there are no native kernels for a format here; None if there are.

    Args:
        format: The name of the format.
        by_array: Whether it is multiplied by an array, and not by one of its kind.
    """
    isa, refusal = _load()
    faster = _FASTER.get(isa, ())
    # XLA decodes all of a float8 weight, which takes it longer than the product.
    is_faster = format in faster or (by_array and bool(faster))
    asked = os.environ.get("MPJAX_NATIVE_ISA") == isa
    if refusal is None and not is_faster and not asked:
        needs = _LEAST if by_array else _NEEDS[format]
        return (
            f"this CPU ({platform.machine()}) has no {needs}: XLA's own {format} product is faster"
        )
    return refusal


@cache
def _load() -> tuple[str, str | None]:
    """The instruction set, with XLA knowing the kernels' names, or why there are none."""
    if os.environ.get("MPJAX_NATIVE") == "0":
        return "", "the environment has MPJAX_NATIVE=0"
    if not _PATH.exists():
        return "", (
            f"{_PATH.name} is not there: mpjax was built without a C++17 compiler; with one (g++ "
            "or clang++), install it again from source"
        )
    try:
        library = ctypes.CDLL(str(_PATH))
    except OSError as error:
        return "", f"{_PATH.name} cannot be loaded: {error}"
    built = library.mpjax_native_ffi_major(), library.mpjax_native_ffi_minor()
    here = _ffi_version()
    if built[0] != here[0] or built[1] > here[1]:
        return "", (
            f"{_PATH.name} was built against version {built} of XLA's FFI, newer than {here}, that "
            "of this jaxlib: install mpjax again from source"
        )
    library.mpjax_native_isa.restype = ctypes.c_char_p
    isa, wanted = library.mpjax_native_isa().decode(), os.environ.get("MPJAX_NATIVE_ISA", "")
    if wanted not in ("", isa):
        why = "this CPU has not, or the compiler had not" if wanted in _FASTER else "is unknown"
        refusal = (
            f"the environment has MPJAX_NATIVE_ISA={wanted}, which {why}: the best here is {isa}, "
            f"and there are {', '.join(_FASTER)}"
        )
        warnings.warn(f"no native kernels are used: {refusal}", RuntimeWarning, stacklevel=2)
        return "", refusal
    for target in _TARGETS:
        function = jax.ffi.pycapsule(getattr(library, target))
        jax.ffi.register_ffi_target(target, function, platform="cpu")
    return isa, None


def _ffi_version() -> tuple[int, int]:
    """The version of the FFI of this jaxlib, which only its headers tell.

    A library that is too new must not be registered: the CPU backend would not start.
    """
    header = Path(jax.ffi.include_dir(), "xla", "ffi", "api", "c_api.h").read_text()
    found = dict(re.findall(r"#define XLA_FFI_API_(MAJOR|MINOR) (\d+)", header))
    return int(found["MAJOR"]), int(found["MINOR"])
