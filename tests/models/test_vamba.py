"""VAMBA: goldens, an oracle of our own, the video in pieces, memories shared by questions, and reduction by cross-attention."""

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
from helpers.vamba_oracle import forward

from hybridvlm.bench import vamba as bench
from hybridvlm.config import Buckets, Reduction, Schedule, VambaConfig, VisionConfig
from hybridvlm.config_files import load_model_config
from hybridvlm.models import qwen_vl, vamba
from hybridvlm.models.family import family_of
from hybridvlm.models.media import Clip
from hybridvlm.models.qwen_vl import geometry
from hybridvlm.models.vamba import model as vamba_model
from hybridvlm.models.vamba import streams
from hybridvlm.nn import vamba as blocks
from hybridvlm.nn import vamba_layers
from hybridvlm.nn.mamba2 import mamba_layer
from hybridvlm.ops.norms import rms_norm
from hybridvlm.ops.tokens import text_tokens
from hybridvlm.reduction import score_fn
from hybridvlm.tokenizers.published import PublishedTokenizer

# Random weights made for this project and what the published code computes with them. Of more frames, where it was made.
GOLDENS = pathlib.Path(__file__).parents[1] / "goldens" / "vamba"
LONG = pathlib.Path(__file__).parents[3] / "shared" / "goldens" / "vamba" / "long.npz"
without_long = pytest.mark.skipif(not LONG.is_file(), reason="10 MB that are not in the repository")
VISION = VisionConfig(
    kind="qwen",
    image_size=(56, 84),
    patch_size=14,
    width=16,
    layers=1,
    heads=2,
    mlp_width=24,
    position_rows=0,
    prefix_tokens=0,
    temporal_patch=2,
    downsample=2,
    projector_width=64,
    activation="quick_gelu",
)
SMALL = VambaConfig(
    pattern="*-" * 3,
    width=32,
    vocab_size=64,
    mamba_heads=4,
    mamba_head_dim=16,
    ssm_state=8,
    attention_heads=4,
    kv_heads=2,
    head_dim=8,
    mlp_width=40,
    attention_bias=True,
    rope_theta=1e4,
    mlp_gated=True,
    norm_eps=1e-6,
    eos_ids=(7,),
    pad_id=0,
    vision=VISION,
    shortest_edge=28,
    longest_edge=84,
)


# compiling is nearly all that these tests cost, and code of no great speed is compiled in half the time
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def build(table, tensors):
    """Parameters from published tensors by a table, and the names that were used."""
    parts = {}
    for stored, x in tensors.items():
        names = table.canonical(stored)
        parts |= {name: (stored, piece) for name, piece in zip(names, np.split(np.asarray(x), len(names)), strict=True)}
    params, used = {}, set()
    for job in table.jobs:
        config, row, layers = job
        arrays = []
        for _, source, _ in table.pieces(job):
            stored, x = parts[source]
            used.add(stored)
            assert x.shape == row.shape(config), source
            arrays.append(row.turn.into(x, config))
        *path, leaf = row.target.split("/")
        node = functools.reduce(lambda d, key: d.setdefault(key, {}), path, params)
        node[leaf] = jnp.asarray(arrays[0] if layers is None else np.stack(arrays), jnp.float32)
    return params, used


@functools.cache
def golden(name):
    with np.load(LONG if name == "long" else GOLDENS / f"{name}.npz") as stored:
        io = dict(stored)
    raw = json.loads(str(io["config_json"]))
    tensors = {key[2:]: x for key, x in io.items() if key.startswith("w.")}
    config = family_of(raw).config_from_hf(raw, {key: x.shape for key, x in tensors.items()})
    params, used = build(vamba.weight_map(config), tensors)
    assert used == set(tensors)
    return config, params, io


