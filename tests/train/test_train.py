"""Steps of training: answers under reduction, packing, accumulation, distillation, the gate, programs; and whole runs."""

import dataclasses
import functools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.train_micro import CONFIG, FRAMES, REDUCTION, TEXT, micro, settings

import hybridvlm as hv
from hybridvlm.checkpoints.folder import save_folder
from hybridvlm.config import to_dict
from hybridvlm.models.weights import flatten
from hybridvlm.reduction.plan_functions import layer_score_fn
from hybridvlm.train import loop
from hybridvlm.train.checkpoint import Checkpoints, OtherRun
from hybridvlm.train.distill import mixers, row_mask, shared_pass
from hybridvlm.train.features import visual
from hybridvlm.train.loss import answers, rank_loss
from hybridvlm.train.rows import Shape, packed, single, train_batch
from hybridvlm.train.sources import NeedleSource
from hybridvlm.train.step import Trainer
from hybridvlm.train.straight_through import straight_through

PER_FRAME = CONFIG.vision.tokens_per_frame


@pytest.fixture(scope="module")
def model():
    return micro()


@pytest.fixture(scope="module")
def source(model):
    return NeedleSource(settings(), model)


def rows(source, count, shape=None, first=0):
    shape = Shape(FRAMES, TEXT, 1, PER_FRAME) if shape is None else shape
    made = [single(source.sample(first + i), shape) for i in range(count)]
    return train_batch({name: np.stack([row[name] for row in made]) for name in made[0]}, source.model.family)


def plan_for(model, frames=FRAMES, text=TEXT, reduction=REDUCTION):
    return model.family.make_plan(model.config, reduction, frames, text, 4)


@functools.cache
def _forward(model, plan, segments=1):
    """Compiled: (params, batch, table) -> decoder output."""

    def run(params, batch, table):
        seen = visual(params, model, batch.visual, table)
        out, _ = model.family.decoder_output(
            params, model.config, batch.batch, seen, plan, question=batch.question, segments=segments, caches=False
        )
        return out

    return jax.jit(run)


# -- answers under reduction ------------------------------------------------------------------------------------------


def test_the_answer_has_no_say_in_what_is_kept(model, source):
    batch, plan = rows(source, 3), plan_for(model)
    ids = np.array(batch.batch.input_ids)
    ids[np.asarray(batch.batch.frame < 0) & ~np.asarray(batch.question) & np.asarray(batch.batch.segment > 0)] = 77
    other = dataclasses.replace(batch, batch=dataclasses.replace(batch.batch, input_ids=ids))
    asked = np.array(batch.batch.input_ids)
    asked[np.asarray(batch.question)] = 78
    question = dataclasses.replace(batch, batch=dataclasses.replace(batch.batch, input_ids=asked))
    kept = [_forward(model, plan)(model.params, b, source.table) for b in (batch, other, question)]
    last = [np.asarray(out.survivors[-1][0]) for out in kept]
    np.testing.assert_array_equal(last[0], last[1])
    assert (last[0] != last[2]).any()  # the question has
    assert (kept[0].kept[-1] == plan.keep(plan.layers - 1, PER_FRAME * FRAMES)).all()


def test_labels_are_found_after_reduction(model, source):
    batch, plan = rows(source, 3), plan_for(model)
    dense = _forward(model, None)(model.params, batch, source.table)
    reduced = _forward(model, plan)(model.params, batch, source.table)
    assert reduced.tokens.length < dense.tokens.length
    want = [row[row > 0] - 1 for row in np.asarray(batch.label)]
    for out in (dense, reduced):
        x, said = answers(out.tokens, jnp.asarray(batch.label), 4)
        assert said.shape == (3, 4) and x.shape == (3, 4, CONFIG.width)
        for row, words in zip(np.asarray(said), want, strict=True):
            assert row.tolist() == [*words, *[-1] * (4 - len(words))]
    # the place that says the first answer token holds the question's last word
    x, _ = answers(reduced.tokens, jnp.asarray(batch.label), 4)
    place = int(np.flatnonzero(np.asarray(batch.question[0]))[-1])
    at = int(np.flatnonzero(np.asarray(reduced.tokens.index[0]) == place)[0])
    np.testing.assert_array_equal(x[0, 0], reduced.tokens.x[0, at])


