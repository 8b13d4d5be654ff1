"""The demo's model as programs to compile: a training step, a prefill and a decoding step.

Model and steps are those of the examples, `byte_lm_models.py`, `train_float8_training.py` and
`generate_decoding.py`, in Linen and in NNX. No weight is made. The sizes fill the tiles of every
target, and are such that an array of a size is known by it: those of weights are not those of
activations.
"""

import dataclasses
import functools
import importlib
import math
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import mpjax as mp
from mpjax._compile_target import compile_for
from mpjax._explain import _as_function, explanation_of

# The examples are scripts that import each other by name.
sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
models = importlib.import_module("byte_lm_models")
_optimizer = importlib.import_module("byte_lm_runs").make_optimizer
_training = importlib.import_module("train_float8_training")
_decoding = importlib.import_module("generate_decoding")
sys.path.pop(0)

BATCH, SHAPE = 5, models.Shape(context=128, width=256, depth=1, heads=2)
ROWS, WIDTH = BATCH * SHAPE.context, SHAPE.width
TOKENS = jax.ShapeDtypeStruct((BATCH, SHAPE.context), jnp.int32)
BYTE = jax.ShapeDtypeStruct((BATCH, 1), jnp.int32)
POSITION = jax.ShapeDtypeStruct((1,), jnp.int32)

# Entries of the weights: of the attention's four and the head, and of `up` and `down`.
SMALL, LARGE = WIDTH**2, 4 * WIDTH**2
LAYERS = 4 + 2 + 1
# Operations of all layers for one row, and of the two products inside the attention for all.
LAYER_FLOPS = 2 * (5 * SMALL + 2 * LARGE)
ATTENTION_FLOPS = 2 * 2 * BATCH * SHAPE.context**2 * WIDTH
DECODED_ATTENTION_FLOPS = ATTENTION_FLOPS // SHAPE.context  # one row each, of all positions

Program = tuple[Any, tuple[Any, ...]]  # a function and its abstract arguments


def train(api: str, policy: Any) -> Program:
    """A step of AdamW with clipping, under `mp.TrainState` or `mp.nnx.Optimizer`."""
    tx = _optimizer(1e-3, 100)
    if api == "linen":
        model = mp.wrap(models.ByteLM(SHAPE), policy)

        def init(key: Any) -> Any:
            variables = model.init(key, jnp.zeros(TOKENS.shape, TOKENS.dtype))
            return mp.TrainState.create(
                apply_fn=model.apply, variables=variables, tx=tx, policy=model.policy
            )

        state = jax.eval_shape(init, jax.random.key(0))
        return _training.linen_train, (state, TOKENS, TOKENS)

    def make() -> Any:
        model = mp.wrap(models.ByteLMNNX(SHAPE, rngs=nnx.Rngs(0)), policy)
        return model, mp.nnx.Optimizer(model, tx, wrt=nnx.Param)

    graph, state = nnx.split(nnx.eval_shape(make))

    def step(state: Any, inputs: Any, targets: Any) -> Any:
        model, optimizer = nnx.merge(graph, state)
        loss = _training.nnx_train(model, optimizer, inputs, targets)
        return nnx.state((model, optimizer)), loss

    return step, (state, TOKENS, TOKENS)


def prefill(api: str, policy: Any, target: str) -> Program:
    """All logits of texts, by quantized weights."""
    if api == "linen":
        model, variables = _quantized(policy, target)
        return model.apply, (variables, TOKENS)
    return nnx.eval_shape(lambda: _quantized_nnx(policy, target)), (TOKENS,)


def decode(api: str, policy: Any, target: str) -> Program:
    """A step of decoding, by quantized weights and the cache that the policy says."""
    if api == "linen":
        _, variables = _quantized(policy, target)
        model = mp.wrap(models.ByteLM(SHAPE, decode=True), policy, target=target)
        cache = jax.eval_shape(model.init, jax.random.key(0), TOKENS)["cache"]
        step = functools.partial(_decoding.linen_step, model)
        return step, (variables["params"], cache, BYTE, POSITION)

    def make() -> Any:
        model = _quantized_nnx(policy, target)
        model.set_attributes(decode=True)
        model.init_cache(BATCH, model.policy.compute_dtype)
        return model

    graph, weights, cache = nnx.split(nnx.eval_shape(make), nnx.Param, nnx.Cache)
    return functools.partial(_decoding.nnx_step, graph), (weights, cache, BYTE, POSITION)


def _quantized(policy: Any, target: str) -> tuple[Any, Any]:
    model = mp.wrap(models.ByteLM(SHAPE), policy, target=target)
    variables = jax.eval_shape(model.init, jax.random.key(0), TOKENS)
    return model, jax.eval_shape(lambda v: mp.quantize(model, v, TOKENS), variables)


