"""What the real NVIDIA compiler makes of the demo's model: training, prefill and decoding.

Each program is compiled once, and read twice: by `explain`, and by searching its text. XLA merges
products of one operand (of query, key and value) where it likes, so operations are counted here,
where the tests for TPUs count products.
"""

import re
from collections import Counter

import pytest
from gpu_helpers import h200_compiler

from tests.demo_programs import (
    ATTENTION_FLOPS,
    BATCH,
    DECODED_ATTENTION_FLOPS,
    LARGE,
    LAYER_FLOPS,
    LAYERS,
    ROWS,
    SMALL,
    TRAINED,
    fixtures,
    in_memory,
    multiplied,
    train,
)

pytestmark = pytest.mark.gpu_compile

E4M3, E5M2, INT8, BFLOAT16 = "float8_e4m3fn", "float8_e5m2", "int8", "bfloat16"
NAMES = {"f8e4m3fn": E4M3, "f8e5m2": E5M2, "s8": INT8, "bf16": BFLOAT16}
built, stored = fixtures("h200")
QKV = {"query", "key", "value"}


def expected(work: str) -> Counter:
    """Operations of all products by the dtypes of their operands and by direction."""
    wide = BFLOAT16, BFLOAT16
    if work == "prefill":
        return Counter(
            {
                (E4M3, E4M3, "forward"): ROWS * LAYER_FLOPS,
                (*wide, "forward"): ATTENTION_FLOPS,
            }
        )
    one = ROWS * LAYER_FLOPS
    forward = {"bfloat16": wide, "int8": (INT8, INT8), "float8": (E4M3, E4M3)}[work]
    backward = (E4M3, E5M2) if work == "float8" else wide
    layers = Counter({(*forward, "forward"): one, (*backward, "backward"): 2 * one})
    attention = {"forward": ATTENTION_FLOPS, "backward": 2 * ATTENTION_FLOPS}
    return layers + Counter({(*wide, way): n for way, n in attention.items()})


def test_every_operation_is_in_the_formats_of_its_policy(built):
    found = Counter()
    for row in built.found.products:
        found[(*sorted((row.lhs, row.rhs)), row.direction)] += row.flops
    if built.case.work != "decode":
        assert found == expected(built.case.work)
        return
    # Both products of one row by the cache are sums on the vector units; XLA merges the scores
    # with what scales them, and leaves one that is still known for a product.
    layers = found.pop((E4M3, E4M3, "forward"))
    assert layers == BATCH * LAYER_FLOPS
    assert all(BFLOAT16 in key and n <= DECODED_ATTENTION_FLOPS for key, n in found.items())


def test_the_text_has_the_same_products(built):
    rows = [row for row in built.found.products if row.unit != "vector"]
    assert {row.unit for row in rows} == {"Triton"}  # fused with what scales and rounds
    by_text = Counter()
    for (a, b), count in multiplied(built.text).items():
        by_text[tuple(sorted((NAMES[a], NAMES[b])))] += count
    assert Counter(tuple(sorted((row.lhs, row.rhs))) for row in rows) == by_text


def test_nothing_is_missed(built):
    assert built.found.misses == ()
    part = {"bfloat16": 0.0, "int8": 0.3}.get(built.case.work, 0.92)
    built.found.assert_quantized(part)
    with pytest.raises(AssertionError, match="are in 8 bits on h200"):
        built.found.assert_quantized(part + 0.08)


def test_stored_weights_are_read_as_they_are(stored):
    layers = [row for row in stored.found.products if not row.path.endswith("attention")]
    assert sum(row.weight_bytes for row in layers) == 5 * SMALL + 2 * LARGE
    assert {row.dequantized_bytes for row in stored.found.products} == {0}
    wide = [
        line
        for dtype, size, line in in_memory(stored.text)
        if size in (SMALL, LARGE) and dtype not in ("f8e4m3fn", "s8", "u8", "pred")
    ]
    assert wide == []


def turned_weights(text: str) -> list[str]:
    """The instructions that do nothing but turn 8 bits as many as a weight has, in memory."""
    found = []
    for dtype, size, line in in_memory(text):
        if size not in (SMALL, LARGE) or dtype not in ("f8e4m3fn", "s8"):
            continue
        fused = re.search(r" fusion\(.*?calls=(%[\w.-]+)", line)
        body = line
        if fused:
            body = text[text.index(f"\n{fused[1]} ") :].partition("\n}")[0]
        opcodes = set(re.findall(r"= \S+ ([\w-]+)\(", body))
        if opcodes <= {"parameter", "bitcast", "transpose", "copy"}:
            found.append(line)
    return found


def test_training_turns_no_float8_weight(built):
    if built.case.work == "float8":
        assert turned_weights(built.text) == []


def test_inference_turns_only_what_the_compiler_merges(stored):
    """XLA makes one product of query, key and value, and for that a [3 N, K] of their [K, N]."""
    turned = turned_weights(stored.text)
    names = [name for line in turned for name in QKV if re.search(rf"\W{name}\W|_{name}_", line)]
    assert len(turned) == 3 and set(names) == QKV
    by_explain = [row for row in stored.found.products if row.transposed_bytes]
    assert sum(row.transposed_bytes for row in by_explain if row.weight_bytes) >= 3 * SMALL


def test_cublas_takes_float8_and_scalar_scales():
    """The library, which XLA prefers for large products, refuses other scales."""
    function, args = train("linen", TRAINED["float8"])
    compiled = h200_compiler()(
        lambda *args: function(*args), *args, xla_gpu_enable_triton_gemm=False
    )
    text = re.sub(r"/\*.*?\*/", "", compiled)
    shapes = dict(re.findall(r"(%[\w.-]+) = (\w+\[[\d,]*\])", text))
    calls = re.findall(r'custom-call\(([^)]*)\)[^\n]*target="__cublas\$lt\$matmul\$f8"', text)
    assert len(calls) == 3 * LAYERS
    pairs = Counter()
    for call in calls:
        lhs, rhs, *scales = [shapes[name] for name in call.split(", ")]
        pairs[tuple(sorted(x.partition("[")[0] for x in (lhs, rhs)))] += 1
        assert len(scales) >= 2 and set(scales) == {"f32[]"}
    assert pairs == {("f8e4m3fn", "f8e4m3fn"): LAYERS, ("f8e4m3fn", "f8e5m2"): 2 * LAYERS}
