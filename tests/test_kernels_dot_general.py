"""dot_general: exactness, conformance of its implementations, dispatch and refusals."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mpjax_kernels as mk
from mpjax_kernels._dot_general import IMPLEMENTATIONS
from tests.kernels_helpers import HERE, U, matmul, normal, quantize_both

pytestmark = pytest.mark.usefixtures("strict_promotion")

MATRIX = (((1,), (0,)), ((), ()))


@pytest.mark.parametrize(("rows", "terms"), [(1, 1040), (3, 1040), (1, 20011), (2, 20011)])
def test_int8_accumulation_is_exact(rows, terms):
    rng = np.random.default_rng(terms)
    x = rng.choice(np.asarray([-127, 126, 127], np.int8), (rows, terms))
    w = rng.choice(np.asarray([-127, 127], np.int8), (terms, 3))
    x[0], w[:, 0] = 127, 127  # the largest sum there is
    expected = x.astype(np.int64) @ w.astype(np.int64)
    assert expected[0, 0] == 127**2 * terms
    one = jnp.ones((1, 1), jnp.float32)
    q, r = (mk.QTensor(jnp.asarray(v), one, np.dtype("float32")) for v in (x, w))
    # With scales of 1 the only rounding is int32 to float32; at 1040 terms there is none.
    np.testing.assert_array_equal(matmul(q, r, implementation="xla"), np.float32(expected))


def test_more_terms_than_int32_can_hold_go_to_the_reference():
    limit = (2**31 - 1) // 127**2
    for terms, fits in ((limit, True), (limit + 1, False)):
        q = mk.quantize(jnp.ones((2, terms)))
        if fits:
            expected = np.float32(127**2 * terms) * np.float32(q.scale[0, 0]) ** 2
            assert mk.matmul(q, q.T, implementation="xla")[0, 0] == pytest.approx(
                expected, rel=4 * U
            )
        else:
            with pytest.raises(NotImplementedError, match=f"{terms} terms: more than {limit} can"):
                mk.matmul(q, q.T, implementation="xla")
        np.testing.assert_allclose(mk.matmul(q, q.T), terms, rtol=terms * U)


@pytest.mark.parametrize("implementation", HERE)
def test_zeros_stay_exact_zeros(implementation):
    q = mk.quantize(jnp.zeros((4, 8)), axis=1)
    r = mk.quantize(normal(8, 3), axis=0)
    np.testing.assert_array_equal(matmul(q, r, implementation=implementation), np.zeros((4, 3)))


@pytest.mark.parametrize("implementation", HERE)
def test_the_result_dtype_is_asked_for_or_follows_the_logical_dtypes(implementation):
    x = normal(2, 4).astype(jnp.bfloat16)
    q, r = mk.quantize(x, axis=1), mk.quantize(x.T, axis=0)
    assert matmul(q, r, implementation=implementation).dtype == jnp.bfloat16
    asked = matmul(q, r, preferred_element_type=jnp.float16, implementation=implementation)
    assert asked.dtype == jnp.float16
    with jax.numpy_dtype_promotion("standard"):
        wide = mk.quantize(x.T.astype(jnp.float32), axis=0)
        assert matmul(q, wide, implementation=implementation).dtype == jnp.float32
    with pytest.raises(TypeError, match="a product with a QTensor has a floating dtype, not int32"):
        mk.matmul(q, r, preferred_element_type=jnp.int32)


def test_an_empty_contracting_axis_with_a_scale_per_entry():
    q, r = mk.quantize(jnp.ones((3, 0)), axis=0), mk.quantize(jnp.ones((0, 2)), axis=1)
    np.testing.assert_array_equal(mk.matmul(q, r), np.zeros((3, 2)))


def test_per_group_scales_on_a_free_axis_are_applied_after_the_dot():
    r = mk.QTensor(jnp.ones((3, 4), jnp.int8), jnp.float32([[2, 3]]), np.dtype("float32"))
    q = mk.quantize(jnp.full((2, 3), 127.0), axis=1)
    result = matmul(q, r, implementation="xla")
    np.testing.assert_array_equal(result, [[762, 762, 1143, 1143]] * 2)


def test_plain_arrays_go_to_lax():
    x, w = normal(3, 8), normal(8, 5)
    result = mk.dot_general(x, w, MATRIX, preferred_element_type=jnp.bfloat16)
    expected = jax.lax.dot_general(x, w, MATRIX, preferred_element_type=jnp.bfloat16)
    assert result.dtype == expected.dtype
    np.testing.assert_array_equal(result, expected)


def test_runs_inside_transformations():
    x, w = normal(3, 2, 8), normal(3, 8, 5)
    q, r = quantize_both(x, w, 2, 1)
    expected = jnp.stack([mk.matmul(q[i], r[i]) for i in range(3)])
    np.testing.assert_array_equal(jax.vmap(mk.matmul)(q, r), expected)
    _, rows = jax.lax.scan(lambda carry, qr: (carry, mk.matmul(*qr)), None, (q, r))
    np.testing.assert_array_equal(rows, expected)
    # a single row under vmap takes the doubled path on CPU
    rows = jax.vmap(lambda q: mk.matmul(q, r[0]))(q[0])
    np.testing.assert_array_equal(rows, expected[0])
    shape = jax.eval_shape(mk.matmul, q, r)
    assert (shape.shape, shape.dtype) == (expected.shape, expected.dtype)
    moved = jax.device_put((q, r), jax.devices()[1])
    assert mk.matmul(*moved).devices() == {jax.devices()[1]}


def test_the_program_multiplies_int8_and_adds_in_int32():
    q, r = mk.quantize(jnp.ones((4, 8))), mk.quantize(jnp.ones((8, 4)))
    text = matmul.lower(q, r, implementation="cpu").as_text()
    dots = [line for line in text.splitlines() if "dot_general" in line]
    assert len(dots) == 1
    assert "(tensor<4x8xi8>, tensor<8x4xi8>) -> tensor<4x4xi32>" in dots[0]


def test_a_named_implementation_never_falls_back():
    x, r = jnp.ones((3, 8), jnp.int32), mk.quantize(normal(8, 5), axis=0)
    product = partial(mk.matmul, x, r, preferred_element_type=jnp.float32)
    with pytest.raises(NotImplementedError, match=r"int32\[3,8\] by QTensor\(int8\[8,5\].*'xla'"):
        product(implementation="xla")
    np.testing.assert_array_equal(product(implementation=["xla", "reference"]), product())
    with pytest.raises(NotImplementedError, match="'xla': `lhs` is .*; 'xla': `lhs` is"):
        product(implementation=("xla", "xla"))
    for unknown in ("cuda", ("xla", "cuda"), ()):
        with pytest.raises(ValueError, match=r"unknown .*: known are \[.*'reference', .*'xla'\]"):
            mk.matmul(x, jnp.ones((8, 5)), implementation=unknown)
    message = r"must be a name, a sequence of names or None, got 3: known are \[.*'xla'\]"
    with pytest.raises(TypeError, match=message):
        mk.matmul(x, jnp.ones((8, 5)), implementation=3)
    with pytest.raises(ValueError, match=r"unknown `implementation` \[\['xla'\]\]: known are"):
        mk.matmul(x, r, implementation=[["xla"]])


ELSEWHERE = sorted(set(IMPLEMENTATIONS) - {"native", *HERE})


@pytest.mark.parametrize("name", ELSEWHERE)
@pytest.mark.parametrize(
    "transform", [lambda f: f, jax.jit, jax.vmap], ids=["eager", "jit", "vmap"]
)
def test_an_implementation_for_another_platform_says_so(name, transform):
    q, r = quantize_both(normal(2, 3, 8), normal(2, 8, 5), 2, 1)
    if name == "tpu":  # which takes matrices of these alone
        several = (2,) if transform is jax.vmap else ()
        q, w = normal(*several, 256, 256).astype(jnp.bfloat16), normal(*several, 256, 8)
        r = mk.quantize(w.astype(jnp.bfloat16), "int4", axis=-2, group_size=128)
    (platform,) = IMPLEMENTATIONS[name].platforms
    message = f"on cpu: '{name}' runs on {platform} only"
    if name == "tpu":
        message = "'tpu': the program is for several devices, for another platform or for export"
    product = transform(partial(mk.matmul, implementation=name))
    with pytest.raises(NotImplementedError, match=message):
        product(q, r)
    # A sequence goes on to the next.
    product = transform(partial(mk.matmul, implementation=(name, "xla")))
    expected = transform(partial(mk.matmul, implementation="xla"))(q, r)
    np.testing.assert_array_equal(product(q, r), expected)


def test_by_default_the_program_is_that_of_its_platform():
    # Traced for both and lowered on this machine, which has a CPU only.
    q, r = quantize_both(normal(3, 8), normal(8, 5), 1, 0)
    lowered = jax.jit(mk.matmul).trace(q, r).lower(lowering_platforms=("cuda",)).as_text()
    (dot,) = [line for line in lowered.splitlines() if "dot_general" in line]
    assert "contracting_dims = [2] x [2]" in dot  # as "gpu" stacks them


def test_dimension_numbers_are_checked():
    x, w = jnp.ones((3, 5)), mk.quantize(jnp.ones((4, 7)))
    message = r"`lhs` has shape \(3, 5\) but `rhs` has \(4, 7\): contracting 5 with 4"
    with pytest.raises(ValueError, match=message):
        mk.dot_general(x, w, MATRIX)
    with pytest.raises(ValueError, match="batching 3 with 4"):
        mk.dot_general(x, w, (((), ()), ((0,), (0,))))
    with pytest.raises(ValueError, match=r"asks for axes \(2,\) of `rhs` of shape \(4, 7\)"):
        mk.dot_general(x, w, (((1,), (2,)), ((), ())))
    with pytest.raises(ValueError, match=r"names an axis of `lhs` twice: \(1, 1\)"):
        mk.dot_general(x, w, (((1, -1), (0, 1)), ((), ())))
    with pytest.raises(ValueError, match="pairs a different number of axes"):
        mk.dot_general(x, w, (((1,), ()), ((), ())))


@pytest.mark.parametrize(
    "numbers",
    [((1,), (0,)), ((1, 0), ((), ())), (((1,), (0,)),), (((1.0,), (0,)), ((), ())), None, 1],
)
def test_dimension_numbers_of_another_structure_are_refused(numbers):
    message = (
        f"`dimension_numbers` is {numbers}: it must be ((lhs_contracting, rhs_contracting), "
        "(lhs_batch, rhs_batch)), each a sequence of ints, as in (((1,), (0,)), ((), ()))"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        mk.dot_general(jnp.ones((3, 5)), mk.quantize(jnp.ones((5, 7))), numbers)


@pytest.mark.parametrize("implementation", [None, *HERE])
def test_a_float_by_an_integer_never_gives_an_integer(implementation):
    x, w = jnp.ones((3, 8), jnp.bfloat16), jnp.ones((8, 5), jnp.int8)
    message = r"`lhs` is bfloat16\[3,8\] and `rhs` int8\[8,5\]: .* floating dtype, not int32"
    with pytest.raises(TypeError, match=message):
        mk.matmul(x, w, preferred_element_type=jnp.int32, implementation=implementation)
    q = mk.QTensor(w, jnp.ones((1, 5), jnp.float32), np.dtype("float32"))
    with pytest.raises(TypeError, match="has a floating dtype, not int32"):
        mk.matmul(x, q, preferred_element_type=jnp.int32, implementation=implementation)
    result = mk.matmul(w.T, w, preferred_element_type=jnp.int32)
    np.testing.assert_array_equal(result, np.full((5, 5), 8))


@pytest.mark.parametrize("implementation", HERE)
def test_a_product_of_two_qtensors_has_no_derivative(implementation):
    q, r = mk.quantize(jnp.ones((3, 8)), axis=1), mk.quantize(jnp.ones((8, 5)), axis=0)

    def loss(scale, bias):
        product = mk.matmul(mk.QTensor(q.values, scale, q.dtype), r, implementation=implementation)
        return jnp.sum(product * bias)

    with pytest.raises(NotImplementedError, match="the product of two QTensors has no derivative"):
        jax.grad(loss)(q.scale, 2.0)
    for transform in (lambda f: f, jax.jit, jax.checkpoint):
        np.testing.assert_allclose(transform(jax.grad(loss, argnums=1))(q.scale, 2.0), 3 * 8 * 5)
