"""The Pallas TPU kernel, interpreted on the CPU as two TPU cores with NaN in fresh memory.

What it does in several steps, with ragged ones last, which programs have it, and what it refuses. A
race between the cores or a read beyond a buffer fails the test.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import mpjax_kernels as mk
from mpjax_kernels import _tpu
from mpjax_kernels._contraction import contraction
from mpjax_kernels._storage import as_stored
from mpjax_kernels._tpu import FEWEST_ROWS, LARGEST, VMEM, Blocks, blocks_for, tuned, vmem_bytes
from mpjax_kernels._tpu_tuned import FOR_ANY, TUNED
from tests.kernels_helpers import U, normal, quantize

pytestmark = pytest.mark.usefixtures("strict_promotion", "no_races")

INTERPRET = pltpu.InterpretParams(
    detect_races=True,
    out_of_bounds_reads="raise",
    uninitialized_memory="nan",
    num_cores_or_threads=2,
)
# Small enough that the shapes below take several steps along each axis.
SMALL = Blocks(rows=32, columns=128, terms=256)


@pytest.fixture
def no_races(capsys):
    """JAX 0.10 prints the races it detects; JAX 0.12 raises."""
    yield
    assert "RACE DETECTED" not in capsys.readouterr().out


@partial(jax.jit, static_argnames="dtype")
def product(x, r, dtype=jnp.float32):
    axes = contraction(x.shape, r.shape, (((x.ndim - 1,), (0,)), ((), ())))
    stored = axes.reordered(tuple(range(x.ndim)), (1, 0)) if r.layout else axes
    dtype = np.dtype(dtype)
    return _tpu.dot_general(
        x, as_stored(r), stored, None, dtype, largest=SMALL, interpret=INTERPRET
    )


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("int4", {"axis": 0, "group_size": 128}),
        ("int8", {"axis": 0, "group_size": 256}),
        ("int8", {"axis": (0, 1), "group_size": (128, 100)}),
    ],
)
def test_it_is_the_sum_of_the_groups_products(format, options, transposed):
    x, r = normal(2, 20, 512).astype(jnp.bfloat16), quantize(normal(512, 200), format, **options)
    result = product(x, mk.contiguous(r, axis=0) if transposed else r)
    wide = np.asarray(x, np.float64), np.asarray(mk.dequantize(r, jnp.float32), np.float64)
    # A float32 sum of K terms, a scale for each group, a sum of groups; and what the dequantized
    # weight was rounded by.
    tolerance = (512 + 4 + 2) * U * (np.abs(wide[0]) @ np.abs(wide[1]))
    assert result.shape == (2, 20, 200) and result.dtype == jnp.float32
    assert (np.abs(np.asarray(result, np.float64) - wide[0] @ wide[1]) <= tolerance).all()


def test_what_is_not_finite_stays_in_its_row():
    x, r = normal(40, 256).astype(jnp.bfloat16), quantize(normal(256, 64), axis=0, group_size=128)
    clean = product(x, r)
    for bad in (jnp.nan, jnp.inf):
        result = product(x.at[35, 7].set(bad), r)
        assert not jnp.isfinite(result[35]).any()
        rest = jnp.arange(40) != 35
        np.testing.assert_array_equal(result[rest], clean[rest])


def test_the_result_dtype():
    x, r = normal(8, 256).astype(jnp.bfloat16), quantize(normal(256, 64), axis=0, group_size=128)
    np.testing.assert_array_equal(product(x, r, "bfloat16"), product(x, r).astype(jnp.bfloat16))
    assert jax.eval_shape(partial(product, dtype="float16"), x, r).dtype == jnp.float16


@pytest.mark.parametrize("group", [128, 256, 1024, 4096])
@pytest.mark.parametrize("entry", [FOR_ANY, *TUNED.values()], ids=str)
def test_blocks_hold_whole_groups_and_fit_into_vmem(entry, group):
    for largest in (LARGEST, *(Blocks(*each) for each in entry.values())):
        for terms in (4096, 8192, 12288, 20480):
            b = blocks_for(10**4, 4096, terms, group, largest)
            assert terms % b.terms == 0 == b.terms % group
        assert vmem_bytes(blocks_for(512, 4096, 4096, 128, largest), 4, 128, 2) <= VMEM
    # What is taken where the others do not fit.
    assert vmem_bytes(blocks_for(10**4, 4096, 8192, group), 8, group, 4) <= VMEM
    # Two buffers of rows, of a weight of 8 bits, and of the result, a group in bfloat16, and sums.
    entries = (
        2 * 2 * 512 * 4096,
        2 * 256 * 4096,
        2 * 4 * 512 * 256,
        2 * 256 * 128,
        2 * 4 * 512 * 256,
    )
    assert vmem_bytes(LARGEST, 8, 128, 4) == sum(entries)


def test_blocks_are_no_larger_than_the_product():
    assert blocks_for(600, 7, 256, 128) == Blocks(rows=304, columns=7, terms=256)
    assert blocks_for(1024, 512, 256, 128).rows == 512


def traced(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def weight(*shape, format="int4", **options):
    options = {"axis": 0, "group_size": 128} | options
    return jax.eval_shape(lambda w: mk.quantize(w, format, **options), traced(*shape))


def test_what_it_refuses():
    how = {"implementation": "tpu", "preferred_element_type": jnp.float32}

    def refuses(message, x, w, product=mk.matmul):
        with pytest.raises(NotImplementedError, match=f"'tpu': .*{message}"):
            jax.eval_shape(partial(product, **how), x, w)

    x, w = traced(512, 256), weight(256, 64)
    assert jax.eval_shape(partial(mk.matmul, **how), x, w).shape == (512, 64)
    refuses("`lhs` is float32.*bfloat16", traced(512, 256, dtype=jnp.float32), w)
    refuses("`lhs` is .*bfloat16", jax.eval_shape(partial(mk.quantize, axis=1), x), w)
    refuses("integers without a zero point", x, weight(256, 64, format="float8_e4m3fn"))
    refuses("integers without a zero point", x, weight(256, 64, symmetric=False))
    refuses("a scale per group of a multiple of 128 terms", x, weight(256, 64, group_size=64))
    refuses("a scale per group of a multiple of 128 terms", x, weight(256, 64, group_size=-1))
    refuses("`lhs` has 255 rows: it takes 256 or more beside QTensor.int4", traced(255, 256), w)
    wide, eight = weight(4096, 4096), weight(4096, 4096, format="int8")
    refuses(
        "`lhs` has 255 rows: it takes 256 or more beside QTensor.int8", traced(255, 4096), eight
    )
    message = (
        f"`lhs` has {FEWEST_ROWS - 1} rows: it takes {FEWEST_ROWS} or more beside QTensor.int4"
    )
    refuses(message, traced(FEWEST_ROWS - 1, 4096), wide)
    assert jax.eval_shape(partial(mk.matmul, **how), traced(FEWEST_ROWS, 4096), wide).ndim == 2
    batched = partial(mk.einsum, "bmk,bkn->bmn")
    x, w = traced(2, 512, 256), weight(2, 256, 64, axis=1)
    refuses(r"it takes \[..., K\] by two axes", x, w, batched)


X, W = traced(1024, 512), weight(512, 256)
KERNEL = 'kernel_name = "mpjax_grouped_matmul"'


def text_for(platform, function, *args, **options):
    return jax.jit(function, **options).trace(*args).lower(lowering_platforms=(platform,)).as_text()


def test_programs_for_one_tpu_have_it():
    assert KERNEL in text_for("tpu", mk.matmul, X, W)
    assert KERNEL not in text_for("cpu", mk.matmul, X, W)
    assert KERNEL not in text_for("cuda", mk.matmul, X, W)
    assert KERNEL not in text_for("tpu", partial(mk.matmul, implementation="xla"), X, W)
    stacked = jax.vmap(mk.matmul, in_axes=(0, None))
    assert KERNEL in text_for("tpu", stacked, traced(3, 1024, 512), W)


def test_programs_for_several_and_exported_ones_have_what_xla_can_partition():
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    sharded = {"in_shardings": (NamedSharding(mesh, P("data")), NamedSharding(mesh, P()))}
    assert KERNEL not in text_for("tpu", mk.matmul, X, W, **sharded)
    each = partial(jax.shard_map, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"))
    assert KERNEL in text_for("tpu", each(mk.matmul, check_vma=False), X, W)
    assert KERNEL not in text_for("tpu", each(mk.matmul), X, W)
    exported = jax.export.export(jax.jit(mk.matmul), platforms=("tpu",))(X, W)
    assert KERNEL not in exported.mlir_module()
    with pytest.raises(NotImplementedError, match="'tpu': the program is for several devices"):
        text_for("tpu", partial(mk.matmul, implementation="tpu"), X, W, **sharded)


def rows_by_a_weight(rows):
    return contraction((rows, 256), (256, 64), (((1,), (0,)), ((), ())))


@pytest.mark.parametrize(
    ("kind", "entry"),
    [
        ("TPU v5 lite", TUNED["TPU v5e|TPU v5 ?lite"]),
        ("TPU v6 lite", TUNED["TPU v6e|TPU v6 lite"]),
        ("TPU7x", TUNED["TPU ?7x?|TPU v7x?"]),
        ("TPU v4", FOR_ANY),
        ("TPU v5", FOR_ANY),
        (None, FOR_ANY),
    ],
)
def test_a_kind_of_tpu_gets_its_entry(kind, entry):
    for rows in (FEWEST_ROWS, 64, 255, 256, 10**4):
        fewest = [number for number in entry if number <= rows]
        found = tuned(kind, rows_by_a_weight(rows))
        if fewest:
            assert found == {"largest": Blocks(*entry[max(fewest)])}
        else:
            on = "a TPU of any kind" if kind is None else repr(kind)
            message = f"`lhs` has {rows} rows: XLA is faster beside fewer than {min(entry)} on {on}"
            assert found == message


def test_a_tpu_that_is_not_known_and_vmap_get_what_holds_for_any():
    fewest = min(FOR_ANY)
    assert FEWEST_ROWS < fewest
    wide = weight(4096, 4096)
    for rows in (fewest, fewest - 1):
        has_it = rows == fewest
        x = traced(rows, 4096)
        assert (KERNEL in text_for("tpu", mk.matmul, x, wide)) == has_it
        stacked = jax.vmap(mk.matmul, in_axes=(0, None))
        assert (KERNEL in text_for("tpu", stacked, traced(3, rows, 4096), wide)) == has_it
    with pytest.raises(NotImplementedError, match=f"'tpu': `lhs` has {fewest - 1} rows: .* of any"):
        text_for("tpu", partial(mk.matmul, implementation="tpu"), traced(fewest - 1, 4096), wide)


def test_its_derivative_is_that_of_xlas_product():
    def loss(x, w):
        return jnp.sum(mk.matmul(x, w, preferred_element_type=jnp.float32))

    assert KERNEL in text_for("tpu", jax.value_and_grad(loss), X, W)
    x, w = normal(512, 256).astype(jnp.bfloat16), quantize(normal(256, 64), axis=0, group_size=128)
    expected = jax.grad(lambda x: loss(x, w))(x)
    by_xla = partial(mk.matmul, implementation="xla", preferred_element_type=jnp.float32)
    np.testing.assert_array_equal(jax.grad(lambda x: jnp.sum(by_xla(x, w)))(x), expected)


def test_other_compilers_add_large_groups_one_after_the_other():
    q = jax.eval_shape(partial(mk.quantize, axis=1), traced(4096, 512))
    assert "stablehlo.while" in text_for("cuda", mk.matmul, q, weight(512, 1024))
    assert "stablehlo.while" not in text_for("tpu", mk.matmul, q, weight(512, 1024))
