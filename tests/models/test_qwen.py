"""Qwen2-VL and Qwen3-VL: goldens, an oracle of our own, reduction with positions and DeepStack planes, caches, tensor names."""

import dataclasses
import functools
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.compare import close_absolutely
from helpers.qwen_golden import load
from helpers.qwen_oracle import forward
from safetensors.numpy import load_file

from hybridvlm.checkpoints.hf import params_from_tensors
from hybridvlm.config import QwenConfig, Reduction, ScoreOptions, from_dict, to_dict
from hybridvlm.config_files import load_model_config
from hybridvlm.models import qwen_vl
from hybridvlm.models.qwen_vl import geometry
from hybridvlm.models.qwen_vl import model as qwen_vl_model
from hybridvlm.models.qwen_vl.config import pixel_limits
from hybridvlm.models.qwen_vl.geometry import rope_positions
from hybridvlm.models.qwen_vl.model import QwenBatch
from hybridvlm.models.weights import flatten
from hybridvlm.reduction import make_plan
from hybridvlm.reduction.scores import spread_score
from hybridvlm.vision import encode_frames, qwen_merge, qwen_tokens, qwen_tower
from hybridvlm.vision.qwen_vit import merge_order, patch_rows, position_rows

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"
NAMES = ("qwen2_vl", "qwen3_vl")
VIDEO = 91  # the goldens' placeholder id
GRID = (4, 4)  # their patches per frame
TEXT = 6  # text tokens after the video in the batches made here


def batch_of(config, ids, grid=(2, 2), segment=None):
    """The batch of prompts [B,L] with placeholders; segment [B,L], 0 for padding."""
    ids = np.asarray(ids, np.int32)
    segment = np.ones_like(ids) if segment is None else np.asarray(segment, np.int32)
    visual = (ids == VIDEO) & (segment > 0)
    frame = np.where(visual, (np.cumsum(visual, axis=1) - 1) // math.prod(grid), -1).astype(np.int32)
    position = np.zeros((*ids.shape, 3), np.int32)
    for row, real in enumerate(segment.sum(axis=1)):
        position[row, :real] = rope_positions(frame[row, :real], grid, apart=config.generation == 3)
    return QwenBatch(ids, segment, frame, np.asarray(frame.max(axis=1) + 1, np.int32), position)


@functools.cache
def golden_visual(name):
    """Visual tokens [1,F,m,W] of a golden's patches."""
    config, params, io = load(name)
    rows = jnp.asarray(io["pixel_values_videos"]).reshape(2, math.prod(GRID), -1)
    run = jax.jit(
        lambda p, rows: qwen_merge(p["projector"], config.vision, *qwen_tower(p["vision"], config.vision, rows, GRID))
    )
    return run(params, rows)[None]


@functools.cache
def _program(name, plan, decode_capacity):
    config = load(name)[0]
    return jax.jit(lambda p, b, v: qwen_vl.prefill(p, config, b, v, plan, decode_capacity))


def prefill(name, batch, visual, plan=None, decode_capacity=0):
    return _program(name, plan, decode_capacity)(load(name)[1], batch, visual)


# -- goldens ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_golden_logits_prefill_steps_and_pieces(name):
    """Prefill of all, and of all but the last text; this one step by step; and two places at a time, some of them padding."""
    config, params, io = load(name)
    ids, visual = io["input_ids"], golden_visual(name)
    close_absolutely(prefill(name, batch_of(config, ids), visual, decode_capacity=6).logits, io["logits"][:, -1])

    start = ids.shape[1] - (2 if name == "qwen2_vl" else 4)
    real = (np.arange(ids.shape[1]) < start)[None]
    done = prefill(name, batch_of(config, np.where(real, ids, 0), segment=real), visual, decode_capacity=6)
    close_absolutely(done.logits, io["logits"][:, start - 1])
    caches, one = done.decoder.caches, jax.jit(lambda p, t, c: qwen_vl.make_decode_step(p, config)(t, c))
    for at in range(start, ids.shape[1]):
        logits, caches = one(params, jnp.asarray(ids[:, at], jnp.int32), caches)
        close_absolutely(logits, io["logits"][:, at])

    longer, piece = done.decoder.caches, jax.jit(lambda p, i, s, c: qwen_vl.extend(p, config, i, s, c))
    for at in range(start, ids.shape[1], 2):
        count = 2 if at == ids.shape[1] - 4 else 1  # two real ones, then one and padding
        for first in range(at, at + 2, count):
            pair = np.zeros((1, 2), np.int32)
            pair[0, :count] = ids[0, first : first + count]
            logits, longer = piece(params, pair, (np.arange(2) < count)[None].astype(np.int32), longer)
            close_absolutely(logits, io["logits"][:, first + count - 1])
    assert longer.position.tolist() == caches.position.tolist()


@pytest.mark.parametrize("name", NAMES)
def test_oracle_has_the_golden_logits(name):
    """The oracle below is itself right, at every place of the prompt."""
    config, params, io = load(name)
    x, position, planes = row(name, io["input_ids"], golden_visual(name))
    hidden, _ = forward(params, config, x, position, planes)
    close_absolutely(hidden @ np.asarray(params["lm_head"], np.float64), io["logits"][0])


def row(name, ids, visual, grid=(2, 2)):
    """One prompt as the oracle takes it: x [L,D], position [L,3], planes [L,D] each."""
    config, params, _ = load(name)
    batch = batch_of(config, ids, grid)
    tokens = qwen_vl_model.assemble(config, params["embed"], batch, visual)
    planes = [tokens.extra[key][0] for key in sorted(tokens.extra)]
    return tokens.x[0], batch.position[0], planes


# -- the tower ----------------------------------------------------------------------------------------------------------


def test_patches_lie_in_merge_order():
    config = load("qwen2_vl")[0].vision
    pixels = np.random.default_rng(0).normal(size=(2, 2, 8, 16, 3)).astype(np.float32)
    rows, place = patch_rows(config, pixels), merge_order(2, 4, 2)
    assert place.tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2], [0, 3], [1, 2], [1, 3]]
    for n, (y, x) in enumerate(place):
        patch = pixels[1, :, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4]  # [t,4,4,3]
        np.testing.assert_array_equal(rows[1, n], patch.transpose(3, 0, 1, 2).ravel())


