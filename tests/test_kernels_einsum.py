"""einsum and matmul: every equation that jnp.einsum takes, against it, and those they refuse."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mpjax_kernels as mk
from tests.kernels_helpers import U, exact, matmul, normal, quantize, quantize_both

pytestmark = pytest.mark.usefixtures("strict_promotion")

# Two operands and one dot_general, with the scales per tensor: what "xla" takes.
PRODUCTS = [
    ("ij,jk->ik", (3, 4), (4, 5)),
    ("ij,jk", (3, 4), (4, 5)),
    ("zj,ja", (3, 4), (4, 5)),
    ("ij,kj->ki", (3, 4), (5, 4)),
    ("bqhd, bkhd -> bhqk", (2, 3, 4, 5), (2, 6, 4, 5)),
    ("...i,ij->...j", (2, 3, 4), (4, 5)),
    ("...i,ij", (2, 3, 4), (4, 5)),
    ("ij,...j->...i", (3, 4), (2, 5, 4)),
    ("...ij,...jk->...ik", (2, 1, 3, 4), (6, 4, 5)),
    ("a...,a...->...", (3, 2, 4), (3, 2, 4)),
    ("i,i->", (4,), (4,)),
    ("i,j->ji", (4,), (3,)),
    ("...,...->...", (4,), (4,)),
    ("i,jk", (4,), (3, 2)),
    (",ij->ji", (), (3, 4)),
    ("jk,jl->jlk", (3, 4), (3, 5)),
    ("ii,ij->j", (4, 4), (4, 5)),
    ("iji,j->ij", (3, 4, 3), (4,)),
]

# What needs more: any number of operands, sums, axes of size 1.
EQUATIONS = [
    ("ij->ji", (3, 4)),
    ("ji", (3, 4)),
    ("ij", (3, 4)),
    ("ij->", (3, 4)),
    ("ij->i", (3, 4)),
    ("...j->...", (2, 3, 4)),
    ("...i->i", (2, 3, 4)),
    ("ii", (4, 4)),
    ("ii->i", (4, 4)),
    ("iii->i", (3, 3, 3)),
    ("iij->j", (3, 3, 2)),
    ("jiki->ik", (2, 3, 4, 3)),
    ("ijij->ji", (2, 3, 2, 3)),
    ("...ii->...i", (2, 4, 4)),
    ("i...i", (3, 2, 3)),
    ("i j -> j i", (3, 4)),
    ("->", ()),
    ("ijz,jk->ik", (3, 4, 2), (4, 5)),
    ("ij,jk->k", (3, 4), (4, 5)),
    ("ij,kl->", (3, 4), (2, 5)),
    ("ij,jk", (3, 4), (1, 5)),
    ("ij,jk->ijk", (3, 1), (4, 5)),
    ("bij,bjk->bik", (1, 3, 4), (2, 4, 5)),
    ("...ij,ij->...", (2, 3, 4), (1, 4)),
    ("...ij,jk->ik", (2, 3, 4), (4, 5)),
    ("ii,ii->", (4, 4), (4, 4)),
    ("*1,1Z", (3, 4), (4, 2)),
    ("ij,jk", (3, 0), (0, 2)),
    ("ij,jk", (3, 1), (0, 2)),
    ("ij,jk,kl->il", (3, 4), (4, 5), (5, 2)),
    ("ij,jk,kl,lm", (2, 2), (2, 3), (3, 2), (2, 3)),
    ("i,i,i->i", (4,), (4,), (4,)),
    ("i,i,i", (4,), (4,), (4,)),
    ("ab,cd,ef->", (2, 3), (3, 2), (4,) * 2),
    ("...i,ij,j...->...", (2, 3), (3, 4), (4, 2)),
    ("bij,jk,bk->bi", (2, 3, 4), (4, 5), (1, 5)),
    ("...a,...b,...c->...abc", (2, 3), (2, 4), (1, 2)),
    ("aab,bc,ccd->ad", (3, 3, 2), (2, 4), (4, 4, 5)),
    ("ij,ij,jk->k", (3, 4), (3, 4), (4, 2)),
]


@pytest.mark.parametrize(("equation", "lhs_shape", "rhs_shape"), PRODUCTS)
def test_einsum_agrees_with_numpy(equation, lhs_shape, rhs_shape):
    x, w = normal(*lhs_shape), normal(*rhs_shape)
    q, r = quantize_both(x, w)
    result = jax.jit(lambda q, r: mk.einsum(equation, q, r, implementation="xla"))(q, r)
    expected = np.einsum(equation, exact(q), exact(r))
    np.testing.assert_allclose(result, expected, rtol=4 * U, atol=0)
    magnitude = np.einsum(equation, np.abs(x), np.abs(w))
    plain = jax.jit(lambda x, w: mk.einsum(equation, x, w, precision="highest"))(x, w)
    difference = np.abs(plain - np.einsum(equation, np.asarray(x), np.asarray(w)))
    assert (difference <= 2 * x.size * U * magnitude).all()


def bound(equation: str, arrays: list[np.ndarray]) -> np.ndarray:
    """How far a float32 einsum, in any order, can be from the exact one.

    Of n operands a result is a sum of at most `terms` products: n dequantized factors, n - 1
    products, and in the sums of a path, together, no more roundings than there are terms. Those
    add up to first order; twice that covers what is quadratic.
    """
    magnitudes = [np.abs(a) for a in arrays]
    terms = jnp.einsum(equation, *(np.ones(a.shape, np.float32) for a in arrays))
    size = jnp.einsum(equation, *magnitudes, precision="highest")
    return 2 * (2 * len(arrays) + np.asarray(terms)) * U * np.asarray(size)


@pytest.mark.parametrize(("equation", "shapes"), [(e, s) for e, *s in [*PRODUCTS, *EQUATIONS]])
def test_einsum_takes_what_jnp_einsum_takes(equation, shapes):
    arrays = [normal(*shape) + 0.1 * i for i, shape in enumerate(shapes)]
    quantized = [quantize(a, axis=a.ndim - 1 if a.ndim else None) for a in arrays]
    values = [np.asarray(exact(q), np.float32) for q in quantized]
    expected = jnp.einsum(equation, *values, precision="highest")
    call = jax.jit(functools.partial(mk.einsum, equation))
    # All quantized, and every second one.
    mixed = [v if i % 2 else q for i, (q, v) in enumerate(zip(quantized, values, strict=True))]
    for operands in (quantized, mixed):
        result = call(*operands)
        assert (result.shape, result.dtype) == (expected.shape, expected.dtype)
        assert (np.abs(result - expected) <= bound(equation, values)).all()


@pytest.mark.parametrize(
    "optimize", [True, False, "greedy", [(1, 2), (0, 1)], [(0,), (0, 1), (0, 1)]]
)
def test_einsum_contracts_in_the_order_asked_for(optimize):
    arrays = [normal(3, 40), normal(40, 5), normal(5, 2)]
    q = [quantize(a, axis=0) for a in arrays]
    values = [exact(a) for a in q]
    result = mk.einsum("ij,jk,kl->il", *q, optimize=optimize)
    limit = bound("ij,jk,kl->il", [np.float32(v) for v in values])
    assert (np.abs(result - np.linalg.multi_dot(values)) <= limit).all()


def dots(function, *operands) -> list[str]:
    text = jax.jit(function).lower(*operands).as_text()
    return [line for line in text.splitlines() if "dot_general" in line]


def test_the_path_is_followed_and_its_intermediates_have_the_dtype_of_the_result():
    x, v, w = (a.astype(jnp.bfloat16) for a in (normal(3, 40), normal(40, 5), normal(5, 2)))
    q, r = quantize(x, axis=1), quantize(v, axis=0)
    first, second = dots(
        functools.partial(mk.einsum, "ij,jk,kl->il", optimize=[(0, 1), (0, 1)]), q, r, w
    )
    assert "(tensor<3x40xi8>, tensor<40x5xi8>) -> tensor<3x5xi32>" in first
    assert "bf16>, tensor<5x2xbf16>) -> tensor<" in second
    first, second = dots(
        functools.partial(
            mk.einsum,
            "ij,jk,kl->il",
            optimize=[(1, 2), (0, 1)],
            preferred_element_type=jnp.float32,
            precision="highest",
        ),
        *(x, r, w),
    )
    assert "(tensor<40x5xbf16>, tensor<5x2xbf16>) -> tensor<40x2xf32>" in first
    assert second.count("xf32>") == 3 or "bf16" in second
    assert "HIGHEST" in first and "HIGHEST" in second


def test_a_diagonal_of_a_qtensor_stays_quantized_and_exact():
    x = normal(4, 4, 3)
    w = normal(3, 5)
    r = quantize(w, axis=0)
    for axis, group in [
        (None, None),
        (2, None),
        ((0, 2), None),
        ((0, 1, 2), (2, 2, 3)),
        ((1, 2), (2, 3)),
    ]:
        for name in ("int8", "int4", "float8_e4m3fn"):
            q = quantize(x, name, axis=axis, group_size=group)
            full = np.asarray(mk.dequantize(q))
            result = mk.einsum("iij->ij", q)
            np.testing.assert_array_equal(result, np.einsum("iij->ij", full))
    q = quantize(x, axis=2)
    (line,) = dots(functools.partial(mk.einsum, "iij,jk->ik", implementation="xla"), q, r)
    assert "(tensor<4x3xi8>, tensor<3x5xi8>) -> tensor<4x5xi32>" in line


def test_lists_of_labels():
    x, w = normal(3, 4), normal(4, 5)
    q, r = quantize_both(x, w, 1, 0)
    expected = mk.einsum("ij,jk->ik", q, r)
    np.testing.assert_array_equal(mk.einsum(q, [0, 1], r, [1, 2], [0, 2]), expected)
    np.testing.assert_array_equal(mk.einsum(q, [0, 1], r, (1, 2)), expected)
    np.testing.assert_array_equal(mk.einsum(q, ["a", "b"], r, ["b", "c"], ["c", "a"]), expected.T)
    np.testing.assert_array_equal(mk.einsum(q, [..., 0], r, [0, 1], [..., 1]), expected)
    np.testing.assert_array_equal(
        mk.einsum(x, [0, 1], w, [1, 2], [2, 0]), jnp.einsum(x, [0, 1], w, [1, 2], [2, 0])
    )
    with pytest.raises(
        ValueError, match=r"`equation` \(\[0, 1\], .*: 7 is in the output but in no"
    ):
        mk.einsum(q, [0, 1], r, [1, 2], [0, 7])


def test_an_axis_of_one_operand_alone_is_summed():
    x, w = normal(3, 4, 2), normal(4, 5)
    r = quantize(w)
    result = mk.einsum("ijz,jk->ik", x, r)
    np.testing.assert_array_equal(result, mk.matmul(x.sum(2), r))
    q = quantize(x, axis=(1, 2))
    result = mk.einsum("ijz,jk->ik", q, r)
    np.testing.assert_array_equal(result, mk.matmul(mk.dequantize(q).sum(2), r))
    # In bfloat16 a sum of 4096 ones would stop at 256; an array is widened to the result's dtype.
    ones = jnp.ones((4096, 2), jnp.bfloat16)
    s = quantize(jnp.ones((2,), jnp.bfloat16))
    result = mk.einsum("ij,j->", ones, s, preferred_element_type=jnp.float32)
    np.testing.assert_allclose(result, 8192, rtol=4 * U)


def test_the_dtype_of_the_result_is_that_of_jnp_einsum():
    x = normal(3, 4).astype(jnp.bfloat16)
    q = quantize(x, axis=1)
    for result in (
        mk.einsum("ij->ji", q),
        mk.einsum("ij,kj->ik", q, x),
        mk.einsum(",ij->ij", 2.0, q),  # a Python number takes the dtype of the others
        mk.einsum("ij,ij,ij->i", q, x, q),
    ):
        assert result.dtype == jnp.bfloat16
    for operands in ((q,), (q, x), (q, x, q)):
        equation = ",".join(["ij"] * len(operands)) + "->i"
        result = mk.einsum(equation, *operands, preferred_element_type=jnp.float16)
        assert result.dtype == jnp.float16
        with pytest.raises(TypeError, match="has a floating dtype, not int32"):
            mk.einsum(equation, *operands, preferred_element_type=jnp.int32)
    y = jnp.ones((3, 4), jnp.int8)
    with pytest.raises(TypeError, match="`lhs` is bfloat16.3,4. and `rhs` int8.* not int32"):
        mk.einsum("ij,ij,ij->", y, x, y, preferred_element_type=jnp.int32)
    assert mk.einsum("ij,ij,ij->", y, y, y, preferred_element_type=jnp.int32) == 12


def test_einsum_is_differentiable_in_its_arrays():
    x, w, v = normal(3, 4), normal(4, 5), normal(5, 2)
    r = quantize(w, axis=0)

    def loss(x, v, weight):
        return mk.einsum("ij,jk,kl->", x, weight, v, precision="highest")

    got = jax.grad(loss, argnums=(0, 1))(x, v, r)
    expected = jax.grad(loss, argnums=(0, 1))(x, v, mk.dequantize(r))
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    with pytest.raises(NotImplementedError, match="no derivative"):
        jax.grad(lambda s: mk.einsum("ij,jk->", quantize(x), mk.QTensor(r.values, s, r.dtype)))(
            r.scale
        )


def test_contracting_axes():
    assert mk.contracting_axes("...k,kn->...n", 3, 2) == ((2,), (0,))
    assert mk.contracting_axes("bqhd,bkhd->bhqk", 4, 4) == ((3,), (3,))
    assert mk.contracting_axes("abc,cb", 3, 2) == ((1, 2), (1, 0))
    assert mk.contracting_axes("ijz,kj->ik", 3, 2) == ((1,), (1,))  # z is summed, not contracted
    assert mk.contracting_axes("iij,jik->k", 3, 3) == ((0, 1, 2), (1, 0))
    with pytest.raises(ValueError, match="Number of einsum subscripts, 1"):
        mk.contracting_axes("ij->ji", 2, 2)


@pytest.mark.parametrize(
    ("equation", "error", "message"),
    [
        ("ij->ji", ValueError, "subscripts, 1, must be equal to the number of operands, 2"),
        ("ijk,jk->i", ValueError, "'ijk' does not describe 2 axes: operand 0 has shape"),
        ("i,jk->k", ValueError, "'i' does not describe 2 axes"),
        ("ij,jk->iz", ValueError, "Output character 'z' did not appear in the input"),
        ("ij,jk->ii", ValueError, "Output character 'i' appeared more than once"),
        ("ij,jk->i->k", ValueError, "can only contain one '->'"),
        ("..j,jk->k", ValueError, "Invalid Ellipses"),
        ("ii,ik->k", ValueError, r"'ii' takes a diagonal of axes of sizes 4 and 3 of operand 0"),
        ("ij,ki->jk", ValueError, r"operand 0 has shape \(3, 4\) .* 'i' is 3 in one and 5 in the"),
    ],
)
def test_einsum_refusals(equation, error, message):
    for implementation in (None, "xla"):
        with pytest.raises(error, match=message) as caught:
            mk.einsum(
                equation,
                mk.quantize(jnp.ones((3, 4))),
                mk.quantize(jnp.ones((4, 5))),
                implementation=implementation,
            )
        assert f"`equation` {equation!r}" in str(caught.value)


def test_einsum_refuses_paths_and_names_that_make_no_sense():
    q = [mk.quantize(jnp.ones((2, 2)))] * 3
    with pytest.raises(NotImplementedError, match="more than two operands at once"):
        mk.einsum("ij,jk,kl", *q, optimize=[(0, 1, 2)])
    with pytest.raises(ValueError, match="does not make one of the 3 operands of .*ij,jk,kl"):
        mk.einsum("ij,jk,kl", *q, optimize=[(0, 1)])
    with pytest.raises(KeyError, match="'gredy' not found"):
        mk.einsum("ij,jk,kl", *q, optimize="gredy")
    with pytest.raises(ValueError, match="`equation` 'ij' needs an operand at least"):
        mk.einsum("ij")
    for operands in (q[:1], [jnp.ones((2, 2))]):
        with pytest.raises(ValueError, match="unknown `implementation` 'xlaa'"):
            mk.einsum("ij", *operands, implementation="xlaa")


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ((4,), (4,)),
        ((4,), (4, 5)),
        ((3, 4), (4,)),
        ((3, 4), (4, 5)),
        ((2, 3, 4), (4, 5)),
        ((3, 4), (2, 4, 5)),
        ((2, 1, 3, 4), (7, 4, 5)),
        ((4,), (2, 4, 5)),
        ((2, 3, 4), (4,)),
    ],
)
def test_matmul_has_the_shapes_of_numpy(a, b):
    rng = np.random.default_rng(0)
    x, w = (rng.integers(-127, 128, shape).astype(np.float32) for shape in (a, b))
    x.flat[0], w.flat[0] = 127, 127  # so that the scale is 1 and the product exact
    q, r = quantize_both(x, w)
    np.testing.assert_array_equal(matmul(q, r, implementation="xla"), np.matmul(x, w))
    np.testing.assert_array_equal(matmul(x, r), np.matmul(x, w))


def test_matmul_refuses_what_numpy_refuses():
    with pytest.raises(ValueError, match="`a` has 0 and `b` has 1"):
        mk.matmul(jnp.ones(()), jnp.ones(3))
    for a, b in (((3, 4), (5, 2)), ((3, 1), (4, 5)), ((3, 4), (1, 5)), ((4,), (1,))):
        message = rf"`a` has shape \{a} but `b` has \{b}: contracting {a[-1]} with {b[0]}"
        with pytest.raises(ValueError, match=message.replace(")", r"\)")):
            mk.matmul(jnp.ones(a), mk.quantize(jnp.ones(b)))
