"""From a question and its answer to a row: ids, labels, and what of the text is the question."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Generic

import jax
import numpy as np

from hybridvlm.inference.model import Model
from hybridvlm.models.family import Family
from hybridvlm.models.media import Clip
from hybridvlm.models.prompt import ArrayT, Batch, user_message
from hybridvlm.models.qwen_vl.model import QwenBatch
from hybridvlm.tokenizers.messages import Message
from hybridvlm.tokenizers.text import person

Example = dict[str, np.ndarray]


class TooLong(ValueError):
    """A sample does not fit a row."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """The static shape of a row: frames of the tower, text tokens, packed samples at most, visual tokens of a frame."""

    frames: int
    text: int
    segments: int
    per_frame: int
    frame_text: int = 0  # most text tokens of a frame's own, where a plan drops those

    @property
    def length(self) -> int:
        return self.frames * self.per_frame + self.text

    @property
    def own_text(self) -> int:
        """Text tokens of a sample at most. In packed rows each segment's share is rounded for itself, which can keep one token
        more than the row's capacity counts: as many text positions as segments stay free for it."""
        return self.text - (self.segments if self.segments > 1 else 0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainBatch(Generic[ArrayT]):
    """Rows as arrays: the prompt's Batch; label [B,L] int32, 1 + the token that comes next where that is an answer's, else 0;
    question [B,L] bool; visual: what visual tokens are made of (`features.visual`). Of a family with two streams L is the text's
    T. teacher: the same rows as a teacher of another family takes them, None where there is none."""

    batch: Any
    label: ArrayT
    question: ArrayT
    visual: dict[str, ArrayT]
    teacher: TrainBatch[ArrayT] | None = None


def example(
    model: Model,
    clip: Clip | None,
    question: str,
    answer: str,
    history: Sequence[tuple[str, str]] = (),
    system: str = "",
) -> Example:
    """One sample's arrays [n]: ids, frame (-1 for text), label and question, as of TrainBatch, and `position` [n,3] in some families.

    history: earlier turns, part of the prompt; system: a system message before all of them. The answer ends with the model's end
    token. Marked as question is the text after the video, but never the answer that is to be learnt: no selection may see it.
    """
    clips = [] if clip is None else [clip]
    turns: list[Message] = [{"role": "system", "content": system}] if system else []
    for number, (asked, told) in enumerate([*history, (question, answer)]):
        turns.append(user_message(asked, model.style, [c.kind for c in clips] if not number else []))
        turns.append({"role": "assistant", "content": told})
    layout = model.family.prompt(model.config, model.tokenizer, turns[:-1], clips, style=model.style)
    said = np.asarray([*model.tokenizer.encode(person(answer)), *model.config.eos_ids[:1]], np.int32)
    return arrange(layout.ids, layout.frame, said, getattr(layout, "position", None))


def sharing(samples: Sequence[Example]) -> Example:
    """Several samples of one video as one: its visual tokens once, and the text of each as a `part` [n] of its own, from 0."""
    parts = []
    for number, row in enumerate(samples):
        stays = np.ones(len(row["ids"]), bool) if not number else row["frame"] < 0
        row = {name: row[name][stays] for name in ("ids", "frame", "label", "question", "position") if name in row}
        parts.append(row | {"part": np.full(len(row["ids"]), number, np.int32)})
    return {name: np.concatenate([row[name] for row in parts]) for name in parts[0]}


def arrange(ids: np.ndarray, frame: np.ndarray, said: np.ndarray, position: np.ndarray | None = None) -> Example:
    """Arrays of a prompt (ids [n], frame [n]) and the answer's ids after it."""
    n, m = len(ids), len(said)
    last = np.flatnonzero(frame >= 0)[-1] if (frame >= 0).any() else -1
    index = np.arange(n + m)
    label = np.zeros(n + m, np.int32)
    label[n - 1 : n + m - 1] = said + 1
    out = {
        "ids": np.concatenate([ids, said]).astype(np.int32),
        "frame": np.concatenate([frame, np.full(m, -1)]).astype(np.int32),
        "label": label,
        "question": (index > last) & (index < n),
    }
    if position is not None:
        more = position.max() + 1 + np.arange(m, dtype=np.int32)
        out["position"] = np.concatenate([position, np.repeat(more[:, None], 3, axis=1)]).astype(np.int32)
    return out


def check(row: Example, shape: Shape, answer: int, frames: int, name: str) -> None:
    """TooLong, with the sample's name and sizes, where it does not fit."""
    text, label = int((row["frame"] < 0).sum()), row["label"] > 0
    if shape.frame_text:
        # a plan that drops text of frames' own counts with so many tokens of each frame that a row may have
        text = int((row["frame"] == -1).sum()) + shape.frames * shape.frame_text
    said = int(np.bincount(row["part"][label]).max()) if "part" in row else int(label.sum())
    for what, got, most in (
        ("text tokens (Data.text)", text, shape.own_text),
        ("frames (Data.frames)", frames, shape.frames),
        ("answer tokens (Data.answer)", said, answer),
    ):
        if got > most:
            raise TooLong(f"{name} has {got} {what}, and a row has room for {most}")


def pad(array: np.ndarray, length: int, empty: Any = 0) -> np.ndarray:
    """`array` with `empty` after it up to `length` along the first axis."""
    out = np.full((length, *array.shape[1:]), empty, array.dtype)
    out[: len(array)] = array
    return out


def single(row: Example, shape: Shape) -> Example:
    """A sample as a whole row: what packing gives, for one."""
    visual = {name: a for name, a in row.items() if name.startswith("visual")}
    out = {name: pad(a, shape.frames) for name, a in visual.items()}
    n = len(row["ids"])
    for name in ("ids", "label", "question", "position", "part"):
        if name in row:
            out[name] = pad(row[name], shape.length)
    out["frame"] = pad(row["frame"], shape.length, -1)
    out["segment"] = pad(np.ones(n, np.int32), shape.length)
    out["frame_count"] = np.asarray(next(iter(visual.values())).shape[0] if visual else 0, np.int32)
    return out


def packed(row: Example, shape: Shape) -> Example:
    """What Grain packed, in the form of `single`: segments apart, frames counted on from one sample to the next."""
    out: Example = {name: row[name] for name in ("ids", "label", "question", "position", "part") if name in row}
    segment = row["ids_segment_ids"].astype(np.int32)
    visual = [name for name in row if name.startswith("visual") and not name.endswith(("_segment_ids", "_positions"))]
    out |= {name: row[name] for name in visual}
    owner = row[f"{visual[0]}_segment_ids"] if visual else np.zeros(0, np.int32)
    before = np.asarray([(owner[owner > 0] < s).sum() for s in range(shape.segments + 1)], np.int32)
    frame = np.where(segment > 0, row["frame"], -1)
    counted_on = np.where(frame < -1, frame - before[segment], -1)  # text of a frame's own, by the number of its frame
    out["frame"] = np.where(frame >= 0, frame + before[segment], counted_on).astype(np.int32)
    out["segment"] = segment
    out["frame_count"] = np.asarray((owner > 0).sum(), np.int32)
    return out


def train_batch(
    rows: Example, family: Family, shape: Shape | None = None, teacher: Family | None = None
) -> TrainBatch[np.ndarray]:
    """Batched arrays of `single` or `packed` rows as what a step takes.

    Args:
        rows: the arrays.
        family: whose step it is.
        shape: of the rows; needed by a family whose video and text are two streams.
        teacher: another family, whose model teaches.

    Raises:
        ValueError: shape is missing.
    """
    visual = {name.removeprefix("visual_"): a for name, a in rows.items() if name.startswith("visual_")}
    taught = None if teacher is None else dataclasses.replace(train_batch(rows, teacher, shape), visual={})
    if family.split_rows is not None:
        if shape is None:
            raise ValueError(f"train_batch: rows of family {family.NAME!r} need their shape, got None")
        return TrainBatch(*family.split_rows(rows, shape.text), visual, taught)
    fields = (rows["ids"], rows["segment"], rows["frame"], rows["frame_count"])
    batch = QwenBatch(*fields, position=rows["position"]) if family.NAME == "qwen_vl" else Batch(*fields)
    return TrainBatch(batch, rows["label"], rows["question"], visual, taught)