def test_learned_positions_meet_at_the_corners():
    table = jnp.asarray(np.random.default_rng(0).normal(size=(3, 3, 2)), jnp.float32)
    np.testing.assert_allclose(position_rows(table, 3, 3, 1), table.reshape(9, 2), rtol=1e-6)
    spread = np.asarray(position_rows(table, 5, 5, 1)).reshape(5, 5, 2)
    np.testing.assert_allclose(spread[::2, ::2], table, rtol=1e-6)
    np.testing.assert_allclose(spread[1, 1], np.asarray(table)[:2, :2].mean(axis=(0, 1)), rtol=1e-5)
    np.testing.assert_allclose(position_rows(table, 1, 1, 1)[0], table[0, 0], rtol=1e-6)


def test_tubelets_do_not_see_each_other_and_chunks_change_nothing():
    config, params, _ = load("qwen3_vl")
    pixels = np.random.default_rng(1).integers(0, 256, (1, 3, 2, 8, 16, 3), np.uint8)
    run = jax.jit(lambda p, x: qwen_vl.encode(p, config, x))
    visual = run(params, pixels)
    assert visual.shape == (1, 3, 2, config.width * (1 + len(config.vision.deepstack)))
    scaled, place = jnp.asarray(pixels[0], jnp.float32) / 255, jnp.arange(3)
    chunked = jax.jit(lambda p, x: encode_frames(p, config.vision, x, place, chunk=2))(params, scaled)
    np.testing.assert_allclose(chunked, visual[0], rtol=1e-4, atol=1e-5)
    others = pixels.copy()
    others[:, [0, 2]] = 7
    changed = run(params, others)
    np.testing.assert_array_equal(changed[0, 1], visual[0, 1])
    assert np.abs(changed[0, 0] - visual[0, 0]).max() > 1e-3
    with pytest.raises(ValueError, match="expected tubelets"):
        qwen_tokens(params["vision"], params["projector"], config.vision, scaled[:, 0])


# -- positions ----------------------------------------------------------------------------------------------------------


