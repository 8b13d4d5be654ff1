"""The contenders of `train_step.py`: one model, one optimizer, trained as each library documents.

Packages are imported by name when a contender is built, so that one that is missing is an entry
with its error.
"""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.training.train_state import TrainState

import mpjax as mp

# Plain SGD is the least an optimizer can do, a pass over the weights, and is the same for all: one
# with moments would add the same memory traffic to both sides of every ratio.
OPTIMIZER = optax.sgd(2e-5)

# Relative errors of the gradient of all weights, norm over norm, against float32. That of a weight
# multiplies an input and a gradient: rounding to E4M3 leaves 0.025 of the one and to E5M2 0.05 of
# the other, together 0.056; int8 with a scale for 512 Gaussians leaves 0.0075 of each, 0.011.
# The rest is what the layers before and after leave, and scales per tensor.
BFLOAT16_BOUND, INT8_BOUND, FLOAT8_BOUND = 0.01, 0.03, 0.1
# What attention and norms in 16 bits, which all contenders but float32 have, add to each of them.
ATTENTION_BOUND = 0.05

State = Any
Gradients = Any


@dataclass(frozen=True)
class Case:
    """Blocks `x + Dense(width)(gelu(Dense(hidden)(x)))` and the rows that go through them."""

    width: int
    hidden: int
    batch: int
    blocks: int = 4

    more_error = 0.0  # than that of a product, in 16 bits

    def __str__(self) -> str:
        return f"mlp {self.blocks}x({self.width}, {self.hidden}) batch {self.batch}"

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what goes in, and comes out."""
        return self.batch, self.width

    def model(self, *options: Any) -> nn.Module:
        """The model, in the dtypes and with the product given."""
        return MLP(self, *options)


@dataclass(frozen=True)
class TransformerCase:
    """Pre-norm blocks of causal attention and an MLP four times as wide, and their sequences."""

    width: int
    heads: int
    batch: int
    tokens: int
    blocks: int = 4

    more_error = ATTENTION_BOUND

    def __str__(self) -> str:
        return f"transformer {self.blocks}x{self.width} batch {self.batch}x{self.tokens}"

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what goes in, and comes out."""
        return self.batch, self.tokens, self.width

    def model(self, *options: Any) -> nn.Module:
        """The model, in the dtypes and with the product given."""
        return Transformer(self, *options)


class MLP(nn.Module):
    """The model; `stream` is the dtype of what is added up from block to block."""

    case: Case
    stream: Any
    dtype: Any = None
    dot_general_cls: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dense = partial(nn.Dense, dtype=self.dtype, dot_general_cls=self.dot_general_cls)
        x = x.astype(self.stream)
        for _ in range(self.case.blocks):
            x = x + dense(self.case.width)(nn.gelu(dense(self.case.hidden)(x)))
        return x


