"""What the real TPU compiler makes of quantized products. It needs `jax[tpu]` but no TPU.

Two kinds of evidence: the optimized program of XLA, and for the Pallas kernels, which are one
opaque instruction there, the data formats of the matrix unit in the code that Mosaic generates.
"""

import re
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

import mpjax as mp
import mpjax_kernels as mk

pytestmark = [pytest.mark.tpu_compile, pytest.mark.usefixtures("strict_promotion")]

CHIPS = {"v5e": "v5e:1x1", "v6e": "v6e:1x1", "tpu7x": "tpu7x:1x1x1"}
E4M3, E5M2 = "float8_e4m3fn", "float8_e5m2"
# The 8-bit format that each chip's matrix unit multiplies, as HLO calls it.
NATIVE = [("v5e", "int8", "s8"), ("v6e", "int8", "s8"), ("tpu7x", E4M3, "f8e4m3fn")]
ROWS, TERMS, COLUMNS = 256, 2048, 1024


@pytest.fixture(scope="module")
def mosaic(mosaic_folder):
    """The folder that Mosaic writes its programs to, where there is a TPU compiler."""
    try:
        _device("v6e")
    except Exception as error:
        pytest.fail(f"no TPU compiler: pip install 'jax[tpu]', or `make test-tpu`. {error}")
    return mosaic_folder


def _device(chip):
    # One chip on one host, where libtpu would assume 2 x 2.
    bounds = {"chips_per_host_bounds": (1, 1, 1)}
    return topologies.get_topology_desc(CHIPS[chip], "tpu", **bounds).devices[0]


@pytest.fixture
def compiled(mosaic):
    """Compiles a function for a chip."""

    def compile(chip, function, *args):
        sharding = SingleDeviceSharding(_device(chip))
        return jax.jit(function, in_shardings=sharding).lower(*args).compile()

    return compile


