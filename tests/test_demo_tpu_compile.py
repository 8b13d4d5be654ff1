"""What the real TPU compiler makes of the demo's model: training, prefill and decoding.

Each program is compiled once, and read twice: by `explain`, and by searching its text.
"""

from collections import Counter

import jax
import jax.numpy as jnp
import pytest

import mpjax_kernels as mk
from mpjax._compile_target import compile_for
from tests.demo_programs import (
    ATTENTION_FLOPS,
    BATCH,
    DECODED_ATTENTION_FLOPS,
    LARGE,
    LAYER_FLOPS,
    LAYERS,
    NATIVE,
    ROWS,
    SMALL,
    TRAINED,
    WIDTH,
    Case,
    fixtures,
    in_memory,
    multiplied,
)

pytestmark = pytest.mark.tpu_compile

E4M3, E5M2, INT8, BFLOAT16 = "f8e4m3fn", "f8e5m2", "s8", "bf16"
EIGHT_BITS = {"int8": INT8, "float8": E4M3}
NAMES = {E4M3: "float8_e4m3fn", E5M2: "float8_e5m2", INT8: "int8", BFLOAT16: "bfloat16"}
built, stored = fixtures("v5e", "v6e", "tpu7x")
PATHS = {"head", "block_0/up", "block_0/down"}
PATHS |= {f"block_0/attention/{name}" for name in ("query", "key", "value", "out")}


def expected(case: Case) -> tuple[Counter, Counter]:
    """The dtypes that the layers multiply, and the attention inside: how often each pair."""
    wide, native = (BFLOAT16, BFLOAT16), EIGHT_BITS[NATIVE[case.target]]
    if case.work == "prefill":
        return Counter({(native, native): LAYERS}), Counter({wide: 2})
    if case.work == "decode":
        # A float8 cache is widened on its way into the matrix unit, an int8 one in it.
        pair = (BFLOAT16, native) if native == INT8 else wide
        return Counter({(native, native): LAYERS}), Counter({pair: 2})
    layers = {
        # Two products backward for each forward, both wide where int8 trains.
        "bfloat16": {wide: 3 * LAYERS},
        "int8": {(INT8, INT8): LAYERS, wide: 2 * LAYERS},
        "float8": {(E4M3, E4M3): LAYERS, (E4M3, E5M2): 2 * LAYERS},
    }[case.work]
    return Counter(layers), Counter({wide: 6})


def test_every_product_has_the_operands_of_its_policy(built):
    layers, attention = expected(built.case)
    assert multiplied(built.text) == layers + attention


def test_explain_reads_the_same_of_every_layer(built):
    layers, attention = expected(built.case)
    forward, backward, inside = Counter(), Counter(), Counter()
    paths = Counter()
    for row in built.found.products:
        pair = tuple(sorted((row.lhs, row.rhs)))
        path = row.path.replace("blocks/0", "block_0")  # those of the NNX model are in a list
        if path == "block_0/attention":
            inside[pair] += 1
            continue
        paths[path, row.direction] += 1
        (forward if row.direction == "forward" else backward)[pair] += 1
    named = Counter({tuple(sorted((NAMES[a], NAMES[b]))): n for (a, b), n in layers.items()})
    assert forward + backward == named
    assert sum(inside.values()) == sum(attention.values())
    is_training = built.case.work in TRAINED
    directions = {"forward": 1, "backward": 2} if is_training else {"forward": 1}
    assert paths == {(path, way): n for path in PATHS for way, n in directions.items()}
    assert {row.unit for row in built.found.products} == {"MXU"}


def test_operations_are_those_of_the_model(built):
    rows, attention = ROWS, ATTENTION_FLOPS
    if built.case.work == "decode":
        # The one row of a text is eight, of zeros: the matrix unit takes no fewer.
        rows, attention = BATCH, 8 * DECODED_ATTENTION_FLOPS
    times = 3 if built.case.work in TRAINED else 1
    assert built.found.flops == times * (rows * LAYER_FLOPS + attention)
    quantized = {"bfloat16": 0, "int8": 1}.get(built.case.work, times) * rows * LAYER_FLOPS
    if built.case.is_emulated:
        quantized = 0
    assert built.found.share_in_8_bits == quantized / built.found.flops


def test_what_is_missed_is_what_the_target_cannot_multiply(built):
    case, found = built.case, built.found
    if case.is_emulated:
        narrow = [row for row in found.products if row.rhs != "bfloat16"]
        assert len(narrow) == {"int8": LAYERS, "float8": 3 * LAYERS}[case.work]
        assert list(found.misses) == narrow and {row.reason for row in narrow} == {"emulated"}
        with pytest.raises(AssertionError, match=f"0.0% .* are in 8 bits on {case.target}"):
            found.assert_quantized(0.01)
        return
    assert found.misses == ()
    # Attention stays in bfloat16, and so does the backward pass of int8: two thirds.
    part = {"bfloat16": 0.0, "int8": 0.3, "decode": 0.6}.get(case.work, 0.92)
    found.assert_quantized(part)
    with pytest.raises(AssertionError, match=r"are in 8 bits"):
        found.assert_quantized(part + 0.08)


def test_weights_are_read_as_they_are_stored(stored):
    layers = [row for row in stored.found.products if row.path != "block_0/attention"]
    layers = [row for row in layers if row.path != "blocks/0/attention"]
    assert sum(row.weight_bytes for row in layers) == 5 * SMALL + 2 * LARGE
    assert {(row.padding_bytes, row.dequantized_bytes) for row in stored.found.products} == {(0, 0)}
    sizes = {SMALL, LARGE}
    if stored.case.work == "decode":
        sizes.add(BATCH * 128 * WIDTH)  # the keys, and the values
    assert wide_arrays(stored.text, sizes) == []


def wide_arrays(text: str, sizes: set[int]) -> list[str]:
    """Arrays of these sizes, wherever in memory, that are wider than 8 bits."""
    narrow = (INT8, E4M3, "u8", "pred")
    return [line for dtype, size, line in in_memory(text) if size in sizes and dtype not in narrow]


@pytest.mark.parametrize("format", ["int8", "float8_e4m3fn"])
def test_the_check_notices_a_dequantized_weight(format):
    def run(x, w):
        return x @ jax.lax.optimization_barrier(mk.dequantize(w, jnp.bfloat16))

    w = jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.bfloat16)
    w = jax.eval_shape(lambda w: mk.quantize(w, format, axis=0), w)
    x = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.bfloat16)
    assert wide_arrays(compile_for(run, (x, w), {}, "v6e").text, {SMALL})
