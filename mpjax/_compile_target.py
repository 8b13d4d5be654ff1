"""Compiles a function for hardware that need not be there, and returns what the compiler made.

TPUs by libtpu, which compiles without a TPU; NVIDIA GPUs by CUDA's plugin for JAX, which compiles
without a GPU or CUDA; the device at hand, and the CPU, as ever.
"""

import contextlib
import dataclasses
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from ._compile_gpu import GPUS
from ._target import Target, resolve_target

_TPUS = {
    "v4": "v4:1x1x1",
    "v5e": "v5e:1x1",
    "v5p": "v5p:1x1x1",
    "v6e": "v6e:1x1",
    "tpu7x": "tpu7x:1x1x1",
}
# What libtpu would otherwise ask a TPU's host, or complain of, or keep other processes from: it
# compiles here and opens no TPU.
_NO_HOST = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_HOST_BOUNDS": "1,1,1",
    "TPU_CHIPS_PER_HOST_BOUNDS": "1,1,1",
}
# libtpu plans fusions on threads whose stacks are too small for some: it dies of int8 projections
# beside a causal mask, for v5e and v5p. A version without the flag is not to mind it.
_STACK = "fibers_default_thread_stack_size"
_CUDA_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")


class CompilerLockedError(RuntimeError):
    """The compiler of a target is there, but another process keeps it to itself."""


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled program.

    Attributes:
      target: the hardware that it is for.
      devices: how many devices JAX shows for one chip of it; the program is for one of them.
      text: the optimized program.
      estimated_seconds: by the compiler's own model, the body of a loop counted once; None where
        its compiler gives none.
      memory: arguments, results and temporary memory, in bytes.
    """

    target: Target
    devices: int
    text: str
    estimated_seconds: float | None
    memory: Mapping[str, int]


def compile_for(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    target: str | Target | None,
) -> Compiled:
    """Compiles `fn(*args, **kwargs)` for one device of the target; nothing is run.

    Args:
      fn: a function, jitted or not. In one that is not, arguments without arrays are static.
      args: arrays or `jax.ShapeDtypeStruct`s in any pytrees; only shapes and dtypes are read.
      kwargs: the same by name.
      target: a name of `mp.targets()`, a `Target`, or None for the device at hand.

    Raises:
      ImportError: the target's compiler is not installed.
      CompilerLockedError: another process keeps the TPU's to itself.
      NotImplementedError: there is none for this target, or an array is split over several devices.
    """
    _check_one_device(args, kwargs)
    wanted = resolve_target(target)
    device, devices, options = _device(wanted, at_hand=target is None)
    sharding = SingleDeviceSharding(device)
    with _own_cache_entries():
        try:
            lowered = _lower(fn, args, kwargs, sharding)
        except ValueError as error:
            if "sharding" in str(error) or "devices" in str(error):  # JAX' words for a mesh
                error.add_note(f"{_ONE_DEVICE}: take the mesh and the shardings off the function")
            raise
        compiled = lowered.compile(compiler_options=options)
    text = compiled.as_text()
    if text is None:
        raise NotImplementedError(f"the compiler of {wanted.name!r} does not print its programs")
    cost = compiled.cost_analysis() or {}
    seconds = cost.get("optimal_seconds")
    is_estimate = wanted.platform == "tpu" and seconds is not None and seconds > 0
    return Compiled(wanted, devices, text, seconds if is_estimate else None, _memory(compiled))


_ONE_DEVICE = "a program is compiled for one device, without a mesh"


def _check_one_device(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Refuses an array of which the device at hand would hold a part."""
    for path, x in jax.tree.leaves_with_path((args, dict(kwargs))):
        sharding = getattr(x, "sharding", None)
        if sharding is None or sharding.num_devices == 1 or sharding.is_fully_replicated:
            continue
        # (args, kwargs)[0][1]["w"] is `args[1]['w']`.
        where = ("args", "kwargs")[path[0].idx] + jax.tree_util.keystr(path[1:])  # pyright: ignore
        raise NotImplementedError(
            f"`{where}` of shape {x.shape} is split over {sharding.num_devices} devices, but "
            f"{_ONE_DEVICE}. For that of the whole arrays on one device give shapes: "
            "jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args)"
        )


