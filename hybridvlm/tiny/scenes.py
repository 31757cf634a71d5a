"""The embedded benchmark on scenes that last: most of a frame is what the frame before it showed.

The same tiles, words and types of questions as `needle`, whose frames have nothing in common. Here an item stays in its cell
until something happens to it:

| event | how often | what changes |
|---|---|---|
| an item is replaced by another one of its colour | 8% of cells a frame | a cell |
| two neighbours change places | 35% of frames | two cells |
| a cell is covered by a dark patch, for 2 to 4 frames | 1% of cells a frame | a cell, twice |
| the camera moves by a cell; what leaves on one side comes in on the other | a frame in 48 | every cell |
| cut: another scene | a frame in 32 | every cell |

About a fifth of all tokens are *onsets*, which show something else than the frame before; each of the others repeats its
predecessor up to camera noise. A question is of moment "onset" where every token that it needs is one, so that a method that drops
what repeats can keep all of them; "later" where one at least is a repetition, which can only be read off its predecessors once it is
dropped. Half of the questions are of each. Nobody asks about a covered cell.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from hybridvlm.tiny import assets, needle, tiles

FRAMES, TWO_HOP = needle.FRAMES, needle.TWO_HOP
MOMENTS = ("onset", "later")
REPLACED, SWAPPED, COVERED, MOVED, CUT = 0.08, 0.35, 0.01, 1 / 48, 1 / 32
NOISE = 3  # levels of 255 that the camera adds or takes away
PATCH = 64  # grey level of what covers a cell


@dataclasses.dataclass(frozen=True)
class Scenes(needle.Video):
    """A video of lasting scenes.

    Attributes:
        covered: bool [F,16], what cannot be seen.
        onset: bool [F,16], what shows something else than the same cell of the frame before; all of frame 0.
    """

    covered: np.ndarray
    onset: np.ndarray


def _events(frames: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What happens: (item [F,16], numbered as they appear; border colour of each item [items]; covered [F,16])."""
    colours = [*rng.permutation(tiles.CELLS)]
    item, left = np.arange(tiles.CELLS), np.zeros(tiles.CELLS, int)
    items, covered = [item], [left > 0]
    for _ in range(1, frames):
        item, left = item.copy(), np.maximum(left - 1, 0)
        event = rng.random()
        if event < CUT:
            item = len(colours) + np.arange(tiles.CELLS)
            colours += [*rng.permutation(tiles.CELLS)]
            left[:] = 0
        elif event < CUT + MOVED:
            shift, axis = rng.choice([-1, 1]), rng.integers(2)
            item, left = (np.roll(a.reshape(tiles.GRID, tiles.GRID), shift, axis).reshape(-1) for a in (item, left))
        else:
            for cell in np.flatnonzero(rng.random(tiles.CELLS) < REPLACED):
                colours.append(colours[item[cell]])
                item[cell] = len(colours) - 1
            if rng.random() < SWAPPED:
                grid = np.arange(tiles.CELLS).reshape(tiles.GRID, tiles.GRID)
                grid = grid if rng.integers(2) else grid.T
                row, column = rng.integers(tiles.GRID), rng.integers(tiles.GRID - 1)
                pair = grid[row, column : column + 2]
                item[pair], left[pair] = item[pair[::-1]], left[pair[::-1]]
            hidden = (rng.random(tiles.CELLS) < COVERED) & (left == 0)
            left = np.where(hidden, rng.integers(2, 5, size=tiles.CELLS), left)
        items.append(item)
        covered.append(left > 0)
    return np.array(items), np.array(colours), np.array(covered)


