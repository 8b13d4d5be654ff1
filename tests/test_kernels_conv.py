"""conv_general_dilated: exact sums, conformance of its implementations, derivatives, refusals."""

import dataclasses
import functools
import itertools
import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mpjax_kernels as mk
from mpjax_kernels._conv import IMPLEMENTATIONS
from mpjax_kernels._native_library import native_refusal
from tests.kernels_helpers import U, exact, normal, quantize

pytestmark = pytest.mark.usefixtures("strict_promotion")

NHWC = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
NCHW = {"dimension_numbers": ("NCHW", "OIHW", "NCHW")}
NWC = {"dimension_numbers": ("NWC", "WIO", "NWC")}
DILATED = {"lhs_dilation": (2, 3), "rhs_dilation": (3, 2)}

# Name: shapes of the image and the kernel, strides, padding, the rest.
CASES = {
    "3x3": ((2, 7, 6, 4), (3, 3, 4, 8), (1, 1), "SAME", NHWC),
    "1x1": ((2, 5, 5, 8), (1, 1, 8, 3), (1, 1), "VALID", NHWC),
    "7x7 of rgb, strided": ((1, 15, 16, 3), (7, 7, 3, 5), (2, 3), "SAME", NHWC),
    "features first": ((2, 5, 7, 6), (3, 5, 3, 2), (1, 2), [(1, 2), (0, 3)], NCHW),
    "the default axes": ((2, 5, 7, 6), (3, 5, 3, 2), (1, 1), "SAME_LOWER", {}),
    "dilated": ((1, 6, 5, 2), (3, 2, 2, 3), (1, 2), [(4, 3), (2, 2)], {**NHWC, **DILATED}),
    "cropped": ((1, 6, 7, 4), (2, 2, 4, 3), (1, 1), [(-1, -2), (0, -1)], NHWC),
    "one axis": ((2, 11, 5), (4, 5, 6), (2,), "SAME", NWC),
    "one axis, dilated": (
        *((2, 9, 4), (3, 4, 6), (1,), [(2, 2)]),
        {**NWC, "lhs_dilation": (2,), "rhs_dilation": (2,)},
    ),
    "three axes": ((1, 3, 4, 5, 2), (2, 2, 2, 2, 3), (1, 1, 2), "SAME")
    + ({"dimension_numbers": ("NDHWC", "DHWIO", "NDHWC")},),
    "no axes of space": ((3, 4), (4, 2), (), [], {"dimension_numbers": ("NC", "IO", "NC")}),
    "other axes": ((5, 4, 2, 3), (6, 2, 4, 3), (1, 1), "SAME")
    + ({"dimension_numbers": ("HCNW", "OHIW", "CWNH")},),
    "depthwise": ((2, 6, 7, 5), (3, 3, 1, 5), (1, 1), "SAME")
    + ({**NHWC, "feature_group_count": 5},),
    "depthwise, two for each, dilated": ((2, 6, 7, 3), (2, 3, 1, 6), (2, 1), [(3, 2), (1, 4)])
    + ({**NHWC, **DILATED, "feature_group_count": 3},),
    "depthwise, one axis": ((2, 9, 4), (3, 1, 4), (1,), "VALID")
    + ({**NWC, "feature_group_count": 4},),
    "groups": ((2, 5, 6, 6), (3, 3, 2, 9), (1, 1), "SAME", {**NHWC, "feature_group_count": 3}),
    "batch groups": ((4, 5, 6, 3), (3, 3, 3, 6), (1, 1), "SAME", {**NHWC, "batch_group_count": 2}),
    "no images": ((0, 5, 6, 3), (3, 3, 3, 6), (1, 1), "SAME", NHWC),
    "no features": ((2, 5, 6, 0), (3, 3, 0, 6), (1, 1), "SAME", NHWC),
    "a kernel that does not fit, strided": ((2, 2, 6, 3), (3, 3, 3, 4), (3, 2), "VALID", NHWC),
    "a kernel that does not fit": ((2, 2, 6, 3), (3, 3, 1, 3), (1, 1), "VALID")
    + ({**NHWC, "feature_group_count": 3},),
}