@pytest.mark.slow
def test_a_packed_row_gives_what_its_samples_give_alone(model, source):
    alone = rows(source, 2)
    shape = Shape(2 * FRAMES, 2 * TEXT, 2, PER_FRAME)
    a, b = source.sample(0), source.sample(1)
    row = {name: np.concatenate([a[name], b[name]]) for name in ("ids", "frame", "label", "question")}
    n = len(a["ids"])
    row = {
        name: np.concatenate([v, np.full(shape.length - 2 * n, -1 if name == "frame" else 0, v.dtype)])
        for name, v in row.items()
    }
    row["ids_segment_ids"] = np.asarray([1] * n + [2] * n + [0] * (shape.length - 2 * n))
    for name in ("visual_cells", "visual_time"):
        row[name] = np.concatenate([a[name], b[name]])
        row[name + "_segment_ids"] = np.asarray([1] * FRAMES + [2] * FRAMES)
    joined = packed(row, shape)
    both = train_batch({name: v[None] for name, v in joined.items()}, model.family)
    plan = plan_for(model)
    wide = plan_for(model, 2 * FRAMES, 2 * TEXT)
    one = _forward(model, plan)(model.params, alone, source.table)
    two = _forward(model, wide, 2)(model.params, both, source.table)
    assert (two.kept[-1] == one.kept[-1].T).all()
    x1, said1 = answers(one.tokens, jnp.asarray(alone.label), 2)
    x2, said2 = answers(two.tokens, jnp.asarray(both.label), 4)
    np.testing.assert_array_equal(said2.reshape(2, 2), said1)
    np.testing.assert_allclose(x2.reshape(x1.shape), x1, atol=1e-5 * float(jnp.abs(x1).max()))
    index1, index2 = (np.asarray(out.survivors[-1][0]) for out in (one, two))
    kept = [sorted(row[row >= 0]) for row in index1]
    assert sorted(index2[0][index2[0] >= 0]) == kept[0] + [n + i for i in kept[1]]


@pytest.mark.slow
def test_packed_rows_of_a_transformer_with_positions_and_planes():
    from helpers.qwen_golden import load

    from hybridvlm.inference.model import Model
    from hybridvlm.models import qwen_vl
    from hybridvlm.models.qwen_vl import geometry
    from hybridvlm.train.rows import arrange

    config, params, _ = load("qwen3_vl")
    model, rng = Model(config, params, family=qwen_vl), np.random.default_rng(0)
    planes = 1 + len(config.vision.deepstack)
    made = []
    for asked in ([7, 8], [9, 10, 11]):
        ids = np.asarray([5, *[91] * 4, 6, *[91] * 4, *asked], np.int32)
        frame = np.asarray([-1, *[0] * 4, -1, *[1] * 4, *[-1] * len(asked)], np.int32)
        row = arrange(ids, frame, np.asarray([12, 2], np.int32), geometry.rope_positions(frame, (2, 2), apart=True))
        made.append(row | {"visual_features": rng.normal(size=(2, 4, config.width * planes)).astype(np.float32)})
    one, two = Shape(2, 8, 1, 4), Shape(4, 16, 2, 4)
    alone = [single(row, one) for row in made]
    alone = train_batch({name: np.stack([row[name] for row in alone]) for name in alone[0]}, qwen_vl)
    n = [len(row["ids"]) for row in made]
    joined = {
        name: np.concatenate(
            [
                *(row[name] for row in made),
                np.zeros((two.length - sum(n), *made[0][name].shape[1:]), made[0][name].dtype),
            ]
        )
        for name in ("ids", "frame", "label", "question", "position")
    }
    joined["ids_segment_ids"] = np.asarray([1] * n[0] + [2] * n[1] + [0] * (two.length - sum(n)))
    joined["visual_features"] = np.concatenate([row["visual_features"] for row in made])
    joined["visual_features_segment_ids"] = np.asarray([1, 1, 2, 2])
    row = packed(joined, two)
    both = train_batch({name: a[None] for name, a in row.items()}, qwen_vl)
    for reduction in (None, REDUCTION):
        sums = []
        for shape, batch, segments in ((one, alone, 1), (two, both, 2)):
            data = {"features": "pixels", "frames": shape.frames, "text": shape.text, "segments": segments}
            trainer = Trainer(settings(data=data), model)
            plan = None if reduction is None else plan_for(model, shape.frames, shape.text, reduction)
            state, fixed = trainer.start(params)
            sums.append(trainer.program(plan)(state, fixed, batch)[1])
        np.testing.assert_allclose(sums[0]["entropy"], sums[1]["entropy"], rtol=1e-5)
        np.testing.assert_allclose(sums[0]["grad_norm"], sums[1]["grad_norm"], rtol=1e-4)
        assert (sums[0].get("kept", 0) == sums[1].get("kept", 0)).all() and sums[1].get("wrong", 0) == 0


