"""Lookups in a table of embeddings that `mp.quantize` stored, and products with it."""

import dataclasses

import jax
import jax.numpy as jnp

import mpjax_kernels as mk

from ._context import Product
from ._products import QuantizedDotGeneral, observe_product


@dataclasses.dataclass(frozen=True)
class StoredEmbedding:
    """What `nn.Embed` and `nnx.Embed` do with a table that `mp.quantize` stored.

    Attributes:
      product: of a query and the table; it keeps no state.
    """

    product: QuantizedDotGeneral

    def look_up(self, table: mk.QTensor, rows: jax.Array) -> jax.Array:
        """The rows of a table [V, D] at integers of any shape, in the compute dtype."""
        if not jnp.issubdtype(rows.dtype, jnp.integer):
            raise ValueError(f"an embedding is looked up by integers, got {rows.dtype}")
        if table.shape[0] == 1:  # as Flax does, whatever the index
            rows = jnp.zeros_like(rows)
        return mk.embedding_lookup(table, rows, dtype=self.product.compute_dtype)

    def attend(self, table: mk.QTensor, query: jax.Array) -> jax.Array:
        """`query @ table.T`, [..., D] by [V, D]."""
        axes = (((query.ndim - 1,), (1,)), ((), ()))
        return self.product(jnp.asarray(query, self.product.compute_dtype), table, axes)


def observe_embedding(path: str, shape: tuple[int, ...]) -> None:
    """Reports the table of a layer, whose rows are output channels in `attend`."""
    observe_product(path, Product("embedding", shape, (1,)))
