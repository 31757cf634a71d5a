"""Attention: every implementation against a loop and against the reference, the laws, and text-to-visual scores."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.attention_cases import case, normal, places

from hybridvlm.ops.attention import attention, text_to_visual, visual, xla

IMPLEMENTATIONS = ["reference", "xla"]


def loop(q, k, v, q_segment, kv_segment, q_index, kv_index, causal=True):
    """The definition, one row and head at a time, in float64."""
    b, t, heads, width = q.shape
    out, lse = np.zeros((b, t, heads, v.shape[-1])), np.full((b, heads, t), -1e30)
    for n, i, h in np.ndindex(b, t, heads):
        seen = (kv_segment[n] == q_segment[n, i]) & (q_segment[n, i] > 0)
        if causal:
            seen &= kv_index[n] <= q_index[n, i]
        if seen.any():
            kv = h // (heads // k.shape[2])
            score = k[n, seen, kv].astype(np.float64) @ q[n, i, h] / np.sqrt(width)
            lse[n, h, i] = np.logaddexp.reduce(score)
            out[n, i, h] = np.exp(score - lse[n, h, i]) @ v[n, seen, kv]
    return out, lse


SMALL = (
    "plain",
    "grouped",
    "padded and packed",
    "only padding",
    "few rows, long cache",
    "one row, not causal",
    "scattered indices",
)
LONG = (
    "long",
    "long, packed",
    "long, more keys than queries",
    "long, more queries than keys",
    "long, not causal",
    "long, order reversed",
)


@functools.partial(jax.jit, static_argnames=("implementation", "causal"))
def run(q, k, v, implementation=None, **options):
    return attention(q, k, v, implementation=implementation, **options)


def filled(arrays, options) -> list[np.ndarray]:
    """The segments and indices that an attention without them means."""
    (b, t), length = arrays[0].shape[:2], arrays[1].shape[1]
    return [
        options.get("q_segment", np.ones((b, t), int)),
        options.get("kv_segment", np.ones((b, length), int)),
        options.get("q_index", places(b, t)),
        options.get("kv_index", places(b, length)),
    ]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", SMALL)
def test_equals_the_loop(name, implementation):
    arrays, options = case(name)
    out, lse = run(*arrays, implementation=implementation, **options)
    want_out, want_lse = loop(*arrays, *filled(arrays, options), options.get("causal", True))
    np.testing.assert_allclose(out, want_out, atol=2e-6)
    np.testing.assert_allclose(lse, want_lse, atol=2e-6, rtol=1e-6)
    assert lse.dtype == jnp.float32


@pytest.mark.parametrize("name", [*SMALL, *LONG])
def test_blocks_equal_the_whole_with_gradients(name):
    """Also of the log-sum-exp, as callers merge by it."""
    arrays, options = case(name)
    rng = np.random.default_rng(0)
    b, t, heads, width = arrays[0].shape
    weights = normal(rng, b, t, heads, width), normal(rng, b, heads, t)

    @functools.partial(jax.jit, static_argnums=1)
    def gradients(arrays, implementation):
        def loss(arrays):
            out, lse = attention(*arrays, implementation=implementation, **options)
            total = jnp.sum(out * weights[0]) + jnp.sum(jnp.where(lse > -1e29, lse, 0.0) * weights[1])
            return total, (out, lse)

        return jax.value_and_grad(loss, has_aux=True)(arrays)

    (_, values), grads = gradients(arrays, "xla")
    (_, want_values), want_grads = gradients(arrays, "reference")
    for got, want in zip([*values, *grads], [*want_values, *want_grads], strict=True):
        assert np.isfinite(got).all()
        np.testing.assert_allclose(got, want, atol=1e-5 * max(1.0, float(np.abs(want[want > -1e29]).max(initial=0))))


def test_all_heads_at_once_equal_one_by_one(monkeypatch):
    """What platforms other than CPU run: tiles of all examples and kv heads together."""
    arrays, options = case("long, packed")

    def values_and_gradients(arrays):
        (out, lse), pull = jax.vjp(lambda *a: attention(*a, **options), *arrays)
        return out, lse, *pull((jnp.cos(out), jnp.ones_like(lse)))

    want = jax.jit(values_and_gradients)(arrays)
    monkeypatch.setattr(xla, "_by_platform", lambda function, *parts: function(*parts))
    got = jax.jit(lambda arrays: values_and_gradients(arrays))(arrays)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_unseen_rows_are_zero_and_finite():
    arrays, options = case("long, packed")
    for implementation in IMPLEMENTATIONS:
        out, lse = run(*arrays, implementation=implementation, **options)
        padding = options["q_segment"] == 0
        assert not np.asarray(out)[padding].any()
        assert (np.moveaxis(np.asarray(lse), 1, 2)[padding] == np.float32(-1e30)).all()


@pytest.mark.parametrize("extra", [7, 300])
def test_padding_is_inert(extra):
    rng = np.random.default_rng(1)
    q, k, v = normal(rng, 1, 290, 4, 8), normal(rng, 1, 290, 2, 8), normal(rng, 1, 290, 2, 8)
    want_out, want_lse = run(q, k, v)

    def longer(x):  # what stands in the padding must not matter
        return np.concatenate([x, 1e4 * normal(rng, 1, extra, *x.shape[2:])], axis=1)

    segment = (places(1, 290 + extra) < 290).astype(np.int32)
    out, lse = run(longer(q), longer(k), longer(v), q_segment=segment, kv_segment=segment)
    np.testing.assert_allclose(out[:, :290], want_out, atol=2e-6)
    np.testing.assert_allclose(lse[..., :290], want_lse, atol=4e-6)


def test_packed_rows_equal_rows_apart():
    rng = np.random.default_rng(2)
    lengths = (280, 33, 411)
    parts = [[normal(rng, 1, n, h, 8) for h in (4, 2, 2)] for n in lengths]
    row = [np.concatenate(x, axis=1) for x in zip(*parts, strict=True)]
    segment = np.repeat([1, 2, 3], lengths)[None].astype(np.int32)
    out, lse = run(*row, q_segment=segment, kv_segment=segment)
    start = 0
    for part, n in zip(parts, lengths, strict=True):
        want_out, want_lse = run(*part)
        np.testing.assert_allclose(out[:, start : start + n], want_out, atol=2e-6)
        np.testing.assert_allclose(lse[..., start : start + n], want_lse, atol=4e-6)
        start += n


@pytest.mark.parametrize("cut", [1, 256, 597])
def test_a_split_sequence_equals_the_whole(cut):
    """Chunked prefill: the second part sees the first through the cache, by its query offset."""
    rng = np.random.default_rng(3)
    q, k, v = normal(rng, 2, 600, 4, 8), normal(rng, 2, 600, 2, 8), normal(rng, 2, 600, 2, 8)
    whole, whole_lse = run(q, k, v)
    first, _ = run(q[:, :cut], k[:, :cut], v[:, :cut])
    second, lse = run(q[:, cut:], k, v, q_index=places(2, 600 - cut, cut), kv_index=places(2, 600))
    np.testing.assert_allclose(np.concatenate([first, second], axis=1), whole, atol=2e-6)
    np.testing.assert_allclose(lse, whole_lse[..., cut:], atol=4e-6)


def test_results_over_disjoint_keys_merge_by_lse():
    rng = np.random.default_rng(4)
    q, k, v = normal(rng, 1, 20, 4, 8), normal(rng, 1, 50, 2, 8), normal(rng, 1, 50, 2, 8)
    (a, lse_a), (b, lse_b) = (run(q, k[:, s], v[:, s], causal=False) for s in (slice(0, 30), slice(30, 50)))
    lse = np.logaddexp(lse_a, lse_b)

    def share(part):
        return np.exp(part - lse).swapaxes(1, 2)[..., None]

    whole, whole_lse = run(q, k, v, causal=False)
    np.testing.assert_allclose(a * share(lse_a) + b * share(lse_b), whole, atol=2e-6)
    np.testing.assert_allclose(lse, whole_lse, atol=2e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("rows", [3, 40])
def test_large_scores_neither_overflow_nor_vanish(rows, implementation):
    rng = np.random.default_rng(5)
    q, k, v = 40 * normal(rng, 1, rows, 2, 8), 40 * normal(rng, 1, 40, 1, 8), normal(rng, 1, 40, 1, 8)
    out, lse = run(q, k, v, implementation=implementation)
    want_out, want_lse = loop(q, k, v, *filled((q, k, v), {}))
    assert np.abs(want_lse).max() > 500  # exp overflows fp32 from 89 on
    np.testing.assert_allclose(out, want_out, atol=1e-3)
    np.testing.assert_allclose(lse, want_lse, rtol=1e-6, atol=1e-3)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("rows", [2, 300])
def test_bfloat16_inputs_keep_an_fp32_softmax(rows, implementation):
    rng = np.random.default_rng(6)
    arrays = [jnp.asarray(normal(rng, 1, n, h, 8), jnp.bfloat16) for n, h in ((rows, 4), (300, 2), (300, 2))]
    out, lse = run(*arrays, implementation=implementation, causal=False)
    assert out.dtype == jnp.bfloat16 and lse.dtype == jnp.float32
    exact = [np.asarray(x, np.float32) for x in arrays]
    want_out, want_lse = run(*exact, implementation="reference", causal=False)
    np.testing.assert_allclose(lse, want_lse, atol=1e-5)
    np.testing.assert_allclose(np.asarray(out, np.float32), want_out, atol=4e-3)


def test_scale_and_vmap():
    rng = np.random.default_rng(7)
    q, k, v = (normal(rng, 3, 20, h, 8) for h in (2, 1, 1))
    want = run(q * 2.0, k, v)
    got = jax.vmap(lambda *a: attention(*(x[None] for x in a), scale=2.0 / np.sqrt(8)))(q, k, v)
    np.testing.assert_allclose(got[0][:, 0], want[0], atol=2e-6)
    np.testing.assert_allclose(got[1][:, 0], want[1], atol=4e-6)


def test_memory_is_linear_forward_and_backward():
    """The scores of 2,048 rows would take 2 * 2048 * 2048 * 4 bytes = 32 MiB; blocks of them take a fraction."""
    q, k = jnp.zeros((1, 2048, 2, 8)), jnp.zeros((1, 2048, 1, 8))

    def loss(q, k, v):
        return jnp.sum(attention(q, k, v)[0])

    forward = jax.jit(loss).lower(q, k, k).compile().memory_analysis()
    backward = jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, k, k).compile().memory_analysis()
    assert forward.temp_size_in_bytes < 8 * 2**20
    assert backward.temp_size_in_bytes < 8 * 2**20


def test_tiles_above_the_diagonal_are_not_visited():
    kinds = []
    original = xla._walk

    def spy(tiling, step, carry, kind):
        kinds.append(len(tiling.pairs))
        return original(tiling, step, carry, kind)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(xla, "_walk", spy)
        q, k = jnp.zeros((1, 1024, 4, 8)), jnp.zeros((1, 1024, 1, 8))
        jax.eval_shape(lambda q, k: attention(q, k, k), q, k)
        jax.eval_shape(lambda q, k: attention(q, k, k, causal=False), q, k)
    assert min(kinds) <= 0.65 * max(kinds)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": np.zeros((0, 5, 4, 8))}, "at least one example"),
        (
            {"k": np.zeros((2, 0, 2, 8)), "v": np.zeros((2, 0, 2, 8))},
            "at least one example, head, key and head width, got",
        ),
        ({"k": np.zeros((2, 6, 0, 8))}, "at least one example, head"),
        ({"q": np.zeros((2, 5, 3, 8))}, "multiple of k's 2"),
        ({"k": np.zeros((2, 6, 2, 4))}, "k: expected"),
        ({"v": np.zeros((2, 5, 2, 8))}, "v: expected"),
        ({"q_segment": np.ones((2, 5), int)}, "both or neither"),
        ({"q_index": np.ones((2, 6), int)}, "q_index: expected shape"),
        ({"implementation": "flash"}, "implementation: expected one of"),
    ],
)
def test_refuses_what_does_not_fit(change, message):
    given = {"q": np.zeros((2, 5, 4, 8)), "k": np.zeros((2, 6, 2, 8)), "v": np.zeros((2, 6, 2, 8))} | change
    with pytest.raises(ValueError, match=message):
        attention(**given)


# Text-to-visual scores


def whole_scores(q, k, q_mask, visual, q_segment, kv_segment, q_index, kv_index, heads, queries):
    """O(H*R*L): the weights written out, then reduced segment by segment."""
    b, rows, head_count, width = q.shape
    score = np.zeros(visual.shape)
    for n in range(b):
        weight = np.zeros((head_count, rows, visual.shape[1]))
        for h in range(head_count):
            raw = q[n, :, h].astype(np.float64) @ k[n, :, h // (head_count // k.shape[2])].T / np.sqrt(width)
            seen = (q_segment[n][:, None] == kv_segment[n]) & (q_segment[n][:, None] > 0)
            seen &= kv_index[n] <= q_index[n][:, None]
            raw = np.where(seen, raw, -np.inf)
            with np.errstate(invalid="ignore"):
                weight[h] = np.nan_to_num(np.exp(raw - np.logaddexp.reduce(raw, axis=1, keepdims=True)))
        row_weight = weight.mean(0) if heads == "mean" else weight.max(0)
        for s in set(kv_segment[n]) - {0}:
            valid = np.flatnonzero(q_mask[n] & (q_segment[n] == s))
            if len(valid):
                chosen = row_weight[valid[-1:] if queries == "last" else valid]
                reduced = chosen.max(0) if queries == "max" else chosen.mean(0)
                here = visual[n] & (kv_segment[n] == s)
                score[n, here] = reduced[here]
    return score


def visual_case(seed: int, length: int = 50):
    """Two rows: three packed segments (one without a question), and one with padding and fewer query rows."""
    rng = np.random.default_rng(seed)
    segment = np.zeros((2, length), np.int32)
    segment[0] = np.repeat([1, 2, 3], [20, 12, length - 32])
    segment[1, : length - 6] = 1
    visual = (rng.random((2, length)) < 0.7) & (segment > 0)
    q_index = np.array([[15, 18, 19, 40, 44, 45, 47, 0, 0], [30, 31, 32, 33, 0, 0, 0, 0, 0]], np.int32)
    q_mask = np.array([[1, 1, 1, 1, 1, 1, 0, 0, 0], [1, 1, 0, 1, 0, 0, 0, 0, 0]], bool)
    arrays = {"q": normal(rng, 2, 9, 4, 8), "k": normal(rng, 2, length, 2, 8), "q_mask": q_mask, "visual": visual}
    return arrays | {
        "q_segment": np.where(q_mask, np.take_along_axis(segment, q_index, axis=1), 0),
        "kv_segment": segment,
        "q_index": q_index,
        "kv_index": places(2, length),
    }


@functools.partial(jax.jit, static_argnames=("heads", "queries", "block"))
def _scores(given, lse, heads, queries, block):
    return text_to_visual(**given, lse=lse, heads=heads, queries=queries)


def run_scores(given, lse=None, heads="mean", queries="mean", block=16):
    """block: keys that are worked out at once; small, so that short rows have several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(xla, "SCORE_BLOCK", block)
        return _scores(given, lse, heads, queries, block)


