"""What the real TPU compiler makes of quantized products: the optimized program.

It needs `jax[tpu]` but no TPU.
"""

import re
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import PartitionSpec as P
from jax.sharding import SingleDeviceSharding

import mpjax as mp
import mpjax_kernels as mk
from mpjax_kernels._tpu_tuned import FEW, TUNED

pytestmark = [pytest.mark.tpu_compile, pytest.mark.usefixtures("strict_promotion")]

CHIPS = {"v5e": "v5e:1x1", "v6e": "v6e:1x1", "tpu7x": "tpu7x:1x1x1"}
E4M3, E5M2 = "float8_e4m3fn", "float8_e5m2"
# The 8-bit format that each chip's matrix unit multiplies, as HLO calls it.
NATIVE = [("v5e", "int8", "s8"), ("v6e", "int8", "s8"), ("tpu7x", E4M3, "f8e4m3fn")]
ROWS, TERMS, COLUMNS = 256, 2048, 1024
NAME = 'kernel_name = "mpjax_grouped_matmul"'


@pytest.fixture(scope="module")
def compiler():
    """Fails where there is no TPU compiler."""
    try:
        _device("v6e")
    except Exception as error:
        pytest.fail(f"no TPU compiler: pip install 'jax[tpu]', or `make test-tpu`. {error}")


def _device(chip):
    # One chip on one host, where libtpu would assume 2 x 2.
    bounds = {"chips_per_host_bounds": (1, 1, 1)}
    return topologies.get_topology_desc(CHIPS[chip], "tpu", **bounds).devices[0]


@pytest.fixture
def compiled(compiler):
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


# The formats of an activation and a weight, and how the scales of both are shared.
RUNS = {"axis": 1, "group_size": 128}
BLOCKS = {"axis": (0, 1), "group_size": (128, 128)}
IN_GROUPS = [
    ("v6e", None, "int4", {"group_size": 128}),
    ("v6e", "int8", "int4", {"group_size": 128}),
    ("v5e", None, "int8", {"group_size": 256}),
    ("tpu7x", E4M3, E4M3, BLOCKS),
]


@pytest.mark.parametrize(("chip", "lhs", "rhs", "options"), IN_GROUPS)
@pytest.mark.parametrize("transposed", [False, True])
def test_the_products_of_all_groups_are_added_up_in_one_pass(
    compiled, chip, lhs, rhs, options, transposed
):
    rows, terms, columns = 2048, 2048, 1024

    def run(x, w):
        return mk.matmul(x, w, preferred_element_type=jnp.bfloat16, implementation="xla")

    x, w = activation(rows, terms), weight(rhs, terms, columns, transposed=transposed, **options)
    if lhs is not None:
        how = RUNS if options is BLOCKS else {"axis": 1}
        x = jax.eval_shape(lambda x: mk.quantize(x, lhs, **how), x)
    program = compiled(chip, run, x, w)
    text = program.as_text()
    # A loop over groups would read and write the sums, and a batch of them would not fit.
    assert " while(" not in text
    assert terms // 256 * rows * columns * 4 > 32 * 2**20
    assert program.memory_analysis().temp_size_in_bytes < rows * columns
    widest = {"bf16"} if lhs is None else {"s8", "f8e4m3fn"}
    assert multiplied_dtypes(text) <= widest | {"s4", "s8"}


def fewest_rows(chip):
    """Of those that the kernel multiplies on a chip."""
    kind = _device(chip).device_kind
    (entry,) = [entry for name, entry in TUNED.items() if re.fullmatch(name, kind)]
    return min(entry)


def test_a_program_has_the_kernel_by_the_chip_that_it_is_for(compiler):
    x, w = activation(64, 4096), weight("int4", 4096, 4096, group_size=128)
    inner = jax.jit(mk.matmul)
    function = jax.jit(lambda x, w: inner(x, w))  # one for both, which JAX keeps what it lowers of
    named = jax.jit(partial(mk.matmul, implementation="tpu"))

    def lowered(chip, function, sharding=None):
        sharding = SingleDeviceSharding(_device(chip)) if sharding is None else sharding
        where = partial(jax.ShapeDtypeStruct, sharding=sharding)
        args = jax.tree.map(lambda a: where(a.shape, a.dtype), (x, w))
        return function.lower(*args).as_text()

    def on_a_mesh(chip):
        mesh = jax.sharding.Mesh([_device(chip)], ("rows",))
        specs = {"in_specs": (P("rows"), P()), "out_specs": P("rows"), "check_vma": False}
        mapped = jax.jit(jax.shard_map(mk.matmul, mesh=mesh, **specs))
        return lowered(chip, mapped, jax.sharding.NamedSharding(mesh, P()))

    for lower in (partial(lowered, function=function), on_a_mesh):
        assert [NAME in lower(chip) for chip in ("v5e", "v6e", "v5e")] == [False, True, False]
    assert NAME in lowered("v6e", named)
    with pytest.raises(NotImplementedError, match="'tpu': `lhs` has 64 rows: .* 'TPU v5 lite'"):
        lowered("v5e", named)


@pytest.mark.parametrize("chip", CHIPS)
def test_many_rows_by_a_weight_in_groups_reach_the_kernel(compiled, chip):
    def layer(x, w):
        return nn.silu(mk.matmul(x, w, preferred_element_type=jnp.bfloat16))

    fewest = fewest_rows(chip)
    for rows, calls in ((fewest, 1), (fewest - 1, 0)):
        for transposed in (False, True)[: calls + 1]:
            columns = 384 if fewest >= FEW else 4096  # few rows have it beside large weights only
            w = weight("int4", 4096, columns, transposed=transposed, group_size=128)
            program = compiled(chip, layer, activation(rows, 4096), w)
            text = program.as_text()
            assert text.count('custom_call_target="tpu_custom_call"') == calls
            assert bool(multiplied_dtypes(text)) != bool(calls)
            assert program.memory_analysis().temp_size_in_bytes < w.size / 10
    # Rows and columns that no block divides, the longest group, and int8.
    for terms, columns, group in ((2560, 200, 1280), (8192, 130, 4096)):
        w = weight("int8", terms, columns, group_size=group)
        text = compiled(chip, layer, activation(1000, terms), w).as_text()
        assert text.count('custom_call_target="tpu_custom_call"') == 1


def test_the_kernel_is_explained_by_its_layer():
    model = mp.wrap(nn.Sequential([nn.Dense(512)]), mp.QuantizedDTypePolicy("int4/128", "bfloat16"))
    x = jax.ShapeDtypeStruct((2, 256, 1024), jnp.bfloat16)
    with jax.numpy_dtype_promotion("standard"):
        variables = jax.eval_shape(model.init, jax.random.key(0), x)
        variables = jax.eval_shape(lambda v: mp.quantize(model, v, x), variables)
        (row,) = mp.explain(model.apply, variables, x, target="v6e").products
    assert (row.path, row.unit, row.rhs, row.reason) == ("layers_0", "Pallas", "int4", "weights")
    assert row.flops == 2 * 512 * 1024 * 512


@pytest.mark.parametrize(("chip", "format", "_"), NATIVE)
def test_batches_and_vmap_compile(compiled, chip, format, _):
    run = partial(mk.quantized_matmul, format=format)
    x = jax.ShapeDtypeStruct((3, 40, 300), jnp.bfloat16)
    compiled(chip, jax.vmap(run, in_axes=(0, None)), x, weight(format, 300, 200))

    def batched(x, w):
        return mk.matmul(mk.quantize(x, format, axis=2), mk.quantize(w, format, axis=1))

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
