"""Where the arrays of a file go: shardings of leaves, and of the arrays that a leaf has inside."""

from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec, Sharding

import mpjax_kernels as mk

from ._paths import join
from ._save import unboxed
from ._scaling import ScalingState


def sharding_at(shardings: Any, path: tuple[str | int, ...]) -> Any:
    """What `shardings` says of the leaf at `path`: a sharding, a leaf of shardings, or None.

    Args:
      shardings: nested dicts, in which a sharding may stand for all that is below it; a function
        of the path as text, "params/Dense_0/kernel"; a sharding; or None.
      path: keys of the leaf.

    Raises:
      ValueError: the dicts lack the path.
    """
    name = join(path)
    if callable(shardings):
        return shardings(name)
    for depth, key in enumerate(path):
        if not isinstance(shardings, Mapping):
            break
        if key not in shardings:
            raise ValueError(
                f"`shardings` has no '{join(path[: depth + 1])}', so where '{name}' goes is not "
                "known: add it; None stands for the default device"
            )
        shardings = shardings[key]
    return unboxed(shardings)


def shardings_of_parts(sharding: Any, leaf: Any, parts: Mapping[str, Any], path: str) -> dict:
    """The sharding of each array of a leaf; None is the default device.

    The values of a QTensor take the sharding in the order in which they are stored; its scale and
    zero point take it too, but for the axes that they have too few entries of, along which they
    are replicated. So is all of a scaling state.

    Args:
      sharding: of the leaf, in the order of its axes; or a leaf of the same type that holds a
        sharding in place of each array.
      leaf: the leaf, with `jax.ShapeDtypeStruct`s in place of the arrays.
      parts: its arrays, as `jax.ShapeDtypeStruct`s.
      path: of the leaf, for messages.

    Raises:
      TypeError: `sharding` is no sharding.
      ValueError: an axis cannot be cut so.
    """
    if isinstance(sharding, mk.QTensor | ScalingState) and isinstance(sharding, type(leaf)):
        found = {name: getattr(sharding, name) for name in parts}
    else:
        found = {name: _of_part(sharding, leaf, name, array) for name, array in parts.items()}
    for name, each in found.items():
        _check(each, parts[name], path)
    return found


def _of_part(sharding: Any, leaf: Any, part: str, array: jax.ShapeDtypeStruct) -> Any:
    if not isinstance(sharding, NamedSharding):
        return sharding
    if isinstance(leaf, ScalingState):
        return NamedSharding(sharding.mesh, PartitionSpec(), memory_kind=sharding.memory_kind)
    if not isinstance(leaf, mk.QTensor):
        return sharding
    if part != "values":
        pairs = zip(array.shape, sharding.spec, strict=False)
        spec = [axes if size % _cuts(sharding, axes) == 0 else None for size, axes in pairs]
    elif leaf.layout is None:
        return sharding
    else:
        whole = [*sharding.spec, *[None] * (leaf.ndim - len(sharding.spec))]
        lead = leaf.ndim - len(leaf.layout)
        spec = [*whole[:lead], *(whole[axis] for axis in leaf.layout)]
    return NamedSharding(sharding.mesh, PartitionSpec(*spec), memory_kind=sharding.memory_kind)


def _cuts(sharding: NamedSharding, axes: Any) -> int:
    """Into how many pieces these axes of the mesh cut an axis of an array."""
    count = 1
    for axis in axes if isinstance(axes, tuple) else () if axes is None else (axes,):
        count *= sharding.mesh.shape[axis]
    return count


def _check(sharding: Any, array: jax.ShapeDtypeStruct, path: str) -> None:
    if sharding is None or isinstance(sharding, jax.Device):
        return
    if not isinstance(sharding, Sharding):
        raise TypeError(
            f"`shardings` has a {type(sharding).__name__} for '{path}', which is no "
            "jax.sharding.Sharding: make a NamedSharding(mesh, spec) of a PartitionSpec"
        )
    try:
        sharding.shard_shape(array.shape)
    except ValueError as error:
        raise ValueError(
            f"'{path}' ({array.dtype.name} {array.shape}) cannot be sharded so: {error}"
        ) from error
