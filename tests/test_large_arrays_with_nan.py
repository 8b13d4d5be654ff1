"""One NaN among many thousand numbers is seen: XLA:CPU's maximum of so many loses it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import mpjax as mp
import mpjax_kernels as mk

SHAPE = (128, 128)
FORMATS = ["int8", "int4", "float8_e4m3fn", "float8_e5m2"]
each_bad = pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf], ids=str)


def spoiled(bad, dtype=np.float32):
    x = np.random.default_rng(0).standard_normal(SHAPE).astype(dtype)
    x[77, 5] = bad
    return jnp.asarray(x)


@each_bad
@pytest.mark.parametrize("format", FORMATS)
def test_the_scale_that_it_belongs_to_is_nan_and_no_other(format, bad):
    x = spoiled(bad)
    cut = {"axis": None}, {"axis": 0}, {"axis": 1}, {"axis": 0, "group_size": 64}
    for options in cut:
        expected = np.asarray(mk.quantize(jnp.isnan(x * 0).astype(jnp.float32), **options).scale)
        touched = expected != 1  # the scale of zeros is 1
        scale = jax.jit(lambda x, o=options: mk.quantize(x, format, **o).scale)(x)
        np.testing.assert_array_equal(np.isnan(scale), touched)
    known = jax.jit(lambda x: mk.quantize(x, format, scale=jnp.float32(0.1)).scale)(x)
    assert np.isnan(known).all()
    if format.startswith("int"):
        q = jax.jit(lambda x: mk.quantize(x, format, axis=1, symmetric=False).scale)(x)
        np.testing.assert_array_equal(np.isnan(np.asarray(q)[:, 0]), np.arange(128) == 77)


@each_bad
@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16])
def test_gradients_that_hold_it_are_not_finite(dtype, bad):
    all_finite = jax.jit(mp.all_finite)
    assert not all_finite({"a": jnp.ones(8), "b": spoiled(bad, dtype)})
    largest = float(jnp.finfo(dtype).max)
    assert all_finite({"a": jnp.full(SHAPE, largest, dtype), "b": jnp.full(SHAPE, -largest, dtype)})


@each_bad
def test_a_product_of_few_rows_shows_it(bad):
    """Rows of digits, which XLA:CPU multiplies as integers."""
    x = jnp.zeros((2, 8192)).at[1, 4000].set(bad)
    w = mk.quantize(jnp.ones((8192, 16)), axis=0)
    y = np.asarray(jax.jit(mk.matmul)(x, w))
    assert np.isfinite(y[0]).all() and not np.isfinite(y[1]).any()


@each_bad
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "float8_from_float32", "int8_from_float32"])
def test_a_step_with_one_is_skipped(policy, bad):
    model = mp.wrap(nn.Dense(128), policy)
    x = jnp.asarray(np.random.default_rng(1).standard_normal(SHAPE), jnp.float32)
    variables = model.init(jax.random.key(0), x)
    state = mp.TrainState.create(apply_fn=model.apply, variables=variables, tx=optax.sgd(0.1))

    @jax.jit
    def step(state, x):
        _, grads = state.value_and_grad(lambda variables: jnp.mean(state.apply_fn(variables, x)))
        return state.apply_gradients(grads)

    state = step(state, x)
    after = step(state, x.at[77, 5].set(bad))
    assert (after.step, after.skipped_steps) == (1, 1)
    for new, old in zip(
        jax.tree.leaves(after.variables), jax.tree.leaves(state.variables), strict=True
    ):
        np.testing.assert_array_equal(new, old)


@pytest.mark.parametrize("device", [0, 1])
def test_devices_see_that_of_another(device):
    """The scale that all share while none is known, whichever device has the NaN."""
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:2]), ("data",))
    formats = mk.DotFormats(("float8_e4m3fn", "float8_e4m3fn"))
    scales = mk.DotScales(lhs=jnp.zeros(()), rhs=jnp.zeros(()))
    dims = (((1,), (0,)), ((), ()))

    def product(x, w):
        return mk.quantized_dot_general(x, w, dims, formats, scales=scales)[0]

    run = jax.shard_map(product, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"))
    x = jnp.ones((4, 8)).at[2 * device, 3].set(jnp.nan)
    assert np.isnan(jax.jit(run)(x, jnp.ones((8, 2)))).all()