# -- losses -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kl", [0.0, pytest.param(0.7, marks=pytest.mark.slow)])
def test_microbatches_add_up_to_the_big_batch(model, source, kl):
    config = settings(distill={"kl": kl, "temperature": 2.0}, optimizer={"accumulate": 2, "decay": 0.0})
    trainer, plan, batch = Trainer(config, model), plan_for(model), rows(source, 4)
    label = np.array(batch.label)
    label[0][label[0] == 3] = 0  # rows with one, two and two answer tokens: a mean of means would differ
    label[2] = 0
    batch = dataclasses.replace(batch, label=label)
    state, fixed = trainer.start(model.params, source.table)
    fresh = jax.tree.map(lambda a: jnp.array(a, copy=True), state)
    moved, split = trainer.program(plan)(state, fixed, batch)
    whole = Trainer(
        dataclasses.replace(trainer.config, optimizer=dataclasses.replace(trainer.config.optimizer, accumulate=1)),
        model,
    )
    other, joint = whole.program(plan)(fresh, fixed, batch)
    assert split["answers"] == joint["answers"] == 5
    for name in ("loss", "grad_norm", "entropy", "correct", "given"):
        np.testing.assert_allclose(split[name], joint[name], rtol=2e-5, atol=1e-6, err_msg=name)
    if kl:  # what is left of log probabilities of about -7
        np.testing.assert_allclose(split["kl"], joint["kl"], atol=2e-5)
        assert split["kl"] > 0
    # Adam's first moment after one step is a tenth of the clipped gradient
    for a, b in zip(jax.tree.leaves(moved.optimizer), jax.tree.leaves(other.optimizer), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-6 * max(1.0, float(jnp.abs(b).max())))
    assert split["wrong"] == 0
    np.testing.assert_array_equal(split["kept"], joint["kept"])


def test_rank_loss_is_what_its_words_say():
    rng = np.random.default_rng(0)
    mask = np.ones((2, 2, 7), bool)
    mask[1, 1, 4:] = False
    mask[0, 1] = False  # a question without a video
    scores = {0: rng.normal(size=(2, 2, 7)), 2: rng.random((2, 2, 7)), 4: rng.normal(size=(2, 2, 7))}
    total = weight = 0.0
    for b in range(2):
        for q in range(2):
            mine = mask[b, q]
            if mine.sum() < 2:
                continue
            target = scores[2][b, q, mine] / scores[2][b, q, mine].sum()
            sharp = 1 + (target * np.log(target)).sum() / np.log(mine.sum())
            s = scores[0][b, q, mine]
            z = (s - s.mean()) / (s.std() + 1e-6)
            total += sharp * -(target * (z - np.log(np.exp(z).sum()))).sum()
            weight += sharp
    got = rank_loss("M-*-M", {layer: jnp.asarray(s, jnp.float32) for layer, s in scores.items()}, jnp.asarray(mask))
    np.testing.assert_allclose(got, (total, weight), rtol=1e-5)  # layer 4 has no attention after it
    slope = jax.grad(lambda s: rank_loss("M*", {0: s, 1: jnp.asarray(scores[2], jnp.float32)}, jnp.asarray(mask))[0])
    found = np.asarray(slope(jnp.asarray(scores[0], jnp.float32)))
    assert np.isfinite(found).all() and np.abs(found[mask]).max() > 0 and not found[~mask].any()
    assert np.isfinite(slope(jnp.zeros((2, 2, 7)))).all()  # a layer that scores everything alike


