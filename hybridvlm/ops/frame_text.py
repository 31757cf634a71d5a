"""Which text of a frame's own stays where visual tokens are dropped."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from hybridvlm.typing import Array, Bool, Float, Int

# [B,L] int32 in Tokens.extra: 1 + the frame whose own text a token is; 0 for all others
FRAME_TEXT = "frame_text"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FrameTextRule:
    """What decides it, beside the visual tokens that stay.

    Attributes:
        owner: [B,L] int32, see `FRAME_TEXT`.
        frame: [B,L] int32, the frame of a visual token; numbers are of a row, so that no two packed samples share one.
        most: [B,S] int32, how many frames of each segment keep their text at most.
        frames: how many numbers there are.
    """

    owner: jax.Array
    frame: jax.Array
    most: jax.Array
    frames: int = dataclasses.field(metadata={"static": True})


def ranked_frames(
    rule: FrameTextRule, segment: Int[Array, "B L"], stays: Bool[Array, "B L"], score: Float[Array, "B L"]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of each frame [B,F]: its segment, whether it has both text and a visual token that stays, and that token's best score.

    stays: [B,L] bool, the visual tokens that do. A NaN counts as the least score.
    """
    number = jnp.arange(rule.frames, dtype=jnp.int32)[:, None]
    seen = stays[:, None] & (rule.frame[:, None] == number)
    owned = (rule.owner[:, None] == number + 1) & (segment[:, None] > 0)
    best = jnp.where(jnp.isnan(score), -jnp.inf, score)[:, None]
    best = jnp.max(jnp.where(seen, best, -jnp.inf), axis=-1)
    owner = jnp.max(jnp.where(owned, segment[:, None], 0), axis=-1)
    return owner, jnp.any(seen, axis=-1) & jnp.any(owned, axis=-1), best
