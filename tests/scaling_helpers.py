"""Training loops of Linen and of NNX behind one interface, for tests of scaling state."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import mpjax as mp

DENSE = {"linen": nn.Dense(8), "nnx": lambda rngs: nnx.Linear(8, 8, rngs=rngs)}
FROZEN = optax.sgd(0.0)  # the kernel's amax stays what it was
OPERANDS = ("input", "kernel", "output_grad")


def float8(history: int = 3, **options: Any) -> mp.QuantizedFloat8DTypePolicy:
    """Delayed scaling around float32, in which no amax is rounded before it is observed."""
    return mp.QuantizedFloat8DTypePolicy(
        "float8", "float32", amax_history_length=history, **options
    )


def inner_product(forward: Callable[..., Any], x: Any, cotangent: Any) -> Any:
    """A loss under which the gradient of the model's output is `cotangent`, exactly."""
    return jnp.sum(forward(x).astype(jnp.float32) * cotangent)


def mean_squared_error(forward: Callable[..., Any], x: Any, y: Any) -> Any:
    """The loss of a regression."""
    return jnp.mean((forward(x).astype(jnp.float32) - y) ** 2)


def peaked(amaxes: Any, rows: int = 4, features: int = 8, seed: int = 0) -> np.ndarray:
    """float32 [..., rows, features], for each number in `amaxes` [...] an array of that amax."""
    amaxes = np.asarray(amaxes, np.float32)
    shape = (*amaxes.shape, rows, features)
    x = np.random.default_rng(seed).integers(-8, 9, shape).astype(np.float32) / 16
    x[..., seed % rows, 3] = -1
    return x * amaxes[..., None, None]


def history(*amaxes: float, length: int = 3) -> np.ndarray:
    """What `amax_history` holds after steps that observed `amaxes`, by its definition."""
    entries = np.zeros(length, np.float32)
    for amax in amaxes:
        entries = np.roll(entries, -1)
        entries[0] = amax
    return entries


def amax(x: Any) -> np.float32:
    """The largest magnitude."""
    return np.float32(np.max(np.abs(np.asarray(x, np.float32))))


class LinenLoop:
    """A Linen model in training.

    Args:
      module: the model, not wrapped.
      policy: what to wrap it with.
      tx: the optimizer.
      *example: what `init` is called with.
      microbatches: parts of a batch; 0 takes it as a whole, by `value_and_grad`.
      seed: of the weights.
    """

    def __init__(self, module, policy, tx, *example, microbatches: int = 0, seed: int = 0):
        self.model, self._microbatches = _wrapped(module, policy), microbatches
        variables = _init(self.model, jax.random.key(seed), *example)
        self.carry = mp.TrainState.create(
            apply_fn=self.model.apply, variables=variables, tx=tx, policy=self.model.policy
        )

    def step(self, *batch: Any, loss: Callable[..., Any] = inner_product) -> mp.Gradients:
        """One step of `loss(forward, *batch)`; returns its gradients."""
        options = {"loss": loss, "microbatches": self._microbatches}
        self.carry, grads = _jitted_linen_step(self.carry, *batch, **options)
        return grads

    def forward(self, *inputs: Any) -> Any:
        """The model's output; nothing changes."""
        return _jitted_apply(self.model, self.carry.variables, *inputs)

    @property
    def states(self) -> dict[str, mp.ScalingState]:
        """The scaling states by `layer/operand`."""
        return by_path(self.carry.scaling, lambda x: isinstance(x, mp.ScalingState))

    @property
    def params(self) -> dict[str, Any]:
        """The parameters by `layer/name`."""
        return by_path(self.carry.params)

    @property
    def kept(self) -> Any:
        """What a step that is skipped must not change."""
        return jax.device_get((self.carry.variables, self.carry.opt_state, self.carry.step))

    @property
    def skipped_steps(self) -> int:
        return int(self.carry.skipped_steps)

    @property
    def loss_scale(self) -> float:
        return float(self.carry.loss_scale.scale)


def linen_step(
    state, *batch, loss=inner_product, microbatches=0, reduce=lambda x: x, around=lambda f: f
):
    """`(state, gradients)` after a step; a function of its arguments.

    Args:
      state: the `TrainState`.
      *batch: arrays.
      loss: of the forward pass and a batch.
      microbatches: parts of the batch; 0 takes it as a whole.
      reduce: applied to the gradients of the parameters.
      around: applied to the loss, a function of the variables and the batch.
    """

    def loss_fn(variables, batch):
        return loss(functools.partial(state.apply_fn, variables), *batch)

    loss_fn = around(loss_fn)
    if microbatches:
        _, grads = state.accumulate_gradients(loss_fn, batch, microbatches)
    else:
        _, grads = state.value_and_grad(lambda variables: loss_fn(variables, batch))
    grads = grads.replace(params=reduce(grads.params))
    return state.apply_gradients(grads), grads


