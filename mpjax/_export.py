"""A model as one serialized program, which runs where neither mpjax nor Flax is installed.

It is a `jax.export` artifact: StableHLO for the platforms asked for, with a version of its calling
convention. `jax.export.deserialize(blob).call(x)` runs it, and so does `load_exported`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
from jax import export as jax_export

from ._cast import is_floating
from ._wrap import wrapped_adapter_of

# A constraint of a layout in memory, which is all it does: XLA removes it when it compiles.
_ALLOWED = (jax_export.DisabledSafetyCheck.custom_call("LayoutConstraint"),)
_PLATFORMS = ("cpu", "cuda", "tpu")


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

    Args:
      model: a wrapped Linen or NNX module.
      *args: Linen: the variables, then the arguments of one call; NNX: those arguments. Arrays may
        be `jax.ShapeDtypeStruct`s: nothing is run.
      platforms: what to compile for: any of `"cpu"`, `"cuda"`, `"rocm"` and `"tpu"`.
      weights: `"inside"`: the program holds them. `"beside"`: it takes them as its first argument,
        a flat dict of arrays, which is returned too.
      **kwargs: keyword arguments of the call. What is no array is fixed (`train=False`).

    Returns:
      The serialized program, bytes; with `weights="beside"`, `(bytes, {name: array})`.

    Raises:
      ValueError: the model is not wrapped, or `platforms` or `weights` is unknown.
      TypeError: `model` is not a Flax module, or the variables are missing.
      ImportError: flatbuffers is not installed.

    References:
      https://docs.jax.dev/en/latest/export/export.html
    """
    _check(platforms, weights)
    _require_flatbuffers()
    function, tree, inputs = wrapped_adapter_of(model).as_function(model, *args)
    arrays = {name: x for name, x in kwargs.items() if _is_array(x)}
    fixed = {name: x for name, x in kwargs.items() if name not in arrays}
    if weights == "inside":

        def inside(*args: Any, **arrays: Any) -> Any:
            return function(tree, *args, **arrays, **fixed)

        return _serialized(inside, platforms, *inputs, **arrays)
    leaves, structure = jax.tree.flatten_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}

    def beside(weights: Mapping[str, Any], *args: Any, **arrays: Any) -> Any:
        tree = jax.tree.unflatten(structure, [weights[name] for name in named])
        return function(tree, *args, **arrays, **fixed)

    return _serialized(beside, platforms, named, *inputs, **arrays), named


def load_exported(blob: bytes) -> Callable[..., Any]:
    """The function that `export` serialized: call it with arrays, also under `jax.jit`.

    Raises:
      TypeError: `blob` is not bytes.
      ValueError: the bytes are no exported program, or one cut short.
      ImportError: flatbuffers is not installed.
    """
    _require_flatbuffers()
    if not isinstance(blob, bytes | bytearray):
        raise TypeError(f"`blob` must be the bytes that mp.export returned, got {type(blob)}")
    try:
        exported = jax_export.deserialize(bytearray(blob))
    except Exception as error:  # flatbuffers raises whatever it runs into in foreign bytes
        raise ValueError(
            f"these {len(blob)} bytes are no program that mp.export or jax.export serialized, or "
            f"not all of it ({type(error).__name__}: {error}): export the model again"
        ) from error
    return exported.call


def _serialized(
    function: Callable[..., Any], platforms: Sequence[str], *args: Any, **kwargs: Any
) -> bytes:
    exporting = jax_export.export(
        jax.jit(function), platforms=tuple(platforms), disabled_checks=_ALLOWED
    )
    return bytes(exporting(*args, **kwargs).serialize())


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