def _quantized_nnx(policy: Any, target: str) -> Any:
    model = mp.wrap(models.ByteLMNNX(SHAPE, rngs=nnx.Rngs(0)), policy, target=target)
    return mp.quantize(model)


TRAINED = {
    "bfloat16": "mixed_bfloat16",
    "float8": "float8_from_mixed_bfloat16",
    "int8": "int8_from_mixed_bfloat16",
}
# What 8 bits are on each target, for weights and for the cache.
NATIVE = {"v5e": "int8", "v6e": "int8", "tpu7x": "float8", "h200": "float8"}
EMULATED = {"v5e": "float8", "v6e": "float8", "tpu7x": "int8"}


@dataclasses.dataclass(frozen=True)
class Case:
    """What a program is compiled from.

    Attributes:
      target: the hardware.
      api: `"linen"` or `"nnx"`.
      work: a key of `TRAINED`, `"prefill"` or `"decode"`.
    """

    target: str
    api: str
    work: str

    def __str__(self) -> str:
        return f"{self.target}-{self.api}-{self.work}"

    @property
    def is_emulated(self) -> bool:
        """Whether it trains in 8 bits that the compiler of the target has to widen."""
        return self.work == EMULATED.get(self.target)

    @property
    def is_slow(self) -> bool:
        """Whether it is left to `slow`: what other cases show of another API or another chip."""
        if self.work not in TRAINED:
            return False
        is_shown_by_linen = self.api == "nnx" and self.work != NATIVE[self.target]
        return is_shown_by_linen or (self.is_emulated and self.target != "v6e")

    def program(self) -> Program:
        """The function and its arguments; what is stored in 8 bits is what `auto8` makes of it."""
        if self.work in TRAINED:
            return train(self.api, TRAINED[self.work])
        cache = NATIVE[self.target]
        policy = mp.QuantizedDTypePolicy("auto8", "mixed_bfloat16", kv_cache=cache)
        return {"prefill": prefill, "decode": decode}[self.work](self.api, policy, self.target)


@dataclasses.dataclass(frozen=True)
class Built:
    """A compiled case: the text of its program, and what `explain` reads in it."""

    case: Case
    text: str
    found: mp.Explanation


def fixtures(*targets: str) -> tuple[Any, Any]:
    """Fixtures: every program for these targets, and those whose weights are stored in 8 bits.

    Every work in both APIs, the slow ones marked.
    """
    every = [
        Case(target, api, work)
        for target in targets
        for work in (*TRAINED, "prefill", "decode")
        for api in ("linen", "nnx")
    ]
    return _built(every), _built([case for case in every if case.work not in TRAINED])


def _built(cases: list[Case]) -> Any:
    marked = [
        pytest.param(case, id=str(case), marks=[pytest.mark.slow] if case.is_slow else [])
        for case in cases
    ]

    @pytest.fixture(params=marked)
    def built(request):
        return build(request.param)

    return built


@functools.cache
def build(case: Case) -> Built:
    """Compiles it once, as `mp.explain` does."""
    function, args = case.program()
    function, leading = _as_function(function)
    compiled = compile_for(function, (*leading, *args), {}, case.target)
    return Built(case, compiled.text, explanation_of(compiled))


def multiplied(text: str) -> Counter[tuple[str, str]]:
    """The dtypes of the operands of every product in a program's text, sorted; not `explain`'s."""
    text = re.sub(r"/\*.*?\*/", "", text)
    dtypes = dict(re.findall(r"(%[\w.-]+) = (\w+)\[", text))
    pairs = re.findall(r" (?:convolution|dot)\((%[\w.-]+), (%[\w.-]+)\)", text)
    return Counter(tuple(sorted((dtypes[a], dtypes[b]))) for a, b in pairs)


def in_memory(text: str) -> list[tuple[str, int, str]]:
    """The arrays that a program writes: dtype, entries and line; no argument.

    Only those of its outermost instructions: what is inside a fusion is in no memory.
    """
    entry = re.search(r"^ENTRY .*?^}", text, re.MULTILINE | re.DOTALL)
    assert entry is not None
    line = re.compile(r"\s+(?:ROOT )?%[\w.-]+ = (\w+)\[([\d,]*)\]\S* ([\w-]+)\(")
    found = [(line.match(each), each.strip()) for each in entry[0].splitlines()]
    named = ("parameter", "bitcast", "get-tuple-element")  # they write nothing
    return [
        (made[1], math.prod(int(n) for n in made[2].split(",") if n), each)
        for made, each in found
        if made is not None and made[3] not in named
    ]
