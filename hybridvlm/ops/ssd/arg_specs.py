"""Named realistic shapes of the SSD op: one list for tests, compilations and benchmarks."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class SsdSpec:
    """One call. segments: lengths of the segments of a row, padding after them; None: no segment argument.

    initial: with an incoming state, which belongs to a row's first segment. skip: with D. nats: mean sum of decays per
    128 tokens of the fastest head.
    """

    batch: int
    length: int
    heads: int
    p: int
    groups: int
    n: int
    segments: tuple[int, ...] | None = None
    initial: bool = False
    skip: bool = True
    nats: float = 30.0

    def small(self, length: int = 300) -> SsdSpec:
        """The same kind of call, short, with at most 16 heads in at most 2 groups."""
        groups = min(self.groups, 2)
        per_group = min(self.heads // self.groups, 16 // groups)
        segments = self.segments and tuple(max(1, part * length // self.length) for part in self.segments)
        return dataclasses.replace(self, length=length, heads=groups * per_group, groups=groups, segments=segments)

    def unavoidable_bytes(self, dtype: Any) -> int:
        """x, dt, B and C read once, y and the final state written once; dense, without any tiling."""
        item = jnp.dtype(dtype).itemsize
        token = 2 * self.heads * self.p * item + 2 * self.groups * self.n * item + 4 * self.heads
        return self.batch * (self.length * token + 4 * self.heads * self.p * self.n)

    def flops(self, chunk: int) -> int:
        """Two per multiply-add of the forward pass at this chunk size, whole squares within the chunk."""
        within = chunk * (self.heads * self.p + self.groups * self.n)
        return 2 * self.batch * self.length * (within + 2 * self.heads * self.p * self.n)

    def shapes(self, dtype: Any, flat: bool = True) -> tuple[dict[str, jax.ShapeDtypeStruct], dict[str, Any]]:
        """Differentiable arguments of `ssd` and the others, as shapes; x as [B,L,H*P] if flat."""
        s = self
        wide = (s.heads * s.p,) if flat else (s.heads, s.p)
        shapes = {
            "x": ((s.batch, s.length, *wide), dtype),
            "dt": ((s.batch, s.length, s.heads), jnp.float32),
            "A": ((s.heads,), jnp.float32),
            "B": ((s.batch, s.length, s.groups, s.n), dtype),
            "C": ((s.batch, s.length, s.groups, s.n), dtype),
        }
        if s.skip:
            shapes["D"] = ((s.heads,), jnp.float32)
        if s.initial:
            shapes["initial_state"] = ((s.batch, s.heads, s.p, s.n), jnp.float32)
        rest = {}
        if s.segments is not None:
            rest["segment"] = jax.ShapeDtypeStruct((s.batch, s.length), jnp.int32)
            if s.initial:
                rest["initial_segment"] = jax.ShapeDtypeStruct((s.batch,), jnp.int32)
        return {name: jax.ShapeDtypeStruct(*shape) for name, shape in shapes.items()}, rest

    def arrays(self, dtype: Any, flat: bool = True, seed: int = 0) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """`shapes` with numbers as a layer might see them: A over a factor of 16, as Mamba-2 starts it; row b of a batch has
        its segments b tokens shorter."""
        shapes, _ = self.shapes(dtype, flat)
        rng = np.random.default_rng(seed)
        values = {name: rng.standard_normal(shape.shape, np.float32) for name, shape in shapes.items()}
        values["dt"] = np.log1p(np.exp(values["dt"] - 2.0))
        a = np.geomspace(1.0, 16.0, self.heads, dtype=np.float32)
        values["A"] = -a * np.float32(self.nats / (128 * values["dt"].mean() * 16.0))
        arrays = {name: jnp.asarray(value, shapes[name].dtype) for name, value in values.items()}
        numbers = {}
        if self.segments is not None:
            segment = np.zeros((self.batch, self.length), np.int32)
            for b, row in enumerate(segment):
                ids = np.concatenate([np.full(max(1, part - b), i + 1) for i, part in enumerate(self.segments)])
                row[: len(ids)] = ids
            numbers["segment"] = jnp.asarray(segment)
            if self.initial:
                numbers["initial_segment"] = numbers["segment"][:, 0]
        return arrays, numbers


ARG_SPECS = {
    # Nemotron Nano 12B v2 VL: an hour's video in one row; a prefill of 128 frames in a padded bucket, going on from a state
    "12b_131072": SsdSpec(1, 131072, 128, 80, 8, 128),
    "12b_prefill": SsdSpec(1, 33280, 128, 80, 8, 128, segments=(33009,), initial=True),
    # VAMBA's video stream: one group for all heads; a piece of it, and an odd end
    "vamba_piece": SsdSpec(1, 4096, 112, 64, 1, 128, segments=(4096,), initial=True),
    "vamba_1024_frames": SsdSpec(1, 153088, 112, 64, 1, 128, skip=True),
    # Nemotron-H 8B, two packed rows; the same with half the state
    "packed_rows": SsdSpec(2, 8192, 128, 64, 8, 128, segments=(3001, 2777, 1700), initial=True),
    "small_state": SsdSpec(2, 4097, 112, 80, 8, 64, segments=(4000,), skip=False),
    # The embedded model: a batch of prompts
    "tiny": SsdSpec(2, 317, 4, 32, 2, 32, segments=(101, 1, 150), initial=True),
    # Fast heads: 200 nats and more within a chunk
    "strong_decay": SsdSpec(1, 8192, 128, 80, 8, 128, segments=(5000, 3000), initial=True, nats=250.0),
}