@pytest.mark.slow
def test_many_questions_on_one_pass_score_as_each_alone(model, source):
    many = source.shared(3, 4)
    given = {name: jnp.asarray(a)[None] for name, a in many.items()}

    def seen(part):
        given = {name.removeprefix("visual_"): a for name, a in part.items()}
        return visual(model.params, model, given, source.table)

    shared = jax.jit(lambda p: shared_pass(model.family, p, CONFIG, given, seen(given)))
    for name in ("ids", "label", "question", "segment"):  # padding after a question, as another source may have it
        given[name] = jnp.pad(given[name], ((0, 0), (0, 0), (0, 2)))
    hidden, scores, mask = shared(model.params)
    assert np.isfinite(hidden).all()
    video = {name: np.repeat(many[name][None], 4, axis=0) for name in many if name.startswith("visual")}
    count = len(many["prefix"])
    made = []
    for q in range(4):
        n = int(many["segment"][q].sum())
        row = {
            "ids": np.concatenate([many["prefix"], many["ids"][q, :n]]),
            "frame": np.concatenate([many["prefix_frame"], np.full(n, -1, np.int32)]),
            "label": np.concatenate([np.zeros(count, np.int32), many["label"][q, :n]]),
            "question": np.concatenate([np.zeros(count, bool), many["question"][q, :n]]),
            **{name: video[name][q] for name in video},
        }
        made.append(single(row, Shape(FRAMES, TEXT, 1, PER_FRAME)))
    batch = train_batch({name: np.stack([row[name] for row in made]) for name in made[0]}, model.family)

    def alone(params):
        score = layer_score_fn(REDUCTION.score, 1, TEXT)
        out, _ = model.family.decoder_output(
            params, CONFIG, batch.batch, visual(params, model, batch.visual, source.table), None, question=batch.question,
            collect=mixers(CONFIG), score_fn=score, query_capacity=TEXT, caches=False,
        )  # fmt: skip
        return out

    out = jax.jit(alone)(model.params)
    for layer, score in scores.items():
        want = np.asarray(out.scores[layer])[:, :count]
        np.testing.assert_allclose(score[0], want, atol=2e-5 * np.abs(want).max(), err_msg=f"layer {layer}")
    assert (np.asarray(row_mask(batch.batch, 1))[:, 0, :count] == np.asarray(mask)[0]).all()
    x, said = answers(out.tokens, jnp.asarray(batch.label), 2)
    for q in range(4):
        at = np.flatnonzero(many["label"][q])
        np.testing.assert_allclose(hidden[q, at], x[q], atol=1e-4)
        assert (many["label"][q, at] - 1 == said[q]).all()


@pytest.mark.slow
def test_selection_has_no_gradient_unless_asked(model, source):
    batch, plan = rows(source, 2), plan_for(model)
    seen = visual(model.params, model, batch.visual, source.table)

    def loss(nudge, **options):
        def score(layer, aux, tokens):
            return layer_score_fn(REDUCTION.score, 1, TEXT)(layer, aux, tokens) + jnp.take_along_axis(
                nudge, jnp.maximum(tokens.index, 0), axis=1
            )

        out, _ = model.family.decoder_output(
            model.params,
            CONFIG,
            batch.batch,
            seen,
            plan,
            question=batch.question,
            score_fn=score,
            caches=False,
            **options,
        )
        return jnp.sum(answers(out.tokens, jnp.asarray(batch.label), 2)[0][..., 0]), out.tokens.index

    zero = jnp.zeros(batch.label.shape)
    through_fn = straight_through(0.5)
    plain, (gated, through) = (
        jax.jit(jax.grad(loss, has_aux=True))(zero),
        jax.jit(lambda n: jax.value_and_grad(functools.partial(loss, straight_through=through_fn), has_aux=True)(n))(
            zero
        ),
    )
    assert not np.asarray(plain[0]).any()
    through, held = np.asarray(through), np.asarray(gated[1])
    np.testing.assert_array_equal(held, plain[1])  # the forward pass is the same
    visible = np.asarray(batch.batch.frame >= 0)
    assert np.isfinite(through).all() and np.abs(through[visible]).max() > 0 and not through[~visible].any()


