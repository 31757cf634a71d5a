"""The embedded model: its start, its shared passes, its training that resumes, its control, and the packaged checkpoints."""

import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybridvlm.analyze.deletion import separate
from hybridvlm.ask import main as ask
from hybridvlm.config_files import load_model_config
from hybridvlm.eval.__main__ import main as evaluate
from hybridvlm.inference.model import load
from hybridvlm.tiny import codes, needle, train
from hybridvlm.tiny.bank import draw, draw_videos, make_bank
from hybridvlm.tiny.export import export
from hybridvlm.tiny.resume import Saved
from hybridvlm.tiny.setup import initial_params
from hybridvlm.tiny.shared import arrays
from hybridvlm.tiny.tower import initial_tower


@pytest.fixture(scope="module")
def small():
    """The embedded model's own layers, fewer of them, untrained."""
    config = dataclasses.replace(codes.config(), pattern="M-*MM*M")
    params = initial_params(config, initial_tower(config))
    return config, params, make_bank(params, config, frames=4, n=20, seed=0, split="val")


def sample_of(bank, videos=2, questions=6, seed=0):
    return arrays(draw(bank, 4, videos, questions, needle.TYPES, np.random.default_rng(seed)))


def test_directions_are_orthonormal_and_words_lie_behind_the_rotation():
    width = codes.config().width
    c = codes.codes(width)
    basis = np.concatenate([c[name] for name in codes.SIZES])
    np.testing.assert_allclose(basis @ basis.T, np.eye(len(basis)), atol=1e-5)
    np.testing.assert_allclose(c["R"] @ c["R"].T, np.eye(width), atol=1e-5)
    word, visual = codes.projections(width, 64, seed=3)
    query = (c["colour"][3] + codes.time_code(width)[12]) @ c["R"].T @ word
    items = c["colour"][:, None] + codes.time_code(width)[None]
    assert np.unravel_index(np.argmax(items @ visual @ query), (16, 64)) == (3, 12)


@pytest.mark.slow
def test_transformer_twin_starts_as_the_hybrid_does():
    hybrid, twin = codes.config(), load_model_config("tiny_transformer")
    assert twin.pattern == hybrid.pattern.replace("M", "*")
    assert codes.look_ups(twin) == codes.look_ups(hybrid) == (2, 10)
    params = {c.name: initial_params(c, initial_tower(c)) for c in (hybrid, twin)}
    sizes = [sum(a.size for a in jax.tree.leaves(p["decoder"])) for p in params.values()]
    assert abs(sizes[1] / sizes[0] - 1) < 0.02
    start, rng = params["tiny_transformer"], np.random.default_rng(0)
    words, c = np.asarray(start["embed"])[rng.integers(start["embed"].shape[0], size=40)], codes.codes(twin.width)
    pictures = sum(c[name][rng.integers(len(c[name]), size=40)] for name in codes.SIZES)

    def cosines(layer, head, queries, keys):
        part = slice(head * twin.head_dim, (head + 1) * twin.head_dim)
        q, k = (
            x @ np.asarray(start["decoder"]["attention"][name][layer, :, part])
            for x, name in ((queries, "q_proj"), (keys, "k_proj"))
        )
        return q @ k.T / np.linalg.norm(q, axis=1)[:, None] / np.linalg.norm(k, axis=1)

    first, look = 0, twin.kind_index(2)[1]
    assert cosines(first, 0, words, words).min() > 0.9
    assert cosines(first, 0, words, pictures).max() < 0.6
    item = 3.0 * (c["colour"][[5]] + codes.time_code(twin.width)[[12]])
    asked = item @ c["R"].T
    assert cosines(look, 0, asked, item) > 0.9


@pytest.mark.slow
def test_the_loss_moves_what_it_should(small):
    config, params, bank = small
    sample = sample_of(bank)
    loss, grads = jax.jit(jax.value_and_grad(lambda p: train.task_loss(p, config, bank.tokens, sample)[0]))(params)
    assert np.isfinite(loss)
    chex.assert_tree_all_finite(grads)
    assert float(jnp.abs(grads["decoder"]["mamba"]["in_proj"]).max()) > 0


