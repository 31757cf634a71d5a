"""VAMBA in training: gradients against an independent forward, rows that pack and share videos, plans, whole runs of both stages."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.train_micro import FRAMES, TEXT, VAMBA_REDUCTION, micro_transformer, micro_vamba, settings
from helpers.vamba_oracle import forward, merger

import hybridvlm as hv
from hybridvlm.checkpoints.folder import expected_shapes, save_folder
from hybridvlm.config import VambaConfig
from hybridvlm.config_files import load_model_config
from hybridvlm.models import vamba
from hybridvlm.models.media import Clip
from hybridvlm.models.weights import flatten, unflatten
from hybridvlm.train import config_files, loop
from hybridvlm.train.__main__ import main
from hybridvlm.train.optimizer import split
from hybridvlm.train.rows import Shape, example, packed, sharing, single, train_batch
from hybridvlm.train.sources import NeedleSource
from hybridvlm.train.step import Trainer

PER_FRAME = 16
STAGE_1 = ("^vision/", "^projector/", "^embed$", "^lm_head$", "^decoder/(attention|mlp|norm_f)")


def shaken(made):
    """A model with nothing left at 0 or 1, so that no part can be missing unseen."""
    rng = np.random.default_rng(0)

    def draw(path, a):
        name, noise = path.rsplit("/", 1)[-1], rng.normal(size=a.shape).astype(np.float32)
        if name == "alpha":
            return jnp.asarray([0.3, 0.6, 0.5], jnp.float32)
        scale = 0 if name in ("A_log", "dt_bias") else 0.05 if a.ndim > 2 and "down" not in path else 0.3
        return a + scale * jnp.asarray(noise)

    return dataclasses.replace(made, params=unflatten({k: draw(k, a) for k, a in flatten(made.params).items()}))


@pytest.fixture(scope="module")
def model():
    return shaken(micro_vamba())


@pytest.fixture(scope="module")
def source(model):
    return NeedleSource(vamba_settings(), model)


def vamba_settings(output="unused", **changes):
    changes = {"reduction": {"mode": "none"}, **changes}
    return settings(output, **changes)


def row_of(samples, shape):
    """What packing makes of samples."""
    names = ("ids", "frame", "label", "question", "part", "position")
    parts = {name: np.concatenate([s[name] for s in samples]) for name in names if name in samples[0]}
    count = [len(s["ids"]) for s in samples]

    def filled(a, empty=0):
        return np.concatenate([a, np.full((shape.length - len(a), *a.shape[1:]), empty, a.dtype)])

    row = {name: filled(a, -1 if name == "frame" else 0) for name, a in parts.items()}
    row["ids_segment_ids"] = filled(np.repeat(np.arange(1, len(samples) + 1), count))
    for name in ("visual_cells", "visual_time"):
        row[name] = np.concatenate([s[name] for s in samples])
        row[name + "_segment_ids"] = np.repeat(np.arange(1, len(samples) + 1), [len(s[name]) for s in samples])
    return packed(row, shape)


def batch_of(rows, shape, **options):
    return train_batch({name: np.stack([row[name] for row in rows]) for name in rows[0]}, vamba, shape, **options)


def logits_of(model, source, batch, plan=None, **data):
    """(answer logits, tokens to be said, output) of a batch, as a step has them."""
    trainer = Trainer(vamba_settings(data=data), model)

    def run(params, batch, table):
        from hybridvlm.train.features import visual

        out, _ = trainer._run(params, batch, visual(params, model, batch.visual, table), plan)
        return *trainer.answer_logits(params, out, batch), out

    return jax.jit(run)(model.params, batch, source.table)


# -- gradients ----------------------------------------------------------------------------------------------------------


QWEN2 = {"attention_bias": True, "qk_norm": False, "rope_theta": 1e4, "mlp_gated": True}


@pytest.mark.parametrize("parts", [QWEN2, pytest.param({}, marks=pytest.mark.slow)], ids=["qwen2", "tiny"])
def test_gradients_of_every_parameter_against_the_independent_forward(model, source, parts):
    """Along a random direction in every array of decoder, embedding and head: central differences of a float64 forward."""
    if parts:
        config = dataclasses.replace(model.config, **parts)
        params = jax.jit(lambda key: vamba.init(config, key))(jax.random.key(5))
        model = shaken(dataclasses.replace(model, config=config, params=params))
    c, shape = model.config, Shape(FRAMES, TEXT, 1, PER_FRAME)
    batch = batch_of([single(source.sample(3), shape)], shape)
    features = np.random.default_rng(1).normal(size=(1, FRAMES, PER_FRAME, c.width)).astype(np.float32)
    batch = dataclasses.replace(batch, visual={"features": features})
    video = features.reshape(-1, c.width).astype(np.float64)
    seen = gradients_hold(model, batch, ["^vision/", "^projector/"], lambda params: video)
    assert seen == {"embed", "lm_head", "attention", "cross", "mlp", "mamba", "decoder"}


@pytest.mark.slow
def test_gradients_of_the_merger_against_the_independent_forward(tmp_path):
    """Qwen2-VL's, which stage 2 trains: from pixels through the frozen tower, its cells of four patches merged and projected."""
    from hybridvlm.checkpoints.samples import write_sample
    from hybridvlm.vision.qwen_vit import _run_tower, patch_rows
    from hybridvlm.vision.radio import normalise

    model = hv.load(write_sample("vamba", tmp_path / "vamba"))
    c, clip = model.config, Clip((0.0, 1.0, 2.0, 3.0))
    pixels = np.random.default_rng(4).integers(0, 256, (4, *c.vision.image_size, 3)).astype(np.uint8)
    pixels = model.family.pixels(c, [dataclasses.replace(clip, frames=pixels)], 2)
    row = example(model, clip, "red?", "blue")
    shape = Shape(2, int((row["frame"] < 0).sum()) + 3, 1, c.vision.tokens_per_frame)
    batch = batch_of([single(row | {"visual_pixels": pixels[0]}, shape)], shape)
    grid = [side // c.vision.patch_size for side in c.vision.image_size]
    rows = patch_rows(c.vision, normalise(c.vision, jnp.asarray(pixels[0], jnp.float32) / 255))
    seen_by_tower, _, _ = jax.jit(lambda p, x: _run_tower(p, c.vision, x, grid, jnp.float32, False))(
        model.params["vision"], rows
    )
    patches = np.asarray(seen_by_tower, np.float64)

    def video(params):
        return merger(params["projector"], c.vision, patches)

    others = ["^vision/", "^decoder/", "^embed$", "^lm_head$"]
    settled = vamba_settings(
        optimizer={"frozen": others}, data={"features": "pixels", "frames": 2, "text": shape.text, "answer": 8}
    )
    assert gradients_hold(model, batch, others, video, settled) == {"projector"}


def gradients_hold(model, batch, frozen, video, config=None):
    """Check a step's gradients of all that is not frozen; gives the parts that have one.

    video: parameters in float64 -> the visual tokens [M,D] that the decoder is given.
    """
    c = model.config
    trainer = Trainer(config or vamba_settings(optimizer={"frozen": frozen}), model)
    state, fixed = trainer.start(model.params)
    total = jnp.float32((batch.label > 0).sum())
    grads = jax.jit(jax.grad(lambda train: trainer.plan_loss(train, fixed, batch, total, None)[0]))(state.train)
    real = batch.batch.segment[0] > 0
    ids, label = batch.batch.input_ids[0][real], batch.label[0][real]

    def loss(flat):
        params = unflatten(flat)
        x, _, _ = forward(params["decoder"], c, params["embed"][ids], video(params))
        logits = x[label > 0] @ params["lm_head"]
        top = logits.max(-1, keepdims=True)
        each = top[:, 0] + np.log(np.exp(logits - top).sum(-1)) - logits[np.arange(len(logits)), label[label > 0] - 1]
        return each.mean()

    start = {path: np.asarray(a, np.float64) for path, a in flatten(model.params).items()}
    rng, seen = np.random.default_rng(2), set()
    for path, grad in grads.items():
        direction = rng.normal(size=grad.shape)
        direction /= np.linalg.norm(direction)
        step = 1e-5
        ends = [loss(start | {path: start[path] + sign * step * direction}) for sign in (1, -1)]
        want, got = (ends[0] - ends[1]) / (2 * step), float(np.sum(np.asarray(grad, np.float64) * direction))
        size = float(jnp.linalg.norm(grad.ravel()))
        assert abs(want - got) <= 1e-4 * max(size, 1e-3), (path, want, got, size)
        seen |= {path.split("/")[-2] if "/" in path else path} if size > 0 else set()
    return seen


# -- rows ---------------------------------------------------------------------------------------------------------------


def test_a_packed_row_gives_what_its_samples_give_alone(model, source):
    samples = [source.sample(0), source.sample(1)]
    one, two = Shape(FRAMES, TEXT, 1, PER_FRAME), Shape(2 * FRAMES, 2 * TEXT, 2, PER_FRAME)
    alone, said, _ = logits_of(model, source, batch_of([single(s, one) for s in samples], one))
    both = batch_of([row_of(samples, two)], two)
    np.testing.assert_array_equal(np.unique(both.batch.segment), [0, 1, 2])
    wide = {"segments": 2, "frames": 2 * FRAMES, "text": 2 * TEXT}
    joined, told, _ = logits_of(model, source, both, **wide)
    np.testing.assert_array_equal(told[0], np.asarray(said).ravel())
    np.testing.assert_allclose(
        joined[0], np.asarray(alone).reshape(joined[0].shape), atol=1e-5 * float(np.abs(alone).max())
    )


@pytest.mark.slow
def test_a_packed_row_keeps_under_a_plan_what_its_samples_keep_alone(model, source):
    samples = [source.sample(0), source.sample(1)]
    one, two = Shape(FRAMES, TEXT, 1, PER_FRAME), Shape(2 * FRAMES, 2 * TEXT, 2, PER_FRAME)
    for method in ("str-attention", "random", "uniform"):
        reduction = dataclasses.replace(VAMBA_REDUCTION, method=method)
        plans = [vamba.make_plan(model.config, reduction, s.frames, s.text, 4) for s in (one, two)]
        alone, _, single_out = logits_of(model, source, batch_of([single(s, one) for s in samples], one), plans[0])
        both = batch_of([row_of(samples, two)], two)
        wide = {"segments": 2, "frames": 2 * FRAMES, "text": 2 * TEXT}
        joined, _, out = logits_of(model, source, both, plans[1], **wide)
        np.testing.assert_array_equal(out.kept[:, 0], single_out.kept[:, :, 0])
        np.testing.assert_allclose(
            joined[0], np.asarray(alone).reshape(joined[0].shape), atol=1e-5 * float(np.abs(alone).max())
        )


def test_questions_that_share_a_video_are_answered_as_alone(model):
    """Their text is apart, positions start anew, and all of them read the same visual tokens."""
    many = {"questions": 3, "text": 3 * TEXT}
    source = NeedleSource(vamba_settings(data=many), model)
    shape = Shape(FRAMES, 3 * TEXT, 1, PER_FRAME)
    sample = source.sample(5)
    assert int((sample["frame"] >= 0).sum()) == FRAMES * PER_FRAME
    batch = batch_of([single(sample, shape)], shape)
    assert batch.batch.segment.max() == 3 and set(np.unique(batch.batch.reads)) == {0, 1}
    together, said, _ = logits_of(model, source, batch, **many)
    visual = {name: a for name, a in sample.items() if name.startswith("visual")}
    one, rows = Shape(FRAMES, TEXT, 1, PER_FRAME), []
    shown = sample["frame"] >= 0
    for number in range(3):
        own = shown | ((sample["part"] == number) & ~shown)
        row = {name: sample[name][own] for name in ("ids", "frame", "label", "question")}
        # every question but the first stands behind the video as the first one does
        rows.append(single(row | visual, one))
    alone, told, _ = logits_of(model, source, batch_of(rows, one))
    np.testing.assert_array_equal(said[0], np.asarray(told).ravel())
    np.testing.assert_allclose(
        together[0], np.asarray(alone).reshape(together[0].shape), atol=1e-5 * float(np.abs(alone).max())
    )


def test_sharing_keeps_one_video():
    a = {"ids": np.arange(4), "frame": np.array([0, 0, -1, -1]), "label": np.arange(4), "question": np.ones(4, bool)}
    both = sharing([a, a | {"ids": np.arange(10, 14)}])
    np.testing.assert_array_equal(both["ids"], [0, 1, 2, 3, 12, 13])
    np.testing.assert_array_equal(both["part"], [0, 0, 0, 0, 1, 1])


# -- whole runs ---------------------------------------------------------------------------------------------------------


def run_config(folder, path, **changes):
    own = {
        "model": str(path),
        "steps": 4,
        "optimizer": {"frozen": list(STAGE_1)},
        "data": {"questions": 2, "text": 2 * TEXT},
        "reduction": {"mode": "none"},
        "checkpoints": {"every": 2},
    }
    config = settings(folder)
    base = json.loads(json.dumps(dataclasses.asdict(config)))
    for name, value in (own | changes).items():
        base[name] = base[name] | value if isinstance(value, dict) else value
    base["output"] = str(folder)
    return base


def test_the_first_stage_by_the_command(tmp_path, capsys):
    """A Transformer in, a VAMBA out: cross-attention, mixers and shares are trained, everything else comes out as it went in."""
    transformer = micro_transformer()
    path = save_folder(tmp_path / "transformer", transformer)
    told = run_config(tmp_path / "run", path, convert={"to": "vamba"}, steps=2, export={"name": "small-vamba"})
    (tmp_path / "c.json").write_text(json.dumps(told))
    assert main([str(tmp_path / "c.json")]) == 0, capsys.readouterr()
    made = hv.load(tmp_path / "run" / "export")
    assert isinstance(made.config, VambaConfig) and made.config.pattern == "*-" * 3
    assert made.config.name == "small-vamba"
    begun = dict(flatten(hv.init_vamba_from(transformer, 0).params))
    changed = {name for name, array in flatten(made.params).items() if not np.array_equal(array, begun[name])}
    assert changed == {name for name in begun if name.startswith(("decoder/cross/", "decoder/mamba/"))}
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and all(np.isfinite(line["loss"]) for line in lines)
    asked = made.ask(np.zeros((FRAMES, 128, 128, 3), np.uint8), "red@t12 none what ?", max_new=1)
    assert len(asked.tokens) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"reduction": {"mode": "fixed", "reduction": dataclasses.asdict(VAMBA_REDUCTION)}},
        {"lora": {"rank": 2, "targets": ["^decoder/cross/.*_proj$"]}, "remat": "layer"},
        {"data": {"questions": 1, "text": 4 * TEXT, "frames": 2 * FRAMES, "sample_frames": FRAMES, "segments": 2}},
        {"distill": {"kl": 0.5, "teacher": "TRANSFORMER"}, "data": {"questions": 1}, "dtype": "bfloat16"},
    ],
    ids=["dense", "plan", "lora", "packed", "taught"],
)
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, changes):
    """Dense with shared videos, under a plan, LoRA, packed rows, taught by the Transformer."""
    path = save_folder(tmp_path / "vamba", micro_vamba())
    teacher = save_folder(tmp_path / "transformer", micro_transformer())
    changes = json.loads(json.dumps(changes).replace("TRANSFORMER", str(teacher)))

    def build(folder):
        return config_files.build(type(settings()), run_config(folder, path, **changes))

    whole = loop.Run(build(tmp_path / "whole"), say=lambda text: None)
    whole.run()
    run, calls = loop.Run(build(tmp_path / "cut"), say=lambda text: None), []
    held = run.batch

    def stop(arrays, shared):
        calls.append(1)
        if len(calls) == 2:
            run.told_to_stop.set()
        return held(arrays, shared)

    run.batch = stop
    with pytest.raises(loop.Stopped):
        run.run()
    loop.Run(build(tmp_path / "cut"), say=lambda text: None).run()
    read = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "cut")
    ]
    assert len(read[0]) == 4
    for a, b in zip(*read, strict=True):
        assert (a["loss"], a["grad_norm"]) == (b["loss"], b["grad_norm"])
    one, two = (dict(flatten(hv.load(tmp_path / name / "export").params)) for name in ("whole", "cut"))
    for name, array in one.items():
        np.testing.assert_array_equal(array, two[name], err_msg=name)


