"""Products of every format: conformance, what each implementation computes, accuracy, refusals."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mpjax_kernels as mk
from mpjax_kernels._formats import FORMATS
from tests.kernels_helpers import U, exact, matmul, normal, quantize

pytestmark = pytest.mark.usefixtures("strict_promotion")

FLOAT8 = [name for name in FORMATS if name.startswith("float8")]
INTEGER = ["int8", "int4"]
BATCHED = (((2,), (1,)), ((0,), (0,)))


def fnuz(name: str) -> bool:
    return name.endswith("fnuz")


# Pairs of formats that "xla" multiplies as they are stored.
PAIRS = [(a, b) for a, b in itertools.product(FLOAT8, FLOAT8) if fnuz(a) == fnuz(b)]
PAIRS += itertools.product(INTEGER, INTEGER)


def difference(result: jax.Array, expected: np.ndarray) -> np.ndarray:
    return np.abs(np.asarray(result, np.float64) - expected)


@pytest.mark.parametrize(("left", "right"), PAIRS)
def test_xla_multiplies_the_stored_values(left, right):
    q = quantize(normal(2, 3, 131), left, axis=2)
    r = quantize(normal(2, 131, 5), right, axis=1)
    product = jax.jit(lambda q, r: mk.dot_general(q, r, BATCHED, implementation="xla"))
    magnitude = np.abs(exact(q)) @ np.abs(exact(r))
    # 131 exact products, 130 sums in any order and two scales; one U more for what is quadratic.
    assert (difference(product(q, r), exact(q) @ exact(r)) <= 133 * U * magnitude).all()
    dots = [line for line in product.lower(q, r).as_text().splitlines() if "dot_general" in line]
    assert len(dots) == 1 and dots[0].count("xf32>") == (left in FLOAT8)  # the result alone
    assert ("xi32>" in dots[0]) == (left in INTEGER)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("name", FORMATS)
def test_weight_only_is_a_dot_in_the_dtype_of_the_array(name, dtype):
    x = normal(3, 131).astype(dtype)
    r = quantize(normal(131, 5), name, axis=0)
    xs = np.asarray(x, np.float64)
    expected, magnitude = xs @ exact(r), np.abs(xs) @ np.abs(exact(r))
    # In float32 each of the 131 products is rounded too; of 16-bit factors they are exact.
    bound = 134 * U * magnitude
    for implementation in ("xla", "reference"):
        result = matmul(x, r, preferred_element_type=jnp.float32, implementation=implementation)
        assert (difference(result, expected) <= bound).all()
        flipped = matmul(
            r.T, x.T, preferred_element_type=jnp.float32, implementation=implementation
        )
        assert (difference(flipped, expected.T) <= bound.T).all()
    text = matmul.lower(x, r, preferred_element_type=jnp.float32, implementation="xla").as_text()
    (dot,) = [line for line in text.splitlines() if "dot_general" in line]
    short = {"float16": "f16", "bfloat16": "bf16", "float32": "f32"}[dtype]
    assert f"(tensor<3x131x{short}>, tensor<131x5x{short}>) -> tensor<3x5xf32>" in dot


def ungrouped(q: mk.QTensor) -> mk.QTensor:
    """The same tensor with a scale per entry."""
    scale = np.asarray(q.scale)
    for axis in range(q.ndim):
        scale = np.repeat(scale, q.shape[axis] // q.scale.shape[axis], axis)
    return mk.QTensor(q.values, jnp.asarray(scale), q.dtype)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", FORMATS)
def test_a_non_finite_input_reaches_its_outputs_and_no_others(name, bad):
    x, w = normal(4, 8).at[1, 3].set(bad), normal(8, 3).at[5, 2].set(bad)
    r = quantize(w, name, axis=0)
    expected = np.zeros((4, 3), bool)
    expected[1], expected[:, 2] = True, True
    for q in (x, quantize(x, name, axis=1)):
        for implementation in ("xla", "reference"):
            result = matmul(q, r, implementation=implementation)
            np.testing.assert_array_equal(~np.isfinite(result), expected)


def test_what_xla_cannot_multiply_is_refused_and_goes_to_the_reference():
    x, r = normal(3, 8), quantize(normal(8, 5), "int8", axis=0)
    for dtype in (jnp.float8_e4m3fn, jnp.int32):
        product = partial(mk.matmul, x.astype(dtype), r, preferred_element_type=jnp.float32)
        with pytest.raises(NotImplementedError, match="`lhs` is .* must be one of float16"):
            product(implementation="xla")
        np.testing.assert_array_equal(product(), product(implementation="reference"))


def test_precision_reaches_the_dot():
    q, r = (quantize(x, "float8_e4m3fn", axis=a) for x, a in ((normal(3, 8), 1), (normal(8, 5), 0)))

    def dot(x, **kwargs) -> str:
        text = jax.jit(lambda x, r: mk.matmul(x, r, implementation="xla", **kwargs)).lower(x, r)
        (line,) = [line for line in text.as_text().splitlines() if "dot_general" in line]
        return line

    x = normal(3, 8)
    assert "HIGHEST" in dot(q) and "HIGHEST" not in dot(q, precision="default")
    assert "HIGHEST" not in dot(x) and "HIGHEST" in dot(x, precision="highest")


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("name", FORMATS)
def test_no_derivative_is_silently_zero(name, implementation):
    x, w = normal(3, 8), normal(8, 5)
    r = quantize(w, name, axis=0)
    gradient = jax.grad(lambda x: matmul(x, r, implementation=implementation).sum())(x)
    rows = exact(r)
    bound = 8 * U * np.abs(rows).sum(1)
    assert (difference(gradient, rows.sum(1)) <= bound).all()

    def from_array(w):
        return matmul(x, quantize(w, name, axis=0), implementation=implementation).sum()

    def from_scale(scale):
        q, s = quantize(x, name, axis=1), mk.QTensor(r.values, scale, r.dtype)
        return matmul(q, s, implementation=implementation).sum()

    def from_values(values):
        return matmul(x, mk.QTensor(values, r.scale, r.dtype), implementation=implementation).sum()

    with pytest.raises(NotImplementedError, match="no useful derivative"):
        jax.grad(from_array)(w)
    with pytest.raises(NotImplementedError, match="product of two QTensors has no derivative"):
        jax.grad(from_scale)(r.scale)
    if name in FLOAT8:  # JAX itself refuses an integer
        with pytest.raises(NotImplementedError, match="values of a QTensor have no derivative"):
            jax.grad(from_values)(r.values)


# Left format (None: the array itself), right format, how the weight is cut, and the largest
# relative mean absolute error; without one, the bound is the prediction.
PER_CHANNEL = {"axis": 0}
ACCURACY = {
    "w8a16": (None, "int8", PER_CHANNEL, 0.010),
    "w8a8": ("int8", "int8", PER_CHANNEL, 0.014),
    "float8": ("float8_e4m3fn", "float8_e4m3fn", PER_CHANNEL, 0.038),
    "w4a16 per group of 128": (None, "int4", {"axis": 0, "group_size": 128}, 0.12),
    "w8a8, weight per tensor": ("int8", "int8", {}, None),
    "w8a8, static activations": ("static int8", "int8", PER_CHANNEL, None),
    "E4M3 x E5M2": ("float8_e4m3fn", "float8_e5m2", PER_CHANNEL, None),
}


def predicted_error(x: np.ndarray, q: mk.QTensor) -> float:
    """The RMS error of a tensor over its RMS, if errors are uniform between neighbours."""
    format, scale = q.format, np.asarray(ungrouped(q).scale, np.float64)
    step = np.ones_like(x)
    if not format.is_integer:
        power = 2.0 ** np.floor(np.log2(np.maximum(np.abs(x / scale), format.smallest)))
        step = np.maximum(format.epsilon * power, format.smallest)
    return np.sqrt(((step * scale) ** 2).mean() / 12 / (x**2).mean())


@pytest.mark.parametrize("case", ACCURACY)
def test_accuracy_of_gaussian_products(case):
    left, right, granularity, limit = ACCURACY[case]
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((64, 4096), np.float32)).astype(jnp.bfloat16)
    w = jnp.asarray(rng.standard_normal((4096, 256), np.float32))
    if left == "static int8":  # one scale, of a range that was calibrated on other activations
        q = mk.quantize(x, "int8", scale=jnp.float32(4.5 / 127))
    else:
        q = x if left is None else quantize(x, left, axis=1)
    r = quantize(w, right, **granularity)
    result = matmul(q, r, preferred_element_type=jnp.float32)
    xs, ws = np.asarray(x, np.float64), np.asarray(w, np.float64)
    expected = xs @ ws
    error = difference(result, expected).mean() / np.abs(expected).mean()
    # Products and their errors are sums of 4096 terms, so Gaussian: their mean absolutes are in
    # the ratio of their RMS, and the relative errors of two factors add as squares. Of the
    # 16384 outputs either mean has a relative standard deviation of sqrt(pi / 2 - 1) / 128, 0.6%.
    predicted = np.hypot(predicted_error(ws, r), 0 if left is None else predicted_error(xs, q))
    print(f"{case}: error {error:.4f}, predicted {predicted:.4f}, at most {limit}")
    assert abs(error / predicted - 1) <= 4 * np.hypot(0.006, 0.006)
    assert limit is None or error <= limit
