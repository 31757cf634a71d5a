"""What users add and pass from outside: methods of their own, models of their own, names and lists instead of objects."""

import importlib.metadata
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hybridvlm as hv
from hybridvlm import __main__ as commands
from hybridvlm.config import ModelConfig
from hybridvlm.inference.conversation import Answer, Conversation
from hybridvlm.models import vamba
from hybridvlm.nn import decoder
from hybridvlm.ops.tokens import Tokens
from hybridvlm.reduction import METHODS, describe_methods, get_method, make_plan, parse_method, score_fn
from hybridvlm.reduction.methods import load_entry_points

CONFIG = ModelConfig(
    pattern="M*-M*-",
    width=16,
    vocab_size=32,
    mamba_heads=2,
    mamba_head_dim=8,
    ssm_state=8,
    ssm_groups=1,
    conv_kernel=4,
    attention_heads=2,
    kv_heads=1,
    head_dim=8,
    mlp_width=32,
)


@pytest.fixture
def registry():
    """The registry as it is, which a test may add to."""
    before = dict(METHODS)
    load_entry_points.cache_clear()
    yield METHODS
    METHODS.clear()
    METHODS.update(before)
    load_entry_points.cache_clear()


@pytest.fixture(scope="module")
def tiny():
    return hv.load("tiny")


def add_latest(name="latest", **options):
    @hv.register_method(name, reads="index", **options)
    def latest(layer, aux, tokens, plan, segments):
        """the last frames"""
        return tokens.frame.astype(jnp.float32)

    return latest


@pytest.mark.slow
def test_a_registered_method_drops_by_its_own_score(registry):
    add_latest()
    assert parse_method("evs:0.5+latest") == (("evs", 0.5), ("latest", None))
    assert "latest" in describe_methods() and "the last frames" in describe_methods()
    visual, text = 12, 3
    plan = make_plan(hv.Reduction("latest", 0.6), CONFIG, visual_tokens=visual, text_tokens=text, frames=6)
    params = jax.jit(decoder.Decoder(CONFIG).init)(jax.random.key(0), _tokens(visual, text))["params"]
    out = decoder.prefill(params, CONFIG, _tokens(visual, text), plan=plan, score_fn=score_fn(plan))
    left = np.asarray(out.tokens.frame)[0]
    left = left[left >= 0]
    assert 0 < len(left) < visual
    np.testing.assert_array_equal(left, np.repeat(np.arange(6), 2)[visual - len(left) :])
    # text stays, and stays after
    assert int((np.asarray(out.tokens.segment)[0] > 0).sum()) == len(left) + text


def test_a_registered_method_before_layer_0_drops_or_merges(registry):
    """One that returns a score, and one that folds each frame into its first token."""
    from hybridvlm.ops.fold import Selection
    from hybridvlm.reduction import input_selection

    @hv.register_method("late", phase="input", reads="index")
    def late(visual, frame_count, plan):
        """the last tokens"""
        b, frames, m, _ = visual.shape
        return jnp.broadcast_to(jnp.arange(frames * m, dtype=jnp.float32), (b, frames * m))

    @hv.register_method("first", phase="input", reads="features")
    def first(visual, frame_count, plan):
        """means of frames"""
        b, frames, m, _ = visual.shape
        at = jnp.broadcast_to(jnp.arange(frames * m, dtype=jnp.int32), (b, 1, frames * m))
        return Selection((at % m == 0)[:, 0].astype(jnp.float32), at // m * m, jnp.full(at.shape, 1 / m))

    assert parse_method("first:0.5+str:0.5") == (("first", 0.5), ("str", 0.5))
    visual, count = jnp.ones((1, 6, 2, 4)), jnp.array([6])
    plan = make_plan(hv.Reduction("late", 0.5), CONFIG, visual_tokens=12, text_tokens=3, frames=6)
    assert plan.drops_input and input_selection(plan)(visual, count).score[0].tolist() == list(range(12))
    plan = make_plan(hv.Reduction("first", 0.5), CONFIG, visual_tokens=12, text_tokens=3, frames=6)
    assert input_selection(plan)(visual, count).into[0, 0].tolist() == [0, 0, 2, 2, 4, 4, 6, 6, 8, 8, 10, 10]
    with pytest.raises(ValueError, match="phase must be one of"):
        hv.register_method("late2", phase="merge")


def _tokens(visual, text):
    length = visual + text
    x = jax.random.normal(jax.random.key(1), (1, length, CONFIG.width))
    at = jnp.arange(length)[None]
    return Tokens(
        x=x,
        position=at,
        segment=jnp.ones((1, length), jnp.int32),
        visual=at < visual,
        query=at >= visual,
        index=at,
        frame=jnp.where(at < visual, at // 2, -1),
    )


def test_a_method_is_registered_with_sites_of_its_own(registry):
    add_latest("latest-attention", after="*")
    plan = make_plan(hv.Reduction("latest-attention", 0.8), CONFIG, visual_tokens=12, text_tokens=3, frames=6)
    assert set(plan.drops) <= {1, 4} and plan.drops
    assert "latest-attention" in vamba.METHODS and "str-mamba" not in vamba.METHODS and "evs" in vamba.METHODS


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("str", {}, "already"),
        ("a+b", {}, "letters"),
        ("", {}, "letters"),
        ("mine", {"after": "-"}, "after"),
        ("mine", {"after": ""}, "after"),
        ("mine", {"reads": "everything"}, "reads"),
    ],
)
def test_what_cannot_be_registered_is_refused(registry, name, options, words):
    before = set(METHODS)
    with pytest.raises(ValueError, match=words):
        hv.register_method(name, **options)(lambda *_: None)
    assert set(METHODS) == before


