"""Plans: budgets met exactly, shares that only fall, drops only where a method may drop, counts the same everywhere."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.plans import model, plan
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridvlm.config import ModelConfig, Reduction, Schedule, VisionConfig
from hybridvlm.pattern import compile_weight
from hybridvlm.reduction import METHODS, SHARE_ONE, PlanMismatch, ReductionPlan, schedules
from hybridvlm.reduction import cost as flops
from hybridvlm.reduction.methods import named_reduction

NEMOTRON = ModelConfig(
    pattern="M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M-",
    width=5120,
    vocab_size=132096,
    mamba_heads=128,
    mamba_head_dim=80,
    ssm_groups=8,
    ssm_state=128,
    attention_heads=40,
    kv_heads=8,
    head_dim=128,
    mlp_width=20480,
    vision=VisionConfig(),
)


ALLOWED = dict.fromkeys(METHODS, "M*") | {
    "str-attention": "*",
    "str-mamba": "M",
    "fastv": "*",
    "pyramiddrop": "*",
    "oneshot-mamba": "M",
    "oneshot-attention": "*",
    **dict.fromkeys(("oneshot", "oneshot-max", "oneshot-last", "dart", "sparsevlm", "holitom-inner"), "*"),
    "utrc": "M",
}
SHAPES = ("constant", "step", "linear", "cosine", "sigmoid")


@settings(max_examples=150, deadline=None)
@given(
    pattern=st.text("M*-", min_size=3, max_size=40),
    # pairs: rivals/test_pairs.py
    method=st.sampled_from(
        [n for n, m in METHODS.items() if n not in ("avgpool", "resolution", "str-calibrated") and m.pair is None]
    ),
    budget=st.floats(0.01, 1.0),
    kind=st.sampled_from(("mean", "final")),
    shape=st.sampled_from(SHAPES),
    floor=st.sampled_from((0.0, 0.05, 0.1)),
    stages=st.sampled_from((0, 3)),
)
def test_a_plan_meets_its_budget_or_says_what_it_can(pattern, method, budget, kind, shape, floor, stages):
    config = model(pattern)
    try:
        p = plan(method, budget, kind, config, m=256, shape=shape, floor=floor, stages=stages)
    except ValueError as error:
        assert "\n" not in str(error) and f"{budget:g}" in str(error)
        return
    layers = len(pattern)
    assert p.layers == layers == len(p.capacities)
    assert all(a >= b for a, b in zip(p.relative, p.relative[1:], strict=False))
    assert all(a >= b for a, b in zip(p.capacities, p.capacities[1:], strict=False))
    assert all(pattern[site] in ALLOWED[method] for site in p.drops)
    if METHODS[method].phase != "input":
        assert p.shares[0] == SHARE_ONE and not p.drops_input
    if method == "none":
        assert p.budget == 1.0 and p.flop_ratio == 1.0
        return
    assert p.budget == budget
    if METHODS[method].scheduled:
        assert p.relative[-1] >= round(floor * SHARE_ONE)
        assert not stages or len(p.stages) <= stages
    achieved = p.retention_mean if kind == "mean" else p.retention_final
    if (own := METHODS[method].count) is not None:
        # its own rule truncates, or goes by frames
        assert p.keep(0, p.visual_tokens) == own(p.frames, 256, budget)
        assert abs(achieved - budget) <= (1.0 / 1000 if method == "evs" else 1.0 / p.frames)
        return
    # a stage moves as a whole: with one length of n layers the mean comes in steps of n quanta, with several finer
    lengths = [stop - start for start, stop in p.stages[1:]] or [layers]
    if kind == "final":
        lengths = [layers]
    assert abs(achieved - budget) <= 0.5 * max(lengths) / (SHARE_ONE * layers) + 1e-9


@pytest.mark.parametrize("shape", ["linear", "cosine", "sigmoid"])
@pytest.mark.parametrize("budget", [0.1, 0.25, 0.35, 0.5, 0.9])
def test_the_mean_is_exact_to_one_quantum_of_one_layer(shape, budget):
    for config in (NEMOTRON, model()):
        p = plan(budget=budget, config=config, m=256, shape=shape)
        assert abs(p.retention_mean - budget) <= 1.0 / (SHARE_ONE * p.layers) + 1e-12


@pytest.mark.parametrize("method", ["str", "str-attention", "fastv", "pyramiddrop", "oneshot-mamba", "uniform-input"])
def test_a_flops_budget_is_a_share_of_the_dense_decoder(method):
    p = plan(method, 0.4, "flops", NEMOTRON, frames=64, m=256)
    lengths = [p.row_length(layer) for layer in range(p.layers)]
    dense = flops.decoder_flops(NEMOTRON, [64 * 256 + 32] * p.layers)
    assert p.dense_cost.decoder == dense
    assert flops.decoder_flops(NEMOTRON, lengths) / dense == pytest.approx(0.4, abs=2e-4)
    assert p.flop_ratio == pytest.approx(0.4, abs=2e-4)


@pytest.mark.parametrize(
    "tokens, speedup", [(16384, (4.0, 2.9, 2.0)), (32768, (4.1, 2.9, 2.0)), (131072, (4.6, 3.2, 2.1))]
)
def test_nemotron_costs_what_the_published_sizes_say(tokens, speedup):
    for budget, expected in zip((0.25, 0.35, 0.5), speedup, strict=True):
        p = plan("str", budget, config=NEMOTRON, frames=tokens // 256, m=256, text=128)
        assert p.flop_speedup == pytest.approx(expected, abs=0.09)


def test_nemotron_caches():
    p = plan("str", 0.25, config=NEMOTRON, frames=512, m=256, text=0)
    assert p.dense_cost.kv_bytes == 24576 * 131072
    assert p.dense_cost.state_bytes == p.cost.state_bytes == 28 * (4 * 128 * 80 * 128 + 3 * 12288 * 2)
    attention = [p.row_length(i) for i, kind in enumerate(p.pattern) if kind == "*"]
    assert p.cost.kv_bytes == 4096 * sum(attention)


def test_layer_flops_by_hand():
    c = model("M*-", chunk_size=8)
    n, inner = 100, 128
    proj = 2 * n * 64 * (inner + (inner + 2 * 2 * 16) + 4) + 2 * n * inner * 64
    conv = 2 * n * (inner + 64) * 4
    ssd = 2 * n * 8 * (2 * 16 + inner) + 2 * (2 * n * inner * 16) + 2 * 13 * inner * 16
    assert flops.layer_flops(c, 0, n) == proj + conv + ssd
    assert flops.layer_flops(c, 0, n, chunk_size=16) > flops.layer_flops(c, 0, n)
    assert flops.layer_flops(c, 1, n) == 2 * n * 64 * (64 + 32 + 32 + 64) + 2 * (2 * n * n * 64) // 2
    assert flops.layer_flops(c, 2, n) == 2 * (2 * n * 64 * 256)
    assert flops.decoder_flops(c, [n, n, n]) == sum(flops.layer_flops(c, i, n) for i in range(3)) + 2 * 64 * 100
    with pytest.raises(ValueError, match="expected 3, got 2"):
        flops.decoder_flops(c, [n, n])


@settings(max_examples=60, deadline=None)
@given(
    method=st.sampled_from(("str", "random-input", "evs", "evs:0.5+str:0.3", "uniform-input:0.31+str:0.5", "fastv")),
    budget=st.floats(0.3, 0.9),
    frames=st.lists(st.integers(0, 64), min_size=1, max_size=6),
    m=st.sampled_from((7, 16, 256)),
)
def test_keep_is_the_same_in_python_numpy_and_jax_and_never_more_than_fits(method, budget, frames, m):
    p = plan(method, budget, m=m)
    counts = [f * m for f in frames]
    for layer in (0, 1, p.layers // 2, p.layers - 1):
        python = [p.keep(layer, c) for c in counts]
        assert all(isinstance(k, int) and 0 <= k <= p.capacities[layer] for k in python)
        assert p.keep(layer, np.array(counts, np.int32)).tolist() == python
        device = p.keep(layer, jnp.array(counts, jnp.int32)[:, None])
        assert device.dtype == jnp.int32 and device[:, 0].tolist() == python


def test_an_example_keeps_the_same_in_every_bucket():
    for method in ("str", "evs", "random-input", "pyramiddrop", "evs:0.5+str:0.5"):
        small, large = plan(method, 0.5, frames=16), plan(method, 0.5, frames=64)
        for count in (16, 80, 160, 256):
            assert [small.keep(i, count) for i in range(small.layers)] == [
                large.keep(i, count) for i in range(large.layers)
            ]


def test_no_row_overflows_int32():
    """A day at four frames a second, and beyond what a position can be: products on the way to a share stay within int32."""
    for frames in (2047, 3600, 345_600):
        p = plan(config=NEMOTRON, frames=frames, m=256)
        count = frames * 256
        exact = (count * p.relative[20] + 2048) // 4096
        assert p.keep(20, jnp.int32(count)) == p.keep(20, np.int32(count)) == p.keep(20, count) == exact
    with pytest.raises(ValueError, match="visual_tokens must lie in"):
        plan(config=NEMOTRON, frames=2**23, m=256)


def test_start_never_and_stages_are_obeyed():
    p = plan("str", 0.5, start=3, never=(5, 6))
    assert min(p.drops) >= 3 and not {5, 6} & set(p.drops)
    p = plan("str", 0.3, config=NEMOTRON, m=256, stages=4)
    assert len(p.stages) == 4 and p.retention_mean == pytest.approx(0.3, abs=1e-4)
    assert [p.relative[start] for start, _ in p.stages] == sorted(set(p.relative), reverse=True)
    assert p.stages[0][0] == 0 and p.stages[-1][1] == p.layers


def test_stages_fall_by_like_ratios_and_end_where_least_is_compiled():
    shares = [4096, 4000, 2900, 2000, 1400, 1000, 700, 500, 350, 250, 180, 130, 90, 64]
    # two drops by a factor of 8 in the middle of each: 1448 and 181, a quarter of the step off at most (a factor of 1.7)
    assert schedules.merge_stages(shares, 3) == (2, 8)
    assert schedules.merge_stages(shares, 3, early=0.5) == (0, 5)
    assert schedules.merge_stages(shares, 0) == schedules.merge_stages(shares, 1) == ()
    assert schedules.merge_stages(shares, 99) == tuple(range(13))
    # "M-" repeats, and a stage that ends after an MLP would leave half of one on each side
    pattern = "M-M-M-M-M-M-M-"
    chosen = schedules.merge_stages(shares, 3, pattern)
    weight = lambda drops: sum(  # noqa: E731
        compile_weight(pattern, a, b) + compile_weight(pattern, b, b + 1)
        for a, b in zip([0, *(d + 1 for d in drops)], [*drops, 13], strict=True)
    )
    assert weight(chosen) < weight((3, 9)) and all(abs(a - b) <= 1 for a, b in zip(chosen, (3, 9), strict=True))
    # a small budget leaves no room before the first drop, which then comes earlier
    for stages in (2, 3, 4):
        p = plan("str", 0.15, config=NEMOTRON, m=256, stages=stages)
        assert 2 <= len(p.stages) <= stages and p.retention_mean == pytest.approx(0.15, abs=1e-3)


def test_shapes_look_as_their_names_say():
    late = plan("str", 0.5, shape="step", config=model("M" * 40), floor=0.1).relative
    assert set(late[:17]) == {SHARE_ONE} and len(set(late)) <= 3 and late[-1] == round(0.1 * SHARE_ONE)
    flat = plan("str", 0.5, shape="constant").relative
    assert len(set(flat)) == 2 and flat[1] < SHARE_ONE
    line = np.diff(plan("str", 0.6, shape="linear", config=model("M" * 40)).relative)
    assert line.min() < 0 and line.max() - line.min() <= 4


def test_an_explicit_list_is_taken_as_written_or_bent_to_a_budget():
    values = tuple(max(0.02, 1 - 0.05 * i) for i in range(25))
    p = plan("str", 1.0, shape="list", values=values)
    for layer in range(1, 25):
        before = next(i for i in range(layer, 0, -1) if p.pattern[i - 1] in "M*")
        assert p.relative[layer] == round(values[before] * SHARE_ONE)
    assert plan("str", 0.3, shape="list", values=values).retention_mean == pytest.approx(0.3, abs=1e-4)
    with pytest.raises(ValueError, match="expected 25, got 3"):
        plan("str", 0.3, shape="list", values=(1.0, 0.5, 0.2))
    with pytest.raises(ValueError, match="never rise"):
        plan("str", 0.3, shape="list", values=(*values[:-1], 1.0))


@pytest.mark.parametrize(
    "method, budget, words",
    [
        ("str", 0.05, "str can meet mean budgets from 0.0881 to 1"),
        ("fastv", 0.2, "fastv can meet mean budgets from 0.2802 to 1"),
        ("nope", 0.5, "did you mean 'none'"),
        ("str+evs", 0.5, "one method before the decoder"),
        ("evs:0.5+str:0.5+str", 0.5, "one method before the decoder"),
        ("str:1.5", 0.5, "in \\(0, 1\\], got 1.5"),
        ("str:half", 0.5, "must be a number, got 'half'"),
        ("avgpool", 0.7, "cannot keep 0.7; the nearest budgets it can are .*0.5, 1"),
        ("evs", 0.01, "of 64 frames it can keep 0.0157 or more"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(method, budget, words):
    with pytest.raises(ValueError, match=words) as error:
        plan(method, budget)
    assert "\n" not in str(error.value)


def test_the_least_budget_an_error_names_can_be_met():
    assert plan("fastv", 0.2802).retention_mean == pytest.approx(0.2802, abs=2e-4)


def test_a_pattern_without_the_layers_a_method_needs_is_refused():
    with pytest.raises(ValueError, match=r"str-attention drops after \*, and these 4 layers have no such site"):
        plan("str-attention", 0.5, config=model("M-M-"))
    assert plan("str-attention", 1.0, config=model("M-M-")).flop_ratio == 1.0


def test_composition_multiplies():
    p = plan("evs:0.5+str:0.5", 0.1, config=NEMOTRON, m=256)
    assert p.budget == 0.25 and p.drops_input and (p.input_method, p.decoder_method) == ("evs", "str")
    assert p.retention_mean == pytest.approx(0.25, abs=1e-4)
    assert p.capacities[0] == 64 * 256 // 2
    alone = plan("str", 0.5, config=NEMOTRON, frames=32, m=256)
    assert p.capacities == alone.capacities


def test_avgpool_merges_before_the_decoder():
    p = plan("avgpool", 0.25)
    assert p.pool_factors == (1, 2, 2) and p.grid == (4, 4)
    assert p.decoder_tokens == 256 and set(p.capacities) == {256} and not p.drops_input and not p.drops
    assert p.retention_mean == 0.25 and p.row_length(3) == 256 + 32
    both = plan("avgpool:0.5+str:0.5")
    assert both.decoder_tokens == 512 and both.retention_mean == pytest.approx(0.25, abs=1e-4)
    odd = plan("avgpool", 0.34)
    assert odd.pool_factors == (3, 1, 1) and odd.decoder_frames == 22


@pytest.mark.parametrize("method", ["none", "str", "evs:0.5+str:0.5", "avgpool", "timeviper-td"])
def test_json_there_and_back(method):
    p = plan(method, 0.25, m=16)
    back = ReductionPlan.from_dict(json.loads(json.dumps(p.to_dict())))
    assert back == p and hash(back) == hash(p) and back.capacities == p.capacities
    with pytest.raises(ValueError, match="no key 'sharse'"):
        ReductionPlan.from_dict({**p.to_dict(), "sharse": 1})


def test_verify_names_layer_and_counts():
    p = plan("str", 0.25)
    counts = np.array([1024, 640])
    kept = np.stack([p.keep(layer, counts) for layer in range(p.layers)])
    p.verify(kept, counts)
    with pytest.raises(
        PlanMismatch, match=r"layer 5 \(mamba\) was given 1 visual tokens of example 1 where the plan says"
    ):
        wrong = kept.copy()
        wrong[5, 1] = 1
        p.verify(wrong, counts)
    with pytest.raises(PlanMismatch, match="layer 1 "):
        p.verify(np.broadcast_to(counts, kept.shape), counts)
    with pytest.raises(ValueError, match="kept_counts must be"):
        p.verify(kept[:3], counts)


def test_explain_shows_every_layer_and_the_totals():
    p = plan("str", 0.25, config=NEMOTRON, m=256)
    text = p.explain()
    for words in (
        "str: mean budget 25.00%",
        "retention, mean of layers",
        "KV cache MiB",
        f"{p.flop_speedup:.2f}x less",
    ):
        assert words in text
    assert text.count("drop after") == len(p.drops)
    assert sum(line.lstrip()[:2].strip().isdigit() for line in text.splitlines()) == p.layers


@pytest.mark.parametrize("method", ["evs:0.5+str:0.5", "random-input:0.5+str:0.5", "evs+str"])
def test_a_composition_is_solved_to_the_product_of_operations(method):
    p = plan(method, 0.5, "flops")
    assert p.budget == 0.25 and p.flop_ratio == pytest.approx(0.25, abs=2e-3)


def test_the_budget_of_a_plan_is_the_one_asked_for():
    p = plan("evs", 0.3, "flops")
    assert p.budget == 0.3 and p.flop_ratio == pytest.approx(0.3, abs=2e-3)


def test_a_further_question_is_what_the_layers_before_the_first_drop_do_not_see_again():
    """Its operations and those of the prompt without it through the shared layers are those of a prefill."""
    config, text = model(), 16
    for start in (0, 3):
        p = plan("str", text=text, start=start)
        shared = p.shared_layers
        assert shared == p.drops[0] + 1 > start
        before = sum(flops.layer_flops(config, i, p.visual_tokens, 16) for i in range(shared))
        whole = sum(flops.layer_flops(config, i, p.visual_tokens + text, 16) for i in range(shared))
        late = sum(p.cost.layers[shared:]) + p.cost.head
        assert p.further_flops(config, text, 16) == whole - before + late
    dense = plan("str", budget=1.0, text=text)
    assert not dense.depends_on_query and dense.shared_layers == dense.layers == plan("uniform").shared_layers
    assert dense.further_flops(config, text, 16) < 0.03 * dense.cost.decoder


def test_plans_that_agree_before_their_first_drop_can_share_what_is_there():
    key = plan("str", start=3).prefix_key
    assert key == plan("str", 0.3, start=3).prefix_key == plan("str-lookahead", text=64, start=3).prefix_key
    others = [plan("str"), plan("str", start=3, frames=32), plan("evs:0.5+str:0.6", start=3)]
    assert all(other.prefix_key != key for other in others)
    assert named_reduction(Reduction(schedule=Schedule(floor=0.1)), "str", first_drop=5).schedule == Schedule(
        floor=0.1, start=5
    )
