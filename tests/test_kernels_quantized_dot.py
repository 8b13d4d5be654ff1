"""quantized_dot_general: the three products, what is kept between them, scales, amaxes, errors."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_policies, print_saved_residuals

import mpjax_kernels as mk
from tests.helpers import equations
from tests.kernels_helpers import U, normal

pytestmark = pytest.mark.usefixtures("strict_promotion")

MATRIX = (((1,), (0,)), ((), ()))
INT8, FLOAT8 = mk.DotFormats.int8(), mk.DotFormats.float8()
PER_TENSOR = mk.DotFormats.int8(granularity="tensor")


STATIC = ("formats", "dims", "implementation", "preferred_element_type")


# Eagerly, every operation of it would be compiled on its own.
@partial(jax.jit, static_argnums=(2, 3), static_argnames=STATIC)
def dot(lhs, rhs, formats, dims=MATRIX, **kwargs):
    return mk.quantized_dot_general(lhs, rhs, dims, formats, **kwargs)


def gradients(lhs, rhs, g, formats, dims=MATRIX, **kwargs):
    """Of `sum(dot * g)`: so `g` is the gradient of the product."""

    def loss(lhs, rhs):
        return jnp.sum(dot(lhs, rhs, formats, dims, **kwargs)[0] * g)

    return jax.jit(jax.grad(loss, argnums=(0, 1)))(lhs, rhs)


def numpy_int8(x: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Values and scales, as `quantize` defines them."""
    scale = np.abs(x).max(axis, keepdims=True) / np.float32(127)
    return np.rint(x / scale), scale


def test_int8_products_are_these_numbers():
    x, w, g = (np.asarray(normal(*shape)) for shape in ((7, 16), (16, 5), (7, 5)))
    (xq, xs), (wq, ws) = numpy_int8(x, 1), numpy_int8(w, 0)
    out, amaxes = dot(x, w, INT8)
    np.testing.assert_allclose(out, (xq @ wq) * xs * ws, rtol=4 * U)
    np.testing.assert_array_equal(amaxes.lhs, np.abs(x).max(1, keepdims=True))
    np.testing.assert_array_equal(amaxes.rhs, np.abs(w).max(0, keepdims=True))
    # The scale that varies along the contracted axis multiplies g before it is quantized.
    (to_lhs, to_lhs_scale), (to_rhs, to_rhs_scale) = numpy_int8(g * ws, 1), numpy_int8(g * xs, 0)
    dlhs, drhs = gradients(x, w, g, INT8)
    np.testing.assert_allclose(dlhs, (to_lhs @ wq.T) * to_lhs_scale, rtol=4 * U)
    np.testing.assert_allclose(drhs, (xq.T @ to_rhs) * to_rhs_scale, rtol=4 * U)


# lhs shape, rhs shape, dimension numbers: plain, vector, batched, permuted, outer
SHAPES = [
    ((6, 16), (16, 5), MATRIX),
    ((16,), (16, 5), (((0,), (0,)), ((), ()))),
    ((2, 3, 4, 5), (7, 4, 3, 5), (((3, 2), (3, 1)), ((1,), (2,)))),
    ((11, 2, 3), (5, 11, 2), (((0,), (1,)), ((1,), (2,)))),
    ((3,), (4,), (((), ()), ((), ()))),
]