def test_a_cell_that_is_run_again_defines_its_method_anew(registry):
    first, second = add_latest(), add_latest()
    assert first is not second and METHODS["latest"].function is second
    with pytest.raises(ValueError, match="already"):
        hv.register_method("latest")(lambda *_: None)


def test_packages_bring_methods_by_entry_point(registry, monkeypatch):
    point = types.SimpleNamespace(name="theirs", value="their.module", load=lambda: add_latest("theirs"))
    monkeypatch.setattr(
        importlib.metadata, "entry_points", lambda *, group: [point] if group == "hybridvlm.methods" else []
    )
    assert get_method("theirs").reads == "index"
    assert hv.load("tiny").reduction_for("theirs", 0.5).method == "theirs"


def test_a_package_that_cannot_be_imported_is_named(registry, monkeypatch):
    def load():
        raise ImportError("no module their.module")

    point = types.SimpleNamespace(name="theirs", value="their.module", load=load)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda *, group: [point])
    with pytest.raises(ValueError, match=r"'theirs' .*no module their\.module"):
        get_method("theirs")


def test_a_method_by_name_takes_the_checkpoints_schedule():
    model = hv.load("tiny-reduced")
    reduction = model.reduction_for("str-mamba", 0.125, "flops")
    assert (reduction.method, reduction.budget, reduction.kind) == ("str-mamba", 0.125, "flops")
    assert reduction.schedule == model.reduction.schedule
    assert model.reduction_for("none") is None and model.reduction_for("str").budget == 0.25
    with pytest.raises(ValueError, match="did you mean 'str'"):
        model.reduction_for("stra")


def test_names_and_lists_stand_for_objects(tiny):
    frames = [np.full((28 * 4, 28 * 4, 3), value, np.uint8) for value in (10, 200)]
    told = [
        Conversation(tiny, video, reduction="str", budget=0.5)
        for video in (frames, jnp.stack(frames), np.stack(frames))
    ]
    for conversation in told:
        assert conversation.reduction == tiny.reduction_for("str", 0.5)
        np.testing.assert_array_equal(conversation.clips[0].frames, told[-1].clips[0].frames)
    assert len(told[0].clips[0].seconds) == 2


@pytest.mark.parametrize(
    ("video", "question", "options", "error", "words"),
    [
        (None, ["one", "two"], {}, TypeError, "one text, got list"),
        (None, "what", {"reduction": 3}, TypeError, "Reduction or a method's name"),
        (None, "what", {"reduction": "strr"}, ValueError, "did you mean 'str'"),
        (None, "what", {"reduction": "str", "budget": 2.0}, ValueError, "budget"),
        (None, "what", {"budget": 0.5}, ValueError, "goes with a method's name"),
        ([np.zeros((4, 4, 3), np.uint8), np.zeros((5, 4, 3), np.uint8)], "what", {}, ValueError, "one size"),
        (["a.mp4", "b.mp4"], "what", {}, ValueError, "uint8"),
        (None, " ", {}, ValueError, "empty"),
    ],
)
def test_odd_arguments_of_ask_are_named(tiny, video, question, options, error, words):
    with pytest.raises(error, match=words):
        tiny.ask(video, question, **options)


def test_a_model_of_ones_own(tiny):
    model = hv.init(CONFIG, seed=3)
    again, other = hv.init(CONFIG, seed=3), hv.init(CONFIG, seed=4)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), model.params, again.params))
    assert not jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), model.params, other.params))
    count = sum(leaf.size for leaf in jax.tree.leaves(model.params))
    assert f"{count:,} parameters" in repr(model) and "nemotron_vl" in repr(model) and "6 layers" in repr(model)
    assert "'tiny'" in repr(tiny)


def test_an_answer_shows_itself_in_a_line():
    answer = Answer("boot", [3], 4, [(0, 5, 64), (6, 25, 16)], {"prefill": 1.5}, False, np.zeros(1), None, None)
    assert (
        str(answer) == "boot" and repr(answer) == "Answer('boot', 4 frames, 16 of 64 visual tokens at the end, 1.50 s)"
    )


def test_one_command_for_all(capsys):
    assert commands.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("eval", "ask", "train", "analyze", "bench"))
    assert commands.main(["--version"]) == 0 and hv.__version__ in capsys.readouterr().out
    assert commands.main([]) == 2 and commands.main(["evil"]) == 2 and "evil" in capsys.readouterr().err
    assert commands.main(["ask", "--grammar"]) == 0 and "colour" in capsys.readouterr().out
    assert commands.main(["eval", "--list"]) == 0 and "str-calibrated" in capsys.readouterr().out
