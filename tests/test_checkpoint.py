"""Checkpoints: restored bit for bit, resumed bit for bit, and into what was saved only."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import mpjax as mp

DATA = [jax.random.normal(jax.random.key(i), (8, 16)) for i in range(6)]
TX = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))


def float8(source: str = "mixed_float16", **config) -> mp.QuantizedFloat8DTypePolicy:
    config = {"amax_history_length": 4, **config}
    return mp.QuantizedFloat8DTypePolicy("float8", source, **config)


def assert_same(one, other):
    """The same structure, dtypes and bits."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert type(a) is type(b)
        if isinstance(a, jax.Array) and jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            assert a.dtype == b.dtype
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        a, b = np.asarray(a), np.asarray(b)
        assert (a.shape, a.dtype, a.tobytes()) == (b.shape, b.dtype, b.tobytes())


class Net(nn.Module):
    width: int = 32

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(self.width)(x))
        return nn.Dense(4)(nn.gelu(x))


MODEL = mp.wrap(Net(), float8())


@functools.cache
def variables_of(model):
    return jax.jit(model.init)(jax.random.key(0), DATA[0])


def linen_state(model=MODEL, tx=TX) -> mp.TrainState:
    return mp.TrainState.create(
        apply_fn=model.apply,
        variables=variables_of(model),
        tx=tx,
        policy=model.policy,
    )


@jax.jit
def linen_step(state: mp.TrainState, x) -> mp.TrainState:
    def loss_fn(variables):
        y, updates = state.apply_fn(variables, x, train=True, mutable=["batch_stats"])
        return jnp.mean(y.astype(jnp.float32) ** 2), updates

    (_, updates), grads = state.value_and_grad(loss_fn, has_aux=True)
    return state.apply_gradients(grads, collections=updates)


