"""quantized_einsum: its equations against fake quantization, scales, probes, errors."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mpjax_kernels as mk
from tests.helpers import equations
from tests.kernels_helpers import U, normal

pytestmark = pytest.mark.usefixtures("strict_promotion")

FLOAT8 = mk.DotFormats.float8(granularity="tensor")
PER_TENSOR = mk.DotFormats.int8(granularity="tensor")
PROBES = mk.DotScales(*(jnp.float32(0),) * 4)
STEPS = 2.0**-6, 2.0**-5, 2.0**-3, 2.0**-4
SCALES = mk.DotScales(*map(jnp.float32, STEPS))


@partial(jax.jit, static_argnames=("equation", "formats", "straight_through"))
def einsum(equation, x, w, formats=PER_TENSOR, **kwargs):
    return mk.quantized_einsum(equation, x, w, formats, **kwargs)


def fake_quantize(x: jax.Array, scale: float) -> jax.Array:
    return jnp.clip(jnp.round(x / scale), -127, 127) * scale


# The equation, both shapes, and the operands as they are quantized with what is left to multiply.
PLAIN = [
    ("bqhd,bkhd->bhqk", (2, 3, 4, 8), (2, 5, 4, 8)),
    ("...ab,...bc->c...a", (2, 3, 4), (2, 4, 5)),
    ("i,kj", (3,), (4, 2)),
]
REDUCED = {  # what is done to each operand before, and what is multiplied then
    "iij,jk->ik": ((4, 4, 8), (8, 5), lambda x: jnp.einsum("iij->ij", x), None, "ij,jk->ik"),
    "ijl,jkk->ik": (
        *((4, 8, 3), (8, 5, 5)),
        *(lambda x: jnp.sum(x, 2), lambda w: jnp.einsum("jkk->kj", w), "ij,kj->ik"),
    ),
    # An axis of size 1 broadcasts, so that `w` alone has it: a sum.
    "bi,ij->bj": ((3, 1), (4, 5), lambda x: x[:, 0], lambda w: jnp.sum(w, 0), "b,j->bj"),
}
CASES = {equation: (*shapes, None, None, equation) for equation, *shapes in PLAIN} | REDUCED


@pytest.mark.parametrize("equation", CASES)
def test_power_of_two_scales_equal_fake_quantization_bit_for_bit(equation):
    # Then every number is an integer times a power of two, and float32 sums are exact.
    x_shape, w_shape, before_x, before_w, product = CASES[equation]
    numbers = (np.asarray(normal(*shape)) for shape in (x_shape, w_shape))
    x, w = (np.round(n * 512) / 256 for n in numbers)  # some beyond 127 / 64 are clipped
    before = [f or (lambda a: a) for f in (before_x, before_w)]
    plain = partial(jnp.einsum, product)

    @jax.jit
    def both(x, w):
        out, pull, _ = jax.vjp(partial(einsum, equation, scales=SCALES), x, w, has_aux=True)
        g = jnp.roll(out, 1)
        (x, pull_x), (w, pull_w) = jax.vjp(before[0], x), jax.vjp(before[1], w)
        exact, pull_plain = jax.vjp(plain, fake_quantize(x, STEPS[0]), fake_quantize(w, STEPS[1]))
        dx, dw = (pull_plain(fake_quantize(g, s))[i] for i, s in enumerate(STEPS[2:]))
        dx = jnp.where(jnp.abs(x) > 127 * STEPS[0], 0.0, dx)
        dw = jnp.where(jnp.abs(w) > 127 * STEPS[1], 0.0, dw)
        return (out, *pull(g)), (exact, *pull_x(dx), *pull_w(dw))

    for result, exact in zip(*both(jnp.asarray(x), jnp.asarray(w)), strict=True):
        np.testing.assert_array_equal(result, exact)


def test_it_is_one_product_forward_and_two_backward_in_eight_bits():
    x, w = normal(2, 3, 4, 8), normal(2, 5, 4, 8)

    def loss(x, w):
        return jnp.sum(einsum("bqhd,bkhd->bqhk", x, w)[0])

    every = equations(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(x, w).jaxpr)
    dots = [e for e in every if e.primitive.name == "dot_general"]
    assert [{v.aval.dtype.name for v in e.invars} for e in dots] == [{"int8"}] * 3


def test_probes_get_the_amaxes_and_a_scale_of_zero_is_not_known_yet():
    x, w, g = normal(4, 3, 8), normal(8, 5), normal(5, 4, 3)

    def loss(probes, g, scales):
        out, amaxes = einsum("abi,ij->jab", x, w, FLOAT8, scales=scales, amax_probes=probes)
        return jnp.sum(out * g), (out, amaxes)

    observe = jax.jit(jax.grad(loss, has_aux=True))
    observed, (out, amaxes) = observe(PROBES, g, PROBES)
    largest = [np.max(np.abs(a)) for a in (x, w, g, g)]
    assert [observed.lhs, observed.rhs, observed.dlhs, observed.drhs] == largest
    assert [amaxes.lhs, amaxes.rhs] == largest[:2]
    again = observe(mk.DotScales(), g, None)[1][0]
    np.testing.assert_allclose(out, again, rtol=0, atol=2 * 8 * U * 8 * largest[0] * largest[1])
    assert jax.tree.leaves(observe(PROBES, 0 * g, PROBES)[0]) == [0, 0, 0, 0]
    observed, _ = observe(PROBES, g.at[0, 0, 0].set(jnp.nan), PROBES)
    assert observed.lhs == largest[0] and np.isnan(observed.dlhs)


def test_the_amax_is_of_the_operand_as_it_was_quantized():
    x, w = normal(4, 4, 8), normal(8, 5, 3)
    _, amaxes = einsum("iij,jkl->ik", x, w)
    assert amaxes.lhs.shape == (1, 1)
    assert amaxes.lhs == jnp.max(jnp.abs(jnp.einsum("iij->ij", x)))
    np.testing.assert_allclose(amaxes.rhs, [[np.abs(np.sum(w, 2)).max()]], rtol=4 * U)
    _, amaxes = einsum(
        "bqhd,bkhd->bhqk", normal(2, 3, 4, 8), normal(2, 5, 4, 8), mk.DotFormats.int8()
    )
    assert (amaxes.lhs.shape, amaxes.rhs.shape) == ((2, 3, 4, 1), (2, 5, 4, 1))


def test_a_sum_before_the_product_is_in_float32_and_the_gradient_in_the_dtype_of_the_operand():
    # In bfloat16, 256 + 1 is 256.
    x = jnp.ones((1, 257, 1), jnp.bfloat16)
    out, amaxes = einsum("ikj,jl->il", x, jnp.ones((1, 1), jnp.bfloat16))
    assert amaxes.lhs == 257 and out.dtype == jnp.bfloat16
    grad = jax.grad(lambda x: jnp.sum(einsum("ikj,jl->il", x, jnp.ones((1, 1), x.dtype))[0]))(x)
    assert grad.dtype == jnp.bfloat16 and grad.shape == x.shape
    np.testing.assert_array_equal(grad, np.ones(x.shape))


def test_what_a_scale_clips_has_a_gradient_only_if_it_is_passed_straight_through():
    x, scales = jnp.float32([[1.0, 2.0, -2.0, 1.25]]), mk.DotScales(lhs=jnp.float32(2.0**-6))

    def has_gradient(**kwargs):
        def loss(x):
            return jnp.sum(einsum("ij,jk->ki", x, jnp.ones((4, 1)), scales=scales, **kwargs)[0])

        return jax.grad(loss)(x) != 0

    np.testing.assert_array_equal(has_gradient(), [[True, False, False, True]])
    np.testing.assert_array_equal(has_gradient(straight_through=True), [[True] * 4])


def test_a_backward_product_in_high_precision_is_straight_through_fake_quantization():
    x, w, g = normal(3, 6, 16), normal(16, 5), normal(3, 6, 5)
    formats = mk.DotFormats(("int8", "int8"))

    def round_(x, axis):
        scale = jnp.max(jnp.abs(x), axis, keepdims=True) / 127
        return x + jax.lax.stop_gradient(jnp.round(x / scale) * scale - x)

    def faked(x, w):
        return jnp.sum(jnp.einsum("abi,ij->abj", round_(x, 2), round_(w, 0)) * g)

    def quantized(x, w):
        return jnp.sum(einsum("abi,ij->abj", x, w, formats)[0] * g)

    results, exact = (jax.jit(jax.grad(f, argnums=(0, 1)))(x, w) for f in (quantized, faked))
    # Both multiply float32 by float32, in another order; 18 terms at most.
    for result, other, terms in zip(results, exact, (5, 18), strict=True):
        np.testing.assert_allclose(result, other, rtol=0, atol=2 * terms * U * 40)


def test_vmap_is_the_equation_with_one_more_axis():
    x, w, g = normal(3, 6, 16), normal(16, 5), normal(3, 6, 5)

    def loss(x, w, g, equation):
        return jnp.sum(einsum(equation, x, w, scales=SCALES)[0] * g)

    def mapped(x, w):
        return jnp.sum(jax.vmap(partial(loss, equation="ij,jk->ik"), (0, None, 0))(x, w, g))

    results = jax.jit(jax.grad(mapped, argnums=(0, 1)))(x, w)
    whole = jax.jit(jax.grad(partial(loss, equation="aij,jk->aik"), argnums=(0, 1)))(x, w, g)
    jax.tree.map(np.testing.assert_array_equal, results, whole)


def test_empty_operands_and_nan():
    out, _ = einsum("bij,jk->bik", jnp.ones((0, 3, 4)), jnp.ones((4, 5)))
    assert out.shape == (0, 3, 5)
    out, _ = einsum("ij,jk->ki", normal(3, 4).at[1, 2].set(jnp.nan), normal(4, 5), FLOAT8)
    assert np.isnan(out).all()


def test_what_is_wrong_is_said():
    x, w, einsum = jnp.ones((4, 8)), jnp.ones((8, 3)), mk.quantized_einsum
    with pytest.raises(TypeError, match="`equation` must be a string.* got 3"):
        einsum(3, x, w, PER_TENSOR)
    with pytest.raises(ValueError, match="'ij,jk,kl->il'.*3.* operands"):
        einsum("ij,jk,kl->il", x, w, PER_TENSOR)
    with pytest.raises(ValueError, match="'j' is 8 in one and 3 in the other"):
        einsum("ij,jk->ik", x, w.T, PER_TENSOR)
    with pytest.raises(TypeError, match=r"`rhs` is QTensor\(int8\[8,3\].* quantized already"):
        einsum("ij,jk->ik", x, mk.quantize(w), PER_TENSOR)
    with pytest.raises(TypeError, match="`formats` must be a DotFormats, got 'int8'"):
        einsum("ij,jk->ik", x, w, "int8")
    row = mk.DotScales(lhs=jnp.ones((4, 1)))
    message = r"`scales.lhs` has shape \(4, 1\), but of the axes 'ij' of `lhs` 'j' are left"
    with pytest.raises(ValueError, match=message):
        einsum("ij,jk->k", x, w, PER_TENSOR, scales=row)
    column = mk.DotScales(drhs=jnp.zeros((1, 3)))
    message = r"`amax_probes.drhs` has shape \(1, 3\): .* the axes 'ik', which .*'ij,jk->ki'"
    with pytest.raises(NotImplementedError, match=message):
        einsum("ij,jk->ki", x, w, PER_TENSOR, amax_probes=column)
    with pytest.raises(ValueError, match="unknown `implementation` 'xl'"):
        einsum("ij,jk->ik", x, w, PER_TENSOR, implementation="xl")