def row_lse(given) -> np.ndarray:
    """By the loop, so that a test of the scores compiles the scores alone."""
    segments_and_indices = (given[n] for n in ("q_segment", "kv_segment", "q_index", "kv_index"))
    return loop(given["q"], given["k"], given["k"], *segments_and_indices)[1].astype(np.float32)


@pytest.mark.parametrize("queries", ["mean", "max", "last"])
@pytest.mark.parametrize("heads", ["mean", "max"])
def test_scores_equal_the_whole_matrix(heads, queries):
    given = visual_case(0)
    want = whole_scores(**given, heads=heads, queries=queries)
    assert not want[0, 20:32].any() and want[0, :20].any()
    got = run_scores(given, row_lse(given), heads=heads, queries=queries)
    np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.parametrize("block", [25, 50, 2048])
def test_scores_do_not_depend_on_the_block(block):
    given = visual_case(0)
    want = run_scores(given, row_lse(given))
    np.testing.assert_allclose(run_scores(given, row_lse(given), block=block), want, atol=1e-7)


def test_scores_with_the_log_sum_exp_of_the_layer():
    """As in a model: the rows are gathered from a whole attention, with its log-sum-exp."""
    given = visual_case(1)
    rng = np.random.default_rng(8)
    q_all = normal(rng, 2, 50, 4, 8)
    segment = given["kv_segment"]
    _, lse = run(q_all, given["k"], given["k"], q_segment=segment, kv_segment=segment)
    given["q"] = np.take_along_axis(q_all, given["q_index"][:, :, None, None], axis=1)
    lse = np.take_along_axis(np.asarray(lse), given["q_index"][:, None, :], axis=2)
    want = whole_scores(**given, heads="mean", queries="mean")
    np.testing.assert_allclose(run_scores(given, jnp.asarray(lse)), want, atol=1e-6)
    np.testing.assert_allclose(run_scores(given), want, atol=1e-6)


