"""QTensor as a pytree, as something to index, and as something that is not an array."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

import mpjax_kernels as mk
from mpjax_kernels._formats import FORMATS
from tests.kernels_helpers import normal

pytestmark = pytest.mark.usefixtures("strict_promotion")
FLOAT32 = np.dtype("float32")


@pytest.fixture
def q(key):
    return mk.quantize(jax.random.normal(key, (6, 4, 3)), axis=1)  # scale [6, 1, 3]


def assert_same(a: mk.QTensor, b: mk.QTensor):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def test_describes_itself(q):
    assert repr(q) == "QTensor(int8[6,4,3], scale float32[6,1,3])"
    assert (q.shape, q.ndim, q.size, q.dtype) == ((6, 4, 3), 3, 72, FLOAT32)
    assert q.nbytes == 72 + 4 * 18
    assert q.format is mk.int8


def test_leaves_are_values_then_scale_and_the_dtype_is_static(q):
    assert [leaf.dtype for leaf in jax.tree.leaves(q)] == [jnp.int8, jnp.float32]
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(q)]
    assert paths == [".values", ".scale"]
    other = mk.QTensor(q.values, q.scale, np.dtype("float16"))
    assert jax.tree.structure(other) != jax.tree.structure(q)


def test_survives_transformations(q):
    assert_same(jax.jit(lambda q: q)(q), q)
    assert_same(jax.tree.map(lambda leaf: leaf, q), q)
    assert_same(jax.vmap(lambda row: row)(q), q)
    assert_same(jax.lax.scan(lambda carry, row: (carry, row), None, q)[1], q)
    moved = jax.device_put(q, jax.devices()[1])
    assert moved.values.devices() == moved.scale.devices() == {jax.devices()[1]}
    assert_same(moved, q)


def test_is_a_whole_row_inside_vmap_and_scan(q):
    expected = mk.dequantize(q)
    np.testing.assert_array_equal(jax.vmap(mk.dequantize)(q), expected)
    _, rows = jax.lax.scan(lambda carry, row: (carry, mk.dequantize(row)), None, q)
    np.testing.assert_array_equal(rows, expected)


def test_eval_shape_keeps_the_class_and_its_properties():
    x = jax.ShapeDtypeStruct((8, 5), jnp.bfloat16)
    q = jax.eval_shape(lambda x: mk.quantize(x, axis=0), x)
    assert repr(q) == "QTensor(int8[8,5], scale float32[1,5])"
    assert (q.dtype, q.size, q.nbytes) == (jnp.bfloat16, 40, 60)
    mk.validate(q)


def test_holds_leaves_that_are_not_arrays(q):
    sharding = SingleDeviceSharding(jax.devices()[0])
    assert repr(jax.tree.map(lambda _: sharding, q)) == (
        "QTensor(SingleDeviceSharding, scale SingleDeviceSharding)"
    )
    assert repr(jax.tree.map(lambda _: None, q)) == "QTensor(NoneType, scale NoneType)"


def test_ellipsis_alone_returns_the_same_object(q):
    assert q[...] is q


@pytest.mark.parametrize(
    "index",
    [
        2,
        -1,
        np.int64(3),
        slice(1, 4),
        (slice(None, None, -2), 1),
        (Ellipsis, 0),
        (0, Ellipsis, slice(1, None)),
        (None, slice(2), Ellipsis, None),
        (1, 2, 0),
        (slice(0, 0),),
    ],
)
def test_indexing_commutes_with_dequantize(q, index):
    part = q[index]
    mk.validate(part)
    np.testing.assert_array_equal(mk.dequantize(part), mk.dequantize(q)[index])


def test_a_traced_integer_indexes(q):
    part = jax.jit(lambda q, i: mk.dequantize(q[i, i]))(q, jnp.int32(2))
    np.testing.assert_array_equal(part, mk.dequantize(q)[2, 2])


def test_transposing_commutes_with_dequantize(q):
    x = mk.dequantize(q)
    np.testing.assert_array_equal(mk.dequantize(q.T), x.T)
    np.testing.assert_array_equal(mk.dequantize(q.transpose()), x.T)
    np.testing.assert_array_equal(mk.dequantize(q.transpose(1, 0, 2)), x.transpose(1, 0, 2))
    np.testing.assert_array_equal(mk.dequantize(q.transpose((2, -3, 1))), x.transpose(2, 0, 1))


def test_indexing_refusals(q):
    with pytest.raises(TypeError, match="takes ints, slices, None and Ellipsis .* dequantize it"):
        q[jnp.arange(2)]
    with pytest.raises(TypeError, match="got True"):
        q[True]
    with pytest.raises(IndexError, match="index 6 is out of range for an axis of size 6"):
        q[6]
    with pytest.raises(IndexError, match=r"too many entries for shape \(6, 4, 3\)"):
        q[0, 0, 0, 0]
    grouped = mk.QTensor(q.values, jnp.ones((2, 1, 1), jnp.float32), FLOAT32)
    assert grouped[:, 1].scale.shape == (2, 1)
    for cut in (slice(1, None), slice(4), slice(None, None, 3), slice(None, None, -1)):
        message = "2 scales, one per group of 3: a slice of it has step 1 and .* multiples of 3"
        with pytest.raises(NotImplementedError, match=message):
            grouped[cut]


@pytest.mark.parametrize(
    ("format", "group_size"),
    [*((name, (3, 2)) for name in FORMATS), ("int4", (6, 1)), ("float8_e4m3fn", (1, 4))],
)
def test_every_format_and_granularity_is_cut_along_its_groups(format, group_size):
    q = mk.quantize(normal(6, 4, 3), format, axis=(0, 1), group_size=group_size)
    x = mk.dequantize(q)
    assert q.format is mk.get_format(format)
    assert q.scale.shape == (6 // group_size[0], 4 // group_size[1], 3)
    assert repr(q).startswith(f"QTensor({format}[6,4,3], scale float32[")
    rows, columns = group_size
    for index in [
        slice(rows),
        slice(6 - rows, None),
        slice(0, 0),
        (4, slice(4 - columns, 4)),
        (-1, -4),
        (slice(None), -2),
        (None, 0, None, slice(columns), slice(None, None, -1)),
    ]:
        part = q[index]
        mk.validate(part)
        np.testing.assert_array_equal(mk.dequantize(part), x[index])
    np.testing.assert_array_equal(mk.dequantize(q.T), x.T)
    np.testing.assert_array_equal(jax.jit(lambda q, i: mk.dequantize(q[i]))(q, -2), x[-2])
    stacked = q.transpose(2, 0, 1)
    assert_same(jax.lax.scan(lambda carry, row: (carry, row), None, stacked)[1], stacked)


def test_two_int4_values_take_a_byte():
    q = mk.quantize(normal(256, 64), "int4", axis=0, group_size=128)
    assert q.values.dtype == jnp.int4
    assert q.nbytes == 256 * 64 // 2 + 4 * 2 * 64
    assert mk.quantize(normal(3, 1), "int4").nbytes == 2 + 4  # three halves are two bytes
    program = jax.jit(lambda values: values.T).lower(q.values).compile()
    memory = program.memory_analysis()  # XLA's own count
    assert memory is not None
    assert memory.argument_size_in_bytes == memory.output_size_in_bytes == 256 * 64 // 2


USES = {
    "numpy": lambda q, x: np.asarray(q),
    "jnp.asarray": lambda q, x: jnp.asarray(q),
    "q @ x": lambda q, x: q @ x,
    "x @ q": lambda q, x: x @ q,
    "numpy @ q": lambda q, x: np.asarray(x) @ q,
    "q + 1": lambda q, x: q + 1,
    "1 - q": lambda q, x: 1 - q,
    "x * q": lambda q, x: x * q,
    "-q": lambda q, x: -q,
    "+q": lambda q, x: +q,
    "q % 2": lambda q, x: q % 2,
    "2 % q": lambda q, x: 2 % q,
    "q // 2": lambda q, x: q // 2,
    "2 // q": lambda q, x: 2 // q,
    "divmod(q, 2)": lambda q, x: divmod(q, 2),
    "divmod(2, q)": lambda q, x: divmod(2, q),
    "q < 1": lambda q, x: q < 1,
    "float(q)": lambda q, x: float(q),
    "if q": lambda q, x: bool(q),
    "list(q)": lambda q, x: list(q),
    "jnp.dot": lambda q, x: jnp.dot(x, q),
    "jnp.einsum": lambda q, x: jnp.einsum("ij,jk->ik", x, q),
    "jnp.concatenate": lambda q, x: jnp.concatenate([x, q]),
    "jnp.where": lambda q, x: jnp.where(x > 0, x, q),
    "jnp.take": lambda q, x: jnp.take(q, jnp.array([0]), axis=0),
    "quantize again": lambda q, x: mk.quantize(q),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
@pytest.mark.parametrize("jit", [False, True])
def test_use_as_an_array_is_refused_with_the_remedy(use, jit):
    q, x = mk.quantize(jnp.ones((3, 3))), jnp.ones((3, 3))
    message = (
        r"QTensor\(int8\[3,3\], scale float32\[1,1\]\) cannot be used as an array: "
        r"use mpjax_kernels.dot_general / matmul / einsum, or dequantize it"
    )
    with pytest.raises(TypeError, match=message):
        jax.jit(lambda q: use(q, np.ones((3, 3))))(q) if jit else use(q, x)


@pytest.mark.parametrize(
    ("values", "scale", "dtype", "error", "message"),
    [
        (jnp.int16, (1, 1), "float32", TypeError, "stored in no known format"),
        (jnp.int8, (1,), "float32", ValueError, "must have the rank of `values`"),
        (jnp.int8, (4, 1), "float32", ValueError, "a divisor of it"),
        (jnp.int8, (0, 1), "float32", ValueError, "a divisor of it"),
        (jnp.int8, (1, 1), "int32", TypeError, "`dtype` of .* must be floating, got int32"),
    ],
)
def test_validate_names_the_broken_invariant(values, scale, dtype, error, message):
    q = mk.QTensor(jnp.ones((6, 2), values), jnp.ones(scale, jnp.float32), np.dtype(dtype))
    with pytest.raises(error, match=message):
        mk.validate(q)


@pytest.mark.parametrize("f", [mk.validate, mk.dequantize, lambda q: mk.contiguous(q, 0)])
@pytest.mark.parametrize(
    ("q", "name"),
    [(np.ones((3, 4), np.float32), r"float32\[3,4\]"), ([1.0], "list"), (None, "NoneType")],
)
def test_what_is_no_qtensor_is_refused(f, q, name):
    with pytest.raises(TypeError, match=f"^`q` must be a QTensor, got {name}: quantize it first$"):
        f(q)


def test_validate_wants_a_float32_scale_and_takes_every_granularity():
    values = jnp.ones((6, 2), jnp.int8)
    with pytest.raises(TypeError, match=r"`scale` of .*scale bfloat16\[1,1\]\) must be float32"):
        mk.validate(mk.QTensor(values, jnp.ones((1, 1), jnp.bfloat16), FLOAT32))
    for shape in [(1, 1), (6, 1), (1, 2), (6, 2), (3, 1), (2, 2)]:
        mk.validate(mk.QTensor(values, jnp.ones(shape, jnp.float32), FLOAT32))


def test_values_that_were_cast_are_told():
    q = mk.quantize(jnp.ones((4, 8)), "int8", axis=0)
    cast = jax.tree.map(lambda x: x.astype(jnp.bfloat16), {"kernel": q})["kernel"]
    with pytest.raises(
        TypeError, match=r"values of QTensor\(bfloat16\[4,8\], .* as after `jax\.tree"
    ):
        _ = cast.format
