"""A batch as VAMBA's two streams, and both through the decoder: on one device, inside a program over a mesh, and in training."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from hybridvlm import sharding
from hybridvlm.config import ModelConfig, VambaConfig
from hybridvlm.models.nemotron_vl.pixels import check_kept
from hybridvlm.models.nemotron_vl.rows import merged, split_attention
from hybridvlm.models.vamba.batch import Batch
from hybridvlm.nn import vamba
from hybridvlm.nn.caches import AttentionCache
from hybridvlm.nn.decoder import DecoderOutput, StraightThrough, visual_counts
from hybridvlm.nn.vamba import READS, VideoMemory
from hybridvlm.ops.segments import index_in_segment
from hybridvlm.ops.tokens import INDEX_IN_SEGMENT, Tokens
from hybridvlm.parallel.scores import reduce_scores
from hybridvlm.parallel.sequence import (
    compact_row,
    gather_sequence,
    own_shard,
    row_total,
    sequence_shards,
    shard_length,
    take_from_shards,
)
from hybridvlm.parallel.tensor import LocalConfig, LocalVambaConfig
from hybridvlm.parallel.vocab import embed_tokens
from hybridvlm.reduction import plan_functions
from hybridvlm.reduction.plan import ReductionPlan


def text_stream(config: ModelConfig, embed: jax.Array, batch: Batch) -> Tokens:
    """The text's Tokens, whole on every device; positions count a segment's own text, and the video takes none away."""
    segment = jnp.asarray(batch.segment)
    real = segment > 0
    x = jnp.where(real[..., None], embed_tokens(config, embed, batch.input_ids), 0)
    index = jnp.broadcast_to(jnp.arange(real.shape[1], dtype=jnp.int32), real.shape)
    no = jnp.zeros(real.shape, bool)
    frame, extra = jnp.full(real.shape, -1, jnp.int32), {READS: jnp.asarray(batch.reads)}
    return Tokens(x, index_in_segment(segment), segment, no, batch.query & real, index, frame, extra)


def video_stream(config: ModelConfig, batch: Batch, visual: jax.Array, segments: int = 1) -> Tokens:
    """The video's Tokens, of the visual tokens [B,F,m,D] as the tower gives them, those of padding frames emptied.

    Where rows are cut over devices a device's shard of them, and `visual` its share of the frames.
    """

    def own(array: jax.Array, empty: int = 0) -> jax.Array:
        return own_shard(config, jnp.asarray(array), empty)

    flat = visual.reshape(visual.shape[0], -1, visual.shape[-1])
    index = jnp.broadcast_to(jnp.arange(batch.video_segment.shape[1], dtype=jnp.int32), batch.video_segment.shape)
    segment, real = own(batch.video_segment), own(batch.video_segment) > 0
    rows = flat[:, : index.shape[1]]
    if sequence_shards(config) > 1:
        rows = take_from_shards(config, flat, jnp.minimum(own(index), flat.shape[1] * sequence_shards(config) - 1))
    x = jnp.where(real[..., None], rows, 0)
    extra = {INDEX_IN_SEGMENT: own(batch.own_index)} if segments > 1 else {}
    no = jnp.zeros(real.shape, bool)
    return Tokens(x, own(index), segment, real, no, own(batch.index, -1), own(batch.frame, -1), extra)


class _VideoRows:
    """A plan for the video's rows alone: no text stands in them.

    In packed rows each segment's share is rounded for itself, which can keep one token more than the row's capacity counts.
    """

    def __init__(self, plan: ReductionPlan, segments: int = 1) -> None:
        spare = segments if segments > 1 else 0
        self.drops, self.keep = plan.drops, plan.keep
        self.row_length = lambda layer: plan.capacities[layer] + spare


def prepare(
    config: ModelConfig, batch: Batch, visual: jax.Array, plan: ReductionPlan | None, segments: int = 1
) -> tuple[Tokens, jax.Array]:
    """The video as it enters layer 0, and the count of visual tokens [B,S] that it was handed.

    ValueError for a plan that looks at one video a row where rows pack several.
    """
    frame_count, first = batch.frame_count, plan is not None and plan.input_method != "none"
    if first and segments > 1:
        assert plan is not None
        raise ValueError(
            f"{plan.input_method} works on one video a row, and rows pack up to {segments}; use segments=1"
        )
    check_kept(config, visual, plan)
    # what merges or ranks before the decoder looks at the whole video
    whole = visual = gather_sequence(config, visual) if first else visual
    if plan is not None and plan.merges:
        whole, frame_count = plan_functions.merge_fn(plan)(whole, frame_count)
    if plan is not None and plan.drops_input:
        whole, attention = split_attention(config, whole)
        chosen = plan_functions.input_selection(plan)(whole, frame_count, attention)
        whole = merged(whole, chosen)
    elif plan is not None and plan.pixel_selection is not None:
        whole, _ = split_attention(config, whole)
    if first:
        visual = own_shard(config, whole.reshape(whole.shape[0], -1, 1, whole.shape[-1]))
    video = video_stream(config, batch, visual, segments)
    given = row_total(config, visual_counts(video, segments))
    if plan is not None and plan.drops_input:
        length = batch.video_segment.shape[1]
        score = jnp.where(video.visual, own_shard(config, chosen.score[:, :length]), 0)
        video = compact_row(config, video, score, plan.keep(0, given), _VideoRows(plan, segments).row_length(0))
    return video, given


def plan_options(
    config: ModelConfig, plan: ReductionPlan | None, segments: int, counts: jax.Array | None
) -> dict[str, Any]:
    """What `nn.vamba.prefill` is told of a plan; `config` is that of a device's part where several join their scores."""
    if plan is None:
        return {"segments": segments}
    score_fn: Callable[..., Any] = plan_functions.score_fn(plan, segments=segments)
    if isinstance(config, LocalConfig):
        score_fn = reduce_scores(score_fn, config, plan.score, getattr(score_fn, "method", None))
    return {"plan": _VideoRows(plan, segments), "score_fn": score_fn, "counts": counts, "segments": segments}