def test_the_gate_is_its_formula():
    from hybridvlm.ops.tokens import Tokens

    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 6, 3)), jnp.float32)
    place = jnp.arange(6)[None]
    segment = jnp.asarray([[1, 1, 1, 2, 2, 0]])
    seen = jnp.asarray([[True, True, True, True, False, False]])
    tokens = Tokens(x, place, segment, seen, ~seen, place, place)
    score = jnp.asarray([[0.3, -1.0, 0.9, 2.0, 5.0, 7.0]])

    def run(s):
        return straight_through(2.0)(tokens, s, jnp.asarray([[2, 1]])).x

    np.testing.assert_array_equal(run(score), x)
    pull = np.asarray(jax.grad(lambda s: run(s).sum())(score))[0]
    sigma = np.std([0.3, -1.0, 0.9]) + 1e-6
    g = 1 / (1 + np.exp(-(np.asarray([0.3, -1.0, 0.9]) - 0.3) / (2 * sigma)))
    want = np.asarray(x)[0, :3].sum(-1) * g * (1 - g) / (2 * sigma)
    np.testing.assert_allclose(pull[:3], want, rtol=1e-4)
    assert not pull[4:].any()


# -- whole runs -------------------------------------------------------------------------------------------------------


def losses(folder):
    return [
        (r["step"], r["loss"], r["grad_norm"])
        for r in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    ]


@pytest.fixture(scope="module")
def straight(tmp_path_factory, model, source):
    """A run of six steps without interruption: two budgets in turn by chance, an average, and a line every third step."""
    folder, told = tmp_path_factory.mktemp("straight"), []
    config = settings(folder / "run", **MIXED)
    run = loop.Run(config, model, told.append)
    run.source = source
    exported = loop.guarded(run)
    return run, exported, told


MIXED = {"reduction": {"mode": "random", "budgets": [0.5, 1.0]}, "optimizer": {"ema": 0.9}, "seed": 0}


def test_a_run_logs_exports_and_compiles_one_program_per_plan(straight, model):
    run, exported, told = straight
    records = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5, 6]
    assert len(run.trainer.programs) == len({r["kind"] for r in records}) == 2
    assert all(program._cache_size() == 1 for program in run.trainer.programs.values())
    for r in records:
        assert len(r["retention"]) == 4 and r["retention"][0] == 1.0
        assert {"rate", "tokens_per_s", "mfu", "waited", "memory_gib", "grad_norm"} <= set(r) and 0 <= r["waited"] <= 1
    plan = run.plans[0]
    want = [plan.keep(layer, PER_FRAME * FRAMES) / (PER_FRAME * FRAMES) for layer in range(4)]
    for record in records:
        np.testing.assert_allclose(record["retention"], want if record["kind"] == "str:0.5" else 1.0, atol=1e-4)
    assert any("waited" in line and "6/6" in line for line in told)
    again = hv.load(exported)
    assert again.reduction == dataclasses.replace(REDUCTION, budget=0.5) and again.config == model.config
    before, after = flatten(model.params), flatten(again.params)
    assert (np.asarray(before["vision/proj"]) == np.asarray(after["vision/proj"])).all()
    assert (np.asarray(before["decoder/mamba/in_proj"]) != np.asarray(after["decoder/mamba/in_proj"])).any()


