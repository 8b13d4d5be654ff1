"""ragged_dot: exact sums, conformance of its implementations, empty groups, refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mpjax_kernels as mk
from mpjax_kernels._ragged_dot import IMPLEMENTATIONS
from tests.kernels_helpers import U, exact, normal, quantize

pytestmark = pytest.mark.usefixtures("strict_promotion")

# The rows of each expert of seven: empty ones in front, between and behind, rows left over, one
# expert for all, none for any.
SIZES = [(2, 0, 3), (0, 5, 2), (1, 2, 1), (7, 0, 0), (0, 0, 0), (0, 0, 7)]


@functools.partial(jax.jit, static_argnames=("implementation", "preferred_element_type"))
def ragged_dot(lhs, rhs, sizes, **options):
    return mk.ragged_dot(lhs, rhs, sizes, **options)


def by_expert(x: np.ndarray, w: np.ndarray, sizes) -> np.ndarray:
    """Every row times its expert; zeros for rows that have none."""
    out = np.zeros((x.shape[0], w.shape[2]), np.result_type(x, w))
    ends = np.cumsum(sizes)
    for g, (end, size) in enumerate(zip(ends, sizes, strict=True)):
        out[end - size : end] = x[end - size : end] @ w[g]
    return out


def tensor(values: np.ndarray, scale: np.ndarray) -> mk.QTensor:
    return mk.QTensor(values, scale.astype(np.float32), np.dtype("float32"))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_int8_sums_are_exact(implementation):
    rng = np.random.default_rng(0)
    x = rng.choice(np.asarray([-127, 126, 127], np.int8), (7, 1040))
    w = rng.choice(np.asarray([-127, 126, 127], np.int8), (3, 1040, 5))
    q, r = tensor(x, np.ones((1, 1))), tensor(w, np.ones((1, 1, 1)))
    for sizes in SIZES:
        expected = by_expert(x.astype(np.int64), w.astype(np.int64), sizes)
        assert np.abs(expected).max() < 2**24  # so that float32 holds them
        result = ragged_dot(q, r, jnp.asarray(sizes), implementation=implementation)
        np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("right", ["int8", "int4", "float8_e4m3fn"])
@pytest.mark.parametrize("left", [None, "int8", "float8_e4m3fn", "float8_e4m3fnuz"])
def test_every_implementation_conforms(left, right):
    x, w = normal(7, 37), normal(3, 37, 5)
    q = x if left is None else quantize(x, left, axis=1)
    r = quantize(w, right, axis=1)
    sizes = SIZES[0]
    xs = np.asarray(x, np.float64) if left is None else exact(q)
    expected = by_expert(xs, exact(r), sizes)
    magnitude = by_expert(np.abs(xs), np.abs(exact(r)), sizes)
    calls = [functools.partial(mk.ragged_dot, implementation=name) for name in IMPLEMENTATIONS]
    for result in jax.jit(lambda *each: [call(*each) for call in calls])(q, r, np.asarray(sizes)):
        assert result.shape == (7, 5) and result.dtype == jnp.float32
        # 37 products, 36 sums, two scales, or two dequantized factors; one more for the rest.
        difference = np.abs(np.asarray(result, np.float64) - expected)
        assert (difference <= 77 * U * magnitude).all()


@pytest.mark.parametrize(
    ("axis", "group_size", "symmetric"),
    [
        (None, None, True),  # per tensor
        ((0, 1), None, True),  # the experts share a scale per output channel
        ((1, 2), None, True),  # a scale per expert
        ((1, 2), (36, 5), True),  # groups of outputs
        (1, 12, True),  # groups of inputs
        ((0, 1, 2), (2, 9, 5), True),  # blocks, and pairs of experts
        (1, None, False),  # zero points
    ],
)
def test_every_granularity(axis, group_size, symmetric):
    x, w = normal(7, 36), normal(4, 36, 10)
    r = mk.quantize(w, axis=axis, group_size=group_size, symmetric=symmetric)
    q, sizes = mk.quantize(x, axis=1), (2, 0, 3, 1)
    refused = not symmetric or r.scale.shape[1] != 1
    options = [("cpu", r), ("cpu", mk.contiguous(r, 1)), ("cpu", mk.contiguous(r, 0))]
    options += [("reference", mk.contiguous(r, 1))]
    options += [] if refused else [("xla", mk.contiguous(r, 1))]

    @jax.jit
    def compute(q, weights):
        return [
            mk.ragged_dot(q, weight, jnp.asarray(sizes), implementation=name)
            for (name, _), weight in zip(options, weights, strict=True)
        ]

    xs, ws = exact(q), np.asarray(mk.dequantize(r), np.float64)
    expected, magnitude = by_expert(xs, ws, sizes), by_expert(np.abs(xs), np.abs(ws), sizes)
    for result in compute(q, [weight for _, weight in options]):
        # As above, and the dequantized weights that are expected are rounded themselves.
        assert (np.abs(np.asarray(result) - expected) <= 80 * U * magnitude).all()
    if refused:
        with pytest.raises(NotImplementedError, match="'xla': `rhs` has "):
            mk.ragged_dot(q, r, jnp.asarray(sizes), implementation="xla")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_scale_that_is_nan_reaches_the_rows_it_belongs_to_and_no_others(implementation):
    x, w = normal(7, 8), normal(3, 8, 4)
    q = mk.quantize(x.at[1, 2].set(jnp.nan).at[6, 0].set(jnp.inf), axis=1)
    r = mk.quantize(w.at[1].set(jnp.nan).at[2, 3, 1].set(jnp.inf), axis=1)
    result = ragged_dot(q, r, jnp.asarray([3, 0, 2]), implementation=implementation)
    expected = np.zeros((7, 4), bool)
    expected[1], expected[3:5, 1] = True, True  # expert 1 and row 6 take no part
    np.testing.assert_array_equal(~np.isfinite(result), expected)
    np.testing.assert_array_equal(result[5:], np.zeros((2, 4)))


def test_rows_that_are_nan_stay_alone_in_a_weight_only_product():
    x, r = normal(7, 8).at[1, 2].set(jnp.nan), mk.quantize(normal(3, 8, 4), axis=1)
    for implementation in IMPLEMENTATIONS:
        result = ragged_dot(x, r, jnp.asarray([3, 0, 2]), implementation=implementation)
        np.testing.assert_array_equal(np.isnan(result).any(1), np.arange(7) == 1)


def test_the_programs_multiply_the_stored_numbers():
    q, r = mk.quantize(jnp.ones((7, 8))), mk.quantize(jnp.ones((3, 8, 4)))
    sizes = jnp.asarray(SIZES[0])
    for implementation in ("cpu", "xla"):
        text = ragged_dot.lower(q, r, sizes, implementation=implementation).as_text()
        lines = text.splitlines()
        dots = [line for line in lines if "dot_general" in line or "ragged_dot" in line]
        is_native = any("@mpjax_int8_dot" in line for line in lines)  # of int8 alone
        assert is_native or any("xi8>" in line and "xi32>" in line for line in dots)
        assert not any("f32>," in line for line in dots)
    with pytest.raises(NotImplementedError, match="on tpu: 'cpu' runs on cpu only"):
        ragged_dot.trace(q, r, sizes, implementation="cpu").lower(lowering_platforms=("tpu",))
    assert ragged_dot.trace(q, r, sizes).lower(lowering_platforms=("tpu",)).as_text()


def test_dtypes_and_precision():
    x = normal(7, 8).astype(jnp.bfloat16)
    q, r = mk.quantize(x, axis=1), mk.quantize(normal(3, 8, 4).astype(jnp.bfloat16), axis=1)
    sizes = jnp.asarray(SIZES[0])
    for implementation in IMPLEMENTATIONS:
        for lhs in (q, x):

            def dtype(lhs=lhs, implementation=implementation, **options):
                options["implementation"] = implementation
                call = functools.partial(mk.ragged_dot, **options)
                return jax.eval_shape(call, lhs, r, sizes).dtype

            assert dtype() == jnp.bfloat16
            assert dtype(preferred_element_type=jnp.float32) == jnp.float32
            with pytest.raises(TypeError, match="has a floating dtype, not int32"):
                dtype(preferred_element_type=jnp.int32)
    for implementation in ("cpu", "xla"):
        call = jax.jit(
            functools.partial(mk.ragged_dot, precision="highest", implementation=implementation)
        )
        text = call.lower(x, r, sizes).as_text()
        assert "HIGHEST" in text or "@mpjax_weight_dot" in text  # which is exact in any case


def test_derivatives():
    x, w = normal(7, 8), normal(3, 8, 4)
    q, r = mk.quantize(x, axis=1), mk.quantize(w, axis=1)
    sizes = jnp.asarray(SIZES[0])
    full = mk.dequantize(q), mk.dequantize(r)

    def plain(x, w):
        return jax.lax.ragged_dot(x, w, sizes, precision="highest").sum()

    for implementation in (None, "reference"):
        call = functools.partial(ragged_dot, implementation=implementation)
        got = jax.grad(lambda x, call=call: call(x, r, sizes).sum())(x)
        expected = jax.grad(plain)(x, full[1])
        np.testing.assert_allclose(
            got, expected, rtol=0, atol=20 * U * np.abs(full[1]).sum(2).max()
        )
        got = jax.grad(lambda w, call=call: call(q, w, sizes).sum())(w)
        expected = jax.grad(plain, argnums=1)(full[0], w)
        np.testing.assert_allclose(
            got, expected, rtol=0, atol=20 * U * np.abs(full[0]).sum(0).max()
        )
    half = jax.grad(lambda x: ragged_dot(x, r, sizes, preferred_element_type=jnp.float32).sum())
    assert half(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16

    def loss(scale):
        return ragged_dot(q, mk.QTensor(r.values, scale, r.dtype), sizes).sum()

    with pytest.raises(NotImplementedError, match="ragged product of two QTensors has no derivati"):
        jax.grad(loss)(r.scale)


def test_transformations():
    x, w = normal(2, 7, 8), normal(3, 8, 4)
    q, r = mk.quantize(x, axis=2), mk.quantize(w, axis=1)
    sizes = jnp.asarray(SIZES[:2])
    expected = jnp.stack([ragged_dot(q[i], r, sizes[i]) for i in range(2)])
    both = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), r)
    np.testing.assert_array_equal(jax.vmap(ragged_dot)(q, both, sizes), expected)
    # Weights that are not mapped: jax.lax.ragged_dot cannot yet, the loop can.
    call = functools.partial(ragged_dot, implementation="cpu")
    np.testing.assert_array_equal(jax.vmap(call, in_axes=(0, None, 0))(q, r, sizes), expected)


@pytest.mark.parametrize(
    ("lhs", "rhs"),
    [((0, 8), (3, 8, 4)), ((7, 8), (0, 8, 4)), ((7, 8), (3, 8, 0)), ((7, 0), (3, 0, 4))],
)
def test_empty_operands(lhs, rhs):
    q, r = mk.quantize(jnp.ones(lhs)), mk.quantize(jnp.ones(rhs))
    result = mk.ragged_dot(q, r, jnp.zeros(rhs[0], jnp.int32))
    np.testing.assert_array_equal(result, np.zeros((lhs[0], rhs[2])))


def test_plain_arrays_go_to_lax():
    x, w, sizes = normal(7, 8), normal(3, 8, 4), jnp.asarray(SIZES[0])
    np.testing.assert_array_equal(mk.ragged_dot(x, w, sizes), jax.lax.ragged_dot(x, w, sizes))
    integers = mk.ragged_dot(
        jnp.ones((7, 8), jnp.int8),
        jnp.ones((3, 8, 4), jnp.int8),
        sizes,
        preferred_element_type=jnp.int32,
    )
    np.testing.assert_array_equal(integers[:5], np.full((5, 4), 8))
    with pytest.raises(TypeError, match="their product has a floating dtype, not int32"):
        mk.ragged_dot(x, w.astype(jnp.int8), sizes, preferred_element_type=jnp.int32)


def test_bad_arguments():
    x, r, sizes = jnp.ones((7, 8)), mk.quantize(jnp.ones((3, 8, 4))), jnp.asarray(SIZES[0])
    for lhs, rhs, shapes in [(x[0], r, r"\(8,\) and `rhs` \(3, 8, 4\)"), (x, r[0], r"\(8, 4\)")]:
        with pytest.raises(ValueError, match=shapes + r": they must be \[M, K\] and \[G, K, N\]"):
            mk.ragged_dot(lhs, rhs, sizes)
    message = r"`lhs` has shape \(7, 5\) but `rhs` has \(3, 8, 4\): contracting 5 with 8"
    with pytest.raises(ValueError, match=message):
        mk.ragged_dot(x[:, :5], r, sizes)
    with pytest.raises(TypeError, match=r"`group_sizes` is float32\[3\]: they must be integers"):
        mk.ragged_dot(x, r, jnp.ones(3))
    with pytest.raises(ValueError, match=r"`group_sizes` has shape \(2,\) .* of its 3 experts"):
        mk.ragged_dot(x, r, sizes[:2])
    with pytest.raises(ValueError, match=r"unknown .* 'gmm': known are \['cpu', 'reference', 'xl"):
        mk.ragged_dot(x, r, sizes, implementation="gmm")
    with pytest.raises(NotImplementedError, match="an array beside a QTensor must be one of"):
        mk.ragged_dot(
            *(x.astype(jnp.int32), r, sizes),
            preferred_element_type=jnp.float32,
            implementation=("cpu", "xla"),
        )
    limit = (2**31 - 1) // 127**2
    q, s = mk.quantize(jnp.ones((1, limit + 1))), mk.quantize(jnp.ones((1, limit + 1, 1)))
    with pytest.raises(NotImplementedError, match=f"{limit + 1} terms: more than {limit} can"):
        mk.ragged_dot(q, s, jnp.ones(1, jnp.int32), implementation=("cpu", "xla"))
