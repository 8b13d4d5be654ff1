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


# Those that NumPy itself does not take, in its words.
NUMPY = {"...i->i": "yzi->i", "...ij,jk->ik": "zij,jk->ik", "*1,1Z": "ab,bz->az"}


def random_qtensor(rng: np.random.Generator, shape: tuple[int, ...]) -> mk.QTensor:
    """int8 with a scale for the last axis, without compiling anything."""
    values = rng.integers(-127, 128, shape).astype(np.int8)
    scale = rng.uniform(0.01, 0.02, [max(n, 1) for n in shape[:-1]] + [1][: len(shape)])
    return mk.QTensor(values, scale.astype(np.float32), np.dtype("float32"))


def bound(equation: str, arrays: list[np.ndarray]) -> np.ndarray:
    """How far a float32 einsum, in any order, can be from the exact one.

    Of n operands a result is a sum of at most `terms` products: n dequantized factors, n - 1
    products, and in the sums of a path, together, no more roundings than there are terms. Those
    add up to first order; twice that covers what is quadratic.
    """
    terms = np.einsum(equation, *(np.ones(a.shape) for a in arrays))
    magnitude = np.einsum(equation, *map(np.abs, arrays))
    return 2 * (2 * len(arrays) + terms) * U * magnitude


@pytest.mark.parametrize(("equation", "shapes"), [(e, s) for e, *s in [*PRODUCTS, *EQUATIONS]])
def test_einsum_takes_what_jnp_einsum_takes(equation, shapes):
    rng = np.random.default_rng(0)
    quantized = [random_qtensor(rng, shape) for shape in shapes]
    values = [exact(q) for q in quantized]
    arrays = [v.astype(np.float32) for v in values]  # NumPy's, so that nothing else is compiled
    mixed = [a if i % 2 else q for i, (q, a) in enumerate(zip(quantized, arrays, strict=True))]
    call = functools.partial(mk.einsum, equation, precision="highest")
    results = jax.jit(lambda *each: [call(*operands) for operands in each])(quantized, mixed)
    like = jax.eval_shape(functools.partial(jnp.einsum, equation), *arrays)
    numpy_equation = NUMPY.get(equation, equation)
    expected = np.einsum(numpy_equation, *values)
    for result in results:
        assert (result.shape, result.dtype) == (like.shape, like.dtype)
        assert (np.abs(np.asarray(result) - expected) <= bound(numpy_equation, values)).all()
    if (equation, *shapes) in PRODUCTS:  # the sum is exact; three roundings follow it
        result = jax.jit(functools.partial(mk.einsum, equation, implementation="xla"))(
            *(mk.QTensor(q.values, q.scale[(slice(1),) * q.ndim], q.dtype) for q in quantized)
        )
        integers = np.einsum(equation, *(np.asarray(q.values, np.int64) for q in quantized))
        scales = [q.scale.ravel()[0] for q in quantized]
        np.testing.assert_allclose(result, integers * np.prod(np.float64(scales)), rtol=4 * U)


def test_plain_arrays_go_to_jnp_einsum():
    for equation, *shapes in [PRODUCTS[0], EQUATIONS[0], EQUATIONS[-1]]:
        arrays = [normal(*shape).astype(jnp.bfloat16) for shape in shapes]
        result = mk.einsum(equation, *arrays, preferred_element_type=jnp.float32)
        expected = jnp.einsum(equation, *arrays, preferred_element_type=jnp.float32)
        assert result.dtype == expected.dtype
        np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize(
    "optimize", [True, False, "greedy", [(1, 2), (0, 1)], [(0,), (0, 1), (0, 1)]]
)
def test_einsum_contracts_in_the_order_asked_for(optimize):
    arrays = [normal(3, 40), normal(40, 5), normal(5, 2)]
    q = [quantize(a, axis=0) for a in arrays]
    values = [exact(a) for a in q]
    result = mk.einsum("ij,jk,kl->il", *q, optimize=optimize)
    limit = bound("ij,jk,kl->il", values)
    assert (np.abs(result - np.linalg.multi_dot(values)) <= limit).all()


def dots(function, *operands) -> list[str]:
    text = jax.jit(function).lower(*operands).as_text()
    return [line for line in text.splitlines() if "dot_general" in line]


def test_the_path_is_followed_and_its_intermediates_have_the_dtype_of_the_result():
    x, v, w = (a.astype(jnp.bfloat16) for a in (normal(3, 40), normal(40, 5), normal(5, 2)))
    q, r = quantize(x, axis=1), quantize(v)
    first, second = dots(
        functools.partial(
            mk.einsum, "ij,jk,kl->il", optimize=[(0, 1), (0, 1)], implementation="xla"
        ),
        *(q, r, w),
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
            implementation="xla",
        ),
        *(x, r, w),
    )
    assert "-> tensor<40x2xf32>" in first and "-> tensor<3x2xf32>" in second
    assert "HIGHEST" in first and "HIGHEST" in second


def test_a_diagonal_of_a_qtensor_stays_quantized_and_exact():
    x = normal(4, 4, 3)
    w = normal(3, 5)
    r = quantize(w, axis=0)
    cases = [
        ("int8", None, None, True),
        ("int4", 2, None, True),
        ("int8", (0, 2), None, True),
        ("int4", (0, 1, 2), (2, 2, 3), True),
        ("float8_e4m3fn", (1, 2), (2, 3), True),
        ("int8", 1, None, False),
    ]

    @jax.jit
    def diagonals(x):
        found = []
        for name, axis, group, symmetric in cases:
            q = mk.quantize(x, name, axis=axis, group_size=group, symmetric=symmetric)
            for each in (q, mk.contiguous(q, (1, 0))):
                found.append((mk.dequantize(q), mk.einsum("iij->ij", each)))
        return found

    for full, result in diagonals(x):
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
    flipped = mk.einsum("ij,jk->ki", q, r)
    np.testing.assert_array_equal(mk.einsum(q, "ab", r, ["b", "c"], ["c", "a"]), flipped)
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
    with pytest.raises(TypeError, match="`lhs` is int8.3,4. and `rhs` bfloat16.* not int32"):
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
    q = quantize(x, axis=1)
    with pytest.raises(NotImplementedError, match="product of two QTensors has no derivative"):
        jax.grad(lambda s: mk.einsum("ij,jk->ik", q, mk.QTensor(r.values, s, r.dtype)).sum())(
            r.scale
        )


def test_batch_axes():
    assert mk.batch_axes("...k,kn->...n", 3, 2) == ((), ())
    assert mk.batch_axes("bqhd,bkhd->bhqk", 4, 4) == ((0, 2), (0, 2))
    assert mk.batch_axes("ebd,dek->ebk", 3, 3) == ((0,), (1,))


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
        ("ii,ik->k", ValueError, r"'ii' takes a diagonal of axes of sizes 3 and 4 of operand 0"),
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
            mk.matmul(jnp.ones(a), random_qtensor(np.random.default_rng(0), b))
