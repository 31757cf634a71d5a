"""Parity with the reference implementations: tiny random models, float32, weights under their published names."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.compare import close_absolutely

from hybridvlm.checkpoints import TensorFolder, params_from_hf
from hybridvlm.inference.model import load as load_folder
from hybridvlm.inference.sampling import Sampling, decode
from hybridvlm.models import nemotron_vl
from hybridvlm.models.nemotron_vl.config import config_from_hf, vision_from_hf
from hybridvlm.models.nemotron_vl.model import HybridVLM, assemble
from hybridvlm.models.prompt import Batch
from hybridvlm.nn.caches import empty_caches
from hybridvlm.nn.incremental import extend, step, unstack
from hybridvlm.nn.mamba2 import mamba_layer, mamba_step
from hybridvlm.nn.scan import layer_params
from hybridvlm.vision import encode_frames, pixel_shuffle, radio_tower

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"
TEXT = ("nemotron_h", "mamba2", "nemotron_h_moe")
VLM = ("nemotron_h_omni_image", "nemotron_nano_vl_v2")


@functools.cache
def load(name):
    """config, parameters and io of a golden."""
    tensors = TensorFolder(GOLDENS / name)
    hf = json.loads((GOLDENS / name / "config.json").read_text())
    config = config_from_hf(hf, tensors.shapes())
    with np.load(GOLDENS / name / "io.npz") as io:
        return config, jax.tree.map(jnp.asarray, params_from_hf(config, tensors)), dict(io)


def text_batch(ids):
    ids = jnp.asarray(ids, jnp.int32)
    b, length = ids.shape
    return Batch(ids, jnp.ones((b, length), jnp.int32), jnp.full((b, length), -1, jnp.int32), jnp.zeros(b, jnp.int32))


def prefill(params, config, batch, visual, decode_capacity):
    """The dense prefill as one compiled program."""
    return jax.jit(lambda p, b, v: nemotron_vl.prefill(p, config, b, v, None, decode_capacity))(params, batch, visual)


def step_by_step(config, params, x, caches, start):
    """Logits [B,L-start,V] of tokens from `start` on, one at a time after the caches of those before: x [B,L,D]."""
    layers, norm_f = unstack(params["decoder"], config), params["decoder"]["norm_f"]
    one = jax.jit(lambda x, caches: step(layers, norm_f, config, x, caches))
    logits = []
    for t in range(start, x.shape[1]):
        hidden, caches = one(x[:, t : t + 1], caches)
        logits.append(hidden[:, 0] @ params["lm_head"])
    return jnp.stack(logits, axis=1)


@pytest.mark.parametrize("name", TEXT)
def test_logits_of_whole_prompts(name):
    config, params, io = load(name)
    logits = jax.jit(HybridVLM(config).apply)({"params": params}, text_batch(io["input_ids"]))
    close_absolutely(logits, io["logits"])


@pytest.mark.parametrize("name", TEXT)
@pytest.mark.parametrize("prompt", [0, 2])
def test_logits_token_by_token(name, prompt):
    """Decode from nothing (prompt 0), and after a prefill shorter than the convolution's reach."""
    config, params, io = load(name)
    ids = io["input_ids"]
    x = params["embed"][jnp.asarray(ids)]
    if prompt:
        out = prefill(params, config, text_batch(ids[:, :prompt]), None, ids.shape[1] - prompt)
        close_absolutely(out.logits, io["logits"][:, prompt - 1])
        caches = out.decoder.caches
    else:
        caches = empty_caches(config, len(ids), ids.shape[1])
    close_absolutely(step_by_step(config, params, x, caches, prompt), io["logits"][:, prompt:])


@pytest.mark.parametrize("name", TEXT)
def test_logits_in_pieces(name):
    """Several tokens at a time after a cache, cut at places that are no multiple of the chunk size."""
    config, params, io = load(name)
    x = params["embed"][jnp.asarray(io["input_ids"])]
    b, length = io["input_ids"].shape
    caches, hidden = empty_caches(config, b, length), []
    piece = jax.jit(lambda x, caches: extend(params["decoder"], config, x, jnp.ones(x.shape[:2], jnp.int32), caches))
    for start, stop in ((0, 5), (5, 6), (6, length)):
        part, caches = piece(x[:, start:stop], caches)
        hidden.append(part)
    close_absolutely(jnp.concatenate(hidden, axis=1) @ params["lm_head"], io["logits"])


