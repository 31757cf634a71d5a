"""Buckets, programs, sampling and batches of the model that people hold."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybridvlm.config import Buckets, ModelConfig, Reduction, VisionConfig
from hybridvlm.inference.model import Model
from hybridvlm.inference.program_cache import compile_count
from hybridvlm.inference.sampling import Sampling, sample_token
from hybridvlm.models.nemotron_vl.model import Batch, HybridVLM
from hybridvlm.models.prompt import PromptStyle

VISION = VisionConfig(
    kind="stem", image_size=(8, 8), patch_size=4, width=16, downsample=1, max_frames=8, stem_channels=(4,)
)
CONFIG = ModelConfig(
    pattern="M*-M*",
    width=24,
    vocab_size=40,
    mamba_heads=2,
    mamba_head_dim=8,
    ssm_groups=1,
    ssm_state=6,
    attention_heads=2,
    kv_heads=1,
    head_dim=8,
    mlp_width=32,
    vision=VISION,
)
QUESTIONS = ["one two three", "one two three four five"]
SECONDS = [[0.0, 1.0, 2.0, 3.0], [0.0, 1.0]]


class Letters:
    """A stand-in tokenizer: a word is its length."""

    def encode(self, text):
        return [len(word) for word in text.split()]

    def decode(self, ids):
        return " ".join(str(i) for i in ids)


@pytest.fixture(scope="module")
def model():
    one = jnp.ones((1, 1), jnp.int32)
    pixels = jnp.zeros((1, 1, 8, 8, 3), jnp.uint8)
    params = jax.jit(HybridVLM(CONFIG).init)(jax.random.key(0), Batch(one, one, -one, one[0]), pixels)["params"]
    params["lm_head"] = 4 * params["lm_head"]  # far from uniform, so that greedy and sampled answers differ
    return Model(CONFIG, params, Letters(), buckets=Buckets(frames=(2, 4, 8), text=(8,), max_new=6))


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(0).integers(0, 256, (2, 4, 8, 8, 3)).astype(np.uint8)


REDUCTIONS = (None, Reduction("str", 0.5), Reduction("avgpool", 0.25), Reduction("evs", 0.5))
SAMPLINGS = (Sampling(), Sampling(temperature=1.5, top_p=0.9))


@pytest.mark.parametrize(
    ("reduction", "sampling"),
    [
        pytest.param(r, s, marks=() if (i, j) == (1, 1) else pytest.mark.slow)
        for i, r in enumerate(REDUCTIONS)
        for j, s in enumerate(SAMPLINGS)
    ],
)
def test_each_gets_in_a_batch_what_it_gets_alone(model, pixels, reduction, sampling):
    seeds = [11, 12]
    batch, plan = model.batch(QUESTIONS, SECONDS, reduction)
    together = model.generate(batch, model.encode(pixels), plan, sampling=sampling, seeds=seeds)
    model.verify(together)
    for row in range(2):
        frames = len(SECONDS[row])
        batch, plan = model.batch([QUESTIONS[row]], [SECONDS[row]], reduction)
        visual = model.encode(pixels[row : row + 1, :frames])
        alone = model.generate(batch, visual, plan, sampling=sampling, seeds=seeds[row : row + 1])
        assert alone.tokens[0] == together.tokens[row]
        want = np.asarray(alone.prefilled.logits[0])
        np.testing.assert_allclose(together.prefilled.logits[row], want, atol=1e-5 * np.abs(want).max())


def test_generation_is_prefill_over_and_over(model, pixels):
    batch, _ = model.batch(QUESTIONS[:1], SECONDS[:1], None)
    visual = model.encode(pixels[:1])
    got = model.generate(batch, visual).tokens[0]
    ids, segment = np.array(batch.input_ids), np.array(batch.segment)
    n = int(segment.sum())
    for token in got:
        longer = Batch(ids, segment, batch.frame, batch.frame_count)
        assert int(np.argmax(model.prefill(longer, visual).logits[0])) == token
        if n == ids.shape[1]:
            break
        ids[0, n], segment[0, n] = token, 1
        n += 1


def test_stop_ids_end_an_answer(model, pixels):
    batch, plan = model.batch(QUESTIONS, SECONDS, None)
    visual = model.encode(pixels)
    free = model.generate(batch, visual, plan).tokens
    stop = free[0][2]
    cut = model.generate(batch, visual, plan, sampling=Sampling(stop_ids=(stop,))).tokens
    for long, short in zip(free, cut, strict=True):
        want = long[: long.index(stop)] if stop in long else long
        assert short == want


def test_same_bucket_compiles_nothing(model, pixels):
    for reduction in (None, Reduction("str", 0.5)):
        batch, plan = model.batch(QUESTIONS, SECONDS, reduction)
        model.generate(batch, model.encode(pixels), plan)
        before = compile_count()
        other, plan = model.batch(["a bb ccc dddd", "a"], [[0.0, 1.0, 2.0], [5.0]], reduction)
        again = model.generate(other, model.encode(pixels[::-1].copy()), plan)
        assert compile_count() == before
        model.verify(again)
    assert model.programs.peak_bytes > 0


def _add(x, rest, *, amount):
    return x + amount, rest


def test_programs_of_any_arguments(model):
    """Empty containers and None are part of a program's key; values are not, their shapes and dtypes are."""
    held = len(model.programs)
    for arguments in (
        (np.ones(2), ()),
        (np.zeros(2), ()),
        (np.ones(2), None),
        (np.ones(3), ()),
        (np.ones(2), ((), {})),
    ):
        out = model.programs.get(_add, *arguments, amount=1)(*arguments)
        np.testing.assert_array_equal(out[0], arguments[0] + 1)
        assert out[1] == arguments[1]
    assert len(model.programs) == held + 4
    # a static argument is part of the key: another one is another program
    assert model.programs.get(_add, np.ones(2), (), amount=2)(np.ones(2), ())[0].tolist() == [3, 3]


