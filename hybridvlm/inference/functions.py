"""The functions that a model compiles, one per phase, and how what they return lies on a mesh (hybridvlm/inference/placement.py).

Each takes arrays first, and by name what it is compiled for: the family, the config (on a mesh that of a device's part), the plan.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

from hybridvlm.inference import sampling
from hybridvlm.inference.sampling import DecodeState
from hybridvlm.models.family import Family
from hybridvlm.nn.decoder import with_specs
from hybridvlm.parallel.sequence import sequence_shards
from hybridvlm.parallel.tensor import LocalConfig
from hybridvlm.reduction.pixels import PixelSelection
from hybridvlm.reduction.plan import ReductionPlan


def encode(
    params: Any,
    pixels: Any,
    frame_count: Any = None,
    *,
    family: Family,
    config: Any,
    frames: int | None = None,
    attention: bool = False,
    keep: PixelSelection | None = None,
) -> Any:
    visual = family.encode(params, config, pixels, attention, keep, frame_count)
    # frames that only made the dealing come out even are of no use but to cut the video into even shards
    return visual if sequence_shards(config) > 1 else jax.tree.map(lambda a: a[:, :frames], visual)


def prefill(
    params: Any,
    batch: Any,
    visual: Any,
    *,
    family: Family,
    config: Any,
    plan: ReductionPlan | None,
    decode_capacity: int,
    **collected: bool,
) -> Any:
    return family.prefill(params, config, batch, visual, plan, decode_capacity, **collected)


def decode(
    params: Any,
    logits: Any,
    caches: Any,
    seeds: Any,
    limit: Any,
    inside: Any = None,
    real: Any = None,
    *,
    family: Family,
    config: Any,
    **static: Any,
) -> Any:
    options = {"limit": limit, "family": family, "inside": inside, "real": real}
    return sampling.decode(params, config, logits, caches, seeds, **options, **static)


def decode_tokens(*args: Any, **static: Any) -> Any:
    # without the caches, which would be copied out
    return decode(*args, **static)[:2]


def extend(params: Any, ids: Any, segment: Any, caches: Any, *, family: Family, config: Any) -> Any:
    return family.extend(params, config, ids, segment, caches)


def build_video_memory(
    params: Any, batch: Any, visual: Any, *, family: Family, config: Any, plan: ReductionPlan | None
) -> Any:
    return family.build_video_memory(params, config, batch, visual, plan)


# -- how results lie on a mesh, as PartitionSpecs: of a family and its part, given the arguments' and what is compiled for ----


def _encoded(family: Family, config: LocalConfig, given: tuple[Any, ...], static: Mapping[str, Any]) -> Any:
    return P(config.batch_axes, config.row_axis)


def _prefilled(family: Family, config: LocalConfig, given: tuple[Any, ...], static: Mapping[str, Any]) -> Any:
    return family.output_specs(config, static["plan"])


def _decoded(family: Family, config: LocalConfig, given: tuple[Any, ...], static: Mapping[str, Any]) -> Any:
    rows = P(config.batch_axes)
    caches = given[2].caches if given[1] is None else given[2]
    return rows, rows, with_specs(DecodeState, rows, rows, P(), caches, rows)


def _decoded_tokens(family: Family, config: LocalConfig, given: tuple[Any, ...], static: Mapping[str, Any]) -> Any:
    return P(config.batch_axes)


def _extended(family: Family, config: LocalConfig, given: tuple[Any, ...], static: Mapping[str, Any]) -> Any:
    return family.output_specs(config, None).logits, given[3]


def _memory(family: Family, config: LocalConfig, given: tuple[Any, ...], static: Mapping[str, Any]) -> Any:
    return family.memory_specs(config, static["plan"])


RESULTS: dict[Callable[..., Any], Callable[..., Any]] = {
    encode: _encoded,
    prefill: _prefilled,
    decode: _decoded,
    decode_tokens: _decoded_tokens,
    extend: _extended,
    build_video_memory: _memory,
}
