"""The batches that a model is calibrated with: what one is, and what is refused."""

import importlib.util
import itertools
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

_HOW = (
    "`calibration` is an iterable of batches, each what the model is called with: an array, a "
    "tuple of positional arguments or a dict of keyword arguments"
)


class Batch(NamedTuple):
    """The arguments of one call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def as_batch(batch: Any, kwargs: Mapping[str, Any]) -> Batch:
    """A batch as the arguments of a call.

    Args:
      batch: a tuple (not a named one) of positional arguments, a dict of keyword arguments, or
        anything else, which is the one argument.
      kwargs: of every call; those of a batch go before them.
    """
    if type(batch) is tuple:
        return Batch(batch, dict(kwargs))
    if isinstance(batch, Mapping) and all(isinstance(name, str) for name in batch):
        return Batch((), {**kwargs, **batch})
    return Batch((batch,), dict(kwargs))


def first_and_all(batches: Any, kwargs: Mapping[str, Any]) -> tuple[Batch, Iterator[Batch]]:
    """The first batch, and an iterator of all of them.

    Raises:
      TypeError: `batches` is no iterable of batches.
      ValueError: there is none, or the first has no rows.
    """
    shape = getattr(batches, "shape", None)
    if isinstance(batches, Mapping | str | bytes) or shape is not None:
        got = type(batches).__name__ + ("" if shape is None else f" of shape {shape}")
        raise TypeError(f"{_HOW}; got a {got}: put a single batch into a list")
    if not isinstance(batches, Iterable):
        raise TypeError(f"{_HOW}; got a {type(batches).__name__}")
    iterator = iter(batches)
    try:
        first = next(iterator)
    except StopIteration:
        raise ValueError(
            "`calibration` has no batch: it is empty, or a generator that was used up before; "
            "make a new one for each call"
        ) from None
    made = (as_batch(each, kwargs) for each in itertools.chain([first], iterator))
    checked = _with_rows(made)
    head = next(checked)
    return head, itertools.chain([head], checked)


def _with_rows(batches: Iterator[Batch]) -> Iterator[Batch]:
    for number, batch in enumerate(batches):
        for name, x in named_arrays(batch):
            if 0 in x.shape:
                raise ValueError(
                    f"batch {number} of `calibration` is empty: its {name} has shape {x.shape}"
                )
        yield batch


def named_arrays(batch: Batch) -> list[tuple[str, Any]]:
    """The arrays of a batch, each with a name for messages."""
    leaves = jax.tree_util.tree_leaves_with_path((batch.args, batch.kwargs))
    return [(_name(path), x) for path, x in leaves if is_array(x)]


def is_array(x: Any) -> bool:
    """Whether `x` is an array, or looks like one."""
    return hasattr(x, "shape") and hasattr(x, "dtype")


def is_float_array(x: Any) -> bool:
    """Whether `x` is an array that can hold a NaN."""
    return is_array(x) and jnp.issubdtype(x.dtype, jnp.floating)


def _name(path: tuple[Any, ...]) -> str:
    side, first, *rest = path
    where = jax.tree_util.keystr(tuple(rest))
    if side.idx == 0:
        return f"argument {first.idx}{where}"
    return f"argument {first.key!r}{where}"


def with_progress(batches: Iterator[Batch], of: Any, progress: bool | None) -> Iterator[Batch]:
    """The batches, with a bar that counts them.

    Args:
      batches: all of them.
      of: what they come from; if it has a length, the bar knows its end.
      progress: whether to show one. None: if standard error is a terminal, and tqdm installed.

    Raises:
      ImportError: it is asked for, and tqdm is not installed.
    """
    installed = importlib.util.find_spec("tqdm") is not None
    if progress is None:
        progress = installed and sys.stderr.isatty()
    if not progress:
        return batches
    if not installed:
        raise ImportError(
            "progress=True needs tqdm: `pip install 'mpjax[progress]'`, or `pip install tqdm`; "
            "progress=None shows a bar only where it is installed"
        )
    from tqdm import tqdm

    total = len(of) if hasattr(of, "__len__") else None
    return iter(tqdm(batches, total=total, desc="calibrating", unit="batch"))
