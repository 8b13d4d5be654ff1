"""How many bytes does a decode step of a 7B-shaped model read on one v6e chip, by its compiler?

A transformer of the shape of Llama 2 7B (32 layers of width 4096, 32 heads, a gated MLP of 11008,
32,000 words and a head of its own) decodes one token for one sequence whose cache holds 1,024. Its
weights are abstract: nothing is allocated, and no TPU is needed. `mpjax.explain` compiles the step
with libtpu and counts what the compiled program reads, every turn of the loop over layers.

    bfloat16    weights and cache in bfloat16
    int8        int8 weights, one scale per output channel; int8 activations; an int8 cache
    int4        int4 weights, a scale per 128 inputs; bfloat16 activations; an int8 cache

One JSON row per mode: bytes read and written, their ratio to bfloat16's, the compiler's estimate in
cycles (not a timing), the floor by the chip's bandwidth; in `targets` what we want of it.

    pip install 'mpjax[tpu]'
    python benchmarks/decode_bytes.py [--verbose] [--quick]
"""

import json
from importlib.metadata import version
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.experimental.layout import Format, Layout

import mpjax as mp
from _suite import output_folder, parser

WIDTH, HEADS, INNER, WORDS, CONTEXT = 4096, 32, 11008, 32000, 1024
LAYERS, TARGET = 32, "v6e"
POLICIES = {
    "bfloat16": mp.DTypePolicy("bfloat16"),
    "int8": mp.QuantizedDTypePolicy("int8", "bfloat16", kv_cache="int8"),
    "int4": mp.QuantizedDTypePolicy("int4/128", "bfloat16", kv_cache="int8"),
}
TARGETS = {"int8": {"read": 0.53, "estimate": 0.6}, "int4": {"read": 0.32, "estimate": 0.6}}


class Block(nn.Module):
    """One pre-norm layer with a cache."""

    @nn.compact
    def __call__(self, x, _):
        attention = nn.MultiHeadDotProductAttention(
            HEADS, use_bias=False, decode=True, name="attention"
        )
        x += attention(nn.RMSNorm(name="attention_norm")(x))
        y = nn.RMSNorm(name="mlp_norm")(x)
        gate = nn.silu(nn.Dense(INNER, use_bias=False, name="gate")(y))
        up = nn.Dense(INNER, use_bias=False, name="up")(y)
        return x + nn.Dense(WIDTH, use_bias=False, name="down")(gate * up), None


class Decoder(nn.Module):
    """Tokens to the logits of the next one."""

    layers: int

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(WORDS, WIDTH, name="words")(tokens)
        lifted = nn.scan(
            Block,
            variable_axes={"params": 0, "cache": 0},
            split_rngs={"params": True},
            length=self.layers,
        )
        x, _ = lifted.__call__(lifted(name="layers"), x, None)
        return nn.Dense(WORDS, use_bias=False, name="head")(nn.RMSNorm(name="norm")(x))


def step(mode: str, layers: int) -> mp.Explanation:
    """What the compiler makes of one decode step, its cache updated in place."""
    model = mp.wrap(Decoder(layers), POLICIES[mode])
    context = jax.ShapeDtypeStruct((1, CONTEXT), jnp.int32)
    token = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    variables = jax.eval_shape(model.init, jax.random.key(0), context)
    if mode != "bfloat16":

        def quantized(variables):
            return mp.quantize(model, variables, token, mutable=["cache"])

        variables = jax.eval_shape(quantized, variables)
    weights = {"params": variables["params"]}

    def decode(cache, weights, token):
        logits, updated = model.apply(weights | {"cache": cache}, token, mutable=["cache"])
        return updated["cache"], jnp.argmax(logits, axis=-1)

    # The compiler lays out weights and cache as it reads them best, as a server of tokens would.
    best = Format(Layout.AUTO)
    jitted = jax.jit(decode, donate_argnums=0, in_shardings=best, out_shardings=best)
    return mp.explain(jitted, variables["cache"], weights, token, target=TARGET)


def row(mode: str, found: mp.Explanation, base: mp.Explanation) -> dict[str, Any]:
    """The figures of a mode, beside those of bfloat16."""
    assert found.estimated_cycles is not None and base.estimated_cycles is not None
    of_bfloat16 = {
        "read": found.bytes_read / base.bytes_read,
        "estimate": found.estimated_cycles / base.estimated_cycles,
    }
    targets = {
        name: {"at_most": most, "reached": of_bfloat16[name] <= most}
        for name, most in TARGETS.get(mode, {}).items()
    }
    return {
        "benchmark": "decode_bytes",
        "case": mode,
        "target": found.target,
        "bytes_read": found.bytes_read,
        "bytes_written": found.bytes_written,
        "estimated_cycles": found.estimated_cycles,
        "floor_us": round(found.floor_seconds * 1e6, 1),
        "of_bfloat16": {name: round(ratio, 4) for name, ratio in of_bfloat16.items()},
        "targets": targets,
    }


def main() -> None:
    """Compiles the three, and prints and writes a row of each."""
    arguments = parser(__doc__)
    arguments.add_argument("--layers", type=int, default=LAYERS, help="instead of all 32")
    arguments.add_argument("--verbose", action="store_true", help="print each report")
    options = arguments.parse_args()
    jax.config.update("jax_platforms", "cpu")  # the TPU's compiler needs no TPU
    layers = 2 if options.quick else options.layers
    steps = {mode: step(mode, layers) for mode in POLICIES}
    environ = {name: version(name) for name in ("jax", "jaxlib", "libtpu")}
    rows = [row(mode, found, steps["bfloat16"]) | environ for mode, found in steps.items()]
    for found, each in zip(steps.values(), rows, strict=True):
        if options.verbose:
            print(found)
        print(json.dumps(each))
    folder = output_folder(options, whole=layers == LAYERS)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        lines = "".join(f"{json.dumps(each)}\n" for each in rows)
        (folder / "decode_bytes.jsonl").write_text(lines)


if __name__ == "__main__":
    main()
