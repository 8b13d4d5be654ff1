"""Weights that are stored in the tiles of the native int8 products."""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import export

import mpjax_kernels as mk
from mpjax_kernels._native_library import reads_tiles, tiles_refusal
from tests.kernels_helpers import normal

reads = pytest.mark.skipif(not reads_tiles(), reason="no native kernels that read tiles")
ROWS = (((1,), (0,)), ((), ()))


def in_tiles(q: mk.QTensor) -> mk.QTensor:
    """A weight [..., K, N] in tiles, whatever this machine reads."""
    *lead, k, n = q.shape
    values = jnp.swapaxes(q.values, -1, -2).reshape(*lead, n // 16, 16, k // 4, 4)
    values = jnp.swapaxes(values, -2, -3)
    return dataclasses.replace(q, values=values, layout=(-1, -2), tiles=((-1, 16), (-2, 4)))


def calls(function, *args):
    text = jax.jit(function).lower(*args).compile().as_text() or ""
    return sorted(re.findall(r'custom_call_target="(mpjax_\w+)"', text)), text


def test_what_it_is():
    w = mk.quantize(normal(64, 48), axis=0)
    tiled = in_tiles(w)
    mk.validate(tiled)
    assert (tiled.shape, tiled.ndim, tiled.size) == ((64, 48), 2, 64 * 48)
    assert tiled.values.shape == (3, 16, 16, 4)
    assert tiled.nbytes == w.nbytes
    assert "tiles ((-1, 16), (-2, 4))" in repr(tiled)
    for same in (tiled.T.T, mk.contiguous(tiled, axis=1), mk.contiguous(tiled, axis=0)):
        assert same.tiles == ()
        np.testing.assert_array_equal(mk.dequantize(same), mk.dequantize(w))
    np.testing.assert_array_equal(mk.dequantize(tiled), mk.dequantize(w))
    whole = mk.without_tiles(tiled)
    assert (whole.tiles, whole.layout, whole.values.shape) == ((), (-1, -2), (48, 64))
    np.testing.assert_array_equal(whole.values, w.values.T)
    np.testing.assert_array_equal(mk.dequantize(tiled[5:9, ::3]), mk.dequantize(w)[5:9, ::3])


@pytest.mark.parametrize(
    ("tiles", "message"),
    [
        (((-3, 16), (-2, 4)), "must name axes of `layout`"),
        (((-1, 16), (-1, 4)), "each once"),
        (((-1, 0), (-2, 4)), "the size that `values` has last"),
        (((-1, 4), (-2, 16)), "the size that `values` has last"),
    ],
)
def test_what_it_is_not(tiles, message):
    w = in_tiles(mk.quantize(normal(64, 48), axis=0))
    with pytest.raises(ValueError, match=message):
        mk.validate(dataclasses.replace(w, tiles=tiles))


@pytest.mark.parametrize("implementation", ["cpu", "xla", "reference"])
def test_every_implementation_puts_it_in_order(implementation):
    w = mk.quantize(normal(64, 48), axis=0)
    for x in (mk.quantize(normal(5, 64), axis=1), normal(5, 64)):
        product = partial(mk.matmul, x, implementation=implementation)
        np.testing.assert_allclose(product(in_tiles(w)), product(w), rtol=1e-6, atol=1e-5)


def test_other_operations_put_it_in_order():
    w = mk.quantize(normal(64, 48), axis=0)
    x = mk.quantize(normal(5, 64), axis=1)
    same = partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-5)
    same(mk.einsum("mk,kn->mn", x, in_tiles(w)), mk.einsum("mk,kn->mn", x, w))
    same(mk.einsum("kn,mk->mn", in_tiles(w), x), mk.einsum("kn,mk->mn", w, x))
    rows = jnp.arange(5)
    table = mk.quantize(normal(64, 48), axis=1)
    same(mk.embedding_lookup(in_tiles(table), rows), mk.embedding_lookup(table, rows))
    experts = mk.quantize(normal(3, 64, 48), axis=1)
    sizes = jnp.asarray([2, 0, 3])
    same(mk.ragged_dot(x, in_tiles(experts), sizes), mk.ragged_dot(x, experts, sizes))
    gradient = jax.grad(lambda x, w: mk.matmul(x, w).sum())
    same(gradient(normal(5, 64), in_tiles(w)), gradient(normal(5, 64), w))


