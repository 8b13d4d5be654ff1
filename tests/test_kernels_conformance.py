"""One suite for every implementation of dot_general, against exact arithmetic.

Each implementation is run on this CPU, wherever it is meant to run: "gpu" is plain XLA, and "tpu"
is interpreted. Shapes are those that break kernels: one row, odd, prime, single and empty axes,
batches, several axes of a kind, operands that lie the other way round in memory.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mpjax_kernels as mk
from mpjax_kernels._contraction import contraction
from mpjax_kernels._dot_general import IMPLEMENTATIONS, multiply
from mpjax_kernels._native_library import native_refusal
from tests.kernels_helpers import U, normal, quantize

pytestmark = pytest.mark.usefixtures("strict_promotion")

E4M3, E5M2 = "float8_e4m3fn", "float8_e5m2"
MATRIX = (((1,), (0,)), ((), ()))


@dataclass(frozen=True)
class Shapes:
    """The shapes of two operands, and their product."""

    lhs: tuple[int, ...]
    rhs: tuple[int, ...]
    dims: tuple = MATRIX

    @property
    def terms(self) -> int:
        return int(np.prod([self.lhs[a] for a in self.dims[0][0]]))

    def product(self, lhs: np.ndarray, rhs: np.ndarray) -> np.ndarray:
        """The definition of dot_general, by numpy.einsum."""
        (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = self.dims
        left, right = list(range(lhs.ndim)), [20 + i for i in range(rhs.ndim)]
        for a, b in zip((*lhs_contract, *lhs_batch), (*rhs_contract, *rhs_batch), strict=True):
            right[b] = left[a]
        batch = [left[a] for a in lhs_batch]
        gone = {*batch, *(left[a] for a in lhs_contract)}
        free = [label for label in left + right if label not in gone]
        return np.einsum(lhs, left, rhs, right, batch + free)


SHAPES = [
    Shapes((1, 37), (37, 5)),
    Shapes((2, 64), (64, 16)),
    Shapes((7, 131), (131, 17)),
    Shapes((128, 96), (96, 40)),
    Shapes((5, 37), (37, 1)),
    Shapes((1, 31), (31, 1)),
    Shapes((3, 1), (1, 4)),
    Shapes((0, 4), (4, 3)),
    Shapes((2, 0), (0, 3)),
    Shapes((3, 5), (5, 0)),
    Shapes((37,), (37, 5), (((0,), (0,)), ((), ()))),
    Shapes((37,), (37,), (((0,), (0,)), ((), ()))),
    Shapes((3,), (4,), (((), ()), ((), ()))),
    Shapes((6, 33), (5, 33), (((1,), (1,)), ((), ()))),
    Shapes((33, 6), (33, 5), (((0,), (0,)), ((), ()))),
    Shapes((33, 1), (5, 33), (((0,), (1,)), ((), ()))),
    Shapes((2, 1, 11), (2, 11, 5), (((2,), (1,)), ((0,), (0,)))),
    Shapes((2, 3, 11), (2, 11, 5), (((2,), (1,)), ((0,), (0,)))),
    Shapes((11, 2, 3), (5, 11, 2), (((0,), (1,)), ((1,), (2,)))),
    Shapes((2, 3, 4, 5), (4, 6, 5), (((3, 2), (2, 0)), ((), ()))),
    Shapes((2, 3, 5), (2, 4, 5), (((0, 2), (0, 2)), ((), ()))),
    Shapes((4, 3, 1), (3, 4, 1, 2), (((2,), (2,)), ((0, 1), (1, 0)))),
]

# Left format (an array if a dtype) and options of quantize; right format and options. Those
# without `axis` are quantized over the contracting axes: activations per row, weights per column.
PER_CHANNEL = [
    ("int8", {}, "int8", {}),
    ("bfloat16", {}, "int8", {}),
    (E4M3, {}, E4M3, {}),
]
PAIRS = [
    ("int8", {}, "int4", {}),
    ("int8", {"axis": None}, "int8", {"axis": None}),
    ("int8", {}, "int8", {"axis": 0, "group_size": 8}),
    ("int8", {"axis": 1, "group_size": 4}, "int4", {"axis": 0, "group_size": 16}),
    ("int8", {"axis": 1, "group_size": 16}, "int8", {"axis": (0, 1), "group_size": (32, 8)}),
    ("int8", {"symmetric": False}, "int8", {"symmetric": False}),
    ("int8", {}, "int4", {"axis": 0, "group_size": 16, "symmetric": False}),
    ("float32", {}, "int8", {}),
    ("float16", {}, "int4", {"axis": 0, "group_size": 16}),
    ("bfloat16", {}, "int4", {"axis": 0, "group_size": 16, "symmetric": False}),
    ("bfloat16", {}, "int8", {"symmetric": False}),
    ("bfloat16", {}, E4M3, {}),
    ("float32", {}, E5M2, {"axis": (0, 1), "group_size": (32, 8)}),
    (E5M2, {}, E4M3, {}),
    (E4M3, {}, E5M2, {}),
    (E4M3, {"axis": 1, "group_size": 16}, E4M3, {"axis": (0, 1), "group_size": (32, 8)}),
    ("float8_e4m3fnuz", {}, "float8_e5m2fnuz", {}),
    (E4M3, {}, "float8_e4m3fnuz", {}),
    (E4M3, {}, "int8", {}),
]
PAIR_SHAPES = [Shapes((1, 64), (64, 24)), Shapes((7, 64), (64, 24))]


def run(name, shapes, lhs, rhs, dtype=jnp.float32):
    """The product by that implementation on this machine; None where it refuses the operands."""
    axes = contraction(shapes.lhs, shapes.rhs, shapes.dims)
    table = {name: IMPLEMENTATIONS[name]}

    def here(*operands, run, **options):
        return run(*operands, **options)

    table[name] = type(table[name])(table[name].refusal, partial(here, run=table[name].run))
    product = partial(multiply, axes=axes, precision=None, dtype=jnp.dtype(dtype), table=table)
    try:
        return jax.jit(partial(product, implementation=name))(lhs, rhs)
    except NotImplementedError as error:  # the last test says when it may
        assert f"'{name}': " in str(error)
        return None


def operand(shape, format, contract, options, *, other_way):
    x = normal(*shape)
    if format in ("bfloat16", "float16", "float32"):
        return x.astype(format)
    q = quantize(x, format, **({"axis": tuple(contract)} | options))
    return mk.contiguous(q, axis=tuple(contract)) if other_way else q


def exact(x) -> np.ndarray:
    """The numbers that an operand stands for, in float64."""
    if not isinstance(x, mk.QTensor):
        return np.asarray(x, np.float64)
    values = np.asarray(x.values, np.float64)
    if x.layout is not None:
        order = [*range(x.ndim - len(x.layout)), *(a % x.ndim for a in x.layout)]
        values = values.transpose(np.argsort(order))
    parts = [np.asarray(x.scale, np.float64)]
    parts += [np.asarray(x.zero_point, np.float64)] if x.zero_point is not None else [0 * parts[0]]
    for axis, size in enumerate(x.shape):
        repeats = size // parts[0].shape[axis] if size else 0
        parts = [np.repeat(part, repeats, axis) for part in parts]
    return (values - parts[1]) * parts[0]


def bound(name, shapes, lhs, rhs) -> np.ndarray:
    """How far a result may be from the exact one.

    A product, its part in the sums and at most two scales of each operand round, each with at most
    U, to first order; two U cover the rest. Beside an array with few rows, "cpu" multiplies that in
    three digits: half a unit of 22 bits of the row's amax.
    """
    left, right = np.abs(exact(lhs)), np.abs(exact(rhs))
    error = (shapes.terms + 7) * U * shapes.product(left, right)
    if name == "cpu" and not (isinstance(lhs, mk.QTensor) and isinstance(rhs, mk.QTensor)):
        largest = [
            np.broadcast_to(x.max(tuple(contract), keepdims=True, initial=0), x.shape)
            for x, contract in zip((left, right), shapes.dims[0], strict=True)
        ]
        array = 1 if isinstance(lhs, mk.QTensor) else 0
        pair = (largest[0], right) if array == 0 else (left, largest[1])
        error += 2.0**-22 * shapes.product(*pair)
    return error


def check(name, shapes, pair, other_way):
    left, left_options, right, right_options = pair
    lhs = operand(shapes.lhs, left, shapes.dims[0][0], left_options, other_way=False)
    rhs = operand(shapes.rhs, right, shapes.dims[0][1], right_options, other_way=other_way)
    result = run(name, shapes, lhs, rhs)
    if result is None:
        return
    expected = shapes.product(exact(lhs), exact(rhs))
    assert result.shape == expected.shape and result.dtype == jnp.float32
    difference = np.abs(np.asarray(result, np.float64) - expected)
    assert (difference <= bound(name, shapes, lhs, rhs)).all()


@pytest.mark.parametrize("shapes", SHAPES, ids=lambda s: f"{s.lhs}-{s.rhs}")
@pytest.mark.parametrize("pair", PER_CHANNEL, ids=lambda p: f"{p[0]}-{p[2]}")
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_every_shape(name, pair, shapes):
    check(name, shapes, pair, other_way=len(shapes.rhs) == 3)


@pytest.mark.parametrize("shapes", PAIR_SHAPES, ids=lambda s: f"{s.lhs[0]} rows")
@pytest.mark.parametrize("pair", PAIRS, ids=lambda p: f"{p[0]}{p[1] or ''}-{p[2]}{p[3] or ''}")
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_every_pair_and_granularity(name, pair, shapes):
    check(name, shapes, pair, other_way=shapes.lhs[0] == 7)


@pytest.mark.parametrize("rows", [1, 2, 7])
@pytest.mark.parametrize("other_way", [False, True])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_integer_accumulators_are_exact(name, other_way, rows):
    rng, terms = np.random.default_rng(0), 1040  # 127**2 * 1040 < 2**24: exact in float32 too
    x, w = (rng.integers(-127, 128, shape) for shape in ((rows, terms), (terms, 5)))
    x[0] = w[:, 0] = 127  # the largest sum there is
    one = jnp.ones((1, 1), jnp.float32)
    q, r = (mk.QTensor(jnp.asarray(v, jnp.int8), one, np.dtype("float32")) for v in (x, w))
    r = mk.contiguous(r, axis=0) if other_way else r
    result = run(name, Shapes(x.shape, w.shape), q, r)
    refuses = name == "tpu" or name == "native" and native_refusal("int8") is not None
    assert (result is None) == refuses
    if result is not None:
        np.testing.assert_array_equal(result, x.astype(np.int64) @ w)


@pytest.mark.parametrize(
    "pair", [*PER_CHANNEL, PAIRS[2], PAIRS[-8]], ids=lambda p: f"{p[0]}-{p[2]}"
)
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_what_is_not_finite_reaches_its_outputs_and_no_others(name, rows, pair):
    left, _, right, options = pair
    x, w = normal(rows + 1, 64).at[0, 3].set(np.nan)[:rows], normal(64, 3).at[5, 2].set(np.inf)
    q = x.astype(left) if left.startswith("b") or left == "float32" else quantize(x, left, axis=1)
    r = quantize(w, right, **({"axis": 0} | (options if options.get("axis") == 0 else {})))
    expected = np.zeros((rows, 3), bool)
    expected[0], expected[:, 2] = True, True
    result = run(name, Shapes(x.shape, w.shape), q, r)
    if result is not None:
        np.testing.assert_array_equal(~np.isfinite(result), expected)


def test_the_table_says_which_pairs_each_implementation_takes():
    """So that a refusal that came by accident is seen, and not only skipped."""
    taken = {name: set() for name in IMPLEMENTATIONS}
    for pair in PER_CHANNEL + PAIRS:
        shapes = PAIR_SHAPES[1]
        lhs = operand(shapes.lhs, pair[0], (1,), pair[1], other_way=False)
        rhs = operand(shapes.rhs, pair[2], (0,), pair[3], other_way=False)
        axes = contraction(shapes.lhs, shapes.rhs, shapes.dims)
        for name, implementation in IMPLEMENTATIONS.items():
            if implementation.refusal(lhs, rhs, axes, None, np.dtype("float32")) is None:
                taken[name].add((PER_CHANNEL + PAIRS).index(pair))
    everything = set(range(len(PER_CHANNEL + PAIRS)))
    assert taken["reference"] == taken["xla"] == everything
    native = sum(n for format, n in NATIVE.items() if native_refusal(format) is None)
    assert {name: len(pairs) for name, pairs in taken.items()} == TAKEN | {"native": native}


TAKEN = {"tpu": 0, "cpu": 22, "gpu": 7, "xla": 22, "reference": 22}
NATIVE = {"float8_e4m3fn": 6, "int8": 6, "int4": 3}