class NnxLoop:
    """An NNX model in training; as `LinenLoop`, but `module` is a function of `nnx.Rngs`."""

    def __init__(self, module, policy, tx, *example, microbatches: int = 0, seed: int = 0):
        del example
        self.model = mp.wrap(module(nnx.Rngs(seed)), policy)
        self.optimizer = mp.nnx.Optimizer(self.model, tx, wrt=nnx.Param)
        self._microbatches = microbatches

    def step(self, *batch: Any, loss: Callable[..., Any] = inner_product) -> mp.Gradients:
        """One step of `loss(forward, *batch)`; returns its gradients."""
        options = {"loss": loss, "microbatches": self._microbatches}
        return _jitted_nnx_step(self.model, self.optimizer, *batch, **options)

    def forward(self, *inputs: Any) -> Any:
        """The model's output; nothing changes."""
        return _jitted_call(self.model, *inputs)

    @property
    def states(self) -> dict[str, mp.ScalingState]:
        """The scaling states by `layer/operand`."""
        pure = nnx.to_pure_dict(nnx.state(self.model, mp.nnx.Scaling))
        found = by_path(pure, lambda x: isinstance(x, mp.ScalingState))
        return {path.replace("scaling/", ""): state for path, state in found.items()}

    @property
    def params(self) -> dict[str, Any]:
        """The parameters by `layer/name`."""
        return by_path(nnx.to_pure_dict(nnx.state(self.model, nnx.Param)))

    @property
    def kept(self) -> Any:
        """What a step that is skipped must not change."""
        optimizer = self.optimizer
        model = nnx.state(self.model, nnx.Not(mp.nnx.LossScale))
        return jax.device_get(
            nnx.as_pure((model, nnx.state(optimizer.opt_state), optimizer.step[...]))
        )

    @property
    def skipped_steps(self) -> int:
        return int(self.optimizer.skipped_steps[...])

    @property
    def loss_scale(self) -> float:
        return float(self.model.loss_scale.get_value().scale)


def nnx_step(
    model,
    optimizer,
    *batch,
    loss=inner_product,
    microbatches=0,
    reduce=lambda x: x,
    around=lambda f: f,
):
    """The gradients of a step, in place; arguments as `linen_step`'s."""
    loss_fn = around(lambda model, batch: loss(model, *batch))
    if microbatches:
        _, grads = mp.nnx.accumulate_gradients(loss_fn, microbatches)(model, batch)
    else:
        _, grads = mp.nnx.value_and_grad(loss_fn)(model, batch)
    grads = grads.replace(params=reduce(grads.params))
    optimizer.update(model, grads)
    return grads


# One of each, so that loops of equal models and optimizers compile once.
_jitted_linen_step = jax.jit(linen_step, static_argnames=("loss", "microbatches"))
_jitted_nnx_step = nnx.jit(nnx_step, static_argnames=("loss", "microbatches"))
_jitted_apply = jax.jit(lambda model, *args: model.apply(*args), static_argnums=0)
_jitted_call = nnx.jit(lambda model, *args: model(*args))
_wrapped = functools.cache(mp.wrap)
_init = jax.jit(lambda model, *args: model.init(*args), static_argnums=0)

LOOPS = {"linen": LinenLoop, "nnx": NnxLoop}


def on_a_mesh(loop, batches, around_step=None, around_loss=lambda mesh, f: f):
    """The scaling states of a model of one layer after steps over all devices.

    Args:
      loop: a `LinenLoop` or `NnxLoop`; stays as it is.
      batches: pairs of arrays, to be split along their leading axis.
      around_step: a transform of `step(carry, x, c) -> carry`.
      around_loss: a transform of `loss(carry, batch)`.
    """
    mesh = jax.make_mesh((len(jax.devices()),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    reduce = functools.partial(jax.lax.pmean, axis_name="data") if around_step else lambda g: g
    options = {"reduce": reduce, "around": functools.partial(around_loss, mesh)}
    if isinstance(loop, NnxLoop):
        graph, carry = nnx.split((loop.model, loop.optimizer))
    else:
        graph, carry = None, loop.carry

    def step(carry, x, c):
        if graph is None:
            return linen_step(carry, x, c, **options)[0]
        model, optimizer = nnx.merge(graph, carry)
        nnx_step(model, optimizer, x, c, **options)
        return nnx.split((model, optimizer))[1]

    step = jax.jit((around_step or (lambda mesh, f: f))(mesh, step))
    carry = jax.device_put(carry, NamedSharding(mesh, P()))
    for x, c in batches:
        x, c = (jax.device_put(a, NamedSharding(mesh, P("data"))) for a in (x, c))
        carry = step(carry, x, c)
    return carry.scaling if graph is None else nnx.as_pure(carry[0])["scaling"]


def in_a_shard_map(check_vma):
    """For `on_a_mesh`: each device runs the step on its own part of the batch."""

    def around(mesh, step):
        specs = (P(), P("data"), P("data"))
        return jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=check_vma)

    return around


def unequal_batches():
    """Two batches of two rows for each device.

    The first device holds the largest input, the last one the largest cotangent.
    """
    n = len(jax.devices())
    sizes = np.arange(1, n + 1)
    for step in (1, 2):
        x, c = peaked(step * sizes[::-1], rows=2), peaked(10 * sizes, rows=2)
        yield x.reshape(-1, 8), c.reshape(-1, 8)


def dense(api: str, tx: Any, policy: Any = None, **options: Any) -> Any:
    """The loop of one layer of 8 features."""
    return LOOPS[api](DENSE[api], policy or float8(), tx, peaked(1), **options)


def by_path(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """The leaves of nested mappings, as NumPy arrays, by their paths `a/b/c`."""
    leaves = jax.tree.leaves_with_path(tree, is_leaf=is_leaf)
    return {
        "/".join(str(getattr(key, "key", key)) for key in path): jax.device_get(leaf)
        for path, leaf in leaves
    }