def activation(rows=ROWS, terms=TERMS, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct((rows, terms), dtype)


def weight(
    format, terms=TERMS, columns=COLUMNS, *, transposed=False, dtype=jnp.bfloat16, **options
):
    def make(w):
        q = mk.quantize(w, format, **({"axis": 0} | options))
        return mk.contiguous(q, axis=0) if transposed else q

    return jax.eval_shape(make, jax.ShapeDtypeStruct((terms, columns), dtype))


def by_two_qtensors(x, w, *, format, implementation):
    q = mk.quantize(x, format, axis=1)
    return mk.matmul(q, w, implementation=implementation)


def multiplied_dtypes(text):
    """The dtypes of the operands of every matrix product in an optimized program."""
    dtypes = dict(re.findall(r"(%[\w.-]+) = (\w+)\[", text))
    products = re.findall(r" (?:convolution|dot)\((%[\w.-]+), (%[\w.-]+)\)", text)
    return {dtypes[name] for pair in products for name in pair}


def bytes_beside_the_weight(compiled, size):
    """Temporary memory, with the arrays in it that are as large as the weight.

    Counted are those in HBM, and anywhere those wider than 8 bits: a weight that is dequantized
    as a whole, be it in VMEM. What a fusion holds of one at a time is no array of the program.
    """
    entry = re.search(r"^ENTRY .*?^}", compiled.as_text(), re.MULTILINE | re.DOTALL)[0]
    total = compiled.memory_analysis().temp_size_in_bytes
    for bits, shape, layout, instruction in re.findall(
        r" = [a-z]+(\d+)\w*\[([\d,]+)\]\{(.*?)\} ([\w-]+)\(", entry
    ):
        in_vmem = "S(1)" in layout
        is_view = instruction in ("parameter", "bitcast")
        if _product(shape) == size and not is_view and (not in_vmem or int(bits) > 8):
            total += size * int(bits) // 8
    return total


def _product(shape):
    result = 1
    for size in shape.split(","):
        result *= int(size)
    return result


def matrix_unit_formats(folder, before):
    """What Mosaic's code for the kernels compiled since `before` tells the matrix unit to read."""
    formats = set()
    for path in set(folder.glob("*post-finalize-llo.txt")) - before:
        formats |= set(re.findall(r"matmul_data_format<([\w.]+)>", path.read_text()))
    return formats


@pytest.mark.parametrize(("chip", "format", "name"), NATIVE)
@pytest.mark.parametrize("transposed", [False, True])
def test_xla_multiplies_the_stored_values(compiled, chip, format, name, transposed):
    run = partial(by_two_qtensors, format=format, implementation="xla")
    program = compiled(chip, run, activation(), weight(format, transposed=transposed))
    assert multiplied_dtypes(program.as_text()) == {name}
    assert bytes_beside_the_weight(program, TERMS * COLUMNS) < TERMS * COLUMNS / 10


@pytest.mark.parametrize(("chip", "format", "name"), NATIVE)
def test_these_checks_notice_a_dequantized_weight(compiled, chip, format, name):
    def dequantized(x, w):
        return by_two_qtensors(x, w, format=format, implementation="reference")

    def dequantized_in_memory(x, w):
        return x @ jax.lax.optimization_barrier(mk.dequantize(w))

    x, w = activation(), weight(format)
    assert multiplied_dtypes(compiled(chip, dequantized, x, w).as_text()) == {"f32"}
    program = compiled(chip, dequantized_in_memory, x, w)
    assert multiplied_dtypes(program.as_text()) == {"bf16"}
    assert bytes_beside_the_weight(program, w.size) >= 2 * w.size


# What the matrix unit reads. v5e and v6e have no E4M3 and TPU7x has no int8: Mosaic widens those
# to bfloat16, on the way into the unit or before.
FORMATS = [
    ("v5e", "int8", {"s8"}),
    ("v6e", "int8", {"s8"}),
    ("tpu7x", "int8", {"bf16"}),
    ("v5e", E4M3, {"e4m3b_to_bf16"}),
    ("v6e", E4M3, {"e4m3b_to_bf16"}),
    ("tpu7x", E4M3, {"e4m3b"}),
]


@pytest.mark.parametrize(("chip", "format", "formats"), FORMATS)
@pytest.mark.parametrize("transposed", [False, True])
def test_the_fused_kernel_quantizes_and_multiplies_in_one_pass(
    compiled, mosaic, chip, format, formats, transposed
):
    before = set(mosaic.iterdir())
    run = partial(mk.quantized_matmul, format=format, implementation="tpu")
    program = compiled(chip, run, activation(), weight(format, transposed=transposed))
    text = program.as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 1
    assert multiplied_dtypes(text) == set()  # nothing is left for XLA to multiply
    # Neither the quantized activation nor another form of the weight is in HBM.
    assert bytes_beside_the_weight(program, TERMS * COLUMNS) < ROWS * TERMS / 10
    assert matrix_unit_formats(mosaic, before) == formats


@pytest.mark.parametrize(("chip", "format", "formats"), FORMATS)
def test_the_product_of_two_qtensors(compiled, mosaic, chip, format, formats):
    before = set(mosaic.iterdir())
    run = partial(by_two_qtensors, format=format, implementation="tpu")
    program = compiled(chip, run, activation(), weight(format))
    assert multiplied_dtypes(program.as_text()) == set()
    assert bytes_beside_the_weight(program, TERMS * COLUMNS) < TERMS * COLUMNS
    assert matrix_unit_formats(mosaic, before) == formats


@pytest.mark.parametrize("chip", CHIPS)
def test_a_dequantizing_kernel_would_be_noticed(compiled, mosaic, chip):
    def kernel(x_ref, w_ref, out_ref):
        wide = w_ref[...].astype(jnp.float32).astype(jnp.bfloat16)
        out_ref[...] = jnp.dot(x_ref[...], wide, preferred_element_type=jnp.float32)

    def run(x, w):
        shape = jax.ShapeDtypeStruct((ROWS, 256), jnp.float32)
        return pl.pallas_call(kernel, out_shape=shape)(x, w)

    before = set(mosaic.iterdir())
    compiled(chip, run, activation(terms=256), jax.ShapeDtypeStruct((256, 256), jnp.int8))
    assert matrix_unit_formats(mosaic, before) == {"bf16"}


RAGGED = [
    (1, 1, 1, {}),
    (7, 37, 5, {}),
    (130, 1031, 1033, {}),
    (130, 1031, 1033, {"transposed": True}),
    (1, 4096, 4096, {"transposed": True}),
    (512, 16384, 1024, {}),  # few rows of the activation fit into VMEM
    (33, 1024, 257, {"group_size": 128}),
]


@pytest.mark.parametrize(("rows", "terms", "columns", "options"), RAGGED)
@pytest.mark.parametrize("chip", CHIPS)
def test_ragged_shapes_compile(compiled, chip, rows, terms, columns, options):
    x = activation(rows, terms, jnp.float32)
    for lhs, rhs in (("int8", "int8"), ("int8", "int4"), (E4M3, E5M2)):
        w = weight(rhs, terms, columns, dtype=jnp.float32, **options)
        run = partial(mk.quantized_matmul, format=lhs, implementation="tpu")
        two = partial(by_two_qtensors, format=lhs, implementation="tpu")
        text = compiled(chip, lambda x, w, run=run, two=two: (run(x, w), two(x, w)), x, w).as_text()
        assert text.count('custom_call_target="tpu_custom_call"') == 2


@pytest.mark.parametrize("chip", CHIPS)
def test_batches_and_vmap_compile(compiled, chip):
    run = partial(mk.quantized_matmul, implementation="tpu")
    x = jax.ShapeDtypeStruct((3, 40, 300), jnp.bfloat16)
    compiled(chip, jax.vmap(run, in_axes=(0, None)), x, weight("int8", 300, 200))

    def batched(x, w):
        return mk.matmul(mk.quantize(x, axis=2), mk.quantize(w, axis=1), implementation="tpu")

    compiled(chip, batched, x, jax.ShapeDtypeStruct((3, 300, 200), jnp.bfloat16))


@pytest.mark.parametrize(("chip", "format", "_"), NATIVE)
def test_convolutions_ragged_products_and_lookups_hold_no_dequantized_weight(
    compiled, chip, format, _
):
    def quantized(axis, *shape):
        return jax.eval_shape(
            lambda x: mk.quantize(x, format, axis=axis), jax.ShapeDtypeStruct(shape, jnp.bfloat16)
        )

    def conv(x, w):
        nhwc = ("NHWC", "HWIO", "NHWC")
        return mk.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=nhwc)

    images, kernel = quantized((1, 2, 3), 8, 14, 14, 256), quantized((0, 1, 2), 3, 3, 256, 256)
    rows, experts = quantized(1, ROWS, TERMS), quantized(1, 8, TERMS, COLUMNS)
    sizes = jax.ShapeDtypeStruct((8,), jnp.int32)
    table, tokens = quantized(1, 32000, COLUMNS), jax.ShapeDtypeStruct((8, 16), jnp.int32)
    for operation, weight, args in [
        (conv, kernel, (images, kernel)),
        (mk.ragged_dot, experts, (rows, experts, sizes)),
        (mk.embedding_lookup, table, (table, tokens)),
    ]:
        memory = compiled(chip, operation, *args).memory_analysis()
        assert memory.temp_size_in_bytes < weight.nbytes / 10