class Transformer(nn.Module):
    """The model; on a GPU 16-bit attention is cuDNN's, for everyone."""

    case: TransformerCase
    stream: Any
    dtype: Any = None
    dot_general_cls: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dense = partial(nn.Dense, dtype=self.dtype, dot_general_cls=self.dot_general_cls)
        norm = partial(nn.LayerNorm, dtype=self.dtype)
        case, x = self.case, x.astype(self.stream)
        for _ in range(case.blocks):
            h = norm()(x)
            heads = (*x.shape[:2], case.heads, case.width // case.heads)
            q, k, v = (dense(case.width)(h).reshape(heads) for _ in range(3))
            x = x + dense(case.width)(_attention(q, k, v).reshape(x.shape))
            x = x + dense(case.width)(nn.gelu(dense(4 * case.width)(norm()(x))))
        return x


def _attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    fused = jax.default_backend() == "gpu" and q.dtype.itemsize == 2
    return jax.nn.dot_product_attention(
        q, k, v, is_causal=True, implementation="cudnn" if fused else "xla"
    )


@dataclass(frozen=True)
class Training:
    """How a library trains the model; all four are traced.

    Attributes:
        init: From a key and inputs to the state.
        gradients: From the state, inputs and targets to the loss and whatever `apply` takes.
        apply: From the state and what `gradients` returned to the next state.
        weights: From either of the two to the tree of the parameters in it.
    """

    init: Callable[[jax.Array, jax.Array], State]
    gradients: Callable[[State, jax.Array, jax.Array], tuple[jax.Array, Gradients]]
    apply: Callable[[State, Gradients], State]
    weights: Callable[[Any], Any]

    def step(self, state: State, x: jax.Array, y: jax.Array) -> tuple[State, jax.Array]:
        """What is timed: one step, and the loss before it."""
        loss, gradients = self.gradients(state, x, y)
        return self.apply(state, gradients), loss


@dataclass(frozen=True)
class Contender:
    """We or a peer.

    Attributes:
        build: From the case to how it is trained.
        package: Whose version stands in the row.
        bound: The largest relative error of the first gradient.
        note: What a reader must know to compare it.
    """

    build: Callable[[Any], Training]
    package: str
    bound: float
    note: str = ""


def loss_of(apply: Callable[..., Any]) -> Callable[..., jax.Array]:
    """The squared error, summed over the features.

    A mean over them would make the gradients so small that E5M2 has only zeros for them until
    Flax, whose scales start at one, has seen the first.
    """

    def loss(variables: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        error = apply(variables, x).astype(jnp.float32) - y
        return jnp.mean(jnp.sum(jnp.square(error), axis=-1))

    return loss


def flax_training(model: nn.Module) -> Training:
    """Flax's `TrainState`, which also replaces what Flax float8 overwrites with gradients."""

    def init(key: jax.Array, x: jax.Array) -> TrainState:
        variables = model.init(key, x)
        return TrainState.create(apply_fn=model.apply, params=variables, tx=OPTIMIZER)

    return Training(
        init,
        lambda state, x, y: jax.value_and_grad(loss_of(state.apply_fn))(state.params, x, y),
        lambda state, gradients: state.apply_gradients(grads=gradients),
        lambda tree: (tree.params if isinstance(tree, TrainState) else tree)["params"],
    )


def our_training(policy: str, dtype: Any, case: Case | TransformerCase) -> Training:
    """The wrapped model with our `TrainState`."""
    model = mp.wrap(case.model(dtype), policy)

    def init(key: jax.Array, x: jax.Array) -> Any:
        variables = model.init(key, x)
        return mp.TrainState.create(
            apply_fn=model.apply, variables=variables, tx=OPTIMIZER, policy=policy
        )

    def gradients(state: Any, x: jax.Array, y: jax.Array) -> tuple[jax.Array, Any]:
        loss = loss_of(state.apply_fn)
        return state.value_and_grad(lambda variables: loss(variables, x, y))

    return Training(
        init,
        gradients,
        lambda state, gradients: state.apply_gradients(gradients),
        lambda tree: tree.params,
    )


def plain(dtype: Any, case: Case | TransformerCase) -> Training:
    """Flax layers that compute in a dtype."""
    return flax_training(case.model(dtype, dtype))


def flax_float8(dtype: Any, case: Case | TransformerCase) -> Training:
    """Flax's current float8 operation: delayed scales per tensor, histories of 1024."""
    return flax_training(case.model(dtype, dtype, nn.Fp8DotGeneral))


def qwix(forward: str, backward: str, dtype: Any, case: Case | TransformerCase) -> Training:
    """Qwix's quantized training of a Linen model."""
    package = importlib.import_module("qwix")
    rule = package.QtRule(
        module_path=".*", weight_qtype=forward, act_qtype=forward, bwd_qtype=backward
    )
    model = package.quantize_model(case.model(dtype, dtype), package.QtProvider([rule]))
    return flax_training(model)


def aqt(dtype: Any, case: Case | TransformerCase) -> Training:
    """AQT in the layers, all three products in int8."""
    config = importlib.import_module("aqt.jax.v2.config")
    layers = importlib.import_module("aqt.jax.v2.flax.aqt_flax")
    settings = config.fully_quantized(fwd_bits=8, bwd_bits=8, use_stochastic_rounding=False)
    # It asks for a key only to round stochastically.
    operation = partial(layers.AqtDotGeneral, settings, prng_name=None)
    return flax_training(case.model(dtype, dtype, operation))


def _ours() -> dict[str, Contender]:
    dtypes = {
        "float8_from_mixed_bfloat16": jnp.bfloat16,
        "float8_from_float32": jnp.float32,
        "float8_current_from_mixed_bfloat16": jnp.bfloat16,
    }
    return {
        policy: Contender(partial(our_training, policy, dtype), "mpjax", FLOAT8_BOUND)
        for policy, dtype in dtypes.items()
    }


def _peers() -> dict[str, Contender]:
    e4m3, e5m2 = "float8_e4m3fn", "float8_e5m2"
    peers = {
        "float32": Contender(partial(plain, jnp.float32), "flax", 0.0),
        "bfloat16": Contender(partial(plain, jnp.bfloat16), "flax", BFLOAT16_BOUND),
    }
    for dtype in (jnp.bfloat16, jnp.float32):
        delayed, current = "delayed scales per tensor", "current scales per channel"
        of_dtype = {
            "flax_float8": (partial(flax_float8, dtype), "flax", delayed),
            "qwix_float8": (partial(qwix, e4m3, e5m2, dtype), "qwix", current),
            "qwix_int8": (partial(qwix, "int8", "int8", dtype), "qwix", current),
            "aqt_int8": (partial(aqt, dtype), "aqtp", current),
        }
        for name, (build, package, note) in of_dtype.items():
            bound = INT8_BOUND if "int8" in name else FLOAT8_BOUND
            peers[f"{name}_{jnp.dtype(dtype).name}"] = Contender(build, package, bound, note)
    return peers


OURS, PEERS = _ours(), _peers()
CONTENDERS = OURS | PEERS


def chosen(names: Sequence[str] | None) -> dict[str, Contender]:
    """The contenders of these names, in the order of the table; all of them if None."""
    return {name: each for name, each in CONTENDERS.items() if names is None or name in names}
