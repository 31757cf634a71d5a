"""Cells of the embedded benchmark: a real grey item, a coloured border, two small colour tags.

A cell is 32x32x3 uint8. The 28x28 item (Fashion-MNIST) lies in the middle, a border of 2 pixels around it has one of 16
colours, and a 5x5 patch in the top left and the top right corner inside the border has one of 8 colours each. The two
tags spell a number 0..63 = 8 * tag1 + tag2. A frame is 4x4 cells = 128x128.

The classes, the colours and the geometry have their one home here. The colours stand at least 127 (borders) and 255
(tags) apart in RGB, so that they survive a good video codec.
"""

from __future__ import annotations

import numpy as np

# Fashion-MNIST label -> word, the classes that stay. Shirt, coat, t-shirt and dress look like pullovers, sneakers like
# boots: a question whose answer a person could not read off the picture measures nothing.
CLASS_OF_LABEL = {1: "trouser", 2: "pullover", 5: "sandal", 8: "bag", 9: "boot"}
KEPT_LABELS = tuple(CLASS_OF_LABEL)
CLASS_WORDS = tuple(CLASS_OF_LABEL.values())
CLASSES = len(CLASS_WORDS)

BORDERS = {
    "red": (255, 0, 0),
    "orange": (255, 128, 0),
    "yellow": (255, 255, 0),
    "lime": (0, 255, 0),
    "green": (0, 128, 0),
    "teal": (0, 128, 128),
    "cyan": (0, 255, 255),
    "azure": (0, 128, 255),
    "blue": (0, 0, 255),
    "navy": (0, 0, 128),
    "violet": (128, 0, 255),
    "magenta": (255, 0, 255),
    "pink": (255, 128, 255),
    "maroon": (128, 0, 0),
    "grey": (128, 128, 128),
    "white": (255, 255, 255),
}
TAGS = {
    "black": (0, 0, 0),
    "red": (255, 0, 0),
    "lime": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "magenta": (255, 0, 255),
    "cyan": (0, 255, 255),
    "white": (255, 255, 255),
}
BORDER_WORDS, TAG_WORDS = tuple(BORDERS), tuple(TAGS)
BORDER_RGB = np.array(list(BORDERS.values()), np.uint8)  # [16,3]
TAG_RGB = np.array(list(TAGS.values()), np.uint8)  # [8,3]

ITEM, BORDER, TAG = 28, 2, 5  # pixels
CELL = ITEM + 2 * BORDER  # 32
GRID = 4  # cells a side of a frame
CELLS = GRID * GRID
FRAME = GRID * CELL  # 128


def render(images: np.ndarray, border: np.ndarray, tag1: np.ndarray, tag2: np.ndarray) -> np.ndarray:
    """Draw cells: images uint8 [n,28,28], border int [n] (0..15), tag1 and tag2 int [n] (0..7) -> uint8 [n,32,32,3]."""
    if images.ndim != 3 or images.shape[1:] != (ITEM, ITEM) or images.dtype != np.uint8:
        raise ValueError(f"images must be uint8 [n,{ITEM},{ITEM}], got {images.dtype} {list(images.shape)}")
    n, inner = len(images), slice(BORDER, BORDER + ITEM)
    cells = np.empty((n, CELL, CELL, 3), np.uint8)
    colour = BORDER_RGB[border][:, None, None]
    cells[:, :BORDER], cells[:, -BORDER:], cells[:, :, :BORDER], cells[:, :, -BORDER:] = (colour,) * 4
    cells[:, inner, inner] = images[..., None]
    cells[:, BORDER : BORDER + TAG, BORDER : BORDER + TAG] = TAG_RGB[tag1][:, None, None]
    cells[:, BORDER : BORDER + TAG, -BORDER - TAG : -BORDER] = TAG_RGB[tag2][:, None, None]
    return cells


def assemble(cells: np.ndarray) -> np.ndarray:
    """Cells [F*16,32,32,3], row by row within a frame -> frames [F,128,128,3]."""
    grid = cells.reshape(-1, GRID, GRID, CELL, CELL, 3)
    return np.ascontiguousarray(grid.transpose(0, 1, 3, 2, 4, 5)).reshape(-1, FRAME, FRAME, 3)


def split_cells(frames: np.ndarray) -> np.ndarray:
    """Frames [F,128,128,3] -> cells [F*16,32,32,3]; the inverse of `assemble`."""
    grid = frames.reshape(-1, GRID, CELL, GRID, CELL, 3)
    return np.ascontiguousarray(grid.transpose(0, 1, 3, 2, 4, 5)).reshape(-1, CELL, CELL, 3)


def read_colours(cells: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Nearest border, tag1 and tag2 colour of cells uint8 [n,32,32,3] -> three int arrays [n]; undoes `render`."""
    x = cells.astype(np.float32)
    rim = np.ones((CELL, CELL), bool)
    rim[BORDER:-BORDER, BORDER:-BORDER] = False
    left = x[:, BORDER : BORDER + TAG, BORDER : BORDER + TAG].mean((1, 2))
    right = x[:, BORDER : BORDER + TAG, -BORDER - TAG : -BORDER].mean((1, 2))

    def nearest(colour: np.ndarray, table: np.ndarray) -> np.ndarray:
        return np.square(colour[:, None] - table[None].astype(np.float32)).sum(-1).argmin(1)

    return nearest(x[:, rim].mean(1), BORDER_RGB), nearest(left, TAG_RGB), nearest(right, TAG_RGB)