@functools.cache
def small():
    """A config and parameters with nothing left at 0 or 1, so that no part can be missing unseen."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        name = path[-1].key
        if name == "alpha":
            return jnp.asarray([0.3, 0.6, 0.5])
        x = rng.normal(size=leaf.shape)
        if name == "A_log":
            return jnp.asarray(np.log(1 + np.abs(4 * x)), jnp.float32)
        if name in ("D", "gate_norm", "norm", "norm1", "norm2", "norm_f"):
            return jnp.asarray(1 + 0.1 * x, jnp.float32)
        wide = leaf.ndim > 1 and "bias" not in name
        return jnp.asarray(x / math.sqrt(leaf.shape[-2]) if wide else 0.1 * x, jnp.float32)

    declared = jax.eval_shape(lambda key: vamba.init(SMALL, key), jax.random.key(0))
    return SMALL, jax.tree_util.tree_map_with_path(draw, declared)


def film(key, length, width=SMALL.width, batch=1):
    x = np.random.default_rng(key).normal(size=(batch, length, width)).astype(np.float32)
    video = text_tokens(jnp.asarray(x), jnp.ones((batch, length), jnp.int32))
    return video.replace(visual=video.segment > 0, query=jnp.zeros((batch, length), bool))


def words(key, length, width=SMALL.width, asked=0, batch=1):
    """Text whose last `asked` tokens (0: all) are the question."""
    x = np.random.default_rng(key).normal(size=(batch, length, width)).astype(np.float32)
    text = text_tokens(jnp.asarray(x), jnp.ones((batch, length), jnp.int32))
    return text.replace(query=text.position >= (length - asked if asked else 0))


@functools.partial(jit, static_argnames=("config", "decode_capacity", "segment_tokens", "segments", "plan", "score_fn"))
def run(params, config, video, text, **options):
    return blocks.prefill(params["decoder"], config, video, text, **options)


def as64(params):
    return jax.tree.map(lambda a: np.asarray(a, np.float64), params)


# -- the reference ------------------------------------------------------------------------------------------------------


def golden_streams(config, params, io):
    """The tower's output and both streams of a golden."""
    t, h, w = io["in.video_grid_thw"][0]
    rows = jnp.asarray(io["in.pixel_values_videos"]).reshape(t, h * w, -1)
    visual = jit(lambda p, rows: vamba_tower(p, config, rows, (int(h), int(w))))(params, rows)
    visual = visual.reshape(1, -1, config.width)
    ids = jnp.asarray(io["in.input_ids"], jnp.int32)
    video = text_tokens(visual, jnp.ones(visual.shape[:2], jnp.int32))
    text = text_tokens(params["embed"][ids], jnp.ones(ids.shape, jnp.int32))
    return video.replace(visual=video.segment > 0), text


def vamba_tower(params, config, rows, grid):
    from hybridvlm.vision.qwen_vit import qwen_merge, qwen_tower

    return qwen_merge(params["projector"], config.vision, *qwen_tower(params["vision"], config.vision, rows, grid))


@pytest.mark.parametrize(("name", "piece"), [("short", 4096), pytest.param("long", 56, marks=without_long)])
def test_golden_prefill_and_decode(name, piece):
    """Pixels to logits, whole and in pieces that do not divide the video; then four greedy tokens on the cache."""
    config, params, io = golden(name)
    video, text = golden_streams(config, params, io)
    close_absolutely(video.x[0], io["act.visual"], 1e-5)
    memory, out, own = run(params, config, video, text, decode_capacity=4, segment_tokens=piece)
    close_absolutely(vamba_model.logits(params, config, out.x), io["out.logits"])
    caches = vamba_model.Caches(own, memory)
    step = jit(vamba.make_decode_step(params, config))
    logits = vamba_model.logits(params, config, out.x)[:, -1]
    for at, expected in enumerate(io["dec.tokens"]):
        token = jnp.argmax(logits, axis=-1)
        assert int(token[0]) == expected
        logits, caches = step(token, caches)
        close_absolutely(logits, io["dec.logits"][:, at])