def make_video(split: str, index: int, frames: int = FRAMES, seed: int = 0) -> Scenes:
    """Video number `index` of a split, a pure function of its arguments.

    Raises:
        ValueError: for a number of frames that the vocabulary cannot name, or no such split.
    """
    if not 1 <= frames <= FRAMES:
        raise ValueError(f"frames must be 1..{FRAMES} (the vocabulary names no later time), got {frames}")
    start = assets.load_bank(split).start
    rng = needle.random_stream(2, split, index, seed)
    item, colours, covered = _events(frames, rng)
    label = rng.integers(tiles.CLASSES, size=len(colours))
    image = rng.integers(start[label], start[label + 1])
    number = rng.integers(frames, size=len(colours))
    before = np.concatenate([np.full((1, tiles.CELLS), -1), np.where(covered, -2, item)[:-1]])
    image, label, border, tag1, tag2 = (
        a[item].astype(np.int32) for a in (image, label, colours, number // 8, number % 8)
    )
    return Scenes(split, index, image, label, border, tag1, tag2, covered, before != np.where(covered, -2, item))


def render_video(video: Scenes) -> np.ndarray:
    """Pixels with camera noise, uint8 [F,128,128,3]."""
    cells = tiles.split_cells(needle.render_video(video))
    cells[video.covered.reshape(-1)] = PATCH
    rng = needle.random_stream(3, video.split, video.index, 0)
    noise = rng.integers(-NOISE, NOISE + 1, size=cells.shape, dtype=np.int8)
    return tiles.assemble(np.clip(cells.astype(np.int16) + noise, 0, 255).astype(np.uint8))


def _is_onset(video: Scenes, kind: np.ndarray, hop1: np.ndarray, hop2: np.ndarray) -> np.ndarray:
    onset = video.onset.reshape(-1)
    return onset[hop1] & ((kind < needle.GIVEN) | onset[hop2])


def moments(video: Scenes, questions: needle.Questions) -> list[str]:
    """The moment of every question, of MOMENTS."""
    onset = _is_onset(video, questions.type, questions.hop1, questions.hop2)
    return [MOMENTS[0] if each else MOMENTS[1] for each in onset]


def make_questions(
    video: Scenes, kinds: Sequence[str], wanted: Sequence[str], rng: np.random.Generator
) -> needle.Questions:
    """One question of every type in `kinds`, uniform among those of the moment in `wanted`.

    Where a video has none of that moment, as one of a single frame has nothing later, the question is of the other one.

    Raises:
        ValueError: nothing of such a type can be asked about the video.
    """
    hidden, picked = video.covered.reshape(-1), []
    for name, moment in zip(kinds, wanted, strict=True):
        kind = needle.TYPES.index(name)
        hop1 = np.arange(video.frames * tiles.CELLS)
        other = np.zeros_like(hop1)
        if kind == needle.GIVEN:
            hop1, other = (a.reshape(-1) for a in np.meshgrid(hop1, np.arange(video.frames), indexing="ij"))
        kind_of = np.full(len(hop1), kind)
        hop2 = needle.second_look(video, kind_of, hop1, other)
        possible = ~hidden[hop1]
        if kind >= needle.GIVEN:
            possible &= ~hidden[hop2] & (hop2 // tiles.CELLS != hop1 // tiles.CELLS)
        fits = possible & (_is_onset(video, kind_of, hop1, hop2) == (moment == MOMENTS[0]))
        candidates = np.flatnonzero(fits if fits.any() else possible)
        if not len(candidates):
            raise ValueError(f"nothing of type {name} can be asked about a video of {video.frames} frames")
        one = rng.choice(candidates)
        picked.append((kind, hop1[one], other[one]))
    return needle.questions_about(video, *map(np.array, zip(*picked, strict=True)))


def split_questions(
    split: str = "test", videos: int = 256, per_video: int = 4, frames: int = FRAMES, seed: int = 0
) -> list[tuple[Scenes, needle.Questions]]:
    """The evaluation list: `videos` videos with `per_video` questions each, types and moments balanced over the list."""
    pairs = []
    for index in range(videos):
        numbers = index * per_video + np.arange(per_video)
        kinds = [needle.TYPES[number % len(needle.TYPES)] for number in numbers]
        wanted = [MOMENTS[number // len(needle.TYPES) % 2] for number in numbers]
        video = make_video(split, index, frames, seed)
        rng = needle.random_stream(4, split, index, seed)
        pairs.append((video, make_questions(video, kinds, wanted, rng)))
    return pairs


def question_id(video: needle.Video, number: int) -> str:
    """Name of question number `number` on `video`, e.g. `scenes-test-0012-3`."""
    return f"scenes-{video.split}-{video.index:04d}-{number}"
