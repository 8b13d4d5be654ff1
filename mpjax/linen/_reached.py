"""Whether the weights of a file are those of the model."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax

from .._context import Observation
from .._lazy_array import LazyArray


def check_reached(model: nn.Module, params: Mapping[str, Any], observation: Observation) -> None:
    """Raises ValueError if an opened file holds weights that the traced call has no layer for.

    What is in memory may stay unused; a weight in a file that no layer asks for is more likely
    that of another model, or under another name.
    """
    asked = {path.rpartition("/")[0] for path in observation.ranks}
    extra = []
    for keys, leaf in jax.tree.leaves_with_path(params):
        path = "/".join(str(key.key) for key in keys if hasattr(key, "key"))
        owner = path.rpartition("/")[0]
        # A layer that keeps its author's dtype is met, but what it reads is not.
        met = owner in observation.policies and owner not in asked
        if isinstance(leaf, LazyArray) and not met and not _is_read(path, observation):
            extra.append(f"params/{path}: {leaf!r}")
    if extra:
        more = [f"and {len(extra) - 10} more"] if len(extra) > 10 else []
        raise ValueError(
            f"the example call of {type(model).__name__} reaches no layer with these weights of "
            "the file:\n  "
            + "\n  ".join(extra[:10] + more)
            + "\nDelete them from the tree, or quantize by a call that reaches their layers"
        )


def _is_read(path: str, observation: Observation) -> bool:
    """Whether a layer has read the parameter at a path, or one that it is a part of."""
    parts = path.split("/")
    return any("/".join(parts[:n]) in observation.ranks for n in range(1, len(parts) + 1))