def test_scores_of_a_row_sum_to_what_it_spends_on_visual_tokens():
    rng = np.random.default_rng(9)
    q, k = normal(rng, 1, 1, 2, 8), normal(rng, 1, 30, 2, 8)
    everything = run_scores({"q": q, "k": k, "q_mask": np.ones((1, 1), bool), "visual": np.ones((1, 30), bool)})
    assert float(everything.sum()) == pytest.approx(1.0, abs=1e-5)
    half = run_scores({"q": q, "k": k, "q_mask": np.ones((1, 1), bool), "visual": np.arange(30)[None] < 15})
    np.testing.assert_allclose(half[:, :15], everything[:, :15], atol=1e-7)
    assert not half[:, 15:].any()


def test_scores_without_a_query_are_zero():
    given = visual_case(2) | {"q_mask": np.zeros((2, 9), bool)}
    for queries in ("mean", "max", "last"):
        assert not np.asarray(run_scores(given, row_lse(given), queries=queries)).any()


def test_large_keys_that_no_row_sees_do_not_spoil_the_scores():
    given = visual_case(3)
    lse = row_lse(given)
    want = run_scores(given, lse)
    hidden = given["kv_segment"] == 2
    spoiled = given | {"k": np.where(hidden[:, :, None, None], np.float32(1e6), given["k"])}
    np.testing.assert_allclose(run_scores(spoiled, lse), want, atol=1e-7)


