"""`load` and `load_policy`: what `mpjax.save` wrote, or an error."""

from pathlib import Path
from typing import Any

from ._file_bytes import read_array
from ._file_header import Header, LeafRecord, nest
from ._file_leaves import LeafParts, put_together
from ._lazy_array import to_devices
from ._paths import join
from ._placement import sharding_at, shardings_of_parts
from ._policy_map import Policy
from ._safetensors import ModelFileError, SafetensorsFile, damaged, open_safetensors
from ._save import nnx_adapter
from ._serialize import deserialize


def load(path: str | Path, model: Any = None, *, shardings: Any = None) -> Any:
    """Loads what `mpjax.save` saved, bit for bit, or raises.

        model = mp.wrap(Net(), mp.load_policy("model.safetensors"))     # Linen
        y = model.apply(mp.load("model.safetensors"), x)

        model = mp.wrap(Net(rngs), mp.load_policy("model.safetensors"))     # NNX
        y = mp.load("model.safetensors", model)(x)

    Each array goes to its devices as it is read, so the host holds one of them at a time.

    Args:
      path: of the file.
      model: NNX: a wrapped model, quantized or not, whose weights are replaced. With
        `nnx.eval_shape(lambda: Net(nnx.Rngs(0)))` inside of `wrap` it has none before. Linen:
        nothing.
      shardings: where the arrays go: nested dicts of `jax.sharding.Sharding`s, in which one may
        stand for all that is below it; a function from a path such as "params/Dense_0/kernel" to
        one; or one for all. None: the default device, or where the weights of `model` are bound
        to. The sharding of a weight is given in the order of its axes; a `QTensor`'s values take
        it, and so does its scale, along the axes that it has enough entries of.

    Returns:
      Nested dicts with `jax.Array`s, `QTensor`s and `ScalingState`s as they were saved; an array
      of a dtype that JAX would narrow (float64, without `jax_enable_x64`) is a NumPy array. With
      `model`, that model.

    Raises:
      FileNotFoundError: there is no such file.
      ModelFileError: it is damaged, of another format, of a newer mpjax, or does not fit `model`,
        which stays as it was.
      TypeError: `model` is not an NNX module, or `shardings` holds something else.
      ValueError: `model` is not wrapped, or `shardings` lack a path or do not fit an array.
    """
    nnx = None if model is None else nnx_adapter(model)
    if model is not None and nnx is None:
        raise TypeError(
            f"`model` is a {type(model).__name__}, but only NNX models hold weights: for Linen, "
            "call mp.load(path), which returns the variables"
        )
    with open_safetensors(path) as file:
        header = Header.of(file)
        if nnx is not None:
            _check_fits(file.path, list(nnx.differences(model, header.leaves)))
        if nnx is not None and shardings is None:
            where = nnx.shardings_of(model, header.leaves)
        else:
            where = {leaf.path: sharding_at(shardings, leaf.path) for leaf in header.leaves}
        parts = {leaf.path: _shardings_of(leaf, where[leaf.path]) for leaf in header.leaves}
        values = {leaf.path: _read(file, leaf, parts[leaf.path]) for leaf in header.leaves}
    if nnx is None:
        return nest(values.items())
    return nnx.put(model, values)


def load_policy(path: str | Path) -> Policy:
    """The policy of the model that `mpjax.save` saved to a file; reads its header only.

    Raises:
      FileNotFoundError: there is no such file.
      ModelFileError: as of `load`, or the file was saved without a policy.
    """
    with open_safetensors(path) as file:
        policy = Header.of(file).policy
        if policy is None:
            raise ModelFileError(
                f"{path} was saved without a policy: wrap the model with the one it had, and next "
                "time call mp.save(path, variables, policy=model.policy)"
            )
        try:
            return deserialize(policy)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise damaged(file.path, f"its policy: {error}") from error


def _shardings_of(leaf: LeafRecord, sharding: Any) -> dict[str, Any]:
    parts = {part: record.abstract for part, record in leaf.arrays.items()}
    return shardings_of_parts(sharding, leaf.abstract, parts, join(leaf.path))


def _read(file: SafetensorsFile, leaf: LeafRecord, shardings: dict[str, Any]) -> Any:
    arrays = {
        part: to_devices(read_array(file, record), shardings[part])
        for part, record in leaf.arrays.items()
    }
    return put_together(LeafParts(leaf.kind, leaf.static, arrays))


def _check_fits(path: Path, lines: list[str]) -> None:
    if not lines:
        return
    more = [f"and {len(lines) - 10} more"] if len(lines) > 10 else []
    raise ModelFileError(
        f"{path} does not fit the model, which stays as it was:\n  "
        + "\n  ".join(lines[:10] + more)
        + "\nBuild the model as it was saved, and wrap it with mp.load_policy(path)"
    )
