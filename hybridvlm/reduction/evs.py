"""Reducers that work on the vision tower's output, before the decoder: EVS (drop) and average pooling (merge).

EVS, Efficient Video Sampling (arXiv 2510.14624): drop the tokens that changed least since the previous frame.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

_FIRST_FRAME = 255.0  # above every dissimilarity (at most 2): the first frame is always kept whole


def evs_keep_count(frames: int, tokens_per_frame: int, rate_pruned: float) -> int:
    """Visual tokens that EVS keeps of `frames` frames: int() truncates, and never fewer than one frame's."""
    if frames < 1:
        return 0
    return max(tokens_per_frame, int(frames * tokens_per_frame * (1.0 - rate_pruned)))


def evs_score(visual: jax.Array) -> jax.Array:
    """Change of every token against the same cell one frame earlier: visual [B,F,m,D] -> [B,F*m] fp32.

    1 - cosine, exactly 0 where nothing changed (there 1 - cosine would be rounding noise, by which still frames would be ranked),
    and 255 in the first frame. As torch has it, a vector of zeros resembles nothing, not even another: 1. Where a token is the
    one before times a factor, rounding decides between it and others of that kind, here as there.
    """
    x = visual.astype(jnp.float32)
    # torch's cosine_similarity floors the product of the squared norms, one root for both
    dot = jnp.sum(x[:, 1:] * x[:, :-1], axis=-1)
    square = jnp.sum(x * x, axis=-1)
    norms = jnp.sqrt(jnp.maximum(square[:, 1:], 1e-16)) * jnp.sqrt(jnp.maximum(square[:, :-1], 1e-16))
    first = jnp.full((x.shape[0], 1, x.shape[2]), _FIRST_FRAME, jnp.float32)
    # below the floor a cosine is less than 1 even of the same vector
    still = jnp.all(x[:, 1:] == x[:, :-1], axis=-1) & (square[:, 1:] >= 1e-16)
    return jnp.concatenate([first, jnp.where(still, 0.0, 1.0 - dot / norms)], axis=1).reshape(x.shape[0], -1)


def evs_mask(embeddings: jax.Array, rate_pruned: float) -> jax.Array:
    """EVS's choice for one video: embeddings [T,rows,cols,d] -> bool [T*rows*cols], True where a token is kept.

    The largest changes survive, ties to the earlier token, no quota per frame. rate_pruned lies in [0, 1).
    """
    if not 0.0 <= rate_pruned < 1.0:
        raise ValueError(f"evs_mask: rate_pruned must lie in [0, 1), got {rate_pruned}")
    frames, rows, cols, width = embeddings.shape
    score = evs_score(embeddings.reshape(1, frames, rows * cols, width))[0]
    order = jnp.argsort(-score, stable=True)
    kept = order[: evs_keep_count(frames, rows * cols, rate_pruned)]
    return jnp.zeros(score.shape, bool).at[kept].set(True)


def average_pool(
    visual: jax.Array, frame_count: jax.Array, factors: tuple[int, int, int], grid: tuple[int, int]
) -> tuple[jax.Array, jax.Array]:
    """Average blocks of (frames, rows, columns) = `factors`: visual [B,F,m,D], frame_count [B] int32.

    Returns ([B,ceil(F/factors[0]),m/(factors[1]*factors[2]),D] in visual's dtype, the new frame_count [B]). A last
    block that is cut off by the end of the video averages the frames it has; padded frames never enter.
    """
    batch, frames, m, width = visual.shape
    (rows, cols), (time, high, wide) = grid, factors
    if rows * cols != m or rows % high or cols % wide:
        raise ValueError(f"average_pool: factors {factors} do not tile a grid {grid} of {m} tokens per frame")
    blocks = -(-frames // time)
    x = jnp.pad(visual.astype(jnp.float32), ((0, 0), (0, blocks * time - frames), (0, 0), (0, 0)))
    real = (jnp.arange(blocks * time) < frame_count[:, None]).reshape(batch, blocks, time).astype(jnp.float32)
    x = x.reshape(batch, blocks, time, rows // high, high, cols // wide, wide, width)
    x = jnp.einsum("bftrhcwd,bft->bfrcd", x, real)
    count = jnp.maximum(real.sum(-1), 1.0) * (high * wide)
    pooled = (x / count[:, :, None, None, None]).reshape(batch, blocks, -1, width)
    return pooled.astype(visual.dtype), (frame_count + time - 1) // time