def test_scores_do_not_hold_the_whole_matrix():
    """32 rows x 16 heads x 16,384 keys are 32 MiB."""
    given = {
        "q": jnp.zeros((1, 32, 16, 8)),
        "k": jnp.zeros((1, 16384, 1, 8)),
        "q_mask": jnp.ones((1, 32), bool),
        "visual": jnp.ones((1, 16384), bool),
    }
    compiled = jax.jit(lambda given: text_to_visual(**given)).lower(given).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 8 * 2**20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": "sum"}, "heads: expected one of"),
        ({"queries": "first"}, "queries: expected one of"),
        ({"q_mask": np.ones((2, 8), bool)}, "q_mask: expected shape"),
        ({"visual": np.ones((2, 9), bool)}, "visual: expected shape"),
        ({"lse": np.ones((2, 9, 4))}, "lse: expected"),
    ],
)
def test_scores_refuse_what_does_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        text_to_visual(**(visual_case(4) | change))


@pytest.mark.parametrize("queries", ["mean", "max", "last"])
@pytest.mark.parametrize("heads", ["mean", "max"])
def test_scores_without_a_known_lse(monkeypatch, heads, queries):
    """One pass over the keys, by blocks of rows: values of the whole matrix, gradients of two passes."""
    given = visual_case(0)
    want = whole_scores(**given, heads=heads, queries=queries)
    rest = {name: value for name, value in given.items() if name not in ("q", "k")}
    pull = np.random.default_rng(1).normal(size=want.shape).astype(np.float32)
    found = []
    for most in (1 << 18, 3 * given["k"].shape[1] * len(given["k"]), 1, None):  # all rows, three at a time, single ones
        monkeypatch.setattr(xla, "WHOLE_ROWS", most)

        def loss(q, k, most=most):
            segments_and_indices = {n: rest[n] for n in ("q_segment", "kv_segment", "q_index", "kv_index")}
            lse = visual.log_sum_exp(q, k, **segments_and_indices) if most is None else None
            score = text_to_visual(q, k, **rest, lse=lse, heads=heads, queries=queries)
            return jnp.sum(score * pull), score

        (_, score), gradients = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(given["q"], given["k"])
        np.testing.assert_allclose(score, want, atol=1e-6)
        found.append(gradients)
    for *once, twice in zip(*found, strict=True):
        for gradient in once:
            assert np.isfinite(gradient).all()
            np.testing.assert_allclose(gradient, twice, atol=2e-6)


def test_no_query_rows_score_nothing():
    given = visual_case(4)
    none = {name: value[:, :0] for name, value in given.items() if name in ("q", "q_mask", "q_segment", "q_index")}
    score = text_to_visual(**(given | none))
    assert score.shape == given["k"].shape[:2] and not score.any()
    assert attention(none["q"], given["k"], given["k"])[0].shape == none["q"].shape
