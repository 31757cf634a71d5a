"""Text of frames' own (time stamps, separators) in the buckets of plans that drop it (`Reduction.drop_text`); host side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hybridvlm.models.prompt import Layout, own_text
from hybridvlm.reduction.plan import ReductionPlan

LONGEST = 10_000.0  # seconds of a video; what a time stamp takes up to there is counted for each


def late_stamps(frames: int) -> list[float]:
    """Time stamps that take as many characters as any of a video of `LONGEST` seconds."""
    return np.linspace(0.9 * LONGEST + 0.25, LONGEST - 0.75, max(2, frames)).tolist()


def bucket_needed(layouts: Sequence[Layout], frames: int, size: int) -> int:
    """Text tokens that a bucket of `frames` has to have room for, for prompts under a plan that drops text of frames' own: as much as
    the longest, `size`, for every frame."""
    return max(max(item.text, item.other_text + frames * size) for item in layouts)


def check(batch: Any, plan: ReductionPlan) -> None:
    """Whether the rows of a plan have room for what it leaves of these prompts' text.

    Raises:
        ValueError: a frame has more text of its own than the plan counts with, or what a prompt has beside it leaves less room.
    """
    segment, frame = np.asarray(batch.segment), np.asarray(batch.frame)
    size, all_frames = plan.frame_text, plan.frames * plan.frame_text
    for own in np.where(segment > 0, frame, 0):
        most, other = int(np.bincount(own_text(own[own < -1])).max(initial=0)), int((own == -1).sum())
        if most > size:
            raise ValueError(
                f"drop_text: a frame has {most} text tokens of its own, and the plan counts with at most {size}; "
                f"time stamps of {LONGEST:,.0f} seconds and more take more room: leave drop_text out"
            )
        if other + all_frames > plan.text_tokens:
            raise ValueError(
                f"drop_text: {other} text tokens beside those of {plan.frames} frames with up to {size} each are over the text bucket "
                f"of {plan.text_tokens}; it must be {other + all_frames} or more (Buckets.text), or leave drop_text out"
            )