def _lower(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    sharding: SingleDeviceSharding,
) -> Any:
    """Traces and lowers the function for the device of a sharding."""

    def abstract(x: Any) -> Any:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) if _is_array(x) else x

    if not hasattr(fn, "lower"):
        fn = jax.jit(
            fn,
            static_argnums=tuple(i for i, x in enumerate(args) if _is_static(x)),
            static_argnames=tuple(name for name, x in kwargs.items() if _is_static(x)),
            out_shardings=sharding,
        )
    args, kwargs = jax.tree.map(abstract, (args, dict(kwargs)))
    return fn.lower(*args, **kwargs)  # pyright: ignore[reportFunctionMemberAccess]


def _is_array(x: Any) -> bool:
    return hasattr(x, "shape") and hasattr(x, "dtype")


def _is_static(x: Any) -> bool:
    leaves = jax.tree.leaves(x)
    return bool(leaves) and not any(map(_is_array, leaves))


@contextlib.contextmanager
def _own_cache_entries() -> Iterator[None]:
    """What JAX' cache on disk must be told.

    It takes programs for the same that differ in the names that we read; and it can write a program
    for hardware that is not there, but not read it: it warns, and compiles.
    """
    name = "jax_compilation_cache_include_metadata_in_key"
    before = getattr(jax.config, name)
    jax.config.update(name, True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Error reading persistent compilation cache entry")
            yield
    finally:
        jax.config.update(name, before)


def _device(target: Target, *, at_hand: bool) -> tuple[Any, int, dict[str, Any]]:
    """A device to compile for, how many a chip shows, and the compiler's options."""
    here = jax.devices()[0]
    if at_hand:
        return here, target.devices, {}
    if target.name in _TPUS:
        devices = _tpu_topology(target.name).devices
        return devices[0], len(devices), {}
    if target.name in GPUS:
        return _gpu_topology(target.name).devices[0], 1, {"xla_gpu_autotune_level": 0}
    if target.platform == "cpu":
        return jax.devices("cpu")[0], 1, {}
    if here.platform != "cpu" and here.platform in ("gpu", target.platform):
        return here, target.devices, {}
    raise NotImplementedError(
        f"there is no compiler here for target {target.name!r} ({target.platform}): without the "
        f"hardware programs are compiled for {', '.join((*_TPUS, *GPUS))} and 'cpu'; run it on a "
        "machine that has one, with target=None"
    )


def _tpu_topology(name: str) -> Any:
    if importlib.util.find_spec("libtpu") is None:
        raise ImportError(
            f"to compile for target {name!r} the TPU compiler is needed, which needs no TPU: "
            "pip install 'mpjax[tpu]'"
        )
    if jax.default_backend() != "tpu":
        for variable, value in _NO_HOST.items():
            os.environ.setdefault(variable, value)
        flags = os.environ.get("LIBTPU_INIT_ARGS", "")  # read once, when it is loaded
        if _STACK not in flags:
            flags = f"{flags} --{_STACK}={1 << 20} --undefok={_STACK}".strip()
            os.environ["LIBTPU_INIT_ARGS"] = flags
    bounds = {"chips_per_host_bounds": (1, 1, 1)}  # where libtpu would assume 2 x 2 chips
    try:
        return topologies.get_topology_desc(_TPUS[name], "tpu", **bounds)
    except jax.errors.JaxRuntimeError as error:
        if "lockfile" in str(error):
            raise CompilerLockedError(_locked(name, error)) from error
        raise


def _locked(name: str, error: Exception) -> str:
    """Why libtpu does not start, and what to do."""
    return (
        f"libtpu, the TPU compiler, could not be loaded to compile for target {name!r}, because "
        f"another process has loaded it and holds its lock, /tmp/libtpu_lockfile ({error}). Let "
        "that process end (`fuser /tmp/libtpu_lockfile` names it; if there is none, the file is "
        "another user's and may be removed), or start this one with JAX_PLATFORMS=cpu and "
        "ALLOW_MULTIPLE_LIBTPU_LOAD=1 in its environment, with which libtpu opens no TPU here"
    )


def _gpu_topology(name: str) -> Any:
    if not any(importlib.util.find_spec(plugin) for plugin in _CUDA_PLUGINS):
        raise ImportError(
            f"to compile for target {name!r} NVIDIA's compiler is needed, which needs no GPU: "
            "pip install 'mpjax[cuda-compile]'"
        )
    config = GPUS[name].proto()
    return topologies.get_topology_desc("1x1x1", "cuda", topology="1x1x1", target_config=config)


def _memory(compiled: Any) -> dict[str, int]:
    """By XLA's own account; nothing where its compiler gives none."""
    stats = compiled.memory_analysis()
    parts = ("argument", "output", "alias", "temp", "generated_code")
    return {} if stats is None else {p: getattr(stats, f"{p}_size_in_bytes") for p in parts}
