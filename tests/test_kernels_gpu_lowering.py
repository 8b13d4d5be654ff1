"""What is given to XLA for NVIDIA GPUs where its own program is wrong there; lowered on any CPU.

Each of these was seen on an H200 with JAX 0.11.2. The numbers are computed on this CPU, by the
functions that run there.
"""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import mpjax_kernels as mk
from mpjax_kernels._conv_gpu import int8_sums
from mpjax_kernels._convolution import convolution
from tests.kernels_helpers import normal, quantize

pytestmark = pytest.mark.usefixtures("strict_promotion")

NHWC = ("NHWC", "HWIO", "NHWC")


def lowered(function, *operands) -> str:
    return jax.jit(function).trace(*operands).lower(lowering_platforms=("cuda",)).as_text()


def lines(text: str, operation: str) -> list[str]:
    return [line for line in text.splitlines() if f"stablehlo.{operation}" in line]


@pytest.mark.parametrize("format", ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz"])
def test_float8_is_not_taken_for_excess_precision(format):
    text = lowered(lambda x: mk.dequantize(mk.quantize(x, format, axis=1)), normal(4, 8))
    short = {"float8_e4m3fn": "f8E4M3FN", "float8_e5m2": "f8E5M2"}.get(format, "f8E4M3FNUZ")
    (barrier,) = lines(text, "optimization_barrier")
    assert f"tensor<4x8x{short}>" in barrier or f"tensor<4x1x8x{short}>" in barrier


@pytest.mark.parametrize("implementation", ["gpu", "xla"])
@pytest.mark.parametrize(
    ("format", "kind", "terms", "whole"),
    [
        ("int8", "i8", 8, 32),
        ("int8", "i8", 33, 64),
        ("float8_e4m3fn", "f8E4M3FN", 11, 32),
        ("float8_e4m3fn", "f8E4M3FN", 64, 64),
    ],
)
def test_tensor_cores_get_a_multiple_of_32_terms(implementation, format, kind, terms, whole):
    x, w = quantize(normal(4, terms), format, axis=1), quantize(normal(terms, 6), format, axis=0)
    (dot,) = lines(lowered(partial(mk.matmul, implementation=implementation), x, w), "dot_general")
    sizes = "1x4x{0}x{1}>, tensor<1x6x{0}x{1}" if implementation == "gpu" else "4x{0}x{1}>"
    assert f"(tensor<{sizes.format(whole, kind)}" in dot


def test_several_contracting_axes_get_no_more_zeros_than_they_need():
    x, w = quantize(normal(3, 4, 5), axis=(1, 2)), quantize(normal(4, 5, 6), axis=(0, 1))
    dims = (((1, 2), (0, 1)), ((), ()))
    product = partial(mk.dot_general, dimension_numbers=dims, implementation="xla")
    (dot,) = lines(lowered(product, x, w), "dot_general")
    assert "(tensor<3x4x8xi8>, tensor<4x8x6xi8>)" in dot


@pytest.mark.parametrize(
    ("rows", "dtype", "is_widened"),
    [(1, jnp.bfloat16, False), (16, jnp.bfloat16, False), (17, jnp.bfloat16, True)]
    + [(1, jnp.float32, True), (1, jnp.float16, True)],
)
def test_int4_is_widened_in_memory_but_beside_few_rows_of_bfloat16(rows, dtype, is_widened):
    w = mk.quantize(normal(64, 8).astype(dtype), "int4", axis=0, group_size=16)
    text = lowered(mk.matmul, normal(rows, 64).astype(dtype), w)
    barriers = [line for line in lines(text, "optimization_barrier") if re.search(r"xi8>", line)]
    assert len(barriers) == is_widened


def test_int4_beside_int8_is_widened_in_memory():
    x, w = quantize(normal(2, 64), axis=1), quantize(normal(64, 8), "int4", axis=0)
    (barrier,) = lines(lowered(mk.matmul, x, w), "optimization_barrier")
    assert "xi8>" in barrier


def convolve(x, w, groups=1, batch_groups=1):
    return mk.conv_general_dilated(
        x,
        w,
        (1, 1),
        "SAME",
        dimension_numbers=NHWC,
        feature_group_count=groups,
        batch_group_count=batch_groups,
    )


def test_float8_convolutions_are_of_bfloat16():
    x = quantize(normal(2, 5, 5, 4), "float8_e4m3fn")
    w = quantize(normal(3, 3, 4, 6), "float8_e4m3fn")
    (conv,) = lines(lowered(convolve, x, w), "convolution")
    assert "(tensor<2x5x5x4xbf16>, tensor<3x3x4x6xbf16>) -> tensor<2x5x5x6xf32>" in conv


@pytest.mark.parametrize(
    ("features", "groups", "kind", "count"), [(4, 1, "i8", 1), (4, 2, "bf16", 1), (512, 2, "i8", 2)]
)
def test_no_convolution_in_groups_is_of_int8(features, groups, kind, count):
    x = quantize(normal(1, 5, 5, features))
    w = quantize(normal(3, 3, features // groups, 6))
    found = lines(lowered(partial(convolve, groups=groups), x, w), "convolution")
    assert len(found) == count and all(f"x{kind}>, tensor<" in line for line in found)
    if kind == "i8":
        assert all("feature_group_count = 1 " in line for line in found)


def test_vmap_makes_no_groups_of_int8():
    x, w = normal(2, 1, 5, 5, 4), normal(2, 3, 3, 4, 6)
    product = jax.vmap(lambda x, w: convolve(mk.quantize(x), mk.quantize(w)))
    (conv,) = lines(lowered(product, x, w), "convolution")
    assert "feature_group_count = 1 " in conv and "xi8>, tensor<" in conv


def test_a_derivative_is_no_convolution_of_int8():
    formats = mk.DotFormats.int8(granularity="tensor")

    def loss(x, w):
        conv = partial(mk.quantized_conv_general_dilated, window_strides=(1, 1), padding="SAME")
        return jnp.sum(conv(x, w, dimension_numbers=NHWC, formats=formats)[0])

    text = lowered(jax.grad(loss, argnums=(0, 1)), normal(2, 5, 5, 4), normal(3, 3, 4, 6))
    backward = [line for line in lines(text, "convolution") if "xi8>" not in line]
    assert len(backward) == 2 and len(lines(text, "optimization_barrier")) >= 3


@pytest.mark.parametrize(
    ("features", "groups", "batch_groups"), [(8, 1, 1), (8, 4, 1), (640, 2, 1), (8, 1, 2)]
)
@pytest.mark.parametrize("mapped", [False, True])
def test_the_sums_are_exact(features, groups, batch_groups, mapped):
    rng = np.random.default_rng(0)
    shapes = (4, 5, 4, features), (3, 3, features // groups, 4 * groups)
    x, w = (rng.integers(-127, 128, (2, *s), dtype=np.int8) for s in shapes)
    window = convolution(*shapes, (2, 1), "SAME", None, None, NHWC, groups, batch_groups)
    sums = partial(int8_sums, window=window)
    alone = [(jnp.asarray(a), jnp.asarray(b)) for a, b in zip(x, w, strict=True)]
    result = jax.vmap(sums)(x, w) if mapped else np.stack([sums(a, b) for a, b in alone])
    exact = [window(a.astype(jnp.int32), b.astype(jnp.int32)) for a, b in alone]
    np.testing.assert_array_equal(result, np.stack(exact).astype(np.float32))


def test_the_checks_see_what_xla_is_given_without_them():
    def plain(x, w):
        return lax.conv_general_dilated(
            x, w, (1, 1), "SAME", dimension_numbers=NHWC, feature_group_count=2
        )

    text = lowered(plain, jnp.ones((1, 5, 5, 4), jnp.int8), jnp.ones((3, 3, 2, 6), jnp.int8))
    (conv,) = lines(text, "convolution")
    assert "feature_group_count = 2 " in conv and "xi8>, tensor<" in conv
    cast = lowered(lambda x: x.astype(jnp.float8_e4m3fn).astype(jnp.float32), jnp.ones(4))
    assert not lines(cast, "optimization_barrier")
