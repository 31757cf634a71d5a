"""From frames and words to the arrays of a bucket (host side, numpy)."""

from __future__ import annotations

import dataclasses
import re
import string
from collections.abc import Mapping, Sequence
from typing import Any, Generic, TypeVar

import jax
import numpy as np

from hybridvlm.config import Buckets
from hybridvlm.tokenizers.messages import Message, parts_of
from hybridvlm.tokenizers.text import Text, concatenate, cut_at_media

# What stands in the fields of a batch: NumPy's arrays as the host makes them, JAX's in a program, or shapes alone
ArrayT = TypeVar("ArrayT")
BatchT = TypeVar("BatchT", bound="Batch[Any]")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch(Generic[ArrayT]):
    """Prompts as arrays of one bucket.

    input_ids [B,L] int32, with any id at visual positions; segment [B,L] int32 (0 = padding, at the end); frame [B,L] int32, the
    video frame of a visual position, -1 at text, and `own_text(f)` at the text that frame f has of its own; frame_count [B] int32,
    real frames of each example (the rest of the frame bucket is padding).
    """

    input_ids: ArrayT
    segment: ArrayT
    frame: ArrayT
    frame_count: ArrayT


# What each formatted piece of a style may name, with a value to try it with
_FIELDS: dict[str, dict[str, Any]] = {
    "frame": {"number": 1, "seconds": 0.5},
    "also": {"number": 1, "seconds": 0.5},
    "question": {"question": "?"},
}


@dataclasses.dataclass(frozen=True)
class PromptStyle:
    """The text around the frames; each piece is tokenised by itself, so that what is dropped never changes how the rest is split
    into tokens.

    before, after: around the whole video. frame, after_frame: around each frame's tokens, and between: from one frame to the
    next; `frame` may use {number} (from 1) and {seconds}. also: for the second frame of a patch of two, after the first
    one's `frame`; opening: after both. image, after_image: around an image. question: what a question is put into.
    """

    before: str = ""
    frame: str = ""
    after_frame: str = ""
    question: str = "{question}"
    between: str = ""
    also: str = ""
    opening: str = ""
    after: str = ""
    image: str = ""
    after_image: str = ""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            piece = getattr(self, field.name)
            if not isinstance(piece, str) or len(piece) > 1 << 14:
                raise ValueError(
                    f"style.{field.name} must be a text of at most {1 << 14} characters, got {piece!r:.60}"
                )
            if field.name in _FIELDS:
                _check_form(f"style.{field.name}", piece, _FIELDS[field.name])
        if not any(name == "question" for _, name, _, _ in string.Formatter().parse(self.question)):
            raise ValueError(f"style.question must hold {{question}}, got {self.question!r:.60}")


def _check_form(where: str, form: str, values: Mapping[str, Any]) -> None:
    """Refuse a form that names anything but these values, or writes one at great width."""
    try:
        for _, name, spec, conversion in string.Formatter().parse(form):
            if name is None:
                continue
            if name not in values:
                raise ValueError(f"it names {name[:40]!r}")
            spec = spec or ""
            if conversion or len(spec) > 8 or "{" in spec or re.search(r"\d{4}", spec):
                raise ValueError(f"{name!r} has the format {(conversion or '') + spec:.40}")
        form.format(**values)
    except ValueError as error:
        known = ", ".join(f"{{{name}}}" for name in values)
        raise ValueError(
            f"{where} must be a text that may hold {known} with a short format, got {form!r:.60}: {error}"
        ) from error


def own_text(frame: Any) -> Any:
    """What stands for text of a frame's own (time stamp, separators) in the `frame` of a Layout or Batch; its own inverse."""
    return -2 - frame


