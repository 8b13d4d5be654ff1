"""What the real NVIDIA compiler multiplies for an int8 file under `auto8`. It needs no GPU."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from gpu_helpers import h200_compiler, multiplied

import mpjax as mp

pytestmark = pytest.mark.gpu_compile

AUTO8 = "auto8_from_mixed_bfloat16"
X = jnp.ones((256, 256), jnp.bfloat16)


@pytest.fixture(scope="module")
def compiled():
    return h200_compiler()


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(256, name="down")(nn.gelu(nn.Dense(512, name="up")(x)))


@pytest.mark.parametrize("target, operand", [("h200", "f8e4m3fn"), ("a100", "s8")])
def test_one_file_is_float8_operands_on_an_h200(compiled, tmp_path, target, operand):
    model = mp.wrap(MLP(), AUTO8, target="v6e")
    int8 = mp.quantize(model, model.init(jax.random.key(0), X), X)
    path = mp.save(tmp_path / "m.safetensors", int8, policy=AUTO8)
    model = mp.wrap(MLP(), mp.load_policy(path), target=target)
    arguments = mp.load(path, target=target), X
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arguments)
    found = multiplied(compiled(model.apply, *abstract))
    # What a program for an A100 multiplies is the control: it is int8, by the same compiler.
    assert found == [(operand, operand)] * 2
