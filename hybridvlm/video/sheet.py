"""A contact sheet of frames on which the patches that a model dropped are dimmed."""

from __future__ import annotations

import math
import os

import numpy as np

SIDE, GAP = 192, 6  # pixels: the longer side of a frame on the sheet, and the room between two
_DIM = 0.22  # of a dropped patch's brightness


def contact_sheet(
    frames: np.ndarray,
    survivors: np.ndarray,
    path: str | os.PathLike[str],
    seconds: tuple[float, ...] = (),
    patch: int = 1,
) -> None:
    """Write a PNG of frames [F,h,w,3] uint8 with survivors [ceil(F/patch),rows,cols] bool in full light and framed, the rest dimmed.

    seconds: time stamps to write on the frames. patch: frames that share one grid of visual tokens.
    """
    from PIL import Image, ImageDraw

    if len(survivors) != -(-len(frames) // patch):
        raise ValueError(f"survivors has {len(survivors)} grids for {len(frames)} frames in groups of {patch}")
    height, width = frames.shape[1:3]
    scale = SIDE / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    columns = min(len(frames), max(1, math.ceil(math.sqrt(len(frames) * size[1] / size[0]))))
    rows = -(-len(frames) // columns)
    sheet = Image.new("RGB", (columns * (size[0] + GAP) + GAP, rows * (size[1] + GAP) + GAP), (32, 32, 36))
    draw = ImageDraw.Draw(sheet)
    for number, frame in enumerate(frames):
        grid = survivors[number // patch]
        small = np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC), np.float32)
        at_row = np.minimum(np.arange(size[1]) * grid.shape[0] // size[1], grid.shape[0] - 1)
        at_col = np.minimum(np.arange(size[0]) * grid.shape[1] // size[0], grid.shape[1] - 1)
        kept = grid[at_row][:, at_col, None]
        left, top = GAP + number % columns * (size[0] + GAP), GAP + number // columns * (size[1] + GAP)
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
