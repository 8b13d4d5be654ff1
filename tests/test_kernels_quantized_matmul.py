"""quantized_matmul: quantize and matmul in one call."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mpjax_kernels as mk
from tests.kernels_helpers import normal, quantize

pytestmark = pytest.mark.usefixtures("strict_promotion")

run = jax.jit(
    mk.quantized_matmul, static_argnames=("format", "preferred_element_type", "implementation")
)


@pytest.mark.parametrize("implementation", [None, "xla", "reference"])
def test_it_is_quantize_and_matmul(implementation):
    x, r = normal(2, 3, 37), quantize(normal(37, 5), axis=0)

    @jax.jit
    def expected(x, r):
        return mk.matmul(mk.quantize(x, axis=-1), r, implementation=implementation)

    # The integer sums are exact; those of the reference depend on the order XLA takes.
    tolerance = 1e-5 if implementation == "reference" else 0
    result = run(x, r, implementation=implementation)
    for same in (expected(x, r), run(x, mk.contiguous(r, axis=0), implementation=implementation)):
        np.testing.assert_allclose(same, result, rtol=tolerance, atol=tolerance)
    row = run(x[0, 0], r, implementation=implementation)
    np.testing.assert_allclose(row, result[0, 0], rtol=1e-5, atol=1e-5)


def test_formats_and_the_result_dtype():
    x, w = normal(3, 16).astype(jnp.bfloat16), normal(16, 5).astype(jnp.bfloat16)
    r = quantize(w, "float8_e4m3fn", axis=0)
    result = run(x, r, "float8_e4m3fn")
    assert result.dtype == jnp.bfloat16
    wide = run(x, r, mk.float8_e4m3fn, preferred_element_type=jnp.float32)
    assert wide.dtype == jnp.float32
    np.testing.assert_array_equal(wide.astype(jnp.bfloat16), result)
    q = quantize(x, "float8_e4m3fn", axis=1)
    expected = np.asarray(mk.dequantize(q, jnp.float32)) @ np.asarray(mk.dequantize(r, jnp.float32))
    np.testing.assert_allclose(wide, expected, rtol=1e-5, atol=1e-5)


def test_what_it_refuses():
    x, r = jnp.ones((3, 8)), mk.quantize(jnp.ones((8, 5)), axis=0)
    with pytest.raises(TypeError, match=r"`w` must be a QTensor, got float32\[8,5\]"):
        mk.quantized_matmul(x, jnp.ones((8, 5)))
    with pytest.raises(TypeError, match="`x` must have a floating dtype .*, got int32"):
        mk.quantized_matmul(jnp.ones((3, 8), jnp.int32), r)
    with pytest.raises(TypeError, match="has a floating dtype, not int32"):
        mk.quantized_matmul(x, r, preferred_element_type=jnp.int32)
    with pytest.raises(ValueError, match=r"they must be \[..., K\] and \[K, N\]"):
        mk.quantized_matmul(x, mk.quantize(jnp.ones((2, 8, 5))))
    with pytest.raises(ValueError, match="contracting 7 with 8"):
        mk.quantized_matmul(jnp.ones((3, 7)), r)
    with pytest.raises(ValueError, match="unknown `format` 'int9'"):
        mk.quantized_matmul(x, r, "int9")
    with pytest.raises(ValueError, match="unknown `implementation` 'cuda'"):
        mk.quantized_matmul(x, r, implementation="cuda")


@pytest.mark.parametrize("implementation", [None, "xla"])
def test_it_has_no_derivative(implementation):
    r = mk.quantize(jnp.ones((8, 5)), axis=0)

    def loss(x):
        return jnp.sum(mk.quantized_matmul(x, r, implementation=implementation))

    with pytest.raises(NotImplementedError, match="quantized_matmul has no derivative"):
        jax.grad(loss)(jnp.ones((3, 8)))
