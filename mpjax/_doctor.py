"""`mpjax doctor`: what is installed, what the hardware multiplies, what becomes of each mode."""

import importlib.metadata
import platform
import re
from collections.abc import Iterator

import jax

import mpjax_kernels as mk

from ._modes import AUTO8, Mode, modes
from ._quantized_policy import QuantizedDTypePolicy
from ._target import Target, resolve_target

Rows = list[tuple[str, ...]]
_PACKAGES = ("mpjax", "jax", "jaxlib", "flax", "optax", "ml_dtypes", "numpy", "orbax-checkpoint")
_EXTRAS = {
    "export": "mpjax.export and load_exported",
    "progress": "a bar while batches calibrate a model",
    "tpu": "the TPU compiler, which needs no TPU: explain and tests for TPUs",
    "cuda-compile": "the NVIDIA compiler, which needs no GPU: explain and tests for GPUs",
    "demo": "what `make demo` plots and prints with",
    "encoder": "what examples/quantize_sentence_encoder.py needs",
    "bench": "the libraries that benchmarks/ compares with",
    "dev": "what the tests and linters need",
}
_BEHIND_EXTRAS = {"jax[tpu]": "libtpu", "pyright[nodejs]": "pyright"}


def sections() -> Iterator[tuple[str, Rows]]:
    """Yields the title and the rows, a header first, of each part of the report."""
    yield "Versions", _versions()
    target, devices = _devices()
    yield "Devices", devices
    yield "Modes, and what multiplies them on this device", _modes(target)
    yield "Kernels", _kernels(target)
    yield "Extras: pip install 'mpjax[NAME]'", _extras()


def describe(target: Target) -> tuple[str, ...]:
    """The row of a target: its name, dtypes and rates, memory and bandwidth."""
    scale, unit = (1e12, "T") if max(target.rates.values()) >= 1e13 else (1e9, "G")
    rates = ", ".join(f"{dtype} {rate / scale:,.0f}" for dtype, rate in target.rates.items())
    memory = "" if target.memory_bytes is None else f"{target.memory_bytes / 1e9:,.0f}"
    bandwidth = f"{target.bandwidth / 1e9:,.0f}"
    eight = target.eight_bits or "none"
    return target.name, eight, f"{rates} {unit}op/s", memory, bandwidth


HEADER = ("target", "8 bits", "multiplies at", "GB", "GB/s")


def _versions() -> Rows:
    rows: Rows = [("package", "version"), ("python", platform.python_version())]
    for name in _PACKAGES:
        try:
            rows.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            rows.append((name, "not installed"))
    return rows


def _devices() -> tuple[Target | None, Rows]:
    """The target at hand, None if JAX starts no device or the table lacks it; and the rows."""
    rows: Rows = [("device", "what is known of it")]
    try:
        kinds = [(each.platform, each.device_kind) for each in jax.devices()]
    except RuntimeError as error:
        return None, [*rows, ("none", f"JAX cannot start one: {str(error).splitlines()[0]}")]
    try:
        target = resolve_target()
    except ValueError as error:
        target, known = None, str(error)
    else:
        known = f"{target.name}: {target.source}"
    for kind in dict.fromkeys(kinds):
        rows.append((f"{kinds.count(kind)} x {kind[0]}, {kind[1]}", known))
    if target is not None:
        _, eight, rates, memory, bandwidth = describe(target)
        rows.append(("", f"8 bits: {eight}; {rates}; {memory} GB at {bandwidth} GB/s"))
    return target, rows


def _modes(target: Target | None) -> Rows:
    rows: Rows = [("mode", "weights", "activations", "here")]
    for mode in modes():
        rows.append((mode.name, mode.weights, mode.activations, _becomes(mode, target)))
    return rows


def _becomes(mode: Mode, target: Target | None) -> str:
    """What a mode means on a target."""
    if target is None:
        return "unknown hardware: give target= to mp.wrap"
    if mode.weights == AUTO8:
        resolved = QuantizedDTypePolicy(mode.name, "float32").resolve(target)
        if not isinstance(resolved, QuantizedDTypePolicy):
            return "the source policy: nothing multiplies 8 bits here"
        return resolved.mode
    if mode.activations == "none":
        return "weights are decoded, products in the compute dtype"
    if mode.activation_format != mode.weights:  # int8 by int4
        if "int8" not in target.dtypes:
            return "emulated: decoded, and multiplied in more bits"
        native = mk.native_kernels()
        if target.platform == "cpu" and "int8" in native.formats:
            return f"native kernels multiply int8 by int4 ({native.isa})"
        return "int4 is widened: int8 x int8, native"
    if mode.weights in target.dtypes:
        return f"{mode.weights} x {mode.weights}, native"
    is_float8 = mode.weights.startswith("float8") and mode.granularity != "128x128"
    if target.platform == "cpu" and is_float8:
        native = mk.native_kernels()
        if mode.weights in native.formats:
            return f"native kernels decode in registers ({native.isa})"
    return "emulated: decoded, and multiplied in more bits"


def _kernels(target: Target | None) -> Rows:
    rows: Rows = [("kernels", "state")]
    if target is not None:
        names = ", ".join(mk.implementations(target.platform))
        rows.append(("products, in the order tried", names))
    native = mk.native_kernels()
    if native.isa is not None:
        rows.append(("native CPU kernels", f"used, with {native.isa}: {', '.join(native.formats)}"))
        prepacked = native.tiles_refusal or "int8 weights, by mp.quantize(..., prepack=True)"
        rows.append(("prepacked weights", prepacked))
        return rows
    rows.append(("native CPU kernels", f"not used: {native.refusal}"))
    rows.append(("", f"this CPU is {platform.machine()}, {resolve_target('cpu').name}"))
    return rows


def _extras() -> Rows:
    rows: Rows = [("extra", "state", "adds")]
    try:
        metadata = importlib.metadata.metadata("mpjax")
    except importlib.metadata.PackageNotFoundError:
        return [*rows, ("", "", "mpjax runs from a checkout that is not installed")]
    required = metadata.get_all("Requires-Dist") or []
    for extra in metadata.get_all("Provides-Extra") or []:
        needed = [_distribution(each) for each in required if _belongs(each, extra)]
        missing = [name for name in needed if not _is_installed(name)]
        state = f"lacks {', '.join(missing)}" if missing else "installed"
        rows.append((extra, state, _EXTRAS.get(extra, ", ".join(needed))))
    return rows


def _belongs(requirement: str, extra: str) -> bool:
    return re.search(rf"""extra == ["']{re.escape(extra)}["']""", requirement) is not None


def _distribution(requirement: str) -> str:
    """The name of the distribution that a requirement is about."""
    found = re.match(r"[\w.-]+(\[[\w,-]+\])?", requirement)
    name = found[0] if found else requirement
    return _BEHIND_EXTRAS.get(name, name.partition("[")[0])


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
