"""The index of a checkpoint: what it holds, to be compared with what it is restored into."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Self

import jax
import numpy as np

from ._loss_scale_state import LossScaleState
from ._scaling import ScalingState

_LEAVES = (jax.Array, jax.ShapeDtypeStruct, np.ndarray, np.generic, bool, int, float, complex)


@dataclasses.dataclass(frozen=True)
class Record:
    """What is known of a leaf.

    Attributes:
      shape: of the leaf; a random key is one element.
      dtype: its name, `"key<fry>"` for random keys.
      checksum: CRC-32 of the bytes that were stored; None where there are none, or no process has
        them all.
    """

    shape: tuple[int, ...]
    dtype: str
    checksum: int | None = dataclasses.field(default=None, compare=False)

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"

    @property
    def stored(self) -> bool:
        """Whether there is an array to store: Orbax takes none without elements."""
        return 0 not in self.shape


@dataclasses.dataclass(frozen=True)
class Index:
    """What is in a checkpoint, or in a template, by path.

    Attributes:
      leaves: every array and number.
      states: what kind of state a `ScalingState` or `LossScaleState` is. Numbers in its static
        metadata, such as a margin or a growth period, may change in the course of a run.
    """

    leaves: dict[str, Record]
    states: dict[str, str]

    @classmethod
    def of(cls, tree: Any) -> Self:
        """The index of a tree, without checksums; TypeError for a leaf that is no array."""
        leaves = {path: _record(path, leaf) for path, leaf in by_path(tree).items()}
        states = by_path(tree, lambda x: isinstance(x, ScalingState | LossScaleState))
        kinds = {path: _kind(state) for path, state in states.items()}
        return cls(leaves, {path: kind for path, kind in kinds.items() if kind})

    @classmethod
    def from_json(cls, json: Any) -> Self:
        """The index that `to_json` wrote; KeyError or TypeError for anything else."""
        leaves = {
            path: Record(tuple(each["shape"]), each["dtype"], each["checksum"])
            for path, each in dict(json["leaves"]).items()
        }
        return cls(leaves, dict(json["states"]))

    def to_json(self, checksums: dict[str, int | None]) -> dict[str, Any]:
        """What JSON can hold."""
        leaves = {
            path: {**dataclasses.asdict(record), "checksum": checksums.get(path)}
            for path, record in self.leaves.items()
        }
        return {"leaves": leaves, "states": self.states}

    def differences(self, template: Self) -> Iterator[str]:
        """What a checkpoint and a template do not have in common, one line each."""
        saved = {**self.leaves, **self.states}
        wanted = {**template.leaves, **template.states}
        for path in sorted(saved.keys() | wanted.keys()):
            if path not in wanted:
                yield f"{path}: {saved[path]} in the checkpoint, absent from the template"
            elif path not in saved:
                yield f"{path}: absent from the checkpoint, {wanted[path]} in the template"
            elif saved[path] != wanted[path]:
                yield f"{path}: {saved[path]} in the checkpoint, {wanted[path]} in the template"


def by_path(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """The leaves of a tree: `{"variables/params/Dense_0/kernel": ...}`.

    Raises:
      ValueError: two leaves have the same path.
    """
    leaves: dict[str, Any] = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf):
        path = jax.tree_util.keystr(keys, simple=True, separator="/") or "value"
        if path in leaves:
            raise ValueError(
                f"two leaves have the path '{path}', so a checkpoint could not tell them apart: "
                "rename a key that is a number as well as a string, or has a '/' in it"
            )
        leaves[path] = leaf
    return leaves


def _record(path: str, leaf: Any) -> Record:
    if not isinstance(leaf, _LEAVES):
        raise TypeError(
            f"'{path}' is a {type(leaf).__name__}, but a checkpoint holds arrays and numbers only: "
            "keep it as static metadata, or leave it out"
        )
    known: Any = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
    return Record(tuple(known.shape), str(known.dtype))


def _kind(state: Any) -> str | None:
    if isinstance(state, ScalingState):
        return f"{type(state.recipe).__name__} of {state.format}"
    return type(state.config).__name__ if isinstance(state, LossScaleState) else None
