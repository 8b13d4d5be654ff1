"""The native CPU kernels of int8 by int4, and in groups: exact, by every way through them."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mpjax_kernels as mk
from mpjax_kernels._native_library import native_refusal
from tests.kernels_helpers import U, normal
from tests.native_helpers import ISAS, MATRIX, elsewhere, here, product

pytestmark = pytest.mark.skipif(
    native_refusal("int4") is not None, reason=f"no native kernels: {native_refusal('int4')}"
)

CALL = 'custom_call_target="mpjax_grouped_dot"'
FORMATS = ("int8", "int4")


@dataclass(frozen=True)
class Grouped:
    """The sizes of a product of rows of int8 by a weight in groups, and what the weight is."""

    rows: int
    groups: int
    group: int
    columns: int
    format: str
    has_zero: bool
    terms_last: bool
    is_left: bool = False

    def operands(self, seed: int = 0) -> tuple[mk.QTensor, mk.QTensor, np.ndarray]:
        """Rows, a weight of at least two groups, or one, and their product, exact in float32.

        The integers are of the whole range if sums stay below 2**24; scales are powers of two.
        """
        rng, terms = np.random.default_rng(seed), self.groups * self.group
        most = int(mk.get_format(self.format).max)
        largest = min(127, 2**20 // max(1, terms * (2 * most + 1)))
        x = rng.integers(-largest, largest + 1, (self.rows, terms))
        w = rng.integers(-most - self.has_zero, most + 1, (terms, self.columns))
        by_row = rng.choice([0.5, 1.0, 2.0], (self.rows, 1)).astype(np.float32)
        scale = rng.choice([0.5, 1.0, 2.0], (self.groups, self.columns)).astype(np.float32)
        zero = rng.integers(-most - 1, most + 1, scale.shape) * self.has_zero
        q = mk.QTensor(
            jnp.asarray(w, self.format),
            jnp.asarray(scale),
            np.dtype("float32"),
            jnp.asarray(zero, jnp.int8) if self.has_zero else None,
        )
        spread = (np.repeat(part, self.group, 0) for part in (zero, scale))
        exact = x @ ((w - next(spread)) * next(spread)) * by_row
        q = mk.contiguous(q, axis=0) if self.terms_last else q
        rows = mk.QTensor(jnp.asarray(x, jnp.int8), jnp.asarray(by_row), np.dtype("float32"))
        return rows, q, exact.astype(np.float32)


cases = st.builds(
    Grouped,
    st.one_of(st.integers(0, 9), st.sampled_from([17, 65, 131])),
    st.integers(1, 5),
    st.one_of(st.integers(2, 9), st.sampled_from([16, 31, 32, 64, 96, 97, 128, 130, 300])),
    st.one_of(st.integers(0, 9), st.sampled_from([31, 64, 65, 97, 128, 200])),
    st.sampled_from(FORMATS),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)


def check(case: Grouped, seed: int = 0) -> None:
    rows, weight, exact = case.operands(seed)
    if case.is_left:
        found = product(weight, rows, (((0,), (1,)), ((), ()))).T
    else:
        found = product(rows, weight, MATRIX)
    np.testing.assert_array_equal(found, exact)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(cases)
def test_sums_are_exact(case):
    check(case)