@pytest.mark.slow
def test_a_run_that_was_told_to_stop_goes_on_bit_for_bit(straight, tmp_path, model):
    run = ready(tmp_path / "run", straight, model)
    held = run.batch

    def third(arrays, shared, calls=[]):  # noqa: B006
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return held(arrays, shared)

    run.batch = third
    with pytest.raises(loop.Stopped, match="after step 3 of 6"):
        loop.guarded(run)
    told = []
    again = ready(tmp_path / "run", straight, model, told.append)
    exported = loop.guarded(again)
    assert "going on after step 3" in told[0]
    assert losses(tmp_path / "run") == losses(straight[0].folder)
    for a, b in zip(*(jax.tree.leaves(hv.load(path).params) for path in (exported, straight[1])), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_folder_of_another_config_is_refused(straight, tmp_path, model):
    folder = straight[0].folder
    with pytest.raises(OtherRun, match=r"optimizer\.rate = 0\.001, this config says 0\.002"):
        loop.Run(settings(folder, **(MIXED | {"optimizer": {"ema": 0.9, "rate": 0.002}})), model)
    with pytest.raises(OtherRun, match="weights"):
        loop.Run(settings(folder, **MIXED), micro(seed=1))
    # what changes no number may differ
    loop.Run(settings(folder, **MIXED, logging={"every": 1}), model)


def ready(folder, straight, model, say=lambda text: None):
    """A run in `folder` with the programs of the straight one, which compile nothing again."""
    run = loop.Run(settings(folder, **MIXED), model, say)
    run.trainer.programs = dict(straight[0].trainer.programs)
    run.source = straight[0].source
    return run


@pytest.mark.slow
def test_a_loss_that_is_no_number_stops_the_run(straight, tmp_path, model):
    run = ready(tmp_path / "run", straight, model)
    for plan, program in run.trainer.programs.items():

        def broken(state, fixed, batch, program=program):
            state, metrics = program(state, fixed, batch)
            run.count = getattr(run, "count", 0) + 1
            return state, metrics | ({"loss": jnp.float32(jnp.nan)} if run.count == 4 else {})

        run.trainer.programs[plan] = broken
    with pytest.raises(FloatingPointError, match="nan at step 4"):
        loop.guarded(run)
    assert Checkpoints(run.folder, run.config.checkpoints).latest() == 2
    assert [step for step, *_ in losses(run.folder)] == [1, 2, 3]
    again = ready(tmp_path / "run", straight, model)
    loop.guarded(again)
    assert losses(again.folder) == losses(straight[0].folder)


@pytest.mark.slow
def test_a_full_disk_stops_the_run_and_keeps_the_last_checkpoint(straight, tmp_path, model, monkeypatch):
    import errno

    from orbax.checkpoint import CheckpointManager

    held = CheckpointManager.save

    def full(self, step, *args, **kwargs):
        if step == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        return held(self, step, *args, **kwargs)

    monkeypatch.setattr(CheckpointManager, "save", full)
    run = ready(tmp_path / "run", straight, model)
    with pytest.raises(loop.SaveFailed, match=r"No space left on device; the checkpoint of step 2 is whole"):
        loop.guarded(run)
    monkeypatch.undo()
    again = ready(tmp_path / "run", straight, model)
    loop.guarded(again)
    assert losses(again.folder) == losses(straight[0].folder)


def test_a_save_that_fails_in_the_background_is_heard_of_and_leaves_nothing(tmp_path):
    import resource

    from hybridvlm.train.step import State

    def state(count):
        return State({"a/b": jnp.asarray(np.random.default_rng(0).normal(size=count), jnp.float32)}, {}, {})

    kept, (soft, hard) = Checkpoints(tmp_path, settings().checkpoints), resource.getrlimit(resource.RLIMIT_FSIZE)
    kept.save_state(1, state(10), {})
    kept.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 17, hard))  # as a full disk, for large files alone
    try:
        kept.save_state(2, state(1 << 20), {})
        with pytest.raises(ValueError, match="File too large"):
            for _ in range(3000):
                kept.check()
                time.sleep(0.02)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert kept.whole() == 1
    kept.close()
    again = Checkpoints(tmp_path, settings().checkpoints)
    again.save_state(2, state(1 << 20), {})
    again.close()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["1", "2"]