def test_after_a_warm_up_no_number_of_frames_compiles(model, pixels):
    reduction = Reduction("str", 0.5)
    model.warm_up(reduction, batch=1, frames=(4,))
    before = compile_count()
    for frames in (3, 4):
        batch, plan = model.batch(QUESTIONS[:1], [[float(t) for t in range(frames)]], reduction)
        model.verify(model.generate(batch, model.encode(pixels[:1, :frames]), plan, max_new=2))
    assert compile_count() == before


def test_frames_that_are_missing_are_refused(model, pixels):
    batch, _ = model.batch(QUESTIONS[:1], [[0.0, 1.0, 2.0]], None)
    with pytest.raises(ValueError, match="visual tokens of 3 frames"):
        model.generate(batch, None)
    with pytest.raises(ValueError, match="at least 3 frames"):
        model.generate(batch, model.encode(pixels[:1, :2]))
    with pytest.raises(ValueError, match="with B = 1"):
        model.generate(batch, model.encode(pixels[:2]))


def test_text_alone_is_answered_under_every_reduction(model):
    tokens = {
        tuple(model.generate(*_with_none(model.batch(["a bb"], [[]], reduction))).tokens[0])
        for reduction in (None, Reduction("str", 0.5), Reduction("random-input", 0.5), Reduction("evs", 0.5))
    }
    assert len(tokens) == 1


def _with_none(made):
    batch, plan = made
    return batch, None, plan


def test_lengths_over_the_buckets_are_named(model):
    with pytest.raises(ValueError, match=r"frames = 9 .*\(2, 4, 8\)"):
        model.batch(["a"], [[float(i) for i in range(9)]], None)
    with pytest.raises(ValueError, match=r"text = 9 .*\(8,\)"):
        model.batch(["a b c d e f g h i"], [[0.0]], None)
    batch, _ = model.batch(["a"], [[0.0]], None)
    with pytest.raises(ValueError, match="max_new"):
        model.generate(batch, None, max_new=7)


def test_text_between_frames_is_laid_out_in_order(model):
    style = PromptStyle(before="s", frame="at {seconds:.0f}", after_frame="xxx")
    spaced = Model(CONFIG, model.params, Letters(), buckets=Buckets(frames=(2,), text=(16,), max_new=2), style=style)
    batch, _ = spaced.batch(["what"], [[0.0, 7.0]], None)
    # frames' own text as -2 - frame, but for what stands behind the last one, with the question
    assert batch.frame[0].tolist() == [-1, -2, -2] + [0] * 4 + [-2, -3, -3] + [1] * 4 + [-1, -1] + [-1] * 8
    assert batch.input_ids[0, :3].tolist() == [1, 2, 1]
    assert int(batch.segment.sum()) == 16


def test_top_p_keeps_the_likeliest_that_hold_it():
    logits = jnp.log(jnp.asarray([[0.5, 0.3, 0.15, 0.05]]))
    for top_p, allowed in ((0.4, {0}), (0.6, {0, 1}), (0.9, {0, 1, 2}), (1.0, {0, 1, 2, 3})):
        keys = jax.random.split(jax.random.key(0), 400)
        sampling = Sampling(temperature=1.0, top_p=top_p)
        drawn = sample_token(CONFIG, jnp.repeat(logits, len(keys), axis=0), keys, sampling)
        assert set(drawn.tolist()) == allowed


@pytest.mark.parametrize("bad", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_bad_sampling_is_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Sampling(**bad)


def test_room_that_is_used_up_is_refused(model, pixels):
    """Each of the ways to go beyond the caches: one piece of text too long, one too many, and an answer."""
    batch, _ = model.batch(QUESTIONS, SECONDS, None)
    ids, segment = np.ones((2, 4), np.int32), np.ones((2, 4), np.int32)

    def caches(decode_capacity):
        prefilled = model.prefill(batch, model.encode(pixels), decode_capacity=decode_capacity)
        return prefilled.logits, prefilled.decoder.caches

    with pytest.raises(ValueError, match="extend takes 4 tokens, and the caches have 3 of 3 slots free"):
        model.extend(ids, segment, caches(3)[1])
    _, longer = model.extend(ids, segment, caches(6)[1])
    with pytest.raises(
        ValueError, match=r"extend takes 4 tokens, and the caches have 2 of 6 .* `decode_capacity` of at least 8"
    ):
        model.extend(ids, segment, longer)
    seeds, greedy = np.zeros(2, np.int32), Sampling(stop_ids=())
    logits, held = caches(4)
    with pytest.raises(ValueError, match="decode puts in 5 tokens, and the caches have 4 of 4"):
        model.decode(logits, held, seeds, max_new=6, sampling=greedy)
    _, _, state = model.decode(logits, held, seeds, max_new=5, sampling=greedy)  # the last token does not go in
    with pytest.raises(ValueError, match="decode puts in 1 tokens, and the caches have 0 of 4"):
        model.decode(None, state, seeds, max_new=1, sampling=greedy)
