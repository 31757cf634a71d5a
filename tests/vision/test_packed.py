"""Towers over chosen tokens alone, against each frame by itself with all other patches masked out."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybridvlm.config import VisionConfig
from hybridvlm.ops.pack import pack, pack_sizes
from hybridvlm.ops.rope import axial_angles, rotate_pairs
from hybridvlm.vision import VisionModel, encode_chosen, encode_frames, packed_sizes, token_values
from hybridvlm.vision.connector import connect
from hybridvlm.vision.qwen_vit import merge_order, patch_rows, position_rows, qwen_merge
from hybridvlm.vision.radio import normalise, patchify, position_table, vit_block

BASE = VisionConfig(
    image_size=(16, 24), patch_size=4, width=16, layers=2, heads=2, mlp_width=16, position_rows=5, prefix_tokens=3,
    projector_width=8,
)  # fmt: skip
QWEN = dataclasses.replace(
    BASE, kind="qwen", temporal_patch=2, prefix_tokens=0, deepstack=(0,), patch_bias=True, position_rows=4
)
TOWERS = {
    "radio": BASE,
    "radio of tubelets": dataclasses.replace(BASE, temporal_patch=2),
    "qwen2": dataclasses.replace(QWEN, deepstack=(), position_rows=0, patch_bias=False, activation="quick_gelu"),
    "qwen3": QWEN,
    "stem": VisionConfig(
        kind="stem", image_size=(16, 24), patch_size=8, width=8, downsample=1, max_frames=8, stem_channels=(4,)
    ),
}
FRAMES, CELLS, WIDTH = 6, 6, 8


def world(name, frames=FRAMES):
    """A random tower and uint8 frames."""
    config = TOWERS[name]
    rng = np.random.default_rng(0)
    shape = (frames, *((config.temporal_patch,) if config.temporal_patch > 1 else ()), *config.image_size, 3)
    pixels = rng.integers(0, 256, shape, np.uint8)
    scaled = jnp.asarray(pixels, jnp.float32) / 255
    shapes = jax.eval_shape(VisionModel(config, WIDTH).init, jax.random.key(0), scaled, jnp.arange(frames))["params"]
    params = jax.tree.map(lambda a: (0.3 * rng.standard_normal(a.shape)).astype(np.float32), shapes)
    return config, params, pixels, scaled


def one_frame(params, config, frame, chosen, number):
    """The definition: one frame whole through every block, patches of tokens that were not chosen masked out of attention."""
    p, d = params["vision"], config.downsample
    rows, cols = (side // config.patch_size for side in config.image_size)
    cell = merge_order(rows, cols, d) // d
    of_patch = cell[:, 0] * (cols // d) + cell[:, 1]  # the token of every patch, in merge order
    if config.kind == "qwen":
        x = patch_rows(config, normalise(config, frame[None]))[0] @ p["patch_embed"]
        x = x + p["patch_bias"] if config.patch_bias else x
        x = x + position_rows(p["position"], rows, cols, d) if config.position_rows else x
        angle = jnp.asarray(axial_angles(merge_order(rows, cols, d), config.width // config.heads))
        turn, seen = lambda h: rotate_pairs(h, angle), chosen[of_patch]
    else:
        embed = p["video_patch_embed" if frame.ndim == 4 else "patch_embed"]
        x = patchify(normalise(config, frame[None]), config.patch_size)[0] @ embed
        x = (x + position_table(p["position"], rows, cols)).reshape(rows * cols, -1)
        x = jnp.concatenate([p["prefix"], x])
        row_token = (np.arange(rows)[:, None] // d * (cols // d) + np.arange(cols) // d).reshape(-1)
        turn, seen = lambda h: h, jnp.concatenate([jnp.ones(config.prefix_tokens, bool), chosen[row_token]])

    def attend(q, k, v):
        score = jnp.einsum("fqhp,fkhp->fhqk", q, k) / np.sqrt(q.shape[-1])
        return jnp.einsum("fhqk,fkhp->fqhp", jax.nn.softmax(jnp.where(seen, score, -jnp.inf), axis=-1), v)

    planes = []
    for i in range(config.layers):
        x = vit_block({name: a[i] for name, a in p["blocks"].items()}, config, x[None], turn, attend)[0]
        planes += [x[None]] if i in config.deepstack else []
    if config.kind == "qwen":
        return qwen_merge(params["projector"], config, x[None], planes)[0]
    x = x[config.prefix_tokens :].reshape(1, rows, cols, -1)
    return connect(params["projector"], config, x, jnp.asarray([number]))[0]


@functools.partial(jax.jit, static_argnames=("config", "sizes", "part"))
def encoded(params, config, values, chosen, sizes, part=(0, 1)):
    frame = jnp.arange(len(values))
    return encode_chosen(params, config, values, chosen, frame, config.grid, sizes, part=part)


def run(config, params, pixels, chosen, kept, chunk=128, part=(0, 1)):
    """The tokens that `encode_chosen` gives, by place: [N,m,D], NaN where there is none."""
    values = token_values(config, pixels)
    sizes = packed_sizes(config, len(pixels), CELLS, kept, chunk, part[1])
    tokens, at = map(np.asarray, encoded(params, config, values, np.asarray(chosen), sizes, part))
    out = np.full((len(pixels) * CELLS, tokens.shape[-1]), np.nan, np.float32)
    out[at[at < len(out)]] = tokens[at < len(out)]
    return out.reshape(len(pixels), CELLS, -1)


CHOICES = {
    "first frame and a few": [6, 0, 2, 5, 1, 0],
    "all of some": [6, 6, 2, 0, 0, 0],
    "alike": [2, 2, 2, 2, 2, 2],
    "fewer than there is room": [6, 1, 0, 0, 0, 0],
}


@pytest.mark.parametrize(
    "name", ["radio", *(pytest.param(n, marks=pytest.mark.slow) for n in ("radio of tubelets", "qwen2", "qwen3"))]
)
def test_chosen_patches_see_those_of_their_own_frame(name):
    """However much each frame keeps, a few frames' rows at a time: as the frame by itself, with the others masked out."""
    config, params, pixels, scaled = world(name)
    reference = jax.jit(one_frame, static_argnums=1)
    for choice, counts in CHOICES.items():
        rng = np.random.default_rng(1)
        chosen = np.stack([np.isin(np.arange(CELLS), rng.permutation(CELLS)[:n]) for n in counts])
        got = run(config, params, pixels, chosen, 14, chunk=1)
        assert np.array_equal(np.isfinite(got).all(-1), chosen), choice
        for i in np.flatnonzero(chosen.any(1)):
            want = np.asarray(reference(params, config, scaled[i], chosen[i], i))
            np.testing.assert_allclose(got[i][chosen[i]], want[chosen[i]], atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize(
    "name", ["qwen3", "stem", *(pytest.param(n, marks=pytest.mark.slow) for n in ("radio", "qwen2"))]
)
def test_all_tokens_are_the_whole_tower(name):
    config, params, pixels, scaled = world(name)
    whole = jax.jit(encode_frames, static_argnums=1)
    want = np.asarray(whole(params, config, scaled, jnp.arange(FRAMES)))
    got = run(config, params, pixels, np.ones((FRAMES, CELLS), bool), FRAMES * CELLS)
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("name", ["stem", pytest.param("radio", marks=pytest.mark.slow)])
def test_chunks_and_parts_of_them_are_the_whole(name):
    """A few frames' rows at a time, as a long video has them, and a device's part of them, as a mesh has them."""
    config, params, pixels, _ = world(name)
    chosen = np.random.default_rng(2).random((FRAMES, CELLS)) < 0.4
    whole = run(config, params, pixels, chosen, 14)
    near = 1e-5 * np.nanmax(np.abs(whole))
    np.testing.assert_allclose(run(config, params, pixels, chosen, 14, chunk=1), whole, atol=near)
    parts = np.stack([run(config, params, pixels, chosen, 14, part=(i, 2)) for i in range(2)])
    assert np.array_equal(np.isfinite(parts).all(-1).sum(0), chosen)
    np.testing.assert_allclose(np.nansum(parts, axis=0), np.nan_to_num(whole), atol=near)


def test_packing_holds_whatever_is_chosen():
    """Random choices of one count: all rows are there once, no two frames share one, and every frame fits its slot."""
    rng = np.random.default_rng(0)
    frames, cells = 20, 8
    for devices, chunk in ((1, 128), (1, 2), (4, 128), (3, 2)):
        kept = 60
        sizes = pack_sizes(frames, cells, kept, patches=4, prefix=3, chunk_frames=chunk, devices=devices)
        assert sizes.chunks % devices == 0
        fn = jax.jit(pack, static_argnums=1)
        for _ in range(10):
            skew = rng.random((frames, 1)) ** rng.integers(1, 8)
            flat = np.argsort(-(skew * rng.random((frames, cells)) ** 0.3).reshape(-1))[:kept]
            chosen = np.zeros(frames * cells, bool)
            chosen[flat] = True
            found = jax.tree.map(np.asarray, fn(jnp.asarray(chosen.reshape(frames, cells)), sizes))
            assert sorted(found.token[found.token < frames * cells]) == sorted(flat)
            count = chosen.reshape(frames, cells).sum(1)
            assert (found.source != sizes.tokens * 4 + 3).sum() == 4 * kept + 3 * (count > 0).sum()
            for low, high, rows in sizes.slots:
                assert (found.size[:, low:high] <= rows).all()
            assert found.size.sum() == 4 * kept + 3 * (count > 0).sum()
            assert (found.start + found.size <= sizes.rows).all()


def test_sizes_are_near_what_is_kept():
    """At 12B, half of 128 frames: slots, padding included, hold 1.6 times the attention of half of the frames, rows 1% more."""
    sizes = pack_sizes(128, 256, 128 * 128, patches=4, prefix=10, chunk_frames=128)
    assert sizes.chunks == 1 and sizes.rows / (64 * sizes.whole) < 1.01 and len(sizes.slots) <= 6
    assert sum((high - low) * rows**2 for low, high, rows in sizes.slots) / (64 * sizes.whole**2) < 1.7
    long = pack_sizes(1024, 256, 1024 * 128, patches=4, prefix=10, chunk_frames=128)
    assert long.chunks == 4 and long.chunks * long.rows / (512 * long.whole) < 1.03
    with pytest.raises(ValueError, match=r"kept must lie in 1\.\.12"):
        pack_sizes(2, 6, 13, patches=4, prefix=0, chunk_frames=128)
