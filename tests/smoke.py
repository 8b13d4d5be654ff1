"""What an installed wheel must do. Run by hand or CI, with -I, from outside the checkout."""

import sysconfig
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp

import mpjax as mp
import mpjax_kernels as mk


def main() -> None:
    """Checks where the packages come from, then quantizes one Dense and runs it."""
    site = Path(sysconfig.get_paths()["purelib"]).resolve()
    for package in (mp, mk):
        file = Path(str(package.__file__)).resolve()
        assert site in file.parents, f"{package.__name__} is {file}, which is not in {site}"
        assert (file.parent / "py.typed").exists(), f"{package.__name__} lost its py.typed"

    x = jax.random.normal(jax.random.key(0), (4, 16))
    model = mp.wrap(nn.Dense(8, use_bias=False), "int8_from_float32")
    variables = model.init(jax.random.key(1), x)
    quantized = mp.quantize(model, variables, x)
    is_qtensor = [
        isinstance(leaf, mk.QTensor)
        for leaf in jax.tree.leaves(quantized, is_leaf=lambda leaf: isinstance(leaf, mk.QTensor))
    ]
    assert any(is_qtensor), f"quantize left no QTensor in {jax.tree.structure(quantized)}"

    (w,) = jax.tree.leaves(variables["params"])
    y = jnp.asarray(model.apply(quantized, x))
    error = jnp.abs(y - jnp.matmul(x, w, precision="highest"))
    # Each operand is off by half a scale at most, and no scale exceeds amax / 127.
    half_x, half_w = jnp.max(jnp.abs(x)) / 254, jnp.max(jnp.abs(w)) / 254
    bound = 16 * (half_x * jnp.max(jnp.abs(w)) + half_w * jnp.max(jnp.abs(x)) + half_x * half_w)
    assert 0 < error.max() <= bound, f"int8 is off by {error.max()}, allowed is {bound}"
    print(f"smoke: {site} works; int8 Dense is off by {error.max():.1e}, allowed is {bound:.1e}")


if __name__ == "__main__":
    main()
