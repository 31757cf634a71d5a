"""Sizes and positions of Qwen VL: what frames are resized to, and the three axes of M-RoPE."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np

from hybridvlm.config import QwenConfig
from hybridvlm.models.media import Clip

ASPECT = 200  # most that one side of a picture may be longer than the other


def smart_resize(
    height: int, width: int, factor: int, least: int, most: int, frames: int = 1, temporal: int = 1
) -> tuple[int, int]:
    """(height, width) of a picture in multiples of `factor`, near its aspect, with `least` to `most` pixels in all frames together.

    frames and temporal: how many there are, and how many a tubelet takes. Sides round to the nearest multiple, an even half down
    to the even one. ValueError if one side is over 200 times the other.
    """
    if max(height, width) > ASPECT * min(height, width):
        raise ValueError(f"a picture of {height}x{width} is more than {ASPECT} times longer than wide; crop it")
    if frames > 1 and min(height, width) < factor:  # Qwen3-VL enlarges tiny videos first
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    rows, cols = round(height / factor) * factor, round(width / factor) * factor
    held = round(frames / temporal) * temporal * rows * cols
    if held > most:
        beta = math.sqrt(frames * height * width / most)
        return (
            max(factor, math.floor(height / beta / factor) * factor),
            max(factor, math.floor(width / beta / factor) * factor),
        )
    if held < least:
        beta = math.sqrt(least / (frames * height * width))
        return math.ceil(height * beta / factor) * factor, math.ceil(width * beta / factor) * factor
    return rows, cols


def frame_size(config: QwenConfig, height: int, width: int, frames: int, kind: str = "video") -> tuple[int, int]:
    """What the frames of a clip of height x width pixels, `frames` of them, are brought to before `encode`.

    A video's frame gets at most its own limit and an even share of the whole video's.
    """
    v = config.tower
    factor = v.patch_size * v.downsample
    if kind == "image":
        return smart_resize(height, width, factor, *config.image_pixels)
    frames = max(frames, v.temporal_patch)  # a video of one frame shows it twice
    least, most = config.frame_pixels
    most = max(min(most, config.video_pixels // frames), int(1.05 * least))
    if config.generation == 2:
        return smart_resize(height, width, factor, least, most)
    return smart_resize(height, width, factor, least, most * frames, frames, v.temporal_patch)


def at_size(config: QwenConfig, height: int, width: int) -> QwenConfig:
    """The config for clips of this size, as `frame_size` gives it: plans and batches read their grid off it."""
    return dataclasses.replace(config, vision=dataclasses.replace(config.tower, image_size=(height, width)))


def rope_positions(
    frame: np.ndarray, grid: tuple[int, int], factors: tuple[int, int, int] = (1, 1, 1), apart: bool = False
) -> np.ndarray:
    """M-RoPE positions [L,3] (time, row, column) of one prompt: frame [L], -1 for text, runs of grid[0] * grid[1] visual tokens.

    Text counts on by one, on all three axes. A video starts where the text before it ended, its time counts frames, row and column
    start there too, and text goes on after the largest of them all. `apart` (Qwen3-VL, whose frames have text between
    them): each frame starts anew, and its time stands still. factors: frames, rows and columns that were averaged into one
    token, which has the position of the first of them.

    transformers 5.23 continues a Qwen2-VL prompt after max(rows, columns) of a video instead, so that text falls on positions of
    its later frames when it has more of them; the published model and its paper (section 2.1) continue after the maximum.
    """
    rows, cols = grid
    across = np.stack(np.meshgrid(np.arange(rows), np.arange(cols), indexing="ij"), axis=-1).reshape(-1, 2)
    across = across * np.asarray(factors[1:])
    position = np.zeros((len(frame), 3), np.int32)
    edges = [0, *(np.flatnonzero(np.diff(frame >= 0)) + 1), len(frame)]
    at = 0
    for start, stop in itertools.pairwise(edges):
        if start == stop:
            continue
        if frame[start] < 0:
            position[start:stop] = (at + np.arange(stop - start))[:, None]
            at += stop - start
            continue
        if (stop - start) % len(across) or (apart and stop - start > len(across)):
            frames = "a frame" if apart else "frames"
            raise ValueError(f"{stop - start} visual tokens in a row do not fill {frames} of {rows}x{cols}")
        time = np.zeros(stop - start) if apart else frame[start:stop] - frame[start]
        cells = np.tile(across, ((stop - start) // len(across), 1))
        position[start:stop, 0] = at + time
        position[start:stop, 1:] = at + cells
        at += max(
            (1 if apart else int(frame[stop - 1] - frame[start]) + factors[0]), rows * factors[1], cols * factors[2]
        )
    return position


def _grid(config: QwenConfig, clip: Clip) -> tuple[int, int]:
    """Rows and columns of visual tokens of a clip's frames, as they are or as they will be."""
    v = config.tower
    if clip.frames is not None and clip.kind == "video":
        size = clip.frames.shape[1:3]
    else:
        height, width = clip.frames.shape[1:3] if clip.frames is not None else clip.size
        size = frame_size(config, height, width, len(clip.seconds), clip.kind) if height else v.image_size
    step = v.patch_size * v.downsample
    if any(side % step for side in size):
        raise ValueError(f"frames of {size[0]}x{size[1]} are not in multiples of {step}; resize them to frame_size()")
    return size[0] // step, size[1] // step
