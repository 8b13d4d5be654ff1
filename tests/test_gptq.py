"""GPTQ: against the elimination written out in NumPy, better than plain rounding, never NaN."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from calibration_helpers import layer, second_moment, trace_error
from helpers import equations

import mpjax_kernels as mk
from mpjax._gptq import gptq
from mpjax._gptq_factor import damped_factor

pytestmark = pytest.mark.usefixtures("strict_promotion")

OPTIONS = ("format", "axis", "group_size", "symmetric", "damp", "block", "order")
run = jax.jit(gptq, static_argnames=OPTIONS)
plain_of = jax.jit(mk.quantize, static_argnames=OPTIONS[:4])
dequantize = jax.jit(mk.dequantize)
factor_of = jax.jit(damped_factor, static_argnums=1)


def written_out(weight, moment, scale, zero_point, *, low, high, damp=0.01, order=True):
    """GPTQ as an elimination: the inverse of H is updated after each input, no factor is taken."""
    w, h = weight.astype(np.float64), moment.astype(np.float64)
    inverse = np.linalg.inv(h + damp * np.mean(np.diag(h)) * np.eye(len(h)))
    values = np.zeros_like(w)
    for i in np.argsort(-np.diag(h), kind="stable") if order else range(len(h)):
        values[i] = np.clip(np.round(w[i] / scale[i] + zero_point[i]), low, high)
        error = w[i] - (values[i] - zero_point[i]) * scale[i]
        w -= np.outer(inverse[:, i], error / inverse[i, i])
        inverse -= np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
        inverse[i, i] = 1  # the input is done: its row and column are zero
    return values


@pytest.mark.parametrize(("symmetric", "order"), [(True, False), (False, True)])
def test_six_inputs_by_three_outputs_agree_with_the_elimination(symmetric, order):
    x, w = layer(6, 3, 64)
    moment = second_moment(x)
    found = run(w, moment, "int4", group_size=3, symmetric=symmetric, order=order, block=4)
    zero = np.zeros((2, 3)) if symmetric else np.asarray(found.quantized.zero_point, np.float64)
    scale, zero = (np.repeat(each, 3, axis=0) for each in (np.asarray(found.quantized.scale), zero))
    low = -7 if symmetric else -8
    expected = written_out(w, moment, scale, zero, low=low, high=7, order=order)
    np.testing.assert_array_equal(np.asarray(found.quantized.values, np.int32), expected)
    nearest = np.clip(np.round(w / scale + zero), low, 7)
    assert (expected != nearest).any()


def test_the_block_changes_nothing():
    x, w = layer(10, 4, 64)
    moment = second_moment(x)
    one, four = (run(w, moment, "int8", block=block).quantized.values for block in (1, 4))
    np.testing.assert_array_equal(one, four)


# Measured: 0.41 to 0.50 without outliers, 0.26 to 0.29 with them.
@pytest.mark.parametrize(
    ("options", "ratio", "outliers"),
    [
        ({"format": "int4", "group_size": 64}, 0.6, False),
        ({"format": "int4", "group_size": 64, "symmetric": False}, 0.4, True),
        ({"format": "int8"}, 0.55, False),
        ({"format": "float8_e4m3fn", "axis": (0, 1), "group_size": (64, 16)}, 0.4, True),
    ],
    ids=str,
)
def test_is_better_than_plain_rounding_on_the_same_grid(options, ratio, outliers):
    x, w = layer(128, 48, outliers=outliers)
    moment = second_moment(x)
    found = run(w, moment, **options)
    assert float(found.error) <= ratio * float(found.plain_error)
    assert float(found.damp) == np.float32(0.01)
    plain = plain_of(w, **{"axis": 0, **options})
    mk.validate(found.quantized)
    np.testing.assert_array_equal(found.quantized.scale, plain.scale)
    if plain.zero_point is not None:
        np.testing.assert_array_equal(found.quantized.zero_point, plain.zero_point)
    for q, error in [(found.quantized, found.error), (plain, found.plain_error)]:
        away = np.asarray(dequantize(q)) - w
        assert float(error) == pytest.approx(trace_error(away, moment), rel=1e-4)
        assert float(error) == pytest.approx(2 * np.mean(np.sum((x @ away) ** 2, 1)), rel=1e-3)


def test_inputs_it_has_not_seen_gain_too():
    x, w = layer(128, 48, 4096)
    found = run(w, second_moment(x[:2048]), "int4", group_size=64).quantized
    plain = plain_of(w, "int4", axis=0, group_size=64)
    ours, theirs = (
        np.sum((x[2048:] @ (np.asarray(dequantize(q)) - w)) ** 2) for q in (found, plain)
    )
    assert ours <= 0.6 * theirs


def test_independent_inputs_are_rounded_to_nearest():
    _, w = layer(12, 5, 64)
    moment = np.diag(np.arange(1, 13)).astype(np.float32)
    found = run(w, moment, "int4", group_size=4, symmetric=False)
    plain = plain_of(w, "int4", axis=0, group_size=4, symmetric=False)
    np.testing.assert_array_equal(found.quantized.values, plain.values)
    assert float(found.error) == float(found.plain_error)


def test_dead_inputs_are_rounded_to_nearest():
    x, w = layer(12, 5, 64)
    x = x.copy()
    x[:, [0, 7]] = 0
    found = run(w, second_moment(x), "int4")
    plain = plain_of(w, "int4", axis=0)
    np.testing.assert_array_equal(
        np.asarray(found.quantized.values)[[0, 7]], np.asarray(plain.values)[[0, 7]]
    )
    assert float(found.error) < float(found.plain_error)
    nothing = run(w, np.zeros((12, 12), np.float32), "int4")
    np.testing.assert_array_equal(nothing.quantized.values, plain.values)
    assert (float(nothing.error), float(nothing.plain_error)) == (0, 0)


def test_fewer_rows_than_inputs_need_damping_and_get_it():
    x, w = layer(64, 8, rows=8)
    found = run(w, second_moment(x), "int4", damp=0.0)
    assert float(found.damp) in (np.float32(1e-3), np.float32(1e-2))
    assert float(found.error) < float(found.plain_error)


def test_what_is_no_second_moment_gives_plain_rounding_and_says_so():
    _, w = layer(12, 5, 64)
    plain = plain_of(w, "int4", axis=0)
    indefinite = np.eye(12, dtype=np.float32) + 2 * np.eye(12, k=1, dtype=np.float32)
    indefinite += indefinite.T - 2 * np.eye(12, dtype=np.float32)  # eigenvalues of -4 to 4
    more = run(w, indefinite + np.eye(12, dtype=np.float32), "int4")
    assert 1 < float(more.damp) < 100
    np.testing.assert_array_equal(np.abs(np.asarray(more.quantized.values, np.int32)) <= 7, True)
    for bad in (np.nan, np.inf):
        moment = np.eye(12, dtype=np.float32)
        moment[3, 3] = bad
        found = run(w, moment, "int4")
        assert float(found.damp) == np.inf and not np.isfinite(float(found.error))
        np.testing.assert_array_equal(found.quantized.values, plain.values)


def test_the_factor_is_that_of_the_inverse():
    x, _ = layer(12, 5, 64)
    moment = second_moment(x)
    upper, damp = factor_of(moment, 0.01)
    mean = np.mean(np.diag(moment))
    expected = np.linalg.inv(moment.astype(np.float64) / mean + 0.01 * np.eye(12))
    np.testing.assert_allclose(upper.T @ upper, expected, rtol=1e-4, atol=1e-4)
    assert float(damp) == np.float32(0.01)
    np.testing.assert_array_equal(np.tril(upper, -1), 0)


def test_a_nan_in_a_weight_stays_in_its_column():
    x, w = layer(12, 5, 64)
    broken = w.copy()
    broken[3, 1] = np.nan
    moment = second_moment(x)
    found, whole = run(broken, moment, "int8").quantized, run(w, moment, "int8").quantized
    assert np.isnan(found.scale[0, 1])
    rest = [0, 2, 3, 4]
    np.testing.assert_array_equal(
        np.asarray(found.values)[:, rest], np.asarray(whole.values)[:, rest]
    )


def test_a_stack_of_layers_is_a_vmap():
    x, w = layer(12, 5, 64)
    weights, moments = np.stack([w, w[::-1]]), np.stack([second_moment(x), second_moment(x[:32])])
    stacked = jax.jit(jax.vmap(functools.partial(gptq, format="int4", group_size=4)))(
        weights, moments
    )
    for i in range(2):
        alone = run(weights[i], moments[i], "int4", group_size=4)
        np.testing.assert_array_equal(stacked.quantized.values[i], alone.quantized.values)
        np.testing.assert_array_equal(stacked.quantized.scale[i], alone.quantized.scale)


def test_the_program_does_not_grow_with_the_weight():
    def length(inputs: int) -> int:
        shapes = (
            jax.ShapeDtypeStruct((inputs, 8), jnp.float32),
            jax.ShapeDtypeStruct((inputs,) * 2, jnp.float32),
        )
        return sum(1 for _ in equations(jax.make_jaxpr(gptq)(*shapes).jaxpr))

    assert length(1536) == length(256)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"moment": np.eye(3, dtype=np.float32)},
            r"`weight` has shape \(4, 2\) and `moment` \(3, 3\)",
        ),
        ({"weight": np.ones((2, 4, 2), np.float32)}, r"`weight` has shape \(2, 4, 2\).*vmap"),
        ({"damp": -0.1}, "`damp` is -0.1, but must not be negative"),
        ({"group_size": 3}, "`group_size` 3 does not divide axis 0 of size 4"),
        ({"format": "float8_e4m3fn", "symmetric": False}, "needs an integer format"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    arguments = {"weight": np.ones((4, 2), np.float32), "moment": np.eye(4, dtype=np.float32)}
    with pytest.raises(ValueError, match=message):
        gptq(**{**arguments, **change})