@pytest.mark.slow
def test_golden_activations():
    """What every sub-block adds, against the reference's."""
    config, params, io = golden("short")
    p, video, text = params["decoder"], jnp.asarray(io["act.visual"])[None], jnp.asarray(io["out.hidden.0"])
    layer = jit(functools.partial(vamba_layers.text_layer, c=config))
    mix = jit(lambda p, v, s: mamba_layer(p, config.mixer, v, s)[0])
    ones = jnp.ones(video.shape[:2], jnp.int32)
    segment, position = jnp.ones(text.shape[:2], jnp.int32), jnp.arange(text.shape[1])[None]
    _, acts, _ = forward(as64(p), config, np.asarray(text[0], np.float64), np.asarray(video[0], np.float64))
    for i in range(config.layers):
        mine = jax.tree.map(lambda a, i=i: a[i], {name: p[name] for name in ("attention", "cross", "mlp", "mamba")})
        h = rms_norm(text, mine["attention"]["norm"], config.norm_eps)
        keys = vamba_layers.cross_keys(mine["cross"], config, video)
        seen, _, _ = vamba_layers.cross_attention(mine["cross"], config, h, segment, *keys, ones)
        close_absolutely(seen, io[f"act.{i}.cross_attn"], 1e-5)
        memory = vamba_layers.CrossMemory(*keys, ones)
        text, _, _ = layer(mine, x=text, segment=segment, position=position, memory=memory)
        if i + 1 < config.layers:
            close_absolutely(text, io[f"out.hidden.{i + 1}"], 1e-5)
        after = mix(mine["mamba"], video, ones)
        close_absolutely(after - video, io[f"act.{i}.mixer"], 1e-5)
        close_absolutely(after, io[f"act.{i}.vision_mixer"], 1e-5)
        video = after
        for part in ("self_attn", "cross_attn", "mlp", "mixer", "vision_mixer"):
            close_absolutely(acts[f"{i}.{part}"][None], io[f"act.{i}.{part}"], 1e-5)


@pytest.mark.slow
def test_golden_packed_rows():
    """Two samples in one row: positions start anew, and neither sees anything of the other."""
    config, params, io = golden("short")
    rows, at, visual = jnp.asarray(io["packed.pixel_values"]), 0, []
    for t, h, w in io["packed.grid_thw"]:
        part = rows[at : at + t * h * w].reshape(t, h * w, -1)
        visual.append(vamba_tower(params, config, part, (int(h), int(w))).reshape(-1, config.width))
        at += t * h * w
    owner = jnp.asarray(np.repeat([1, 2], [len(x) for x in visual])[None], jnp.int32)
    position = jnp.asarray(io["packed.position_ids"], jnp.int32)
    segment = jnp.cumsum(position == 0, axis=1, dtype=jnp.int32)
    video = text_tokens(jnp.concatenate(visual)[None], owner)
    text = text_tokens(params["embed"][jnp.asarray(io["packed.input_ids"])], segment).replace(position=position)
    _, out, _ = run(params, config, video, text, segments=2, segment_tokens=8)
    close_absolutely(vamba_model.logits(params, config, out.x), io["packed.logits"])


# -- the oracle ---------------------------------------------------------------------------------------------------------


def test_two_streams_against_the_oracle():
    config, params = small()
    video, text = film(2, 29), words(3, 11)
    memory, out, own = run(params, config, video, text, decode_capacity=3, segment_tokens=8)
    expected, _, _ = forward(as64(params["decoder"]), config, as64(text.x[0]), as64(video.x[0]))
    close_absolutely(out.x[0], expected, 2e-5)

    # the same text in two turns: what is cached and what comes after it
    first = dataclasses.replace(text, **{n: getattr(text, n)[:, :8] for n in ("x", "position", "segment", "query")})
    _, _, own = run(params, config, video, first, decode_capacity=3, segment_tokens=8)
    more, _ = jit(functools.partial(blocks.extend, c=config))(
        params["decoder"], x=text.x[:, 8:], segment=text.segment[:, 8:], caches=own, memory=memory
    )
    close_absolutely(more[0], expected[8:], 2e-5)


def test_the_last_block_is_dead():
    """Its parameters are declared and stored, and reach no output."""
    config, params = small()
    video, text = film(2, 13), words(3, 5)
    _, out, _ = run(params, config, video, text)
    changed = jax.tree.map(lambda a: a, params)
    changed["decoder"]["mamba"] = jax.tree.map(lambda a: a.at[-1].set(jnp.nan), params["decoder"]["mamba"])
    _, same, _ = run(changed, config, video, text)
    np.testing.assert_array_equal(out.x, same.x)
    assert memory_layers(run(params, config, video, None)[0]) == config.layers


