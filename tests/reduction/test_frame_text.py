"""Plans that drop the text of frames' own: what a layout marks, room in rows, laws, and what is refused."""

import dataclasses

import jax
import numpy as np
import pytest
from helpers.compare import close_to_largest
from helpers.mesh_worker import CONFIGS, clip, random_model
from helpers.plans import model as hybrid

import hybridvlm.ask
from hybridvlm.config import Buckets, Reduction, Schedule
from hybridvlm.models.prompt import own_text
from hybridvlm.reduction import BudgetError, make_plan

BEST, EMPTY = "best-frames", "empty-frames"
RULES = (BEST, EMPTY)
LATE, EARLY = Schedule(floor=0.02, start=1), Schedule(floor=0.02)


@pytest.fixture(scope="module")
def models():
    found = {}

    def get(name):
        if name not in found:
            found[name] = dataclasses.replace(random_model(CONFIGS[name]), buckets=Buckets((4, 8), (16, 64), 4))
        return found[name]

    with jax.default_matmul_precision("highest"):
        yield get


def own_of(layout):
    """The numbers of tokens of frames' own by frame."""
    marked = layout.frame[layout.frame < -1]
    return {int(f): int((own_text(marked) == f).sum()) for f in np.unique(own_text(marked))}


# -- what a layout marks


def test_what_stands_around_a_frame_is_its_own_and_what_is_behind_the_last_never(models):
    """ "a 1 b" before a frame, "c" behind it, "d" from one to the next."""
    layout = models("stamped").layout("red", (0.0, 1.0, 2.0))
    assert own_of(layout) == {0: 4, 1: 5, 2: 4}
    last = int(np.flatnonzero(layout.frame >= 0)[-1])
    assert (layout.frame[last + 1 :] == -1).all() and layout.frame[0] == -1
    assert layout.frame_text == 5 and layout.other_text == layout.text - 13
    assert own_of(models("hybrid").layout("red", (0.0, 1.0))) == {}


def test_a_time_between_two_frames_is_the_laters_own(models):
    """Of Qwen3-VL, whose first time is one text with what stands before the video; an image has none."""
    qwen = models("qwen")
    layout = qwen.layout("red", tuple(map(float, range(6))))
    own = own_of(layout)
    assert set(own) == {1, 2} and len(set(own.values())) == 1
    assert all(layout.frame[i] == -1 for i in range(int(np.flatnonzero(layout.frame >= 0)[0])))


# -- room in rows


def plan(drop_text, method="str", budget=0.25, *, frames=16, m=16, text=160, size=8, config=None, **changes):
    reduction = Reduction(method, budget, drop_text=drop_text, **changes)
    sizes = {"visual_tokens": frames * m, "text_tokens": text, "frames": frames, "frame_text": size}
    return make_plan(reduction, config or hybrid(), **sizes)


@pytest.mark.parametrize("method", ["str", "evs:0.5+str:0.5", "evs", "frames:0.5+str:0.5", "pyramiddrop"])
@pytest.mark.parametrize("rule", RULES)
def test_rows_have_room_for_whatever_a_prompt_of_the_bucket_keeps(rule, method):
    """Prompts of any number of frames, with any text of their own that the bucket takes, of which the longest stay."""
    p, rng = plan(rule, method), np.random.default_rng(0)
    for _ in range(300):
        frames = int(rng.integers(1, 17))
        own = np.sort(rng.integers(0, 9, frames))[::-1]
        other = int(rng.integers(1, 160 - 16 * 8 + 1))
        for layer in range(p.layers):
            kept = p.keep(layer, frames * 16)
            # some tokens of a frame are needed for it to keep its text; of whole frames all are
            possible = min(kept, frames) if not method.startswith("frames") else p.keep(0, frames * 16) // 16
            dropped = p.drops_input or layer > p.drops[0]
            most = min(possible, int(p.most_frames(kept))) if dropped else frames
            assert kept + other + own[:most].sum() <= p.row_length(layer)


