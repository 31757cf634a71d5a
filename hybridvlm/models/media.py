"""Pictures on their way into a model: clips of frames, and the resizing that image processors do (host side)."""

from __future__ import annotations

import dataclasses
import math

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Clip:
    """A video's sampled frames, or one image.

    seconds: time stamp of each frame. frames: uint8 RGB [F,h,w,3], a video's of the family's frame_size, an image's as it is;
    None where only the layout of a prompt is asked. size: (height, width) of the source. numbers: the frames' numbers in
    the file, and fps its rate, for prompts that count in frames.
    """

    seconds: tuple[float, ...]
    frames: np.ndarray | None = None
    kind: str = "video"
    size: tuple[int, int] = (0, 0)
    numbers: tuple[int, ...] = ()
    fps: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in ("video", "image"):
            raise ValueError(f"Clip.kind must be 'video' or 'image', got {self.kind!r}")
        if not self.seconds:
            raise ValueError("Clip.seconds is empty; a clip has at least one frame")
        if self.frames is not None and (self.frames.ndim != 4 or len(self.frames) != len(self.seconds)):
            raise ValueError(
                f"Clip.frames must be [F,h,w,3] with F = {len(self.seconds)} (the time stamps), got {self.frames.shape}"
            )


def resize(frames: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 frames [F,h,w,3] -> [F,height,width,3], bicubic with antialiasing, rounded to uint8 (as Pillow does it)."""
    from PIL import Image

    if frames.shape[1:3] == tuple(size):
        return frames
    height, width = size
    out = np.empty((len(frames), height, width, 3), np.uint8)
    for target, frame in zip(out, frames, strict=True):
        target[:] = np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC))
    return out


def tile_grid(height: int, width: int, tile: tuple[int, int], most: int) -> tuple[int, int]:
    """(rows, columns) of the tiles an image is cut into: of all grids of 1 to `most` tiles the one of nearest aspect.

    On a tie a later (larger) grid wins only if the image fills more than half of it (InternVL's rule).
    """
    grids = sorted(
        ((cols, rows) for rows in range(1, most + 1) for cols in range(1, most + 1) if cols * rows <= most),
        key=lambda grid: grid[0] * grid[1],
    )
    aspect, best, nearest = width / height, (1, 1), math.inf
    for cols, rows in grids:
        off = abs(aspect - cols / rows)
        fills = height * width > 0.5 * tile[0] * tile[1] * cols * rows
        if off < nearest or (off == nearest and fills):
            best, nearest = (rows, cols), off
    return best


def cut_tiles(image: np.ndarray, tile: tuple[int, int], most: int) -> np.ndarray:
    """An image [h,w,3] -> tiles [n,height,width,3], row-major, with the whole image as a last tile if there are several."""
    rows, cols = tile_grid(image.shape[0], image.shape[1], tile, most)
    (whole,) = resize(image[None], (rows * tile[0], cols * tile[1]))
    tiles = whole.reshape(rows, tile[0], cols, tile[1], 3).swapaxes(1, 2).reshape(-1, *tile, 3)
    return tiles if len(tiles) == 1 else np.concatenate([tiles, resize(image[None], tile)])


def tile_count(height: int, width: int, tile: tuple[int, int], most: int) -> int:
    """How many tiles `cut_tiles` gives."""
    rows, cols = tile_grid(height, width, tile, most)
    return rows * cols + (rows * cols > 1)


def image_grid(height: int, width: int, patch: int, merge: int, least: int, most: int) -> tuple[int, int]:
    """(rows, columns) of patches that an image of any size is brought to: its own grid, scaled to hold `least` to `most`
    patches, both sides multiples of `merge` (Nemotron 3 Nano Omni)."""
    rows, cols = round(height / patch + 0.5), round(width / patch + 0.5)
    shrink = min(math.sqrt(most / (rows * cols)), 1.0)
    rows, cols = (min(max(1, math.floor(shrink * side)), most // merge) for side in (rows, cols))
    if most > least and rows * cols < least:
        grow = math.sqrt(least / (rows * cols))
        rows, cols = math.ceil(grow * rows), math.ceil(grow * cols)
    if odd := rows % merge:
        rows = rows + merge - odd if (rows + merge - odd) * cols <= most else max(merge, rows - odd)
    if odd := cols % merge:
        cols = cols + merge - odd if rows * (cols + merge - odd) <= most else max(merge, cols - odd)
    return rows, cols


def video_grid(height: int, width: int, merge: int, target: int) -> tuple[int, int]:
    """(rows, columns) of patches of a video frame that keeps its aspect and has about `target` of them (Omni)."""
    aspect = width / height
    rows, cols = max(round(math.sqrt(target / aspect)), 1), max(round(math.sqrt(target * aspect)), 1)
    up_rows, up_cols = -(-rows // merge) * merge, -(-cols // merge) * merge
    if up_rows * up_cols <= target:
        return up_rows, up_cols
    return max(merge, rows // merge * merge), max(merge, cols // merge * merge)
