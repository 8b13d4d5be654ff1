"""The products of attention, whoever computes them: few queries or many, shared heads, 8 bits."""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mpjax_kernels as mk
from tests.native_helpers import here

CALL = re.compile(r'custom_call_target="mpjax_attention_(\w+)"')
DTYPES = ("float32", "bfloat16", "float16")
needs_native = pytest.mark.skipif(not here(), reason="no native kernels here")


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes that differ; queries times the heads that share one of the cache are the rows."""

    queries: int = 1
    heads: int = 6
    kv_heads: int = 6
    depth: int = 20
    length: int = 37
    batch: tuple[int, ...] = (2, 3)

    def query(self, dtype="float32") -> jax.Array:
        shape = (*self.batch, self.queries, self.heads, self.depth)
        return jax.random.normal(jax.random.key(0), shape, dtype)

    def weights(self, dtype="float32") -> jax.Array:
        shape = (*self.batch, self.heads, self.queries, self.length)
        return jax.nn.softmax(jax.random.normal(jax.random.key(1), shape, dtype))

    def cached(self, dtype="float32") -> jax.Array:
        shape = (*self.batch, self.length, self.kv_heads, self.depth)
        return jax.random.normal(jax.random.key(2), shape, dtype)

    def exact(self, cached) -> tuple[np.ndarray, np.ndarray]:
        """Scores and output of the numbers as they are rounded, summed in float64."""
        query, weights = (np.asarray(x, np.float64) for x in (self.query(), self.weights()))
        cached = np.repeat(np.asarray(cached, np.float64), self.heads // self.kv_heads, -2)
        return (
            np.einsum("...qhd,...khd->...hqk", query, cached),
            np.einsum("...hqk,...khd->...qhd", weights, cached),
        )


FEW = [Case(), Case(2), Case(8), Case(kv_heads=2), Case(2, kv_heads=3), Case(kv_heads=1, depth=64)]
# Tiles have 12, 6, 4 or 1 rows, panels 32 columns and 128 terms, and a thread 48 rows of an output.
MANY = [
    Case(9),
    Case(3, kv_heads=2),
    Case(60, heads=2, kv_heads=2, depth=33, length=130, batch=(2,)),
    Case(31, heads=4, kv_heads=2, depth=130, length=32, batch=()),
    Case(16, heads=1, kv_heads=1, depth=512, length=512, batch=(1,)),
]
SMALL = [Case(depth=1), Case(length=1), Case(batch=()), Case(batch=(1,), depth=16, length=16)]


def products(case: Case, cached, dtype="float32", **options):
    """Both, compiled; and the names of the native calls in their programs."""
    results, calls = [], []
    for function, x in (
        (mk.attention_scores, case.query(dtype)),
        (mk.attention_output, case.weights(dtype)),
    ):
        compiled = jax.jit(partial(function, **options)).lower(x, cached).compile()
        results.append(compiled(x, cached))
        calls += CALL.findall(compiled.as_text())
    return results, calls


def check(found, exact, case: Case) -> None:
    """Sums of float32 in another order: no further off than all terms' last places together."""
    for result, expected, terms in zip(found, exact, (case.depth, case.length), strict=True):
        bound = 2 * terms * 2.0**-24 * np.abs(exact[0]).max()
        np.testing.assert_allclose(result, expected, rtol=1e-6, atol=bound)


@pytest.mark.parametrize("case", FEW + MANY + SMALL, ids=str)
def test_products_are_exact_up_to_the_sums(case):
    results, calls = products(case, case.cached())
    check(results, case.exact(case.cached()), case)
    assert calls == (["scores", "output"] if here() else [])


