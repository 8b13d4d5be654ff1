"""Runs the native kernels under sanitizers, whose first finding stops the run.

First a program without JAX, `calls.cc`, calls them by every instruction set, and everything in it
is instrumented; then the tests run, with a library that was built with the same sanitizers into a
copy of the package of which only they know. JAX itself is not instrumented, so reads beyond its
buffers are not seen there, and ThreadSanitizer would take what XLA's threads do unseen for races:
`thread` runs the program alone.

    python kernels/sanitize.py [arguments of pytest]    # AddressSanitizer and UBSan
    python kernels/sanitize.py thread                   # ThreadSanitizer
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
THREAD = ("-fsanitize=thread", "-g", "-O1")
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g", "-O1")
# Shapes at random, with 0 and primes among them, sums of several blocks, and every bit pattern.
TESTS = "(exact or integers or decoded or fit or bits or rows or vmap or finite)"
TESTS += " and not 2000 and not 500"


def main(arguments: list[str]) -> int:
    sys.path.insert(0, str(ROOT))
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise FileNotFoundError("g++ is not there: name another compiler that has libasan as `CXX`")
    with tempfile.TemporaryDirectory(prefix="mpjax-sanitized-") as folder:
        if arguments == ["thread"]:
            return _calls(compiler, Path(folder), THREAD)
        failed = _calls(compiler, Path(folder), SANITIZERS)
        return failed or _tests(compiler, folder, arguments)


def _calls(compiler: str, folder: Path, sanitizers: tuple[str, ...]) -> int:
    """Runs `calls.cc` by every instruction set; the first that fails ends it."""
    from hatch_build import INSTRUCTION_SETS, build

    sources = Path(folder, "sources")
    shutil.copytree(ROOT / "kernels" / "mpjax_kernels" / "native", sources)
    shutil.copy(ROOT / "kernels" / "calls.cc", sources)
    build(compiler, sources, folder, sanitizers, program="calls")
    for isa in ("portable", *INSTRUCTION_SETS):
        environment = os.environ | {"MPJAX_NATIVE_ISA": isa, "TSAN_OPTIONS": "halt_on_error=1"}
        print(f"{isa}: ", end="", flush=True)
        done = subprocess.run([folder / "calls"], env=environment, check=False)
        if done.returncode:
            return done.returncode
    return 0


def _tests(compiler: str, folder: str, arguments: list[str]) -> int:
    from hatch_build import build

    package = Path(folder, "mpjax_kernels")
    shutil.copytree(ROOT / "kernels" / "mpjax_kernels", package)
    (package / "libmpjax_native.so").unlink(missing_ok=True)
    objects = Path(folder, "objects")
    objects.mkdir()
    build(compiler, package / "native", objects, SANITIZERS)
    shutil.move(objects / "libmpjax_native.so", package)
    libraries = [_library(compiler, f"lib{name}.so") for name in ("asan", "ubsan", "stdc++")]
    environment = os.environ | {
        "LD_PRELOAD": " ".join(libraries),
        # JAX frees by its own library what ours allocates: the texts of errors.
        "ASAN_OPTIONS": "detect_leaks=0:alloc_dealloc_mismatch=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": os.pathsep.join([folder, str(ROOT)]),
    }
    tests = sorted(map(str, (ROOT / "tests").glob("test_kernels_native*.py")))
    command = [sys.executable, "-m", "pytest", "-x", "--capture=sys", "-m", ""]
    command += ["-k", TESTS, *tests, *arguments]
    return subprocess.run(command, env=environment, cwd=ROOT, check=False).returncode


def _library(compiler: str, name: str) -> str:
    """The path of a library of the compiler's runtime."""
    command = [compiler, f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, check=True, text=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
