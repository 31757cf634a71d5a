"""The one struct that every block takes and returns."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

INDEX_IN_SEGMENT = "index_in_segment"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tokens:
    """A batch of prompts, visual and text tokens in reading order; padding only at the end of a row.

    x [B,L,D] embeddings; position [B,L] int32 (or [B,L,3]); segment [B,L] int32, 0 = padding; visual [B,L] bool;
    query [B,L] bool, the text after the last visual token; index [B,L] int32, position in the unreduced prompt;
    frame [B,L] int32, -1 for text; extra: arrays [B,L,...] that are carried along through every reduction.
    Of packed rows extra[INDEX_IN_SEGMENT] [B,L] int32 is the index in the unreduced prompt of a token's own segment
    (`index`: in the row).
    """

    x: jax.Array
    position: jax.Array
    segment: jax.Array
    visual: jax.Array
    query: jax.Array
    index: jax.Array
    frame: jax.Array
    extra: dict[str, jax.Array] = dataclasses.field(default_factory=dict)

    @property
    def length(self) -> int:
        # not of x, which a prefill's results leave out
        return self.segment.shape[1]

    @property
    def index_in_segment(self) -> jax.Array:
        """[B,L] int32: the position of every token in its own unreduced prompt, the same whether that is packed with others or not."""
        return self.extra.get(INDEX_IN_SEGMENT, self.index)

    def replace(self, **changes: Any) -> Tokens:
        return dataclasses.replace(self, **changes)


def text_tokens(x: jax.Array, segment: jax.Array) -> Tokens:
    """Tokens of plain text: x [B,L,D], segment [B,L] int32 (0 = padding). Nothing is visual, every row is its own query."""
    b, length = segment.shape
    index = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (b, length))
    no = jnp.zeros((b, length), bool)
    return Tokens(x, index, segment, no, segment > 0, index, jnp.full((b, length), -1, jnp.int32))
