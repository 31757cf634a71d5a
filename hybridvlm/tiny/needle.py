"""The embedded long-video benchmark: which item was where, and where did it point?

A video has F <= 64 frames of 4x4 cells (`tiles`). Every cell holds a real item of a random class, so that nothing
stands out without the question; in a frame the 16 border colours are a permutation of the cells; the two tags of an
item spell the number of a frame of the video. One token a cell: token = frame * 16 + cell.

| type | question | first look-up | answer |
|---|---|---|---|
| WHAT, WHERE, TAG1, TAG2 | `red@t12 none what ?` | the red item in frame 12 | its class, cell or tag colour |
| 2G | `red@t12 t40 class-at ?` | its cell | class at (frame 40, that cell) |
| 2P | `red@t12 none class-pointed ?` | its number and its cell | class at (frame number, that cell) |
| 2C | `red@t12 none class-same ?` | its number | class of the red item in that frame |

The second look-up of a two-hop question always lies in another frame than the first. Everything is a pure function of
(seed, split, video index): videos of different splits use different images (`assets`) and different random streams.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from hybridvlm.tiny import assets, tiles, vocabulary

FRAMES = vocabulary.TIMES  # 64, the longest video that the words can name
TYPES = vocabulary.TYPES
WHAT, WHERE, TAG1, TAG2, GIVEN, POINTED, SAME = range(len(TYPES))
TWO_HOP = ("2G", "2P", "2C")
_CLASS_OPTIONS = tuple(range(vocabulary.CLASS, vocabulary.CLASS + tiles.CLASSES))
_CELL_OPTIONS = tuple(range(vocabulary.CELL, vocabulary.CELL + tiles.CELLS))
_TAG_OPTIONS = tuple(range(vocabulary.TAG, vocabulary.TAG + len(tiles.TAG_WORDS)))
# ids that can answer each type
OPTIONS = dict.fromkeys(TYPES, _CLASS_OPTIONS) | {"WHERE": _CELL_OPTIONS, "TAG1": _TAG_OPTIONS, "TAG2": _TAG_OPTIONS}


@dataclasses.dataclass(frozen=True)
class Video:
    """What is in each cell; all arrays int32 [F,16].

    image: number in the split's bank; label: class; border: border colour (a permutation in each frame); tag1, tag2:
    tag colours, 8 * tag1 + tag2 = `number` is a frame of the video.
    """

    split: str
    index: int
    image: np.ndarray
    label: np.ndarray
    border: np.ndarray
    tag1: np.ndarray
    tag2: np.ndarray

    @property
    def frames(self) -> int:
        """F."""
        return len(self.label)

    @property
    def number(self) -> np.ndarray:
        """The frame that each item points at, [F,16]."""
        return 8 * self.tag1 + self.tag2

    @property
    def cell_of(self) -> np.ndarray:
        """The cell of each border colour in each frame, [F,16 colours]: the inverse of `border`."""
        return np.argsort(self.border, axis=1).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Questions:
    """n questions on one video; int32 arrays.

    text [n,4]: word ids; answer [n]: word id; type [n]: index into TYPES; hop1, hop2 [n]: the tokens that the answer
    needs (hop2 = -1 for one hop). For training only, where the second look-up must go (-1 where the type does not say
    it that way): target_frame (two-hop types), target_cell (2G, 2P), target_colour (2C).
    """

    text: np.ndarray
    answer: np.ndarray
    type: np.ndarray
    hop1: np.ndarray
    hop2: np.ndarray
    target_frame: np.ndarray
    target_cell: np.ndarray
    target_colour: np.ndarray

    def __len__(self) -> int:
        return len(self.type)

    def type_names(self) -> list[str]:
        """Names of the types."""
        return [TYPES[t] for t in self.type]

    def texts(self) -> list[str]:
        """The questions in words."""
        return [" ".join(vocabulary.WORDS[i] for i in row) for row in self.text]

    def answers(self) -> list[str]:
        """The answers in words."""
        return [vocabulary.WORDS[i] for i in self.answer]

    def options(self) -> list[list[str]]:
        """The words that could answer each question, by its type."""
        return [[vocabulary.WORDS[i] for i in OPTIONS[name]] for name in self.type_names()]


def random_stream(purpose: int, split: str, index: int, seed: int) -> np.random.Generator:
    """The random numbers of one video of a split; a purpose has a stream of its own."""
    assets.check_split(split)
    return np.random.default_rng([purpose, seed, assets.SPLITS.index(split), index])


def make_video(split: str, index: int, frames: int = FRAMES, seed: int = 0) -> Video:
    """Video number `index` of a split: classes, colours and numbers uniform, images uniform within their class."""
    if not 1 <= frames <= FRAMES:
        raise ValueError(f"frames must be 1..{FRAMES} (the vocabulary names no later time), got {frames}")
    start = assets.load_bank(split).start
    rng = random_stream(0, split, index, seed)
    shape = (frames, tiles.CELLS)
    label = rng.integers(tiles.CLASSES, size=shape)
    image = rng.integers(start[label], start[label + 1])
    border = rng.permuted(np.broadcast_to(np.arange(tiles.CELLS), shape), axis=1)
    number = rng.integers(frames, size=shape)
    arrays = (a.astype(np.int32) for a in (image, label, border, number // 8, number % 8))
    return Video(split, index, *arrays)


def render_video(video: Video) -> np.ndarray:
    """Pixels, uint8 [F,128,128,3]."""
    images = assets.load_bank(video.split).images[video.image.reshape(-1)]
    cells = tiles.render(images, video.border.reshape(-1), video.tag1.reshape(-1), video.tag2.reshape(-1))
    return tiles.assemble(cells)


def make_questions(video: Video, n: int, rng: np.random.Generator, types: Sequence[str] = TYPES) -> Questions:
    """n questions on `video`; their types go through `types` in turn, so that they are balanced within one.

    Two-hop types need at least two frames. The items asked about are uniform, save that one which points at its own
    frame is not asked about in 2P and 2C.
    """
    unknown = [t for t in types if t not in TYPES]
    if unknown or not types:
        raise ValueError(f"types must be some of {', '.join(TYPES)}, got {list(types)!r}")
    kind = np.resize([TYPES.index(t) for t in types], n)
    number, pointer = video.number, kind >= POINTED
    abroad = np.flatnonzero(number != np.arange(video.frames)[:, None])  # items that point at another frame
    if ((kind >= GIVEN).any() and video.frames < 2) or (pointer.any() and not len(abroad)):
        raise ValueError(f"two-hop types need another frame to point at; got {video.frames} frames, ask one-hop types")

    hop1 = rng.integers(video.frames * tiles.CELLS, size=n)
    if len(abroad):
        hop1 = np.where(pointer, abroad[rng.integers(len(abroad), size=n)], hop1)
    other = (hop1 // tiles.CELLS + rng.integers(1, max(video.frames, 2), size=n)) % video.frames
    return questions_about(video, kind, hop1, other)


def second_look(video: Video, kind: np.ndarray, hop1: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The token of the second look-up of two-hop questions [n]; arguments as `questions_about` takes them."""
    time, cell = np.divmod(hop1, tiles.CELLS)
    frame = np.where(kind == GIVEN, other, video.number[time, cell])
    target = np.where(kind == SAME, video.cell_of[frame, video.border[time, cell]], cell)
    return frame * tiles.CELLS + target


