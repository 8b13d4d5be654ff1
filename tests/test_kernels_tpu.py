"""The Pallas TPU kernels, interpreted on the CPU as two TPU cores with NaN in fresh memory.

What they do in several steps, with ragged ones last, and what they refuse. A race between the
cores or a read beyond a buffer fails the test.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

import mpjax_kernels as mk
from mpjax_kernels import _tpu
from mpjax_kernels._contraction import contraction
from mpjax_kernels._storage import as_stored
from mpjax_kernels._tpu_blocks import Blocks, fused_blocks, product_blocks
from tests.kernels_helpers import U, exact, normal, quantize

pytestmark = pytest.mark.usefixtures("strict_promotion", "no_races")

F32 = np.dtype("float32")
ONE = np.ones((1, 1), np.float32)
MATRIX = (((1,), (0,)), ((), ()))
INTERPRET = pltpu.InterpretParams(
    detect_races=True,
    out_of_bounds_reads="raise",
    uninitialized_memory="nan",
    num_cores_or_threads=2,
)
# Small enough that the shapes below take several steps along each axis, ragged ones last.
SMALL = Blocks(rows=32, columns=128, terms=128)
E4M3, E5M2 = "float8_e4m3fn", "float8_e5m2"

# M, K, N, whether the weight is stored [N, K], formats, blocks
CASES = [
    (1, 37, 5, True, "int8", "int8", None),
    (2, 1, 17, False, "int8", "int4", None),
    (7, 131, 1, True, "int8", "int4", SMALL),
    (130, 257, 129, False, "int8", "int8", SMALL),
    (2, 131, 17, False, E4M3, E4M3, None),
    (7, 300, 131, True, E4M3, E5M2, SMALL),
]


@pytest.fixture
def no_races(capsys):
    """JAX 0.10 prints the races it detects; JAX 0.12 raises."""
    yield
    assert "RACE DETECTED" not in capsys.readouterr().out


@partial(jax.jit, static_argnames=("axes", "blocks"))
def product(q, r, axes=None, blocks=None):
    axes = axes or contraction(q.shape, r.shape, MATRIX)
    stored = axes.reordered(tuple(range(q.ndim)), (1, 0)) if r.layout else axes
    return _tpu.dot_general(q, as_stored(r), stored, None, F32, blocks=blocks, interpret=INTERPRET)


@partial(jax.jit, static_argnames=("format", "dtype", "blocks"))
def fused(x, r, format="int8", dtype=F32, blocks=None):
    axes = contraction(x.shape, r.shape, (((x.ndim - 1,), (0,)), ((), ())))
    stored = axes.reordered(tuple(range(x.ndim)), (1, 0)) if r.layout else axes
    target = mk.get_format(format)
    return _tpu.fused(x, as_stored(r), stored, target, dtype, blocks=blocks, interpret=INTERPRET)


def weight(terms, columns, format, transposed):
    r = quantize(normal(terms, columns), format, axis=0)
    return r, (mk.contiguous(r, axis=0) if transposed else r)


def assert_close(result, q, r, roundings):
    """Integers: so many float32 roundings. float8: as many as a float32 sum takes."""
    expected = exact(q) @ exact(r)
    tolerance = roundings * U * np.abs(expected)
    if not q.format.is_integer:
        tolerance += q.shape[1] * U * (np.abs(exact(q)) @ np.abs(exact(r)))
    assert result.shape == expected.shape and result.dtype == jnp.float32
    assert (np.abs(np.asarray(result, np.float64) - expected) <= tolerance).all()


# The shapes of one block are among those of test_kernels_conformance.py.
@pytest.mark.parametrize(
    ("rows", "terms", "columns", "transposed", "lhs", "rhs", "blocks"),
    [case for case in CASES if case[-1] == SMALL],
)
def test_the_product_conforms(rows, terms, columns, transposed, lhs, rhs, blocks):
    q = quantize(normal(rows, terms), lhs, axis=1)
    r, stored = weight(terms, columns, rhs, transposed)
    # The int32 sum to float32, times one scale, times the other: (1 + U)**3 - 1 < 3.01 U.
    assert_close(product(q, stored, blocks=blocks), q, r, 3.01)


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "terms", "columns", "transposed", "lhs", "rhs", "blocks"), CASES)
def test_the_fused_product_conforms(rows, terms, columns, transposed, lhs, rhs, blocks):
    x = normal(rows, terms)
    r, stored = weight(terms, columns, rhs, transposed)
    # Two programs may round amax / format.max differently: 2 U more.
    result = fused(x, stored, lhs, blocks=blocks)
    assert_close(result, quantize(x, lhs, axis=1), r, 5.01)


@pytest.mark.parametrize("shape", [(0, 8, 3), (2, 0, 3), (2, 8, 0)])
def test_empty_products_are_zeros(shape):
    rows, terms, columns = shape
    x, r = normal(rows, terms), quantize(normal(terms, columns), axis=0)
    expected = np.zeros((rows, columns), np.float32)
    np.testing.assert_array_equal(product(quantize(x, axis=1), r), expected)
    np.testing.assert_array_equal(fused(x, r), expected)


def test_integer_sums_are_exact():
    rng = np.random.default_rng(0)
    x = rng.choice(np.asarray([-127, 126, 127], np.int8), (3, 1100))
    w = rng.choice(np.asarray([-127, 127], np.int8), (1100, 5))
    x[0], w[:, 0] = 127, 127  # the largest sum there is: 127**2 * 1100 is beyond 2**24
    q, r = (mk.QTensor(jnp.asarray(v), ONE, F32) for v in (x, w))
    expected = (x.astype(np.int64) @ w.astype(np.int64)).astype(np.float32)
    np.testing.assert_array_equal(product(q, r), expected)
    # Every row has an amax of 127, so a scale of 1.
    np.testing.assert_array_equal(fused(jnp.asarray(x, jnp.float32), r), expected)


@pytest.mark.parametrize("format", ["int8", E4M3])
def test_rows_of_zeros_subnormals_and_non_finite_numbers(format):
    x = np.array(normal(6, 200))
    x[0] = 0
    x[1, 3], x[2, 150], x[3, 199] = np.nan, np.inf, -np.inf
    x[4] = np.where(np.arange(200) % 2, 1e-40, -1e-40)
    r = quantize(normal(200, 9), format, axis=0)
    result = np.asarray(fused(jnp.asarray(x), r, format, blocks=SMALL))
    np.testing.assert_array_equal(result[0], 0)
    assert np.isnan(result[1:4]).all()
    # The smallest scale is 2**-126: what is left of subnormals is at most their sum.
    assert np.isfinite(result[4]).all() and np.abs(result[4]).max() < 1e-36
    q = quantize(jnp.asarray(x[5:]), format, axis=1)
    assert_close(jnp.asarray(result[5:]), q, r, 5.01)


@pytest.mark.parametrize("format", ["int8", E4M3, E5M2])
def test_activations_round_to_nearest_even_and_saturate(format):
    target = mk.get_format(format)
    values = np.arange(256, dtype=np.uint8).view(np.dtype(target.dtype)).astype(np.float64)
    values = np.unique(values[np.isfinite(values) & (np.abs(values) <= target.max)])
    middles = (values[1:] + values[:-1]) / 2
    x = np.concatenate([values, middles]).astype(np.float32)[None]  # amax is format.max: scale 1
    identity = mk.QTensor(jnp.eye(x.size, dtype=target.dtype), ONE, F32)
    result = fused(jnp.asarray(x), identity, format)
    expected = np.rint(x) if target.is_integer else x.astype(target.dtype).astype(np.float32)
    np.testing.assert_array_equal(result, expected)


@pytest.mark.slow
def test_scales_per_group_of_terms():
    x, w = normal(5, 512), normal(512, 131)
    r = quantize(w, axis=0, group_size=256)
    weight = np.asarray(r.values, np.float64) * np.asarray(r.scale).repeat(256, axis=0)
    q = quantize(x, axis=1)
    expected, magnitude = exact(q) @ weight, np.abs(exact(q)) @ np.abs(weight)
    # Each group: its exact sum, two scales (the fused kernel's own: 2 U more), one addition.
    for result in (product(q, mk.contiguous(r, axis=0), blocks=SMALL), fused(x, r)):
        assert (np.abs(np.asarray(result, np.float64) - expected) <= 8 * U * magnitude).all()
    # Both operands in groups.
    q = quantize(x, axis=1, group_size=256)
    rows = np.asarray(q.values, np.float64) * np.asarray(q.scale).repeat(256, axis=1)
    result = np.asarray(product(q, r, blocks=SMALL), np.float64)
    assert (np.abs(result - rows @ weight) <= 6 * U * (np.abs(rows) @ np.abs(weight))).all()


def test_batches_several_contracting_axes_and_scales_per_tensor():
    x, w = normal(3, 5, 4, 10), normal(10, 3, 4, 6)
    q, r = quantize(x), quantize(w, axis=(0, 2))
    axes = contraction(x.shape, w.shape, (((2, 3), (2, 0)), ((0,), (1,))))
    result = product(q, r, axes)
    expected = np.einsum("bmhk,kbhn->bmn", exact(q), exact(r))
    assert (np.abs(result - expected) <= 3.01 * U * np.abs(expected)).all()


def test_leading_axes_and_dtypes():
    x, r = normal(2, 3, 70).astype(jnp.bfloat16), quantize(normal(70, 9), axis=0)
    result = fused(x, r, dtype=np.dtype(jnp.bfloat16))
    expected = exact(quantize(x, axis=2)) @ exact(r)
    assert result.shape == (2, 3, 9) and result.dtype == jnp.bfloat16
    # Rounded to bfloat16, 8 bits, at the end: 2**-8 and a little for all float32 roundings.
    error = np.abs(np.asarray(result, np.float64) - expected)
    assert (error <= 1.001 * 2.0**-8 * np.abs(expected)).all()
    run = partial(fused, dtype=np.dtype("float16"))
    assert jax.eval_shape(run, x.astype(jnp.float16), r).dtype == jnp.float16


def test_blocks_hold_whatever_they_promise():
    for rows, columns, terms in [(1, 1, 1), (7, 4096, 4097), (10**5, 10**4, 1023), (130, 129, 128)]:
        b = product_blocks(rows, columns, terms)
        # 1040 * 127**2 < 2**24 <= 1041 * 127**2: see _tpu_blocks.
        assert b.terms <= 1040 and b.terms % 128 == 0 == b.columns % 128
        assert b.rows == rows or b.rows % 32 == 0
    assert product_blocks(8, 128, 1536, groups=2).terms == 768
    assert product_blocks(8, 128, 128 * 11, groups=1).terms == 768
    assert product_blocks(8, 128, 128 * 11 * 13, groups=13).terms == 128
    assert fused_blocks(512, 1024, 4096, 1, 4) == Blocks(rows=128, columns=1024, terms=1024)
    assert fused_blocks(512, 1024, 10**6, 1, 4) is None


@pytest.mark.parametrize(("rows", "kernel"), [(1, "quantized_matmul"), (32, "scaled_matmul")])
def test_rows_too_long_for_vmem_are_quantized_first(rows, kernel):
    x, r = jnp.zeros((rows, 60_000)), mk.QTensor(jnp.zeros((60_000, 1), jnp.int8), ONE, F32)
    axes = contraction(x.shape, r.shape, MATRIX)
    run = partial(_tpu.fused, contraction=axes, format=mk.int8, dtype=F32)
    assert f"name={kernel}" in str(jax.make_jaxpr(run)(x, r))


def traced(*shape, format="int8", **options):
    """A QTensor without numbers."""
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    return jax.eval_shape(lambda x: mk.quantize(x, format, **options), x)


def test_what_the_kernel_refuses():
    q, array = traced(4, 96, axis=1), jax.ShapeDtypeStruct((4, 96), jnp.float32)

    def refuses(message, a, b):
        with pytest.raises(NotImplementedError, match=f"'tpu': .*{message}"):
            jax.eval_shape(partial(mk.matmul, implementation="tpu"), a, b)

    refuses(r"`lhs` is float32\[4,96\]: it multiplies two QTensors", array, traced(96, 5))
    refuses("a scale per 48 terms, which 128 does not", q, traced(96, 5, axis=0, group_size=48))
    refuses("not int8 by float8_e4m3fn", q, traced(96, 5, format=E4M3))
    refuses("it takes int8, int4, float8_e4m3fn", q, traced(96, 5, format="float8_e4m3fnuz"))
    refuses("it takes no zero point", q, traced(96, 5, symmetric=False))
    long = 133145
    refuses(f"{long} terms: more than 133144 can overflow", traced(1, long), traced(long, 1))
    a, b = (
        traced(*s, axis=a, group_size=g) for s, a, g in (((2, 512), 1, 256), ((512, 3), 0, 128))
    )
    refuses(r"different groups, \[2, 4\]", a, b)
    one = traced(2, 128, 256, axis=(1, 2), group_size=(-1, 128))
    with pytest.raises(NotImplementedError, match="one of several contracting axes"):
        product = partial(mk.einsum, "mhk,nhk->mn", implementation="tpu")
        jax.eval_shape(product, one, traced(3, 128, 256, axis=(1, 2)))


def test_what_the_fused_kernel_refuses():
    x = jax.ShapeDtypeStruct((4, 256), jnp.float32)

    def refuses(message, w, format):
        with pytest.raises(NotImplementedError, match=f"'tpu': .*{message}"):
            jax.eval_shape(partial(mk.quantized_matmul, format=format, implementation="tpu"), x, w)

    refuses("it quantizes to one of int8, .*, not to int4", traced(256, 5), "int4")
    refuses("not float8_e5m2 by int8", traced(256, 5), E5M2)
    refuses("a scale per 64 terms", traced(256, 5, axis=0, group_size=64), "int8")


def test_the_tpu_kernel_named_on_a_cpu_says_where_it_runs():
    x, r = normal(4, 96), quantize(normal(96, 5), axis=0)
    for public, lhs in ((mk.matmul, quantize(x, axis=1)), (mk.quantized_matmul, x)):
        run = partial(public, implementation="tpu")
        for call in (run, jax.jit(run)):
            with pytest.raises(NotImplementedError, match="on cpu: 'tpu' runs on tpu only"):
                call(lhs, r)
        assert jax.eval_shape(run, lhs, r).shape == (4, 5)


def test_the_checks_of_these_tests_can_fail(capsys):
    def interpret(kernel):
        return pl.pallas_call(
            kernel,
            out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32),
            grid=(4,),
            in_specs=[pl.BlockSpec((8, 128), lambda i: (i, 0))],
            out_specs=pl.BlockSpec((8, 128), lambda i: (0, 0)),
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
            interpret=INTERPRET,
        )(jnp.ones((32, 128)))

    def sums_between_cores(x_ref, out_ref):
        out_ref[...] += x_ref[...]

    def reads_beyond(x_ref, out_ref):
        out_ref[...] = x_ref[pl.ds(8 * pl.program_id(0), 8)]

    try:
        race = str(interpret(sums_between_cores)) + capsys.readouterr().out
    except jax.errors.JaxRuntimeError as error:
        race = str(error)
    assert "race" in race.lower()
    pltpu.reset_tpu_interpret_mode_state()
    with pytest.raises(jax.errors.JaxRuntimeError, match="Out-of-bounds read"):
        interpret(reads_beyond)
    pltpu.reset_tpu_interpret_mode_state()
