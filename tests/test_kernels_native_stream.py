"""Few rows by a weight that is stored [K, N], which native kernels read from one end to the other.

The weight is cut into parts, whose sums are added up at the end: of at least 128 terms, at most 16
of them, and strips of 4096 sums. Sums of integers are equal to the integers; those of floats are
exact here by their operands, and always the same bits, whoever computes which part.
"""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from mpjax_kernels._native_library import native_refusal
from tests.native_helpers import FORMATS, MATRIX, Case, product, tensor
from tests.test_kernels_native_int8 import found_and_expected
from tests.test_kernels_native_weight import Weighed

pytestmark = pytest.mark.skipif(
    native_refusal("int8") is not None, reason=f"no native kernels: {native_refusal('int8')}"
)
float8 = pytest.mark.skipif(
    native_refusal() is not None, reason=f"no native kernels of float8: {native_refusal()}"
)

# One part and many, whole ones and not; terms that are no multiple of what is multiplied at once.
TERMS = (3, 129, 2200)
# The least that is read so, tiles that are not whole, and more than a strip of one row.
COLUMNS = (64, 65, 4160)


@pytest.mark.parametrize("left_terms_last", [True, False])
@pytest.mark.parametrize("rows", [1, 2, 3, 4])
@pytest.mark.parametrize("columns", COLUMNS)
def test_sums_of_int8_are_the_integers(rows, columns, left_terms_last):
    for terms in TERMS:
        case = Case(1, rows, terms, columns, (left_terms_last, False))
        np.testing.assert_array_equal(*found_and_expected(case, seed=terms))


def test_each_product_of_a_batch_has_parts_of_its_own():
    np.testing.assert_array_equal(*found_and_expected(Case(3, 2, 700, 130, (True, False))))


@float8
@pytest.mark.parametrize("right_terms_last", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("formats", [("float8_e4m3fn", "float8_e5m2"), ("float8_e5m2",) * 2])
def test_sums_of_float8_are_exact(formats, rows, right_terms_last):
    """At most 2200 terms of at most 64: every partial sum is an integer below 2**24."""
    for terms in TERMS:
        for columns in (3, 191):
            case = Case(1, rows, terms, columns, (True, right_terms_last))
            lhs, rhs = case.operands(np.random.default_rng(terms))
            left, right, dims = case.stored(lhs, rhs)
            found = product(tensor(left, formats[0]), tensor(right, formats[1]), dims)
            np.testing.assert_array_equal(found, lhs @ rhs)


@float8
@pytest.mark.parametrize("right_terms_last", [False, True])
def test_what_is_not_finite_stays_in_its_column(right_terms_last):
    rhs = np.ones((200, 70), ml_dtypes.float8_e5m2)
    rhs[199, 3], rhs[0, 66] = np.inf, np.nan
    case = Case(1, 2, 200, 70, (True, right_terms_last))
    left, right, dims = case.stored(np.ones((1, 2, 200)), rhs[None])
    found = product(tensor(left, "float8_e4m3fn"), tensor(right, "float8_e5m2"), dims)
    expected = np.full((1, 2, 70), 200.0)
    expected[..., 3], expected[..., 66] = np.inf, np.nan
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize("array", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 2, 3, 4])
@pytest.mark.parametrize("columns, terms_last", [(130, False), (4228, False), (131, True)])
def test_sums_of_a_weight_are_exact(format, array, rows, columns, terms_last):
    for groups, group in ((1, 129), (1, 2100), (17, 128), (2, 651), (40, 15), (3, 34)):
        case = Weighed(rows, groups, group, columns, format, array, False, terms_last)
        x, w, exact = case.operands(seed=group)
        found = product(x, w, MATRIX, preferred_element_type=jnp.float32)
        np.testing.assert_array_equal(found, exact)


@pytest.mark.parametrize("format", ["int8", "int4", "float8_e4m3fn"])
def test_parts_are_added_up_in_the_same_order_every_time(format):
    rng = np.random.default_rng(0)
    w = rng.standard_normal((4096, 1024), np.float32)
    if format in FORMATS:
        if native_refusal(format) is not None:
            pytest.skip(native_refusal(format))
        x, q = tensor(rng.standard_normal((1, 4096)), format), tensor(w, format)
    else:
        x = jnp.asarray(rng.standard_normal((1, 4096), np.float32))
        q = (
            tensor(np.rint(30 * w), "int8")
            if format == "int8"
            else Weighed(
                1, 32, 128, 1024, "int4", "float32", has_zero=False, terms_last=False
            ).operands()[1]
        )
    first = np.asarray(product(x, q, MATRIX))
    assert len(np.unique(first)) > 500  # sums that depend on their order
    for _ in range(30):
        np.testing.assert_array_equal(product(x, q, MATRIX), first)
