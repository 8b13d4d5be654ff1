"""Orbax checkpoints as trees of arrays that are read one by one.

<folder>/_METADATA                    what a PyTree or Standard checkpointer wrote
<folder>/<step>/default/_METADATA     what a CheckpointManager wrote
<folder>/<step>/arrays/_METADATA      what `mpjax.save_checkpoint` wrote, with checksums in
<folder>/<step>/index                 its index
"""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

from . import _freed_memory, _orbax
from ._checkpoint_index import Index
from ._checkpoint_leaves import checksum
from ._lazy_array import LazyArray, nested
from ._safetensors import ModelFileError, damaged

_TREE = "_METADATA"
_ARRAYS, _DEFAULT = "arrays", "default"


def open_checkpoint(folder: Path, step: int | None) -> dict[str, Any]:
    """The tree of a checkpoint.

    Raises:
      FileNotFoundError, ModelFileError: as `mpjax.open_weights`.
    """
    folder, step = _located(folder, step)
    tree = _metadata(folder)
    paths, treedef = jax.tree.flatten_with_path(tree, is_leaf=_is_array)
    names = [jax.tree_util.keystr(keys, simple=True, separator="/") for keys, _ in paths]
    sums = _checksums(folder, step)
    leaves = []
    for i, (name, (_, array)) in enumerate(zip(names, paths, strict=True)):
        if _is_array(array):
            read = _Read(folder, treedef, i, name, sums.get(name))
            lazy = LazyArray(name, tuple(array.shape), np.dtype(array.dtype), read)
            leaves.append((name, lazy))
    try:
        return nested(leaves, "/")
    except ValueError as error:
        raise ModelFileError(f"the names in {folder} make no tree: {error}") from None


def _located(folder: Path, step: int | None) -> tuple[Path, int | None]:
    """The folder that has the arrays, and their step if `mpjax.save_checkpoint` wrote them."""
    if step is None and (folder / _TREE).is_file():
        return folder, None
    steps = [int(each.name) for each in folder.iterdir() if each.name.isdecimal()]
    if steps and (step is None or step in steps):
        step = max(steps) if step is None else step
        for name in (_ARRAYS, _DEFAULT):
            if (folder / str(step) / name / _TREE).is_file():
                return folder / str(step) / name, step if name == _ARRAYS else None
    held = ", ".join(sorted(each.name for each in folder.iterdir())[:10]) or "nothing"
    of = "" if step is None else f" of step {step}"
    raise FileNotFoundError(
        f"no checkpoint{of} in {folder}, which holds {held}: give the folder of an Orbax "
        f"checkpoint (one with a file {_TREE}), that of its manager, or a safetensors file"
    )


def _metadata(folder: Path) -> Any:
    """The tree of a checkpoint, with what Orbax knows of an array in place of each."""
    ocp = _orbax.orbax()
    try:
        # The handler itself: a checkpointer warns of metadata that an item of a step has not.
        with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
            tree = handler.metadata(folder).tree
    except Exception as error:  # Orbax raises many types for a damaged file
        raise damaged(folder, f"{type(error).__name__}: {error}") from error
    return tree


def _is_array(x: Any) -> bool:
    return hasattr(x, "shape") and hasattr(x, "dtype")


def _checksums(folder: Path, step: int | None) -> dict[str, int | None]:
    if step is None:
        return {}
    try:
        index = Index.from_json(_orbax.read_index(folder.parent.parent, step))
    except (KeyError, TypeError, ValueError) as error:
        raise damaged(folder.parent, f"its index: {error}") from error
    return {path: record.checksum for path, record in index.leaves.items()}


@dataclasses.dataclass(frozen=True)
class _Read:
    """Reads one array of a checkpoint."""

    folder: Path
    treedef: Any
    position: int
    name: str
    checksum: int | None

    def __call__(self) -> np.ndarray:
        ocp = _orbax.orbax()
        others = [ocp.PLACEHOLDER] * self.treedef.num_leaves
        item, how = list(others), [ocp.RestoreArgs(restore_type=np.ndarray)] * len(others)
        item[self.position] = 0
        args = ocp.args.PyTreeRestore(
            item=self.treedef.unflatten(item), restore_args=self.treedef.unflatten(how)
        )
        _freed_memory.give_back()  # by the array before this one
        try:
            with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
                tree = handler.restore(self.folder, args=args)
            array = self.treedef.flatten_up_to(tree)[self.position]
        except Exception as error:  # Orbax and TensorStore raise many types for a damaged file
            raise damaged(self.folder, f"{self.name!r}: {type(error).__name__}: {error}") from error
        if self.checksum is not None and checksum(array) != self.checksum:
            raise damaged(
                self.folder, f"the bytes of {self.name!r} have changed since it was saved"
            )
        return np.asarray(array)