@pytest.mark.parametrize(("lhs_shape", "rhs_shape", "dims"), SHAPES)
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_power_of_two_scales_equal_fake_quantization_bit_for_bit(
    lhs_shape, rhs_shape, dims, granularity
):
    # Then every number is an integer times a power of two, and float32 sums are exact.
    x, w = 2 * normal(*lhs_shape), normal(*rhs_shape)  # some beyond 127 / 64 are clipped
    g = jnp.roll(jax.lax.dot_general(x, w, dims), 1)
    formats = mk.DotFormats.int8(granularity=granularity)
    scales = mk.DotScales(*(jnp.float32(2.0**-n) for n in (6, 5, 3, 4)))
    fake = [partial(fake_quantize, scale=s) for s in (2.0**-6, 2.0**-5, 2.0**-3, 2.0**-4)]
    out, _ = jax.jit(partial(dot, formats=formats, dims=dims, scales=scales))(x, w)
    product = partial(jax.lax.dot_general, dimension_numbers=dims)
    np.testing.assert_array_equal(out, product(fake[0](x), fake[1](w)))
    _, pull = jax.vjp(product, fake[0](x), fake[1](w))
    dlhs, drhs = gradients(x, w, g, formats, dims, scales=scales)
    clipped = jnp.abs(x) > 127 * 2.0**-6, jnp.abs(w) > 127 * 2.0**-5
    np.testing.assert_array_equal(dlhs, jnp.where(clipped[0], 0.0, pull(fake[2](g))[0]))
    np.testing.assert_array_equal(drhs, jnp.where(clipped[1], 0.0, pull(fake[3](g))[1]))


@pytest.mark.parametrize("terms", [1, 128, 1024])
def test_power_of_two_scales_are_exact_up_to_1024_terms(terms):
    x, w, g = (127.0 * jnp.sign(normal(*s)) for s in ((terms, terms), (terms, 3), (terms, 3)))
    scales = mk.DotScales(*(jnp.float32(1),) * 4)
    dlhs, drhs = gradients(x, w, g, PER_TENSOR, scales=scales)
    out, _ = dot(x, w, PER_TENSOR, scales=scales)
    x, w, g = (np.asarray(a, np.int64) for a in (x, w, g))
    for result, expected in ((out, x @ w), (dlhs, g @ w.T), (drhs, x.T @ g)):
        np.testing.assert_array_equal(result, expected)


def fake_quantize(x: jax.Array, scale: float) -> jax.Array:
    return jnp.clip(jnp.round(x / scale), -127, 127) * scale


def gated_mlp(x, gate, up, down, formats, implementation):
    """The feed-forward block of most language models, as three quantized products."""
    product = partial(dot, formats=formats, implementation=implementation)
    hidden = jax.nn.silu(product(x, gate)[0]) * product(x, up)[0]
    return jnp.sum(product(hidden, down)[0] ** 2)


def gated_mlp_gradient(formats, implementation=None):
    shapes = ((8, 16), (16, 24), (16, 24), (24, 16))
    operands = [normal(*shape) for shape in shapes]
    loss = partial(gated_mlp, formats=formats, implementation=implementation)
    return jax.grad(loss, argnums=(0, 1, 2, 3)), operands


def operand_dtypes(function, operands) -> list[tuple[str, ...]]:
    """Of the dots that the program has on this machine: of both operands and the result."""
    every = equations(jax.make_jaxpr(function)(*operands).jaxpr)
    dots = [e for e in every if e.primitive.name == "dot_general"]
    return sorted(tuple(v.aval.dtype.name for v in (*e.invars, *e.outvars)) for e in dots)


@pytest.mark.parametrize("implementation", ["cpu", "xla"])
def test_the_gradient_of_a_gated_mlp_is_nine_int8_products(implementation):
    function, operands = gated_mlp_gradient(INT8, implementation)
    assert operand_dtypes(function, operands) == [("int8", "int8", "int32")] * 9
    program = jax.jit(function).lower(*operands).compile().as_text()
    dots = [line for line in str(program).splitlines() if " dot(" in line]
    assert len(dots) == 9 and all(" = s32[" in line for line in dots)
    # One product left in high precision is seen: the check can fail.
    formats = mk.DotFormats(INT8.out, INT8.dlhs, (None, None))
    function, operands = gated_mlp_gradient(formats, implementation)
    dtypes = operand_dtypes(function, operands)
    assert dtypes.count(("int8", "int8", "int32")) == 6
    assert dtypes.count(("float32", "float32", "float32")) == 3


def test_the_gradient_of_a_gated_mlp_is_nine_float8_products():
    function, operands = gated_mlp_gradient(FLOAT8, "xla")
    e4m3, e5m2 = "float8_e4m3fn", "float8_e5m2"
    assert operand_dtypes(function, operands) == sorted(
        [(e4m3, e4m3, "float32")] * 3
        + [(e5m2, e4m3, "float32")] * 3
        + [(e4m3, e5m2, "float32")] * 3
    )


