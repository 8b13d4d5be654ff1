"""`save`: a model for inference in one file."""

import dataclasses
import importlib
import os
import sys
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from ._atomic_file import atomic_file
from ._file_bytes import to_bytes
from ._file_header import MAX_DEPTH, ArrayRecord, Header, Key, LeafRecord
from ._file_leaves import MAIN_PARTS, LeafParts, take_apart
from ._file_policy import check_policies, differences
from ._paths import join
from ._policy_map import Policy, freeze
from ._requantize import is_auto
from ._safetensors import BY_NAME, encode_header
from ._serialize import get_policy, serialize
from ._target import targets


def save(path: str | Path, tree: Any, policy: Any = None) -> Path:
    """Saves the weights of a model to one file, from which `mpjax.load` loads them bit for bit.

        mp.save("model.safetensors", qvars, policy=model.policy)     # Linen
        mp.save("model.safetensors", model)                          # NNX

    The file is a safetensors file, with a header that tells what each array is and has a checksum
    of it. int4 takes half a byte per value. It takes the place of one at `path` once it is whole
    and on disk (until then, and if the process is killed, it is `.<name>.<random>.tmp` beside it);
    the host holds one array of the model at a time.

    Args:
      path: of the file.
      tree: Linen: variables, as `mpjax.quantize` returns them or before: nested dicts (also frozen
        ones) of arrays, `QTensor`s, scaling states and random keys. Boxes of Flax metadata, such
        as `nn.Partitioned`, are taken off: the names in them are in the model's code, which takes
        its variables with or without. NNX: a wrapped model; its loss scale is not saved.
      policy: what the model is wrapped with, for `mpjax.load_policy`: anything `get_policy` takes,
        None to save none. NNX: left out, the model has it; or the `"auto8"` policy that it was
        wrapped with, which became int8 or float8 then and is left open for the next hardware.

    Returns:
      The path.

    Raises:
      TypeError: `path`, `tree` or a leaf of it is of another type.
      ValueError: the tree is empty or too deep, two leaves have the same path, an array is spread
        over several processes, or the NNX model is not wrapped, or with another policy; or a weight
        is stored in another format than its policy asks for.
      OSError: the file cannot be written, its disk is full perhaps; what was at `path` is still
        there.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"`path` is a {type(path).__name__}: call mp.save(path, tree)")
    path = Path(path)
    leaves, policy = _contents(tree, policy)
    parts = {keys: _parts(keys, leaf) for keys, leaf in leaves}
    if not parts:
        raise ValueError("`tree` is empty: there is nothing to save")
    records = tuple(_record(keys, each) for keys, each in parts.items())
    config = None if policy is None else serialize(policy)
    header = Header(importlib.import_module("mpjax").__version__, config, records)
    arrays = {
        array.name: parts[leaf.path].arrays[part]
        for leaf in records
        for part, array in leaf.arrays.items()
    }
    _check_names(header)
    with atomic_file(path) as file:
        file.write(_encoded(header))  # with checksums to come
        sums = {}
        for record in header.arrays:
            data = to_bytes(arrays[record.name])
            sums[record.name] = zlib.crc32(data.data)
            file.write(data.data)
        file.seek(0)
        file.write(_encoded(_with_checksums(header, sums)))
    return path


def nnx_adapter(model: Any) -> Any:
    """`mpjax.nnx._files` for an NNX module, None for anything else."""
    nnx = sys.modules.get("flax.nnx")  # an instance exists only once it is imported
    if nnx is None or not isinstance(model, nnx.Module):
        return None
    return importlib.import_module("mpjax.nnx._files")


def _contents(tree: Any, policy: Any) -> tuple[list[tuple[tuple[Key, ...], Any]], Policy | None]:
    """The leaves by path, and the frozen policy."""
    nnx = nnx_adapter(tree)
    if nnx is not None:
        variables, own = nnx.variables_of(tree), nnx.policy_of(tree)
        check_policies(nnx.stored_differences(tree))
        policy = own if policy is None else _unresolved(policy, own)
        return [(keys, each.get_raw_value()) for keys, each in variables.items()], policy
    if not isinstance(tree, Mapping):
        raise TypeError(
            f"`tree` is a {type(tree).__name__}, but should be the variables of a Linen model "
            "(nested dicts), or a wrapped NNX model"
        )
    leaves = list(_leaves(tree, ()))
    if policy is None:
        return leaves, None
    policy = freeze(get_policy(policy))
    check_policies(differences(leaves, policy))
    return leaves, policy


def _unresolved(given: Any, own: Policy) -> Policy:
    """An `"auto8"` policy that became the model's own on some hardware; else a ValueError."""
    policy, mine = freeze(get_policy(given)), serialize(own)
    for target in targets() if is_auto(policy) else ():
        became = (policy.resolve(target, when=when) for when in ("always", "profitable"))
        if mine in map(serialize, became):
            return policy
    raise ValueError(
        f"`policy` is {given!r}, but the NNX model is wrapped with {own!r}: it is saved with that, "
        "or with the 'auto8' policy that became it; leave `policy` out, or call mp.wrap(model, "
        "policy) first"
    )


