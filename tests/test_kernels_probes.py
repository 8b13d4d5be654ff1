"""Amaxes that leave a backward pass, and scales that are not known yet."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import mpjax_kernels as mk
from tests.kernels_helpers import normal

pytestmark = pytest.mark.usefixtures("strict_promotion")

MATRIX = (((1,), (0,)), ((), ()))
FORMATS = mk.DotFormats.float8(granularity="tensor")
PROBES = NOTHING_KNOWN = mk.DotScales(*(jnp.float32(0),) * 4)


def dot(x, w, **kwargs):
    return mk.quantized_dot_general(x, w, MATRIX, FORMATS, **kwargs)[0]


def amax(x):
    return np.max(np.abs(x))


def loss(probes, x, w, g):
    return jnp.sum(dot(x, w, scales=NOTHING_KNOWN, amax_probes=probes) * g)


OPERANDS = normal(6, 16), normal(16, 5), 3 * normal(6, 5)


def test_each_probe_gets_the_amax_of_its_operand():
    x, w, g = OPERANDS
    observed = jax.jit(jax.grad(loss))(PROBES, x, w, g)
    assert (observed.lhs, observed.rhs, observed.dlhs, observed.drhs) == (
        amax(x),
        amax(w),
        amax(g),
        amax(g),
    )


def test_an_operand_whose_product_got_no_gradient_is_not_observed():
    x, w, g = OPERANDS
    observed = jax.jit(jax.grad(loss))(PROBES, x, w, 0 * g)
    assert jax.tree.leaves(observed) == [0, 0, 0, 0]


def test_a_gradient_that_is_nan_is_observed_as_nan():
    x, w, g = OPERANDS
    observed = jax.jit(jax.grad(loss))(PROBES, x, w, g.at[0, 0].set(jnp.nan))
    assert (observed.lhs, observed.rhs) == (amax(x), amax(w))
    assert np.isnan(observed.dlhs) and np.isnan(observed.drhs)


def test_a_probe_that_vmap_does_not_map_gets_the_largest_of_all_entries():
    x, w, g = normal(4, 6, 16), normal(16, 5), normal(4, 6, 5)

    def shared(probes):
        return jnp.sum(jax.vmap(lambda x, g: loss(probes, x, w, g))(x, g))

    observed = jax.jit(jax.grad(shared))(PROBES)
    assert (observed.lhs, observed.rhs, observed.dlhs) == (amax(x), amax(w), amax(g))

    def one_each(probes):
        return jnp.sum(jax.vmap(lambda probes, x, g: loss(probes, x, w, g))(probes, x, g))

    each = jax.tree.map(lambda probe: jnp.zeros((4,)), PROBES)
    observed = jax.jit(jax.grad(one_each))(each)
    np.testing.assert_array_equal(observed.lhs, np.max(np.abs(x), axis=(1, 2)))
    np.testing.assert_array_equal(observed.rhs, [amax(w)] * 4)
    np.testing.assert_array_equal(observed.drhs, np.max(np.abs(g), axis=(1, 2)))


@pytest.mark.parametrize("check_vma", [True, False])
def test_a_probe_that_devices_share_gets_the_largest_of_all_devices(check_vma):
    x, w, g = normal(8, 16), normal(16, 5), normal(8, 5)
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))
    mapped = jax.shard_map(
        jax.grad(loss),
        mesh=mesh,
        in_specs=(P(), P("d"), P(), P("d")),
        out_specs=P(),
        check_vma=check_vma,
    )
    observed = jax.jit(mapped)(PROBES, x, w, g)
    assert (observed.lhs, observed.rhs, observed.dlhs) == (amax(x), amax(w), amax(g))


def test_a_scale_of_zero_stands_for_the_one_from_the_amax():
    x, w, g = OPERANDS

    def value_and_gradients(scales):
        def loss(x, w):
            return jnp.sum(dot(x, w, scales=scales) * g)

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(x, w)

    found, current = value_and_gradients(NOTHING_KNOWN), value_and_gradients(None)
    jax.tree.map(np.testing.assert_array_equal, found, current)
    q = mk.quantize(x, "int8", scale=jnp.zeros((6, 1)))
    np.testing.assert_array_equal(q.values, mk.quantize(x, "int8", axis=1).values)
    np.testing.assert_array_equal(q.scale, mk.quantize(x, "int8", axis=1).scale)
    mixed = mk.quantize(x, "int8", scale=jnp.zeros((6, 1)).at[2].set(0.5))
    assert mixed.scale[2, 0] == 0.5
    np.testing.assert_array_equal(np.delete(mixed.scale, 2), np.delete(q.scale, 2))


def test_what_is_clipped_has_a_gradient_if_it_is_passed_straight_through():
    x, w = jnp.float32([[1.0, 1000.0, -2000.0, 4.0]]), jnp.ones((4, 1))
    scales = mk.DotScales(lhs=jnp.float32(1.0))  # E4M3 ends at 448

    def has_gradient(**kwargs):
        return jax.grad(lambda x: jnp.sum(dot(x, w, scales=scales, **kwargs)))(x) != 0

    np.testing.assert_array_equal(has_gradient(), [[True, False, False, True]])
    np.testing.assert_array_equal(has_gradient(straight_through=True), [[True] * 4])