@pytest.mark.slow
def test_the_optimizer_leaves_tower_and_connector_alone_and_decays_projections_only(small):
    _, params, _ = small
    optimizer = train.make_optimizer(0.1)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    moved = {jax.tree_util.keystr(path) for path, u in jax.tree_util.tree_leaves_with_path(updates) if jnp.any(u != 0)}
    assert moved and all(name.endswith("_proj']") for name in moved)
    assert not any("vision" in name or "projector" in name for name in moved)


@pytest.mark.slow
def test_a_training_that_is_stopped_goes_on_to_the_same_numbers(small, tmp_path):
    config, params, bank = small
    stage = train.Stage("short", 4, 2, 6, 6, 1e-3, 0.1)

    def run(folder, stop=None):
        saved = Saved(folder, "a recipe", every=2)
        start, at, state = saved.restore(params, lambda p, _: train.stage_optimizer(stage).init(p))

        def keep(step, p, s):
            saved.save(step, p, s)
            if step == stop:
                saved.wait()
                raise KeyboardInterrupt

        at = jax.tree.map(jnp.array, at)  # the training step donates its arguments
        return train.train_stage(at, config, stage, 0, bank=bank, start=start or 0, state=state, on_step=keep)

    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", stop=4)
    with pytest.raises(ValueError, match="another seed, recipe or start"):
        Saved(tmp_path / "cut", "another recipe")
    again = run(tmp_path / "cut")
    chex.assert_trees_all_equal(whole, again)


@pytest.mark.slow
def test_separate_questions_need_no_token_twice(small):
    _, _, bank = small
    _, asked = draw_videos(bank, 4, 3, 40, needle.TYPES, np.random.default_rng(0))
    for q in asked:
        chosen = separate(q.hop1, q.hop2)
        needed = [t for pair in zip(q.hop1[chosen], q.hop2[chosen], strict=True) for t in pair if t >= 0]
        assert len(needed) == len(set(needed)) and chosen.any()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny-reduced", "tiny", "tiny-vamba"])
def test_packaged_checkpoints_answer(name):
    model = load(name)
    assert sum(a.size for a in jax.tree.leaves(model.params)) < (4_500_000 if name == "tiny-vamba" else 3_000_000)
    assert len(model.config.pattern) >= 24
    video, questions = needle.split_questions("val", videos=1, per_video=28)[0]
    seconds = [[float(t) for t in range(video.frames)]] * 4
    visual = jnp.repeat(model.encode(needle.render_video(video)[None]), 4, axis=0)
    for reduction, least in ((None, 25), (codes.reduction(), 22))[: 2 if name == "tiny-reduced" else 1]:
        right = 0
        for at in range(0, 28, 4):
            batch, plan = model.batch(questions.texts()[at : at + 4], seconds, reduction)
            answer = model.generate(batch, visual, plan)
            model.verify(answer)
            right += sum(a == b for a, b in zip(answer.text, questions.answers()[at : at + 4], strict=True))
        assert right >= least


@pytest.mark.slow
def test_the_packaged_vamba_is_evaluated_and_asked(tmp_path, capsys):
    """Through the commands: dense it knows nearly all, by cross-attention most of that, and chance is far below."""
    options = ["--model", "tiny-vamba", "--split", "val", "--limit", "28", "--methods", "none,str-attention,random"]
    assert evaluate([*options, "--output", str(tmp_path / "results")]) == 0
    rows = json.loads((tmp_path / "results" / "results.json").read_text())["rows"]
    dense, scored, drawn = (row["accuracy"] for row in rows)
    assert dense > 0.9 and dense > scored > drawn + 0.1
    export(tmp_path, split="val", limit=1)
    asked = json.loads((tmp_path / "questions.jsonl").read_text())
    capsys.readouterr()
    code = ask([str(tmp_path / asked["video"]), asked["question"], "--model", "tiny-vamba"])
    assert code == 0 and asked["answer"] in capsys.readouterr().out
