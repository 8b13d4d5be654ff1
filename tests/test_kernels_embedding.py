"""embedding_lookup: the rows of a dequantized table, without the table."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mpjax_kernels as mk
from mpjax_kernels._formats import FORMATS
from tests.kernels_helpers import normal

pytestmark = pytest.mark.usefixtures("strict_promotion")

# How a table [12, 8] is cut: per tensor, per row, per column, per group of columns, of rows, both.
GRANULARITIES = [
    (None, None),
    (1, None),
    (0, None),
    (1, 4),
    (0, 3),
    ((0, 1), (4, 2)),
]
INDICES = jnp.asarray([[0, 11, 3], [3, -1, -12]])


@pytest.mark.parametrize(("name", "symmetric"), [(n, True) for n in FORMATS] + [("int8", False)])
def test_it_takes_the_rows_of_the_dequantized_table(name, symmetric):
    tables = [normal(12, 8) + i for i in range(len(GRANULARITIES))]

    @jax.jit
    def look_up(tables):
        found = []
        for table, (axis, group_size) in zip(tables, GRANULARITIES, strict=True):
            q = mk.quantize(table, name, axis=axis, group_size=group_size, symmetric=symmetric)
            for each in (q, mk.contiguous(q, 0)):
                found.append((mk.dequantize(q), mk.embedding_lookup(each, INDICES)))
        return found

    for table, result in look_up(tables):
        expected = np.asarray(table)[np.asarray(INDICES)]
        assert result.dtype == jnp.float32
        np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("mode", [None, "fill", "clip", "wrap"])
@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "uint32"])
def test_indices_out_of_range_are_those_of_jnp_take(mode, dtype):
    indices = np.arange(-40, 40).astype(dtype)  # of an unsigned dtype, huge ones
    # jnp.take adds the number of rows in the dtype of the indices, which may not hold it.
    wide = indices.astype({"int8": "int32", "uint8": "uint32"}.get(dtype, dtype))
    tables = [normal(12, 8), normal(200, 2)]  # an int8 does not hold 200

    @jax.jit
    def look_up(indices, wide):
        found = []
        for table in tables:
            q = mk.quantize(table, "int4", axis=1)
            for each, full in ((q, mk.dequantize(q)), (table, table)):
                given = indices if each is q else wide
                expected = jnp.take(full, wide, axis=0, mode=mode)
                found.append((mk.embedding_lookup(each, given, mode=mode), expected))
        return found

    for result, expected in look_up(indices, wide):
        np.testing.assert_array_equal(result, expected)


def test_the_dtype_is_that_of_the_table_or_the_one_asked_for():
    table = normal(12, 8).astype(jnp.bfloat16)
    q = mk.quantize(table, axis=1)
    for each in (table, q):
        assert mk.embedding_lookup(each, INDICES).dtype == jnp.bfloat16
        result = mk.embedding_lookup(each, INDICES, dtype=jnp.float32)
        assert result.dtype == jnp.float32
    # From the stored numbers, not from a bfloat16 rounding of them.
    expected = np.asarray(mk.dequantize(q, jnp.float32))[np.asarray(INDICES)]
    np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("shape", [(), (0,), (2, 1, 3)])
def test_indices_have_any_shape(shape):
    q = mk.quantize(normal(12, 8), axis=1)
    result = mk.embedding_lookup(q, jnp.ones(shape, jnp.int32))
    expected = np.broadcast_to(np.asarray(mk.dequantize(q))[1], (*shape, 8))
    np.testing.assert_array_equal(result, expected)


def test_only_the_rows_asked_for_are_dequantized():
    rows, columns = 4096, 64
    for options in ({"axis": 1}, {"axis": (0, 1), "group_size": (8, 16)}, {"symmetric": False}):
        q = mk.quantize(normal(rows, columns), **options)
        for table in (q, mk.contiguous(q, 0))[: 1 + ("axis" not in options)]:
            compiled = jax.jit(mk.embedding_lookup).lower(table, INDICES).compile()
            for dtype in ("f32", "s32", "bf16"):
                assert f"{dtype}[{rows},{columns}]" not in compiled.as_text()
                assert f"{dtype}[{columns},{rows}]" not in compiled.as_text()
            # The six rows, their scales, and the like: not a tenth of the table in bytes.
            memory = compiled.memory_analysis()
            assert memory is not None and memory.temp_size_in_bytes < rows * columns // 10


def test_transformations():
    q = mk.quantize(normal(12, 8), axis=1)
    expected = mk.embedding_lookup(q, INDICES)
    np.testing.assert_array_equal(
        jax.vmap(mk.embedding_lookup, in_axes=(None, 0))(q, INDICES), expected
    )
    stack = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), q)
    np.testing.assert_array_equal(jax.vmap(mk.embedding_lookup)(stack, INDICES), expected)


def test_an_array_is_differentiable_and_a_qtensor_is_not():
    table = normal(12, 8)
    q = mk.quantize(table, axis=1)
    gradient = jax.grad(lambda t: mk.embedding_lookup(t, INDICES).sum())(table)
    expected = np.zeros((12, 8))
    expected[[0, 11]], expected[3] = 2, 2  # each is asked for twice
    np.testing.assert_array_equal(gradient, expected)

    def loss(scale):
        return mk.embedding_lookup(mk.QTensor(q.values, scale, q.dtype), INDICES).sum()

    with pytest.raises(NotImplementedError, match="looking up a QTensor has no derivative"):
        jax.grad(loss)(q.scale)


def test_bad_arguments():
    q = mk.quantize(normal(12, 8), axis=1)
    for table in (q, normal(12, 8)):
        with pytest.raises(TypeError, match=r"`indices` is float32\[2\]: they must be integers"):
            mk.embedding_lookup(table, jnp.ones(2))
        with pytest.raises(TypeError, match="`indices` is bool"):
            mk.embedding_lookup(table, jnp.ones(2, bool))
        with pytest.raises(ValueError, match="`table` is .*it must have two axes, and rows"):
            mk.embedding_lookup(table[0], INDICES)
        with pytest.raises(ValueError, match="it must have two axes, and rows"):
            mk.embedding_lookup(table[:0], INDICES)
        with pytest.raises(ValueError, match="unknown `mode` 'raise': known are .*'fill', 'clip'"):
            mk.embedding_lookup(table, INDICES, mode="raise")
        with pytest.raises(TypeError, match="`dtype` must be floating, got int8"):
            mk.embedding_lookup(table, INDICES, dtype=jnp.int8)
    with pytest.raises(TypeError, match="`table` must be floating, got int32"):
        mk.embedding_lookup(jnp.ones((12, 8), jnp.int32), INDICES)
    with pytest.raises(TypeError, match="`scale` of .* must be float32"):
        mk.embedding_lookup(mk.QTensor(q.values, q.values, q.dtype), INDICES)
