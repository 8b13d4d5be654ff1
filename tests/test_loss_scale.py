"""Loss scales that train: the sequence of scales, the state, what is scaled and unscaled."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import mpjax as mp
from mpjax._loss_scale import get_loss_scale, serialize_loss_scale, training_loss_scale


def trajectory(config, finite: str) -> list[tuple[float, int]]:
    """(scale, finite_steps) after each step, `.` being finite and `x` not."""
    update = jax.jit(mp.LossScaleState.update)
    state, seen = config.init(), []
    for step in finite:
        state = update(state, step == ".")
        seen.append((float(state.scale), int(state.finite_steps)))
    return seen


# -- the sequence of scales


def test_grows_on_exactly_the_period_th_finite_step_and_then_counts_anew():
    config = mp.DynamicLossScale(initial_scale=8, period=3, factor=4)
    assert trajectory(config, ".......") == [
        *((8, 1), (8, 2), (32, 0)),
        *((32, 1), (32, 2), (128, 0)),
        (128, 1),
    ]


def test_a_period_of_one_grows_at_every_finite_step():
    config = mp.DynamicLossScale(initial_scale=2, period=1)
    assert trajectory(config, "..x.") == [(4, 0), (8, 0), (4, 0), (8, 0)]


def test_a_non_finite_step_shrinks_the_scale_and_restarts_the_count():
    config = mp.DynamicLossScale(initial_scale=64, period=3)
    assert trajectory(config, "..x..x...") == [
        *((64, 1), (64, 2), (32, 0)),
        *((32, 1), (32, 2), (16, 0)),
        *((16, 1), (16, 2), (32, 0)),
    ]


def test_the_scale_stops_at_its_floor():
    config = mp.DynamicLossScale(initial_scale=8, factor=4, min_scale=0.75)
    assert trajectory(config, "xxx") == [(2, 0), (0.75, 0), (0.75, 0)]
    assert trajectory(mp.DynamicLossScale(initial_scale=4), "xxxx")[-2:] == [(1, 0), (1, 0)]


def test_the_scale_never_grows_to_infinity():
    """2**127 * 2 is Inf in float32: the scale stays, and counts its next period from there."""
    config = mp.DynamicLossScale(initial_scale=2.0**126, period=2)
    assert trajectory(config, "......x") == [
        *((2.0**126, 1), (2.0**127, 0)),
        *((2.0**127, 1), (2.0**127, 0)),
        *((2.0**127, 1), (2.0**127, 0)),
        (2.0**126, 0),
    ]


def test_the_defaults_grow_after_2000_steps_from_2_to_the_15():
    def body(state, finite):
        state = state.update(finite)
        return state, state.scale

    _, scales = jax.lax.scan(body, mp.DynamicLossScale().init(), jnp.ones(4000, bool))
    assert np.flatnonzero(np.diff(scales)).tolist() == [1998, 3998]
    assert [float(scales[i]) for i in (0, 1998, 1999, 3999)] == [2**15, 2**15, 2**16, 2**17]


@pytest.mark.parametrize(
    ("config", "scale"), [(mp.StaticLossScale(6), 6.0), (mp.NoLossScale(), 1.0)]
)
def test_static_and_no_loss_scale_never_change(config, scale):
    assert trajectory(config, "..xx.x") == [(scale, 0)] * 6


def reference(config, finite: list[bool]) -> list[tuple[float, int]]:
    """The rule in plain Python, on NumPy's float32 scalars."""
    scale, count, seen = np.float32(config.initial_scale), 0, []
    for step in finite:
        if not step:
            scale = max(scale / np.float32(config.factor), np.float32(config.min_scale))
            count = 0
        elif count + 1 < config.period:
            count += 1
        else:
            with np.errstate(over="ignore"):
                grown = scale * np.float32(config.factor)
            scale, count = (grown if math.isfinite(grown) else scale), 0
        seen.append((float(scale), count))
    return seen


CONFIGS = (
    mp.DynamicLossScale(period=3),
    mp.DynamicLossScale(initial_scale=4, period=1),
    mp.DynamicLossScale(initial_scale=10, period=2, factor=1.7, min_scale=0.3),
    mp.DynamicLossScale(initial_scale=3e38, period=2, factor=1.1),
)


@jax.jit
def run(state, finite):
    def body(state, step):
        state = state.update(step)
        return state, (state.scale, state.finite_steps)

    return jax.lax.scan(body, state, finite)[1]


