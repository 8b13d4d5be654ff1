"""quantized_conv_general_dilated: three products against fake quantization, scales, probes, errors.

The fake quantization is written in plain JAX, and its convolutions are differentiated by it.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_policies, print_saved_residuals
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import mpjax_kernels as mk
from tests.helpers import equations
from tests.kernels_helpers import U, normal

pytestmark = pytest.mark.usefixtures("strict_promotion")

INT8, FLOAT8 = mk.DotFormats.int8(), mk.DotFormats.float8(granularity="tensor")
PER_TENSOR = mk.DotFormats.int8(granularity="tensor")
PROBES = mk.DotScales(*(jnp.float32(0),) * 4)
STEPS = 2.0**-6, 2.0**-5, 2.0**-3, 2.0**-4
SCALES = mk.DotScales(*map(jnp.float32, STEPS))

NHWC = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
NWC = {"dimension_numbers": ("NWC", "WIO", "NWC")}
DILATED = {"lhs_dilation": (2, 3), "rhs_dilation": (3, 2)}

# Name: shapes of the image and the kernel, strides, padding, the rest.
CASES = {
    "3x3": ((2, 7, 6, 4), (3, 3, 4, 8), (1, 1), "SAME", NHWC),
    "features first, strided": ((2, 4, 7, 6), (3, 4, 3, 2), (1, 2), [(1, 2), (0, 3)], {}),
    "dilated": ((1, 6, 5, 2), (3, 2, 2, 3), (1, 2), [(4, 3), (2, 2)], {**NHWC, **DILATED}),
    "one axis": ((2, 11, 5), (4, 5, 6), (3,), [(-1, -2)], NWC),
    "three axes": ((1, 3, 4, 5, 2), (2, 2, 2, 2, 3), (1, 1, 2), "SAME")
    + ({"dimension_numbers": ("NDHWC", "DHWIO", "NDHWC")},),
    "depthwise": ((2, 6, 7, 3), (3, 3, 1, 6), (2, 1), "SAME")
    + ({**NHWC, "feature_group_count": 3},),
    "batch groups": ((4, 5, 6, 3), (3, 3, 3, 6), (1, 1), "SAME", {**NHWC, "batch_group_count": 2}),
    "no images": ((0, 5, 6, 3), (3, 3, 3, 6), (1, 1), "SAME", NHWC),
}
CASES["a point"] = ((1, 4, 1), (1, 1, 1), (1,), "VALID", NWC)
PLAIN = "3x3"
STATIC = ("case", "formats", "straight_through", "preferred_element_type")


def window(case, conv):
    *_, strides, padding, rest = CASES[case]
    return partial(conv, window_strides=strides, padding=padding, **rest)


def conv(x, w, case=PLAIN, formats=PER_TENSOR, **kwargs):
    call = window(case, mk.quantized_conv_general_dilated)
    return call(x, w, formats=formats, **kwargs)


@partial(jax.jit, static_argnames=STATIC)
def gradients(x, w, g, **kwargs):
    """The convolution, its amaxes, and the gradients of `sum(conv * g)`."""
    out, pull, amaxes = jax.vjp(partial(conv, **kwargs), x, w, has_aux=True)
    return out, *pull(g.astype(out.dtype)), amaxes


@partial(jax.jit, static_argnames="case")
def plain_gradients(forward, to_lhs, to_rhs, case=PLAIN):
    """The same of a convolution in float32, of other operands in each of the three products."""
    product = window(case, partial(jax.lax.conv_general_dilated, precision="highest"))
    (g_lhs, w), (x, g_rhs) = to_lhs, to_rhs
    dlhs = jax.vjp(lambda x: product(x, w), x)[1](g_lhs)
    drhs = jax.vjp(lambda w: product(x, w), w)[1](g_rhs)
    return product(*forward), *dlhs, *drhs


def fake_quantize(x: jax.Array, scale) -> jax.Array:
    return jnp.clip(jnp.round(x / scale), -127, 127) * scale


def operands(case=PLAIN):
    x, w = (
        2 * np.asarray(normal(*CASES[case][0])),
        normal(*CASES[case][1]),
    )  # some beyond 127 / 64 are clipped
    shape = jax.eval_shape(window(case, jax.lax.conv_general_dilated), x, w).shape
    return jnp.asarray(x), w, jnp.asarray(3 * np.asarray(normal(*shape)))


@pytest.mark.parametrize("name", CASES)
def test_power_of_two_scales_equal_fake_quantization_bit_for_bit(name):
    # Then every number is an integer times a power of two, and float32 sums are exact.
    x, w, g = operands(name)

    @jax.jit
    def expected(x, w, g):
        faked = [fake_quantize(a, step) for a, step in zip((x, w, g, g), STEPS, strict=True)]
        results = plain_gradients(faked[:2], (faked[2], faked[1]), (faked[0], faked[3]), name)
        clipped = False, jnp.abs(x) > 127 * STEPS[0], jnp.abs(w) > 127 * STEPS[1]
        return [jnp.where(gone, 0.0, r) for r, gone in zip(results, clipped, strict=True)]

    *results, amaxes = gradients(x, w, g, case=name, scales=SCALES)
    for result, exact in zip(results, expected(x, w, g), strict=True):
        np.testing.assert_array_equal(result, exact)
    assert amaxes.lhs == np.max(np.abs(x), initial=0) and amaxes.rhs == np.max(np.abs(w))
    if name != "no images":
        assert (np.abs(x) > 127 * STEPS[0]).any() and np.any(results[1])


def numpy_int8(x, axis):
    """What int8 stands for: with scales from the amax, as `quantize` defines them."""
    scale = np.abs(x).max(axis, keepdims=True) / np.float32(127)
    return np.rint(x / scale) * scale.astype(np.float64), scale


def test_a_scale_that_varies_along_a_summed_axis_multiplies_the_gradient_before_it_is_quantized():
    x, w, g = map(np.asarray, operands())
    per_image, per_feature = (1, 2, 3), (0, 1, 2)
    (xq, xs), (wq, ws) = numpy_int8(x, per_image), numpy_int8(w, per_feature)
    to_lhs, to_rhs = numpy_int8(g * ws, per_image)[0] / ws, numpy_int8(g * xs, per_feature)[0] / xs
    faked = [a.astype(np.float32) for a in (xq, wq, to_lhs, to_rhs)]
    exact = plain_gradients(faked[:2], (faked[2], faked[1]), (faked[0], faked[3]))
    magnitude = plain_gradients(
        *(tuple(np.abs(faked[i]) for i in pair) for pair in ((0, 1), (2, 1), (0, 3)))
    )
    *results, amaxes = gradients(x, w, g, formats=INT8)
    terms = 36, 72, 84  # of a sum: 3 x 3 x 4 inputs; 3 x 3 x 8 features; 2 images of 7 x 6
    for result, expected, size, n in zip(results, exact, magnitude, terms, strict=True):
        # Two float32 sums of n terms, and eight roundings of factors and scales.
        assert (np.abs(result - expected) <= (2 * n + 8) * U * size).all()
    np.testing.assert_array_equal(amaxes.lhs, np.abs(x).max(per_image, keepdims=True))
    np.testing.assert_array_equal(amaxes.rhs, np.abs(w).max(per_feature, keepdims=True))


def test_float8_is_fake_quantization_with_float32_sums():
    x, w, g = operands("depthwise")
    e4m3, e5m2 = jnp.float8_e4m3fn, jnp.float8_e5m2

    def cast(a, step, dtype):
        most = float(jnp.finfo(dtype).max)
        return jnp.clip(a / step, -most, most).astype(dtype).astype(jnp.float32) * step

    @jax.jit
    def expected(*arrays):
        dtypes = e4m3, e4m3, e5m2, e5m2
        faked = [cast(*a) for a in zip(arrays, STEPS, dtypes, strict=True)]
        pairs = faked[:2], (faked[2], faked[1]), (faked[0], faked[3])
        sizes = jax.tree.map(jnp.abs, pairs)
        return plain_gradients(*pairs, "depthwise"), plain_gradients(*sizes, "depthwise")

    *results, _ = gradients(x, w, g, case="depthwise", formats=FLOAT8, scales=SCALES)
    for result, exact, size in zip(results, *expected(x, w, g, g), strict=True):
        assert (np.abs(result - exact) <= 2 * 24 * U * size).all()  # 24 terms at most


def test_backward_in_high_precision_is_straight_through_fake_quantization_bit_for_bit():
    x, w, g = operands()

    @partial(jax.custom_jvp, nondiff_argnums=(1,))
    def through(x, axis):
        scale = jnp.max(jnp.abs(x), axis, keepdims=True) / 127
        return jnp.round(x / scale) * scale

    through.defjvp(lambda axis, x, dx: (through(*x, axis), *dx))

    def faked(x, w):
        product = window(PLAIN, jax.lax.conv_general_dilated)
        return jnp.sum(product(through(x, (1, 2, 3)), through(w, (0, 1, 2))) * g)

    _, *results, _ = gradients(x, w, g, formats=mk.DotFormats(("int8", "int8")))
    exact = jax.jit(jax.grad(faked, argnums=(0, 1)))(x, w)
    jax.tree.map(np.testing.assert_array_equal, tuple(results), exact)


FORMATS = {
    "backward only": (mk.DotFormats((None, None), ("int8", "int8"), ("int8", "int8")), 0.03),
    "one operand": (mk.DotFormats(INT8.out, (None, "int8"), ("int8", None)), 0.02),
    "another format backward": (mk.DotFormats(INT8.out, *[FLOAT8.dlhs, FLOAT8.drhs]), 0.08),
    "stochastic": (mk.DotFormats.int8(stochastic=True), 0.04),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_choice_of_formats_approximates_the_product_and_its_gradients(name):
    formats, bound = FORMATS[name]
    x, w, g = operands()
    key = jax.random.key(1, impl="rbg") if formats.is_stochastic else None
    *results, amaxes = gradients(x, w, g, formats=formats, key=key)
    for result, exact in zip(results, plain_gradients((x, w), (g, w), (x, g)), strict=True):
        assert jnp.mean(jnp.abs(result - exact)) < bound * jnp.mean(jnp.abs(exact))
    assert [a is None for a in (amaxes.lhs, amaxes.rhs)] == [f is None for f in formats.out]


def test_the_forward_convolution_is_in_eight_bits_and_nothing_else_is_kept(capsys):
    x, w, _ = operands()
    call = partial(conv, formats=FLOAT8, implementation="xla")
    every = equations(jax.make_jaxpr(call)(x, w).jaxpr)
    (dtypes,) = [
        [v.aval.dtype.name for v in (*e.invars, *e.outvars)]
        for e in every
        if e.primitive.name == "conv_general_dilated"
    ]
    assert dtypes == ["float8_e4m3fn", "float8_e4m3fn", "float32"]

    def loss(x, w, scales):
        return jnp.sum(conv(jnp.sin(x), jnp.sin(w), formats=FLOAT8, scales=scales)[0])

    policy = checkpoint_policies.save_only_these_names("quantization")
    scales = mk.DotScales(lhs=jnp.float32(0.01))
    print_saved_residuals(jax.checkpoint(loss, policy=policy), x, w, scales)
    saved = [line for line in capsys.readouterr().out.splitlines() if "argument" not in line]
    named = sorted(line.split(" ")[0] for line in saved if "quantization" in line)
    # Values and scales of both; and one bit for each of the 336 entries that a scale could clip.
    values = ["f8_e4m3fn[2,7,6,4]", "f8_e4m3fn[3,3,4,8]", "f32[1,1,1,1]", "f32[1,1,1,1]", "u8[42]"]
    assert named == sorted(values)
    assert all("constant" in line for line in saved if "quantization" not in line)


def test_probes_get_the_amaxes_and_a_scale_of_zero_is_not_known_yet():
    x, w, g = operands()

    def loss(probes, g, scales):
        out, _ = conv(x, w, formats=FLOAT8, scales=scales, amax_probes=probes)
        return jnp.sum(out * g), out

    observe = jax.jit(jax.grad(loss, has_aux=True))
    observed, out = observe(PROBES, g, PROBES)
    largest = [np.max(np.abs(a)) for a in (x, w, g, g)]
    assert [observed.lhs, observed.rhs, observed.dlhs, observed.drhs] == largest
    size = 36 * largest[0] * largest[1]
    again = observe(mk.DotScales(), g, None)[1]
    np.testing.assert_allclose(out, again, rtol=0, atol=2 * 36 * U * size)
    assert jax.tree.leaves(observe(PROBES, 0 * g, PROBES)[0]) == [0, 0, 0, 0]
    observed, _ = observe(PROBES, g.at[0, 0, 0].set(jnp.nan), PROBES)
    assert observed.lhs == largest[0] and np.isnan(observed.dlhs) and np.isnan(observed.drhs)


def test_devices_of_a_shard_map_share_a_kernel_and_its_probes():
    x, w, g = operands()

    def loss(w, probes, x, g):
        return jnp.sum(conv(x, w, scales=SCALES, amax_probes=probes)[0] * g)

    step = jax.grad(loss, argnums=(0, 1))
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))
    specs = (P(), P(), P("d"), P("d"))
    mapped = jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=P())
    dw, observed = jax.jit(mapped)(w, PROBES, x, g)
    _, _, exact, _ = gradients(x, w, g, case=PLAIN, scales=SCALES)
    np.testing.assert_array_equal(dw, exact)
    assert observed.lhs == np.max(np.abs(x)) and observed.dlhs == np.max(np.abs(g))


def test_vmap_is_each_alone():
    x, w, g = normal(2, *CASES[PLAIN][0]), normal(*CASES[PLAIN][1]), normal(2, 2, 7, 6, 8)
    run = partial(gradients, case=PLAIN, scales=SCALES)
    mapped, alone = jax.jit(jax.vmap(run, in_axes=(0, None, 0)))(x, w, g), run(x[1], w, g[1])
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a)[1], b), mapped, alone)


def test_what_a_scale_clips_has_a_gradient_only_if_it_is_passed_straight_through():
    x, w = jnp.float32([[[1.0], [2.0], [-2.0], [1.25]]]), jnp.ones((1, 1, 1))
    run = partial(gradients, x, w, x, case="a point", scales=mk.DotScales(lhs=jnp.float32(2.0**-6)))
    out, dlhs, *_ = run()
    np.testing.assert_array_equal(out[0, :, 0], [1, 127 / 64, -127 / 64, 1.25])
    np.testing.assert_array_equal(dlhs[0, :, 0] != 0, [True, False, False, True])
    np.testing.assert_array_equal(run(straight_through=True)[1] != 0, np.full((1, 4, 1), True))


def test_a_non_finite_entry_stays_visible():
    x, w, g = operands()
    out, *_ = gradients(x.at[1, 2, 3, 0].set(jnp.nan), w, g, formats=INT8)
    assert not np.isfinite(out[1, 1:4, 2:5]).any()
    _, dlhs, drhs, _ = gradients(x, w, g.at[1, 2, 3, 4].set(jnp.inf), formats=INT8)
    assert not np.isfinite(dlhs[1]).any() and not np.isfinite(drhs[..., 4]).any()
    assert np.isfinite(dlhs[0]).all() and np.isfinite(drhs[..., :4]).all()


def test_dtypes_follow_the_operands():
    x, w, g = operands()
    half = x.astype(jnp.bfloat16)
    options = {"formats": FLOAT8, "preferred_element_type": jnp.float16}
    with jax.numpy_dtype_promotion("standard"):
        out, dlhs, drhs, amaxes = gradients(half, w, g, **options)
        dtypes = [a.dtype for a in gradients(half, w, g, formats=mk.DotFormats((None, None)))[:3]]
    assert (out.dtype, dlhs.dtype, drhs.dtype) == (jnp.float16, jnp.bfloat16, jnp.float32)
    assert amaxes.lhs.dtype == jnp.float32
    assert dtypes == [jnp.float32, jnp.bfloat16, jnp.float32]


def test_what_is_wrong_is_said():
    x, w = (jnp.ones(shape) for shape in CASES[PLAIN][:2])
    with pytest.raises(TypeError, match=r"`rhs` is QTensor\(int8\[3,3,4,8\].* quantized already"):
        conv(x, mk.quantize(w))
    with pytest.raises(TypeError, match="`formats` must be a DotFormats, got 'int8'"):
        conv(x, w, formats="int8")
    with pytest.raises(ValueError, match="rounds stochastically: give a `key`"):
        conv(x, w, formats=mk.DotFormats.int8(stochastic=True))
    with pytest.raises(ValueError, match="unknown `implementation` 'gpu'"):
        conv(x, w, implementation="gpu")
    with pytest.raises(NotImplementedError, match=r"`formats.out` has the granularity \(1, 128\)"):
        conv(x, w, formats=mk.DotFormats.int8(granularity=(1, 128)))
    per_row = mk.DotScales(drhs=jnp.ones((2, 1, 1, 1)))
    with pytest.raises(ValueError, match=r"`scales.drhs` has .*\(2, 1, 1, 1\): .* axis 3 alone"):
        conv(x, w, scales=per_row)
    per_row = mk.DotScales(lhs=jnp.ones((4, 1, 1, 1)))
    x, w = (jnp.ones(shape) for shape in CASES["batch groups"][:2])
    with pytest.raises(ValueError, match=r"`scales.lhs` has .*\(4, 1, 1, 1\): .* vary nowhere"):
        conv(x, w, "batch groups", scales=per_row)
    with pytest.raises(NotImplementedError, match="'channel', but `batch_group_count` is 2"):
        conv(x, w, "batch groups", INT8)
    x, w = (jnp.ones(shape) for shape in CASES["depthwise"][:2])
    mixed = mk.DotFormats(INT8.out, ("int8", "float8_e4m3fn"))
    with pytest.raises(NotImplementedError, match="`formats.dlhs` .* `feature_group_count` is 3"):
        conv(x, w, "depthwise", mixed)