def axes_of(case) -> jax.lax.ConvDimensionNumbers:
    lhs, rhs, *_, options = case
    return jax.lax.conv_dimension_numbers(lhs, rhs, options.get("dimension_numbers"))


def spread_out(x: np.ndarray, dilation, padding) -> np.ndarray:
    """An image [N, C, ...] with zeros between its entries and around them, or cropped."""
    gaps = np.zeros(
        (*x.shape[:2], *((n - 1) * d + 1 for n, d in zip2(x.shape[2:], dilation))), x.dtype
    )
    gaps[(..., *(slice(None, None, d) for d in dilation))] = x
    image = np.pad(gaps, [(0, 0)] * 2 + [(max(a, 0), max(b, 0)) for a, b in padding])
    pairs = zip2(image.shape[2:], padding)
    return image[(..., *(slice(max(-a, 0), n - max(-b, 0)) for n, (a, b) in pairs))]


def window_sums(x: np.ndarray, w: np.ndarray, case) -> np.ndarray:
    """A convolution written out in NumPy: the window at every place, for every feature."""
    *_, strides, padding, options = case
    axes = axes_of(case)
    x, w = x.transpose(axes.lhs_spec), w.transpose(axes.rhs_spec)  # n c space, o i space
    ones = (1,) * len(strides)
    apart = options.get("rhs_dilation", ones)
    wide = [(k - 1) * d + 1 for k, d in zip2(w.shape[2:], apart)]
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads(x.shape[2:], wide, strides, padding)
    x = spread_out(x, options.get("lhs_dilation", ones), padding)
    size = [max((n - k) // s + 1, 0) for (n, k), s in zip2(zip2(x.shape[2:], wide), strides)]
    n, o, c = x.shape[0] // options.get("batch_group_count", 1), *w.shape[:2]
    out = np.zeros((n, o, *size), np.result_type(x, w))
    for f, at in itertools.product(range(o), np.ndindex(*size)):
        window = [
            slice(a * s, a * s + k, d)
            for (a, s), (k, d) in zip2(zip2(at, strides), zip2(wide, apart))
        ]
        first = f // (o // options.get("feature_group_count", 1)) * c
        image = f // (o // options.get("batch_group_count", 1)) * n
        part = x[(slice(image, image + n), slice(first, first + c), *window)]
        out[(slice(None), f, *at)] = (part * w[f]).sum(axis=tuple(range(1, x.ndim)))
    return out.transpose(np.argsort(axes.out_spec))


zip2 = functools.partial(zip, strict=True)


def convolve(case, **options):
    *_, strides, padding, rest = case
    return functools.partial(
        mk.conv_general_dilated, window_strides=strides, padding=padding, **rest, **options
    )


def shared_axes(case) -> tuple[Sequence[int], Sequence[int]]:
    """The axes that share a scale: all but the images', and all but the output features'."""
    axes, batches = axes_of(case), case[-1].get("batch_group_count", 1)
    return axes.lhs_spec[batches == 1 :], axes.rhs_spec[1:]


def takes(implementation: str, case) -> bool:
    strides, options = case[2], case[-1]
    if implementation == "native":
        groups = {options.get(f"{of}_group_count", 1) for of in ("feature", "batch")}
        return groups == {1} and native_refusal("int8") is None
    grouped = options.get("feature_group_count", 1) not in (1, case[0][-1])
    special = grouped or options.get("batch_group_count", 1) != 1 or len(strides) not in (1, 2)
    return implementation != "cpu" or not special


@pytest.mark.parametrize("name", CASES)
def test_every_implementation_conforms(name):
    case = CASES[name]
    rng = np.random.default_rng(0)
    values = [rng.choice(np.asarray([-127, 126, 127], np.int8), shape) for shape in case[:2]]
    scales = []
    for v, shared in zip(values, shared_axes(case), strict=True):
        shape = [1 if a in shared else n for a, n in enumerate(v.shape)]
        scales.append(rng.uniform(0.01, 0.02, shape).astype(np.float32))
    ones = [np.ones((1,) * v.ndim, np.float32) for v in values]
    whole = [mk.QTensor(*vs, np.dtype("float32")) for vs in zip2(values, ones)]
    q, r = (mk.QTensor(*vs, np.dtype("float32")) for vs in zip2(values, scales))
    names = [i for i in IMPLEMENTATIONS if takes(i, case)]
    calls = [convolve(case, implementation=i) for i in names]
    # A kernel stored in another order is the same kernel.
    stored = mk.contiguous(r, (1, 0))
    results = jax.jit(lambda *pairs: [[call(*pair) for pair in pairs] for call in calls])(
        whole, (q, r), (q, stored)
    )
    sums = window_sums(*(v.astype(np.int64) for v in values), case)
    expected = window_sums(exact(q), exact(r), case)
    magnitude = window_sums(np.abs(exact(q)), np.abs(exact(r)), case)
    terms = np.prod(case[1])
    assert np.abs(sums).max(initial=0) < 2**24  # so that float32 holds them
    for implementation, (integers, *scaled) in zip(names, results, strict=True):
        assert integers.dtype == jnp.float32
        np.testing.assert_array_equal(integers, sums)
        for result in scaled:
            assert result.shape == expected.shape
            # The sum to float32 and two scales, and what float64 rounds in the expectation.
            bound = 3.01 * U * np.abs(expected) + terms * 2.0**-52 * magnitude
            if implementation == "reference":
                bound = (terms + 3) * U * magnitude
            assert (np.abs(np.asarray(result, np.float64) - expected) <= bound).all()
    for refused in set(IMPLEMENTATIONS) - set(names):
        reason = ".*: it takes" if refused == "cpu" or native_refusal("int8") is None else ""
        with pytest.raises(NotImplementedError, match=f"'{refused}': {reason}"):
            convolve(case, implementation=refused)(q, r)


PLAIN = CASES["3x3"]


def lowered(call, *operands) -> str:
    text = jax.jit(call).lower(*operands).as_text()
    (line,) = [line for line in text.splitlines() if "stablehlo.convolution" in line]
    return line


@pytest.mark.parametrize("left", ["int8", "float8_e4m3fn", None])
@pytest.mark.parametrize("right", ["int8", "int4", "float8_e4m3fn", "float8_e5m2"])
def test_every_pair_of_formats(left, right):
    x, w = normal(*PLAIN[0]), normal(*PLAIN[1])
    r = quantize(w, right, axis=(0, 1, 2))
    q = x if left is None else quantize(x, left, axis=(1, 2, 3))
    xs = np.asarray(x, np.float64) if left is None else exact(q)
    expected = window_sums(xs, exact(r), PLAIN)
    magnitude = window_sums(np.abs(xs), np.abs(exact(r)), PLAIN)
    # 36 products, 35 sums and two scales, or two dequantized factors; one more for the rest.
    bound = 75 * U * magnitude
    calls = [convolve(PLAIN, implementation=i) for i in ("xla", "reference")]
    for result in jax.jit(lambda q, r: [call(q, r) for call in calls])(q, r):
        assert (np.abs(np.asarray(result, np.float64) - expected) <= bound).all()
    kind = {"int8": "i8", "int4": "i8", "float8_e4m3fn": "f8E4M3FN", "float8_e5m2": "f8E5M2"}
    mixed = left is not None and kind[left] != kind[right]
    short = "f32" if left is None else "bf16" if mixed else kind[left]
    result = "i32" if short == "i8" else "f32"
    line = lowered(convolve(PLAIN, implementation="xla"), q, r)
    assert f"(tensor<2x7x6x4x{short}>, tensor<3x3x4x8x{short}>) -> tensor<2x7x6x8x{result}>" in line


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_weight_only_is_a_convolution_in_the_dtype_of_the_array(dtype):
    x, w = normal(*PLAIN[0]).astype(dtype), normal(*PLAIN[1]).astype(dtype)
    r = mk.quantize(w, "int4", axis=(0, 1, 2), symmetric=False)
    call = convolve(PLAIN, implementation="xla", precision="highest")
    line = lowered(call, x, r)
    short = {"float16": "f16", "bfloat16": "bf16", "float32": "f32"}[dtype]
    assert f"x{short}>, tensor<3x3x4x8x{short}>) -> tensor<2x7x6x8xf32>" in line
    assert "HIGHEST" in line
    assert call(x, r).dtype == dtype
    assert convolve(PLAIN, preferred_element_type=jnp.float32)(x, r).dtype == jnp.float32
    xs, rs = np.asarray(x, np.float64), np.asarray(mk.dequantize(r, jnp.float32), np.float64)
    result = convolve(PLAIN, implementation="xla", preferred_element_type=jnp.float32)(x, r)
    magnitude = window_sums(np.abs(xs), 2 * np.abs(rs).max() + np.abs(rs), PLAIN)
    assert (np.abs(np.asarray(result) - window_sums(xs, rs, PLAIN)) <= 75 * U * magnitude).all()


def test_only_what_the_reference_takes_goes_to_it():
    x, w = normal(*PLAIN[0]), normal(*PLAIN[1])
    q, r = mk.quantize(x, axis=(1, 2, 3)), mk.quantize(w, axis=(0, 1, 2))
    lopsided = mk.quantize(x, axis=(1, 2, 3), symmetric=False)
    grouped = mk.quantize(w, axis=2, group_size=2)
    for lhs, rhs, message in [
        (lopsided, r, "'xla': `lhs` has a zero point"),
        (q, mk.quantize(w, axis=(0, 1, 2), symmetric=False), "'xla': `rhs` has a zero point"),
        (q, grouped, r"`rhs` has scale \(3, 3, 2, 8\): .* output feature axis 3 alone"),
        (mk.quantize(x, axis=3), r, r"`lhs` has scale \(2, 7, 6, 1\): .* batch axis 0 alone"),
        (x.astype(jnp.int32), r, "an array beside a QTensor must be one of float16"),
    ]:
        options = {"preferred_element_type": jnp.float32}
        for names in ("xla", ("cpu", "xla")):
            with pytest.raises(NotImplementedError, match=message):
                convolve(PLAIN, implementation=names, **options)(lhs, rhs)
        result = convolve(PLAIN, **options)(lhs, rhs)
        full = [o if isinstance(o, jax.Array) else mk.dequantize(o) for o in (lhs, rhs)]
        expected = window_sums(*(np.asarray(o, np.float64) for o in full), PLAIN)
        magnitude = window_sums(*(np.abs(np.asarray(o, np.float64)) for o in full), PLAIN)
        assert (np.abs(np.asarray(result) - expected) <= 40 * U * magnitude).all()
    per_image = mk.quantize(normal(4, 5, 6, 3), axis=(1, 2, 3))
    with pytest.raises(NotImplementedError, match=r"scale \(4, 1, 1, 1\): .* may vary nowhere"):
        convolve(CASES["batch groups"], implementation="xla")(per_image, normal(3, 3, 3, 6))


def test_more_terms_than_int32_can_hold_go_to_the_reference():
    limit = (2**31 - 1) // 127**2
    one = jnp.ones((1, 1, 1), jnp.float32)
    for terms in (limit, limit + 1):
        x, w = np.full((1, 1, terms), 127, np.int8), np.full((1, terms, 1), 127, np.int8)
        q, r = (mk.QTensor(jnp.asarray(v), one, np.dtype("float32")) for v in (x, w))
        call = convolve((None, None, (1,), "VALID", NWC), implementation=("cpu", "xla"))
        if terms == limit:
            np.testing.assert_array_equal(call(q, r), np.float32(127**2 * terms))
        else:
            with pytest.raises(
                NotImplementedError, match=f"contracts {terms} terms: more than {limit}"
            ):
                call(q, r)


def test_a_scale_that_is_nan_reaches_its_outputs_and_no_others():
    x, w = (
        normal(*PLAIN[0]).at[1, 2, 3, 0].set(jnp.nan),
        normal(*PLAIN[1]).at[0, 0, 0, 5].set(jnp.inf),
    )
    q, r = mk.quantize(x, axis=(1, 2, 3)), mk.quantize(w, axis=(0, 1, 2))
    expected = np.zeros((2, 7, 6, 8), bool)
    expected[1], expected[..., 5] = True, True
    for implementation in filter(lambda name: takes(name, PLAIN), IMPLEMENTATIONS):
        result = convolve(PLAIN, implementation=implementation)(q, r)
        np.testing.assert_array_equal(~np.isfinite(result), expected)


@pytest.mark.skipif(native_refusal("int8") is not None, reason="no native kernels of int8")
def test_a_native_convolution_is_one_call_of_patches():
    x, w = normal(*PLAIN[0]), normal(*PLAIN[1])
    q, r = mk.quantize(x, axis=(1, 2, 3)), mk.quantize(w, axis=(0, 1, 2))
    call = jax.jit(convolve(PLAIN, preferred_element_type=jnp.bfloat16))
    text = call.lower(q, r).compile().as_text() or ""
    assert text.count('custom_call_target="mpjax_int8_dot"') == 1
    assert "s8[84,36]" in text.replace("s8[1,84,36]", "s8[84,36]")  # 2 * 7 * 6 places of 3 * 3 * 4
    assert not any(" convolution(" in line for line in text.splitlines())
    exported = jax.export.export(call)(q, r)
    assert "mpjax_int8_dot" not in exported.mlir_module()
    np.testing.assert_array_equal(exported.call(q, r), call(q, r))  # the same sums, and roundings


@pytest.mark.parametrize("implementation", [None, "xla"])
def test_the_number_of_images_may_be_symbolic(implementation):
    """It is no number that patches could be counted with."""
    (images,) = jax.export.symbolic_shape("images")
    q, r = mk.quantize(normal(*PLAIN[0])), mk.quantize(normal(*PLAIN[1]))
    values = jax.ShapeDtypeStruct((images, *PLAIN[0][1:]), jnp.int8)
    call = jax.jit(convolve(PLAIN, implementation=implementation))
    exported = jax.export.export(call)(dataclasses.replace(q, values=values), r)
    np.testing.assert_array_equal(exported.call(q, r), call(q, r))


@pytest.mark.skipif(native_refusal("int8") is not None, reason="no native kernels of int8")
def test_the_native_form_says_what_it_does_not_take():
    q, r = (mk.quantize(jnp.ones(shape)) for shape in PLAIN[:2])
    for lhs, rhs, strides, options, message in [
        (jnp.ones(PLAIN[0]), r, (1, 1), {}, "`lhs` is .*: both must be QTensors of"),
        (q, mk.quantize(jnp.ones((3, 3, 2, 8))), (1, 1), {"feature_group_count": 2}, "it takes 1"),
        (q, mk.quantize(jnp.ones((12, 12, 4, 1))), (1, 1), {}, "has 144 taps: it takes 128"),
    ]:
        with pytest.raises(NotImplementedError, match=message):
            options |= {**NHWC, "implementation": "native"}
            mk.conv_general_dilated(lhs, rhs, strides, "SAME", **options)
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((99, 512, 512, 8), (3, 3, 8, 8))]
    large = [jax.eval_shape(mk.quantize, shape) for shape in shapes]
    call = functools.partial(convolve(PLAIN, implementation="native"))
    with pytest.raises(NotImplementedError, match="the patches would take 1868562432 bytes"):
        jax.eval_shape(call, *large)


def test_the_cpu_form_is_for_cpus_alone():
    q, r = (mk.quantize(jnp.ones(shape)) for shape in PLAIN[:2])

    def lower(platform, **options):
        return jax.jit(convolve(PLAIN, **options)).trace(q, r).lower(lowering_platforms=(platform,))

    with pytest.raises(NotImplementedError, match="on tpu: 'cpu' runs on cpu only"):
        lower("tpu", implementation="cpu")
    assert "stablehlo.convolution" in lower("tpu").as_text()
    depthwise = CASES["depthwise"]
    q, r = (mk.quantize(jnp.ones(shape)) for shape in depthwise[:2])
    call = jax.jit(convolve(depthwise)).trace(q, r)
    assert "stablehlo.convolution" not in call.lower().as_text()
    assert "stablehlo.convolution" in call.lower(lowering_platforms=("tpu",)).as_text()


def test_convolutions_are_differentiable_in_arrays_alone():
    x, w = normal(*PLAIN[0]), normal(*PLAIN[1])
    q, r = mk.quantize(x, axis=(1, 2, 3)), mk.quantize(w, axis=(0, 1, 2))
    plain = functools.partial(convolve(PLAIN, precision="highest"))
    for name in ("xla", "reference"):
        call = convolve(PLAIN, precision="highest", implementation=name)
        got = jax.grad(lambda x, call=call: call(x, r).sum())(x)
        expected = jax.grad(lambda x: plain(x, mk.dequantize(r)).sum())(x)
        largest = float(jnp.abs(mk.dequantize(r)).max())
        np.testing.assert_allclose(got, expected, rtol=0, atol=2 * 75 * 72 * U * largest)
        got = jax.grad(lambda w, call=call: call(q, w).sum())(w)
        expected = jax.grad(lambda w: plain(mk.dequantize(q), w).sum())(w)
        largest = float(jnp.abs(x).max())
        np.testing.assert_allclose(got, expected, rtol=0, atol=2 * 87 * 84 * U * largest)
    half = jax.grad(lambda x: convolve(PLAIN, preferred_element_type=jnp.float32)(x, r).sum())
    assert half(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16

    def loss(scale):
        return convolve(PLAIN)(q, mk.QTensor(r.values, scale, r.dtype)).sum()

    with pytest.raises(NotImplementedError, match="convolution of two QTensors has no derivative"):
        jax.grad(loss)(r.scale)


def test_plain_arrays_and_transformations():
    x, w = normal(*PLAIN[0]), normal(*PLAIN[1])
    expected = jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", **NHWC)
    np.testing.assert_array_equal(convolve(PLAIN)(x, w), expected)
    stack = mk.quantize(normal(3, *PLAIN[0]), axis=(1, 2, 3, 4))
    r = mk.quantize(w, axis=(0, 1, 2))
    result = jax.vmap(lambda q: convolve(PLAIN)(q, r))(stack)
    np.testing.assert_array_equal(
        result, jnp.stack([convolve(PLAIN)(stack[i], r) for i in range(3)])
    )


def test_bad_arguments():
    x, w = jnp.ones(PLAIN[0]), mk.quantize(jnp.ones(PLAIN[1]))
    conv = mk.conv_general_dilated
    with pytest.raises(
        ValueError, match=r"unknown .* 'gpuu': known are \['cpu', 'native', 'reference', 'xla"
    ):
        conv(x, w, (1, 1), "SAME", **NHWC, implementation="gpuu")
    with pytest.raises(ValueError, match="feature_group_count.* must equal|feature dimension size"):
        conv(x, mk.quantize(jnp.ones((3, 3, 5, 8))), (1, 1), "SAME", **NHWC)
    with pytest.raises(TypeError, match="same ndim|ndim"):
        conv(x[0], w, (1, 1), "SAME")
    with pytest.raises(ValueError, match="a transposed convolution needs its padding in numbers"):
        conv(x, w, (1, 1), "SAME", (2, 2), **NHWC)
    with pytest.raises(TypeError, match="has a floating dtype, not int32"):
        conv(x, w, (1, 1), "SAME", **NHWC, preferred_element_type=jnp.int32)


@pytest.mark.parametrize("padding", [1, (1, 1), ((1,), (1,)), ((1.0, 1.0),) * 2, None])
def test_padding_that_is_no_pair_per_axis_is_refused(padding):
    message = f"`padding` is {padding!r}: it must be 'SAME', 'SAME_LOWER', 'VALID' or the zeros "
    message += "(before, after) per axis of space, as in ((1, 1), (1, 1))"
    x, w = jnp.ones(PLAIN[0]), mk.quantize(jnp.ones(PLAIN[1]))
    with pytest.raises(TypeError, match=re.escape(message)):
        mk.conv_general_dilated(x, w, (1, 1), padding, **NHWC)


@pytest.mark.parametrize("name", ["window_strides", "lhs_dilation", "rhs_dilation"])
@pytest.mark.parametrize(
    ("value", "error"), [(1, TypeError), ((1, 1.0), TypeError), ((1,), ValueError)]
)
def test_what_is_no_int_per_axis_is_refused(name, value, error):
    arguments = {"window_strides": (1, 1), "padding": "SAME", **NHWC, name: value}
    message = f"`{name}` is {value!r}: it must hold an int per axis of space, as in (1, 1)"
    x, w = jnp.ones(PLAIN[0]), mk.quantize(jnp.ones(PLAIN[1]))
    with pytest.raises(error, match=re.escape(message)):
        mk.conv_general_dilated(x, w, **arguments)
