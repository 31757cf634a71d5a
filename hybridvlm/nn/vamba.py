"""VAMBA's two streams (arXiv 2503.11579): text layers that read the video by cross-attention, Mamba-2 layers on the video.

    layer i:  h = RMSNorm(x);  x <- x + a self_attention(h) + (1 - a) cross_attention(h, v_i);  x <- x + MLP(RMSNorm(x))
              v_(i+1) = v_i + Mamba2(RMSNorm(v_i))

The video never reads the text, so the keys and values that layer i's cross-attention reads depend on the video alone: they
are made once, in a `VideoMemory`, and serve every question. The last layer's Mamba block reaches no output; its
parameters exist (checkpoints have them) and it is not run.

The video is walked in segments of tokens, all layers of one segment before the next: what a segment needs is the state of
every Mamba layer, so that nothing but keys, values and these states grows with the video or is kept of it.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from hybridvlm.config import VambaConfig
from hybridvlm.nn.attention import AttentionStack, gather_queries
from hybridvlm.nn.caches import AttentionCache, MambaCache
from hybridvlm.nn.decoder import DropPlan, ScoreFn, StraightThrough, visual_counts
from hybridvlm.nn.mamba2 import MambaStack
from hybridvlm.nn.mlp import MlpStack
from hybridvlm.nn.scan import REMAT
from hybridvlm.nn.vamba_layers import (
    SEGMENT_TOKENS,
    CrossMemory,
    CrossStack,
    Params,
    start_state,
    text_stage,
    video_stage,
)
from hybridvlm.ops.layer_aux import AttentionAux
from hybridvlm.ops.norms import rms_norm
from hybridvlm.ops.tokens import Tokens
from hybridvlm.parallel.sequence import compact_row, row_total

# Tokens.extra [B,T] of the text: the segment of the video that a token reads, where that is not its own
READS = "video_segment"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VideoMemory:
    """A video as the text layers see it.

    stages: one CrossMemory per run of layers that see the same tokens (one for a dense video). state: the Mamba states after
    the last token, stacked over layers (the last layer's stays at 0: it is not run), one MambaCache per stage: what the next piece of
    the video starts from. survivors, kept: as in DecoderOutput. index, visual [B,M]: of the tokens that the last layer reads.
    videos: how many of the B rows are of videos, if the last ones only fill a mesh up (None: all). peak_bytes: that the program which
    made it needed, by its compiler.
    """

    stages: tuple[CrossMemory, ...]
    state: tuple[MambaCache, ...]
    survivors: tuple[tuple[jax.Array, jax.Array], ...]
    kept: jax.Array
    index: jax.Array
    visual: jax.Array
    videos: int | None = dataclasses.field(default=None, metadata={"static": True})
    peak_bytes: int = dataclasses.field(default=0, metadata={"static": True})

    @property
    def rows(self) -> int:
        return self.index.shape[0]


class VambaDecoder(nn.Module):
    """Parameters of both streams, stacked over layers: attention, cross, mlp (text), mamba (video), norm_f (text)."""

    config: VambaConfig

    def setup(self):
        c = self.config
        self.attention = AttentionStack(c)
        self.cross = CrossStack(c)
        self.mlp = MlpStack(c)
        self.mamba = MambaStack(c.mixer)
        self.norm_f = self.param("norm_f", nn.initializers.ones, (c.width,))

    def stacks(self) -> Params:
        """The parameters as the plain nested dict that the functions of this file take."""
        names = ("attention", "cross", "mlp", "mamba")
        return {name: getattr(self, name)() for name in names} | {"norm_f": self.norm_f}


def _stages(c: VambaConfig, plan: DropPlan | None) -> list[tuple[int, int]]:
    """(first layer, one past the last) of every run of layers that see the same video tokens."""
    edges = [0, *(layer + 1 for layer in (plan.drops if plan is not None else ())), c.layers]
    return list(itertools.pairwise(edges))


def no_video(c: VambaConfig, batch: int, dtype: Any) -> VideoMemory:
    """The memory of text alone: nothing to read, in every layer."""
    nothing = jnp.zeros((c.layers, batch, 0, c.kv_heads * c.head_dim), dtype)
    stage = CrossMemory(nothing, nothing, jnp.zeros((batch, 0), jnp.int32))
    state = start_state(c, c.layers, batch, dtype)
    none = jnp.zeros((batch, 0), jnp.int32)
    return VideoMemory((stage,), (state,), (), jnp.zeros((1, batch, 1), jnp.int32), none, none > 0)


def prefill(
    params: Params,
    c: VambaConfig,
    video: Tokens,
    text: Tokens | None = None,
    *,
    plan: DropPlan | None = None,
    score_fn: ScoreFn | None = None,
    state: tuple[MambaCache, ...] | None = None,
    decode_capacity: int = 0,
    segments: int = 1,
    query_capacity: int | None = None,
    counts: jax.Array | None = None,
    segment_tokens: int = SEGMENT_TOKENS,
    remat: str = "layer",
    straight_through: StraightThrough | None = None,
) -> tuple[VideoMemory, Tokens | None, tuple[AttentionCache, ...]]:
    """Walk the video, and the text next to it, through all layers: (memory, text after the final norm, its caches).

    Args:
        params: the stacks of `VambaDecoder.stacks`.
        c: of the model, or of a device's part; where that cuts rows, `video` is a shard of them and text is whole.
        video: the visual tokens, x [B,M,D].
        text: x [B,T,D]; `extra[READS]` says whose video a token reads where that is not its own segment's. None: the memory
            serves any question.
        plan: after which layers video tokens drop; its rows are of the video alone.
        score_fn: (layer, aux, video) -> [B,M], ranks them; without `text` aux is None.
        state: what a piece of the video before this one left (VideoMemory.state), for dense videos.
        decode_capacity: empty cache slots for tokens to come.
        segments: videos packed in a row.
        query_capacity: most question rows of an example (default: the text's length).
        counts: [B,S], visual tokens that each example came with, when some were dropped before (default: those here).
        segment_tokens: most video tokens that all layers take at once.
        remat: what the backward pass finds kept of a layer, a name of `nn.scan.REMAT`.
        straight_through: as of `nn.decoder.prefill`.

    Raises:
        ValueError: for a plan without score_fn, one that drops after a carried state, or an unknown remat.
    """
    drops = plan.drops if plan is not None else ()
    _check(drops, score_fn, state, remat)
    given = row_total(c, visual_counts(video, segments))
    counts = given if counts is None else counts
    question, reads = None, None
    if text is not None:
        reads = text.extra.get(READS, text.segment)
        if drops:
            question = gather_queries(text.query, min(query_capacity or text.length, text.length))
    memories, states, caches, survivors, kept = [], [], [], [], [given]
    for at, (first, stop) in enumerate(_stages(c, plan)):
        before = None if state is None else state[at]
        x, memory, after = video_stage(params, c, first, stop, video.x, video.segment, before, segment_tokens, remat)
        memories.append(memory)
        states.append(after)
        aux = None
        if text is not None:
            x_text, cache, aux = text_stage(
                params,
                c,
                first,
                text.x,
                text.segment,
                text.position,
                memory,
                decode_capacity=decode_capacity,
                reads=reads,
                question=question if stop < c.layers else None,
                remat=remat,
            )
            text = text.replace(x=x_text)
            caches.append(cache)
        if stop < c.layers:
            # another stage begins after a drop alone
            assert plan is not None and score_fn is not None
            scored = (_cut(aux, video.length), video.replace(x=x))
            video = _drop(c, plan, stop, score_fn, *scored, counts, straight_through)
            survivors.append((video.index, video.visual))
            kept.append(row_total(c, visual_counts(video, segments)))
    whole = VideoMemory(tuple(memories), tuple(states), tuple(survivors), jnp.stack(kept), video.index, video.visual)
    if text is not None:
        text = text.replace(x=rms_norm(text.x, params["norm_f"], c.norm_eps))
    return whole, text, tuple(caches)


def _drop(
    c: VambaConfig,
    plan: DropPlan,
    stop: int,
    score_fn: ScoreFn,
    aux: AttentionAux | None,
    video: Tokens,
    counts: jax.Array,
    straight_through: StraightThrough | None,
) -> Tokens:
    """The video's tokens that enter layer `stop`, by the score after the layer before it."""
    keep, scored = plan.keep(stop, counts), (aux, video)
    # scores that only choose carry no gradient
    score = score_fn(stop - 1, *(scored if straight_through is not None else jax.lax.stop_gradient(scored)))
    assert isinstance(score, jax.Array)  # methods that merge are refused
    if straight_through is not None:
        video = straight_through(video, score, keep)
    return compact_row(c, video, score, keep, plan.row_length(stop))


def _check(drops: tuple[int, ...], score_fn: ScoreFn | None, state: Any, remat: str) -> None:
    if drops and score_fn is None:
        raise ValueError("score_fn: a plan that drops needs it, got None")
    if drops and state is not None:
        raise ValueError(
            "state: a video under a plan that drops is encoded whole, since its tokens compete; got a state"
        )
    if remat not in REMAT:
        raise ValueError(f"remat: expected one of {sorted(REMAT)}, got {remat!r}")


def _cut(aux: AttentionAux | None, length: int) -> AttentionAux | None:
    """The aux without the positions that filled the memory's rows up to whole pieces."""
    return None if aux is None else dataclasses.replace(aux, k=aux.k[:, :length])


def prefill_text(
    params: Params, c: VambaConfig, text: Tokens, memory: VideoMemory, *, decode_capacity: int = 0, remat: str = "layer"
) -> tuple[Tokens, tuple[AttentionCache, ...]]:
    """Prompts over a memory that is there: text x [B*Q,T,D] with Q questions on each of B videos -> (text, caches)."""
    caches, first, x = [], 0, text.x
    options: dict[str, Any] = {"decode_capacity": decode_capacity, "reads": text.extra.get(READS), "remat": remat}
    for stage in memory.stages:
        x, cache, _ = text_stage(params, c, first, x, text.segment, text.position, stage, **options)
        caches.append(cache)
        first += stage.k.shape[0]
    return text.replace(x=rms_norm(x, params["norm_f"], c.norm_eps)), tuple(caches)


def extend(
    params: Params,
    c: VambaConfig,
    x: jax.Array,
    segment: jax.Array,
    caches: tuple[AttentionCache, ...],
    memory: VideoMemory,
) -> tuple[jax.Array, tuple[AttentionCache, ...]]:
    """Text after what the caches hold: x [B,T,D], segment [B,T] (0 = padding at the end) -> final states [B,T,D], longer caches."""
    held = sum(jnp.sum(part[0] > 0, axis=1, keepdims=True) for part in (caches[0].segment, caches[0].new_segment))
    position = held + jnp.arange(x.shape[1], dtype=jnp.int32)
    out, first = [], 0
    for stage, past in zip(memory.stages, caches, strict=True):
        x, cache, _ = text_stage(params, c, first, x, segment, position, stage, past=past)
        out.append(cache)
        first += stage.k.shape[0]
    return rms_norm(x, params["norm_f"], c.norm_eps), tuple(out)


def append(memory: VideoMemory, more: VideoMemory) -> VideoMemory:
    """A dense video's memory followed by that of its next piece, encoded from memory.state: what the whole would have given."""
    if len(memory.stages) != 1 or len(more.stages) != 1:
        raise ValueError(
            f"append: only dense videos grow; got memories of {len(memory.stages)} and {len(more.stages)} stages"
        )
    a, b = memory.stages[0], more.stages[0]
    stage = CrossMemory(
        jnp.concatenate([a.k, b.k], axis=2),
        jnp.concatenate([a.v, b.v], axis=2),
        jnp.concatenate([a.segment, b.segment], axis=1),
    )
    index, visual = (
        jnp.concatenate([getattr(part, name) for part in (memory, more)], axis=1) for name in ("index", "visual")
    )
    return VideoMemory((stage,), more.state, (), memory.kept + more.kept, index, visual)
