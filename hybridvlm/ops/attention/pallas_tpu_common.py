"""What the attention kernels for TPU share: tiles and their scalars, blocks of heads, and what a call costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from hybridvlm.ops.traffic import tiled_bytes

LANES = 128
BLOCK = 512  # most rows and keys of a tile
VMEM_BYTES = 96 * 2**20
LOW, HIGH, FIRST, LAST, ONE, BEGIN, END = range(7)  # what is prefetched of a block of rows or keys
STATS = 7
PLACE_BYTES = 32  # of one token's segment and index: two rows of an array in tiles of eight
BIG = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Static sizes: G query heads for each of K kv heads, `together` kv heads in a block; rows x keys in a tile, I x J of them."""

    groups: int
    kv_heads: int
    together: int
    width: int
    v_width: int
    rows: int
    keys: int
    row_blocks: int
    key_blocks: int
    causal: bool
    folded: bool
    scale: float

    @property
    def head_blocks(self) -> int:
        return self.kv_heads // self.together

    @property
    def steps(self) -> tuple[int, int]:
        """Lines of tiles, and steps of a line."""
        if self.folded:
            return -(-self.row_blocks // 2), self.row_blocks + 1
        return self.row_blocks, self.key_blocks

    def tile(self, line, step):
        """(row block, key block, whether it is a row's first tile, and its last) of a step of a line."""
        if not self.folded:
            return line, step, step == 0, step == self.key_blocks - 1
        lower = step <= line
        i = jnp.where(lower, line, self.row_blocks - 1 - line)
        j = jnp.where(lower, step, step - line - 1)
        return i, j, j == 0, j == i


def check_dtypes(*arrays: jax.Array) -> None:
    """NotImplementedError unless the operands are of one type that the kernels take."""
    dtypes = {x.dtype.name for x in arrays}
    if dtypes not in ({"bfloat16"}, {"float32"}):
        raise NotImplementedError(
            f"pallas_tpu: operands must be all bfloat16 or all float32, got {sorted(dtypes)}; cast them, or take 'xla'"
        )


def block_of(length: int, most: int) -> tuple[int, int]:
    """Size and number of the blocks of a length: multiples of the lanes, as large as adds little padding.

    Where all add much, the largest of those that add least: of 1,034 rows three blocks of 384, as many as nine of 128.
    """
    sizes = list(range(most // LANES * LANES, 0, -LANES)) or [LANES]
    rows = {size: -(-length // size) * size for size in sizes}
    size = next((size for size in sizes if rows[size] <= 1.04 * length), min(sizes, key=lambda size: rows[size]))
    return size, rows[size] // size


def together(kv_heads: int, groups: int, *widths: int) -> int:
    """kv heads in a block: the fewest whose lanes are whole tiles, or all of them."""
    for count in range(1, kv_heads):
        if kv_heads % count == 0 and all(count * width % LANES == 0 for width in widths):
            return count
    return kv_heads


def padded(x: jax.Array, length: int) -> jax.Array:
    """Zeros (segment 0: seen by nobody) after axis 1, up to the length."""
    more = length - x.shape[1]
    return x if more == 0 else jnp.pad(x, ((0, 0), (0, more)) + ((0, 0),) * (x.ndim - 2))


def scalars(sizes: Sizes, q_where: jax.Array, kv_where: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What decides about tiles: q_where [B,2,T], kv_where [B,2,L] -> [B*I*7] and [B*J*7] int32, flat for scalar memory."""
    b = q_where.shape[0]

    def extremes(where, blocks):
        segment, index = where.reshape(b, 2, blocks, -1).swapaxes(0, 1)
        real = segment > 0
        low = jnp.min(jnp.where(real, segment, BIG), axis=-1)
        high = jnp.max(segment, axis=-1)
        first = jnp.min(jnp.where(real, index, BIG), axis=-1)
        last = jnp.max(jnp.where(real, index, -BIG), axis=-1)
        one = (low == high) & jnp.all(real, axis=-1)
        return jnp.stack([low, high, first, last, one.astype(jnp.int32)], axis=-1)

    of_rows, of_keys = extremes(q_where, sizes.row_blocks), extremes(kv_where, sizes.key_blocks)
    low, high, _, last, _ = jnp.moveaxis(of_rows, -1, 0)[..., None]
    key_low, key_high, key_first, _, _ = jnp.moveaxis(of_keys, -1, 0)[:, :, None]
    meet = (low <= key_high) & (key_low <= high)
    if sizes.causal:
        meet &= key_first <= last

    def with_range(stats, meet):
        begin = jnp.argmax(meet, axis=-1)
        end = jnp.where(jnp.any(meet, axis=-1), meet.shape[-1] - 1 - jnp.argmax(meet[..., ::-1], axis=-1), begin)
        return jnp.concatenate([stats, jnp.stack([begin, end], axis=-1).astype(jnp.int32)], axis=-1).reshape(-1)

    return with_range(of_rows, meet), with_range(of_keys, meet.swapaxes(1, 2))


def tile_kind(sizes: Sizes, of_rows, of_keys, n, i, j):
    """(whether any query of the tile may see any key, whether all see all), from the prefetched scalars."""
    row, key = (n * sizes.row_blocks + i) * STATS, (n * sizes.key_blocks + j) * STATS
    meet = (of_rows[row + LOW] <= of_keys[key + HIGH]) & (of_keys[key + LOW] <= of_rows[row + HIGH])
    whole = (of_rows[row + ONE] + of_keys[key + ONE] == 2) & (of_rows[row + LOW] == of_keys[key + LOW])
    if sizes.causal:
        meet &= of_keys[key + FIRST] <= of_rows[row + LAST]
        whole &= of_keys[key + LAST] <= of_rows[row + FIRST]
    return meet, whole


def column(row: jax.Array) -> jax.Array:
    """[1,n] -> [n,128], every lane the same: the way from lanes to sublanes."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T


def dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """Matmul over axis contract[0] of a and contract[1] of b, in fp32; float32 operands keep all their bits."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def each_head(sizes: Sizes, body: Callable[..., None]) -> None:
    """body(h, lanes in q, in k, in v, in out) for every query head of a block: a loop where heads are whole tiles of lanes."""
    p, w, heads = sizes.width, sizes.v_width, sizes.together * sizes.groups
    if p % LANES == 0 and w % LANES == 0:  # then a block has one kv head

        def step(h, carry):
            body(
                h,
                pl.ds(pl.multiple_of(h * p, LANES), p),
                slice(0, p),
                slice(0, w),
                pl.ds(pl.multiple_of(h * w, LANES), w),
            )
            return carry

        jax.lax.fori_loop(0, heads, step, 0)
    else:
        for h in range(heads):
            c = h // sizes.groups
            body(h, pl.ds(h * p, p), slice(c * p, c * p + p), slice(c * w, c * w + w), pl.ds(h * w, w))


def row_maps(sizes: Sizes) -> tuple[Callable, Callable]:
    """Index maps by (example, head block, line, step): of a block of rows, and of one of keys, [B,T,lanes]."""

    def rows(n, c, line, step, of_rows, of_keys):
        return n, sizes.tile(line, step)[0], c

    def keys(n, c, line, step, of_rows, of_keys):
        i, j, _, _ = sizes.tile(line, step)
        at = (n * sizes.row_blocks + i) * STATS
        return n, jnp.clip(j, of_rows[at + BEGIN], of_rows[at + END]), c

    return rows, keys


def visible(sizes: Sizes, q_columns, kv_where) -> jax.Array:
    """Mask [rows,keys] of a tile: position [2,rows,128] and kv_where [1,2,keys], segments before indices."""
    segment = q_columns[0][:, :1]
    seen = (segment == kv_where[0, 0:1]) & (segment > 0)
    return seen & (kv_where[0, 1:2] <= q_columns[1][:, :1]) if sizes.causal else seen


def parameters(lines: int) -> pltpu.CompilerParams:
    """The grid is (example, head block, ..., lines of tiles, steps): only what accumulates goes in order."""
    semantics: list[Literal["parallel", "arbitrary"]] = ["parallel", "parallel"]
    semantics += ["arbitrary"] * lines
    return pltpu.CompilerParams(dimension_semantics=tuple(semantics), vmem_limit_bytes=VMEM_BYTES)


def nbytes(*arrays: jax.Array | jax.ShapeDtypeStruct) -> int:
    """In tiled memory."""
    return sum(tiled_bytes(x.shape, x.dtype) for x in arrays)


def reads(sizes: Sizes) -> int:
    """Blocks of keys fetched for the rows of a head block, or of rows for its keys."""
    lines, steps = sizes.steps
    return lines * steps if not sizes.folded else sizes.row_blocks * (sizes.row_blocks + 1) // 2


def cost(sizes: Sizes, b: int, matmuls: int, moved: int) -> pl.CostEstimate:
    """Of the tiles of an unpacked row: two operations per multiply-add, an exponential per score, bytes as told."""
    scores = b * sizes.kv_heads * sizes.groups * reads(sizes) * sizes.rows * sizes.keys
    width = (sizes.width + sizes.v_width) // 2
    return pl.CostEstimate(flops=2 * matmuls * scores * width, transcendentals=scores, bytes_accessed=moved)
