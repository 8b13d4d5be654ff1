"""A model as one serialized program, which runs where neither mpjax nor Flax is installed.

It is a `jax.export` artifact: StableHLO for the platforms asked for, with a version of its calling
convention. `jax.export.deserialize(blob).call(x)` runs it, and so does `load_exported`, which first
compares the checksum that an artifact ends in.
"""

import os
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
from jax import export as jax_export

from ._cast import is_floating
from ._context import observe
from ._prepack import unpacked
from ._prescaled import is_stored
from ._safetensors import ModelFileError
from ._wrap import wrapped_adapter_of

# A constraint of a layout in memory, which is all it does: XLA removes it when it compiles.
_ALLOWED = (jax_export.DisabledSafetyCheck.custom_call("LayoutConstraint"),)
_PLATFORMS = ("cpu", "cuda", "tpu")
_CHECKSUM = b"mpjax-crc32:"  # and 8 hexadecimal digits, at the end of an artifact
_END = len(_CHECKSUM) + 8


def export(
    model: Any,
    *args: Any,
    platforms: Sequence[str] = _PLATFORMS,
    weights: Literal["inside", "beside"] = "inside",
    **kwargs: Any,
) -> Any:
    """Serializes a call of a wrapped model, for platforms that need not be at hand.

        blob = mp.export(model, variables, jax.ShapeDtypeStruct((b, 128), jnp.float32))
        y = mp.load_exported(blob)(x)      # or jax.export.deserialize(blob).call(x)

    A symbolic size, `b, = jax.export.symbolic_shape("b")`, makes it a program for every size. What
    is fast on a CPU depends on the sizes: with symbolic ones, products there take XLA's own form.

    Weights go into the program as they are: give what `mpjax.quantize` returned. Floats under a
    quantized policy are multiplied as in training, quantized anew at every call or not at all.
    Prepacked weights are put in order, as no exported program reads them.

    Args:
      model: a wrapped Linen or NNX module.
      *args: Linen: the variables, then the arguments of one call; NNX: those arguments. Arrays may
        be `jax.ShapeDtypeStruct`s, but for the weights inside: nothing is run.
      platforms: what to compile for: any of `"cpu"`, `"cuda"`, `"rocm"` and `"tpu"`.
      weights: `"inside"`: the program holds them. `"beside"`: it takes them as its first argument,
        a flat dict of arrays, which is returned too.
      **kwargs: keyword arguments of the call. What is no array is fixed (`train=False`).

    Returns:
      The serialized program, bytes that end in a checksum of the rest; with `weights="beside"`,
      `(bytes, {name: array})`.

    Raises:
      ValueError: the model is not wrapped, `platforms` or `weights` is unknown, or weights that
        the program is to hold have no values.
      TypeError: `model` is not a Flax module, or the variables are missing.
      ImportError: flatbuffers is not installed.

    Warns:
      UserWarning: weights are floats that `mpjax.quantize` would store in fewer bits.

    References:
      https://docs.jax.dev/en/latest/export/export.html
    """
    _check(platforms, weights)
    _require_flatbuffers()
    adapter = wrapped_adapter_of(model)
    function, tree, inputs = adapter.as_function(model, *args)
    tree = jax.tree.map(unpacked, tree, is_leaf=is_stored)
    if weights == "inside" and any(
        isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(tree)
    ):
        raise ValueError(
            f"the weights of {type(model).__name__} have no values, but shapes: give arrays, or "
            "weights='beside' for a program that takes them as an argument"
        )
    arrays = {name: x for name, x in kwargs.items() if _is_array(x)}
    fixed = {name: x for name, x in kwargs.items() if name not in arrays}
    called = type(model).__name__  # in messages of JAX, and in the program
    if weights == "inside":

        def inside(*args: Any, **arrays: Any) -> Any:
            return function(tree, *args, **arrays, **fixed)

        inside.__name__ = called
        with observe() as observation:
            made = _serialized(inside, platforms, *inputs, **arrays)
        _warn_of_floats(called, adapter.unquantized(model, tree, observation))
        return made
    leaves, structure = jax.tree.flatten_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}

    def beside(weights: Mapping[str, Any], *args: Any, **arrays: Any) -> Any:
        tree = jax.tree.unflatten(structure, [weights[name] for name in named])
        return function(tree, *args, **arrays, **fixed)

    beside.__name__ = called
    with observe() as observation:
        made = _serialized(beside, platforms, named, *inputs, **arrays)
    _warn_of_floats(called, adapter.unquantized(model, tree, observation))
    return made, named


