"""An exported quantized model by the real TPU compiler: every layer multiplies int8."""

import jax
import jax.numpy as jnp
import pytest
from jax import export as jax_export

import mpjax as mp
from tests.demo_programs import LAYERS, SHAPE, TOKENS, models, multiplied
from tests.test_kernels_tpu_compile import compiled, compiler

__all__ = ["compiled", "compiler"]  # fixtures
pytestmark = pytest.mark.tpu_compile


@pytest.fixture(scope="module")
def exported():
    """The demo's model, quantized and exported on a CPU."""
    model = mp.wrap(models.ByteLM(SHAPE), "int8_from_mixed_bfloat16")
    tokens = jnp.zeros(TOKENS.shape, TOKENS.dtype)
    quantized = mp.quantize(model, model.init(jax.random.key(0), tokens), tokens)
    blob = mp.export(model, quantized, tokens, platforms=("tpu",))
    return jax_export.deserialize(bytearray(blob))


@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_an_export_made_on_a_cpu_compiles(compiled, chip, exported):
    found = multiplied(compiled(chip, exported.call, TOKENS).as_text())
    assert found == {("s8", "s8"): LAYERS, ("bf16", "bf16"): 2}
