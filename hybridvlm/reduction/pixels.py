"""Choosing tokens by their pixels, before the tower: what is not chosen never enters it."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from hybridvlm.reduction import methods
from hybridvlm.reduction.choose import frames_of, ranks


@dataclasses.dataclass(frozen=True)
class PixelSelection:
    """Which tokens enter the tower: what `encode` is told, as `keep`, by a plan whose method chooses by pixels.

    `ReductionPlan.pixel_selection` makes it. It says all that the encoding depends on, so that plans and questions which
    agree in it share one.

    Attributes:
        method: of the registry, one that needs "pixels".
        rate: share of the tokens that it keeps, by its own rule of counting.
        shrinks: (rows, columns) of a frame's tokens that become one, by pixels that are averaged before the tower.
    """

    method: str
    rate: float
    shrinks: tuple[int, int] = (1, 1)

    def count(self, frames: int, cells: int) -> int:
        """Tokens that are kept of a video of `frames` frames of `cells` tokens."""
        rule = methods.get_method(self.method).count
        assert rule is not None  # as every method that needs pixels has one
        return rule(frames, cells, self.rate)

    @property
    def whole_frames(self) -> bool:
        """Whether it keeps whole frames, of which `frames` says how many."""
        return methods.get_method(self.method).encodes is not None

    def frames(self, count: int) -> int:
        """Whole frames that are kept of a video of `count`."""
        rule = methods.get_method(self.method).encodes
        assert rule is not None  # `whole_frames` has been asked
        return rule(count, self.rate)

    def choose(self, values: jax.Array, frame_count: jax.Array) -> jax.Array:
        """The tokens to keep: values [B,F,m,V] of their pixels, frame_count [B] real frames -> bool [B,F,m].

        Of each video as many as `count` says of its own frames, the highest scores, ties to the earlier token.
        """
        b, frames, cells, _ = values.shape
        score = methods.get_method(self.method).function(values, frame_count, self)
        real = jnp.repeat(frames_of(frame_count, frames), cells, axis=1)
        table = jnp.asarray([self.count(n, cells) for n in range(frames + 1)], jnp.int32)
        order = ranks(jnp.where(real, score, -jnp.inf))
        return (real & (order < table[frame_count][:, None])).reshape(b, frames, cells)