@pytest.mark.slow
def test_shares_stay_between_0_and_1(model, source):
    shape = Shape(FRAMES, TEXT, 1, PER_FRAME)
    batch = batch_of([single(source.sample(i), shape) for i in range(2)], shape)
    trainer = Trainer(vamba_settings(optimizer={"rate": 5.0, "warmup": 0, "clip": 0}), model)
    state, fixed = trainer.start(model.params, source.table)
    for _ in range(2):
        state, _ = trainer.program(None)(state, fixed, batch)
    alpha = np.asarray(state.train["decoder/cross/alpha"])
    assert alpha.min() >= 0 and alpha.max() <= 1 and set(alpha) & {0.0, 1.0}


def test_what_two_streams_cannot_do_is_refused(model):
    for changes, text in (
        ({"distill": {"scores": 0.1, "teach": 1}}, r"Distill\.scores.*'vamba'"),
        ({"distill": {"questions": 4}}, r"Distill\.questions.*Data\.questions"),
    ):
        with pytest.raises(ValueError, match=text):
            Trainer(vamba_settings(**changes), model)
    with pytest.raises(ValueError, match=r"Data\.questions 2.*'nemotron_vl' are one row"):
        Trainer(vamba_settings(data={"questions": 2}), micro_transformer())


def test_a_method_that_looks_at_whole_videos_is_refused_before_a_packed_run_begins(model, tmp_path):
    packed = {"segments": 2, "text": 2 * TEXT, "frames": 2 * FRAMES, "sample_frames": FRAMES}
    for method, text in (
        ("evs", r"evs works on one video a row, and Data\.segments packs up to 2"),
        ("evs-pixels", "training under evs-pixels is not supported: it encodes whole videos"),
    ):
        reduction = {"mode": "fixed", "reduction": {"method": method, "budget": 0.5}}
        with pytest.raises(ValueError, match=text):
            loop.Run(vamba_settings(tmp_path / "run", data=packed, reduction=reduction), model)
    assert not (tmp_path / "run").exists()


