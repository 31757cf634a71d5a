"""The Family protocol, for each family; a frozen Model, what it returns and saves."""

import dataclasses
import inspect

import jax
import numpy as np
import pytest

import hybridvlm as hv
from hybridvlm.checkpoints import samples
from hybridvlm.config import KINDS, Buckets, Reduction
from hybridvlm.inference.model import load
from hybridvlm.models.family import FAMILIES, Family, family_for, get_family
from hybridvlm.nn import decoder, scan
from hybridvlm.reduction.scores import layer_score

OPTIONAL = {"trim_frames", "embed_prompt", "decoder_output"}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_has_what_the_protocol_lists(name):
    family = get_family(name)
    assert isinstance(family, Family) and name == family.NAME
    listed = {n for n, _ in inspect.getmembers(Family, inspect.isfunction) if not n.startswith("_")}
    for member in sorted(listed - {"__init__"}):
        asked = [p for p in inspect.signature(getattr(Family, member)).parameters.values() if p.name != "self"]
        has = inspect.signature(getattr(family, member)).parameters
        takes_any = any(p.kind is p.VAR_KEYWORD for p in has.values())
        for parameter in asked:
            assert parameter.name in has or takes_any, f"{name}.{member} lacks {parameter.name}"
        more = [p for p in has.values() if p.name not in {a.name for a in asked} and p.default is p.empty]
        assert not [p for p in more if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)], f"{name}.{member}: {more}"
    for member in OPTIONAL:
        assert getattr(family, member) is None or callable(getattr(family, member))
    assert dataclasses.is_dataclass(family.Config) and family.Config.__dataclass_params__.frozen


def test_an_unknown_family_is_named():
    with pytest.raises(ValueError, match=r"'mamba'.*nemotron_vl, vamba, qwen_vl"):
        get_family("mamba")
    with pytest.raises(ValueError, match="Buckets is the config of no model family"):
        family_for(Buckets())


@pytest.fixture(scope="module")
def tiny():
    """The embedded model with the first of its layers of each kind."""
    whole = load("tiny", buckets=Buckets(frames=(2,), text=(16,), max_new=2))
    config = dataclasses.replace(whole.config, pattern="M*-M")
    stacks = {name: config.count(kind) for kind, name in KINDS.items() if config.count(kind)}
    decoder_params = whole.params["decoder"]
    first = {name: jax.tree.map(lambda a: a[:n], decoder_params[name]) for name, n in stacks.items()}  # noqa: B023
    params = whole.params | {"decoder": first | {"norm_f": decoder_params["norm_f"]}}
    return dataclasses.replace(whole, config=config, params=params)


@pytest.fixture(scope="module")
def prompt(tiny):
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (1, 2, *tiny.config.vision.image_size, 3), dtype=np.uint8)
    batch, _ = tiny.batch(["red@t12 none what ?"], [[0.0, 1.0]], None)
    return batch, tiny.encode(frames)


def test_a_model_is_frozen(tiny):
    with pytest.raises(dataclasses.FrozenInstanceError):
        tiny.params = {}
    other = dataclasses.replace(tiny, name="other")
    assert other.name == "other" and other.params is tiny.params and other.programs is tiny.programs


def test_prefill_returns_scores_and_hidden_states(tiny, prompt):
    batch, visual = prompt
    out = tiny.prefill(batch, visual, return_scores=True, return_hidden_states=True)
    plain = tiny.prefill(batch, visual)
    np.testing.assert_allclose(out.logits, plain.logits, rtol=1e-5, atol=1e-5)
    assert plain.decoder.scores == {} and plain.decoder.hidden_states == {}
    config, params = tiny.config, tiny.params
    # a row that nobody asked for is no result, which would stay in memory
    assert plain.decoder.tokens.x.shape == (1, 0, config.width)
    assert plain.decoder.tokens.length == out.decoder.tokens.length == out.decoder.tokens.x.shape[1] > 0
    last = out.decoder.hidden_states[len(config.pattern) - 1]
    np.testing.assert_array_equal(out.decoder.tokens.x, decoder.apply_final_norm(params["decoder"], config, last))
    tokens = tiny.family.embed_prompt(params, config, batch, visual)
    # layer by layer, each with its own function: the slow and obvious way
    x = tokens.x
    for layer, kind in enumerate(config.pattern):
        p = scan.layer_params(params["decoder"], config, layer)
        forward = decoder.LAYER_KINDS[kind].forward
        options = {"query": tokens.query, "query_capacity": tokens.length} if kind == "*" else {}
        x, _, aux = forward(p, config, x, tokens.segment, tokens.position, **options)
        scale = np.abs(x).max()
        np.testing.assert_allclose(out.decoder.hidden_states[layer], x, rtol=0, atol=1e-5 * scale)
        if kind in "M*":
            want = np.asarray(layer_score(aux, tokens.replace(x=x)))[np.asarray(tokens.visual)]
            got = np.asarray(out.decoder.scores[layer])[np.asarray(tokens.visual)]
            np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-5 * np.abs(want).max())
        else:
            assert layer not in out.decoder.scores


def test_hidden_states_under_a_plan_have_that_layers_row(tiny, prompt):
    batch, visual = prompt
    batch, plan = tiny.batch(["red@t12 none what ?"], [[0.0, 1.0]], Reduction("str", 0.5))
    out = tiny.prefill(batch, visual, plan, return_hidden_states=True, return_scores=True)
    for layer, x in out.decoder.hidden_states.items():
        assert x.shape == (1, plan.row_length(layer), tiny.config.width)
    for site, (index, visual) in zip(plan.drops, out.decoder.survivors, strict=True):
        score = np.asarray(out.decoder.scores[site])[0]
        assert score.shape == (plan.row_length(site),)
        kept = int(np.asarray(visual).sum())
        assert kept == plan.keep(site + 1, int(out.counts[0, 0])) and index.shape == (1, plan.row_length(site + 1))


def test_vamba_says_that_it_returns_neither(tmp_path):
    model = load(samples.write_sample("vamba", tmp_path / "vamba"))
    batch, _ = model.batch(["a"], [[]], None)
    with pytest.raises(ValueError, match="no scores and no hidden states"):
        model.prefill(batch, None, return_scores=True)


def test_save_is_what_load_reads(tiny, tmp_path):
    path = tiny.save(tmp_path / "mine")
    again = hv.load(path)
    assert again.config == dataclasses.replace(tiny.config) and again.buckets == tiny.buckets
    for a, b in zip(jax.tree.leaves(tiny.params), jax.tree.leaves(again.params), strict=True):
        np.testing.assert_array_equal(a, b)