@dataclasses.dataclass(frozen=True)
class Layout:
    """One prompt before padding: ids [L], the frame [L] of every position (of text below 0, as of `Batch`), and how many frames."""

    ids: np.ndarray
    frame: np.ndarray
    frames: int

    @property
    def text(self) -> int:
        return int((self.frame < 0).sum())

    @property
    def other_text(self) -> int:
        """Text tokens that are no frame's own."""
        return int((self.frame == -1).sum())

    @property
    def frame_text(self) -> int:
        """Most text tokens that one frame has of its own."""
        return int(np.bincount(own_text(self.frame[self.frame < -1])).max(initial=0))


class Pieces:
    """A prompt under construction: text and runs of visual tokens, in order."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.frame: list[int] = []
        self.frames = 0

    def text(self, piece: str, of: int | None = None) -> None:
        """Add text, tokenised by itself; nothing for an empty one. Control tokens in a `Text` count where they are trusted.

        of: the frame whose own it is, which may be dropped with it.
        """
        new = self.tokenizer.encode(piece) if piece else []
        self.ids.extend(new)
        self.frame.extend([-1 if of is None else own_text(of)] * len(new))

    def visual(self, tokens: int, frames: int = 1) -> None:
        """Add one run of visual tokens, which stands for `frames` of the frames that the tower gives."""
        self.ids.extend([0] * tokens)
        self.frame.extend([self.frames] * tokens)
        self.frames += frames

    def layout(self) -> Layout:
        frame = np.asarray(self.frame, np.int32)
        seen = np.flatnonzero(frame >= 0)
        # behind the last visual token is what all methods take for the question
        rest = frame[seen[-1] + 1 :] if len(seen) else frame
        rest[:] = -1
        return Layout(np.asarray(self.ids, np.int32), frame, self.frames)


def video_pieces(
    pieces: Pieces, seconds: Sequence[float], tokens: int, style: PromptStyle, *, patch: int = 1, group: int = 1
) -> None:
    """Add a video: `tokens` per run, a run being `group` patches (pooling over time) of `patch` frames each (Omni: 2)."""
    pieces.text(style.before)
    for start in range(0, len(seconds), patch * group):
        number = pieces.frames
        if start:
            pieces.text(style.between, number)
        shown = range(start, min(start + patch, len(seconds)))
        labels = [style.frame] + [style.also] * (len(shown) - 1)
        label = "".join(form.format(number=at + 1, seconds=seconds[at]) for form, at in zip(labels, shown, strict=True))
        pieces.text(label + style.opening, number)
        pieces.visual(tokens, min(group, -(-(len(seconds) - start) // patch)))
        pieces.text(style.after_frame, number)
    pieces.text(style.after)


def user_message(question: str, style: PromptStyle, kinds: Sequence[str] = ("video",)) -> Message:
    """One question about media of these kinds, put the way `style` has it."""
    media = [{"type": kind} for kind in kinds]
    return {"role": "user", "content": [*media, {"type": "text", "text": style.question.format(question=question)}]}


def render(
    tokenizer: Any,
    messages: Sequence[Message],
    template: str,
    *,
    template_options: Mapping[str, Any] | None = None,
) -> list[Text | int]:
    """Messages as the chat template writes them, cut where media stand: text, and the number of each medium in order.

    template_options: further variables of the chat template, such as {"enable_thinking": False}. A tokenizer without `chat`
    belongs to a model that knows no conversation: one user message, nothing around it. ValueError for an unknown kind of
    content (sound among them), or a conversation where there is none.
    """
    spoken = parts_of(messages)
    if hasattr(tokenizer, "chat"):
        text = tokenizer.chat(messages, template, template_options=template_options)
    elif template_options:
        raise ValueError(
            f"template_options {sorted(template_options)} are for a chat template, and this model has none"
        )
    elif len(spoken) == 1 and spoken[0][0] == "user":
        text = concatenate(piece for _, piece in spoken[0][1])
    else:
        raise ValueError("this model knows no conversation: give one user message at a time")
    parts, count = cut_at_media(text), sum(kind != "text" for _, own in spoken for kind, _ in own)
    found = [part for part in parts if isinstance(part, int)]
    if found != list(range(count)):
        raise ValueError(
            f"the chat template put media {found} where {list(range(count))} were given; it cannot be used"
        )
    return parts


def allow_special_tokens(tokenizer: Any) -> None:
    """Let control tokens (`<|im_end|>`) in what people write be control tokens from now on, instead of plain text.

    ValueError for a tokenizer whose vocabulary is closed: it takes none in a text.
    """
    if not hasattr(tokenizer, "allow_special_tokens"):
        raise ValueError(
            "allow_special_tokens: this model's vocabulary is closed, and no text of it has special tokens"
        )
    tokenizer.allow_special_tokens = True


def make_batch(
    layouts: Sequence[Layout], buckets: Buckets, tokens_per_frame: int, group: int = 1
) -> tuple[Batch[np.ndarray], int, int]:
    """Pad prompts to the smallest bucket that holds them all: (batch, frame bucket, text bucket).

    tokens_per_frame: positions per run of `group` frames. ValueError if a prompt is over the largest bucket.
    """
    if not layouts:
        raise ValueError("make_batch needs at least one prompt, got none")
    most = max(item.frames for item in layouts)
    frames = buckets.pick("frames", most) if most else 0
    text = buckets.pick("text", max(item.text for item in layouts))
    length = -(-frames // group) * tokens_per_frame + text
    ids, frame = np.zeros((len(layouts), length), np.int32), np.full((len(layouts), length), -1, np.int32)
    segment = np.zeros((len(layouts), length), np.int32)
    for row, item in enumerate(layouts):
        n = len(item.ids)
        ids[row, :n], frame[row, :n], segment[row, :n] = item.ids, item.frame, 1
    counts = np.asarray([item.frames for item in layouts], np.int32)
    return Batch(ids, segment, frame, counts), frames, text


def rest_length(batch: Batch[Any]) -> int:
    """Tokens of the longest text behind the last visual token of the prompts; 0 if one of them has no text there (host side)."""
    rest = _rest_lengths(np.asarray(batch.segment), np.asarray(batch.frame))
    return int(rest.max()) if len(rest) and rest.min() else 0


def rest_of(batch: BatchT, length: int) -> BatchT:
    """The text behind the last visual token of every prompt, as a batch of rows of `length` tokens (host side).

    Raises:
        ValueError: a prompt has more of it.
    """
    segment, frame = np.asarray(batch.segment), np.asarray(batch.frame)
    longest = int(_rest_lengths(segment, frame).max(initial=0))
    if longest > length:
        raise ValueError(f"length: expected at least {longest}, the text behind the video of one prompt, got {length}")
    index = _shared_length(segment, frame)[:, None] + np.arange(length)
    inside = (index < segment.shape[1]) & (np.take_along_axis(segment, np.minimum(index, segment.shape[1] - 1), 1) > 0)

    def cut(array: Any) -> np.ndarray:
        array = np.asarray(array)
        at = np.minimum(index, array.shape[1] - 1).reshape(*index.shape, *(1,) * (array.ndim - 2))
        return np.where(inside.reshape(at.shape), np.take_along_axis(array, at, axis=1), 0).astype(array.dtype)

    fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    rows = {name: cut(array) for name, array in fields.items() if np.ndim(array) > 1}
    return dataclasses.replace(batch, **rows | {"frame": np.full(index.shape, -1, np.int32)})


def _rest_lengths(segment: np.ndarray, frame: np.ndarray) -> np.ndarray:
    """Tokens of each prompt behind its last visual one [B]."""
    return np.sum(segment > 0, axis=1) - _shared_length(segment, frame)


def _shared_length(segment: np.ndarray, frame: np.ndarray) -> np.ndarray:
    """Tokens of each prompt up to its last visual one [B]."""
    return np.max(np.where((frame >= 0) & (segment > 0), np.arange(1, segment.shape[1] + 1), 0), axis=1, initial=0)
