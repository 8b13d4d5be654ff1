"""`mp.explain` for TPUs, by the real TPU compiler."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import mpjax as mp
from tests.explain_helpers import (
    IN_MEMORY,
    dequantized,
    in_memory,
    missed,
    program,
    read_both_ways,
    reported,
)
from tests.explain_models import MODELS, WIDTH

pytestmark = pytest.mark.tpu_compile

INT8, FLOAT8 = "int8_from_mixed_bfloat16", "float8_current_from_mixed_bfloat16"
NATIVE = [
    ("v6e", INT8, "int4/128_from_mixed_bfloat16"),
    ("tpu7x", FLOAT8, "float8/128x128_from_mixed_bfloat16"),
]


@pytest.mark.parametrize("target, policy, grouped", NATIVE)
def test_all_planted_misses_are_named_and_on_the_clean_model_none(target, policy, grouped):
    planted = mp.explain(*program(policy, grouped, planted=True), target=target)
    assert reported(planted) == missed() and len(planted.misses) == 5
    clean = mp.explain(*program(policy, grouped, planted=False), target=target)
    assert clean.misses == ()
    assert {row.reason for row in clean.products} <= {"", "policy", "weights"}
    assert {row.unit for row in clean.products} == {"MXU"}


@pytest.mark.parametrize("target, format", [("v6e", "int8"), ("tpu7x", "float8_e4m3fn")])
def test_a_weight_that_is_dequantized_in_main_memory_has_its_bytes(target, format):
    (row,) = mp.explain(in_memory, *dequantized(format), target=target).products
    assert row.reason == "dequantized"
    assert row.dequantized_bytes == 2 * IN_MEMORY**2 and row.weight_bytes >= IN_MEMORY**2


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("target, policy", [("v6e", INT8), ("tpu7x", FLOAT8)])
def test_models_it_was_not_written_against_agree_with_their_program(target, policy, name):
    case = MODELS[name](policy)
    found, directly = read_both_ways(case, target)
    assert sorted((row.lhs, row.rhs) for row in found.products) == directly
    others = case.others
    if (target, name) == ("tpu7x", "minilm"):
        others += others // 2  # its scores are computed twice, for the maximum and for the sum
    assert found.flops == case.quantized + others
    assert found.share_in_8_bits == case.quantized / found.flops


def test_int8_on_tpu7x_and_float8_on_v6e_are_emulated():
    for target, policy in (("tpu7x", INT8), ("v6e", FLOAT8)):
        model = mp.wrap(nnx.eval_shape(lambda: nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(0))), policy)
        x = jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.bfloat16)
        (row,) = mp.explain(model, x, target=target).products
        assert row.reason == "emulated" and row.is_miss
        with pytest.raises(AssertionError, match=f"are in 8 bits on {target}"):
            mp.assert_quantized(model, x, target=target)


@pytest.mark.parametrize("target, policy", [("v6e", INT8), ("tpu7x", FLOAT8)])
def test_float_weights_that_are_quantized_at_every_call_are_not_stored(target, policy):
    model = mp.wrap(nnx.eval_shape(lambda: nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(0))), policy)
    x = jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.bfloat16)
    mp.assert_quantized(model, x, target=target)
    with pytest.raises(AssertionError, match=f"by stored weights, on {target}(?s:.*)unquantized"):
        mp.assert_quantized(model, x, target=target, stored=True)
    stored = nnx.eval_shape(
        lambda: mp.quantize(mp.wrap(nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(0)), policy))
    )
    mp.assert_quantized(stored, x, target=target, min_flops=1, stored=True)


def test_a_vector_times_a_matrix_is_found_on_the_vector_unit_in_every_turn_of_a_loop():
    def scanned(weights, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    weights = jax.ShapeDtypeStruct((3, 1024, 1024), jnp.bfloat16)
    x = jax.ShapeDtypeStruct((1, 1024), jnp.bfloat16)
    found = mp.explain(scanned, weights, x, target="v6e")
    (row,) = found.products
    assert (row.unit, row.times, row.lhs, row.rhs) == ("vector", 3, "bfloat16", "bfloat16")
    assert row.flops == 3 * 2 * 1024**2 and row.weight_bytes == 3 * 2 * 1024**2
    # Everything is read once, and nothing but the vectors beside it.
    assert row.weight_bytes <= found.bytes_read <= 1.01 * row.weight_bytes
    assert found.estimated_seconds is None and found.estimated_cycles is not None


CAUSAL = """
import flax.linen as nn, jax, jax.numpy as jnp, mpjax as mp

class Causal(nn.Module):
    @nn.compact
    def __call__(self, x):
        mask = nn.make_causal_mask(x[..., 0])
        return nn.MultiHeadDotProductAttention(2)(x, mask=mask)

x = jax.ShapeDtypeStruct((4, 128, 256), jnp.bfloat16)
model = mp.wrap(Causal(), "int8_from_mixed_bfloat16")
variables = jax.eval_shape(lambda x: mp.quantize(model, model.init(jax.random.key(0), x), x), x)
print(len(mp.explain(model.apply, variables, x, target="v5e").products))
"""


def test_the_compiler_survives_causal_attention_on_v5e():
    # In a process where nobody else has loaded libtpu, with the flags that it reads once.
    environment = {k: v for k, v in os.environ.items() if k != "LIBTPU_INIT_ARGS"}
    command = [sys.executable, "-c", CAUSAL]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "6\n"), done.stderr


def test_the_compiler_says_nothing_of_a_host_that_it_needs_not():
    ours = {"PATH", "HOME", "PYTHONPATH", "LD_LIBRARY_PATH"}
    environment = {k: v for k, v in os.environ.items() if k in ours} | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", CAUSAL]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "6\n", "")
