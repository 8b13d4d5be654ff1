"""Checkpoints on disk, by Orbax: which are there, and their arrays and index.

Orbax writes a checkpoint under another name and renames it once it is whole. It does not notice a
flipped byte in an array: whoever reads one compares checksums.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ._file_path import path_of

_ARRAYS, _INDEX = "arrays", "index"


def orbax() -> Any:
    """`orbax.checkpoint`, which takes 0.3 s to import; raises ImportError if it is missing."""
    try:
        import orbax.checkpoint as ocp
    except ImportError as error:
        raise ImportError(
            "checkpoints are written by Orbax, which is not installed: "
            "`pip install orbax-checkpoint`"
        ) from error
    return ocp


def local(directory: str | Path) -> Path:
    """The absolute path of a directory; raises ValueError for a URL, and an error for a file."""
    path = path_of(directory, "directory").absolute()
    if "://" in str(directory):
        raise ValueError(
            f"`directory` is the URL {directory}, but checkpoints are written to file systems: "
            "mount the bucket and give the path"
        )
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"`directory` {path} is a file: give a folder for checkpoints")
    return path


def steps(directory: Path) -> list[int]:
    """Steps of the checkpoints in a directory that are whole, in order."""
    ocp = orbax()
    if not directory.is_dir():
        return []
    with ocp.CheckpointManager(directory, options=_options()) as manager:
        return sorted(manager.all_steps())


def write(
    directory: Path, step: int, arrays: Mapping[str, Any], index: Any, keep: int | None
) -> None:
    """Writes a checkpoint and waits for it; then deletes all but the newest `keep`.

    Args:
      directory: made if there is none; what unfinished saves left in it is deleted.
      step: must not be there yet.
      arrays: each with at least one element.
      index: what JSON can hold.
      keep: None: all.
    """
    ocp = orbax()
    options = _options(create=True, max_to_keep=keep, cleanup_tmp_directories=True)
    items = {_ARRAYS: ocp.args.PyTreeSave(dict(arrays)), _INDEX: ocp.args.JsonSave(index)}
    with ocp.CheckpointManager(directory, options=options) as manager:
        manager.save(step, args=ocp.args.Composite(**items), force=True)


def read_index(directory: Path, step: int) -> Any:
    """What `write` was given as `index`; ValueError if the file is damaged."""
    return _read(directory, step, _INDEX, orbax().args.JsonRestore())


def read_arrays(directory: Path, step: int, shardings: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays of a checkpoint.

    Args:
      directory: where the checkpoint is.
      step: its step.
      shardings: of every array in it; None: a NumPy array.

    Raises:
      ValueError: a file is damaged.
    """
    ocp = orbax()

    def how(sharding: Any) -> Any:
        if sharding is None:
            return ocp.RestoreArgs(restore_type=np.ndarray)
        return ocp.ArrayRestoreArgs(restore_type=jax.Array, sharding=sharding)

    args = ocp.args.PyTreeRestore(restore_args={k: how(v) for k, v in shardings.items()})
    return dict(_read(directory, step, _ARRAYS, args))


def damaged(directory: Path, step: int, why: str) -> str:
    """The message for a checkpoint that cannot be trusted."""
    others = [other for other in steps(directory) if other != step]
    remedy = f"restore another one, step= one of {others}" if others else "there is no other one"
    return f"the checkpoint of step {step} in {directory} is damaged ({why}); {remedy}"


def _options(create: bool = False, **options: Any) -> Any:
    return orbax().CheckpointManagerOptions(
        create=create, enable_async_checkpointing=False, **options
    )


def _read(directory: Path, step: int, item: str, args: Any) -> Any:
    ocp = orbax()
    try:
        with ocp.CheckpointManager(directory, options=_options()) as manager:
            return manager.restore(step, args=ocp.args.Composite(**{item: args}))[item]
    except Exception as error:  # Orbax and TensorStore raise many types for a damaged file
        raise ValueError(damaged(directory, step, f"{type(error).__name__}: {error}")) from error
