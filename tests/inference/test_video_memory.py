"""Many questions on one video: after the layers that they share, each is what it would be in a prompt of its own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.compare import close_to_largest
from helpers.mesh_worker import CONFIGS, HYBRID, LOOKAHEAD, QWEN, REDUCED, clip, random_model

from hybridvlm import make_mesh
from hybridvlm.config import Buckets, Reduction, Schedule
from hybridvlm.inference.conversation import Conversation
from hybridvlm.inference.memories import HOST, VideoMemories, on_device
from hybridvlm.models.prompt import rest_length, rest_of
from hybridvlm.nn import decoder
from hybridvlm.ops.tokens import Tokens
from hybridvlm.reduction import make_plan, score_fn

# every kind of layer that a prefix may end with, what is scored there, and what may happen to tokens before
LATE = Schedule(floor=0.05, start=1)
CASES = {
    "mamba": ("hybrid", REDUCED),
    "attention": ("hybrid", Reduction("str", 0.6, schedule=LATE)),
    "lookahead": ("hybrid", LOOKAHEAD),
    "behind experts": ("hybrid", Reduction("str", 0.85, schedule=dataclasses.replace(LATE, start=4))),
    "last query": ("hybrid", Reduction("pyramiddrop", 0.6)),
    "after evs": ("hybrid", Reduction("evs:0.5+str:0.6")),
    "after averages": ("hybrid", Reduction("avgpool:0.5+str:0.6")),
    "text of the best frames": ("stamped", Reduction("str", 0.6, schedule=LATE, drop_text="best-frames")),
    "text, after evs": ("stamped", Reduction("evs:0.5+str:0.6", schedule=LATE, drop_text="best-frames")),
    "text of empty frames": ("stamped", Reduction("str", 0.4, schedule=LATE, drop_text="empty-frames")),
    "m-rope, text": ("qwen", Reduction("str", 0.6, schedule=LATE, drop_text="best-frames")),
    "m-rope": ("qwen", REDUCED),
    "m-rope, planes before": ("qwen", Reduction("str", 0.6, schedule=dataclasses.replace(LATE, start=2))),
    "m-rope, lookahead": ("qwen", LOOKAHEAD),
}
WORDS = ["red", "green", "blue", "a", "b", "c", "d", "e", "f"]


@pytest.fixture(scope="module", autouse=True)
def precise():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def models():
    found = {}

    def get(name):
        if name not in found:
            found[name] = dataclasses.replace(random_model(CONFIGS[name]), buckets=Buckets((8,), (16, 64), 4))
        return found[name]

    return get


def draw(model, reduction, seed, videos=2, each=2):
    """Other weights, videos of several lengths, and questions on each; the prompts together, and those of one question a video."""
    rng = np.random.default_rng(seed)
    params = jax.tree.map(
        lambda a: a * (1 + 0.1 * jnp.asarray(rng.normal(size=a.shape), a.dtype)) if a.ndim > 1 else a, model.params
    )
    model = dataclasses.replace(model, params=params)
    clips = [clip(int(n), int(rng.integers(1 << 30)), model.config) for n in rng.integers(4, 9, videos)]
    questions = [" ".join(rng.choice(WORDS, rng.integers(1, 7))) for _ in range(videos * each)]
    seconds = [c.seconds for c in clips for _ in range(each)]
    batch, plan = model.batch(questions, seconds, reduction)
    first, _ = model.batch(questions[::each], seconds[::each], reduction)
    pixels = model.family.pixels(model.config, clips, 8)
    visual = model.encode(pixels)
    return model, plan, batch, first, visual, jnp.repeat(visual, each, axis=0)


def check(models, name, seeds):
    kind, reduction = CASES[name]
    for seed in seeds:
        model, plan, batch, first, visual, repeated = draw(models(kind), reduction, seed)
        want = model.prefill(batch, repeated, plan)
        got = model.prefill(batch, model.build_video_memory(first, visual, plan), plan)
        np.testing.assert_array_equal(got.decoder.kept, want.decoder.kept)
        for mine, other in zip(got.decoder.survivors, want.decoder.survivors, strict=True):
            np.testing.assert_array_equal(np.where(mine[1], mine[0], -1), np.where(other[1], other[0], -1))
        close_to_largest(got.logits, want.logits, name=f"{name}, draw {seed}")
        shapes = lambda tree: jax.tree.map(lambda a: (a.shape, a.dtype), tree)  # noqa: E731
        assert shapes(got) == shapes(want)


@pytest.mark.slow
def test_questions_on_two_videos_are_those_of_prompts_of_their_own(models):
    check(models, "attention", range(8))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_hundred_draws(models, name):
    check(models, name, range(100, 120))


def test_a_follow_up_says_what_a_first_question_says_and_saves_the_shared_layers(models):
    model, video = models("hybrid"), clip(5, 3, HYBRID)
    reduction = CASES["attention"][1]
    talk = Conversation(model, video, reduction=reduction)
    talk.ask("where red ?", max_new=3)
    # the second is of a larger text bucket: its rows are longer than those that the first one left
    for question in ("a b ?", "red green blue a b c d e f a b c red ?"):
        further, fresh = talk.ask(question, max_new=3), model.ask(video, question, reduction=reduction, max_new=3)
        assert further.tokens == fresh.tokens and further.stages == fresh.stages
        np.testing.assert_array_equal(further.survivors, fresh.survivors)
        assert further.saved > 0 and fresh.saved == 0 and not further.continued


@pytest.mark.slow
def test_a_memory_goes_on_in_rows_of_any_text_bucket(models):
    """Prompts of longer and of shorter text than the one it was made with: nothing of them differs."""
    model, *_, visual, repeated = draw(models("hybrid"), CASES["attention"][1], 5)
    longer = dataclasses.replace(model, buckets=Buckets((8,), (64,), 4))
    for made, asked in ((model, longer), (longer, model)):
        own, own_plan = made.batch(["a b"] * 2, [tuple(map(float, range(8)))] * 2, CASES["attention"][1])
        memory = made.build_video_memory(own, visual, own_plan)
        batch, plan = asked.batch(["c d e", "a"] * 2, [tuple(map(float, range(8)))] * 4, CASES["attention"][1])
        got, want = asked.prefill(batch, memory, plan), asked.prefill(batch, repeated, plan)
        close_to_largest(got.logits, want.logits)
        np.testing.assert_array_equal(got.decoder.survivors[-1][0], want.decoder.survivors[-1][0])
        assert asked.generate(batch, memory, plan).peak_bytes >= memory.peak_bytes > 0


@pytest.mark.slow
def test_packed_rows_keep_what_questions_after_a_memory_keep():
    """Two samples in one row, run whole, against each by itself in two parts."""
    rng, samples, length = np.random.default_rng(2), [(2, 6, 4), (1, 5, 3)], 21
    params = random_model(HYBRID).params["decoder"]
    whole = row(rng, HYBRID.width, samples, length)
    plan = make_plan(Reduction("str", 0.6, schedule=LATE), HYBRID, visual_tokens=11, text_tokens=10, frames=1)
    packed = decoder.prefill(
        params, HYBRID, whole, plan=plan, score_fn=score_fn(plan, segments=2), segments=2, query_capacity=10
    )
    index, visual = (np.asarray(a[0]) for a in packed.survivors[-1])
    at = 0
    for number, (before, seen, after) in enumerate(samples, start=1):
        n = before + seen
        own = cut(whole, at, at + n + after)
        own = own.replace(segment=jnp.ones_like(own.segment), index=own.index - at, position=own.position - at)
        first, rest = cut(own, 0, n, plan.row_length(0)), cut(own, n, n + after)
        given = jnp.full((1, 1), seen, jnp.int32)
        prefix = decoder.run_prefix(params, HYBRID, first, plan.drops[0], given, jnp.full((1,), n, jnp.int32))
        out = decoder.prefill(
            params, HYBRID, rest, plan=plan, score_fn=score_fn(plan), prefix=prefix, query_capacity=10
        )
        alone = [int(i) for i, v in zip(*(a[0] for a in out.survivors[-1]), strict=True) if v]
        inside = visual & (index >= at) & (index < at + n + after)
        assert alone == [int(i) - at for i in index[inside]]
        close = np.asarray(packed.tokens.x[0])[np.asarray(packed.tokens.segment[0]) == number]
        close_to_largest(out.tokens.x[0, : len(close)], close)
        at += n + after


def cut(tokens, start, stop, length=None):
    """A stretch of rows, with padding up to a length."""
    spare = 0 if length is None else length - (stop - start)
    return jax.tree.map(lambda a: jnp.pad(a[:, start:stop], ((0, 0), (0, spare), *((0, 0),) * (a.ndim - 2))), tokens)


def row(rng, width, samples, length):
    segment, visual, query = (np.zeros((1, length), t) for t in (np.int32, bool, bool))
    at = 0
    for number, (before, seen, after) in enumerate(samples, start=1):
        segment[0, at : at + before + seen + after] = number
        visual[0, at + before : at + before + seen] = True
        query[0, at + before + seen : at + before + seen + after] = True
        at += before + seen + after
    index = np.arange(length, dtype=np.int32)[None]
    x = rng.normal(size=(1, length, width)).astype(np.float32) * (segment > 0)[..., None]
    return Tokens(
        *map(jnp.asarray, (x, index, segment, visual, query, index, np.where(visual, 0, -1).astype(np.int32)))
    )


# -- what is refused, and what is held


def test_a_memory_that_would_serve_no_other_question_is_refused(models):
    model, video = models("hybrid"), clip(4, 0, HYBRID)
    batch, plan = model.batch(["a"], [video.seconds], Reduction("uniform", 0.6))
    assert not model.shares_video(batch, plan) and not model.shares_video(batch, None)
    with pytest.raises(ValueError, match="'uniform' drops nothing inside the decoder by the question"):
        jax.eval_shape(lambda p: model.family.build_video_memory(p, HYBRID, batch, None, plan), model.params)
    _, everything = model.batch(["a"], [video.seconds], Reduction("str", 1.0))
    assert not everything.depends_on_query and not model.shares_video(batch, everything)


def test_a_prefix_ends_where_the_plan_drops_first(models):
    params, rng = models("hybrid").params["decoder"], np.random.default_rng(0)
    tokens = row(rng, HYBRID.width, [(1, 6, 2)], 12)
    plan = make_plan(Reduction("str", 0.6, schedule=LATE), HYBRID, visual_tokens=6, text_tokens=6, frames=1)
    given, following = jnp.full((1, 1), 6, jnp.int32), jnp.full((1,), 7, jnp.int32)

    def two(last, rows=1, **options):
        prefix = decoder.run_prefix(params, HYBRID, tokens, last, given, following)
        rest = jax.tree.map(lambda a: jnp.repeat(a[:, 7:9], rows, axis=0), tokens)
        return decoder.prefill(params, HYBRID, rest, prefix=prefix, **options)

    scores = {"plan": plan, "score_fn": score_fn(plan)}
    for options, text in (
        ({"last": 0} | scores, r"ends with layer 0, and must where the plan drops first, got drops after \(1, 4\)"),
        ({"last": 1}, "got no plan"),
        ({"last": 1, "collect": (4,)} | scores, "need prompts that are run whole"),
    ):
        with pytest.raises(ValueError, match=text):
            jax.eval_shape(lambda options=options: two(**options))


def test_questions_are_as_many_for_each_video(models):
    model, plan, batch, first, visual, _ = draw(models("hybrid"), CASES["attention"][1], 0)
    three = jax.tree.map(lambda a: a[:3], batch)
    with pytest.raises(ValueError, match="as many questions for each of the memory's 2 videos, got 3 rows"):
        model.prefill(three, model.build_video_memory(first, visual, plan), plan)


def test_no_question_reads_a_row_that_only_fills_a_mesh_up(models):
    model, plan, batch, first, visual, _ = draw(models("hybrid"), CASES["attention"][1], 0)
    memory = model.build_video_memory(first, visual, plan)
    assert memory.videos == memory.rows == 2
    # as of one video on a mesh that cuts a batch in two
    one = dataclasses.replace(memory, videos=1)
    two = jax.tree.map(lambda a: a[:2], batch)
    with pytest.raises(ValueError, match="2 questions, and the memory is of 1 videos in the 2 rows"):
        model.prefill(two, one, plan)
    alone = model.prefill(jax.tree.map(lambda a: a[:1], batch), one, plan)
    close_to_largest(alone.logits[:1], model.prefill(batch, memory, plan).logits[:1])


def test_every_prompt_goes_on_with_text_behind_its_video(models):
    model, plan, batch, first, visual, _ = draw(models("hybrid"), CASES["attention"][1], 0)
    segment = np.asarray(batch.segment).copy()
    segment[0, np.flatnonzero(batch.frame[0] >= 0)[-1] + 1 :] = 0
    with pytest.raises(ValueError, match="no text behind its video"):
        model.prefill(dataclasses.replace(batch, segment=segment), model.build_video_memory(first, visual, plan), plan)


def test_the_text_behind_a_video_is_cut_off_its_prompt(models):
    model = models("qwen")
    video = clip(4, 0, QWEN)
    batch, _ = model.batch(["a b c", "a"], [video.seconds] * 2, None)
    n = rest_length(batch)
    rest = rest_of(batch, n + 2)
    for row_index in range(2):
        end = int(np.flatnonzero(batch.frame[row_index] >= 0)[-1]) + 1
        real = int(batch.segment[row_index].sum())
        for name in ("input_ids", "position", "segment"):
            own = getattr(rest, name)[row_index]
            np.testing.assert_array_equal(own[: real - end], getattr(batch, name)[row_index, end:real])
            assert not own[real - end :].any()
    assert (rest.frame == -1).all() and rest.position.shape == (2, n + 2, 3)
    with pytest.raises(ValueError, match=f"expected at least {n}"):
        rest_of(batch, n - 1)
    # beside a prompt without any, too
    bare = np.where(np.arange(len(batch.segment))[:, None] == 0, batch.segment, batch.segment * (batch.frame >= 0))
    with pytest.raises(ValueError, match=f"expected at least {n}"):
        rest_of(dataclasses.replace(batch, segment=bare), n - 1)
    seen = np.arange(batch.frame.shape[1]) <= np.flatnonzero(batch.frame[0] >= 0)[-1]
    assert rest_length(dataclasses.replace(batch, segment=batch.segment * seen)) == 0


def test_memories_move_to_the_host_and_come_back():
    made = []

    def make():
        made.append(0)
        return {"x": jnp.arange(6.0), "n": jnp.zeros((), jnp.int32)}

    held = VideoMemories(count=2, device_bytes=0)
    first, found = held.get("a", make)
    assert not found and on_device(first) == 28
    held.spill()
    (spilled, _), *_ = held._held.values()
    assert all(leaf.sharding.memory_kind == HOST for leaf in jax.tree.leaves(spilled)) and on_device(spilled) == 0
    back, found = held.get("a", make)
    assert found and len(made) == 1 and back["x"].sharding == first["x"].sharding
    np.testing.assert_array_equal(back["x"], np.arange(6.0))
    held.get("b", make), held.get("c", make)
    assert len(held) == 2 and not held.get("a", make)[1]
    room = VideoMemories(count=2, device_bytes=100)
    kept, _ = room.get("a", make)
    room.spill()
    assert room.get("a", make)[0]["x"] is kept["x"] or on_device(room.get("a", make)[0]) == 28


@pytest.mark.slow
def test_on_a_mesh_memories_are_held_where_its_devices_are(models):
    model = models("hybrid").to_mesh(make_mesh(devices=jax.devices()[:1]))
    video, reduction = clip(5, 3, HYBRID), CASES["attention"][1]
    talk = Conversation(model, video, reduction=reduction)
    talk._memories = VideoMemories(device_bytes=0)
    talk.ask("where red ?", max_new=3)
    further, fresh = talk.ask("a b ?", max_new=3), model.ask(video, "a b ?", reduction=reduction, max_new=3)
    assert further.tokens == fresh.tokens and further.saved > 0
