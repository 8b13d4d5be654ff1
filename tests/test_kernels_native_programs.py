"""The calls of native CPU kernels: in the programs that may have them, and in no others."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import mpjax_kernels as mk
from mpjax_kernels._native_library import native_refusal
from tests.kernels_helpers import U, normal
from tests.native_helpers import DOT, MATRIX, QUANTIZE, integers, product, tensor

pytestmark = pytest.mark.skipif(
    native_refusal() is not None, reason=f"no native kernels here: {native_refusal()}"
)


def test_vmap_is_the_stack_of_the_products():
    lhs, rhs = (
        integers(np.random.default_rng(4), (3, 17, 21)),
        integers(np.random.default_rng(5), (21, 35)),
    )
    scales = np.asarray([1.0, 2.0, 0.5], np.float32).reshape(3, 1, 1)
    q, r = tensor(lhs, "float8_e4m3fn", scales), tensor(rhs, "float8_e4m3fn")
    mapped = jax.jit(jax.vmap(lambda q: product(q, r, MATRIX)))
    assert DOT in mapped.lower(q).compile().as_text()
    np.testing.assert_array_equal(mapped(q), (lhs @ rhs) * scales)
    twice = jax.jit(jax.vmap(jax.vmap(lambda q, r: product(q, r, MATRIX), (0, None)), (None, 0)))
    several = jax.tree.map(lambda leaf: jnp.stack([leaf, -leaf]), r)
    several = replace(several, scale=jnp.ones((2, 1, 1)))
    np.testing.assert_array_equal(
        twice(q, several), np.stack([1, -1])[:, None, None, None] * (lhs @ rhs * scales)
    )


def test_vmap_gives_every_entry_its_own_scale():
    x = normal(3, 8, 16) * jnp.asarray([1.0, 10.0, 0.1]).reshape(3, 1, 1)
    mapped = jax.jit(jax.vmap(partial(mk.quantize, format="float8_e4m3fn")))
    assert QUANTIZE in mapped.lower(x).compile().as_text()
    for i, one in enumerate(x):
        q = mk.quantize(one, "float8_e4m3fn")
        np.testing.assert_array_equal(mapped(x).scale[i], q.scale)
        np.testing.assert_array_equal(
            np.asarray(mapped(x).values[i], np.float32), np.asarray(q.values, np.float32)
        )


def trained(x, w, g, implementation=None):
    """A product whose scales are known before, and its derivatives."""
    scales = mk.DotScales(*(jnp.float32(0.02),) * 4)

    def loss(x, w):
        options = {"scales": scales, "straight_through": True, "implementation": implementation}
        out, _ = mk.quantized_dot_general(x, w, MATRIX, mk.DotFormats.float8(), **options)
        return jnp.sum(out * g)

    return jax.grad(loss, argnums=(0, 1))(x, w)


TRAINED = normal(64, 128), normal(128, 96), normal(64, 96)


def test_a_product_and_its_derivative_are_calls_and_nothing_else():
    """No loop casts, decodes or transposes: whatever has 8 bits comes from a call."""
    text = str(jax.jit(trained).lower(*TRAINED).compile().as_text())
    assert text.count(QUANTIZE) == 3  # the gradient is cast twice alike, which XLA does once
    assert text.count(DOT) == 2  # the value of the loss is not asked for
    assert "f8e4m3fn[64,128]{1,0}, f32[1]{0}" in text
    for line in text.splitlines():
        assert not any(f" {name}(" in line for name in ("transpose", "copy", "convert")), line


@pytest.mark.parametrize("remat", [False, True])
def test_derivatives_are_those_of_xla(remat):
    """Products of the same 8-bit numbers: sums of 128 terms at most, in another order."""
    function = jax.checkpoint(trained) if remat else trained
    found = jax.jit(function)(*TRAINED)
    expected = jax.jit(partial(trained, implementation="reference"))(*TRAINED)
    sizes = jax.jit(partial(trained, implementation="reference"))(*map(jnp.abs, TRAINED))
    for a, b, size in zip(found, expected, sizes, strict=True):
        assert (np.abs(a - b) <= 2 * (128 + 7) * U * size).all()


def test_donated_operands_are_not_read_after_they_are_written():
    q, r = tensor(np.eye(64), "float8_e4m3fn"), tensor(np.eye(64), "float8_e4m3fn")
    step = jax.jit(
        lambda q, r: replace(q, values=product(q, r, MATRIX).astype(q.values.dtype)),
        donate_argnums=0,
    )
    for _ in range(3):
        q = step(q, r)
    np.testing.assert_array_equal(np.asarray(q.values, np.float32), np.eye(64))


def test_a_program_for_several_devices_is_partitioned_and_has_no_call():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    x, w, g = TRAINED
    rows = NamedSharding(mesh, P("data"))
    split = jax.device_put(x, rows), w, jax.device_put(g, rows)
    compiled = jax.jit(trained).lower(*split).compile()
    assert "mpjax_float8" not in compiled.as_text()
    assert "all-reduce" in compiled.as_text()  # of the gradient of the weight
    q = mk.quantize(x, "float8_e4m3fn")
    split = replace(
        q,
        values=jax.device_put(q.values, rows),
        scale=jax.device_put(q.scale, NamedSharding(mesh, P())),
    )
    r = mk.quantize(w, "float8_e4m3fn")
    with pytest.raises(NotImplementedError, match="'native': the program is for several devices"):
        product(split, r, MATRIX)


def test_every_device_of_a_shard_map_has_its_own_call():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    lhs, rhs = (
        integers(np.random.default_rng(6), (32, 40)),
        integers(np.random.default_rng(7), (40, 50)),
    )
    q, r = tensor(lhs, "float8_e4m3fn"), tensor(rhs, "float8_e4m3fn")
    specs = replace(q, values=P("data"), scale=P()), replace(r, values=P(), scale=P())
    for check in (True, False):
        mapped = jax.shard_map(
            lambda q, r: mk.dot_general(q, r, MATRIX),
            mesh=mesh,
            in_specs=specs,
            out_specs=P("data"),
            check_vma=check,
        )
        assert DOT in jax.jit(mapped).lower(q, r).compile().as_text()
        np.testing.assert_array_equal(jax.jit(mapped)(q, r), lhs @ rhs)


def test_an_exported_program_holds_no_call():
    x, w, _ = TRAINED
    layouts = jax.export.DisabledSafetyCheck.custom_call("LayoutConstraint")  # no other is allowed

    @jax.jit
    def apply(x, w):
        return mk.quantized_matmul(x, mk.quantize(w, "float8_e4m3fn"), "float8_e4m3fn")

    for platforms in (("cpu",), ("cpu", "tpu")):
        exported = jax.export.export(apply, platforms=platforms, disabled_checks=[layouts])(x, w)
        assert "mpjax_float8" not in exported.mlir_module()
        bound = 2 * (128 + 7) * U * (np.abs(x) @ np.abs(w))
        assert (np.abs(exported.call(x, w) - apply(x, w)) <= bound).all()


def test_other_platforms_never_see_a_call():
    text = jax.jit(trained).trace(*TRAINED).lower(lowering_platforms=("tpu",)).as_text()
    assert "mpjax_float8" not in text
