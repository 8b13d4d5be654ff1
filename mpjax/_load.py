"""`load` and `load_policy`: what `mpjax.save` wrote, or an error."""

from pathlib import Path
from typing import Any

import jax

from ._file_bytes import read_array
from ._file_header import Header, LeafRecord, nest
from ._file_leaves import LeafParts, put_together
from ._lazy_array import to_devices
from ._modes import AUTO8
from ._paths import join
from ._placement import sharding_at, shardings_of_parts
from ._policy_map import Policy, freeze
from ._prepack import reads_tiles, unpacked
from ._requantize import Plan, RequantizationReport, is_auto, placed, policy_for, row_of
from ._safetensors import ModelFileError, SafetensorsFile, damaged, open_safetensors
from ._save import nnx_adapter
from ._serialize import deserialize
from ._target import Target, resolve_target


def load(
    path: str | Path,
    model: Any = None,
    *,
    shardings: Any = None,
    target: str | Target | None = None,
    return_report: bool = False,
) -> Any:
    """Loads what `mpjax.save` saved, bit for bit, or raises.

        model = mp.wrap(Net(), mp.load_policy("model.safetensors"))     # Linen
        y = model.apply(mp.load("model.safetensors"), x)

        model = mp.wrap(Net(rngs), mp.load_policy("model.safetensors"))     # NNX
        y = mp.load("model.safetensors", model)(x)

    Each array goes to its devices as it is read, so the host holds one of them at a time. Weights
    that were prepacked (`mpjax.quantize(..., prepack=True)`) stay so where the CPU at hand reads
    them; on other hardware, and on several devices, the same numbers are put in order.

    A target may multiply other 8 bits than the file stores. Weights are requantized for it then,
    one by one, for a model that is wrapped with the policy for that target:

        policy = mp.load_policy("model.safetensors", target="tpu7x")    # int8 -> float8/row
        variables, report = mp.load("model.safetensors", target="tpu7x", return_report=True)

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
      target: the hardware to load for, see `resolve_target`. None loads what is stored; or, if the
        file was saved with an `"auto8"` policy, is the device at hand.
      return_report: whether to return a `RequantizationReport` too: what it cost each weight.

    Returns:
      Nested dicts with `jax.Array`s, `QTensor`s and `ScalingState`s as they were saved; an array
      of a dtype that JAX would narrow (float64, without `jax_enable_x64`) is a NumPy array. With
      `model`, that model. With `return_report=True`, a pair of that and the report.

    Raises:
      FileNotFoundError: there is no such file.
      ModelFileError: it is damaged, of another format, of a newer mpjax, or does not fit `model`,
        which stays as it was.
      TypeError: `path` is no path, `model` is not an NNX module, or `shardings` holds something
        else.
      ValueError: `model` is not wrapped, the target is unknown, or `shardings` lack a path or do
        not fit an array.
    """
    nnx = None if model is None else nnx_adapter(model)
    if model is not None and nnx is None:
        raise TypeError(
            f"`model` is a {type(model).__name__}, but only NNX models hold weights: for Linen, "
            "call mp.load(path), which returns the variables"
        )
    with open_safetensors(path) as file:
        header = Header.of(file)
        plan, name = _plan(file.path, header, target, is_linen=nnx is None)
        kept = [leaf for leaf in header.leaves if plan is None or plan.is_kept(leaf)]
        after = [leaf if plan is None else plan.record(leaf) for leaf in kept]
        if nnx is not None:
            _check_fits(file.path, list(nnx.differences(model, after)))
        if nnx is not None and shardings is None:
            where = nnx.shardings_of(model, after)
        else:
            where = {leaf.path: sharding_at(shardings, leaf.path) for leaf in after}
        after = [_as_read(leaf, where[leaf.path]) for leaf in after]
        parts = {leaf.path: _shardings_of(leaf, where[leaf.path]) for leaf in after}
        values, rows = {}, []
        for old, new in zip(kept, after, strict=True):
            values[new.path], error = _read_as(file, plan, old, new, parts[new.path])
            rows.append(row_of(old, new, error))
    loaded = nest(values.items()) if nnx is None else nnx.put(model, values)
    if not return_report:
        return loaded
    return loaded, RequantizationReport(name, tuple(row for row in rows if row is not None))


def _plan(
    path: Path, header: Header, target: Any, *, is_linen: bool
) -> tuple[Plan | None, str | None]:
    """What becomes of the leaves, and for which target; None: nothing."""
    if target is None and AUTO8 not in str(header.policy):
        return None, None
    policy = None if header.policy is None else _policy(path, header)
    if target is None and (policy is None or not is_auto(policy)):
        return None, None
    chosen = resolve_target(target)
    if policy is None:
        raise ModelFileError(
            f"{path} was saved without a policy, so which of its layers can be requantized for "
            f"{chosen.name} is not known: load it without target=, and save it with one, "
            "mp.save(path, variables, policy=model.policy)"
        )
    plan = Plan(freeze(policy), freeze(policy_for(policy, chosen)), is_linen)
    return plan, chosen.name


def _read_as(
    file: SafetensorsFile, plan: Plan | None, old: LeafRecord, new: LeafRecord, places: Any
) -> tuple[Any, float]:
    """A leaf as it is to be, where it is to be; and the relative error of that."""
    if old is new:
        return _read(file, old, places), 0.0
    value, error = _read(file, old, dict.fromkeys(old.arrays)), 0.0
    if plan is not None:
        value, error = plan.convert(old, value)
    if not new.static.get("tiles"):
        value = unpacked(value)
    return placed(value, places), error


def _as_read(leaf: LeafRecord, sharding: Any) -> LeafRecord:
    """A leaf in the tiles that products read where it goes to; or in none."""
    devices: set[Any] = set()
    for each in jax.tree.leaves(sharding):
        devices |= getattr(each, "device_set", set())
    return leaf if reads_tiles() and len(devices) < 2 else leaf.without_tiles()


def load_policy(path: str | Path, *, target: str | Target | None = None) -> Policy:
    """The policy of the model that `mpjax.save` saved to a file; reads its header only.

    Args:
      path: of the file.
      target: the hardware that `load` is given, for the policy of what it returns then; None: as it
        was saved.

    Raises:
      FileNotFoundError: there is no such file.
      ModelFileError: as of `load`, or the file was saved without a policy.
      ValueError: the target is unknown.
    """
    with open_safetensors(path) as file:
        header = Header.of(file)
        if header.policy is None:
            raise ModelFileError(
                f"{path} was saved without a policy: wrap the model with the one it had, and next "
                "time call mp.save(path, variables, policy=model.policy)"
            )
        policy = _policy(file.path, header)
    return policy if target is None else policy_for(policy, resolve_target(target))


def _policy(path: Path, header: Header) -> Policy:
    assert header.policy is not None
    try:
        return deserialize(header.policy)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise damaged(path, f"its policy: {error}") from error


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