@reads
@settings(deadline=None, max_examples=30)
@given(
    rows=st.one_of(st.integers(0, 9), st.sampled_from([16, 17, 63, 64, 65, 130])),
    fours=st.one_of(st.integers(1, 9), st.sampled_from([64, 255, 256, 257, 300])),
    panels=st.integers(1, 9),
    result=st.sampled_from(["float32", "bfloat16", "float16"]),
    per_row=st.booleans(),
    terms_last=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_products_are_exact(rows, fours, panels, result, per_row, terms_last, seed):
    """Integers at both ends of their range, so that nothing wraps around in silence."""
    rng = np.random.default_rng(seed)
    terms, columns = 4 * fours, 16 * panels
    x = rng.choice([-127, -1, 0, 1, 2, 127], (rows, terms)).astype(np.int8)
    w = rng.choice([-127, -2, 0, 1, 127], (terms, columns)).astype(np.int8)
    scale = 2.0 ** rng.integers(-3, 3, (rows if per_row else 1, 1)).astype(np.float32)
    q = mk.QTensor(jnp.asarray(x), jnp.asarray(scale), np.dtype("float32"))
    q = q if terms_last else mk.contiguous(q, axis=0)
    r = mk.QTensor(jnp.asarray(w), jnp.full((1, columns), 0.5, jnp.float32), np.dtype("float32"))
    packed = mk.prepacked(r, axis=0)
    assert packed.tiles == ((-1, 16), (-2, 4))
    product = partial(mk.dot_general, implementation="native", preferred_element_type=result)
    expected = (
        (x.astype(np.int64) @ w.astype(np.int64)).astype(np.float32) * scale * np.float32(0.5)
    )
    found = jax.jit(lambda q, r: product(q, r, ROWS))(q, packed)
    np.testing.assert_array_equal(found, jnp.asarray(expected).astype(result))


@reads
@pytest.mark.parametrize("panels", [1, 2, 3, 4, 7])
def test_few_rows_are_exact_in_any_number(panels):
    """Rows that are multiplied as they lie are 1 to 6, by 4 panels at a time or what is left."""
    rng = np.random.default_rng(panels)
    w = rng.integers(-127, 128, (52, 16 * panels), dtype=np.int8)
    scales = jnp.ones((1, w.shape[1]), jnp.float32)
    packed = mk.prepacked(mk.QTensor(jnp.asarray(w), scales, np.dtype("float32")), axis=0)
    for rows in range(1, 8):
        x = rng.integers(-127, 128, (rows, 52), dtype=np.int8)
        q = mk.QTensor(jnp.asarray(x), jnp.ones((1, 1), jnp.float32), np.dtype("float32"))
        found = mk.dot_general(q, packed, ROWS, implementation="native")
        np.testing.assert_array_equal(found, x.astype(np.int32) @ w.astype(np.int32))


@reads
@pytest.mark.parametrize(
    ("x", "w", "axes"),
    [
        ((5, 64), (64, 48), ROWS),
        ((2, 5, 64), (64, 2, 32), (((2,), (0,)), ((), ()))),
        ((5, 4, 16), (4, 16, 48), (((1, 2), (0, 1)), ((), ()))),
        ((16, 5, 4), (4, 16, 48), (((2, 0), (0, 1)), ((), ()))),
        ((3, 5, 64), (3, 64, 48), (((2,), (1,)), ((0,), (0,)))),
        ((5, 64), (48, 64), (((1,), (1,)), ((), ()))),
    ],
)
@pytest.mark.parametrize("rows", [1, 300])
def test_a_call_reads_it_as_it_is(x, w, axes, rows):
    """No copy of the weight in the program, whatever the contraction."""
    x = tuple(rows if size == 5 else size for size in x)
    operands = normal(*x), mk.quantize(normal(*w), axis=axes[0][1])
    packed = mk.prepacked(operands[1], axis=axes[0][1])
    product = partial(mk.dynamic_dot_general, dimension_numbers=axes)
    called, text = calls(product, operands[0], packed)
    assert "mpjax_dynamic_int8_dot" in called or called == ["mpjax_int8_dot", "mpjax_quantize"]
    sizes = {packed.size, packed.size // packed.shape[0]}
    copies = [
        line
        for line in text.splitlines()
        if re.search(r" (?:copy|transpose|fusion)\(", line)
        and any(
            np.prod([int(n) for n in d.split(",")]) in sizes
            for d in re.findall(r"= s8\[([\d,]+)\]", line)
        )
    ]
    assert not copies
    np.testing.assert_array_equal(
        jax.jit(product)(*operands), jax.jit(product)(operands[0], packed)
    )


@reads
def test_layers_are_scanned_over():
    x, w = normal(5, 64), mk.quantize(normal(3, 64, 64), axis=1)
    packed = mk.prepacked(w, axis=1)
    assert packed.layout == (-1, -2)

    def layers(x, w):
        return jax.lax.scan(lambda x, w: (mk.quantized_matmul(x, w), None), x, w)[0]

    np.testing.assert_array_equal(jax.jit(layers)(x, packed), jax.jit(layers)(x, w))
    mapped = jax.jit(jax.vmap(mk.quantized_matmul, (None, 0)))
    np.testing.assert_array_equal(mapped(x, packed), mapped(x, w))


@pytest.mark.parametrize(
    ("weight", "why"),
    [
        (mk.quantize(normal(64, 40), axis=0), "axis 1 has 40 entries, no multiple of 16"),
        (mk.quantize(normal(62, 48), axis=0), "axis 0 has 62 entries, no multiple of 4"),
        (mk.quantize(normal(64, 48), "float8_e4m3fn", axis=0), "of int8, and it is float8_e4m3fn"),
        (mk.quantize(normal(64, 48), axis=0, group_size=32), "scales that vary along (0,)"),
        (mk.quantize(normal(64, 48), axis=0, symmetric=False), "it has zero points"),
        (mk.quantize(normal(0, 48), axis=0), "of shape (0, 48), contracted along (0,)"),
    ],
    ids=["40 columns", "62 rows", "float8", "groups", "zero points", "nothing"],
)
def test_what_has_no_tiles_is_contiguous(weight, why):
    packed = mk.prepacked(weight, axis=0)
    assert (packed.tiles, packed.layout) == ((), (-1, -2))
    refusal = mk.prepacked_refusal(weight, axis=0)
    assert refusal is not None and (why in refusal or refusal == tiles_refusal())


def test_the_machine_is_asked_first():
    weight = mk.quantize(normal(64, 48), axis=0)
    assert mk.prepacked_refusal(weight, axis=0) == tiles_refusal()
    assert (mk.native_kernels().tiles_refusal is None) == reads_tiles()
    assert bool(mk.prepacked(weight, axis=0).tiles) == reads_tiles()
    with pytest.raises(ValueError, match="`axis` is 2, but `q` has 2 axes"):
        mk.prepacked_refusal(weight, axis=2)


@reads
def test_an_exported_program_runs_without_the_kernels():
    x, w = normal(5, 64), mk.quantize(normal(64, 48), axis=0)
    packed, product = mk.prepacked(w, axis=0), jax.jit(mk.quantized_matmul)
    exported = export.export(product)(x, packed)
    assert "@mpjax_" not in exported.mlir_module()
    np.testing.assert_array_equal(exported.call(x, packed), product(x, w))


@reads
def test_tiles_of_another_product_are_put_in_order():
    """Made for x @ w, in w.T @ y."""
    w, y = mk.quantize(normal(64, 48), axis=(0, 1)), mk.quantize(normal(48, 32), axis=0)
    packed = mk.prepacked(w, axis=0)
    np.testing.assert_array_equal(jax.jit(mk.matmul)(packed, y), jax.jit(mk.matmul)(w, y))
    with pytest.raises(NotImplementedError, match="tiles that were made for another product"):
        mk.matmul(packed, y, implementation="native")


@reads
@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 16, 8, 4), "rhs is in tiles of another size"),
        ((3, 15, 16, 4), "rhs has a shape that does not go"),
    ],
)
def test_a_wrong_call_is_an_error(shape, message):
    call = jax.ffi.ffi_call("mpjax_int8_dot", jax.ShapeDtypeStruct((2, 48), jnp.float32))
    operands = jnp.ones((2, 64), jnp.int8), jnp.ones(shape, jnp.int8), jnp.ones(2), jnp.ones(48)
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        jax.block_until_ready(call(*operands, lhs_terms_last=True, rhs_terms_last=False))