def test_positions_of_a_video_in_one_run():
    """Time counts frames, rows and columns start with it, and text goes on after the largest, here time."""
    frame = np.array([-1, -1, *np.repeat(range(4), 2), -1, -1])
    got = rope_positions(frame, (1, 2))
    assert got[:2].tolist() == [[0, 0, 0], [1, 1, 1]]
    assert got[2:6].tolist() == [[2, 2, 2], [2, 2, 3], [3, 2, 2], [3, 2, 3]]
    assert got[-2:].tolist() == [[6, 6, 6], [7, 7, 7]]


def test_positions_of_frames_apart():
    """Each frame starts where the text before it ended; time stands still inside it."""
    frame = np.array([-1, 0, 0, 0, -1, 1, 1, 1, -1])
    got = rope_positions(frame, (1, 3), apart=True)
    assert got.tolist() == [
        [0, 0, 0],
        *([1, 1, 1 + x] for x in range(3)),
        [4, 4, 4],
        *([5, 5, 5 + x] for x in range(3)),
        [8, 8, 8],
    ]
    with pytest.raises(ValueError, match="do not fill a frame of 1x3"):
        rope_positions(np.zeros(6, int), (1, 3), apart=True)


def test_positions_of_averaged_blocks_are_those_of_their_first_tokens():
    whole = rope_positions(np.array([-1, *np.repeat(range(4), 8), -1]), (2, 4))
    pooled = rope_positions(np.array([-1, *np.repeat([0, 2], 2), -1]), (1, 2), (2, 2, 2))
    first = whole[1:-1].reshape(4, 2, 4, 3)[::2, ::2, ::2].reshape(-1, 3)
    np.testing.assert_array_equal(pooled[1:-1], first)
    np.testing.assert_array_equal(pooled[[0, -1]], whole[[0, -1]])


# -- reduction ----------------------------------------------------------------------------------------------------------


def sample(name, frames=4, text=TEXT, seed=0):
    """(ids [1,L], visual [1,F,m,W]) of a video of random tokens between text, as the family lays it out."""
    config = load(name)[0]
    rng = np.random.default_rng(seed)
    width = config.width * (1 + len(config.vision.deepstack))
    between = [7] if config.generation == 3 else []
    ids = [5, 6]
    for _ in range(frames):
        ids += [*between, *[VIDEO] * 4]
    ids += rng.integers(8, 80, text).tolist()
    return np.asarray([ids]), jnp.asarray(rng.normal(size=(1, frames, 4, width)), jnp.float32)


@functools.cache
def plan_of(name, method, budget=0.5, frames=4, **options):
    config = load(name)[0]
    spoken = 2 + TEXT + (frames if config.generation == 3 else 0)
    reduction = Reduction(method, budget, **options)
    return make_plan(reduction, config, visual_tokens=4 * frames, text_tokens=spoken, frames=frames)


def places(before, after):
    """Places of the survivors `after` in the row `before`, both as unreduced indices of real tokens."""
    return [list(before).index(i) for i in after]


@pytest.mark.parametrize("name", NAMES)
def test_reduced_prefill_equals_the_oracle(name):
    """Scores are the question's attention; positions, planes and caches go with the tokens that stay."""
    config, params, _ = load(name)
    ids, visual = sample(name)
    plan = plan_of(name, "str")
    assert plan.drops and all(config.pattern[layer] == "*" for layer in plan.drops)
    batch = batch_of(config, ids)
    done = prefill(name, batch, visual, plan, decode_capacity=3)
    entering = [sum(drop < layer for drop in plan.drops) for layer in range(plan.layers)]
    plan.verify(np.asarray(done.decoder.kept)[entering, :, 0], np.asarray(done.counts)[..., 0])

    x, position, planes = row(name, ids, visual)
    here, keep, query = np.arange(ids.shape[1]), {}, np.asarray(batch.frame[0] < 0)
    query[: np.flatnonzero(~query).max()] = False
    for layer, (index, _) in zip(plan.drops, done.decoder.survivors, strict=True):
        left = np.asarray(index[0])
        left = left[left >= 0]
        _, looked = forward(params, config, x, position, planes, keep)
        score = looked[layer][:, query[here]].mean(axis=(0, 1))
        seen = batch.frame[0][here] >= 0
        kept = np.isin(here, left)
        assert kept[~seen].all()
        assert score[seen & kept].min() >= score[seen & ~kept].max() - 1e-6
        keep[layer] = places(here, left)
        here = left
    hidden, _ = forward(params, config, x, position, planes, keep)
    close_absolutely(done.logits[0], hidden[-1] @ np.asarray(params["lm_head"], np.float64))
    lengths = [cache.k.shape[1] for cache in done.decoder.caches.layers if cache is not None]
    assert lengths == [plan.row_length(2 * i) for i in range(len(lengths))]