@settings(deadline=None, max_examples=60)
@given(config=st.sampled_from(CONFIGS), finite=st.lists(st.booleans(), min_size=24, max_size=24))
@example(config=CONFIGS[3], finite=[True] * 24)
@example(config=CONFIGS[2], finite=[False] * 24)
def test_any_sequence_is_that_of_the_rule_in_plain_python(config, finite):
    scales, counts = run(config.init(), jnp.asarray(finite))
    assert list(zip(scales.tolist(), counts.tolist(), strict=True)) == reference(config, finite)


# -- the state


def test_a_custom_min_scale_survives_jit_and_tree_map():
    """Regression. A loss scale in another library is a pytree whose hand-written flatten lists
    the scale, the counter, the period and the factor but forgets the minimum. The first `jit` or
    `tree_map` that the state passes through therefore rebuilds it with the default minimum of 1,
    silently: a user who asked for a floor of 64 gets 1, and one who asked for 2**-4 never gets
    below 1. Here three non-finite steps under jit go 128 -> 64 -> 64 -> 64, and every field
    survives each way of rebuilding the state."""
    config = mp.DynamicLossScale(initial_scale=128, period=7, factor=2, min_scale=64)
    assert trajectory(config, "xxx") == [(64, 0), (64, 0), (64, 0)]
    below_one = mp.DynamicLossScale(initial_scale=1, min_scale=2**-4)
    assert trajectory(below_one, "xxxxx")[-2:] == [(2**-4, 0), (2**-4, 0)]
    state = config.init()
    leaves, treedef = jax.tree.flatten(state)
    for rebuilt in (
        jax.jit(lambda s: s)(state),
        jax.tree.map(lambda x: x, state),
        jax.tree.unflatten(treedef, leaves),
        jax.lax.scan(lambda s, _: (s, None), state, length=2)[0],
        jax.eval_shape(lambda s: s, state),
    ):
        assert isinstance(rebuilt, mp.LossScaleState)
        assert rebuilt.config == config


def test_the_state_is_two_plain_arrays():
    state = mp.DynamicLossScale().init()
    assert [(x.dtype, x.shape) for x in jax.tree.leaves(state)] == [
        (jnp.float32, ()),
        (jnp.int32, ()),
    ]
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(state)]
    assert paths == [".scale", ".finite_steps"]


# -- scaling a loss and unscaling gradients


@pytest.mark.parametrize(
    ("dtype", "result"),
    [("float16", "float32"), ("bfloat16", "float32"), ("float32", "float32")],
)
def test_a_half_loss_is_scaled_in_float32(strict_promotion, dtype, result):
    """4 * 2**15 is 2**17, beyond float16's largest number, 65504."""
    loss = mp.DynamicLossScale().init().scale_loss(jnp.asarray(4, dtype))
    assert loss.dtype == result
    assert float(loss) == 2.0**17


@pytest.mark.parametrize("loss", [jnp.int32(3), jnp.array(True), jnp.complex64(1j)])
def test_only_a_floating_loss_is_scaled(loss):
    message = f"`loss` has dtype {loss.dtype}: only a floating loss can be scaled"
    with pytest.raises(TypeError, match=message):
        mp.DynamicLossScale().init().scale_loss(loss)


def test_unscaling_keeps_every_dtype_but_float16(strict_promotion):
    tree = {
        "half": jnp.asarray([2.0**-10, 3.0], jnp.float16),
        "brain": jnp.asarray([2.0**-100, 3.0], jnp.bfloat16),
        "single": jnp.float32([2.0**-100, 3.0]),
        "complex": jnp.complex64([8 - 16j]),
        "count": jnp.int32([8]),
        "key": jax.random.key(0),
        "none": None,
    }
    out = jax.jit(mp.StaticLossScale(2**15).init().unscale)(tree)
    assert out["half"].dtype == jnp.float32
    assert out["half"].tolist() == [2.0**-25, 3 * 2.0**-15]
    assert out["brain"].dtype == jnp.bfloat16
    assert out["brain"].tolist() == [2.0**-115, 3 * 2.0**-15]
    assert out["single"].dtype == jnp.float32
    assert out["single"].tolist() == [2.0**-115, 3 * 2.0**-15]
    assert out["complex"].dtype == jnp.complex64
    assert out["complex"].tolist() == [2.0**-12 - 2.0**-11 * 1j]
    assert out["count"].tolist() == [8]
    assert out["key"] == tree["key"]
    assert out["none"] is None


def test_a_bfloat16_gradient_is_divided_in_float32():
    """By a scale of 257, which would be 256 in bfloat16: 512 / 257 is 255 / 128, not 2."""
    gradient = jnp.asarray([512.0, 1024.0], jnp.bfloat16)
    assert mp.StaticLossScale(257).init().unscale(gradient).tolist() == [255 / 128, 255 / 64]


