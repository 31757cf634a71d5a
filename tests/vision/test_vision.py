"""Towers and connectors: shapes, independence of frames and cells, parameter counts at full size."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybridvlm.config import VisionConfig
from hybridvlm.config_files import load_model_config
from hybridvlm.models.nemotron_vl.model import Batch, HybridVLM
from hybridvlm.vision import StemTower, VisionModel, encode_frames, pixel_shuffle, radio_tower
from hybridvlm.vision.radio import position_table

RADIO = VisionConfig(
    image_size=(16, 32),
    patch_size=4,
    width=16,
    layers=2,
    heads=2,
    mlp_width=24,
    position_rows=6,
    prefix_tokens=3,
    projector_width=20,
)
STEM = VisionConfig(
    kind="stem",
    image_size=(16, 24),
    patch_size=8,
    width=12,
    downsample=1,
    max_frames=5,
    stem_channels=(4, 6),
)


@functools.cache
def build(config):
    """A model, parameters (NumPy draws: compiling the initialisers costs more than the tests), five frames, places."""
    model = VisionModel(config, 10)
    rng = np.random.default_rng(0)
    pixels = rng.uniform(size=(5, *config.image_size, 3)).astype(np.float32)
    place = np.arange(5, dtype=np.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), pixels, place)
    variables = jax.tree.map(lambda s: (0.3 * rng.standard_normal(s.shape)).astype(np.float32), shapes)
    return model, variables, pixels, place


@functools.cache
def run(config):
    """Visual tokens of build(config), compiled once."""
    model, variables, pixels, place = build(config)
    return jax.jit(model.apply), np.asarray(jax.jit(model.apply)(variables, pixels, place))


@pytest.mark.parametrize("config", [RADIO, STEM], ids=["radio", "stem"])
def test_tokens_and_chunks(config):
    """Whatever the chunk, also one that does not divide the frames, every frame gets what it gets alone."""
    _, variables, pixels, place = build(config)
    apply, tokens = run(config)
    assert tokens.shape == (5, config.tokens_per_frame, 10)
    chunked = jax.jit(functools.partial(encode_frames, config=config, chunk=2))
    again = chunked(variables["params"], pixels=pixels, frame=place)
    np.testing.assert_allclose(again, tokens, rtol=1e-5, atol=1e-5 * np.abs(tokens).max())
    alone = apply(variables, pixels[3:4], place[3:4])
    np.testing.assert_allclose(alone[0], tokens[3], rtol=1e-5, atol=1e-5 * np.abs(tokens).max())


def test_stem_cells_are_separate():
    """A token changes with its own cell and with no other."""
    _, variables, pixels, place = build(STEM)
    apply, tokens = run(STEM)
    changed = pixels.copy()
    changed[2, 8:16, 8:16] += 0.3  # frame 2, row 1, column 1
    moved = np.abs(apply(variables, changed, place) - tokens).max(-1)
    assert moved[2, 4] > 1e-3
    moved[2, 4] = 0
    assert not moved.any()


def test_stem_against_written_out_convolution():
    """Stride 2, 3x3, SAME (for even sides the window starts at the pixel itself), then ReLU."""
    config = dataclasses.replace(STEM, stem_channels=(4,), image_size=(8, 8))
    rng = np.random.default_rng(3)
    pixels = rng.uniform(size=(1, 8, 8, 3)).astype(np.float32)
    shapes = jax.eval_shape(StemTower(config).init, jax.random.key(0), pixels)["params"]
    p = {name: rng.standard_normal(shape.shape).astype(np.float32) for name, shape in shapes.items()}
    x = np.pad((pixels[0] - config.pixel_mean) / config.pixel_std, ((0, 1), (0, 1), (0, 0)))
    out = np.zeros((4, 4, 4))
    for i in range(4):
        for j in range(4):
            out[i, j] = np.einsum("abc,abco->o", x[2 * i : 2 * i + 3, 2 * j : 2 * j + 3], p["conv0"]) + p["conv0_bias"]
    expected = np.maximum(out, 0).reshape(-1) @ p["proj"] + p["proj_bias"]
    np.testing.assert_allclose(StemTower(config).apply({"params": p}, pixels)[0, 0, 0], expected, rtol=1e-4, atol=1e-4)


def test_stem_tells_cells_and_times_apart():
    """One picture in every cell: tokens differ by their cell and by their frame; an empty place counts as frame 0."""
    _, variables, pixels, _ = build(STEM)
    apply, _ = run(STEM)
    frames = np.tile(pixels[:1, :8, :8], (5, 2, 3, 1))
    p = variables["params"]["projector"]
    tokens = apply(variables, frames, np.asarray([0, 4, -1, 1, 2], np.int32))
    time = np.broadcast_to(p["time"][4] - p["time"][0], (6, 10))
    np.testing.assert_allclose(tokens[1] - tokens[0], time, atol=1e-4)
    np.testing.assert_allclose(tokens[0] - tokens[0, :1], p["cell"] - p["cell"][:1], atol=1e-4)
    np.testing.assert_allclose(tokens[2], tokens[0], atol=1e-6)


def test_position_table_corner_cases():
    table = np.random.default_rng(0).standard_normal((6, 6, 2)).astype(np.float32)
    np.testing.assert_allclose(position_table(table, 6, 6), table, atol=1e-6)
    np.testing.assert_allclose(position_table(table, 6, 4), table[:, :4], atol=1e-6)
    # half as many rows: each sample lies between two entries, whatever the antialiasing of the library's default
    half = (table[0::2] + table[1::2]) / 2
    half = (half[:, 0::2] + half[:, 1::2]) / 2
    np.testing.assert_allclose(position_table(table, 3, 3), half, atol=1e-5)
    # a third: exactly the middle entry (an antialiased resize would average)
    np.testing.assert_allclose(position_table(table, 2, 2), table[1::3, 1::3], atol=1e-5)


def test_pixel_shuffle_order():
    x = jnp.arange(2 * 4 * 2 * 3).reshape(2, 4, 2, 3)
    out = pixel_shuffle(x, 2)
    assert out.shape == (2, 2, 1, 12)
    expected = jnp.concatenate([x[0, 2, 0], x[0, 2, 1], x[0, 3, 0], x[0, 3, 1]])
    np.testing.assert_array_equal(out[0, 1, 0], expected)
    with pytest.raises(ValueError, match="multiples of 3"):
        pixel_shuffle(x, 3)


def test_activation_dtype():
    """Activations in bfloat16 stay near those in float32, and come out as bfloat16."""
    _, variables, pixels, place = build(RADIO)
    _, full = run(RADIO)
    half = jax.jit(VisionModel(RADIO, 10, dtype=jnp.bfloat16).apply)(variables, pixels, place)
    assert half.dtype == jnp.bfloat16
    assert 0 < np.abs(np.asarray(half, np.float32) - full).max() < 0.1 * np.abs(full).max()


@pytest.mark.parametrize("config", [RADIO, STEM], ids=["radio", "stem"])
def test_gradients_reach_every_parameter(config):
    model, variables, pixels, place = build(config)
    grads = jax.jit(jax.grad(lambda v: jnp.sum(jnp.square(model.apply(v, pixels, place)))))(variables)
    for path, leaf in jax.tree.leaves_with_path(grads):
        name = jax.tree_util.keystr(path)
        # a key's bias shifts all scores of a row alike, so softmax does not see it
        assert np.any(np.asarray(leaf) != 0) or "k_bias" in name, f"no gradient at {name}"


def test_bad_pixels_are_refused():
    model, variables, pixels, place = build(RADIO)
    with pytest.raises(ValueError, match=r"multiples of 4, got \(5, 14, 32, 3\)"):
        model.apply(variables, pixels[:, :14], place)
    with pytest.raises(ValueError, match="one entry per frame"):
        model.apply(variables, pixels, place[:2])
    with pytest.raises(ValueError, match=r"pixels must be \[F,h,w,3\] with"):
        radio_tower(variables["params"]["vision"], RADIO, pixels[:, None])
    stem, stem_variables, stem_pixels, stem_place = build(STEM)
    with pytest.raises(ValueError, match="multiples of 8"):
        stem.apply(stem_variables, stem_pixels[:, :12], stem_place)


def shapes_of(name):
    """Parameter shapes of a configuration at its true size; nothing is allocated."""
    config = load_model_config(name)
    length = 1 + (config.vision.tokens_per_frame if config.vision else 0)
    ints = jax.ShapeDtypeStruct((1, length), jnp.int32)
    batch = Batch(ints, ints, ints, jax.ShapeDtypeStruct((1,), jnp.int32))
    pixels = jax.ShapeDtypeStruct((1, 1, *config.vision.image_size, 3), jnp.uint8) if config.vision else None
    return config, jax.eval_shape(HybridVLM(config).init, jax.random.key(0), batch, pixels)["params"]


def size(tree):
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def test_full_size_nemotron():
    config, params = shapes_of("nemotron_nano_12b_v2_vl")
    assert size({k: params[k] for k in ("embed", "lm_head", "decoder")}) == 12_320_486_912
    assert size(params["vision"]) == 651_645_440
    assert size(params["projector"]) == 209_720_320
    assert (len(config.pattern), config.count("M"), config.count("-"), config.count("*")) == (62, 28, 28, 6)
    assert [i for i, kind in enumerate(config.pattern) if kind == "*"] == [7, 16, 25, 34, 43, 52]
    assert (config.mamba_width, config.conv_width, config.in_proj_width) == (10240, 12288, 22656)
    assert config.vision.tokens_per_frame == 256
    decoder = params["decoder"]
    assert decoder["mamba"]["in_proj"].shape == (28, 5120, 22656)
    assert decoder["attention"]["k_proj"].shape == (6, 5120, 1024)
    assert decoder["mlp"]["up_proj"].shape == (28, 5120, 20480)


def test_sizes_of_the_bench_models():
    config, params = shapes_of("bench_100m")
    assert 85e6 < size(params["decoder"]) < 110e6
    assert 8192 % config.vision.tokens_per_frame == 0
    _, peers = shapes_of("vs_transformers_56m")
    assert 55e6 < size(peers) < 57e6


@pytest.mark.parametrize("kind", [pytest.param("radio", marks=pytest.mark.slow), "qwen"])
def test_the_towers_attention_is_the_mean_of_its_last_softmax_by_token(kind):
    """Against all of the last block's probabilities, written out; the features are what they are without it."""
    from hybridvlm.ops.norms import layer_norm
    from hybridvlm.ops.rope import axial_angles, rotate_pairs
    from hybridvlm.vision import qwen_vit, radio
    from hybridvlm.vision.model import encode_frames

    config = VisionConfig(
        kind=kind, image_size=(32, 64), patch_size=8, width=16, layers=2, heads=2, mlp_width=16, position_rows=8,
        prefix_tokens=2, projector_width=8, temporal_patch=2 if kind == "qwen" else 1,
    )  # fmt: skip
    shape = (2, 2, 32, 64, 3) if kind == "qwen" else (2, 32, 64, 3)
    pixels = jnp.asarray(np.random.default_rng(0).uniform(size=shape), jnp.float32)
    frame = jnp.arange(2)
    params = VisionModel(config, 6).init(jax.random.key(0), pixels, frame)["params"]
    params = jax.tree.map(lambda a: a + 0.3 * jnp.asarray(np.random.default_rng(a.size).normal(size=a.shape)), params)
    tokens = encode_frames(params, config, pixels, frame)
    both = encode_frames(params, config, pixels, frame, chunk=1, attention=True)
    assert both.shape == (2, 8, 9)
    np.testing.assert_allclose(both[..., :6], tokens, atol=1e-5)

    p = params["vision"]
    first, last = ({name: a[i] for name, a in p["blocks"].items()} for i in (0, 1))
    if kind == "qwen":
        rows = qwen_vit.patch_rows(config, radio.normalise(config, pixels))
        place = qwen_vit.position_rows(p["position"], 4, 8, 2)
        angle = jnp.asarray(axial_angles(qwen_vit.merge_order(4, 8, 2), 8))
        x, turn = rows @ p["patch_embed"] + place, lambda heads: rotate_pairs(heads, angle)
    else:
        x, turn = radio._embedded(p, config, pixels, jnp.float32), lambda heads: heads
    h = layer_norm(radio.vit_block(first, config, x, turn), last["norm1"], last["norm1_bias"], config.norm_eps)
    q, k = (turn((h @ last[f"{n}_proj"] + last[f"{n}_bias"]).reshape(2, -1, 2, 8)) for n in "qk")
    weights = jax.nn.softmax(jnp.einsum("fqhp,fkhp->fhqk", q, k) / np.sqrt(8), axis=-1).mean((1, 2))
    if kind == "qwen":
        expected = weights.reshape(2, 8, 4).mean(-1)
    else:
        expected = weights[:, 2:].reshape(2, 2, 2, 4, 2).mean((2, 4)).reshape(2, 8)
    np.testing.assert_allclose(both[..., 6:].sum(-1), expected, rtol=1e-4)
    assert np.ptp(np.asarray(expected)) > 1e-3


def test_a_stem_has_no_attention():
    from hybridvlm.vision.model import encode_frames

    config = VisionConfig(kind="stem", image_size=(16, 16), patch_size=8, width=4, downsample=1, max_frames=4)
    with pytest.raises(ValueError, match="a convolutional stem has none"):
        encode_frames({}, config, jnp.zeros((1, 16, 16, 3)), jnp.arange(1), attention=True)