def test_steps_after_drops_before_and_inside_the_decoder():
    """Where the choice does not depend on the text after it, prefill and steps equal the oracle on the longer prompt."""
    name = "qwen3_vl"
    config, params, _ = load(name)
    ids, visual = sample(name)
    plan = plan_of(name, "uniform-input:0.75+uniform:0.8")
    assert plan.drops_input and plan.drops
    done = prefill(name, batch_of(config, ids), visual, plan, decode_capacity=2)
    more = [11, 12]
    x, position, planes = row(name, np.concatenate([ids, [more]], axis=1), visual)
    new = list(range(ids.shape[1], ids.shape[1] + 2))
    entering = np.argsort(-np.asarray(spread_score(jnp.arange(16))))[: plan.keep(0, 16)]
    videos = np.flatnonzero(ids[0] == VIDEO)
    here = np.setdiff1d(np.arange(ids.shape[1] + 2), np.delete(videos, entering))
    x, position, planes, keep = np.asarray(x)[here], position[here], [np.asarray(a)[here] for a in planes], {}
    for layer, (index, _) in zip(plan.drops, done.decoder.survivors, strict=True):
        left = np.asarray(index[0])
        left = [*left[left >= 0], *new]
        keep[layer] = places(here, left)
        here = np.asarray(left)
    hidden, _ = forward(params, config, x, position, planes, keep)
    expected = hidden[-3:] @ np.asarray(params["lm_head"], np.float64)
    close_absolutely(done.logits[0], expected[0])
    caches, one = done.decoder.caches, jax.jit(lambda p, t, c: qwen_vl.make_decode_step(p, config)(t, c))
    for token, wanted in zip(more, expected[1:], strict=True):
        logits, caches = one(params, jnp.asarray([token], jnp.int32), caches)
        close_absolutely(logits[0], wanted)


@pytest.mark.parametrize(("name", "method"), [("qwen2_vl", "none"), ("qwen3_vl", "str"), ("qwen3_vl", "str-lookahead")])
@pytest.mark.slow
def test_alone_in_a_batch_and_in_a_longer_bucket(name, method):
    """The same logits, next position and survivors; padding is inert. Three examples, one of them without a video."""
    config = load(name)[0]
    plan = None if method == "none" else plan_of(name, method)
    longer, visual = sample(name)
    shorter, other = sample(name, frames=2, text=TEXT - 2, seed=1)
    spoken = np.asarray([[5, 6, 8, 9]])
    rows, width = [longer[0], shorter[0], spoken[0]], longer.shape[1] + (plan is None) * 5
    ids, segment = np.zeros((3, width), int), np.zeros((3, width), int)
    for at, values in enumerate(rows):
        ids[at, : len(values)], segment[at, : len(values)] = values, 1
    together = jnp.zeros((3, 4, 4, visual.shape[-1])).at[0].set(visual[0]).at[1, :2].set(other[0])
    done = prefill(name, batch_of(config, ids, segment=segment), together, plan)

    def same(at, alone):
        reference = np.asarray(alone.logits[0])
        assert np.max(np.abs(done.logits[at] - reference)) <= 1e-5 * np.max(np.abs(reference))
        assert int(done.decoder.caches.position[at]) == int(alone.decoder.caches.position[0])
        for (many, _), (single, _) in zip(done.decoder.survivors, alone.decoder.survivors, strict=True):
            np.testing.assert_array_equal(many[at], single[0])

    for at in range(3):
        mine = batch_of(config, ids[at : at + 1], segment=segment[at : at + 1])
        same(at, prefill(name, mine, together[at : at + 1], plan))
    if plan is None:
        same(0, prefill(name, batch_of(config, longer), visual))