def memory_layers(memory):
    return sum(stage.k.shape[0] for stage in memory.stages)


@pytest.mark.slow
def test_pieces_of_any_length_carry_their_state():
    """A video encoded piece by piece, as it comes, is the video encoded whole; padding after one in a batch changes nothing."""
    config, params = small()
    video = film(4, 37, batch=2)
    whole, _, _ = run(params, config, video, None)
    state, memory = None, None
    for start, stop in ((0, 1), (1, 18), (18, 20), (20, 37)):
        part = jax.tree.map(lambda a, start=start, stop=stop: a[:, start:stop], video)
        new, _, _ = run(params, config, part, None, state=state)
        memory, state = (new if memory is None else blocks.append(memory, new)), new.state
    close_absolutely(memory.stages[0].k, whole.stages[0].k, 1e-5)
    close_absolutely(memory.stages[0].v, whole.stages[0].v, 1e-5)
    jax.tree.map(functools.partial(close_absolutely, tolerance=1e-5), memory.state[0].ssm, whole.state[0].ssm)
    np.testing.assert_array_equal(memory.kept, whole.kept)

    short = video.replace(segment=video.segment.at[1, 21:].set(0))
    short = short.replace(visual=short.segment > 0, x=short.x * (short.segment > 0)[..., None])
    padded, _, _ = run(params, config, short, None, segment_tokens=16)
    alone, _, _ = run(params, config, jax.tree.map(lambda a: a[1:, :21], video), None)
    close_absolutely(padded.stages[0].k[:, 1, :21], alone.stages[0].k[:, 0], 1e-5)
    close_absolutely(padded.state[0].ssm[:, 1], alone.state[0].ssm[:, 0], 1e-5)
    close_absolutely(padded.stages[0].k[:, 0, :37], whole.stages[0].k[:, 0], 1e-5)


@pytest.mark.slow
def test_gradients_through_pieces():
    config, params = small()
    video, text = film(2, 26), words(3, 5)

    def loss(params, x, piece):
        _, out, _ = blocks.prefill(params["decoder"], config, video.replace(x=x), text, segment_tokens=piece)
        return jnp.sum(out.x**2)

    whole = jit(jax.grad(loss, (0, 1)), static_argnums=2)(params, video.x, 4096)
    pieces = jit(jax.grad(loss, (0, 1)), static_argnums=2)(params, video.x, 8)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(pieces), strict=True):
        close_absolutely(a, b, 1e-4 * max(1.0, float(jnp.max(jnp.abs(a)))))
    assert float(jnp.max(jnp.abs(whole[0]["decoder"]["mamba"]["in_proj"][:-1]))) > 0
    assert float(jnp.max(jnp.abs(whole[0]["decoder"]["mamba"]["in_proj"][-1]))) == 0


# -- a batch: words and frames to logits --------------------------------------------------------------------------------


class Letters(PublishedTokenizer):
    """A tokenizer of single characters and the special tokens of the chat template."""

    def __init__(self):
        super().__init__(None, "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>")

    def encode(self, text):
        return [1 + ord(c) % 60 for c in text]

    def decode(self, ids):
        return "".join(chr(64 + i) for i in ids)


def asked(question, frames, seed=0):
    """(messages, clips) of one question about a video of random frames; None: about nothing."""
    content = [{"type": "text", "text": question}]
    if frames is None:
        return [{"role": "user", "content": content}], []
    size = VISION.image_size
    shown = np.random.default_rng(seed).integers(0, 256, (frames, *size, 3), np.uint8)
    clip = Clip(tuple(float(i) for i in range(frames)), shown, size=size)
    return [{"role": "user", "content": [{"type": "video"}, *content]}], [clip]


def arrays(config, samples, factors=(1, 1, 1)):
    """The batch of several (messages, clips), and the pixels of those that have a video."""
    layouts = [vamba.prompt(config, Letters(), *sample, factors=factors) for sample in samples]
    buckets = Buckets(frames=(4, 8), text=(32, 64), max_new=4)
    batch, frames, text = vamba.make_batch(config, layouts, buckets, factors)
    clips = [clips[0] if clips else asked("", 2)[1][0] for _, clips in samples]
    return batch, vamba.pixels(config, clips, max(frames, 4)), frames, text


