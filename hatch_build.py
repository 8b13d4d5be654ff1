"""Compiles the native CPU kernels into the wheel, where there is a C++17 compiler.

Without one, or with `MPJAX_NATIVE=0` in the environment, the package is pure Python, and XLA
computes everything. An error of the compiler is a warning, unless `MPJAX_NATIVE=1` asks for the
kernels.
`CXX` names another compiler than the first of c++, g++ and clang++.
"""

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PACKAGE = Path("kernels", "mpjax_kernels")
LIBRARY = "libmpjax_native.so"
NOTE = "native_build.txt"  # why there is no library, for `mpjax doctor`
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden")
# Float arithmetic as it is written, so that every machine and every loop rounds alike.
FLAGS += ("-ffp-contract=off", "-fno-math-errno")
# What instruction sets need, by how the names of their sources end.
AVX2 = ("-mavx2", "-mfma", "-mf16c")
VNNI = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni")
INSTRUCTION_SETS = {
    "avx2": AVX2,
    "avx_vnni": (*AVX2, "-mavxvnni"),
    "avx512_vnni": VNNI,
    "avx512_bf16": (*VNNI, "-mavx512vbmi", "-mavx512bf16"),
}
# A library that was built against an older version of XLA's FFI is loaded by newer ones, and not
# the other way round.
HEADERS = ("jaxlib>=0.10,<0.11; python_version < '3.15'", "jaxlib>=0.10")


class NativeKernels(BuildHookInterface):
    """The hook that hatchling calls before it builds a wheel."""

    def dependencies(self) -> list[str]:
        """What the build needs: the headers of XLA's FFI, if something will be compiled."""
        return list(HEADERS) if _compiler() else []

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compiles, and adds the library to the wheel, or to the checkout if it is editable."""
        root = Path(self.root)
        beside = root / PACKAGE / LIBRARY
        if version == "editable":
            beside.unlink(missing_ok=True)
            beside.with_name(NOTE).unlink(missing_ok=True)
        compiler = _compiler()
        if compiler is None:
            self._note(_why_no_compiler(), version, build_data)
            return
        folder = Path(tempfile.mkdtemp(prefix="mpjax-native-"))
        try:
            build(compiler, root / PACKAGE / "native", folder)
        except (OSError, subprocess.CalledProcessError) as error:
            if os.environ.get("MPJAX_NATIVE") == "1":
                raise
            output = getattr(error, "stderr", None) or ""
            self.app.display_warning(f"no native kernels, the package works without: {error}")
            self.app.display_warning(output[-2000:])
            last = (output.strip().splitlines() or [str(error)])[-1]
            self._note(f"{compiler} failed: {last}", version, build_data)
            return
        if version == "editable":
            shutil.move(folder / LIBRARY, beside)
        else:
            build_data["force_include"][str(folder / LIBRARY)] = f"{PACKAGE.name}/{LIBRARY}"
        build_data["pure_python"] = False
        # Of no version of Python: it is loaded by ctypes.
        where = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{where}"

    def _note(self, why: str, version: str, build_data: dict[str, Any]) -> None:
        """Leaves word of why there are no native kernels where the library would be."""
        if version == "editable":
            Path(self.root, PACKAGE, NOTE).write_text(why + "\n")
            return
        note = Path(tempfile.mkdtemp(prefix="mpjax-native-")) / NOTE
        note.write_text(why + "\n")
        build_data["force_include"][str(note)] = f"{PACKAGE.name}/{NOTE}"


def build(
    compiler: str,
    sources: Path,
    folder: Path,
    extra: tuple[str, ...] = (),
    program: str | None = None,
) -> None:
    """Compiles all `*.cc` of a folder, in parallel, and links the library into another.

    `extra` options are for both. With a name for it, a program is linked instead.

    Raises:
        OSError, subprocess.CalledProcessError: If the compiler cannot be run, or fails.
    """
    headers = importlib.util.find_spec("jaxlib")
    if headers is None or headers.origin is None:
        raise FileNotFoundError("jaxlib, whose headers the native kernels include, is not there")
    include = Path(headers.origin).parent / "include"
    known = {k: v for k, v in INSTRUCTION_SETS.items() if _takes(compiler, v, folder)}
    defined = [f"-DMPJAX_HAS_{name.upper()}" for name in known]

    def compile_one(source: Path) -> str:
        target = str(folder / f"{source.stem}.o")
        special = [flag for name in known if source.stem.endswith(name) for flag in known[name]]
        options = (*FLAGS, *defined, *special, *extra, "-isystem", str(include))
        _run(compiler, *options, "-c", str(source), "-o", target)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sorted(sources.glob("*.cc"))))
    if program is not None:
        return _run(compiler, *objects, *extra, "-pthread", "-o", str(folder / program))
    # On Linux the standard library is part of it, so that it runs where that is older.
    link = ("-static-libstdc++", "-static-libgcc", "-Wl,--exclude-libs,ALL", "-s")
    link = link if sys.platform == "linux" else ()
    _run(compiler, "-shared", *objects, *link, *extra, "-o", str(folder / LIBRARY))


def _compiler() -> str | None:
    """The compiler, if native kernels are wanted and there is one."""
    if os.environ.get("MPJAX_NATIVE") == "0" or os.name != "posix":
        return None
    return next(filter(None, map(shutil.which, _compilers())), None)


def _compilers() -> list[str]:
    return [name for name in (os.environ.get("CXX"), "c++", "g++", "clang++") if name]


def _why_no_compiler() -> str:
    if os.environ.get("MPJAX_NATIVE") == "0":
        return "it was installed with MPJAX_NATIVE=0"
    if os.name != "posix":
        return f"native kernels are not built on {platform.system()}"
    return f"none of the C++ compilers {', '.join(_compilers())} was found"


def _takes(compiler: str, flags: tuple[str, ...], folder: Path) -> bool:
    """Whether this is an x86 CPU, and the compiler knows these instructions of it."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return False
    source = folder / "empty.cc"
    source.write_text("")
    command = [compiler, *flags, "-c", str(source), "-o", str(folder / "empty.obj")]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _run(*command: str) -> None:
    subprocess.run(command, capture_output=True, check=True, text=True)