def test_planes_are_let_go_once_they_are_used():
    name = "qwen3_vl"
    done = prefill(name, batch_of(load(name)[0], sample(name)[0]), sample(name)[1], plan_of(name, "str"), 3)
    assert done.decoder.tokens.extra == {}
    assert done.decoder.tokens.position.shape[-1] == 3


def test_averaged_blocks_take_their_planes_along():
    """Pooling acts on visual tokens and planes alike: as if the tower had given the averages."""
    name = "qwen3_vl"
    config, _, _ = load(name)
    config = geometry.at_size(config, 16, 16)
    ids, visual = sample(name)
    plan = make_plan(Reduction("avgpool", 0.5), config, visual_tokens=16, text_tokens=12, frames=4)
    assert plan.pool_factors == (1, 1, 2)
    pooled = np.concatenate([ids[0, :2], *[[7, VIDEO, VIDEO]] * 4, ids[0, -TEXT:]])[None]
    batch = batch_of(config, pooled, (2, 1))
    means = visual.reshape(1, 4, 2, 2, -1).mean(axis=3)
    close_absolutely(prefill(name, batch, visual, plan).logits, prefill(name, batch, means).logits, 1e-5)


def test_methods_of_mamba_layers_are_refused_and_others_say_what_they_can():
    with pytest.raises(ValueError, match="no such site"):
        plan_of("qwen3_vl", "str-mamba")
    assert "decoder GFLOPs" in plan_of("qwen3_vl", "pyramiddrop", 0.8).explain()
    options = ScoreOptions(heads="max", queries="last")
    assert plan_of("qwen2_vl", "str", 0.5, score=options).score == options


@pytest.mark.slow
def test_gradients_reach_the_planes_and_every_parameter():
    name = "qwen3_vl"
    config, params, _ = load(name)
    ids, visual = sample(name)
    batch, plan = batch_of(config, ids), plan_of(name, "oneshot-attention", 0.6)

    def loss(params, visual):
        return jnp.sum(qwen_vl.prefill(params, config, batch, visual, plan, 0).logits ** 2)

    by_params, by_visual = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, visual)
    for path, gradient in flatten(by_params["decoder"]).items():
        assert np.isfinite(gradient).all() and np.any(gradient), path
    kept = np.abs(np.asarray(by_visual)).reshape(16, 3, config.width).sum(axis=-1) > 0
    assert kept[:, 0].all()  # all are read by the first layer
    assert 0 < kept[:, 1].sum() < 16  # only those that stay after it get a plane


# -- names and sizes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "count", "tensors", "vision"),
    [("qwen2_vl_7b", 8_291_375_616, 730, 675_759_104), ("qwen3_vl_8b", 8_767_123_696, 750, 576_388_336)],
)
def test_every_published_tensor_of_the_full_size_has_its_place(config, count, tensors, vision):
    c = load_model_config(config)
    table = qwen_vl.weight_map(c)
    ours = {
        path: leaf.shape for path, leaf in flatten(jax.eval_shape(lambda: qwen_vl.init(c, jax.random.key(0)))).items()
    }
    assert {job[1].target: table.target_shape(job) for job in table.jobs} == ours
    assert sum(math.prod(shape) for shape in ours.values()) == count
    published = table.shapes()
    assert len(published) == tensors
    assert sum(math.prod(shape) for shape in published.values()) == count
    assert sum(math.prod(s) for path, s in ours.items() if path.startswith(("vision", "projector"))) == vision
    some = {
        "lm_head.weight": (c.vocab_size, c.width),
        "visual.blocks.26.attn.qkv.weight": (3 * c.vision.width, c.vision.width),
        "visual.patch_embed.proj.weight": (c.vision.width, 3, 2, c.vision.patch_size, c.vision.patch_size),
        "layers.27.self_attn.k_proj.weight": (c.kv_heads * c.head_dim, c.width),
    }
    by_table_name = {
        name: shape for stored, shape in published.items() for name in [stored.split("language_model.")[-1]]
    }
    for name, shape in some.items():
        candidates = (name, f"model.{name}")
        assert [by_table_name[n] for n in candidates if n in by_table_name] == [shape]


