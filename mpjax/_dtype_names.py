"""Dtype names and policy names: one canonical spelling for each meaning.

A policy without quantization is a pair of dtypes, and its name says which:

    "float32", any dtype name        compute and variables in that dtype
    "mixed_float16"                  compute float16, variables float32
    "mixed_bfloat16"                 compute bfloat16, variables float32
    "params=float32,compute=..."     any other pair, in the notation of jmp
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

_MIXED = {"mixed_float16": "float16", "mixed_bfloat16": "bfloat16"}
_PYTHON_TYPES = {bool: "bool", int: "int32", float: "float32"}
_JMP_KEYS = {"p": "params", "c": "compute", "o": "output"}
_JMP_DTYPES = {"f16": "float16", "bf16": "bfloat16", "f32": "float32", "f64": "float64"}


class SourceDTypes(NamedTuple):
    """What a policy name means: its canonical spelling and its dtypes, output if it gives one."""

    name: str
    compute: str
    variable: str
    output: str | None = None


def dtype_name(dtype: Any) -> str:
    """Returns the canonical name of a dtype name, NumPy dtype or scalar type.

    Args:
        dtype: Such as `"bfloat16"`, `jnp.bfloat16`, `np.dtype("int8")` or `float` (float32).

    Raises:
        ValueError: If it is not a dtype that JAX has. Aliases such as `"half"` are not accepted.
    """
    try:
        name = _PYTHON_TYPES[dtype] if dtype in _PYTHON_TYPES else np.dtype(dtype).name
    except (TypeError, SyntaxError):
        name = ""
    is_alias = isinstance(dtype, str) and dtype != name
    if dtype is None or is_alias or not isinstance(getattr(jnp, name, None), type):
        raise ValueError(f"{dtype!r} is not a dtype. Use a name such as 'float32' or 'bfloat16'.")
    return name


def is_floating(dtype: str) -> bool:
    """Returns whether a canonical dtype name is a real floating-point dtype, float8 included."""
    return bool(jnp.issubdtype(np.dtype(dtype), jnp.floating))


def parse_policy_name(name: Any) -> SourceDTypes:
    """Parses the name of a policy without quantization.

    Args:
        name: A dtype name, `"mixed_float16"`, `"mixed_bfloat16"`, or a jmp string such as
            `"params=float32,compute=bfloat16,output=float32"`.

    Raises:
        TypeError: If `name` is not a string.
        ValueError: If the string names no policy.
    """
    if not isinstance(name, str):
        raise TypeError(_not_a_string(name))
    if name.endswith("_float32_vars"):
        raise ValueError(
            "Policies ending in '_float32_vars' have been removed. Use 'mixed_float16' or "
            f"'mixed_bfloat16' instead. Got policy name: '{name}'"
        )
    if "=" in name:
        return _parse_jmp(name)
    if name in _MIXED:
        return SourceDTypes(name, _MIXED[name], "float32")
    try:
        dtype = dtype_name(name)
    except ValueError as error:
        raise ValueError(
            f"Cannot convert '{name}' to a mixed precision DTypePolicy. Valid policies include "
            "'mixed_float16', 'mixed_bfloat16', the name of any dtype such as 'float32', and "
            "strings such as 'params=float32,compute=bfloat16,output=float32'."
        ) from error
    return SourceDTypes(dtype, dtype, dtype)


def _parse_jmp(text: str) -> SourceDTypes:
    """Parses `params=X,compute=Y,output=Z`, with jmp's keys and defaults."""
    dtypes: dict[str, str] = {}
    for item in text.split(","):
        key, _, value = (part.strip() for part in item.partition("="))
        role = _JMP_KEYS.get(key, key)
        if role not in _JMP_KEYS.values():
            raise ValueError(
                f"Unknown key '{key}' in policy '{text}'. Use params, compute and output (or p, "
                "c and o)."
            )
        if role in dtypes:
            raise ValueError(f"Key '{role}' appears twice in policy '{text}'. Give it once.")
        dtypes[role] = _jmp_dtype(value, text)
    params = dtypes.get("params", "float32")
    compute = dtypes.get("compute", params)
    return SourceDTypes(_pair_name(compute, params), compute, params, dtypes.get("output"))


def _jmp_dtype(value: str, text: str) -> str:
    name = _JMP_DTYPES.get(value, value)
    try:
        name = dtype_name(name)
        known = is_floating(name)
    except ValueError:
        known = False
    if not known:
        raise ValueError(
            f"Unknown dtype '{value}' in policy '{text}'. Use a floating-point dtype such as "
            "'float32' or 'bf16'."
        )
    return name


def _pair_name(compute: str, variable: str) -> str:
    """Returns the canonical name of a pair of dtypes."""
    if compute == variable:
        return compute
    if variable == "float32" and f"mixed_{compute}" in _MIXED:
        return f"mixed_{compute}"
    return f"params={variable},compute={compute}"


def _not_a_string(name: Any) -> str:
    if isinstance(name, np.dtype | type):
        try:
            return (
                "'name' must be a string, not a DType. Instead, pass DType.name. "
                f"Got: {dtype_name(name)}"
            )
        except ValueError:
            pass
    return (
        "'name' must be a string, such as 'mixed_float16'. "
        f"Received: name={name} (of type {type(name)})"
    )