# -- from a Transformer -------------------------------------------------------------------------------------------------


def test_a_vamba_starts_from_its_transformer():
    """Copies, a half, and the published draws; a layer without an MLP gets one that adds nothing."""
    transformer, made = micro_transformer(), micro_vamba()
    old, new = transformer.params["decoder"], made.params["decoder"]
    for name, array in new["cross"].items():
        np.testing.assert_array_equal(array, 0.5 if name == "alpha" else old["attention"][name], err_msg=name)
    np.testing.assert_array_equal(new["mlp"]["down_proj"][0], 0)
    np.testing.assert_array_equal(new["mlp"]["up_proj"][1:], old["mlp"]["up_proj"])
    mamba, c = new["mamba"], made.config
    assert abs(float(mamba["in_proj"].std()) - 0.02) < 1e-3
    bound = 1 / np.sqrt(c.mamba_width * c.layers)
    assert bound * 0.9 < float(jnp.abs(mamba["out_proj"]).max()) <= bound
    dt = np.log1p(np.exp(np.asarray(mamba["dt_bias"], np.float64)))
    assert dt.min() > 0.9e-3 and dt.max() < 0.11
    with pytest.raises(ValueError, match="is a VAMBA already"):
        hv.init_vamba_from(made)
    hybrid = dataclasses.replace(transformer, config=dataclasses.replace(transformer.config, pattern="M*-"))
    with pytest.raises(ValueError, match=r"expected a Transformer.*'M\*-'"):
        hv.init_vamba_from(hybrid)