def test_mixer_with_dt_floor(monkeypatch):
    """One Mamba-2 mixer whose dt goes below the floor that transformers puts on it: with and without the floor."""
    config, params, io = load("mamba2_mixer")
    p = jax.tree.map(lambda a: a.astype(jnp.float32), layer_params(params["decoder"], config, 0))
    x = jnp.asarray(io["x"], jnp.float32)
    monkeypatch.setattr("hybridvlm.nn.mamba2.rms_norm", lambda x, weight, eps: x)  # the reference is the bare mixer

    def whole(floor):
        floored = dataclasses.replace(config, dt_floor=floor)
        return jax.jit(lambda x: mamba_layer(p, floored, x, jnp.ones(x.shape[:2], jnp.int32))[0] - x)(x)

    def one_by_one(floor):
        floored = dataclasses.replace(config, dt_floor=floor)
        one = jax.jit(lambda x, cache: mamba_step(p, floored, x, cache))
        cache, out = empty_caches(config, 1, 0)[0], []
        for t in range(x.shape[1]):
            y, cache = one(x[:, t : t + 1], cache)
            out.append(y - x[:, t : t + 1])
        return jnp.concatenate(out, axis=1)

    close_absolutely(whole(1e-3)[0], io["y"], 1e-5)
    close_absolutely(one_by_one(1e-3)[0], io["y"], 1e-5)
    assert np.max(np.abs(whole(0.0)[0] - io["y"])) > 1e-4


def test_radio_square_and_rectangular():
    tensors = TensorFolder(GOLDENS / "radio")
    hf = json.loads((GOLDENS / "radio" / "config.json").read_text())
    config = vision_from_hf(hf)
    assert (config.position_rows, config.prefix_tokens, config.mlp_width) == (16, 8, 64)
    params = jax.tree.map(jnp.asarray, params_from_hf(config, tensors))
    io = np.load(GOLDENS / "radio" / "io.npz")
    features, prefix = radio_tower(params, config, jnp.moveaxis(io["pixels"], 1, -1))
    close_absolutely(features.reshape(2, 64, 32), io["features"], 1e-5)
    close_absolutely(prefix[:, jnp.asarray(hf["summary_idxs"])].reshape(2, 64), io["summary"], 1e-5)
    wide, _ = radio_tower(params, config, jnp.moveaxis(io["pixels_rect"], 1, -1))
    assert wide.shape == (1, 4, 10, 32)
    close_absolutely(wide.reshape(1, 40, 32), io["features_rect"], 1e-5)


def test_pixel_shuffle():
    io = np.load(GOLDENS / "pixel_shuffle_evs" / "io.npz")
    x, (rows, cols) = io["shuffle_in"], io["shuffle_grid"]
    out = pixel_shuffle(jnp.asarray(x).reshape(2, rows, cols, -1), 2)
    np.testing.assert_array_equal(np.asarray(out).reshape(io["shuffle_out"].shape), io["shuffle_out"])


def vlm_frames(name, config, io):
    """(vision config without normalisation, pixels [F,h,w,3]): the references store patches already normalised."""
    patches = io["pixel_values"][None] if name == "nemotron_h_omni_image" else io["patches"]
    f, p = len(patches), config.vision.patch_size
    rows, cols = io["grid"][0]
    pixels = patches.reshape(f, rows, cols, 3, p, p).transpose(0, 1, 4, 2, 5, 3).reshape(f, rows * p, cols * p, 3)
    raw = dataclasses.replace(config.vision, pixel_mean=(0.0, 0.0, 0.0), pixel_std=(1.0, 1.0, 1.0))
    return raw, jnp.asarray(pixels)