@pytest.mark.parametrize("name", NAMES)
def test_old_and_new_prefixes_are_the_same_tensors(name):
    config, _, _ = load(name)
    table = qwen_vl.weight_map(config)
    tensors = load_file(GOLDENS / name / "weights.safetensors")
    for stored in tensors:
        old = stored.replace("model.visual.", "visual.").replace("model.language_model.", "model.")
        assert table.canonical(old) == table.canonical(stored)
        assert stored in (table.published(stored), stored)
    known = {name for job in table.jobs for _, name, _ in table.pieces(job)}
    assert {part for stored in tensors for part in table.canonical(stored)} == known
    assert len(table.shapes()) == len(tensors)


def test_config_goes_through_json_and_published_fields():
    c = load_model_config("qwen3_vl_8b")
    assert from_dict(type(c), json.loads(json.dumps(to_dict(c)))) == c
    raw = json.loads((GOLDENS / "qwen2_vl" / "config.json").read_text())
    flat = {
        **raw,
        **raw["text_config"],
        "model_type": "qwen2_vl",
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]},
    }
    flat = {key: value for key, value in flat.items() if key not in ("text_config", "rope_parameters")}
    flat["rope_theta"] = 10000.0
    assert qwen_vl.config_from_hf(flat) == qwen_vl.config_from_hf(raw)
    for change, message in (
        (
            {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0, "layer_types": None},
            "use_sliding_window",
        ),
        ({"rope_scaling": {"type": "yarn"}}, "yarn"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"model_type": "qwen2_5_vl"}, "qwen2_5_vl"),
    ):
        with pytest.raises(ValueError, match=message):
            qwen_vl.config_from_hf({**flat, **change})


def test_pixel_limits_of_a_checkpoints_own_files():
    """Old and new names; a video's file counts a frame in Qwen2-VL and the whole video in Qwen3-VL; absent, the published ones."""

    def limits(generation, **raw):
        raw["vision_config"] = {"patch_size": 14, "spatial_merge_size": 2}
        found = pixel_limits(raw, generation)
        return found["image_pixels"], found["frame_pixels"], found["video_pixels"]

    image, frame, film = limits(2)
    assert (image, frame, film) == (QwenConfig.image_pixels, QwenConfig.frame_pixels, QwenConfig.video_pixels)
    assert limits(2, preprocessor={"min_pixels": 784, "max_pixels": 50176}) == ((784, 50176), (50176, 50176), film)
    edges = {"size": {"shortest_edge": 784, "longest_edge": 501760}}
    assert limits(2, preprocessor=edges)[0] == (784, 501760)
    assert limits(2, preprocessor=edges | {"max_pixels": 1000})[0] == (784, 1000)
    assert limits(2, preprocessor={"size": {"height": 9, "width": 9}, "min_pixels": None})[0] == image
    assert limits(2, video_preprocessor=edges) == (image, (784, 501760), film)
    assert limits(3, video_preprocessor=edges) == ((65536, 16777216), (784, 501760), 501760)
    assert limits(3, video_preprocessor=edges | {"max_video_tokens": 10})[1:] == ((784, 7840), 501760)
    for bad, words in (
        ({"min_pixels": "4"}, "min_pixels"),
        ({"max_pixels": 0}, "max_pixels"),
        ({"max_pixels": 9}, "both"),
    ):
        with pytest.raises(ValueError, match=words):
            limits(2, preprocessor=bad)


def test_tied_heads_need_no_tensor_and_drop_none():
    config = dataclasses.replace(load("qwen2_vl")[0], tie_embeddings=True)
    tensors = load_file(GOLDENS / "qwen2_vl" / "weights.safetensors")
    embed = next(x for key, x in tensors.items() if key.endswith("embed_tokens.weight"))
    bare = {key: x for key, x in tensors.items() if key != "lm_head.weight"}
    for held in (bare, bare | {"lm_head.weight": embed.copy()}):
        assert "lm_head" not in params_from_tensors(qwen_vl.weight_map(config), held)
    with pytest.raises(ValueError, match=r"lm_head\.weight has other values"):
        params_from_tensors(qwen_vl.weight_map(config), tensors)
    # saved under the head's name alone
    moved = {("lm_head.weight" if key.endswith("embed_tokens.weight") else key): x for key, x in bare.items()}
    np.testing.assert_array_equal(params_from_tensors(qwen_vl.weight_map(config), moved)["embed"], embed)