def test_adapters_of_a_tower_need_its_pixels(model):
    config = settings(lora={"rank": 2, "targets": ["^vision/proj$"]})
    with pytest.raises(ValueError, match=r"needs a frozen tower; Lora.targets finds vision/proj"):
        Trainer(config, model).check(model.params)
    Trainer(dataclasses.replace(config, data=dataclasses.replace(config.data, features="pixels")), model).check(
        model.params
    )


@pytest.mark.slow
def test_lora_trains_the_factors_alone_and_is_merged_on_export(tmp_path, model):
    config = settings(
        tmp_path / "run", steps=2, reduction={"mode": "none"}, lora={"rank": 2, "targets": ["q_proj$", "out_proj$"]}
    )
    run = loop.Run(config, model, lambda text: None)
    exported = loop.guarded(run)
    before, after = flatten(model.params), flatten(hv.load(exported).params)
    changed = {path for path in before if (np.asarray(before[path]) != np.asarray(after[path])).any()}
    assert changed == {"decoder/attention/q_proj", "decoder/mamba/out_proj"}
    from hybridvlm.train import lora

    adapter, factors = lora.load(run.folder / "lora")
    merged = lora.merge(adapter, before, {name: jnp.asarray(a) for name, a in factors.items()})
    for path in changed:
        np.testing.assert_array_equal(merged[path], after[path])


# -- killed for real --------------------------------------------------------------------------------------------------


def start(config_file: pathlib.Path) -> subprocess.Popen:
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}
    # compiled once for all of these processes
    env |= {
        "JAX_COMPILATION_CACHE_DIR": str(config_file.parent / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, "-m", "hybridvlm.train", str(config_file)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def until(folder: pathlib.Path, steps: int, process: subprocess.Popen) -> None:
    """Wait until so many steps are logged."""
    for _ in range(45000):
        if process.poll() is not None:
            raise AssertionError(process.communicate()[0][-3000:])
        file = folder / "metrics.jsonl"
        if file.is_file() and len(file.read_text().splitlines()) >= steps:
            return
        time.sleep(0.02)
    raise AssertionError("no step was logged in 15 minutes")


@pytest.mark.slow
def test_killed_processes_lose_nothing(tmp_path, model):
    rng = np.random.default_rng()
    save_folder(tmp_path / "micro", model)
    changes = {"model": str(tmp_path / "micro"), "steps": 40, "checkpoints": {"every": 5}, "logging": {"every": 10}}
    files = {}
    for name in ("straight", "killed", "ended"):
        data = to_dict(settings(tmp_path / name, **changes))
        files[name] = tmp_path / f"{name}.json"
        files[name].write_text(json.dumps(data))
    whole = start(files["straight"])
    out, _ = whole.communicate(timeout=900)
    assert whole.returncode == 0, out[-3000:]

    killed = start(files["killed"])
    until(tmp_path / "killed", int(rng.integers(6, 30)), killed)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    again = start(files["killed"])
    out, _ = again.communicate(timeout=900)
    assert again.returncode == 0 and "going on after step" in out, out[-3000:]
    assert losses(tmp_path / "killed") == losses(tmp_path / "straight")

    ended = start(files["ended"])
    until(tmp_path / "ended", int(rng.integers(1, 30)), ended)
    ended.send_signal(signal.SIGTERM)
    out, _ = ended.communicate(timeout=900)
    assert ended.returncode == loop.STOPPED and "start it again" in out, out[-3000:]
    done = Checkpoints(tmp_path / "ended", settings().checkpoints).latest()
    assert done == len(losses(tmp_path / "ended"))  # not a step is lost
    again = start(files["ended"])
    out, _ = again.communicate(timeout=900)
    assert again.returncode == 0, out[-3000:]
    assert losses(tmp_path / "ended") == losses(tmp_path / "straight")
