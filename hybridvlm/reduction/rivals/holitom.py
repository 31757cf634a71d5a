"""HoliTom (arXiv 2505.21334): cells that stand still over frames are averaged; inside, one merge by attention."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from hybridvlm.config import ScoreOptions
from hybridvlm.ops.fold import Selection
from hybridvlm.ops.layer_aux import AttentionAux
from hybridvlm.ops.tokens import Tokens
from hybridvlm.reduction import schedules, scores
from hybridvlm.reduction.choose import apportion, cosine, flagged, frames_of, ranks, unit
from hybridvlm.reduction.cluster import anchored_weights, clusters, mean_weights, segments_of, time_means
from hybridvlm.reduction.methods import FEATURES, LAST_QUERY, Aux, PlanView, _register
from hybridvlm.reduction.rivals.oneshot import nearest_attention

STILL, BETA, NEIGHBOURS, DEPTH = 0.8, 0.6, 7, 18 / 28
_LAST = ScoreOptions(queries="last")


@_register("holitom-outer", "input", reads=FEATURES, needs=("attention",))
def holitom(visual: jax.Array, frame_count: jax.Array, plan: PlanView, attention: jax.Array) -> Selection:
    """before layer 0, still cells are averaged over time, of the others what the tower attends to stays

    The outer stage of the pair "holitom" (pairs.py).
    """
    frames, m = visual.shape[1:3]
    row = (visual, frames_of(frame_count, frames), attention, plan.keep(0, frame_count * m))
    return Selection(*jax.lax.map(lambda r: holitom_video(*r), row))


def still_windows(still: jax.Array, count: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(where a window ends [F] bool, how long each cell has stood still [F,m] int32): still [F,m], whether a cell
    is as in the frame before (row 0: False); count of real frames.

    Windows are chosen by dynamic programming to spare the most tokens: a window of w frames spares w - 1 for every
    cell that stands still throughout. On a tie the last window is the shorter.
    """
    frames = still.shape[0]

    def longer(run: jax.Array, now: jax.Array) -> tuple[jax.Array, jax.Array]:
        run = jnp.where(now, run + 1, 0)
        return run, run

    _, run = jax.lax.scan(longer, jnp.zeros(still.shape[1], jnp.int32), still)
    start = jnp.arange(frames)

    def extend(best: jax.Array, end: jax.Array) -> tuple[jax.Array, jax.Array]:
        """best[e]: most spared by the first e frames."""
        steps = end - start
        gain = steps * jnp.sum(run[end][None] >= jnp.maximum(steps, 1)[:, None], axis=-1)
        value = jnp.where(start <= end, best[:-1] + gain * (steps > 0), -1)
        first = frames - 1 - jnp.argmax(jnp.flip(value))
        return best.at[end + 1].set(value[first]), first

    best = jnp.zeros(frames + 1, jnp.int32)
    _, first = jax.lax.scan(extend, best, jnp.arange(frames))

    def back(_: int, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        ends, at = carry
        here = jnp.maximum(at - 1, 0)
        return jnp.where(at > 0, ends.at[here].set(True), ends), jnp.where(at > 0, first[here], 0)

    ends, _ = jax.lax.fori_loop(0, frames, back, (jnp.zeros(frames, bool), count))
    return ends, run


def holitom_video(
    visual: jax.Array, real: jax.Array, attention: jax.Array, keep: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(score [M], into [1,M], weight [1,M]) of one video: visual [F,m,D], real [F] bool, attention [F,m], keep of
    its tokens.

    A cell stands still where its cosine with the frame before is above .8. In each window the cells that do
    throughout are averaged, and density peaks (k = 7) merge them further, .6 the centre and .4 the mean of its
    cluster; of the other cells of a frame those of most attention stay. As shipped (no spatial merging of moving
    cells), but each part's count is handed out exactly, where the release rounds up, and a mean stands at its cell
    of the window's first frame.
    """
    frames = visual.shape[0]
    before = jnp.concatenate([visual[:1], visual[:-1]])
    still = (cosine(visual, before) > STILL) & (real & (jnp.arange(frames) > 0))[:, None]
    ends, run = still_windows(still, real.sum())
    window = segments_of(ends)
    number = jnp.arange(frames)
    first = jnp.full(frames, frames).at[window].min(number)[window]
    last = jnp.full(frames, -1).at[window].max(jnp.where(real, number, -1))[window]
    fixed = ((last > first)[:, None] & (run[jnp.maximum(last, 0)] >= (last - first)[:, None])) & real[:, None]
    return parts_selection(visual, real, attention, keep, window, first, fixed, beta=BETA)


def parts_selection(
    visual: jax.Array,
    real: jax.Array,
    attention: jax.Array | None,
    keep: jax.Array,
    window: jax.Array,
    first: jax.Array,
    fixed: jax.Array,
    beta: float | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(score [M], into [1,M], weight [1,M]) of a video in windows [F], each begun at frame first [F], with `fixed`
    cells [F,m].

    The parts, a window's fixed cells and a frame's other cells, share `keep` by their sizes. Fixed cells are averaged
    over time and then clustered: with beta around their centres, None: as means. Other cells stay by attention; None:
    they are clustered, too.
    """
    frames, m, _ = visual.shape
    number = jnp.arange(frames)
    opens = (first == number) & real
    moving = real[:, None] & ~fixed
    sizes = jnp.stack([jnp.where(opens[:, None], fixed, False).sum(-1), moving.sum(-1)], axis=1)
    # a window's fixed part comes before the frames that it holds
    quota = apportion(keep, sizes.reshape(-1)).reshape(frames, 2)
    means = time_means(jnp.where(real[:, None, None], visual, 0), jnp.where(real, window, frames - 1))
    joins, centre = jax.vmap(lambda x, mask, n: clusters(x, mask, NEIGHBOURS, n))(
        means, fixed & opens[:, None], quota[:, 0]
    )
    within = jax.vmap(mean_weights if beta is None else lambda into: anchored_weights(into, beta))(joins)
    length = jnp.zeros(frames, jnp.float32).at[window].add(real.astype(jnp.float32))[window]
    joins, within = joins[first], within[first]
    at = jnp.where(fixed & (joins < m), first[:, None] * m + joins, frames * m)
    if attention is None:
        own, chosen = jax.vmap(lambda x, mask, n: clusters(x, mask, NEIGHBOURS, n))(visual, moving, quota[:, 1])
        apart = jax.vmap(mean_weights)(own)
        tiebreak = jnp.zeros((frames, m), jnp.float32)
    else:
        chosen = moving & (ranks(jnp.where(moving, attention, -jnp.inf)) < quota[:, 1:])
        own, apart, tiebreak = jnp.where(chosen, jnp.arange(m), m), jnp.ones((frames, m), jnp.float32), attention
    weight = jnp.where(fixed, within / jnp.maximum(length, 1.0)[:, None], apart)
    anchors = (centre & opens[:, None]) | chosen
    into = jnp.where(moving & (own < m), number[:, None] * m + own, at)
    score = flagged(anchors.reshape(1, -1), tiebreak.reshape(1, -1))[0]
    return score, into.reshape(1, -1).astype(jnp.int32), weight.reshape(1, -1)


@_register(
    "holitom-inner",
    "decoder",
    reads=LAST_QUERY,
    scoring=lambda visual, kept, frames, width: 2 * visual * visual * width,
    score=_LAST,
    all_heads=True,
    merges=True,
    sites=nearest_attention(DEPTH),
    at_depth=nearest_attention,
    curve=lambda schedule, layers: schedules.ratio_curve,
    where=f"the * nearest to {DEPTH:.2g} of the depth, or @another",
)
def holitom_inner(layer: int, aux: Aux, tokens: Tokens, plan: PlanView, segments: int) -> Selection:
    """one merge at a depth: what the last question token attends to least, into the most alike

    Means of a kept token and all that goes into it; the release averages one after the other, so that its result
    depends on the order.
    """
    assert isinstance(aux, AttentionAux)  # its site is an attention layer
    score = scores.attention_score(aux, tokens, _LAST)
    into = jnp.full(tokens.segment.shape, tokens.length, jnp.int32)
    for segment in range(1, segments + 1):
        visual = tokens.visual & (tokens.segment == segment)
        keep = plan.keep_of_entering(layer + 1, visual.sum(-1, dtype=jnp.int32))
        found = jax.vmap(into_most_alike)(tokens.x, visual, score, keep)
        into = jnp.where(visual, found, into)
    weight = jax.vmap(mean_weights)(into)
    return Selection(score, into[:, None], weight[:, None])


def into_most_alike(x: jax.Array, visual: jax.Array, score: jax.Array, keep: jax.Array) -> jax.Array:
    """Where visual tokens of x [L,D] go: the `keep` of highest score stay, others to the most alike of those; [L] int32,
    L (nowhere) where none stays."""
    stays = visual & (ranks(jnp.where(visual, score, -jnp.inf)) < keep)
    y = unit(x)
    best = jax.lax.map(lambda row: jnp.argmax(jnp.where(stays, y @ row, -jnp.inf)), y, batch_size=min(len(y), 256))
    return jnp.where(stays, jnp.arange(len(y)), jnp.where(stays.any(), best, len(y))).astype(jnp.int32)
