"""VAMBA's prompts and training rows as arrays: text and video apart, each with its own segments (host side)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Generic

import jax
import numpy as np

from hybridvlm.config import Buckets, VambaConfig
from hybridvlm.models.prompt import ArrayT
from hybridvlm.models.qwen_vl import model as qwen_vl
from hybridvlm.models.qwen_vl.model import QwenLayout


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch(Generic[ArrayT]):
    """Prompts as arrays of one bucket, text and video apart.

    input_ids, segment [B,T] int32 (0 = padding, at the end); reads [B,T] int32, the segment of the video that each text token
    reads; query [B,T] bool, the text after the last visual token.
    video_segment [B,M] int32, frame [B,M] int32 (-1 = padding), index [B,M] int32, the position in the row as it is laid out, and
    own_index [B,M] int32, that in the prompt of its own (the same, but for rows that pack several).
    frame_count [B] int32: real frames of each example (of the tower: pairs of the video's).
    """

    input_ids: ArrayT
    segment: ArrayT
    reads: ArrayT
    query: ArrayT
    video_segment: ArrayT
    frame: ArrayT
    index: ArrayT
    own_index: ArrayT
    frame_count: ArrayT


def make_batch(
    config: VambaConfig,
    layouts: Sequence[QwenLayout],
    buckets: Buckets,
    factors: tuple[int, int, int] = (1, 1, 1),
) -> tuple[Batch[np.ndarray], int, int]:
    """Pad prompts to the smallest bucket that holds them all: (batch, frame bucket, text bucket)."""
    row, frames, text = qwen_vl.make_batch(config, layouts, buckets, factors)
    rows = {"ids": row.input_ids, "segment": row.segment, "frame": row.frame, "frame_count": row.frame_count}
    batch, _ = _split(rows, text)
    return batch, frames, text


def split_rows(rows: Mapping[str, np.ndarray], text: int) -> tuple[Batch[np.ndarray], np.ndarray, np.ndarray]:
    """Training rows, in which video and text stand as in one prompt, as (batch, label [B,T], question [B,T]).

    Args:
        rows: [B,L] ids, segment, frame, label, question, frame_count [B]; and `part`, where several questions share a video:
            each has a number of its own, all have the video's segment, and none sees another one's text.
        text: T, text tokens of a row.
    """
    batch, at = _split(rows, text)
    label, question = np.zeros_like(batch.segment), np.zeros(batch.segment.shape, bool)
    for i, own in enumerate(at):
        label[i, : len(own)], question[i, : len(own)] = rows["label"][i, own], rows["question"][i, own]
    return dataclasses.replace(batch, query=question), label, question


def _split(rows: Mapping[str, np.ndarray], text: int) -> tuple[Batch[np.ndarray], list[np.ndarray]]:
    """The batch of rows, and where in each row its text stood."""
    frame, segment = rows["frame"], rows["segment"]
    count, length = segment.shape
    words = np.zeros((4, count, text), np.int32)  # ids, segment, reads, query
    video = np.zeros((4, count, length - text), np.int32)  # segment, frame, positions in the row and in its own prompt
    video[1:] = -1
    places = []
    for i in range(count):
        real, visual = segment[i] > 0, (frame[i] >= 0) & (segment[i] > 0)
        at, seen = np.flatnonzero(real & ~visual), np.flatnonzero(visual)
        start = np.flatnonzero(np.diff(segment[i], prepend=0))
        first = np.maximum.accumulate(np.isin(np.arange(length), start) * np.arange(length))
        owner = segment[i, at]
        part = rows["part"][i, at] if "part" in rows else np.zeros_like(owner)
        new = (np.diff(owner, prepend=0) != 0) | (np.diff(part, prepend=0) != 0)
        last = seen[-1] if len(seen) else -1
        words[:, i, : len(at)] = rows["ids"][i, at], np.cumsum(new), owner, at > last
        video[:, i, : len(seen)] = segment[i, seen], frame[i, seen], seen, seen - first[seen]
        places.append(at)
    ids, own, reads, query = words
    owner, number, index, own_index = video
    return Batch(ids, own, reads, query > 0, owner, number, index, own_index, rows["frame_count"]), places