FORMATS = {
    "float8": (FLOAT8, 0.06),
    "int8 per tensor": (PER_TENSOR, 0.03),
    "forward only": (mk.DotFormats(("int8", "int8")), 0.02),
    "weight only": (mk.DotFormats((None, "int8")), 0.02),
    "backward only": (mk.DotFormats((None, None), ("int8", "int8"), ("int8", "int8")), 0.02),
    "weight gradient in high precision": (
        mk.DotFormats(INT8.out, INT8.dlhs, (None, None)),
        0.02,
    ),
    "another format backward": (mk.DotFormats(INT8.out, FLOAT8.dlhs, FLOAT8.drhs), 0.06),
    "blocks": (
        mk.DotFormats(
            (mk.OperandFormat("int8", (1, 32)), mk.OperandFormat("int8", (32, 32))),
            (mk.OperandFormat("int8", (1, 32)), "int8"),
            ("int8", "int8"),
        ),
        0.02,
    ),
    "stochastic": (mk.DotFormats.int8(stochastic=True), 0.04),
}


@pytest.mark.parametrize("case", FORMATS)
def test_every_choice_of_formats_approximates_the_product_and_its_gradients(case):
    formats, bound = FORMATS[case]
    x, w, g = normal(64, 96), normal(96, 32) + 0.1, normal(64, 32)
    key = jax.random.key(1) if formats.is_stochastic else None
    out, amaxes = dot(x, w, formats, key=key)
    results = (out, *gradients(x, w, g, formats, key=key))
    for result, exact in zip(results, (x @ w, g @ w.T, x.T @ g), strict=True):
        error = jnp.mean(jnp.abs(result - exact)) / jnp.mean(jnp.abs(exact))
        assert error < bound
    assert [a is None for a in (amaxes.lhs, amaxes.rhs)] == [f is None for f in formats.out]


def test_between_the_passes_operands_are_kept_in_eight_bits(capsys):
    x, w = normal(8, 24).astype(jnp.bfloat16), normal(24, 16).astype(jnp.bfloat16)
    scales = mk.DotScales(lhs=jnp.float32(0.01))

    def loss(x, w, scales):
        operands = jnp.sin(x), jnp.sin(w)
        out, _ = mk.quantized_dot_general(*operands, MATRIX, INT8, scales=scales)
        return jnp.sum(out.astype(jnp.float32))

    policy = checkpoint_policies.save_only_these_names("quantization")
    print_saved_residuals(jax.checkpoint(loss, policy=policy), x, w, scales)
    saved = [line for line in capsys.readouterr().out.splitlines() if "argument" not in line]
    named = sorted(line.split(" ")[0] for line in saved if "quantization" in line)
    # Values and scales of both; and one bit for each of the 192 entries that a scale could clip.
    assert named == sorted(["i8[8,24]", "f32[1,1]", "u8[24]", "i8[24,16]", "f32[1,16]"])
    assert all("constant" in line for line in saved if "quantization" not in line)
    print_saved_residuals(loss, x, w, scales)
    saved = capsys.readouterr().out.splitlines()
    # Without a policy the cosines of sin are kept too, but no bfloat16 copy of an operand.
    assert sum("bf16[" in line and "argument" not in line for line in saved) == 2


