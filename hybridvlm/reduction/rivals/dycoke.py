"""DyCoke's first stage (arXiv 2411.15024): of every four frames one stays whole, of the others what changed."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from hybridvlm.reduction.choose import cosine, flagged, frames_of, ranks
from hybridvlm.reduction.methods import FEATURES, PlanView, _register

GROUP = 4


def cells_kept(frames: int, m: int, share: float) -> int:
    """Cells that stay of every frame that is not its group's first, for a share of all tokens."""
    del frames  # the rule is one for all lengths, so that a video's tokens do not depend on its bucket
    return min(m, max(0, math.floor(m * (GROUP * share - 1) / (GROUP - 1) + 0.5)))


def dycoke_count(frames: int, m: int, share: float) -> int:
    """Tokens that stay of `frames` frames of m tokens."""
    whole = -(-frames // GROUP)
    return whole * m + (frames - whole) * cells_kept(frames, m, share)


@_register(
    "dycoke",
    "input",
    reads=FEATURES,
    count=dycoke_count,
    floor=lambda frames, m: -(-frames // GROUP) / frames,
    keeps="at least every fourth frame whole",
)
def dycoke(visual: jax.Array, frame_count: jax.Array, plan: PlanView) -> jax.Array:
    """before layer 0, every fourth frame whole, of the others the cells that changed"""
    m = visual.shape[2]
    groups = -(-frame_count // GROUP)
    rest = plan.keep(0, frame_count * m) - groups * m
    kept = rest // jnp.maximum(frame_count - groups, 1)
    return dycoke_score(visual, frame_count, kept)


def dycoke_score(visual: jax.Array, frame_count: jax.Array, kept: jax.Array) -> jax.Array:
    """The choice as a score: visual [B,F,m,D], kept [B] cells of each further frame of a group -> [B,F*m] fp32.

    In a group of four frames the second is compared with the first, the fourth with the third, the third with the
    first, cell by cell, and its least similar cells stay (K = .7 of them go in the paper, .475 of all tokens then
    stay). Corrected: the released loop never reduces the third frame of the last group, loses the last of an odd
    number of frames, and gives tokens in the order of likeness; here a last group that is not whole is reduced as
    far as it goes. The second stage, a cut of the cache while decoding, is left out.
    """
    batch, frames, _, _ = visual.shape
    number = jnp.arange(frames)
    before = number - jnp.asarray([0, 1, 2, 1])[number % GROUP]
    change = 1.0 - cosine(visual, visual[:, before])
    first = (number % GROUP == 0)[None, :, None]
    chosen = ranks(change) < kept[:, None, None]
    flag = jnp.where(first, 2, chosen.astype(jnp.int32)) * frames_of(frame_count, frames)[:, :, None]
    return flagged(flag.reshape(batch, -1), jnp.where(first, 0.0, change).reshape(batch, -1))
