"""Models with planted misses, and a reading of the program's text that is not `explain`'s own."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp

import mpjax as mp
import mpjax_kernels as mk
from mpjax._compile_target import compile_for
from mpjax._explain import _as_function, explanation_of

ROWS, WIDTH, LARGE = 256, 256, 1024
X = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32)


class Net(nn.Module):
    """Three layers and attention; planted, two more that its policy misses, and an einsum."""

    planted: bool

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(2 * WIDTH, name="up")(x)
        x = nn.Dense(WIDTH, name="down")(nn.gelu(x))
        x += nn.MultiHeadDotProductAttention(4, name="attention")(x[None])[0]
        # 128 do not divide the inputs of a planted one.
        x = nn.Dense(WIDTH, name="grouped")(x[:, : 200 if self.planted else 128])
        if self.planted:
            x = nn.Dense(WIDTH, name="forgotten")(x)
            x = nn.Dense(WIDTH, name="island")(x)
            mix = self.param("mix", nn.initializers.lecun_normal(), (WIDTH, WIDTH))
            x = jnp.einsum("bk,kn->bn", x.astype(mix.dtype), mix)  # the line of "outside"
        return nn.Dense(LARGE, name="head")(x)


def policy(quantized, grouped, *, planted):
    """A map that names each layer but `forgotten`, whose default is not quantized."""
    named = {"up|down|head|attention/.*": quantized, "grouped": grouped}
    return mp.DTypePolicyMap("mixed_bfloat16", named | ({"island": "float32"} if planted else {}))


def program(quantized, grouped, *, planted):
    """A function and its abstract arguments: the quantized model, and one more product after it."""
    model = mp.wrap(Net(planted), policy(quantized, grouped, planted=planted))
    variables = jax.eval_shape(model.init, jax.random.key(0), X)

    def stored(variables):
        return mp.quantize(model, variables, X, return_report=True)[0]

    format = "int8" if quantized.startswith("int8") else "float8_e4m3fn"
    last = jax.ShapeDtypeStruct((LARGE, LARGE), jnp.float32)
    q = jax.eval_shape(lambda w: mk.quantize(w, format, axis=0), last)

    def run(variables, q, x):
        y = model.apply(variables, x)
        if not planted:
            return mk.matmul(mk.quantize(y, format, axis=1), q)
        return y @ mk.dequantize(q, jnp.bfloat16)  # the line of "dequantized"

    return run, jax.eval_shape(stored, variables), q, X


def in_memory(q, x):
    """A product with a weight that is dequantized before it, 134 MB: no fast memory takes it."""
    return x @ jax.lax.optimization_barrier(mk.dequantize(q, jnp.bfloat16))


IN_MEMORY = 8192


def dequantized(format):
    """The arguments of `in_memory`."""
    w = jax.ShapeDtypeStruct((IN_MEMORY, IN_MEMORY), jnp.float32)
    q = jax.eval_shape(lambda w: mk.quantize(w, format, axis=0), w)
    return q, jax.ShapeDtypeStruct((ROWS, IN_MEMORY), jnp.bfloat16)


def line_of(word):
    """The one line of this file that is marked as that of a planted miss, `"/.../x.py:12"`."""
    with open(__file__) as file:
        (number,) = [i for i, line in enumerate(file, 1) if f'# the line of "{word}"' in line]
    return f"{__file__}:{number}"


def missed():
    """Reason, module path and line of what is planted; None for a line that does not matter."""
    return {
        ("unmatched", "forgotten", None),
        ("refused", "grouped", None),
        ("island", "island", None),
        ("outside", "", line_of("outside")),
        ("dequantized", "", line_of("dequantized")),
    }


def reported(explanation):
    """The same of what `explain` reports."""
    return {(row.reason, row.path, None if row.path else row.line) for row in explanation.misses}


# XLA's names of dtypes, and ours.
NAMES = {"s4": "int4", "s8": "int8", "s32": "int32", "f32": "float32", "bf16": "bfloat16"}
NAMES |= {"f8e4m3fn": "float8_e4m3fn", "f8e5m2": "float8_e5m2", "f16": "float16"}


def read_both_ways(case, target):
    """What `explain` reports of a model, and the dtypes that are multiplied in its text.

    The text is searched for every dot and convolution, library call and Pallas kernel, without the
    code of `explain`.
    """
    function, args = _as_function(case.fn)
    compiled = compile_for(function, (*args, *case.args), {}, target)
    text = re.sub(r"/\*.*?\*/", "", compiled.text)
    dtypes = dict(re.findall(r"(%[\w.-]+) = (\w+)\[", text))
    pairs = re.findall(r" (?:convolution|dot)\((%[\w.-]+), (%[\w.-]+)", text)
    calls = re.findall(
        r" custom-call\((%[\w.-]+), (%[\w.-]+)[^\n]*"
        r'custom_call_target="(?:__cublas|__cudnn\$conv|__onednn|mpjax_(?:(?:int8|float8)_dot|attention))',
        text,
    )
    rows = re.findall(  # quantized in the call
        r" custom-call\(%[\w.-]+, (%[\w.-]+)[^\n]*"
        r'custom_call_target="mpjax_dynamic_(?:int8|grouped)_dot',
        text,
    )
    # The operands of a ragged product come last, after what says where its groups are.
    ragged = re.findall(
        r" custom-call\([^)]*, (%[\w.-]+), (%[\w.-]+)\)[^\n]*ragged_dot_tiling", text
    )
    found = [(NAMES[dtypes[a]], NAMES[dtypes[b]]) for a, b in pairs + calls + ragged]
    found += [("int8", NAMES[dtypes[b]]) for b in rows]
    return explanation_of(compiled), sorted(found)