@functools.partial(jit, static_argnames=("config", "plan", "decode_capacity"))
def answer(params, config, batch, visual, plan=None, decode_capacity=0):
    return vamba.prefill(params, config, batch, visual, plan, decode_capacity)


@functools.partial(jit, static_argnames="config")
def look(params, config, pixels):
    return vamba.encode(params, config, pixels)


@pytest.mark.slow
def test_examples_of_a_batch_do_not_touch_each_other():
    """Two videos of different length and a prompt without any, together and alone."""
    config, params = small()
    samples = [asked("what?", 7), asked("and here?", 4, 1), asked("no film", None)]
    batch, pixels, frames, _ = arrays(config, samples)
    assert frames == 4 and list(batch.frame_count) == [3, 2, 0]  # the odd seventh frame fills no tubelet
    together = answer(params, config, batch, look(params, config, pixels))
    np.testing.assert_array_equal(together.counts[:, 0], [18, 12, 0])
    for row, sample in enumerate(samples[1:], start=1):
        batch, pixels, frames, _ = arrays(config, [sample])
        alone = answer(params, config, batch, look(params, config, pixels) if frames else None)
        close_absolutely(together.logits[row], alone.logits[0], 1e-5)


def test_text_alone():
    """Without a video the cross-attention adds nothing; `text_only` says what becomes of self-attention's share."""
    config, params = small()
    batch, _, _, _ = arrays(config, [asked("no film", None)])
    x = params["embed"][jnp.asarray(batch.input_ids[0][batch.segment[0] > 0])]
    expected, _, _ = forward(as64(params["decoder"]), config, as64(x), np.zeros((0, config.width)))
    balanced = answer(params, config, batch, None)
    close_absolutely(balanced.logits[0], expected[-1] @ as64(params["lm_head"]), 1e-4)
    whole = answer(params, dataclasses.replace(config, text_only="whole"), batch, None)
    assert float(jnp.max(jnp.abs(whole.logits - balanced.logits))) > 1e-2
    with pytest.raises(ValueError, match="text_only"):
        dataclasses.replace(config, text_only="half")


def plan_of(config, frames, text, **fields):
    return vamba.make_plan(config, Reduction(schedule=Schedule(floor=0.1), **fields), frames, text)


@pytest.mark.slow
def test_one_memory_serves_many_questions():
    """Dense, and under a plan that does not look at the question: the same logits as from the video itself."""
    config, params = small()
    batch, pixels, frames, text = arrays(config, [asked("what?", 8), asked("and what else?", 8)])
    visual = look(params, config, pixels)
    for plan in (None, plan_of(config, frames, text, method="evs:0.75+saliency:0.5")):
        direct = answer(params, config, batch, visual, plan)
        one = jax.tree.map(lambda a: a[:1], batch)
        memory = jit(vamba.build_video_memory, static_argnums=(1, 4))(params, config, one, visual[:1], plan)
        both = answer(params, config, batch, memory, plan)
        close_absolutely(both.logits, direct.logits, 1e-5)
    asking = plan_of(config, frames, text, method="str", budget=0.5)
    with pytest.raises(ValueError, match=r"str.*what one question asks for.*uniform"):
        vamba.build_video_memory(params, config, batch, visual, asking)
    with pytest.raises(ValueError, match="looks at the question"):
        vamba.prefill(params, config, batch, memory, asking, 0)


# -- reduction ----------------------------------------------------------------------------------------------------------