@pytest.mark.parametrize("kv_cache", ["int8", "float8"])
@pytest.mark.parametrize("chip", CHIPS)
def test_decoding_reads_its_cache_as_it_is_stored(compiled, chip, kv_cache):
    batch, length, heads, width = 8, 1024, 16, 1024
    layer = nn.MultiHeadDotProductAttention(heads, decode=True)
    model = mp.wrap(layer, mp.DTypePolicy("bfloat16", kv_cache=kv_cache))
    x = jax.ShapeDtypeStruct((batch, length, width), jnp.bfloat16)
    with jax.numpy_dtype_promotion("standard"):  # Flax masks float32 scores by a bfloat16
        variables = jax.eval_shape(model.init, jax.random.key(0), x)

    def step(variables, x):
        with jax.numpy_dtype_promotion("standard"):
            return model.apply(variables, x, mutable=["cache"])

    program = compiled(chip, step, variables, jax.ShapeDtypeStruct((batch, 1, width), x.dtype))
    size = batch * length * width
    weights = 2 * sum(x.size for x in jax.tree.leaves(variables["params"]))
    allocated = program.memory_analysis().argument_size_in_bytes - weights
    # A float32 scale per head and position beside the 8 bits, and neither of them padded.
    assert 2 * size * (1 + 4 * heads / width) <= allocated < 2.2 * size
    assert program.memory_analysis().temp_size_in_bytes == 0
    # As large as a cache there are the two caches that come out, in 8 bits, and nothing else.
    assert bytes_beside_the_weight(program, size) == 2 * size
