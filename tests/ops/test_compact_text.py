"""Text of frames' own at a drop, against the rule written as loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybridvlm.ops.compact import IMPLEMENTATIONS, compact, compact_indices
from hybridvlm.ops.frame_text import FRAME_TEXT, FrameTextRule
from hybridvlm.ops.tokens import Tokens

LENGTH, FRAMES, SEGMENTS = 40, 9, 2


def stays(segment, visual, score, keep, owner, frame, most):
    """One row: what stays, as a list of positions."""
    rank = lambda i: (np.isnan(score[i]), 0.0 if np.isnan(score[i]) else -score[i], i)  # noqa: E731
    seen = []
    for s, n in enumerate(keep, start=1):
        seen += sorted((i for i in range(len(segment)) if segment[i] == s and visual[i]), key=rank)[:n]
    with_text = {}
    for s, n in enumerate(most, start=1):
        # of each frame with text of its own and a token left, the best token
        best = {}
        for f in {owner[i] - 1 for i in range(len(segment)) if segment[i] == s and owner[i]}:
            own = [np.nan_to_num(score[i], nan=-np.inf) for i in seen if frame[i] == f]
            if own:
                best[f] = max(own)
        with_text[s] = sorted(best, key=lambda f: (-best[f], f))[:n]
    text = [
        i
        for i in range(len(segment))
        if segment[i] and not visual[i] and (not owner[i] or owner[i] - 1 in with_text.get(segment[i], []))
    ]
    return sorted(seen + text)


def draw(rng):
    """A row of one or two packed samples: of each some text, then frames with own text around them, some more text, and padding."""
    segment, visual, owner, frame = [], [], [], []
    number = 0
    for s in range(1, rng.integers(1, SEGMENTS + 1) + 1):
        parts = [(0, -1)] * rng.integers(0, 3)
        for _ in range(rng.integers(0, 5)):
            own, cells = rng.integers(0, 3), rng.integers(0, 4)
            parts += (
                [(number + 1, -1)] * own + [(0, number)] * cells + [(number + 1, -1)] * (own and rng.integers(0, 2))
            )
            number += 1
        parts += [(0, -1)] * rng.integers(1, 3)
        parts = parts[: LENGTH // SEGMENTS]
        segment += [s] * len(parts)
        owner += [o for o, _ in parts]
        frame += [f for _, f in parts]
    spare = LENGTH - len(segment)
    segment, owner, frame = (np.pad(np.asarray(a, np.int32), (0, spare)) for a in (segment, owner, frame))
    visual = (segment > 0) & (owner == 0) & (frame >= 0)
    visual[len(visual) - spare :] = False
    score = np.round(rng.normal(size=LENGTH), 1).astype(np.float32)  # rounded, so that some are equal
    score[rng.random(LENGTH) < 0.1] = np.nan
    return segment, visual, score, owner, np.where(visual, frame, -1)


@functools.partial(jax.jit, static_argnames="implementation")
def indices(segment, visual, score, keep, owner, frame, most, implementation):
    rule = FrameTextRule(owner, frame, most, FRAMES)
    return compact_indices(segment, visual, score, keep, LENGTH, implementation, rule)


@pytest.mark.parametrize("implementation", sorted(IMPLEMENTATIONS))
def test_text_of_frames_goes_by_the_rule(implementation):
    rng = np.random.default_rng(0)
    rows = [draw(rng) for _ in range(200)]
    keep, most = (rng.integers(0, 6, (200, SEGMENTS)).astype(np.int32) for _ in range(2))
    segment, visual, score, owner, frame = (np.stack(part) for part in zip(*rows, strict=True))
    found, valid = indices(segment, visual, score, keep, owner, frame, most, implementation=implementation)
    dropped = 0
    for b in range(200):
        want = stays(segment[b], visual[b], score[b], keep[b], owner[b], frame[b], most[b])
        assert np.asarray(found[b])[np.asarray(valid[b])].tolist() == want
        dropped += int(((owner[b] > 0) & (segment[b] > 0)).sum()) - sum(owner[b][i] > 0 for i in want)
    assert dropped > 100


def test_what_belongs_to_a_token_goes_along_and_no_other_text_is_looked_at():
    """Three frames of two tokens with one token of text each: the middle one has none left."""
    owner = jnp.asarray([[0, 1, 0, 0, 2, 0, 0, 3, 0, 0, 0, 0]])
    frame = jnp.asarray([[-1, -1, 0, 0, -1, 1, 1, -1, 2, 2, -1, -1]])
    index = jnp.arange(12)[None]
    segment = (index < 11).astype(jnp.int32)
    tokens = Tokens(index[..., None] * 1.0, index, segment, frame >= 0, index == 10, index, frame, {FRAME_TEXT: owner})
    score = jnp.asarray([[9.0, 9, 5, 1, 9, 0, 0, 9, 1, 4, 9, 9]])
    keep = jnp.asarray([[3]])

    @jax.jit
    def run(most):
        return compact(tokens, score, keep, 10, frame_text=FrameTextRule(owner, frame, most, 3))

    def kept(most):
        out = run(jnp.asarray([[most]]))
        np.testing.assert_array_equal(out.x[..., 0], np.where(out.segment > 0, out.index, 0))
        return out.index[0][out.segment[0] > 0].tolist()

    # tokens 2, 3 and 9 stay; of as many frames as tokens, of one frame, and of none
    assert kept(3) == [0, 1, 2, 3, 7, 9, 10]
    assert kept(1) == [0, 1, 2, 3, 9, 10]
    assert kept(0) == [0, 2, 3, 9, 10]
