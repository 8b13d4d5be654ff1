"""Products of one row as a TPU gets them: the same numbers, and on its matrix unit."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mpjax as mp
import mpjax_kernels as mk
from mpjax_kernels import _tpu_rows
from mpjax_kernels._contraction import contraction
from mpjax_kernels._qtensor import QTensor

GROUPED = [
    # shape of the weight, its contracting axes, and how many neighbours share a scale
    ((64, 24), (0,), {"group_size": 16}),
    ((24, 64), (1,), {"group_size": 16}),
    ((4, 16, 6, 4), (0, 1), {"group_size": (2, 8)}),
    ((64, 24), (0,), {"group_size": 16, "symmetric": False}),
]


def row_by(shape, contracting, dtype):
    """A row with a leading axis of 1 for every second contracting axis, and the contraction."""
    terms = tuple(shape[a] for a in contracting)
    x = jax.random.normal(jax.random.key(1), (1, *terms), dtype)
    axes = (tuple(range(1, x.ndim)), contracting), ((), ())
    return x, contraction(x.shape, shape, axes)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape, contracting, options", GROUPED, ids=str)
def test_a_row_by_groups_is_the_product_with_the_dequantized_weight(
    shape, contracting, options, dtype
):
    w = jax.random.normal(jax.random.key(0), shape)
    q = mk.quantize(w, "int4", axis=contracting, **options)
    x, axes = row_by(shape, contracting, dtype)
    assert _tpu_rows.takes_groups(x, q, axes)
    found = _tpu_rows.grouped_dot(x, q, axes, jax.lax.Precision.HIGHEST)
    wide = np.asarray(x, np.float64), np.asarray(mk.dequantize(q), np.float64)
    expected = np.tensordot(*wide, (axes.lhs_contract, axes.rhs_contract))
    assert found.dtype == jnp.float32 and found.shape == axes.result_shape
    # Each of K terms is rounded once, and each sum and scale once more.
    size = np.tensordot(*map(np.abs, wide), (axes.lhs_contract, axes.rhs_contract))
    steps = (axes.terms + 2) * np.finfo(np.float32).eps
    np.testing.assert_array_less(np.abs(found - expected), steps * size + 1e-30)


def test_what_is_not_finite_stays_so():
    q = mk.quantize(jnp.ones((64, 8)), "int4", axis=0, group_size=16)
    x, axes = row_by((64, 8), (0,), jnp.float32)
    for bad in (jnp.nan, jnp.inf):
        found = _tpu_rows.grouped_dot(x.at[0, 20].set(bad), q, axes, None)
        assert not np.isfinite(found).any()


@pytest.mark.parametrize("dtype", ["int8", "float32"])
def test_rows_of_zeros_change_no_sum(dtype):
    key = jax.random.key(0)
    make = jax.random.randint if dtype == "int8" else jax.random.uniform
    x, w = (
        make(key, s, *((-127, 128) if dtype == "int8" else ()), dtype=dtype)
        for s in ((1, 1, 64), (64, 24))
    )
    axes = contraction(x.shape, w.shape, (((2,), (0,)), ((), ())))
    options = {"preferred_element_type": jnp.int32 if dtype == "int8" else jnp.float32}
    plain = partial(jax.lax.dot_general, dimension_numbers=axes.dimension_numbers, **options)
    found = _tpu_rows._padded(x, w, axes, plain)
    assert found.shape == (1, 1, 24)
    if dtype == "int8":
        np.testing.assert_array_equal(found, plain(x, w))
    else:
        np.testing.assert_allclose(found, plain(x, w), rtol=64 * np.finfo(np.float32).eps)


@pytest.mark.parametrize("lhs", ["two rows", "batch", "QTensor"])
def test_what_it_leaves_to_others(lhs):
    q = mk.quantize(jnp.ones((4, 64, 8)), "int4", axis=1, group_size=16)
    numbers = (((2,), (1,)), ((0,), (0,))) if lhs == "batch" else (((1,), (1,)), ((), ()))
    x = jnp.ones({"batch": (4, 1, 64)}.get(lhs, (2 if lhs == "two rows" else 1, 64)))
    x = mk.quantize(x, "int8", axis=1) if lhs == "QTensor" else x
    assert not _tpu_rows.takes_groups(x, q, contraction(x.shape, q.shape, numbers))


@pytest.mark.tpu_compile
@pytest.mark.parametrize(
    "format, bits, options", [("int8", 8, {}), ("int4", 4, {"group_size": 128})]
)
def test_the_matrix_unit_of_a_tpu_reads_a_weight_as_it_is_stored(format, bits, options):
    inputs, outputs = 1024, 2048
    shape = jax.ShapeDtypeStruct((inputs, outputs), jnp.float32)
    q = jax.eval_shape(lambda w: mk.quantize(w, format, axis=0, **options), shape)
    x = jax.ShapeDtypeStruct((1, inputs), jnp.bfloat16)
    assert isinstance(q, QTensor)

    def product(x, q):
        return mk.matmul(mk.quantize(x, "int8", axis=1) if bits == 8 else x, q)

    (row,) = mp.explain(product, x, q, target="v6e").products
    assert row.unit == "MXU" and row.rhs == format and not row.is_miss
    assert row.dequantized_bytes == 0
    # XLA's own way with one row, which this avoids.
    w = jax.ShapeDtypeStruct((inputs, outputs), jnp.bfloat16)
    (plain,) = mp.explain(jnp.dot, x, w, target="v6e").products
    assert plain.unit == "vector"
