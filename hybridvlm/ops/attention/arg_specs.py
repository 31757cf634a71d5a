"""Named realistic calls of attention and text-to-visual scores: one list for tests, compilations and benchmarks."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """One call: H heads over K kv heads of width P, T queries and L keys; rows: query rows of a score.

    segments: lengths of the segments of a row, padding after them (None: no segments). offset: position of query 0, given by
    explicit indices (None: no indices). causal as in `attention`.
    """

    batch: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    width: int
    segments: tuple[int, ...] | None = None
    offset: int | None = None
    causal: bool = True
    rows: int = 64

    def small(self, length: int = 300) -> AttentionSpec:
        """The same kind of call, short, with at most two rows, two kv heads and four query heads for each."""
        scale = length / self.keys
        kv_heads = min(self.kv_heads, 2)
        return dataclasses.replace(
            self,
            batch=min(self.batch, 2),
            queries=max(1, round(self.queries * scale)),
            keys=length,
            heads=kv_heads * min(self.heads // self.kv_heads, 4),
            kv_heads=kv_heads,
            segments=self.segments and tuple(max(1, int(n * scale)) for n in self.segments),
            offset=None if self.offset is None else int(self.offset * scale),
            rows=min(self.rows, 9),
        )

    def options(self) -> dict[str, Any]:
        """Keyword arguments of `attention` besides q, k and v."""
        given: dict[str, Any] = {"causal": self.causal}
        if self.segments is not None:
            numbers = np.repeat(np.arange(1, len(self.segments) + 1), self.segments)
            row = np.zeros(self.keys, np.int32)
            row[: len(numbers)] = numbers
            kv = np.broadcast_to(row, (self.batch, self.keys))
            start = self.offset or 0
            given |= {"q_segment": kv[:, start : start + self.queries], "kv_segment": kv}
            given["one_segment"] = len(self.segments) == 1 and self.offset is None and self.queries == self.keys
        if self.offset is not None:
            index = np.arange(self.keys, dtype=np.int32)
            given["q_index"] = np.broadcast_to(index[: self.queries] + self.offset, (self.batch, self.queries))
            given["kv_index"] = np.broadcast_to(index, (self.batch, self.keys))
        return given

    def shapes(self, dtype: Any) -> tuple[jax.ShapeDtypeStruct, ...]:
        """q, k and v as projections give them, heads side by side: [B,T,H*P], [B,L,K*P] twice."""
        q = (self.batch, self.queries, self.heads * self.width)
        kv = (self.batch, self.keys, self.kv_heads * self.width)
        return tuple(jax.ShapeDtypeStruct(shape, dtype) for shape in (q, kv, kv))

    def arrays(self, dtype: Any, seed: int = 0) -> tuple[jax.Array, ...]:
        """q, k and v of unit variance, as `shapes`."""
        rng = np.random.default_rng(seed)
        return tuple(jnp.asarray(rng.standard_normal(s.shape, np.float32), dtype) for s in self.shapes(dtype))

    def split(self, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, ...]:
        """What `shapes` describes, as `attention` takes it."""
        return tuple(x.reshape(*x.shape[:2], -1, self.width) for x in (q, k, v))

    def score_inputs(self, dtype: Any, seed: int = 0) -> tuple[dict[str, jax.Array], dict[str, np.ndarray]]:
        """Arguments of `text_to_visual`: (q, k, lse) of question rows at the end of a row of visual tokens, and the rest.

        q [B,R,H*P] and k [B,L,K*P] flat; the log-sum-exp is a plausible one (that of equal scores), not the true one.
        """
        rng = np.random.default_rng(seed)
        b, r, length = self.batch, self.rows, self.keys
        q = rng.standard_normal((b, r, self.heads * self.width), np.float32)
        k = rng.standard_normal((b, length, self.kv_heads * self.width), np.float32)
        segment = self.options().get("kv_segment", np.ones((b, length), np.int32))
        real = (segment == 1).sum(axis=1)
        index = real[:, None] - r + np.arange(r, dtype=np.int32)
        arrays = {
            "q": jnp.asarray(q, dtype),
            "k": jnp.asarray(k, dtype),
            "lse": jnp.full((b, self.heads, r), np.log(length), jnp.float32),
        }
        rest = {
            "q_mask": index >= 0,
            "visual": (segment == 1) & (np.arange(length) < index[:, :1]),
            "q_segment": np.ones((b, r), np.int32),
            "kv_segment": segment,
            "q_index": np.maximum(index, 0).astype(np.int32),
        }
        return arrays, rest

    def pairs(self) -> float:
        """Pairs of a query and a key that it sees, per example and head."""
        given = self.options()
        t, length = self.queries, self.keys
        start = self.offset or 0
        if self.segments is None:
            if not self.causal:
                return float(t * length)
            return float(np.minimum(np.arange(t) + start + 1, length).sum())
        q, kv = given["q_segment"][0], given["kv_segment"][0]
        counts = np.stack([np.cumsum(kv == s) for s in range(1, len(self.segments) + 1)])
        own = np.maximum(q, 1) - 1
        upto = np.minimum(np.arange(t) + start, length - 1) if self.causal else np.full(t, length - 1)
        return float((counts[own, upto] * (q > 0)).sum())

    def flops(self) -> float:
        """Forward: two products of P multiply-adds for every visible pair of every head, two FLOPs each."""
        return 4.0 * self.width * self.heads * self.batch * self.pairs()

    def unavoidable_bytes(self, dtype: Any) -> int:
        """Forward: q, k and v read once, out and the log-sum-exp written once."""
        item = jnp.dtype(dtype).itemsize
        q, kv = self.queries * self.heads * self.width, self.keys * self.kv_heads * self.width
        return self.batch * ((2 * q + 2 * kv) * item + 4 * self.queries * self.heads)

    def score_flops(self) -> float:
        """One product of P multiply-adds for every query row and key of every head."""
        return 2.0 * self.width * self.heads * self.batch * self.rows * self.keys

    def score_bytes(self, dtype: Any) -> int:
        """k, the query rows and their log-sum-exp read once, the score written once."""
        item = jnp.dtype(dtype).itemsize
        values = self.keys * self.kv_heads * self.width + self.rows * self.heads * self.width
        return self.batch * (values * item + 4 * self.rows * self.heads + 4 * self.keys)


SPECS = {
    # Nemotron-Nano-12B-v2-VL: 128 frames of 256 tokens and a question of 512, as the model calls it; without segments; packed
    "12b": AttentionSpec(1, 33280, 33280, 40, 8, 128, segments=(33280,), rows=512),
    "12b_plain": AttentionSpec(1, 33280, 33280, 40, 8, 128, rows=512),
    "12b_packed": AttentionSpec(1, 16384, 16384, 40, 8, 128, segments=(8000, 5, 4400, 3200), rows=64),
    # a follow-up question after a long prompt
    "12b_extend": AttentionSpec(1, 512, 33280, 40, 8, 128, segments=(33000,), offset=32700, rows=512),
    # VAMBA-Qwen2-VL-7B: text over itself, and text over the video that it crosses to
    "vamba_text": AttentionSpec(1, 777, 777, 28, 4, 128, rows=64),
    "vamba_cross": AttentionSpec(1, 777, 38272, 28, 4, 128, segments=(38272,), causal=False, rows=777),
    # the embedded model: batches of short padded rows
    "tiny": AttentionSpec(8, 1040, 1040, 2, 2, 64, segments=(1011,), rows=16),
}
