"""EVS as its paper has it (Efficient Video Sampling, arXiv 2510.14624): by pixels, so that the tower is spared, too.

The score of a token is the sum of absolute differences between the pixels of its patches (the 2x2 of a pixel shuffle or
a merger together) and those at the same place one frame earlier; where a patch holds several frames (Qwen, Nemotron 3
Omni), one tubelet earlier. The first frame is whole. The released code, and `evs` here, scores features after the
tower, which then sees every frame.

The count is static here, as in the released code: the largest changes of the video, not those above a threshold.
Positions are kept. Pixels are whole numbers, so that their differences are exact: where nothing moves they are ties,
which go to the earlier token. Of a token that is not kept nothing enters the tower, so that the others of its frame do
not see it either: their features are not those that `evs` would keep.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from hybridvlm.reduction.evs import evs_keep_count
from hybridvlm.reduction.methods import PIXELS, _register
from hybridvlm.reduction.pixels import PixelSelection


@_register(
    "evs-pixels",
    "input",
    reads=PIXELS,
    count=lambda frames, m, share: evs_keep_count(frames, m, 1.0 - share),
    floor=lambda frames, m: 1 / frames,
    keeps="the first frame whole",
    needs=("pixels",),
)
def evs_pixels(values: jax.Array, frame_count: jax.Array, keep: PixelSelection) -> jax.Array:
    """before the tower, tokens whose pixels changed most since the last frame; the first frame whole"""
    whole = values.astype(jnp.int16)
    change = jnp.sum(jnp.abs(whole[:, 1:] - whole[:, :-1]).astype(jnp.int32), axis=-1).astype(jnp.float32)
    first = jnp.full((values.shape[0], 1, values.shape[2]), jnp.inf, jnp.float32)
    return jnp.concatenate([first, change], axis=1).reshape(values.shape[0], -1)
