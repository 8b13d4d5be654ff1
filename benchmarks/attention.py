"""How fast is attention, of a decoding step or of all positions, against Flax's own?

Scores, a softmax in float32, and the output, for a batch of queries of 16 heads of 64 (or 32 heads
of 128 that share 8 of the cache) to as many positions as a cache holds. The cache is an array, or
is stored in 8 bits with a scale per position and head. One query, as a decoding step has, or as
many as there are positions, as an encoder has (12 heads of 32) and a decoder's prompt. All in one
jit, the cache an argument.

Peers, in the same process, called in turns with us: `flax`, `flax.nnx.dot_product_attention` on
float32 keys and values, and `flax_bfloat16`, the same on bfloat16.

    python benchmarks/attention.py [--cases 1024 ...] [--peers flax ...] [--cold] [--quick]
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import mpjax_kernels as mk
from _contest import Contender, Contest, Program, chosen, compiled
from _suite import run, suite_parser

# Attention is an average of values by weights that are off by the format's error of a score.
BOUNDS = {"float32": 1e-5, "bfloat16": 0.02, "int8": 0.02, "float8_e4m3fn": 0.06}
NAMES = ("flax", "flax_bfloat16")


@dataclass(frozen=True)
class Case:
    """A cache of a format and its sizes."""

    format: str
    length: int
    batch: int = 1
    heads: int = 16
    kv_heads: int = 16
    depth: int = 64
    queries: int = 1

    def __str__(self) -> str:
        heads = f"{self.heads}" if self.heads == self.kv_heads else f"{self.heads}/{self.kv_heads}"
        sizes = f"{self.batch}x{self.length} {heads}x{self.depth}"
        return f"{self.format} {sizes}" + (f" by {self.queries}" if self.queries > 1 else "")

    def operands(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Query, keys and values, float32."""
        query = self.batch, self.queries, self.heads, self.depth
        cache = self.batch, self.length, self.kv_heads, self.depth
        shapes = query, cache, cache
        keys = jax.random.split(jax.random.key(0), 3)
        normal = [jax.random.normal(key, s) for key, s in zip(keys, shapes, strict=True)]
        query, key, value = (np.asarray(x) for x in normal)
        return query, key, value


def by_name(*cases: Case) -> dict[str, Case]:
    return {str(case): case for case in cases}


CASES = by_name(
    *(Case(format, 128) for format in ("float32", "bfloat16", "int8")),
    *(Case(format, 1024) for format in BOUNDS),
    Case("float32", 1024, batch=8),
    *(Case(format, 2048, heads=32, kv_heads=8, depth=128) for format in ("float32", "int8")),
    *(Case(format, 128, 8, 12, 12, 32, queries=128) for format in ("float32", "bfloat16")),
    *(Case(format, 512, queries=512) for format in BOUNDS),
)
QUICK_CASES = by_name(Case("float32", 16), Case("int8", 16), Case("bfloat16", 16, queries=16))


def main(arguments: list[str] | None = None) -> None:
    options = suite_parser(__doc__, list(CASES), NAMES).parse_args(arguments)
    run("attention", options, CASES, QUICK_CASES, partial(contest, names=options.peers))


def contest(case: Case, names: list[str] | None = None) -> Contest:
    """The case with its data, and the peers of these names."""
    query, key, value = case.operands()
    bound = BOUNDS[case.format]
    peers = {
        "flax": Contender(partial(flax, case, "float32"), BOUNDS["float32"], "flax"),
        "flax_bfloat16": Contender(
            partial(flax, case, "bfloat16"), BOUNDS["bfloat16"], "flax", decode=_float32
        ),
    }
    operations = 4 * case.batch * case.heads * case.queries * case.length * case.depth
    return Contest(
        facts={"case": str(case), "format": case.format, "length": case.length}
        | {"batch": case.batch, "heads": [case.heads, case.kv_heads], "depth": case.depth}
        | {"queries": case.queries},
        reference=_exact(query, key, value),
        ours=Contender(partial(ours, case), bound, "mpjax", decode=_float32),
        peers=chosen(peers, names),
        operations=operations,
        targets={"flax": 0.5 if case.queries == 1 else 0.8},
    )


def ours(case: Case) -> Program:
    """`mk.attention_scores` and `mk.attention_output`."""
    query, key, value = case.operands()
    if case.format in ("float32", "bfloat16"):
        return compiled(_attend, *(jnp.asarray(x, case.format) for x in (query, key, value)))
    cached = (mk.quantize(jnp.asarray(x), case.format, axis=-1) for x in (key, value))
    return compiled(_attend, query, *cached)


def flax(case: Case, dtype: str) -> Program:
    """Flax's own attention, which knows nothing of us."""
    operands = (jnp.asarray(x, dtype) for x in case.operands())
    return compiled(nnx.dot_product_attention, *operands)


def _attend(query: Any, key: Any, value: Any) -> jax.Array:
    query = jnp.asarray(query) / jnp.sqrt(query.shape[-1]).astype(query.dtype)
    scores = mk.attention_scores(query, key, preferred_element_type=jnp.float32)
    return mk.attention_output(jax.nn.softmax(scores).astype(query.dtype), value)


def _exact(query: np.ndarray, key: np.ndarray, value: np.ndarray) -> np.ndarray:
    """In float64."""
    shared = query.shape[-2] // key.shape[-2]
    query, key, value = (x.astype(np.float64) for x in (query, key, value))
    key, value = (np.repeat(x, shared, axis=-2) for x in (key, value))
    scores = np.einsum("bqhd,bkhd->bhqk", query, key) / np.sqrt(query.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bhqk,bkhd->bqhd", weights, value).astype(np.float32)


def _float32(x: Any) -> np.ndarray:
    return np.asarray(x, np.float32)


if __name__ == "__main__":
    main()