def test_drops_by_cross_attention_against_the_oracle():
    """Which tokens stay after every layer when the question's cross-attention decides, the text's states, and decoding on it."""
    config, params = small()
    video, text = film(2, 24), words(3, 10)
    text = text.replace(query=(text.position >= 5) & (text.position < 9))
    plan = vamba_model.plans.make_plan(
        Reduction("str", 0.5, schedule=Schedule(shape="linear", floor=0.1)),
        vamba_model.VambaReading(config, 9),
        visual_tokens=24,
        text_tokens=9,
        frames=4,
    )
    assert plan.drops == (0, 1)
    rows, score = streams._VideoRows(plan), score_fn(plan)
    first = dataclasses.replace(text, **{n: getattr(text, n)[:, :9] for n in ("x", "position", "segment", "query")})
    memory, out, own = jit(
        lambda p, v, t: blocks.prefill(p, config, v, t, plan=rows, score_fn=score, segment_tokens=16, decode_capacity=1)
    )(params["decoder"], video, first)
    one = jit(functools.partial(blocks.extend, c=config))
    more, _ = one(params["decoder"], x=text.x[:, 9:], segment=text.segment[:, 9:], caches=own, memory=memory)
    expected, _, kept = forward(
        as64(params["decoder"]),
        config,
        as64(text.x[0]),
        as64(video.x[0]),
        query=np.arange(5, 9),
        keep={layer: plan.keep(layer, 24) for layer in (1, 2)},
    )
    for (index, _), places in zip(memory.survivors, kept[1:], strict=True):
        np.testing.assert_array_equal(np.asarray(index[0])[: len(places)], places)
    close_absolutely(jnp.concatenate([out.x, more], axis=1)[0], expected, 2e-5)


@pytest.mark.parametrize("method", ["uniform", "avgpool", "evs:0.75+str:0.5"])
@pytest.mark.slow
def test_methods_keep_what_their_plans_say(method):
    """In a batch of videos of different length; and the survivors name their places in the prompt."""
    config, params = small()
    samples = [asked("what?", 8), asked("and here?", 4, 1)]
    batch, pixels, frames, text = arrays(config, samples)
    plan = plan_of(config, frames, text, method=method, budget=0.5)
    if plan.pool_factors != (1, 1, 1):
        batch, *_ = arrays(config, samples, plan.pool_factors)
    done = answer(params, config, batch, look(params, config, pixels), plan)
    entering = [sum(drop < layer for drop in plan.drops) for layer in range(plan.layers)]
    plan.verify(np.asarray(done.decoder.kept)[entering, :, 0], np.asarray(done.counts)[:, 0])
    assert plan.flop_ratio < 1
    assert np.isfinite(done.logits).all()
    for row, sample in enumerate(samples):
        layout = vamba.prompt(config, Letters(), *sample, factors=plan.pool_factors)
        index, visual = (np.asarray(a[row]) for a in (done.decoder.tokens.index, done.decoder.tokens.visual))
        assert (layout.frame[index[visual]] >= 0).all()
        assert len(set(index[visual])) == np.asarray(done.decoder.kept)[-1, row, 0]


def test_plans_count_both_streams():
    """FLOPs and bytes of the released model at 1,024 frames of 644x364, by hand."""
    config = released()
    config = geometry.at_size(config, 364, 644)
    plan = vamba.make_plan(config, Reduction("uniform", 0.25), 512, 128)
    m, t, d = 153_088, 128, 3584
    assert plan.visual_tokens == m
    chunk = vamba_model.default_choice().chunk_size
    block = 2 * m * d * (14704 + 7168) + 2 * m * 7424 * 4 + 2 * m * chunk * (128 + 7168) + 4 * m * 7168 * 128
    block += 2 * math.ceil(m / chunk) * 7168 * 128
    keys = 4 * m * d * 512
    own = 2 * t * d * (2 * 3584 + 2 * 512) + 2 * 3584 * t * t
    reads = 4 * t * d * 3584 + 4 * 3584 * t * m
    layers = 27 * block + 28 * (keys + own + reads + 6 * t * d * 18944)
    assert plan.dense_cost.decoder == layers + 2 * d * 152_064
    assert plan.dense_cost.kv_bytes == 57_344 * (m + t)
    assert abs(plan.retention_mean - 0.25) < 1e-3


def test_flops_are_those_of_the_papers_plots():
    """Prefill at 640x360 (TFLOPs read off the plots, +-3 %), counted as a profiler does that sees no attention products."""
    for model, plotted in bench.PAPER["prefill"].items():
        config = geometry.at_size(load_model_config(bench.MODELS[model]), 364, 644)
        for frames, (_, tflops) in plotted.items():
            assert abs(bench.papers_flops(config, frames, 128) / (tflops * 1e12) - 1) < 0.03