def test_a_probe_comes_back_as_the_amax_of_the_gradient():
    x, w, g = normal(6, 16), normal(16, 5), 3 * normal(6, 5)
    scale = jnp.float32(0.1)
    scales = mk.DotScales(dlhs=scale, drhs=scale)

    def loss(x, w, probes, formats):
        out, amaxes = dot(x, w, formats, scales=scales, amax_probes=probes)
        return jnp.sum(out * g), amaxes

    probes = mk.DotScales(dlhs=jnp.float32(0), drhs=jnp.float32(0))
    observed, _ = jax.grad(loss, argnums=2, has_aux=True)(x, w, probes, PER_TENSOR)
    assert observed.dlhs == observed.drhs == jnp.max(jnp.abs(g))
    assert observed.lhs is None and observed.rhs is None
    observed, amaxes = jax.grad(loss, argnums=2, has_aux=True)(x, w, probes, INT8)
    np.testing.assert_array_equal(observed.dlhs, jnp.max(jnp.abs(g * (amaxes.rhs / 127))))
    np.testing.assert_array_equal(observed.drhs, jnp.max(jnp.abs(g * (amaxes.lhs / 127))))
    for probe, formats, found in (
        (jnp.zeros(3), INT8, r"shape \(3,\), but its operand has amaxes of \(\)"),
        (jnp.float32(0), mk.DotFormats(INT8.out), "but its operand has none"),
    ):
        with pytest.raises(ValueError, match=found):
            jax.grad(loss, argnums=2, has_aux=True)(x, w, mk.DotScales(dlhs=probe), formats)


def test_what_a_given_scale_clips_has_no_gradient_and_saturates():
    x, w = jnp.float32([[1.0, 2.0, -2.0, 1.27]]), jnp.ones((4, 1))
    scales = mk.DotScales(lhs=jnp.float32(0.01))
    out, amaxes = dot(x, w, INT8, scales=scales)
    assert out[0, 0] == pytest.approx(1 + 1.27 - 1.27 + 1.27, rel=8 * U)
    assert amaxes.lhs == 2 and amaxes.lhs.shape == ()
    dlhs, drhs = gradients(x, w, jnp.ones((1, 1)), INT8, scales=scales)
    np.testing.assert_allclose(dlhs, [[1, 0, 0, 1]], rtol=4 * U)
    np.testing.assert_allclose(drhs, jnp.float32([[1.0, 1.27, -1.27, 1.27]]).T, rtol=4 * U)


@pytest.mark.parametrize("formats", [INT8, FLOAT8], ids=["int8", "float8"])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_non_finite_entry_stays_visible(formats, scaled, bad):
    scales = mk.DotScales(*(jnp.float32(0.05),) * 4) if scaled else None
    x, w, g = normal(4, 8), normal(8, 3), normal(4, 3)
    out, _ = dot(x.at[1, 2].set(bad), w, formats, scales=scales)
    assert not np.isfinite(out[1]).any()
    dlhs, drhs = gradients(x, w, g.at[1, 2].set(bad), formats, scales=scales)
    assert not np.isfinite(dlhs[1]).any() and not np.isfinite(drhs[:, 2]).any()


def test_noise_is_independent_for_every_operand():
    x = jnp.full((64, 64), 0.3).at[0].set(127.0).at[:, 0].set(127.0)
    formats = mk.DotFormats.int8(stochastic=True)

    def saved(key):
        text = jax.vjp(lambda a, b: dot(a, b, formats, key=key)[0], x, x)[1]
        return [v for v in jax.tree.leaves(text) if getattr(v, "dtype", None) == jnp.int8]

    lhs, rhs = saved(jax.random.key(0))
    assert {0, 1} <= set(np.unique(lhs)) and (lhs != rhs).any()
    again = saved(jax.random.key(1))
    assert (again[0] != lhs).any()
    # On average 0.3: 63 * 63 entries with a standard deviation of at most 1 / 2.
    assert abs(np.mean(np.asarray(lhs)[1:, 1:]) - 0.3) < 4 * 0.5 / 63