def questions_about(video: Video, kind: np.ndarray, hop1: np.ndarray, other: np.ndarray) -> Questions:
    """Questions whose first look-up is known.

    Args:
        video: which they are about.
        kind: [n], indices into TYPES.
        hop1: [n], the token of the first look-up.
        other: [n], the frame that 2G names; read for that type alone.
    """
    n, two_hop = len(kind), kind >= GIVEN
    time, cell = np.divmod(hop1, tiles.CELLS)
    colour = video.border[time, cell]
    hop2 = second_look(video, kind, hop1, other)
    frame, final = hop2 // tiles.CELLS, np.where(two_hop, hop2, hop1)

    answer = vocabulary.CLASS + video.label.reshape(-1)[final]
    answer = np.where(kind == WHERE, vocabulary.CELL + cell, answer)
    answer = np.where(kind == TAG1, vocabulary.TAG + video.tag1[time, cell], answer)
    answer = np.where(kind == TAG2, vocabulary.TAG + video.tag2[time, cell], answer)
    text = np.stack(
        [
            vocabulary.COMPOUND + colour * vocabulary.TIMES + time,
            np.where(kind == GIVEN, vocabulary.TIME + other, vocabulary.NONE),
            vocabulary.TYPE + kind,
            np.full(n, vocabulary.MARK),
        ],
        axis=1,
    )
    arrays = (
        text,
        answer,
        kind,
        hop1,
        np.where(two_hop, hop2, -1),
        np.where(two_hop, frame, -1),
        np.where((kind == GIVEN) | (kind == POINTED), cell, -1),
        np.where(kind == SAME, colour, -1),
    )
    return Questions(*(a.astype(np.int32) for a in arrays))


def split_questions(
    split: str = "test", videos: int = 256, per_video: int = 4, frames: int = FRAMES, seed: int = 0
) -> list[tuple[Video, Questions]]:
    """The evaluation list: `videos` videos with `per_video` questions each, types balanced within one over the list."""
    pairs = []
    for index in range(videos):
        first = index * per_video % len(TYPES)
        video = make_video(split, index, frames, seed)
        rng = random_stream(1, split, index, seed)
        pairs.append((video, make_questions(video, per_video, rng, TYPES[first:] + TYPES[:first])))
    return pairs


def question_id(video: Video, number: int) -> str:
    """Name of question number `number` on `video`, e.g. `needle-test-0012-3`."""
    return f"needle-{video.split}-{video.index:04d}-{number}"
