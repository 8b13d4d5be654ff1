"""What the tests of the native kernels share: operands whose products are exact."""

import os
import subprocess
import sys
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

import mpjax_kernels as mk
from mpjax_kernels._native_library import _load

MATRIX = (((1,), (0,)), ((), ()))
FORMATS = {"float8_e4m3fn": ml_dtypes.float8_e4m3fn, "float8_e5m2": ml_dtypes.float8_e5m2}
DTYPES = FORMATS | {"int8": np.int8}
DOT, QUANTIZE = (
    'custom_call_target="mpjax_float8_dot"',
    'custom_call_target="mpjax_quantize"',
)


ISAS = ("portable", "avx2", "avx_vnni", "avx512_vnni", "avx512_bf16")


def here() -> str:
    """The instruction set of this process, empty without native kernels."""
    return _load()[0]


def tensor(values, format, scale=None) -> mk.QTensor:
    """These numbers, which the format holds, times a scale."""
    scale = np.ones((1,) * values.ndim, np.float32) if scale is None else scale
    return mk.QTensor(jnp.asarray(values, DTYPES[format]), jnp.asarray(scale), np.dtype("float32"))


product = jax.jit(
    partial(mk.dot_general, implementation="native"),
    static_argnums=2,
    static_argnames="preferred_element_type",
)


def integers(rng, shape) -> np.ndarray:
    """Integers that both formats hold: the magnitudes 0, 1, 2, 3, 4, 6 and 8."""
    return rng.choice([0, 1, 2, 3, 4, 6, 8], shape) * rng.choice([-1, 1], shape)


@dataclass(frozen=True)
class Case:
    """The sizes of a product, and how it is stored."""

    batch: int
    rows: int
    terms: int
    columns: int
    terms_last: tuple[bool, bool]

    def operands(self, rng) -> tuple[np.ndarray, np.ndarray]:
        return (
            integers(rng, (self.batch, self.rows, self.terms)),
            integers(rng, (self.batch, self.terms, self.columns)),
        )

    def stored(self, lhs, rhs) -> tuple:
        """The operands as they are stored, and the axes that are contracted."""
        left, right = self.terms_last
        axes = (2 if left else 1,), (2 if right else 1,)
        lhs = lhs if left else lhs.swapaxes(1, 2)
        rhs = rhs.swapaxes(1, 2) if right else rhs
        return lhs, rhs, (axes, ((0,), (0,)))


def elsewhere(program: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs a program in another process, whose kernels are chosen by the environment."""
    path = os.pathsep.join(sys.path)
    return subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": path} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def check_casts(dtype: str, rows: int, format: str, array: str | None = None) -> None:
    """Results are rounded to nearest even, or to infinity where `dtype` ends, and NaN stays NaN.

    They are the integers up to 4095, digits to the base 8 times powers of it: of both signs, in
    turn, and many of them halfway between two numbers of 16 bits. In the last columns the scale
    makes them too large for float16, and is a NaN whose bits are all set.

    Args:
        dtype: of the result.
        rows: of the left operand.
        format: of the right one.
        array: the dtype of the left one; None: its format is that of the right one.
    """
    numbers = np.arange(4096)
    digits = numbers // np.asarray([[512], [64], [8], [1]]) % 8
    powers = np.asarray([512, 64, 8, 1])
    if array is None:  # int8 does not hold 512
        digits[0], powers[0] = digits[0] * 8, 64
    signs = np.where(np.arange(rows) % 2, -1, 1)[:, None]
    scale = np.ones((1, 4096), np.float32)
    scale[0, 4000:] = 32
    scale[0, 4090:] = np.asarray(0x7FFFFFFF, np.uint32).view(np.float32)
    rhs = mk.QTensor(jnp.asarray(digits, format), jnp.asarray(scale), np.dtype("float32"))
    lhs = tensor(signs * powers, format) if array is None else jnp.asarray(signs * powers, array)
    found = product(lhs, rhs, MATRIX, preferred_element_type=dtype)
    with np.errstate(over="ignore"):
        expected = (signs * numbers * scale).astype(jnp.dtype(dtype))
    assert found.dtype == expected.dtype
    # NumPy takes no NaN of bfloat16 for one.
    np.testing.assert_array_equal(*(np.asarray(x, np.float32) for x in (found, expected)))