def vlm_batch(io, placeholder, tokens_per_frame):
    """Prompts whose visual places belong to frames in reading order."""
    ids = io["input_ids"]
    visual = ids == placeholder
    frame = np.where(visual, (np.cumsum(visual, axis=1) - 1) // tokens_per_frame, -1)
    count = jnp.asarray(visual.sum(1) // tokens_per_frame, jnp.int32)
    return Batch(jnp.asarray(ids, jnp.int32), jnp.ones(ids.shape, jnp.int32), jnp.asarray(frame, jnp.int32), count)


def whole_prompt(config, params, batch, visual):
    """(embeddings, logits) [B,L,...] of whole prompts, nothing dropped."""
    model = HybridVLM(config)

    @jax.jit
    def run(params):
        tokens = model.apply(
            {"params": params}, batch, visual, method=lambda m, b, v: assemble(m.config, m.embed, b, v)
        )
        hidden = model.apply({"params": params}, tokens, method=lambda m, t: m.decoder(t).tokens.x)
        return tokens.x, hidden @ params["lm_head"]

    return run(params)


@pytest.mark.parametrize("name", VLM)
def test_vision_to_logits(name):
    config, params, io = load(name)
    vision, pixels = vlm_frames(name, config, io)
    visual = jax.jit(lambda p, x: encode_frames(p, vision, x, jnp.arange(len(x))))(params, pixels)
    close_absolutely(visual.reshape(-1, config.width), io["projected"], 1e-5)
    batch = vlm_batch(io, 90, config.vision.tokens_per_frame)
    x, logits = whole_prompt(config, params, batch, visual[None])
    close_absolutely(logits, io["logits"])

    prompt = int(np.flatnonzero(io["input_ids"][0] == 90)[-1]) + 2  # through the visual tokens and one after them
    part = Batch(batch.input_ids[:, :prompt], batch.segment[:, :prompt], batch.frame[:, :prompt], batch.frame_count)
    out = prefill(params, config, part, visual[None], logits.shape[1] - prompt)
    close_absolutely(out.logits, io["logits"][:, prompt - 1])
    if prompt < logits.shape[1]:
        close_absolutely(step_by_step(config, params, x, out.decoder.caches, prompt), io["logits"][:, prompt:])


def test_vision_normalises_raw_pixels():
    """The same tokens from pixels in [0,1] under the config's own mean and deviation."""
    config, params, io = load("nemotron_h_omni_image")
    _, pixels = vlm_frames("nemotron_h_omni_image", config, io)
    restored = pixels * jnp.asarray(config.vision.pixel_std) + jnp.asarray(config.vision.pixel_mean)
    close_absolutely(encode_frames(params, config.vision, restored, jnp.zeros(1))[0], io["projected"], 1e-5)


@pytest.mark.slow
def test_two_frame_patches():
    """Omni video: pairs of frames through their own patch embedding; the last of five frames is its own partner."""
    config, params, _ = load("nemotron_h_omni_image")
    assert config.vision.temporal_patch == 2
    io = np.load(GOLDENS / "nemotron_h_omni_video" / "io.npz")
    frames = np.moveaxis(io["pixel_values_videos"], 1, -1)
    tubelets = np.concatenate([frames, frames[-1:]]).reshape(3, 2, *frames.shape[1:])
    raw, _ = vlm_frames("nemotron_h_omni_image", config, load("nemotron_h_omni_image")[2])
    visual = encode_frames(params, raw, jnp.asarray(tubelets), jnp.arange(3))
    close_absolutely(visual, io["projected"], 1e-5)
    batch = vlm_batch(io, 90, config.vision.tokens_per_frame)
    close_absolutely(whole_prompt(config, params, batch, visual[None])[1], io["logits"])
    prompt = int(np.flatnonzero(io["input_ids"][0] == 90)[-1]) + 2
    part = Batch(*(a[:, :prompt] for a in (batch.input_ids, batch.segment, batch.frame)), batch.frame_count)
    out = prefill(params, config, part, visual[None], io["input_ids"].shape[1] - prompt)
    close_absolutely(out.logits, io["logits"][:, prompt - 1])
    x = params["embed"][jnp.asarray(io["input_ids"])]
    close_absolutely(step_by_step(config, params, x, out.decoder.caches, prompt), io["logits"][:, prompt:])


def test_greedy_decoding():
    config, params, io = load("nemotron_nano_vl_v2")
    assert (config.pattern, config.vision.prefix_tokens, config.vision.position_rows) == ("M-M*-", 8, 16)
    vision, pixels = vlm_frames("nemotron_nano_vl_v2", config, io)
    visual = jax.jit(lambda p, x: encode_frames(p, vision, x, jnp.arange(len(x))))(params, pixels)
    batch = vlm_batch(io, 90, config.vision.tokens_per_frame)
    out = prefill(params, config, batch, visual[None], 4)
    run = jax.jit(functools.partial(decode, config=config, max_new=4, sampling=Sampling()))
    tokens, _, _ = run(params, logits=out.logits, caches=out.decoder.caches, seeds=jnp.zeros(1, jnp.int32))
    np.testing.assert_array_equal(tokens[0], io["greedy"])


def test_published_folder_through_load():
    """nemotron_nano_vl_v2 as people load it: a folder with shards and an index, float32; prefill, and decoding with caches."""
    config, _, io = load("nemotron_nano_vl_v2")
    model = load_folder(GOLDENS / "nemotron_nano_vl_v2", dtype="float32")
    assert (model.name, model.family, model.tokenizer) == ("nemotron_nano_vl_v2", nemotron_vl, None)
    vision, pixels = vlm_frames("nemotron_nano_vl_v2", config, io)
    visual = encode_frames(model.params, vision, pixels, jnp.arange(len(pixels)))[None]
    batch = vlm_batch(io, 90, config.vision.tokens_per_frame)
    close_absolutely(whole_prompt(model.config, model.params, batch, visual)[1], io["logits"])
    prompt = int(np.flatnonzero(io["input_ids"][0] == 90)[-1]) + 2  # through the visual tokens and one after them
    part = Batch(*(a[:, :prompt] for a in (batch.input_ids, batch.segment, batch.frame)), batch.frame_count)
    out = model.prefill(part, visual, None, 16)
    close_absolutely(out.logits, io["logits"][:, prompt - 1])
    ids = np.zeros((1, 8), np.int32)
    ids[:, :2] = io["input_ids"][:, prompt : prompt + 2]
    logits, caches = model.extend(ids, (np.arange(8) < 2)[None].astype(np.int32), out.decoder.caches)
    close_absolutely(logits, io["logits"][:, prompt + 1])
    one = jax.jit(lambda token, caches: nemotron_vl.make_decode_step(model.params, model.config)(token, caches))
    for place in range(prompt + 2, io["input_ids"].shape[1]):
        logits, caches = one(jnp.asarray(io["input_ids"][:, place], jnp.int32), caches)
        close_absolutely(logits, io["logits"][:, place])


def test_every_golden_loads_completely():
    """The parameters read from a checkpoint are exactly those that the module declares."""
    for name in (*TEXT, *VLM):
        config, params, _ = load(name)
        pixels = None
        if config.vision is not None:
            pixels = jax.ShapeDtypeStruct((1, 1, *config.vision.image_size, 3), jnp.uint8)
        tokens = 1 + (config.vision.tokens_per_frame if config.vision else 0)
        batch = jax.eval_shape(lambda n=tokens: text_batch(jnp.zeros((1, n), jnp.int32)))
        declared = jax.eval_shape(HybridVLM(config).init, jax.random.key(0), batch, pixels)["params"]
        expected, found = jax.tree.map(jnp.shape, declared), jax.tree.map(jnp.shape, params)
        if config.vision is not None and config.vision.temporal_patch > 1:
            assert "video_patch_embed" in found["vision"]
        assert found == expected


def test_faulty_checkpoint_is_described():
    config, _, _ = load("nemotron_nano_vl_v2")
    tensors = dict(TensorFolder(GOLDENS / "nemotron_nano_vl_v2"))
    gone = tensors.pop("language_model.backbone.layers.2.mixer.A_log")
    tensors["mlp1.1.weight"] = tensors["mlp1.1.weight"][:, 1:]
    tensors["language_model.backbone.layers.9.mixer.A_log"] = gone
    qkv = "vision_model.radio_model.model.blocks.0.attn.qkv.weight"
    tensors[qkv] = tensors[qkv][:-3]
    with pytest.raises(ValueError) as error:
        params_from_hf(config, tensors)
    lines = str(error.value).splitlines()[1:]
    assert [line.strip() for line in lines] == [
        "missing: backbone.layers.2.mixer.A_log (8,)",
        "wrong shape: mlp1.1.weight should be (48, 128), is (48, 127)",
        f"wrong shape: {qkv} should be (96, 32), is (93, 32)",
        "no parameter for: language_model.backbone.layers.9.mixer.A_log",
    ]


def test_unsupported_configs_are_refused():
    hf = json.loads((GOLDENS / "nemotron_h" / "config.json").read_text())
    assert config_from_hf(hf).pattern == "M-M*-M-"
    # a list of kinds counts before a pattern
    assert config_from_hf(hf | {"hybrid_override_pattern": "M*"}).pattern == "M-M*-M-"
    assert config_from_hf(hf | {"hybrid_override_pattern": "M*", "layers_block_type": None}).pattern == "M*"
    with pytest.raises(ValueError, match="sparse"):
        config_from_hf(hf | {"layers_block_type": ["linear_attention", "sparse"]})
    with pytest.raises(ValueError, match="mlp_hidden_act = 'silu'"):
        config_from_hf(hf | {"mlp_hidden_act": "silu"})
    with pytest.raises(ValueError, match="time_step_limit"):
        config_from_hf(hf | {"time_step_limit": [0.5, 0.1]})
