"""Bytes that a Pallas TPU kernel moves between HBM and VMEM, counted by walking its grid.

The pipeline of `pl.pallas_call` fetches an operand's block when its index map gives another block than at the step
before, and writes a result's block back when the next step has another one. Memory is tiled: a block takes whole tiles of
8 x 128 32-bit words (16 x 128 of 16 bits, 32 x 128 of 8), and only its part inside the array moves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import pallas as pl


class Traffic(NamedTuple):
    """Bytes per operand and per result, in their order."""

    read: tuple[int, ...]
    written: tuple[int, ...]

    @property
    def total(self) -> int:
        return sum(self.read) + sum(self.written)


def tiled_bytes(shape: Sequence[int], dtype) -> int:
    """Bytes of an array in tiled memory: the last axis in whole 128s, the one before in whole tiles, one row alone as one."""
    itemsize = np.dtype(dtype).itemsize
    *lead, second, last = (1, 1, *shape)
    rows = 1 if second == 1 else _up(second, 32 // itemsize)
    return int(np.prod(lead, dtype=np.int64)) * rows * _up(last, 128) * itemsize


def count(
    grid: Sequence[int],
    in_specs: Sequence[pl.BlockSpec],
    in_shape: Sequence[jax.ShapeDtypeStruct],
    out_specs: Sequence[pl.BlockSpec],
    out_shape: Sequence[jax.ShapeDtypeStruct],
) -> Traffic:
    """Walk `grid`, the last axis fastest, with specs and shapes as `pl.pallas_call` takes them.

    Index maps are evaluated on all steps at once, so they may use arithmetic but no branches. Raises ValueError for a
    spec without a block shape or index map (what such a kernel fetches by hand, only it knows).
    """
    return Traffic(
        tuple(_moved(grid, spec, shape) for spec, shape in zip(in_specs, in_shape, strict=True)),
        tuple(_moved(grid, spec, shape) for spec, shape in zip(out_specs, out_shape, strict=True)),
    )


def _moved(grid: Sequence[int], spec: pl.BlockSpec, array: jax.ShapeDtypeStruct) -> int:
    if spec.block_shape is None or spec.index_map is None:
        raise ValueError(f"traffic: needs a block shape and an index map to count the bytes of {array}, got {spec}")
    steps = [axis.reshape(-1) for axis in np.indices(grid)]
    index = np.stack([np.broadcast_to(np.asarray(i), steps[0].shape) for i in spec.index_map(*steps)])
    changed = np.ones(index.shape[1], bool)
    changed[1:] = (index[:, 1:] != index[:, :-1]).any(0)
    block = np.array([1 if size is None else size for size in spec.block_shape])
    # The part of each fetched block that lies inside the array, block by distinct extent.
    extents = np.minimum(block[:, None], np.array(array.shape)[:, None] - index[:, changed] * block[:, None])
    kinds, times = np.unique(extents, axis=1, return_counts=True)
    return sum(int(n) * tiled_bytes(kind, array.dtype) for kind, n in zip(kinds.T.tolist(), times, strict=True))


def _up(size: int, tile: int) -> int:
    return tile * -(-size // tile)
