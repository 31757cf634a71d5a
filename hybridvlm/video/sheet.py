"""A contact sheet of frames on which the patches that a model dropped are dimmed."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence

import numpy as np

SIDE, GAP = 192, 6  # pixels: the longer side of a frame on the sheet, and the room between two
# pixels: the height of the caption's letters, and of its lines
_FONT, _LINE = 13, 18
_DIM = 0.22  # of a dropped patch's brightness


def contact_sheet(
    frames: np.ndarray,
    survivors: np.ndarray,
    path: str | os.PathLike[str],
    seconds: Sequence[float] = (),
    patch: int = 1,
    *,
    caption: Sequence[str] = (),
    aspect: float | None = None,
) -> None:
    """Write a PNG of frames with the surviving patches in full light and framed, the rest dimmed.

    Args:
        frames: [F,h,w,3] uint8.
        survivors: [ceil(F/patch),rows,cols] bool.
        path: of the PNG.
        seconds: time stamps to write on the frames.
        patch: frames that share one grid of visual tokens.
        caption: lines above the frames, such as the question and the answer; a legend follows them.
        aspect: width over height at which a frame is shown (default: that of its pixels).
    """
    from PIL import Image, ImageDraw, ImageFont

    if len(survivors) != -(-len(frames) // patch):
        raise ValueError(f"survivors has {len(survivors)} grids for {len(frames)} frames in groups of {patch}")
    ratio = aspect or frames.shape[2] / frames.shape[1]
    size = max(1, round(SIDE * min(1.0, ratio))), max(1, round(SIDE * min(1.0, 1 / ratio)))
    columns = min(len(frames), max(1, math.ceil(math.sqrt(len(frames) * size[1] / size[0]))))
    rows = -(-len(frames) // columns)
    wide = columns * (size[0] + GAP) + GAP
    legend = ["framed, full light: kept to the last layer; dimmed: dropped"] if caption else []
    font = ImageFont.load_default(_FONT)
    lines = [part for line in [*caption, *legend] for part in _wrapped(line, wide - 2 * GAP, font.getlength)]
    head = len(lines) * _LINE + (GAP if lines else 0)
    sheet = Image.new("RGB", (wide, head + rows * (size[1] + GAP) + GAP), (32, 32, 36))
    draw = ImageDraw.Draw(sheet)
    for number, line in enumerate(lines):
        draw.text((GAP, GAP + number * _LINE), line, fill=(235, 235, 235), font=font)
    for number, frame in enumerate(frames):
        grid = survivors[number // patch]
        small = np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC), np.float32)
        at_row = np.minimum(np.arange(size[1]) * grid.shape[0] // size[1], grid.shape[0] - 1)
        at_col = np.minimum(np.arange(size[0]) * grid.shape[1] // size[0], grid.shape[1] - 1)
        kept = grid[at_row][:, at_col, None]
        left, top = GAP + number % columns * (size[0] + GAP), head + GAP + number // columns * (size[1] + GAP)
        sheet.paste(Image.fromarray(np.where(kept, small, _DIM * small).astype(np.uint8)), (left, top))
        if not grid.all():
            for row, col in np.argwhere(grid):
                box = [
                    left + math.ceil(col * size[0] / grid.shape[1]),
                    top + math.ceil(row * size[1] / grid.shape[0]),
                    left + math.ceil((col + 1) * size[0] / grid.shape[1]) - 1,
                    top + math.ceil((row + 1) * size[1] / grid.shape[0]) - 1,
                ]
                draw.rectangle(box, outline=(255, 196, 0))
        if number < len(seconds):
            label = f"{seconds[number]:.1f}s"
            draw.rectangle([left, top, left + 6 * len(label) + 4, top + 12], fill=(0, 0, 0))
            draw.text((left + 2, top), label, fill=(255, 255, 255))
    sheet.save(path, format="PNG")


def _wrapped(line: str, width: float, length: Callable[[str], float]) -> list[str]:
    """A line in parts that are at most `width` long, cut between words, or inside one that is too long by itself."""
    parts = [""]
    for word in line.split():
        joined = f"{parts[-1]} {word}".strip()
        if length(joined) <= width:
            parts[-1] = joined
            continue
        if parts[-1]:
            parts.append("")
        for letter in word:
            if parts[-1] and length(parts[-1] + letter) > width:
                parts.append("")
            parts[-1] += letter
    return parts
