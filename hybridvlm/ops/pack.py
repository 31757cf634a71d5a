"""Parts of many frames packed into rows that a vision transformer runs over as over whole frames.

Some tokens of every frame are kept, `kept` of all frames together. Which ones, and how many of each frame, is data; all
sizes are static. A kept token brings `patches` rows; a frame of which any is kept brings `prefix` rows before them
(class and register tokens). Frames are sorted by how much is kept of them and dealt to `chunks` in turn, so that every
chunk gets nearly the same number of rows. Inside a chunk they lie one behind the other: projections and MLPs run over
these rows, and little is computed that nobody asked for.

Attention stays inside each frame. The frame at place i of a chunk has at least i * chunks others that are as large, so
that no more than kept // (i * chunks + 1) of its tokens can be there: its queries, keys and values are put into a slot
of that size, slots of about one size together. If a share s is kept, all slots take less than about 2 - s times the
products that frames would take which keep all or nothing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from hybridvlm.ops.attention.api import attend_unmasked

CHUNK = 128  # frames, or so many rows as they have, that go through a tower at once
_CLASSES = 6  # sizes of slots at most: each is an attention of its own to compile
_SHRINK = 0.8  # a slot is at most so much larger than the bound of a frame in it, where that takes no more classes


@dataclasses.dataclass(frozen=True)
class PackSizes:
    """What is static of a packing; made by `pack_sizes`.

    Attributes:
        frames: of all videos, N.
        cells: tokens of a whole frame, m.
        kept: tokens that are kept, at most.
        patches: rows of a token.
        prefix: rows of a frame besides.
        chunks: n.
        tokens: places for tokens in a chunk.
        rows: of a chunk, C.
        slots: (first place, one past the last, rows of a slot) of every size of slots, the largest first.
    """

    frames: int
    cells: int
    kept: int
    patches: int
    prefix: int
    chunks: int
    tokens: int
    rows: int
    slots: tuple[tuple[int, int, int], ...]

    @property
    def whole(self) -> int:
        """Rows of a whole frame."""
        return self.prefix + self.patches * self.cells

    @property
    def places(self) -> int:
        """Frames of a chunk that can have a token."""
        return self.slots[-1][1]


def pack_sizes(
    frames: int,
    cells: int,
    kept: int,
    *,
    patches: int,
    prefix: int,
    chunk_frames: int,
    devices: int = 1,
    align: int = 1,
) -> PackSizes:
    """The sizes of a packing.

    Args:
        frames: of all videos.
        cells: tokens of each.
        kept: tokens that are kept of all, at most.
        patches: rows of a token.
        prefix: rows of a frame besides.
        chunk_frames: a chunk has about the rows of so many whole frames at most.
        devices: among which chunks are dealt; their number is a multiple.
        align: the rows of a slot are a multiple, as kernels want them: a slot of another size would be copied into one.

    Raises:
        ValueError: unless 1 <= kept <= frames * cells.
    """
    if not 1 <= kept <= frames * cells:
        raise ValueError(f"pack_sizes: kept must lie in 1..{frames * cells} (frames * cells), got {kept}")
    whole = prefix + patches * cells
    total = patches * kept + prefix * min(frames, kept)
    # a little more than a chunk, such as prefixes make of half of the tokens, is no reason for another one
    chunks = devices * max(1, math.ceil(total / (chunk_frames * whole * devices) - 0.1))
    each = -(-frames // chunks)
    # dealt in turn from the largest on, a chunk has at most its largest frame more than an even share
    rows = min(total, total // chunks + whole * (chunks > 1), each * whole)
    tokens = min(kept, kept // chunks + cells * (chunks > 1), each * cells)
    bounds = [min(cells, kept // (place * chunks + 1)) for place in range(each)]
    slots = _slots([bound for bound in bounds if bound], patches, prefix, align)
    return PackSizes(frames, cells, kept, patches, prefix, chunks, tokens, rows, slots)


def _slots(bounds: list[int], patches: int, prefix: int, align: int) -> tuple[tuple[int, int, int], ...]:
    """Falling bounds of tokens by place, as slots of few sizes."""
    shrink = min(_SHRINK, (bounds[-1] / bounds[0]) ** (1 / _CLASSES))
    edges = [0]
    for place, bound in enumerate(bounds):
        if bound < shrink * bounds[edges[-1]]:
            edges.append(place)
    stops = [*edges[1:], len(bounds)]
    needed = [prefix + patches * bounds[first] for first in edges]
    return tuple(
        (first, stop, -(-rows // align) * align) for first, stop, rows in zip(edges, stops, needed, strict=True)
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packing:
    """Where everything lies. All arrays have a leading axis of chunks, but in what is made of one chunk.

    Attributes:
        token: [n,tokens] which token of all frames (frame * cells + cell) stands here; frames * cells: none.
        first: [n,tokens] the row of its first patch; the others follow.
        source: [n,C] what a row is: a patch of the chunk's own tokens; tokens * patches + j, the j-th row of a prefix; or
            tokens * patches + prefix, nothing.
        start: [n,places] the first row of each frame.
        size: [n,places] its rows.
        back: [n,C] where a row is among all slots, one slot behind the other.
    """

    token: jax.Array
    first: jax.Array
    source: jax.Array
    start: jax.Array
    size: jax.Array
    back: jax.Array


def pack(chosen: jax.Array, sizes: PackSizes) -> Packing:
    """Where the chosen tokens [N,m] bool of all frames, `sizes.kept` of them at most, are packed to."""
    s, n = sizes, sizes.chunks
    if chosen.shape != (s.frames, s.cells):
        raise ValueError(f"pack: chosen must be [N,m] = {(s.frames, s.cells)}, got {chosen.shape}")
    count = jnp.sum(chosen, axis=1, dtype=jnp.int32)
    rank = jnp.argsort(jnp.argsort(-count, stable=True), stable=True).astype(jnp.int32)
    chunk, place = rank % n, rank // n
    size = jnp.where(count > 0, s.prefix + s.patches * count, 0)

    def before(amount: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Of an amount [N] by frame: those of the places of each chunk [n,G], and what lies before each."""
        own = jnp.zeros((n, -(-s.frames // n)), jnp.int32).at[chunk, place].set(amount)
        return own, jnp.cumsum(own, axis=1) - own

    (own_size, own_start), (_, own_first) = before(size), before(count)
    start, first = own_start[chunk, place], own_first[chunk, place]
    slot = jnp.asarray(_offsets(own_size.shape[1], s.slots))[place]

    (flat,) = jnp.nonzero(chosen.reshape(-1), size=s.kept, fill_value=s.frames * s.cells)
    real = flat < s.frames * s.cells
    frame = jnp.minimum(flat // s.cells, s.frames - 1)
    ordinals = (jnp.cumsum(chosen, axis=1, dtype=jnp.int32) - 1).reshape(-1)
    ordinal = ordinals[jnp.minimum(flat, s.frames * s.cells - 1)]
    where = jnp.where(real, chunk[frame], n)  # what is no token is dropped
    index = first[frame] + ordinal
    inside = s.prefix + s.patches * ordinal
    patch = jnp.arange(s.patches, dtype=jnp.int32)
    token = jnp.full((n, s.tokens), s.frames * s.cells, jnp.int32)
    token = token.at[where, index].set(flat.astype(jnp.int32), mode="drop")
    rows_of = jnp.zeros((n, s.tokens), jnp.int32).at[where, index].set(start[frame] + inside, mode="drop")
    source = jnp.full((n, s.rows), s.tokens * s.patches + s.prefix, jnp.int32)
    back = jnp.zeros((n, s.rows), jnp.int32)
    of_token = (start[frame] + inside)[:, None] + patch
    source = source.at[where[:, None], of_token].set(index[:, None] * s.patches + patch, mode="drop")
    back = back.at[where[:, None], of_token].set((slot[frame] + inside)[:, None] + patch, mode="drop")
    if s.prefix:
        extra = jnp.arange(s.prefix, dtype=jnp.int32)
        any_kept = jnp.where(count > 0, chunk, n)[:, None]
        source = source.at[any_kept, start[:, None] + extra].set(s.tokens * s.patches + extra, mode="drop")
        back = back.at[any_kept, start[:, None] + extra].set(slot[:, None] + extra, mode="drop")
    return Packing(token, rows_of, source, own_start[:, : s.places], own_size[:, : s.places], back)


def _offsets(places: int, slots: tuple[tuple[int, int, int], ...]) -> np.ndarray:
    """Of every place of a chunk, the first row of its slot, all slots lying one behind the other: [places] int32."""
    rows = np.zeros(places, np.int32)
    for low, high, size in slots:
        rows[low:high] = size
    return np.cumsum(rows, dtype=np.int32) - rows


def attend_in_frames(packing: Packing, sizes: PackSizes) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
    """The attention of one chunk: a function of q, k and v [1,C,H,P] -> [1,C,H,P], every row among those of its frame."""

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        _, length, heads, width = q.shape
        flat = [x.reshape(length, heads * width) for x in (q, k, v)]
        outs = []
        for low, high, rows in sizes.slots:
            inside = jnp.arange(rows, dtype=jnp.int32)
            index = jnp.minimum(packing.start[low:high, None] + inside, length - 1)
            segment = (inside < packing.size[low:high, None]).astype(jnp.int32)
            own = (x[index].reshape(high - low, rows, heads, width) for x in flat)
            # what stands behind a frame are rows of others: finite, and masked
            out, _ = attend_unmasked(
                *own, q_segment=segment, kv_segment=segment, causal=False, one_segment=True, return_lse=False
            )
            outs.append(out.reshape(-1, heads * width))
        return jnp.concatenate(outs)[packing.back].reshape(q.shape)

    return attend