def test_the_stages_train_what_the_paper_trains():
    """Of the released model, by the packaged configs: what is new, then all of the decoder and the merger."""
    flat = expected_shapes(load_model_config("vamba_qwen2_vl_7b"), vamba)
    one, two = (config_files.read(f"train_vamba_stage{n}") for n in (1, 2))
    trained = set(split(flat, one.optimizer.frozen)[0])
    assert trained == {name for name in flat if name.startswith(("decoder/cross/", "decoder/mamba/"))}
    assert {"decoder/cross/alpha", "decoder/mamba/A_log"} < trained
    trained = set(split(flat, two.optimizer.frozen)[0])
    assert trained == {name for name in flat if name.startswith(("decoder/", "projector/", "embed"))}
    assert (one.convert.to, one.optimizer.rate, two.optimizer.rate) == ("vamba", 1e-5, 5e-6)
    for config in (one, two):
        assert config.reduction.mode == "none" and config.distill.kl == 0
        assert config.optimizer.warmup == pytest.approx(0.03 * config.steps, rel=0.01)


@pytest.mark.slow
def test_both_stages_of_the_embedded_model_by_one_command(tmp_path, monkeypatch, capsys):
    """A few steps of each packaged config, one after the other, from the Transformer's config with random weights."""
    from hybridvlm.models import nemotron_vl

    monkeypatch.chdir(tmp_path)
    config = load_model_config("tiny_transformer")
    params = jax.jit(lambda key: nemotron_vl.init(config, key))(jax.random.key(0))
    start = dataclasses.replace(micro_transformer(), config=config, params=params, name="tiny-transformer")
    save_folder(tmp_path / "runs" / "tiny-transformer", start)
    few = ["steps=2", "data.batch=1", "data.bank=8", "data.questions=3", "data.text=24", "optimizer.warmup=1"]
    names = ["train_tiny_vamba_stage1", "train_tiny_vamba_stage2"]
    assert main([*names, "--set", *few]) == 0, capsys.readouterr()
    made = hv.load(tmp_path / "runs" / "tiny-vamba" / "export")
    assert made.config.layers == config.count("*") == 16 and made.config.name == "tiny-vamba"