def load_exported(blob: bytes | str | os.PathLike[str]) -> Callable[..., Any]:
    """The function that `export` serialized: call it with arrays, also under `jax.jit`.

    What has no checksum, since jax.export or an mpjax before it had checksums made it, is refused:
    whether that is all of it cannot be told. `jax.export.deserialize` takes it.

    Args:
      blob: the bytes that `export` returned, or the path of a file of them.

    Raises:
      TypeError: `blob` is neither.
      FileNotFoundError: there is no such file.
      ModelFileError: these are not the bytes that `export` returned: damaged, cut short, or none
        of its own; or this JAX cannot read them. It names the file.
      ImportError: flatbuffers is not installed.
    """
    _require_flatbuffers()
    name, content = _content(blob)
    body, end = memoryview(content)[:-_END], content[-_END:]
    if len(end) < _END or not end.startswith(_CHECKSUM):
        raise ModelFileError(
            f"{name} does not end in the checksum of a program that mp.export serialized: it is "
            "cut short or damaged, or something else. Get it, or export the model, again; what "
            "jax.export or an older mpjax serialized is loaded by jax.export.deserialize, unchecked"
        )
    if end != _checksum(zlib.crc32(body)):
        raise ModelFileError(
            f"{name} is damaged (it has changed since mp.export serialized it): get it, or export "
            "the model, again"
        )
    try:
        exported = jax_export.deserialize(bytearray(body))
    except Exception as error:  # JAX raises whatever it runs into in a format that it does not know
        raise ModelFileError(
            f"{name} is as mp.export serialized it, but JAX {jax.__version__} cannot read it "
            f"({type(error).__name__}: {error}): export the model with this version of JAX"
        ) from error
    return exported.call


def _warn_of_floats(model: str, weights: Mapping[str, str]) -> None:
    """Warns of float weights, by path, that their policy stores in another format."""
    if not weights:
        return
    lines = [f"{path}: {format} by its policy" for path, format in weights.items()]
    more = [f"and {len(lines) - 10} more"] if len(lines) > 10 else []
    warnings.warn(
        f"{len(weights)} weights of {model} are floats in the exported program, which quantizes "
        "them at every call or multiplies them as floats: export what mp.quantize returned, or "
        "give their layers a float policy\n  " + "\n  ".join(lines[:10] + more),
        stacklevel=3,
    )


def _content(blob: bytes | str | os.PathLike[str]) -> tuple[str, bytes]:
    """What to call an artifact in messages, and its bytes."""
    if isinstance(blob, str | os.PathLike):
        return str(blob), Path(blob).read_bytes()
    if isinstance(blob, bytes | bytearray):
        return f"`blob` of {len(blob)} bytes", bytes(blob)
    raise TypeError(
        "`blob` must be the bytes that mp.export returned, or the path of a file of them, got "
        f"{type(blob)}"
    )


def _checksum(crc32: int) -> bytes:
    return _CHECKSUM + b"%08x" % crc32


def _serialized(
    function: Callable[..., Any], platforms: Sequence[str], *args: Any, **kwargs: Any
) -> bytes:
    exporting = jax_export.export(
        jax.jit(function), platforms=tuple(platforms), disabled_checks=_ALLOWED
    )
    blob = exporting(*args, **kwargs).serialize()
    blob += _checksum(zlib.crc32(blob))
    return bytes(blob)


def _check(platforms: Sequence[str], weights: str) -> None:
    known = (*_PLATFORMS, "rocm")
    if isinstance(platforms, str) or not platforms or not set(platforms) <= set(known):
        raise ValueError(
            f"`platforms` must be a sequence of some of {sorted(known)}, got {platforms!r}"
        )
    if weights not in ("inside", "beside"):
        raise ValueError(f"`weights` must be 'inside' or 'beside', got {weights!r}")


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.ShapeDtypeStruct | jax.Array) or is_floating(x)


def _require_flatbuffers() -> None:
    try:
        import flatbuffers  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "mp.export writes jax.export's format, which needs flatbuffers: `pip install "
            "'mpjax[export]'`, or `pip install flatbuffers`"
        ) from error