def test_runs_inside_transformations():
    x, w, g = normal(3, 6, 16), normal(16, 5), normal(3, 6, 5)
    each = [gradients(x[i], w, g[i], INT8) for i in range(3)]
    mapped = jax.vmap(partial(gradients, formats=INT8), in_axes=(0, None, 0))(x, w, g)
    for result, expected in zip(mapped, zip(*each, strict=True), strict=True):
        np.testing.assert_allclose(result, jnp.stack(expected), rtol=8 * U, atol=1e-6)

    def loss(w):
        def body(total, row):
            return total + jnp.sum(jax.checkpoint(partial(dot, formats=INT8))(row, w)[0]), None

        return jax.lax.scan(body, 0.0, x)[0]

    expected = sum(gradients(x[i], w, jnp.ones((6, 5)), INT8)[1] for i in range(3))
    np.testing.assert_allclose(jax.grad(loss)(w), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtypes", [*itertools.product(["bfloat16", "float32"], repeat=2)])
def test_dtypes_follow_the_operands(dtypes):
    x, w = normal(4, 8).astype(dtypes[0]), normal(8, 3).astype(dtypes[1])
    with jax.numpy_dtype_promotion("standard"):
        out, amaxes = dot(x, w, INT8)
        assert out.dtype == jnp.result_type(*dtypes) and amaxes.lhs.dtype == jnp.float32
    out, _ = dot(x, w, INT8, preferred_element_type=jnp.float16)
    assert out.dtype == jnp.float16

    def loss(x, w):
        return jnp.sum(dot(x, w, INT8, preferred_element_type=jnp.float32)[0])

    dlhs, drhs = jax.grad(loss, argnums=(0, 1))(x, w)
    assert (dlhs.dtype, drhs.dtype) == dtypes


@pytest.mark.parametrize(("rows", "terms", "columns"), [(0, 4, 3), (2, 0, 3), (2, 4, 0), (1, 1, 1)])
def test_empty_and_single_axes(rows, terms, columns):
    x, w = jnp.ones((rows, terms)), jnp.ones((terms, columns))
    out, _ = dot(x, w, INT8)
    np.testing.assert_allclose(out, np.full((rows, columns), float(terms)), rtol=4 * U)
    dlhs, drhs = gradients(x, w, jnp.ones((rows, columns)), INT8)
    np.testing.assert_allclose(dlhs, np.full((rows, terms), float(columns)), rtol=4 * U)
    np.testing.assert_allclose(drhs, np.full((terms, columns), float(rows)), rtol=4 * U)


def test_what_is_wrong_is_said_before_any_work():
    x, w = jnp.ones((4, 8)), jnp.ones((8, 3))
    with pytest.raises(TypeError, match=r"`rhs` is QTensor\(int8\[8,3\].* quantized already"):
        dot(x, mk.quantize(w), INT8)
    with pytest.raises(TypeError, match="`lhs` must have a floating dtype to be quantized"):
        dot(jnp.ones((4, 8), jnp.int32), w, INT8)
    with pytest.raises(TypeError, match="floating dtype, not int32"):
        dot(x, w, INT8, preferred_element_type=jnp.int32)
    with pytest.raises(ValueError, match="rounds stochastically: give a `key`"):
        dot(x, w, mk.DotFormats.int8(stochastic=True))
    with pytest.raises(ValueError, match="contracting 8 with 3"):
        dot(x, w.T, INT8)
    with pytest.raises(ValueError, match=r"`scale` has shape \(3,\), but `x` has \(4, 8\)"):
        dot(x, w, INT8, scales=mk.DotScales(lhs=jnp.ones(3)))
    with pytest.raises(ValueError, match="unknown `implementation` 'xl'"):
        dot(x, w, INT8, implementation="xl")
    with pytest.raises(ValueError, match="unknown `format` 'int7'"):
        mk.DotFormats(("int7", "int8"))
    with pytest.raises(ValueError, match=r"`dlhs` must be a pair of formats.* got 'int8'"):
        mk.DotFormats(("int8", "int8"), "int8")
    with pytest.raises(ValueError, match="`out` must hold names of formats"):
        mk.DotFormats((8, "int8"))
    for granularity in ("row", (1,), (0, 128), 128, (True, 128), [1, 2.0], None):
        with pytest.raises(ValueError, match="unknown `granularity`"):
            mk.OperandFormat("int8", granularity)
    with pytest.raises(ValueError, match="`group_size` 128 does not divide axis 1 of size 8"):
        dot(x, w, mk.DotFormats((mk.OperandFormat("int8", (1, 128)), "int8")))


def test_a_block_may_be_given_as_a_list():
    block = mk.OperandFormat("int8", [1, 128])
    assert block.granularity == (1, 128)
    assert block == mk.OperandFormat("int8", (1, 128))
    assert hash(block) == hash(mk.OperandFormat("int8", (1, 128)))