@pytest.mark.parametrize("format", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize("case", [FEW[0], FEW[4], *MANY[1:4], *SMALL], ids=str)
def test_a_cache_in_8_bits_gives_what_its_numbers_give(case, format):
    cached = mk.quantize(case.cached(), format, axis=-1)
    results, calls = products(case, cached)
    check(results, case.exact(mk.dequantize(cached, jnp.float32)), case)
    assert calls == (["scores", "output"] if here() else [])


@needs_native
@pytest.mark.parametrize("format", ["int8", "float8_e4m3fn"])
def test_every_number_of_a_format_is_read_as_it_is(format):
    """NaN too. A scale that is a power of 2 times a query of 1 leaves the bits."""
    bits = jnp.arange(256, dtype=jnp.uint8).reshape(1, 256, 1, 1)
    values = jax.lax.bitcast_convert_type(bits, mk.get_format(format).dtype)
    scale = jnp.exp2(jnp.arange(256.0) % 7).reshape(1, 256, 1, 1)
    cached = mk.QTensor(values, scale, jnp.dtype("float32"))
    scores = jax.jit(mk.attention_scores)(jnp.ones((1, 1, 1, 1)), cached)
    expected = np.asarray(values, np.float32)[0, :, 0, 0] * np.asarray(scale)[0, :, 0, 0]
    np.testing.assert_array_equal(scores[0, 0, 0], expected)


@needs_native
@pytest.mark.parametrize("queries", [2, 51])
@pytest.mark.parametrize(
    ("dtype", "cached_dtype"),
    [("bfloat16", "bfloat16"), ("float16", "float16"), ("float32", "bfloat16")],
)
def test_results_are_rounded_once(dtype, cached_dtype, queries):
    case = Case(queries, kv_heads=3)
    cached = case.cached(cached_dtype)
    options = {"preferred_element_type": jnp.float32}
    (scores, output), calls = products(case, cached, dtype, **options)
    rounded, _ = products(case, cached, dtype, preferred_element_type=dtype)
    assert calls == ["scores", "output"]
    for result, wide in zip(rounded, (scores, output), strict=True):
        assert result.dtype == dtype
        np.testing.assert_array_equal(*(np.float32(x) for x in (result, wide.astype(dtype))))
    exact = np.einsum(
        "...qhd,...khd->...hqk",
        np.asarray(case.query(dtype), np.float64),
        np.repeat(np.asarray(cached, np.float64), 2, -2),
    )
    np.testing.assert_allclose(scores, exact, atol=2 * case.depth * 2.0**-24 * np.abs(exact).max())


def test_the_dtype_is_that_of_the_operands_if_none_is_asked_for():
    case = Case()
    for dtype in DTYPES:
        for cached in (case.cached(dtype), mk.quantize(case.cached(), axis=-1)):
            scores = jax.eval_shape(mk.attention_scores, case.query(dtype), cached)
            output = jax.eval_shape(mk.attention_output, case.weights(dtype), cached)
            assert scores.dtype == output.dtype == dtype


def entry(cached, i: int):
    """Of the first axis."""
    return jax.tree.map(lambda x: x[i], cached)


@pytest.mark.parametrize("cached", ["mapped", "shared"])
@pytest.mark.parametrize("format", [None, "int8"])
def test_vmap_is_a_loop(cached, format):
    case, one = Case(), Case(batch=(3,))
    whole = case.cached() if cached == "mapped" else one.cached()
    whole = whole if format is None else mk.quantize(whole, format, axis=-1)
    axis = 0 if cached == "mapped" else None
    for function, x in (
        (mk.attention_scores, case.query()),
        (mk.attention_output, case.weights()),
    ):
        mapped = jax.jit(jax.vmap(function, (0, axis)))
        text = mapped.lower(x, whole).compile().as_text()
        assert len(CALL.findall(text)) == (1 if here() else 0)
        one_by_one = [(x[i], whole if axis is None else entry(whole, i)) for i in range(2)]
        loop = jnp.stack([jax.jit(function)(*operands) for operands in one_by_one])
        # XLA may add up in another order, native calls do not.
        np.testing.assert_allclose(mapped(x, whole), loop, rtol=0, atol=0 if here() else 1e-5)


@pytest.mark.parametrize("case", [Case(2), Case(2, kv_heads=3), Case(9)], ids=str)
def test_derivatives_are_those_of_the_equations(case):
    query, weights, cached = case.query(), case.weights(), case.cached()

    def ours(query, weights, cached):
        scores = mk.attention_scores(query, cached)
        return jnp.sum(jnp.sin(scores)) + jnp.sum(jnp.cos(mk.attention_output(weights, cached)))

    def plain(query, weights, cached):
        cached = jnp.repeat(cached, case.heads // case.kv_heads, -2)
        scores = jnp.einsum("...qhd,...khd->...hqk", query, cached)
        output = jnp.einsum("...hqk,...khd->...qhd", weights, cached)
        return jnp.sum(jnp.sin(scores)) + jnp.sum(jnp.cos(output))

    operands = query, weights, cached
    for found, expected in zip(
        jax.jit(jax.grad(ours, (0, 1, 2)))(*operands),
        jax.jit(jax.grad(plain, (0, 1, 2)))(*operands),
        strict=True,
    ):
        np.testing.assert_allclose(found, expected, atol=1e-4)
    tangents = tuple(jnp.cos(x) for x in operands)
    along = [jax.jvp(f, operands, tangents)[1] for f in (ours, plain)]
    np.testing.assert_allclose(*along, rtol=1e-4)


def test_a_policy_of_checkpoint_knows_the_products():
    """A native call would be computed again, whatever the policy saves."""
    case = Case(9)

    def loss(query, cached):
        return jnp.sum(jnp.sin(mk.attention_scores(query, cached)))

    saving = jax.checkpoint(loss, policy=jax.checkpoint_policies.dots_saveable)
    text = jax.jit(jax.grad(saving)).lower(case.query(), case.cached()).as_text()
    assert text.count("dot_general") == 2 and "mpjax_attention" not in text


@pytest.mark.parametrize("queries", [1, 9])
def test_derivatives_have_derivatives(queries):
    case = Case(queries, batch=())

    def loss(weights, cached):
        return jnp.sum(mk.attention_output(weights, cached) ** 2)

    def plain(weights, cached):
        return jnp.sum(jnp.einsum("hqk,khd->qhd", weights, cached) ** 2)

    operands = case.weights(), case.cached()
    found, expected = (
        jax.jit(jax.grad(lambda w, c, f=f: jnp.sum(jnp.sin(jax.grad(f)(w, c))), (0, 1)))(*operands)
        for f in (loss, plain)
    )
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max())


@pytest.mark.parametrize("queries", [1, 9])
def test_x64(queries):
    case = Case(queries)
    query, cached = case.query(), case.cached()
    expected = mk.attention_scores(query, cached)
    with jax.enable_x64(True):
        result = jax.jit(mk.attention_scores)(query, cached)
        assert result.dtype == jnp.float32
        np.testing.assert_array_equal(result, expected)
        wide = jax.jit(mk.attention_scores)(query.astype(jnp.float64), cached)
        assert wide.dtype == jnp.float64
        np.testing.assert_allclose(wide, expected, atol=1e-5)


def test_a_query_has_its_gradient_through_a_cache_in_8_bits():
    case = Case()
    cached = mk.quantize(case.cached(), axis=-1)
    floats = mk.dequantize(cached, jnp.float32)

    def loss(query, cached):
        return jnp.sum(jnp.sin(mk.attention_scores(query, cached)))

    found, expected = (jax.jit(jax.grad(loss))(case.query(), c) for c in (cached, floats))
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_an_exported_program_has_no_call():
    case = Case()
    function = jax.jit(mk.attention_scores)
    text = jax.export.export(function)(case.query(), case.cached()).mlir_module()
    assert "mpjax_attention" not in text and "dot_general" in text


@pytest.mark.parametrize("queries", [2, 14])
def test_a_nan_stays_with_its_head_and_position(queries):
    case = Case(queries, kv_heads=3, batch=(1,))
    cached = case.cached().at[0, 5, 1, 2].set(jnp.nan)
    (scores, output), _ = products(case, cached)
    lost = np.isnan(scores)
    assert lost[0, 2:4, :, 5].all() and lost.sum() == 2 * queries  # of two heads
    lost = np.isnan(output)
    assert lost[0, :, 2:4, 2].all() and lost.sum() == 2 * queries


@pytest.mark.parametrize("queries", [1, 9])
@pytest.mark.parametrize("axis", ["batch", "queries", "heads", "length", "depth"])
def test_empty_sizes_have_empty_or_zero_results(axis, queries):
    sizes = {"batch": {"batch": (0,)}, "heads": {"heads": 0, "kv_heads": 0}}.get(axis, {axis: 0})
    case = dataclasses.replace(Case(queries), **sizes)
    cached = jnp.zeros((*case.batch, case.length, case.kv_heads, case.depth))
    weights = jnp.zeros((*case.batch, case.heads, case.queries, case.length))
    scores = jax.jit(mk.attention_scores)(case.query(), cached)
    output = jax.jit(mk.attention_output)(weights, cached)
    assert scores.shape == weights.shape and output.shape == case.query().shape
    assert not scores.any() and not output.any()


def test_what_does_not_go_together_is_named():
    case = Case()
    query, weights, cached = case.query(), case.weights(), case.cached()
    with pytest.raises(ValueError, match=r"`query` .* of shape \(2, 3, 1, 6, 20\) and `key`"):
        mk.attention_scores(query, cached[..., :19])
    with pytest.raises(ValueError, match="the heads a multiple of kv_heads"):
        mk.attention_scores(query, cached[..., :4, :])
    with pytest.raises(ValueError, match="`weights` .* and `value`"):
        mk.attention_output(weights, cached[:, :, :5])
    with pytest.raises(ValueError, match="batch axes"):
        mk.attention_output(weights[0], cached)
    with pytest.raises(ValueError, match="one per position and head"):
        mk.attention_scores(query, mk.quantize(cached, axis=(-1, -2)))
    with pytest.raises(TypeError, match="`quantized` is for products of QTensors"):
        mk.attention_output(weights, cached, quantized=True)


@needs_native
@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"key": (2, 9, 3, 8)}, "no multiple"),
        ({"query": (2, 1, 4, 7)}, "do not go with the cache"),
        ({"out": (2, 4, 1, 8)}, "do not go with the cache"),
        ({"scale": (2, 8, 4)}, "an entry for each position"),
        ({"scale": (2, 9, 3)}, "an entry for each position"),
        ({"key": (3, 9, 4, 8)}, "batches"),
        ({"key": (9, 4, 8)}, "rank"),
    ],
    ids=str,
)
def test_a_call_with_wrong_shapes_is_an_error_of_xla(shapes, message):
    shapes = {
        "query": (2, 1, 4, 8),
        "key": (2, 9, 4, 8),
        "scale": (2, 9, 4),
        "out": (2, 4, 1, 9),
    } | shapes
    call = jax.ffi.ffi_call(
        "mpjax_attention_scores", jax.ShapeDtypeStruct(shapes["out"], jnp.float32)
    )
    operands = (jnp.zeros(shapes[name]) for name in ("query", "key", "scale"))
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"mpjax_attention_scores: .*{message}"):
        call(*operands)


@needs_native
def test_a_call_with_wrong_dtypes_is_an_error_of_xla():
    out = jax.ShapeDtypeStruct((2, 4, 1, 9), jnp.float32)
    call = jax.ffi.ffi_call("mpjax_attention_scores", out)
    query, key, scale = jnp.zeros((2, 1, 4, 8)), jnp.zeros((2, 9, 4, 8)), jnp.zeros((2, 9, 4))
    for operands, message in (
        ((query.astype(jnp.int8), key, scale), "the query are not float32"),
        ((query, key.astype(jnp.int32), scale), "the cache is not of floats, int8 or E4M3"),
        ((query, key, scale.astype(jnp.bfloat16)), "the scale is not float32"),
    ):
        with pytest.raises(jax.errors.JaxRuntimeError, match=message):
            call(*operands)
