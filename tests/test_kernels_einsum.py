"""einsum and matmul: every equation they take, against NumPy, and those they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mpjax_kernels as mk
from tests.kernels_helpers import U, exact, matmul, normal, quantize_both

pytestmark = pytest.mark.usefixtures("strict_promotion")

EQUATIONS = [
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
]


@pytest.mark.parametrize(("equation", "lhs_shape", "rhs_shape"), EQUATIONS)
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


def test_einsum_sums_an_unused_axis_of_an_array_but_not_of_a_qtensor():
    x, w = normal(3, 4, 2), normal(4, 5)
    r = mk.quantize(w)
    result = mk.einsum("ijz,jk->ik", x, r)
    np.testing.assert_array_equal(result, mk.matmul(x.sum(2), r))
    with pytest.raises(NotImplementedError, match=r"sums axes \(2,\) of QTensor\(int8\[3,4,2\]"):
        mk.einsum("ijz,jk->ik", mk.quantize(x), r)


@pytest.mark.parametrize(
    ("equation", "error", "message"),
    [
        ("ij->ji", ValueError, "must have two operands, it has 1"),
        ("ijk,jk->i", ValueError, "'ijk' does not describe 2 axes"),
        ("i,jk->k", ValueError, "'i' does not describe 2 axes"),
        ("i1,jk->k", ValueError, "something that is no label in 'i1'"),
        ("ij,jk->iz", ValueError, "the output must hold labels of the operands, each once"),
        ("ij,jk->ii", ValueError, "the output must hold labels of the operands, each once"),
        ("...j,jk->k", ValueError, "and an ellipsis if they have one"),
        ("ii,ik->k", NotImplementedError, "'ii' takes a diagonal"),
        ("ij,ki->jk", ValueError, "contracting 3 with 5"),
    ],
)
def test_einsum_refusals(equation, error, message):
    with pytest.raises(error, match=message):
        mk.einsum(equation, mk.quantize(jnp.ones((3, 4))), mk.quantize(jnp.ones((4, 5))))


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
    with pytest.raises(ValueError, match="`a` has 0 and `b` has 1"):
        mk.matmul(jnp.ones(()), jnp.ones(3))
