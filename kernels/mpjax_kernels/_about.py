"""What of this package runs where it is: for who diagnoses an installation."""

import ctypes
import os
from dataclasses import dataclass
from pathlib import Path

from ._dot_general import IMPLEMENTATIONS
from ._native_library import _PATH, FLOAT8, INT8, native_refusal, tiles_refusal

_BUILD_NOTE = Path(__file__).parent / "native_build.txt"  # written by hatch_build.py


@dataclass(frozen=True)
class NativeKernels:
    """Whether there are native CPU kernels.

    Attributes:
        isa: The instruction set that they use here; None if they are not used.
        refusal: Why they are not used; None if they are.
        formats: The formats of which they multiply two operands.
        tiles_refusal: Why they read no weights that `prepacked` cut into tiles; None if they do.
    """

    isa: str | None
    refusal: str | None
    formats: tuple[str, ...] = ()
    tiles_refusal: str | None = None


def native_kernels() -> NativeKernels:
    """Returns whether the native CPU kernels are used here, and else why not."""
    formats = tuple(each for each in (*INT8, *FLOAT8) if native_refusal(each) is None)
    refusal = native_refusal(INT8[0])  # the format that asks the least of a CPU
    if formats:
        library = ctypes.CDLL(str(_PATH))
        library.mpjax_native_isa.restype = ctypes.c_char_p
        isa = library.mpjax_native_isa().decode()
        return NativeKernels(isa, None, formats, tiles_refusal())
    if not _PATH.exists() and os.environ.get("MPJAX_NATIVE") != "0":
        refusal = "they were not compiled, as this is a checkout that was not installed"
        if _BUILD_NOTE.exists():
            why = _BUILD_NOTE.read_text().strip()
            refusal = f"they were not compiled when the package was installed: {why}"
    return NativeKernels(None, refusal, tiles_refusal=refusal)


def implementations(platform: str) -> tuple[str, ...]:
    """Returns the implementations of `dot_general` on a platform, in the order they are tried.

    Args:
        platform: `"cpu"`, `"tpu"`, `"cuda"` or `"rocm"`.
    """
    return tuple(
        name
        for name, each in IMPLEMENTATIONS.items()
        if (not each.platforms or platform in each.platforms)
        and not (name == "native" and native_refusal(INT8[0]))
    )
