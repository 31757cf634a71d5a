"""From frames and words to the arrays of a bucket (host side, numpy)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from hybridvlm.config import Buckets, ModelConfig
from hybridvlm.models.nemotron_vl import Batch


@dataclasses.dataclass(frozen=True)
class PromptStyle:
    """The text around the frames. `frame` may use {number} (from 1) and {seconds}; each piece is tokenised by itself, so that
    what is dropped never changes how the rest is split into tokens."""

    before: str = ""
    frame: str = ""
    after_frame: str = ""
    question: str = "{question}"


@dataclasses.dataclass(frozen=True)
class Layout:
    """One prompt before padding: ids, and the frame of every visual place (-1 for text)."""

    ids: np.ndarray
    frame: np.ndarray
    frames: int

    @property
    def text(self) -> int:
        return int((self.frame < 0).sum())


def layout(
    question: str,
    seconds: Sequence[float],
    tokens_per_frame: int,
    encode: Callable[[str], list[int]],
    style: PromptStyle = PromptStyle(),
    group: int = 1,
) -> Layout:
    """Lay one prompt out: `seconds` has a time stamp per frame; `group` frames share one run of visual tokens (pooling over time)."""
    ids: list[int] = list(encode(style.before)) if style.before else []
    frame: list[int] = [-1] * len(ids)

    def text(piece: str) -> None:
        new = encode(piece) if piece else []
        ids.extend(new)
        frame.extend([-1] * len(new))

    for number in range(0, len(seconds), group):
        text(style.frame.format(number=number + 1, seconds=seconds[number]))
        ids.extend([0] * tokens_per_frame)
        frame.extend([number] * tokens_per_frame)
        text(style.after_frame)
    text(style.question.format(question=question))
    return Layout(np.asarray(ids, np.int32), np.asarray(frame, np.int32), len(seconds))


def make_batch(
    layouts: Sequence[Layout],
    config: ModelConfig,
    buckets: Buckets,
    tokens_per_frame: int | None = None,
    group: int = 1,
) -> tuple[Batch, int, int]:
    """Pad prompts to the smallest bucket that holds them all: (batch, frame bucket, text bucket).

    tokens_per_frame: places per run of frames (default: the vision config's; fewer under pooling). ValueError if a prompt is over
    the largest bucket.
    """
    if not layouts:
        raise ValueError("make_batch needs at least one prompt, got none")
    m = config.vision.tokens_per_frame if tokens_per_frame is None else tokens_per_frame
    frames = buckets.pick("frames", max(item.frames for item in layouts))
    text = buckets.pick("text", max(item.text for item in layouts))
    length = -(-frames // group) * m + text
    ids, frame = np.zeros((len(layouts), length), np.int32), np.full((len(layouts), length), -1, np.int32)
    segment = np.zeros((len(layouts), length), np.int32)
    for row, item in enumerate(layouts):
        n = len(item.ids)
        ids[row, :n], frame[row, :n], segment[row, :n] = item.ids, item.frame, 1
    counts = np.asarray([item.frames for item in layouts], np.int32)
    return Batch(ids, segment, frame, counts), frames, text