class NNXNet(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(16, 32, rngs=rngs)
        self.norm = nnx.BatchNorm(32, rngs=rngs)
        self.dropout = nnx.Dropout(0.3, rngs=rngs)
        self.last = nnx.Linear(32, 4, rngs=rngs)
        self.tied = self.last

    def __call__(self, x):
        x = self.dropout(nnx.gelu(self.norm(self.first(x))))
        return self.last(x) + self.tied(x)


def nnx_pair(policy=None):
    model = mp.wrap(NNXNet(nnx.Rngs(0, dropout=1)), policy or float8())
    return model, mp.nnx.Optimizer(model, TX, wrt=nnx.Param)


@nnx.jit
def nnx_step(model, optimizer, x):
    def loss_fn(model, x):
        return jnp.mean(model(x).astype(jnp.float32) ** 2)

    _, grads = mp.nnx.value_and_grad(loss_fn)(model, x)
    optimizer.update(model, grads)


def states(*nodes):
    return [nnx.as_pure(nnx.state(node)) for node in nodes]


def copies(*nodes):
    return jax.tree.map(jnp.copy, states(*nodes))


def test_a_train_state_comes_back_and_goes_on_bit_for_bit(tmp_path):
    state = linen_state()
    for x in DATA[:3]:
        state = linen_step(state, x)
    assert mp.save_checkpoint(tmp_path / "run", state) == tmp_path / "run" / "3"
    restored = mp.restore_checkpoint(tmp_path / "run", linen_state())
    assert_same(restored, state)
    assert int(restored.step) == 3 and float(restored.loss_scale.scale) == 2.0**15
    assert {"params", "batch_stats", "scaling"} == set(restored.variables)
    for x in DATA[3:]:
        state, restored = linen_step(state, x), linen_step(restored, x)
    assert int(state.step) == 6
    assert_same(restored, state)


def test_nnx_objects_come_back_in_place_and_go_on_bit_for_bit(tmp_path):
    model, optimizer = nnx_pair()
    for x in DATA[:3]:
        nnx_step(model, optimizer, x)
    assert mp.save_checkpoint(tmp_path, (model, optimizer)).name == "3"
    fresh = nnx_pair()
    kernel = fresh[0].first.kernel
    returned = mp.restore_checkpoint(tmp_path, fresh)
    assert returned[0] is fresh[0] and returned[1] is fresh[1] and fresh[0].first.kernel is kernel
    assert fresh[0].tied is fresh[0].last
    assert_same(states(*fresh), states(model, optimizer))
    for x in DATA[3:]:
        nnx_step(model, optimizer, x)
    after = copies(model, optimizer)
    mp.restore_checkpoint(tmp_path, (model, optimizer))
    assert_same(states(*fresh), states(model, optimizer))
    for x in DATA[3:]:
        nnx_step(model, optimizer, x)
    assert int(optimizer.step[...]) == 6
    assert [6] == [int(x) for x in jax.tree.leaves(nnx.state(model, nnx.RngCount))]
    assert_same(states(model, optimizer), after)


def test_nnx_objects_and_arrays_in_a_dict(tmp_path):
    model, optimizer = nnx_pair()
    model.first.kernel[...] += 1
    optimizer.step[...] += 9
    saved = {"model": model, "optimizer": optimizer, "rng": jax.random.key(7), "epoch": 2}
    assert mp.save_checkpoint(tmp_path, saved).name == "9"
    other, its_optimizer = nnx_pair()
    template = {"model": other, "optimizer": its_optimizer, "rng": jax.random.key(0), "epoch": 0}
    restored = mp.restore_checkpoint(tmp_path, template)
    assert restored["model"] is other and restored["epoch"] == 2 and template["epoch"] == 0
    assert_same(restored["rng"], jax.random.key(7))
    assert_same(states(other, its_optimizer), states(model, optimizer))


def test_every_kind_of_leaf_bit_for_bit(tmp_path):
    bits = np.arange(256, dtype=np.uint8)
    tree = {
        "bfloat16": jax.lax.bitcast_convert_type(jnp.arange(1 << 16, dtype=jnp.uint16), "bfloat16"),
        "float8_e4m3fn": jax.lax.bitcast_convert_type(bits, jnp.float8_e4m3fn),
        "float8_e5m2": jax.lax.bitcast_convert_type(bits, jnp.float8_e5m2),
        "int8": jnp.asarray(bits).astype(jnp.int8),
        "int4": jnp.arange(-8, 8).astype(jnp.int4),
        "float32": jnp.asarray([np.nan, -np.nan, np.inf, -0.0, 1e-45], jnp.float32),
        "empty": jnp.zeros((3, 0), jnp.bfloat16),
        "keys": jax.random.split(jax.random.key(1, impl="rbg"), 3),
        "numpy": np.asarray([1e300, -0.0]),
        "number": np.float16(2.5),
        "python": (3, 2.5, True),
        "none": None,
    }
    mp.save_checkpoint(tmp_path, tree, step=0)
    assert_same(mp.restore_checkpoint(tmp_path, tree), tree)


def test_a_template_may_be_abstract(tmp_path):
    tree = {"x": jnp.ones((2,), jnp.bfloat16), "key": jax.random.key(3), "empty": jnp.zeros((0,))}
    mp.save_checkpoint(tmp_path, tree, step=1)
    assert_same(mp.restore_checkpoint(tmp_path, jax.eval_shape(lambda: tree)), tree)


def test_arrays_go_where_the_template_has_them(tmp_path):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = NamedSharding(mesh, PartitionSpec("data"))
    x, keys = jnp.arange(8.0), jax.random.split(jax.random.key(0), 4)
    mp.save_checkpoint(tmp_path, {"x": x, "keys": keys, "step": jnp.asarray(0)}, step=0)
    template = {
        "x": jax.device_put(jnp.zeros(8), sharded),
        "keys": jax.device_put(keys, sharded),
        "step": jnp.asarray(1),
    }
    restored = mp.restore_checkpoint(tmp_path, template)
    assert restored["x"].sharding == sharded and restored["keys"].sharding == sharded
    assert_same((restored["x"], restored["keys"]), (x, keys))
    # `step` is bound to no device, so it may be computed with together with sharded arrays.
    assert float(jax.jit(lambda t: t["x"].sum() + t["step"])(restored)) == 28
    mp.save_checkpoint(tmp_path, restored, step=1)
    assert_same(mp.restore_checkpoint(tmp_path, template), restored)


def template_of(policy, width=32, tx=TX):
    """A state that is never computed."""
    model = mp.wrap(Net(width), policy)

    def create():
        variables = model.init(jax.random.key(0), DATA[0])
        return mp.TrainState.create(apply_fn=model.apply, variables=variables, tx=tx, policy=policy)

    return jax.eval_shape(create)


@pytest.fixture(scope="module")
def of_float8(tmp_path_factory):
    """A directory with a checkpoint of step 0."""
    directory = tmp_path_factory.mktemp("float8")
    mp.save_checkpoint(directory, linen_state())
    return directory


SCALING = "variables/scaling/Dense_0/input"


@pytest.mark.parametrize(
    ("template", "lines"),
    [
        (
            lambda: template_of(float8(amax_history_length=8)),
            [f"{SCALING}/amax_history: float32[4] in the checkpoint, float32[8] in the template"],
        ),
        (
            lambda: template_of(float8(), width=16),
            [
                "variables/params/Dense_0/kernel: float32[16, 32] in the checkpoint, "
                "float32[16, 16] in the template",
                "and 7 more",
            ],
        ),
        (
            lambda: template_of(float8(), tx=optax.sgd(0.1)),
            ["opt_state/1/0/count: int32[] in the checkpoint, absent from the template"],
        ),
        (
            lambda: template_of(mp.DTypePolicy("mixed_float16")),
            [f"{SCALING}: DelayedScaling of float8_e4m3fn in the checkpoint, absent from the"],
        ),
        (
            lambda: template_of(float8("mixed_bfloat16")),
            ["loss_scale: DynamicLossScale in the checkpoint, NoLossScale in the template"],
        ),
        (
            lambda: {"x": jnp.zeros(())},
            ["step: int32[] in the checkpoint, absent from the template"],
        ),
    ],
    ids=["history", "model", "optimizer", "policy", "loss scale", "another tree"],
)
def test_a_checkpoint_of_something_else(of_float8, template, lines):
    with pytest.raises(ValueError, match="checkpoint of step 0 in .* does not fit") as error:
        mp.restore_checkpoint(of_float8, template())
    for line in lines:
        assert line in str(error.value)
    assert "Make the template with the model, policy and optimizer" in str(error.value)


def test_a_margin_may_change(of_float8):
    restored = mp.restore_checkpoint(of_float8, template_of(float8(margin=1)))
    assert restored.scaling["Dense_0"]["input"].recipe.margin == 1
    assert_same(restored.params, linen_state().params)


def test_dtypes_are_never_cast(tmp_path):
    mp.save_checkpoint(tmp_path, [jnp.ones(2, jnp.bfloat16)], step=0)
    with pytest.raises(ValueError, match=r"0: bfloat16\[2\] in the checkpoint, float32\[2\] in"):
        mp.restore_checkpoint(tmp_path, [jnp.ones(2)])


def test_a_refused_checkpoint_leaves_an_nnx_model_as_it_was(tmp_path):
    model, optimizer = nnx_pair()
    mp.save_checkpoint(tmp_path, (model, optimizer))
    other, its_optimizer = nnx_pair(float8(amax_history_length=2))
    other.first.kernel[...] += 1
    before = copies(other, its_optimizer)
    with pytest.raises(ValueError, match="0/first/scaling/input/amax_history: float32"):
        mp.restore_checkpoint(tmp_path, (other, its_optimizer))
    assert_same(states(other, its_optimizer), before)