def test_what_a_bound_of_empty_frames_saves_and_what_the_best_frames_do():
    none, empty, best = (plan(rule) for rule in ("none", EMPTY, BEST))
    assert none.most_frames(5) is None and empty.most_frames(5) == 5 and best.most_frames(17) == 2
    # more tokens stay than there are frames, so that each might keep one: nothing can be promised
    assert empty.capacities[-1] >= 16 and empty.text_left(empty.layers - 1) == 160
    last = best.layers - 1
    assert best.text_left(0) == 160 and best.text_left(last) == 160 - 8 * (16 - -(-best.capacities[last] // 16))
    assert best.flop_speedup > none.flop_speedup == empty.flop_speedup
    assert best.cost.kv_bytes < none.cost.kv_bytes and best.dense_cost == none.dense_cost
    few = plan(EMPTY, budget=0.1, schedule=Schedule(floor=0.01), m=4, text=160)
    assert few.capacities[-1] < 16 and few.text_left(few.layers - 1) == 160 - 8 * (16 - few.capacities[-1])
    # whole frames: those that are left out lose their text before layer 0
    whole = plan(EMPTY, "frames")
    assert whole.text_left(0) == 160 - 8 * 12


def test_a_budget_of_operations_counts_the_text_that_is_left():
    met = plan(BEST, budget=0.5, kind="flops")
    assert met.flop_ratio == pytest.approx(0.5, abs=0.01)
    assert met.retention_mean > plan("none", budget=0.5, kind="flops").retention_mean
    again = type(met).from_dict(met.to_dict())
    assert again == met and again.row_length(20) == met.row_length(20)
    assert met.prefix_key != plan("none", budget=0.5, kind="flops").prefix_key
    assert f"16 x 8 are frames' own (drop_text {BEST})" in met.explain()


# -- laws


def stages_by_hand(p, out, row, layout):
    """Positions in the prompt that stay after every drop of one example, by the scores of the run and the rule written as loops."""
    frame = layout.frame
    alive = list(range(len(frame)))
    given = int((frame >= 0).sum())
    for number, layer in enumerate(p.drops):
        score = dict(zip(alive, np.asarray(out.decoder.scores[layer][row]), strict=False))
        seen = sorted((i for i in alive if frame[i] >= 0), key=lambda i: (-score[i], i))[: p.keep(layer + 1, given)]
        best = {}
        for i in seen:
            best[frame[i]] = max(score[i], best.get(frame[i], -np.inf))
        having = {own_text(frame[i]) for i in alive if frame[i] < -1}
        ranked = sorted((f for f in best if f in having), key=lambda f: (-best[f], f))
        with_text = ranked[: p.most_frames(len(seen))]
        alive = sorted(
            seen + [i for i in alive if frame[i] == -1 or (frame[i] < -1 and own_text(frame[i]) in with_text)]
        )
        index, visual = (np.asarray(a[row]) for a in out.decoder.survivors[number])
        yield alive, index, visual


def check(models, name, rule, method="str", budget=0.4, buckets=True):
    model = models(name)
    schedule = LATE if name == "stamped" else EARLY  # Qwen's first site is later
    reduction = Reduction(method, budget, schedule=schedule, drop_text=rule)
    clips = [clip(n, n, model.config) for n in (8, 5)]
    questions = ["red a b", "c"]
    batch, p = model.batch(questions, [c.seconds for c in clips], reduction)
    visual = model.encode(model.family.pixels(model.config, clips, 8))
    out = model.prefill(batch, visual, p, return_scores=True)
    fewer = 0
    for row, (question, video) in enumerate(zip(questions, clips, strict=True)):
        layout = model.layout(question, video.seconds)
        for alive, index, _ in stages_by_hand(p, out, row, layout):
            assert index[index >= 0].tolist() == alive
        fewer += len(layout.ids) - int((layout.frame >= 0).sum()) - sum(layout.frame[i] < 0 for i in alive)
        # alone, in the smallest bucket that holds it
        own, alone_plan = model.batch([question], [video.seconds], reduction)
        alone = model.prefill(own, visual[row : row + 1], alone_plan)
        close_to_largest(alone.logits[0], out.logits[row])
        if not buckets:
            break
        short = dataclasses.replace(model, buckets=Buckets((5, 8), (48,), 4))
        own, short_plan = short.batch([question], [video.seconds], reduction)
        close_to_largest(
            short.prefill(own, visual[row : row + 1, : short_plan.frames], short_plan).logits[0], out.logits[row]
        )
    assert fewer > 0
    return model, p, batch, visual, out


@pytest.mark.slow
def test_an_example_loses_the_same_text_by_hand_in_a_batch_and_in_any_bucket(models):
    model, p, batch, visual, out = check(models, "stamped", BEST, buckets=False)
    # a reply goes on where the unreduced prompt ends
    generation = model.generate(batch, visual, p)
    model.verify(generation)
    np.testing.assert_array_equal(np.argmax(out.logits, -1), [tokens[0] for tokens in generation.tokens])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "rule", "method"), [
    ("stamped", BEST, "str"), ("stamped", EMPTY, "str"), ("qwen", BEST, "str"), ("qwen", EMPTY, "str"),
    ("stamped", BEST, "pyramiddrop"),
    ("stamped", BEST, "random"), ("qwen", BEST, "str-lookahead"),
])  # fmt: skip
def test_it_does_under_every_rule_and_family(models, name, rule, method):
    check(models, name, rule, method, 0.7 if method == "pyramiddrop" else 0.4)