# -- on disk ------------------------------------------------------------------------------------------------------------


def released():
    return load_model_config("vamba_qwen2_vl_7b")


def test_every_published_tensor_of_the_released_model_has_its_place():
    config = released()
    table = vamba.weight_map(config)
    shapes = table.shapes()
    assert len(shapes) == 1206
    assert sum(math.prod(shape) for shape in shapes.values()) == 11_309_837_020
    sizes = {
        "model.embed_tokens.weight": (152064, 3584),
        "model.norm.weight": (3584,),
        "model.layers.27.alpha": (1,),
        "model.layers.27.cross_attn.k_proj.bias": (512,),
        "model.layers.27.vision_mixer.mixer.in_proj.weight": (14704, 3584),
        "model.layers.27.vision_mixer.mixer.conv1d.weight": (7424, 1, 4),
        "model.layers.0.mlp.down_proj.weight": (3584, 18944),
        "visual.patch_embed.proj.weight": (1280, 3, 2, 14, 14),
        "visual.blocks.31.attn.qkv.weight": (3840, 1280),
        "visual.merger.mlp.2.weight": (3584, 5120),
    }
    assert {name: shapes[name] for name in sizes} == sizes
    declared = jax.eval_shape(lambda key: vamba.init(config, key), jax.random.key(0))
    flat = {
        "/".join(key.key for key in path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(declared)
    }
    assert {job[1].target: table.target_shape(job) for job in table.jobs} == flat
    newer = "model.language_model.layers.3.vision_mixer.mixer.A_log"
    assert table.canonical(newer) == table.canonical("model.layers.3.vision_mixer.mixer.A_log")


def test_config_json():
    """The state's size comes from the tensors; what is not computed is refused by name."""
    raw = {
        "model_type": "qwen2_vl",
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "hidden_size": 3584,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "intermediate_size": 18944,
        "vocab_size": 152064,
        "rope_theta": 1e6,
        "eos_token_id": 151645,
        "vision_config": {
            "depth": 32,
            "embed_dim": 1280,
            "num_heads": 16,
            "mlp_ratio": 4,
            "patch_size": 14,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
            "hidden_act": "quick_gelu",
        },
        "vision_mamba_mixer_config": {"enable": True, "d_state": 128, "dt_limit": [0.0, math.inf]},
    }
    assert family_of(raw) is vamba
    config = vamba.config_from_hf(raw, {"model.layers.0.vision_mixer.mixer.conv1d.weight": (7296, 1, 4)})
    assert (config.ssm_state, config.mamba_heads, config.in_proj_width) == (64, 112, 14576)
    config = vamba.config_from_hf(raw)
    assert vamba.weight_map(config).shapes() == vamba.weight_map(released()).shapes()
    for key, value in (("cross_attn_use_layer_norm", True), ("cross_attn_use_position_embeddings", True)):
        with pytest.raises(ValueError, match=key):
            vamba.config_from_hf(raw | {key: value})
    with pytest.raises(ValueError, match="norm_before_gate"):
        vamba.config_from_hf(raw | {"vision_mamba_mixer_config": {"norm_before_gate": True}})
    del raw["vision_mamba_mixer_config"]
    assert family_of(raw) is qwen_vl
    with pytest.raises(ValueError, match="vision_mamba_mixer_config"):
        vamba.config_from_hf(raw)


def test_frame_sizes_of_the_evaluation_scripts():
    """Longest and shortest edge of the published scripts, and what a 16:9 frame becomes."""
    config = released()
    for edges, expected in (((480, 256), (280, 476)), ((560, 256), (308, 560)), ((360, 256), (252, 364))):
        sized = dataclasses.replace(config, longest_edge=edges[0], shortest_edge=edges[1])
        assert vamba.frame_size(sized, 360, 640, 512) == expected
    assert vamba.frame_size(dataclasses.replace(config, longest_edge=1280), 360, 640, 1024) == (364, 644)
