"""Checkpoints of everything that training carries.

    <directory>/<step>/arrays    the arrays, by path: variables/params/Dense_0/kernel
    <directory>/<step>/index     JSON: shape, dtype and checksum of each

Static metadata (functions, policies, recipes) is not saved: the template that a checkpoint is
restored into has it.
"""

import importlib
import operator
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from . import _orbax
from ._checkpoint_index import Index, by_path
from ._checkpoint_leaves import checksum, plain, restored, sharding_to_restore


def save_checkpoint(
    directory: str | Path, state: Any, *, step: int | None = None, keep: int | None = 3
) -> Path:
    """Saves a training state; when it returns, the checkpoint is on disk.

        mp.save_checkpoint("checkpoints", state)                 # Linen: a TrainState
        mp.save_checkpoint("checkpoints", (model, optimizer))    # NNX

    Parameters, optimizer state, scaling states, loss scale, step, random keys and every other
    array are saved bit for bit, in their own dtypes.

    Args:
      directory: where the checkpoints of a run are; made if there is none.
      state: a `TrainState`, NNX objects in a tuple or dict, or any pytree of arrays and numbers.
      step: number of the checkpoint, greater than those in the directory. None: `state.step`, or
        the step of the one optimizer among the NNX objects. A skipped step does not count there;
        a loop that may save twice without a step between passes its own count.
      keep: how many checkpoints stay, the newest ones; None: all.

    Returns:
      The directory of the checkpoint.

    Raises:
      ImportError: Orbax is not installed.
      TypeError: a leaf of `state` is neither an array nor a number, or `step` is not an integer.
      ValueError: no step is known, or it is not after the latest; `keep` is less than 1.
    """
    directory = _orbax.local(directory)
    step = _step_of(state) if step is None else operator.index(step)
    if keep is not None and keep < 1:
        raise ValueError(f"`keep` must be at least 1, or None to keep all. Received: keep={keep}")
    _check_after(directory, step)
    pure = _pure(state)
    index, leaves = Index.of(pure), by_path(pure)
    arrays = {path: plain(leaves[path]) for path, record in index.leaves.items() if record.stored}
    checksums = {path: checksum(array) for path, array in arrays.items()}
    _orbax.write(directory, step, arrays, index.to_json(checksums), keep)
    return directory / str(step)


def restore_checkpoint(directory: str | Path, template: Any, *, step: int | None = None) -> Any:
    """Restores what `save_checkpoint` saved, bit for bit.

        state = mp.restore_checkpoint("checkpoints", state)
        model, optimizer = mp.restore_checkpoint("checkpoints", (model, optimizer))

    Args:
      directory: where the checkpoints are.
      template: a state as it was made before the first step, with the same model, policy and
        optimizer. Its arrays say where each array goes (sharding, devices); they may be
        `jax.ShapeDtypeStruct`s. Static metadata is the template's.
      step: which checkpoint; None: the newest one that is whole.

    Returns:
      A new pytree of the template's structure. NNX objects are updated in place and returned.

    Raises:
      ImportError: Orbax is not installed.
      FileNotFoundError: the directory has no such checkpoint.
      ValueError: the checkpoint does not fit the template, or is damaged. Nothing was changed.
    """
    directory = _orbax.local(directory)
    step = _existing(directory, step)
    pure = _pure(template)
    saved = _read_index(directory, step)
    _check_fits(directory, step, saved, Index.of(pure))
    leaves = by_path(pure)
    stored = {path: leaf for path, leaf in leaves.items() if saved.leaves[path].stored}
    shardings = {path: sharding_to_restore(leaf) for path, leaf in stored.items()}
    arrays = _orbax.read_arrays(directory, step, shardings)
    _check_sums(directory, step, saved, arrays)
    values = [restored(arrays.get(path), leaf) for path, leaf in leaves.items()]
    return _put(template, jax.tree.unflatten(jax.tree.structure(pure), values))


def latest_step(directory: str | Path) -> int | None:
    """The step of the newest checkpoint in a directory that is whole; None if there is none.

    Raises:
      ImportError: Orbax is not installed.
    """
    return max(_orbax.steps(_orbax.local(directory)), default=None)


def _nnx() -> Any:
    # An NNX object exists only where Flax NNX was imported.
    return importlib.import_module("mpjax.nnx._nodes") if "flax.nnx" in sys.modules else None


def _pure(state: Any) -> Any:
    nnx = _nnx()
    return state if nnx is None else jax.tree.map(nnx.state_of, state, is_leaf=nnx.is_node)


def _put(template: Any, values: Any) -> Any:
    nnx = _nnx()
    if nnx is None:
        return values
    return jax.tree.map(nnx.put, template, values, is_leaf=nnx.is_node)


def _step_of(state: Any) -> int:
    nnx = _nnx()
    found = []
    if nnx is not None:
        nodes = jax.tree.leaves(state, is_leaf=nnx.is_node)
        found = [step for step in map(nnx.step_of, nodes) if step is not None]
    if not found and hasattr(state, "step"):
        found = [state.step]
    if len(found) != 1:
        raise ValueError(
            f"`state` ({type(state).__name__}) has {len(found)} optimizers that count steps, so "
            "the number of the checkpoint is not known: pass step="
        )
    return int(found[0])


def _check_after(directory: Path, step: int) -> None:
    latest = latest_step(directory)
    if step < 0 or latest is not None and step <= latest:
        held = "must not be negative" if step < 0 else f"is not after {latest}, the latest one"
        raise ValueError(
            f"step {step} {held} in {directory}: a checkpoint is never written over. Pass a later "
            "step=, save to another directory, or delete the later checkpoints first"
        )


def _existing(directory: Path, step: int | None) -> int:
    steps = _orbax.steps(directory)
    if steps and step is None:
        return steps[-1]
    if step in steps:
        return step
    if steps:
        raise FileNotFoundError(f"no checkpoint of step {step} in {directory}, only of {steps}")
    if not directory.is_dir():
        raise FileNotFoundError(f"no checkpoint in {directory}: there is no such directory")
    names = sorted(path.name for path in directory.iterdir())
    raise FileNotFoundError(
        f"no checkpoint in {directory}; it holds {', '.join(names[:10]) or 'nothing'}"
    )


def _read_index(directory: Path, step: int) -> Index:
    try:
        return Index.from_json(_orbax.read_index(directory, step))
    except (KeyError, TypeError) as error:
        raise ValueError(_orbax.damaged(directory, step, f"its index lacks {error}")) from error


def _check_fits(directory: Path, step: int, saved: Index, wanted: Index) -> None:
    lines = list(saved.differences(wanted))
    if not lines:
        return
    more = [f"and {len(lines) - 10} more"] if len(lines) > 10 else []
    raise ValueError(
        f"the checkpoint of step {step} in {directory} does not fit the template:\n  "
        + "\n  ".join(lines[:10] + more)
        + "\nMake the template with the model, policy and optimizer that were saved, and change "
        "them afterwards"
    )


def _check_sums(directory: Path, step: int, saved: Index, arrays: Mapping[str, Any]) -> None:
    for path, array in arrays.items():
        before, now = saved.leaves[path].checksum, checksum(array)
        if None not in (before, now) and before != now:
            why = f"the bytes of '{path}' have changed since it was saved"
            raise ValueError(_orbax.damaged(directory, step, why))