@pytest.mark.slow
def test_the_next_token_of_a_reply_is_that_of_a_longer_prompt(models):
    """Decoding behind the caches, against a prompt that has the first token of the reply in it already; positions and states agree."""
    for name in ("stamped", "qwen"):
        model = models(name)
        video, reduction = clip(8, 1, model.config), Reduction("uniform", 0.6, schedule=EARLY, drop_text=BEST)
        visual = model.encode(model.family.pixels(model.config, [video], 8))
        batch, p = model.batch(["a b"], [video.seconds], reduction)
        prefilled = model.prefill(batch, visual, p)
        token = np.argmax(prefilled.logits, -1).astype(np.int32)[:, None]
        ids, real = np.pad(token, ((0, 0), (0, 3))), np.asarray([[1, 0, 0, 0]], np.int32)
        further, _ = model.extend(ids, real, prefilled.decoder.caches)
        n = int(batch.segment[0].sum())
        longer = {name: np.array(getattr(batch, name)) for name in ("input_ids", "segment")}
        longer["input_ids"][0, n], longer["segment"][0, n] = token[0, 0], 1
        if name == "qwen":
            longer["position"] = np.array(batch.position)
            longer["position"][0, n] = batch.position[0, n - 1] + 1
        # `uniform` keeps the same tokens whatever the text behind them
        close_to_largest(model.prefill(dataclasses.replace(batch, **longer), visual, p).logits, further)


# -- what is refused


def test_what_cannot_drop_text_says_so(models, capsys):
    with pytest.raises(ValueError, match=r"drop_text='best-frames' drops .* prompt has none between its frames"):
        models("hybrid").plan(Reduction("str", 0.5, drop_text=BEST), 8, 64)
    with pytest.raises(ValueError, match="text of a VAMBA is a stream of its own"):
        models("vamba").plan(Reduction("str-attention", 0.6, drop_text=BEST), 8, 64)
    with pytest.raises(
        BudgetError, match="8 frames with up to 5 text tokens of their own do not fit a text bucket of 16"
    ):
        models("stamped").plan(Reduction("str", 0.5, drop_text=BEST), 8, 16)
    with pytest.raises(BudgetError, match=r"avgpool: .* goes with methods that drop, and this one merges"):
        plan(BEST, "avgpool")
    with pytest.raises(
        ValueError, match=r"drop_text must be one of \('none', 'empty-frames', 'best-frames'\), got 'all'"
    ):
        Reduction("str", drop_text="all")
    assert hybridvlm.ask.main(["x.mp4", "what?", "--drop-text", BEST]) == 2
    assert "--drop-text go with --reduction" in capsys.readouterr().err


def test_a_prompt_that_a_plan_has_no_room_for_is_refused_before_anything_runs(models):
    """A plan of another style, and one of a text bucket that the prompt fills with other text."""
    model, video = models("stamped"), clip(8, 1, models("stamped").config)
    reduction = Reduction("str", 0.5, drop_text=BEST)
    visual = np.zeros((1, 8, 4, 32), np.float32)
    batch, p = model.batch(["a"], [video.seconds], reduction)
    with pytest.raises(ValueError, match="a frame has 5 text tokens of its own, and the plan counts with at most 4"):
        model.prefill(batch, visual, dataclasses.replace(p, frame_text=4))
    long, _ = model.batch(["a " * 22], [video.seconds], None)
    with pytest.raises(
        ValueError, match=r"text tokens beside those of 8 frames with up to 5 each are over the text bucket of 64"
    ):
        model.generate(long, visual, p)
    # with the reduction named the bucket is chosen for it
    with pytest.raises(ValueError, match="text"):
        model.batch(["a " * 22], [video.seconds], reduction)
    wide = dataclasses.replace(model, buckets=Buckets((8,), (64, 80), 4))
    assert wide.batch(["a " * 22], [video.seconds], reduction)[1].text_tokens == 80
    assert wide.batch(["a " * 22], [video.seconds], None)[0].input_ids.shape[1] == 8 * 4 + 64