def _leaves(node: Any, path: tuple[Key, ...]) -> Iterator[tuple[tuple[Key, ...], Any]]:
    if len(path) > MAX_DEPTH:
        raise ValueError(f"'{join(path)}' is nested deeper than {MAX_DEPTH} dicts")
    if not isinstance(node, Mapping) or (path and not node):
        yield path, unboxed(node)
        return
    for key, child in node.items():
        if type(key) not in (str, int):
            raise TypeError(f"the key {key!r} in '{join(path)}' is neither a text nor an integer")
        yield from _leaves(child, (*path, key))


def unboxed(leaf: Any) -> Any:
    """A leaf without the boxes of Flax metadata around it."""
    meta = sys.modules.get("flax.core.meta")
    while meta is not None and isinstance(leaf, meta.AxisMetadata):
        # `unbox` would put its sharding constraint on a QTensor's scale as well.
        leaf = leaf.value if isinstance(leaf, meta.Partitioned) else leaf.unbox()
    return leaf


def _parts(path: tuple[Key, ...], leaf: Any) -> LeafParts:
    try:
        parts = take_apart(leaf)
    except TypeError as error:
        raise TypeError(f"'{join(path)}' {error}") from None
    for array in parts.arrays.values():
        if isinstance(array, jax.Array) and not array.is_fully_addressable:
            raise ValueError(
                f"'{join(path)}' is spread over several processes, and a file is written by one: "
                "gather it with jax.experimental.multihost_utils.process_allgather"
            )
    return parts


def _record(path: tuple[Key, ...], parts: LeafParts) -> LeafRecord:
    name = join(path)
    arrays = {
        part: ArrayRecord(
            name if part in MAIN_PARTS else f"{name}.{part}", array.dtype.name, tuple(array.shape)
        )
        for part, array in parts.arrays.items()
    }
    for array in arrays.values():
        if array.dtype != "int4" and array.dtype not in BY_NAME:
            raise TypeError(f"'{name}' has the dtype {array.dtype}, which safetensors lacks")
    return LeafRecord(path, parts.kind, parts.static, arrays)


def _check_names(header: Header) -> None:
    names: set[str] = {"__metadata__"}
    for record in header.arrays:
        if record.name in names:
            raise ValueError(
                f"two arrays of the file would be named '{record.name}': rename a key that is a "
                "number as well as a string, or has a '/' or '.' in it"
            )
        names.add(record.name)


def _encoded(header: Header) -> bytes:
    arrays = {record.name: record.stored for record in header.arrays}
    return encode_header(arrays, header.to_metadata())


def _with_checksums(header: Header, sums: Mapping[str, int]) -> Header:
    leaves = []
    for leaf in header.leaves:
        arrays = {
            part: dataclasses.replace(array, crc32=sums[array.name])
            for part, array in leaf.arrays.items()
        }
        leaves.append(dataclasses.replace(leaf, arrays=arrays))
    return dataclasses.replace(header, leaves=tuple(leaves))
