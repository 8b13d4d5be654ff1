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
