"""What the real TPU compiler multiplies for one file under `auto8`. It needs libtpu but no TPU."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import mpjax as mp
from tests.demo_programs import multiplied
from tests.test_kernels_tpu_compile import compiled, compiler

__all__ = ["compiled", "compiler"]  # fixtures
pytestmark = pytest.mark.tpu_compile

AUTO8 = "auto8_from_mixed_bfloat16"
OPERANDS = {"v5e": "s8", "v6e": "s8", "tpu7x": "f8e4m3fn"}
X = jax.ShapeDtypeStruct((256, 256), jnp.bfloat16)


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(256, name="down")(nn.gelu(nn.Dense(512, name="up")(x)))


class MLPNNX(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(256, 512, rngs=rngs)
        self.down = nnx.Linear(512, 256, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.gelu(self.up(x)))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """One file, of int8 weights that were quantized for a v6e."""
    x = jnp.ones(X.shape, X.dtype)
    model = mp.wrap(MLP(), AUTO8, target="v6e")
    variables = mp.quantize(model, model.init(jax.random.key(0), x), x)
    return mp.save(tmp_path_factory.mktemp("auto8") / "m.safetensors", variables, policy=AUTO8)


@pytest.mark.parametrize("chip", OPERANDS)
def test_one_file_is_int8_or_float8_operands(compiled, checkpoint, chip):
    model = mp.wrap(MLP(), mp.load_policy(checkpoint), target=chip)
    variables = mp.load(checkpoint, target=chip)
    found = multiplied(compiled(chip, model.apply, variables, X).as_text())
    assert found == {(OPERANDS[chip], OPERANDS[chip]): 2}


@pytest.mark.parametrize("chip", OPERANDS)
def test_nnx_for_each_chip(compiled, chip):
    make = nnx.eval_shape(lambda: mp.quantize(mp.wrap(MLPNNX(nnx.Rngs(0)), AUTO8, target=chip)))
    graph, state = nnx.split(make)
    run = compiled(chip, lambda state, x: nnx.merge(graph, state)(x), nnx.as_pure(state), X)
    assert multiplied(run.as_text()) == {(OPERANDS[chip], OPERANDS[chip]): 2}


def test_this_check_notices_the_source_precision(compiled, checkpoint):
    model = mp.wrap(MLP(), mp.load_policy(checkpoint), target="v4")
    variables = mp.load(checkpoint, target="v4")
    found = multiplied(compiled("v6e", model.apply, variables, X).as_text())
    assert found == {("bf16", "bf16"): 2}


class Thin(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(128, name="thin")(nn.gelu(nn.Dense(8192, name="wide")(x)))


def cycles(text):
    """The compiler's estimates: of the product, and of all that runs beside it."""
    took = {True: 0, False: 0}
    for line in text[text.index("ENTRY") :].splitlines():
        found = re.search(r'"estimated_cycles":"(\d+)"', line)
        took["kind=kOutput" in line] += int(found[1]) if found else 0
    return took[True], took[False]


@pytest.mark.parametrize("chip", OPERANDS)
def test_the_table_quantizes_as_fast_as_the_compiler_expects(compiled, chip):
    target, x = mp.resolve_target(chip), jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16)
    took = {}
    for policy in (AUTO8, "mixed_bfloat16"):
        model = mp.wrap(nn.Dense(4096, use_bias=False, param_dtype=x.dtype), policy, target=chip)
        variables = jax.eval_shape(model.init, jax.random.key(0), x)
        if policy == AUTO8:
            variables = jax.eval_shape(lambda v, m=model: mp.quantize(m, v, x), variables)
        took[policy] = cycles(compiled(chip, model.apply, variables, x).as_text())
    plain, casts = took["mixed_bfloat16"][0], took[AUTO8][1]
    seconds = casts / plain * 2 * 4096**3 / target.rate("bfloat16")
    assert x.size / seconds == pytest.approx(target.quantizes, rel=0.1)


def test_a_profitable_model_leaves_the_thin_layer(compiled):
    model = mp.wrap(Thin(), AUTO8, target="v6e", when="profitable")
    x = jax.ShapeDtypeStruct((8192, 8192), jnp.bfloat16)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    quantized = jax.eval_shape(lambda v: mp.quantize(model, v, x), shapes)
    text = compiled("v6e", model.apply, quantized, x).as_text()
    assert multiplied(text) == {("bf16", "bf16"): 1, ("s8", "s8"): 1}


@pytest.mark.parametrize("chip", OPERANDS)
def test_the_scale_is_part_of_the_product_as_the_roofline_has_it(compiled, chip):
    model = mp.wrap(nn.Dense(2048), AUTO8, target=chip)
    x = jax.ShapeDtypeStruct((2048, 2048), jnp.bfloat16)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    quantized = jax.eval_shape(lambda v: mp.quantize(model, v, x), shapes)
    text = compiled(chip, model.apply, quantized, x).as_text()
    entry = text[text.index("ENTRY") :]
    arrays = re.findall(r" = (\w+)\[2048,2048\]\S* fusion", entry)
    assert sorted(arrays) == sorted([OPERANDS[chip], "bf16"])  # the cast of x, the output; no sums
