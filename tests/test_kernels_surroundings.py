"""Products where programs run them: under shard_map, explicit sharding and x64, and eagerly."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import mpjax_kernels as mk
from mpjax_kernels import _implementation
from tests.kernels_helpers import U, normal, quantize

MATRIX = (((1,), (0,)), ((), ()))
ROWS, TERMS, COLUMNS = 8, 64, 32

WEIGHTS = {
    "int8": {"format": "int8", "axis": 0},
    "int4 in groups": {"format": "int4", "axis": 0, "group_size": 16},
    "float8": {"format": "float8_e4m3fn", "axis": 0},
}


def operands(case, left):
    x, w = normal(ROWS, TERMS), quantize(normal(TERMS, COLUMNS), **WEIGHTS[case])
    return (x if left == "array" else quantize(x, WEIGHTS[case]["format"], axis=1)), w


def assert_close(a, b):
    np.testing.assert_allclose(a, b, rtol=2 * TERMS * U, atol=1e-4)


@pytest.mark.parametrize("left", ["array", "quantized"])
@pytest.mark.parametrize("case", WEIGHTS)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_rows_are_sharded(case, left, kind):
    x, w = operands(case, left)
    expected = mk.matmul(x, w)
    mesh = jax.make_mesh((2,), ("d",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        sharded = jax.device_put(x, NamedSharding(mesh, P("d")))
        assert_close(jax.jit(mk.matmul)(sharded, w), expected)
        mapped = jax.shard_map(mk.matmul, in_specs=(P("d"), P()), out_specs=P("d"))
        assert_close(jax.jit(mapped)(sharded, w), expected)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("format", ["int8", "float8_e4m3fn"])
def test_a_batch_of_rows_is_sharded(format, kind):
    x, w = normal(4, 3, TERMS), quantize(normal(TERMS, COLUMNS), format, axis=0)
    product = partial(mk.dynamic_dot_general, dimension_numbers=(((2,), (0,)), ((), ())))
    expected = product(x, w)
    mesh = jax.make_mesh((2,), ("d",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        sharded = jax.device_put(x, NamedSharding(mesh, P("d")))
        assert_close(jax.jit(product)(sharded, w), expected)


@pytest.mark.parametrize("implementation", [None, "cpu", "reference"])
def test_ragged_rows_in_shard_map(implementation):
    x, w = normal(ROWS, TERMS), quantize(normal(3, TERMS, COLUMNS), axis=1)
    sizes = jnp.asarray([1, 0, 3], jnp.int32)
    product = partial(mk.ragged_dot, implementation=implementation)
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))
    mapped = jax.shard_map(product, mesh=mesh, in_specs=(P("d"), P(), P()), out_specs=P("d"))
    halves = [mk.ragged_dot(half, w, sizes) for half in (x[:4], x[4:])]
    assert_close(jax.jit(mapped)(x, w, sizes), jnp.concatenate(halves))


def test_gradients_in_shard_map_are_those_of_all_devices():
    x, w, g = normal(ROWS, TERMS), normal(TERMS, COLUMNS), normal(ROWS, COLUMNS)
    formats = mk.DotFormats.int8(granularity="tensor")
    scales = mk.DotScales(*(jnp.float32(0.03),) * 4)
    probes = mk.DotScales(dlhs=jnp.float32(0), drhs=jnp.float32(0))

    def gradients(x, w, probes, g):
        def loss(x, w, probes):
            arguments = {"scales": scales, "amax_probes": probes}
            out, _ = mk.quantized_dot_general(x, w, MATRIX, formats, **arguments)
            return jnp.sum(out * g)

        return jax.grad(loss, argnums=(0, 1, 2))(x, w, probes)

    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))
    rows, every = P("d"), P()
    mapped = jax.shard_map(
        gradients, mesh=mesh, in_specs=(rows, every, every, rows), out_specs=(rows, every, every)
    )
    expected, found = gradients(x, w, probes, g), jax.jit(mapped)(x, w, probes, g)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert_close(a, b)
    assert found[2].dlhs == jnp.max(jnp.abs(g))  # the largest of both devices, and not their sum


@pytest.mark.parametrize("left", ["array", "quantized"])
@pytest.mark.parametrize("case", WEIGHTS)
def test_x64(case, left):
    x, w = operands(case, left)
    expected = mk.matmul(x, w)
    with jax.enable_x64(True):
        for product in (mk.matmul, jax.jit(mk.matmul)):
            result = product(x, w)
            assert result.dtype == jnp.float32
            assert_close(result, expected)
        wide = x.astype(jnp.float64) if left == "array" else x
        result = mk.matmul(wide, mk.contiguous(w, axis=0), preferred_element_type=jnp.float64)
        assert result.dtype == jnp.float64
        assert_close(result, expected)


def test_eager_products_are_compiled_once():
    q, r = operands("int8", "quantized")
    mk.matmul(q, r, implementation="cpu")
    before = _implementation._compiled.cache_info()
    for _ in range(3):
        mk.matmul(q, r, implementation="cpu")
    after = _implementation._compiled.cache_info()
    assert (after.hits - before.hits, after.misses) == (3, before.misses)


@pytest.mark.parametrize("scaled", [False, True])
def test_an_infinite_weight_does_not_hide_the_gradient_of_the_others(scaled):
    x, w = normal(4, 8), normal(8, 3).at[1, 1].set(jnp.inf)
    scales = mk.DotScales(lhs=jnp.float32(0.1), rhs=jnp.float32(0.1)) if scaled else None
    formats = mk.DotFormats.int8(granularity="tensor")

    def loss(x, w):
        return jnp.sum(mk.quantized_dot_general(x, w, MATRIX, formats, scales=scales)[0])

    value, (dlhs, drhs) = jax.value_and_grad(loss, argnums=(0, 1))(x, w)
    assert not np.isfinite(value) and not np.isfinite(dlhs).any()
    np.testing.assert_array_equal(drhs, jax.grad(loss, argnums=1)(x, w.at[1, 1].set(0.5)))
    assert drhs.any()


def test_the_largest_entry_of_its_own_scale_is_not_clipped():
    for seed in range(40):
        w = jnp.asarray(np.random.default_rng(seed).standard_normal((4, 3)), jnp.float32)
        for format in ("int8", "float8_e4m3fn"):
            scale = jnp.max(jnp.abs(w)) / mk.get_format(format).max
            formats = mk.DotFormats((None, format))
            scales = mk.DotScales(rhs=scale)
            out = partial(
                mk.quantized_dot_general, dimension_numbers=MATRIX, formats=formats, scales=scales
            )
            gradient = jax.grad(lambda w, out=out: jnp.sum(out(jnp.ones((2, 4)), w)[0]))(w)
            np.testing.assert_array_equal(gradient, np.full((4, 3), 2))


@pytest.mark.parametrize("format", ["int8", "float8_e4m3fn"])
def test_float16_gradients_do_not_underflow_when_a_scale_is_folded_in(format):
    x, w = jnp.ones((4, 64), jnp.float16), (0.02 * normal(64, 32)).astype(jnp.float16)
    formats = mk.DotFormats((format, format), (None, format))
    _, pull = jax.vjp(lambda x: mk.quantized_dot_general(x, w, MATRIX, formats)[0], x)
    (found,) = pull(jnp.full((4, 32), 1e-4, jnp.float16))
    expected = np.full((4, 32), 1e-4) @ np.asarray(w, np.float64).T
    assert np.abs(found - expected).mean() < 0.03 * np.abs(expected).mean()