@pytest.mark.parametrize(
    ("leaf", "finite"),
    [
        (np.float32([1, 2]), True),
        (np.float32([1, np.inf]), False),
        (np.float32([-np.inf, 1]), False),
        (np.float16([np.nan]), False),
        (jnp.asarray([1, np.nan], jnp.bfloat16), False),
        (jnp.asarray([1, np.nan], jnp.float8_e4m3fn), False),
        (np.complex64([1 + 1j]), True),
        (np.complex64([complex(1, np.inf)]), False),
        (np.complex64([complex(np.nan, 1)]), False),
        (np.int32([2**31 - 1]), True),
        (np.zeros((0, 3), np.float32), True),
        (np.zeros(2, jax.dtypes.float0), True),
        (float("nan"), False),
        (None, True),
    ],
)
def test_all_finite(leaf, finite):
    assert bool(mp.all_finite({"a": np.float32([0]), "b": leaf})) is finite


@pytest.mark.parametrize("place", range(5))
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_all_finite_looks_at_every_leaf_of_many(place, bad):
    shapes, dtypes = [(), (3,), (2, 5), (70, 70), (4,)], ["float32", "bfloat16", "float16"] * 2
    leaves = [np.full(shape, 2, dtype) for shape, dtype in zip(shapes, dtypes, strict=False)]
    assert mp.all_finite(leaves)
    leaves[place] = leaves[place].copy()
    leaves[place].flat[leaves[place].size - 1] = bad
    assert not mp.all_finite(leaves)


def test_all_finite_looks_at_leaves_of_few_numbers_at_once():
    tree = {str(size): jnp.ones(size) for size in range(1, 40)} | {"weight": jnp.ones((80, 80))}
    text = jax.jit(mp.all_finite).lower(tree).as_text()
    assert text.count("stablehlo.reduce(") == 3  # of those of few, of the weight, of both sums


@pytest.mark.parametrize("mesh_type", [jax.sharding.AxisType.Explicit, jax.sharding.AxisType.Auto])
def test_all_finite_of_leaves_that_are_sharded_differently(mesh_type):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(mesh_type,))
    with jax.set_mesh(mesh):
        sharded = jax.device_put(jnp.ones(4), jax.NamedSharding(mesh, jax.P("data")))
        assert jax.jit(mp.all_finite)([sharded, jnp.ones(3), jnp.ones(4)])
        assert not jax.jit(mp.all_finite)([sharded * jnp.nan, jnp.ones(3), jnp.ones(4)])


def test_all_finite_in_a_shard_map_of_what_varies_and_what_does_not():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def each(x, y):
        return jax.lax.psum(mp.all_finite([x, y, y * 2]).astype(jnp.int32), "data")

    finite = jax.shard_map(each, mesh=mesh, in_specs=(jax.P("data"), jax.P()), out_specs=jax.P())
    assert jax.jit(finite)(jnp.ones(4), jnp.ones(3)) == 2
    assert jax.jit(finite)(jnp.ones(4).at[3].set(jnp.nan), jnp.ones(3)) == 1


def test_all_finite_is_an_array_of_one_bool():
    for tree in ({}, None, [np.int32(1)], [np.float32(1)]):
        found = mp.all_finite(tree)
        assert (found.shape, found.dtype, bool(found)) == ((), jnp.bool_, True)


# -- NoLossScale, and numbers that float32 must hold


def test_no_loss_scale_is_a_loss_scale_like_others():
    assert training_loss_scale(None) == mp.NoLossScale()
    assert training_loss_scale("dynamic") == mp.DynamicLossScale()
    written = json.loads(json.dumps(serialize_loss_scale(mp.NoLossScale())))
    assert written == {"class_name": "NoLossScale", "config": {}}
    assert get_loss_scale(written) == mp.NoLossScale()
    policy = mp.DTypePolicy("mixed_float16", loss_scale=mp.NoLossScale())
    assert mp.deserialize(mp.serialize(policy)).loss_scale == mp.NoLossScale()
    assert mp.DTypePolicy("mixed_bfloat16", loss_scale=mp.NoLossScale()).loss_scale is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"initial_scale": 1e39}, "`initial_scale` must be finite in float32. Received: 1e\\+39"),
        ({"factor": 1 + 1e-9}, "`factor` must be greater than 1. Received: 1.000000001"),
        ({"min_scale": 1e-40}, "`min_scale` must be at least 1.17549435e-38, the smallest normal"),
        ({"period": 2**31}, "`period` must be at most 2147483647. Received: 2147483648"),
    ],
)
def test_numbers_that_float32_or_int32_does_not_hold_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        mp.DynamicLossScale(**arguments)
    with pytest.raises(ValueError, match="`scale` must be finite in float32. Received: 1e"):
        mp.StaticLossScale(1e39)
