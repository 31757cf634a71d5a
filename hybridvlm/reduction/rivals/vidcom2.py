"""VidCom2 (arXiv 2505.14454): tokens unlike their video and frame stay, more of unusual frames."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from hybridvlm.reduction.choose import flagged, frames_of, ranks, unit
from hybridvlm.reduction.methods import FEATURES, PlanView, _register
from hybridvlm.reduction.schedules import SHARE_ONE

TEMPERATURE = 0.01


@_register("vidcom2", "input", reads=FEATURES)
def vidcom2(visual: jax.Array, frame_count: jax.Array, plan: PlanView) -> jax.Array:
    """before layer 0, tokens unlike their video and frame, more of unusual frames"""
    return vidcom2_score(visual, frame_count, plan.input_share / SHARE_ONE)


def vidcom2_score(visual: jax.Array, frame_count: jax.Array, base: float) -> jax.Array:
    """VidCom2's choice as a score: visual [B,F,m,D], frame_count [B] int32 -> [B,F*m] fp32.

    On the half of the channels that vary least over the video, a token's likeness to the video's mean and to its
    frame's mean is a sum of five Gaussians of the distance. A frame keeps base * (1 + its softmax share - the mean
    share) of its tokens, the least alike first; `base` is .25 and .15 in the paper.

    As released, but that the count is exact, as in vLLM: the worst of the choice go or the best of the rest come
    back, over the whole video. Padded frames are in no mean and no variance.
    """
    batch, frames, m, width = visual.shape
    x = visual.astype(jnp.float32)
    real = frames_of(frame_count, frames).astype(jnp.float32)[:, :, None, None]
    count = jnp.maximum(frame_count, 1).astype(jnp.float32)
    mean = jnp.sum(x * real, axis=(1, 2), keepdims=True) / (count * m)[:, None, None, None]
    variance = jnp.sum(real * (x - mean) ** 2, axis=(1, 2)) / (count * m)[:, None]
    steady = ranks(-variance) < width // 2
    y = unit(x * steady[:, None, None].astype(jnp.float32))

    def likeness(centre: jax.Array) -> jax.Array:
        square = jnp.sum((y - centre) ** 2, axis=-1)
        return sum(jnp.exp(-square / (2 * a)) for a in (0.125, 0.25, 0.5, 1.0, 2.0))  # type: ignore[return-value]

    of_video = likeness(jnp.sum(y * real, axis=(1, 2), keepdims=True) / (count * m)[:, None, None, None])
    likely = of_video + likeness(jnp.mean(y, axis=2, keepdims=True))
    unusual = jnp.where(real[:, :, 0, 0] > 0, -of_video.mean(-1), -jnp.inf)
    share = jax.nn.softmax((unusual - unusual.max(-1, keepdims=True)) / TEMPERATURE, axis=-1)
    kept = jnp.minimum(1.0, base * (1.0 + share - 1.0 / count[:, None]))
    kept = jnp.maximum(1.0, jnp.round(kept * m))
    chosen = ranks(-likely) < kept[:, :, None]
    return flagged(chosen.reshape(batch, -1), -likely.reshape(batch, -1))
