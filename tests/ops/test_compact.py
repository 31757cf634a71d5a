"""compact against a plain loop, and the laws of dropping."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridvlm.ops.compact import IMPLEMENTATIONS, compact, compact_indices
from hybridvlm.ops.tokens import Tokens

LENGTH = 24  # one length and few capacities, so that hypothesis does not compile anew for every case
CAPACITIES = (8, LENGTH, LENGTH + 4)
WIDTH = 3


def survivors(segment, visual, score, keep) -> list[int]:
    """One row, the rule written as loops."""
    chosen = set()
    for s in range(1, len(keep) + 1):
        rivals = [i for i in range(len(segment)) if segment[i] == s and visual[i]]
        rank = sorted(rivals, key=lambda i: (np.isnan(score[i]), 0.0 if np.isnan(score[i]) else -score[i], i))
        chosen |= set(rank[: max(0, keep[s - 1])])
    return [i for i in range(len(segment)) if segment[i] > 0 and (not visual[i] or i in chosen)]


def make_tokens(segment: np.ndarray, visual: np.ndarray, seed: int = 0) -> Tokens:
    """Every field has values of its own, so that a field gathered from a wrong place shows."""
    rng = np.random.default_rng(seed)
    b, length = segment.shape
    return Tokens(
        x=jnp.asarray(rng.normal(size=(b, length, WIDTH)), jnp.float32),
        position=jnp.asarray(rng.integers(0, 1000, (b, length, 3)), jnp.int32),
        segment=jnp.asarray(segment, jnp.int32),
        visual=jnp.asarray(visual),
        query=jnp.asarray((segment > 0) & ~visual & (rng.random((b, length)) < 0.5)),
        index=jnp.asarray(rng.integers(0, 1000, (b, length)), jnp.int32),
        frame=jnp.asarray(rng.integers(0, 9, (b, length)), jnp.int32),
        extra={
            "deep": jnp.asarray(rng.normal(size=(b, length, 2, 2)), jnp.float32),
            "flag": jnp.asarray(rng.random((b, length)) < 0.5),
        },
    )


def fields(tokens: Tokens) -> dict[str, np.ndarray]:
    named = {n: getattr(tokens, n) for n in ("x", "position", "segment", "visual", "query", "index", "frame")}
    return {n: np.asarray(a) for n, a in (named | tokens.extra).items()}


EMPTY = {"index": -1, "frame": -1}
_current = "sort"


@pytest.fixture(params=sorted(IMPLEMENTATIONS), autouse=True)
def implementation(request, monkeypatch):
    """Every test here runs on every implementation."""
    monkeypatch.setattr(sys.modules[__name__], "_current", request.param)


@functools.partial(jax.jit, static_argnums=(3, 4))
def _jitted(tokens, score, keep, capacity, implementation):
    return compact(tokens, score, keep, capacity, implementation)


def jitted(tokens, score, keep, capacity):
    return _jitted(tokens, score, keep, capacity, _current)


_jitted_indices = jax.jit(compact_indices, static_argnums=(4, 5))


def jitted_indices(segment, visual, score, keep, capacity):
    return _jitted_indices(segment, visual, score, keep, capacity, _current)


ROW = st.tuples(
    st.lists(st.integers(0, 9), min_size=0, max_size=3),  # tokens in each segment
    st.lists(st.booleans(), min_size=LENGTH, max_size=LENGTH),
    st.lists(
        st.sampled_from([0.0, -0.0, 1.0, 2.0, -1.0, np.nan, np.inf, -np.inf, 0.3]), min_size=LENGTH, max_size=LENGTH
    ),
    st.lists(st.integers(0, 10), min_size=3, max_size=3),
)


@settings(max_examples=100, deadline=None)
@given(st.tuples(ROW, ROW), st.sampled_from([1, 3]), st.booleans())
def test_equals_the_loop(rows, segments, slack):
    segment = np.zeros((2, LENGTH), np.int64)
    for row, (sizes, *_) in zip(segment, rows, strict=True):
        filled = np.repeat(np.arange(1, segments + 1), [*sizes, 0, 0, 0][:segments])[:LENGTH]
        row[: len(filled)] = filled
    visual = np.array([r[1] for r in rows]) & (segment > 0)
    score = np.array([r[2] for r in rows], np.float32)
    keep = np.array([r[3][:segments] for r in rows])
    expected = [survivors(*row) for row in zip(segment, visual, score, keep, strict=True)]
    capacity = CAPACITIES[-1] if slack else next(c for c in CAPACITIES if c >= max(len(e) for e in expected))

    tokens = make_tokens(segment, visual)
    got = fields(jitted(tokens, jnp.asarray(score), jnp.asarray(keep, jnp.int32), capacity))
    for name, before in fields(tokens).items():
        wanted = np.full((2, capacity, *before.shape[2:]), EMPTY.get(name, 0), before.dtype)
        for b, places in enumerate(expected):
            wanted[b, : len(places)] = before[b, places]
        np.testing.assert_array_equal(got[name], wanted, err_msg=name)


def simple(length: int = 8) -> tuple[Tokens, np.ndarray]:
    """Six visual tokens, a text token before and one after."""
    visual = np.array([[False] + [True] * (length - 2) + [False]])
    return make_tokens(np.ones((1, length), int), visual), visual


def kept(tokens: Tokens, score, keep, capacity: int) -> list[int]:
    indices, valid = jitted_indices(tokens.segment, tokens.visual, jnp.asarray(score), jnp.asarray(keep), capacity)
    return np.asarray(indices)[np.asarray(valid)].tolist()


def test_ties_go_to_the_earlier_and_zeros_are_equal():
    tokens, _ = simple()
    assert kept(tokens, [[0.0] * 8], [[2]], 4) == [0, 1, 2, 7]
    assert kept(tokens, [[0, -0.0, 0.0, -0.0, 0.0, 0, 0, 0]], [[2]], 4) == [0, 1, 2, 7]


def test_a_row_that_fills_the_capacity_exactly():
    tokens, _ = simple(LENGTH)
    score = np.random.default_rng(2).permutation(LENGTH)[None].astype(np.float32)
    segment, visual = np.ones(LENGTH, int), np.asarray(tokens.visual)[0]
    for keep in (0, LENGTH - 3, LENGTH):
        places = survivors(segment, visual, score[0], [keep])
        assert kept(tokens, score, [[keep]], len(places)) == places


def test_nan_ranks_below_minus_infinity():
    tokens, _ = simple()
    score = [[0, np.nan, np.nan, -np.inf, np.nan, -np.inf, np.nan, 0]]
    assert kept(tokens, score, [[2]], 4) == [0, 3, 5, 7]
    assert kept(tokens, score, [[3]], 5) == [0, 1, 3, 5, 7]


def test_segments_do_not_compete():
    segment = np.array([[1, 1, 1, 2, 2, 2, 3, 3, 0]])
    visual = np.array([[True, True, False, True, True, True, True, False, False]])
    tokens = make_tokens(segment, visual)
    score = np.arange(9.0)[None]
    assert kept(tokens, score, [[1, 2, 0]], 9) == [1, 2, 4, 5, 7]
    assert kept(tokens, score, [[1, 2]], 9) == [1, 2, 4, 5, 7], "a segment beyond S keeps no visual token"


def test_visual_flags_on_padding_do_not_matter():
    tokens, _ = simple()
    segment = tokens.segment.at[:, 5:].set(0)
    assert kept(tokens.replace(segment=segment), [np.arange(8.0)], [[2]], 6) == [0, 3, 4]


def test_a_row_of_padding_stays_padding():
    tokens = make_tokens(np.zeros((1, 6), int), np.zeros((1, 6), bool))
    got = jitted(tokens, jnp.zeros((1, 6)), jnp.array([[3]]), 4)
    assert not got.segment.any() and not got.x.any() and not got.visual.any() and not got.extra["deep"].any()
    assert (got.index == -1).all() and (got.frame == -1).all()


def test_compacting_twice_equals_compacting_once():
    rng = np.random.default_rng(3)
    tokens = make_tokens(np.ones((2, 40), int), rng.random((2, 40)) < 0.8)
    score = jnp.asarray(rng.normal(size=(2, 40)), jnp.float32)
    with_score = tokens.replace(extra=tokens.extra | {"score": score})
    first = jitted(with_score, score, jnp.array([[20], [18]]), 36)
    second = jitted(first, first.extra["score"], jnp.array([[9], [5]]), 25)
    once = jitted(with_score, score, jnp.array([[9], [5]]), 25)
    for name, array in fields(once).items():
        np.testing.assert_array_equal(fields(second)[name], array, err_msg=name)


@pytest.mark.parametrize("length", [256, 700])
def test_implementations_agree_on_long_rows(length):
    """Several blocks of places, packed rows, many ties, survivors beyond the capacity."""
    rng = np.random.default_rng(length)
    segment = np.sort(rng.integers(0, 4, (2, length)), axis=1)[:, ::-1].astype(np.int32)
    visual = rng.random((2, length)) < 0.8
    score = rng.choice(np.array([0, -0.0, 1, 2, -1, np.nan, np.inf, -np.inf, 0.3, 1e-30], np.float32), (2, length))
    keep = rng.integers(0, length // 3, (2, 3)).astype(np.int32)
    for capacity in (40, length):
        got = jitted_indices(segment, visual, score, keep, capacity)
        expected = _jitted_indices(segment, visual, score, keep, capacity, "sort")
        for mine, theirs in zip(got, expected, strict=True):
            np.testing.assert_array_equal(mine, theirs)


def test_under_vmap():
    rng = np.random.default_rng(4)
    tokens = make_tokens(np.ones((3, 12), int), rng.random((3, 12)) < 0.7)
    score, keep = jnp.asarray(rng.normal(size=(3, 12))), jnp.array([[1], [2], [3]])
    rows = jax.tree.map(lambda a: a[:, None], (tokens, score, keep))
    got = jax.jit(jax.vmap(lambda t, s, n: compact(t, s, n, 10, _current)))(*rows)
    wanted = jitted(tokens, score, keep, 10)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(a[:, 0], b)


def test_gradient_reaches_x_and_not_the_score():
    tokens, _ = simple()
    score = jnp.arange(8.0)[None]
    weight = jnp.asarray(np.random.default_rng(5).normal(size=(1, 5, WIDTH)), jnp.float32)

    def loss(x, score):
        return jnp.sum(compact(tokens.replace(x=x), score, jnp.array([[2]]), 5, _current).x * weight)

    dx, dscore = jax.jit(jax.grad(loss, (0, 1)))(tokens.x, score)
    wanted = np.zeros((1, 8, WIDTH), np.float32)
    wanted[0, [0, 5, 6, 7]] = weight[0, :4]
    np.testing.assert_array_equal(dx, wanted)
    assert not dscore.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"score": np.zeros((1, 7))}, "score: expected shape"),
        ({"keep": np.zeros((2, 1), int)}, "keep: expected"),
        ({"keep": np.zeros((1, 0), int)}, "keep: expected"),
        ({"capacity": 0}, "capacity: expected at least 1"),
        ({"implementation": "guess"}, "implementation: expected one of"),
    ],
)
def test_refuses_what_does_not_fit(change, message):
    tokens, _ = simple()
    given = {"score": np.zeros((1, 8)), "keep": np.array([[2]]), "capacity": 4, "implementation": None} | change
    with pytest.raises(ValueError, match=message):
        compact(
            tokens, jnp.asarray(given["score"]), jnp.asarray(given["keep"]), given["capacity"], given["implementation"]
        )
