"""`load_safetensors`: weights that others have quantized, in safetensors files, as they are.

    fine-grained float8       weight              float8_e4m3fn [out, in]
    (DeepSeek, transformers)  weight_scale_inv    [out / 128, in / 128], multiplied by all the same
    compressed-tensors        weight              int8 or float8 [out, in]
    (llm-compressor, vLLM)    weight_scale        per tensor, output channel, group or block
                              weight_zero_point   int8, if any

    x ~ (weight - weight_zero_point) * scale

References:
  https://github.com/huggingface/transformers/blob/main/src/transformers/integrations/finegrained_fp8.py
  https://github.com/vllm-project/compressed-tensors
"""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

import mpjax_kernels as mk

from ._file_header import was_saved_by_mpjax
from ._foreign_scales import scale_like
from ._lazy_array import to_devices
from ._placement import sharding_at, shardings_of_parts
from ._safetensors import ModelFileError, SafetensorsFile, open_safetensors

_SCALES = ("_scale_inv", "_scale")
_ZERO_POINT = "_zero_point"
_FORMATS = ("int8", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
_Files = Mapping[str, SafetensorsFile]


def load_safetensors(
    *paths: str | Path, dtype: Any = "float32", block_size: int | None = None, shardings: Any = None
) -> dict[str, Any]:
    """Reads safetensors files as Hugging Face has them, quantized weights without dequantizing.

        weights = mp.load_safetensors("model-00001-of-00002.safetensors", "model-00002-...")
        kernel = weights["model.layers.0.mlp.up_proj.weight"].T     # QTensor [in, out], as in Flax

    An int8 or float8 tensor `name` beside a `name_scale` or `name_scale_inv` becomes a
    `mpjax_kernels.QTensor` of the same numbers, and every other tensor an array, as it is. Scales
    of other floating dtypes become float32, exactly. A block at the edge of a weight may be
    smaller; and an int8 weight that holds -128 gets a zero point of 0, as QTensors ask for.

    Args:
      *paths: all the files of a model: a weight and its scale may be in different ones.
      dtype: logical dtype of the QTensors, of which the files say nothing.
      block_size: how many neighbors, along either axis, share a scale of `[m, n]`; None: 128.
      shardings: where the tensors go: a function from a name to a sharding, a dict, or one for
        all, as in `mpjax.load`; in the order of the axes in the file.

    Returns:
      A dict from the names in the files to `QTensor`s and `jax.Array`s; an array of a dtype that
      JAX would narrow (int64, without `jax_enable_x64`) is a NumPy array.

    Raises:
      FileNotFoundError: there is no such file.
      ModelFileError: a file is damaged or one of `mpjax.save`, a scale does not fit its weight or
        one is without the other, or a weight or scale holds what none can (NaN, a scale of 0).
      TypeError, ValueError: of `shardings`, as in `mpjax.load`, and of `dtype`.
    """
    with contextlib.ExitStack() as stack:
        files = _open(stack, paths)
        scales = {name: _scale_of(files, name) for name in files}
        scales = {name: scale for name, scale in scales.items() if scale is not None}
        parts = {*scales.values(), *(name + _ZERO_POINT for name in scales)}
        _check_complete(files, scales, parts)
        weights: dict[str, Any] = {}
        for name in files:
            if name in parts:
                continue
            place = sharding_at(shardings, (name,))
            if name in scales:
                q = _quantized(files, name, scales[name], dtype, block_size)
                weights[name] = _to_devices(q, place, name)
            else:
                array = files[name].array(name)
                to = shardings_of_parts(place, array, {"value": array}, name)
                weights[name] = to_devices(array, to["value"])
        return weights


def _open(stack: contextlib.ExitStack, paths: tuple[str | Path, ...]) -> dict[str, SafetensorsFile]:
    """The open file of each tensor."""
    if not paths:
        raise ValueError("`paths` is empty: give the files of a model")
    files: dict[str, SafetensorsFile] = {}
    for path in paths:
        file = stack.enter_context(open_safetensors(path))
        if was_saved_by_mpjax(file):
            raise ModelFileError(f"{path} is a file of mpjax.save: read it with mpjax.load")
        for name in file.entries:
            if name in files:
                raise ModelFileError(f"{name!r} is in {files[name].path} and in {path}: give one")
            files[name] = file
    return files


def _scale_of(files: _Files, name: str) -> str | None:
    """The name of the scale of a quantized weight; None for any other tensor."""
    if files[name].entries[name].dtype.name not in _FORMATS:
        return None
    return next((name + suffix for suffix in _SCALES if name + suffix in files), None)


def _check_complete(files: _Files, scales: Mapping[str, str], parts: set[str]) -> None:
    """Raises for a scale without its weight, or a weight that lacks the scale that others have."""
    for name, file in files.items():
        if name in scales or name in parts:
            continue
        if name.endswith(("weight_scale", "weight_scale_inv")):
            raise ModelFileError(
                f"{file.path} has {name!r} without an int8 or float8 weight: give all the files of "
                "the model; other formats cannot be read"
            )
        entry = file.entries[name]
        beside = next((n for n in scales if files[n].entries[n].dtype == entry.dtype), None)
        if beside is not None and entry.dtype != np.int8 and len(entry.shape) > 1:
            raise ModelFileError(
                f"{file.path} has {name!r} of {entry.dtype.name} without its scale, although "
                f"{beside!r} has one: give all the files of the model"
            )


def _quantized(
    files: _Files, name: str, scale_name: str, dtype: Any, block_size: int | None
) -> mk.QTensor:
    """A weight and its scale, in NumPy."""
    file, blocks = files[name], scale_name.endswith("_inv")
    values, zero_point = file.array(name), None
    try:
        scale = _read_scale(files[scale_name].array(scale_name))
        if name + _ZERO_POINT in files:
            zero_point = _read_zero_point(files[name + _ZERO_POINT].array(name + _ZERO_POINT))
        if zero_point is not None and zero_point.shape != scale.shape:
            raise ValueError(
                f"its zero point has shape {zero_point.shape}, its scale {scale.shape}"
            )
        if zero_point is None and values.dtype == np.int8 and values.min(initial=0) == -128:
            zero_point = np.zeros(scale.shape, np.int8)
        if values.dtype != np.int8 and not np.isfinite(values).all():
            raise ValueError("it holds a NaN or an infinity")
        cut = {"shape": values.shape, "blocks": blocks, "block_size": block_size}
        scale = scale_like(scale, **cut)
        zero_point = None if zero_point is None else scale_like(zero_point, **cut)
        q: Any = mk.QTensor(values, scale, jnp.dtype(dtype), zero_point)  # pyright: ignore
        mk.validate(q)
    except (TypeError, ValueError) as error:
        raise ModelFileError(f"{name!r} in {file.path} cannot be read: {error}") from error
    return q


def _read_scale(scale: np.ndarray) -> np.ndarray:
    if not jnp.issubdtype(scale.dtype, jnp.floating):
        raise ValueError(f"its scale is {scale.dtype.name}, not floating")
    scale = scale.astype(np.float32)
    if not (np.isfinite(scale) & (scale > 0)).all():
        raise ValueError("its scale is not positive and finite everywhere")
    return scale


def _read_zero_point(zero_point: np.ndarray) -> np.ndarray | None:
    if not zero_point.astype(np.float32).any():
        return None
    if zero_point.dtype != np.int8:
        raise ValueError(f"its zero point is {zero_point.dtype.name}, not int8")
    return zero_point


def _to_devices(q: mk.QTensor, sharding: Any, name: str) -> mk.QTensor:
    parts = {"values": q.values, "scale": q.scale}
    if q.zero_point is not None:
        parts["zero_point"] = q.zero_point
    to = shardings_of_parts(sharding, q, parts, name)
    on_devices = {part: to_devices(np.asarray(array), to[part]) for part, array in parts.items()}
    return mk.QTensor(dtype=q.dtype, **on_devices)
