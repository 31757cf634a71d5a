"""Text that a frame has of its own (its time stamp, its separators), and how much of it is left where visual tokens are dropped.

Which frames lose all their tokens is known only once scores are, and shapes are static. So a plan counts with the most frames that
can have text after a drop: under "empty-frames" one for each visual token that is left, which is a bound and mostly a weak one;
under "best-frames" as many as the tokens that are left would fill, so that text falls as the visual tokens do. Both drop the text of
a frame without any token. Text of no frame (question, system message, what else the prompt says) always stays.
"""

from __future__ import annotations

import dataclasses
from typing import TypeVar

import jax
import numpy as np

from hybridvlm.reduction.schedules import BudgetError

EMPTY, BEST = "empty-frames", "best-frames"
Counts = TypeVar("Counts", int, np.ndarray, jax.Array)


@dataclasses.dataclass(frozen=True)
class FrameText:
    """The own text of frames in a bucket.

    Attributes:
        rule: a value of `Reduction.drop_text`.
        frames: of the bucket.
        visual: tokens of one of them.
        size: most text tokens that one of them has of its own; what it lacks of that is counted as other text.
        whole: whether what enters layer 0 are whole frames.
    """

    rule: str
    frames: int
    visual: int
    size: int
    whole: bool = False

    def most_frames(self, left: Counts) -> Counts:
        """The most frames that have text of their own where `left` visual tokens of one example are left."""
        return left if self.rule == EMPTY else -(-left // self.visual)

    def text(self, tokens: int, left: int, entering: int) -> int:
        """Text tokens that a row of the bucket has room for, of `tokens` in all.

        Args:
            tokens: text tokens of the bucket, which holds `frames` times `size` of them beside the rest.
            left: visual tokens at the layer.
            entering: those at layer 0.
        """
        if self.rule == "none":
            return tokens
        most = min(self.frames, -(-entering // self.visual)) if self.whole else self.frames
        return tokens - (self.frames - min(most, self.most_frames(left))) * self.size


def frame_text(
    rule: str, name: str, *, visual_tokens: int, text_tokens: int, frames: int, size: int, whole: bool, pools: bool
) -> FrameText:
    """The FrameText of a plan; ValueError where there is no such text, BudgetError where this method or bucket cannot drop it."""
    if rule == "none" or not frames:
        return FrameText("none", frames, 1, 0)
    if size < 1:
        raise ValueError(
            f"drop_text={rule!r} drops the text that each frame has of its own, and this model's prompt has none between its frames; "
            "leave it out"
        )
    if pools:
        raise BudgetError(f"{name}: drop_text={rule!r} goes with methods that drop, and this one merges", 1.0, 1.0)
    if frames * size > text_tokens:
        raise BudgetError(
            f"drop_text={rule!r}: {frames} frames with up to {size} text tokens of their own do not fit a text bucket of "
            f"{text_tokens}; it must be {frames * size} or more",
            1.0,
            1.0,
        )
    if visual_tokens % frames:
        raise ValueError(f"drop_text: visual_tokens {visual_tokens} is not a multiple of frames {frames}")
    return FrameText(rule, frames, visual_tokens // frames, size, whole)