def walk(
    params: dict, config: VambaConfig, batch: Batch, visual: jax.Array, text: Tokens | None, plan, decode_capacity: int
) -> tuple[VideoMemory, Tokens | None, tuple[AttentionCache, ...], jax.Array]:
    """Both streams for inference: (memory, text after the final norm, its caches, visual tokens given [B,1])."""
    video, given = prepare(config, batch, visual, plan)
    options = plan_options(config, plan, 1, given)
    return (
        *vamba.prefill(params["decoder"], config, video, text, decode_capacity=decode_capacity, **options),
        given,
    )


def decoder_output(
    params: Mapping[str, Any],
    config: VambaConfig,
    batch: Batch,
    visual: jax.Array | None,
    plan: ReductionPlan | None,
    *,
    question: jax.Array | None = None,
    segments: int = 1,
    mesh: Mesh | None = None,
    remat: str = "none",
    straight_through: StraightThrough | None = None,
    caches: bool = False,
) -> tuple[DecoderOutput[tuple[()]], jax.Array]:
    """Training rows through both streams under a plan (None: dense): the text's output, and the visual tokens given [B,S].

    Args:
        params: of the model, laid out for the mesh.
        config: of the whole model.
        batch: rows, of `split_rows`.
        visual: [B,F,m,D], or None for text alone.
        plan: what is dropped where.
        question: [B,T] bool, the text that says what matters (default: `batch.query`).
        segments: S, videos packed in a row.
        mesh: the devices that `params` are cut over.
        remat: a name of `nn.scan.REMAT`.
        straight_through: as of `nn.decoder.prefill`.
        caches: none are returned; True is refused.

    Raises:
        ValueError: for caches, text alone on a mesh, or sizes that the mesh cannot cut.
    """
    if caches:
        raise ValueError("caches: rows of training leave none; `prefill` does")
    text = text_stream(config, params["embed"], batch)
    if question is not None:
        text = text.replace(query=question & (text.segment > 0))
    options: dict[str, Any] = {"remat": remat, "straight_through": straight_through}
    if visual is None:
        return _text_alone(params, config, text, segments, mesh, remat)
    video, given = prepare(config, batch, visual, plan, segments)
    if mesh is not None:
        return _over_mesh(params["decoder"], config, video, text, given, plan, segments, mesh, options), given
    told = plan_options(config, plan, segments, given)
    memory, read, _ = vamba.prefill(params["decoder"], config, video, text, **told, **options)
    assert read is not None  # as text was given
    return DecoderOutput(read, (), memory.survivors, memory.kept, {}), given


def _text_alone(
    params: Mapping[str, Any], config: VambaConfig, text: Tokens, segments: int, mesh: Mesh | None, remat: str
) -> tuple[DecoderOutput[tuple[()]], jax.Array]:
    if mesh is not None:
        raise ValueError("visual is None: rows of text alone are trained on one device; give them a video, or no mesh")
    rows = text.x.shape[0]
    memory = vamba.no_video(config, rows, text.x.dtype)
    read, _ = vamba.prefill_text(params["decoder"], config, text, memory, remat=remat)
    kept = jnp.zeros((1, rows, segments), jnp.int32)
    return DecoderOutput(read, (), (), kept, {}), kept[0]


def _over_mesh(
    params: Any,
    config: VambaConfig,
    video: Tokens,
    text: Tokens,
    given: jax.Array,
    plan: ReductionPlan | None,
    segments: int,
    mesh: Mesh,
    options: dict[str, Any],
) -> DecoderOutput[tuple[()]]:
    """`nn.vamba.prefill` over a mesh: examples cut over data and fsdp, the video's rows over sequence, the text whole."""
    mesh, specs, local = sharding.mesh_part(params, config, mesh, video.x.shape[0])
    # what `local_config` makes of a VambaConfig
    assert isinstance(local, LocalVambaConfig)
    length, shards = video.length, local.shards
    if shards > 1:
        video = sharding.pad_to(video, shards * shard_length(config, length, shards))

    def part(params: Any, video: Tokens, text: Tokens, given: jax.Array) -> tuple[Any, ...]:
        told = plan_options(local, plan, segments, given)
        memory, read, _ = vamba.prefill(params, local, video, text, **told, **options)
        return read, memory.survivors, memory.kept

    rows, row = P(local.batch_axes), P(local.batch_axes, local.row_axis)
    run = jax.shard_map(
        part,
        mesh=mesh,
        in_specs=(specs, row, rows, rows),
        out_specs=(rows, row, P(None, local.batch_axes)),
        # what is whole on every device is so by construction (sums over an axis); the checker cannot see into kernels
        check_vma=False,
    )
    read, survivors, kept = run(params, video, text, given)
    if plan is not None:
        lengths = [_VideoRows(plan, segments).row_length(layer + 1) for layer in plan.drops]
        survivors = tuple((i[:, :n], v[:, :n]) for (i, v), n in zip(survivors, lengths, strict=True))
    return DecoderOutput(read, (), survivors, kept, {})


def repeat_rows(memory: VideoMemory, rows: int) -> VideoMemory:
    """The counts of a memory once for each of `rows` questions, those on one video next to each other; all else as it is."""
    times = rows // memory.index.shape[0]
    return dataclasses.replace(memory, kept=jnp.repeat(memory.kept, times, axis=1)) if times > 1 else memory
