"""What the real NVIDIA compiler makes of quantized products. It needs its wheels but no GPU.

The target is an H200, by the description in `tests/data`. What is asserted is that 8-bit operands
reach the matrix product, and that nothing as large as a weight is transposed or widened before it.
"""

import re
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from gpu_helpers import h200_compiler, multiplied

import mpjax_kernels as mk

pytestmark = [pytest.mark.gpu_compile, pytest.mark.usefixtures("strict_promotion")]

E4M3, E5M2 = "float8_e4m3fn", "float8_e5m2"
ROWS, TERMS, COLUMNS = 512, 2048, 1024
MATRIX = (((1,), (0,)), ((), ()))


@pytest.fixture(scope="module")
def compiled():
    return h200_compiler()


def abstract(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


def quantized(shape, format, axis, *, last=None):
    def make(x):
        q = mk.quantize(x, format, axis=axis)
        return q if last is None else mk.contiguous(q, last)

    return jax.eval_shape(make, abstract(*shape))


def entry(text):
    """The instructions that run one after the other: each writes its result to memory."""
    return text[text.index("ENTRY") :]


def written(text, columns=COLUMNS, terms=TERMS):
    """The dtypes in which something of the shape of the weight is written to memory."""
    shape = rf"\[(?:{terms},{columns}|{columns},{terms})\]"
    lines = [line for line in entry(text).splitlines() if "parameter(" not in line]
    free = ("bitcast", "get-tuple-element")
    found = [re.search(rf"= (\w+){shape}\S* ([\w-]+)\(", line) for line in lines]
    return [m[1] for m in found if m and m[2] not in free]


@pytest.mark.parametrize("implementation", [None, "gpu", "xla"])
@pytest.mark.parametrize("last", [None, 0])
@pytest.mark.parametrize(
    ("left", "right", "names"),
    [
        ("int8", "int8", ("s8", "s8")),
        (E4M3, E4M3, ("f8e4m3fn", "f8e4m3fn")),
        (E5M2, E4M3, ("f8e5m2", "f8e4m3fn")),
    ],
)
def test_eight_bits_reach_the_product_and_no_weight_is_copied(
    compiled, implementation, last, left, right, names
):
    x = quantized((ROWS, TERMS), left, 1)
    w = quantized((TERMS, COLUMNS), right, 0, last=last)
    text = compiled(partial(mk.matmul, implementation=implementation), x, w)
    assert multiplied(text) == [names]
    assert written(text) == []


def test_the_checks_see_a_dequantized_and_a_transposed_weight(compiled):
    x, w = abstract(ROWS, TERMS), quantized((TERMS, COLUMNS), E4M3, 0)
    text = compiled(lambda x, w: mk.matmul(x, mk.dequantize(w)), x, w)
    assert multiplied(text) != [("f8e4m3fn", "f8e4m3fn")]
    text = compiled(lambda w: jax.lax.optimization_barrier(mk.dequantize(w)) + 1, w)
    assert "bf16" in written(text)


def test_several_axes_become_one_of_each_kind(compiled):
    x = quantized((4, ROWS // 4, TERMS), E4M3, 2)
    w = quantized((TERMS, 16, COLUMNS // 16), E4M3, 0, last=0)
    dims = (((2,), (0,)), ((), ()))
    text = compiled(partial(mk.dot_general, dimension_numbers=dims, implementation="gpu"), x, w)
    assert multiplied(text) == [("f8e4m3fn", "f8e4m3fn")]
    assert written(text) == []


def test_training_multiplies_e4m3_forward_and_e5m2_backward(compiled):
    formats = mk.DotFormats.float8()

    def loss(x, w):
        out, _ = mk.quantized_dot_general(x, w, MATRIX, formats)
        return jnp.sum(out.astype(jnp.float32) ** 2)

    text = compiled(jax.grad(loss, argnums=(0, 1)), abstract(ROWS, TERMS), abstract(TERMS, COLUMNS))
    e4m3, e5m2 = "f8e4m3fn", "f8e5m2"
    assert multiplied(text) == sorted([(e4m3, e4m3), (e5m2, e4m3), (e4m3, e5m2)])


def test_what_is_quantized_and_dequantized_in_one_program_is_rounded(compiled):
    text = compiled(lambda x: mk.dequantize(mk.quantize(x, E4M3, axis=1)), abstract(ROWS, TERMS))
    assert "f8e4m3fn" in entry(text)
    text = compiled(lambda x: x.astype(jnp.dtype(E4M3)).astype(x.dtype) + 1, abstract(ROWS, TERMS))
    assert "f8e4m3fn" not in text  # which shows that XLA would leave it out
