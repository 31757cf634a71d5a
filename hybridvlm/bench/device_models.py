"""Models with random weights on the device at hand: prefill and decoding, dense and reduced, beside the least that they could take."""

from __future__ import annotations

import bisect
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hybridvlm.bench import timing
from hybridvlm.bench.prefill import prompt
from hybridvlm.bench.roofline import peaks
from hybridvlm.config import ModelConfig, Reduction, VambaConfig, VisionConfig
from hybridvlm.config_files import load_model_config
from hybridvlm.estimates.memory import memory
from hybridvlm.estimates.workload import MeshSizes, Workload
from hybridvlm.hardware import KINDS, memory_limit
from hybridvlm.inference import sampling
from hybridvlm.inference.sampling import Sampling
from hybridvlm.models import vamba as vamba_family
from hybridvlm.models.family import family_for
from hybridvlm.models.vamba.model import Batch as VambaBatch
from hybridvlm.models.weights import FLOAT32
from hybridvlm.ops.platforms import platform
from hybridvlm.sharding import row_major

Step = tuple[dict[str, Any], Callable[[], Any]]
REDUCTION = Reduction("str", 0.25)
ROOM = 0.9  # of the device's memory, for a model and what it computes
SMALL = ModelConfig(
    pattern="M-*M-", width=16, vocab_size=32, mamba_heads=2, mamba_head_dim=8, ssm_groups=1, ssm_state=8,
    attention_heads=2, kv_heads=1, head_dim=8, mlp_width=16, name="small",
    vision=VisionConfig(kind="stem", image_size=(8, 8), patch_size=4, width=8, downsample=1, max_frames=8, stem_channels=(4,)),
)  # fmt: skip


def decoder(full: bool, rounds: int) -> Iterator[Step]:
    """The 12B's decoder from embeddings to logits, then tokens of an answer: dense first, the reduced one beside it."""
    config = load_model_config("nemotron_nano_12b_v2_vl") if full else SMALL
    work = _fitting(Workload(config, 128 if full else 8, text=512 if full else 8, max_new=64 if full else 4))
    yield from _model(work, rounds, "float32" if platform() == "cpu" else "bfloat16")


def vamba(full: bool, rounds: int) -> Iterator[Step]:
    """VAMBA-7B on 1,024 frames."""
    config = load_model_config("vamba_qwen2_vl_7b") if full else _small_vamba()
    work = _fitting(Workload(config, 1024 if full else 8, text=128 if full else 8, max_new=8 if full else 2))
    yield from _model(work, rounds, "float32" if platform() == "cpu" else "bfloat16")


def _small_vamba() -> ModelConfig:
    c = load_model_config("vamba_qwen2_vl_7b")
    tower = dataclasses.replace(c.tower, image_size=(56, 56))
    sizes: dict[str, Any] = {
        "width": 32,
        "vocab_size": 64,
        "mamba_heads": 2,
        "mamba_head_dim": 16,
        "ssm_state": 8,
        "mlp_width": 32,
    }
    sizes |= {"attention_heads": 2, "kv_heads": 1, "head_dim": 16}
    sizes |= {"eos_ids": (1,), "pad_id": 0}
    return dataclasses.replace(c, pattern="*-" * 6, vision=tower, name="small VAMBA", **sizes)


def _fitting(work: Workload) -> Workload:
    """The workload with as many layers as the device has memory for."""
    limit, pattern = memory_limit(jax.devices()[0]), work.config.pattern
    unit = 2 if isinstance(work.config, VambaConfig) else 1  # a layer of VAMBA's is two letters

    def cut(units: int) -> Workload:
        config = dataclasses.replace(work.config, pattern=pattern[: units * unit])
        return dataclasses.replace(work, config=config, platform=platform())

    def too_large(units: int) -> bool:
        held = memory(cut(units), MeshSizes())
        # the tower is left out
        return limit is not None and max(held.program(name) for name in ("prefill", "decode")) > ROOM * limit

    units = len(pattern) // unit
    if too_large(units):
        units = bisect.bisect_left(range(1, units + 1), True, key=too_large)
    if not units:
        raise MemoryError(f"{work.config.name}: not one layer fits {limit} bytes")
    return cut(units)


def _model(work: Workload, rounds: int, dtype: str) -> Iterator[Step]:
    work = dataclasses.replace(work, dtype=dtype)
    config, begin = work.config, {"model": work.config.name, "layers": len(work.config.pattern), "frames": work.frames}
    params = random_weights(config, dtype)
    visual = _noise((1, work.groups, config.tower.tokens_per_frame, config.width), 1.0, dtype)
    prefills: dict[str, Callable[[], Any]] = {}
    for reduced in (False, True):
        run = dataclasses.replace(work, reduction=REDUCTION if reduced else None)
        try:
            plan = run.plan if reduced else None
        except ValueError as reason:  # too few layers to reach the budget
            yield begin | {"method": "str"}, functools.partial(_refuse, reason)
            return
        name = "str at 25%" if reduced else "dense"
        batch = _batch(run)
        measured = _Programs(run, plan, params, batch, visual, rounds)
        prefills[name] = measured.prefill_again
        about = begin | {"method": name, "visual_tokens": run.visual_tokens, "text_tokens": run.text}
        about |= {"stages": 1 if plan is None else len(plan.stages)}
        yield about | {"program": "prefill"}, measured.prefill
        yield about | {"program": "decode"}, measured.decode
        if reduced:
            predicted = {"predicted": run.plan.flop_speedup}
            yield (
                begin | predicted | {"program": "prefill", "method": "dense / str"},
                functools.partial(_ratio, prefills, rounds),
            )


def _refuse(reason: Exception) -> dict[str, Any]:
    raise NotImplementedError(str(reason))


def _ratio(prefills: dict[str, Callable[[], Any]], rounds: int) -> dict[str, Any]:
    """Both prefills in turns."""
    seconds = timing.interleaved(prefills, rounds=rounds)
    return {"speedup": timing.paired_ratio(seconds["dense"], seconds["str at 25%"])}


class _Programs:
    """Prefill and decoding of one workload, compiled when they are measured."""

    def __init__(self, work: Workload, plan: Any, params: Any, batch: Any, visual: jax.Array, rounds: int) -> None:
        self.work, self.plan, self.params, self.rounds = work, plan, params, rounds
        self.given, self.family = (params, batch, visual), family_for(work.config)
        self.compiled: Any = None

    def prefill(self) -> dict[str, Any]:
        config, plan, new = self.work.config, self.plan, self.work.max_new

        def run(params: Any, batch: Any, visual: Any) -> tuple[Any, Any]:
            out = self.family.prefill(params, config, batch, visual, plan, new)
            return out.logits, out.decoder.caches

        start = time.perf_counter()
        self.compiled = jax.jit(run).lower(*self.given).compile()
        row = {"compile_s": time.perf_counter() - start}
        seconds = timing.interleaved({"": self.prefill_again}, rounds=self.rounds)[""]
        return row | self.against_least("prefill", timing.median_ms(seconds)) | {"used_gb": _used()}

    def prefill_again(self) -> Any:
        if self.compiled is None:
            raise RuntimeError("the prefill did not run")
        return self.compiled(*self.given)

    def decode(self) -> dict[str, Any]:
        """Milliseconds of a token: the difference of a long and a short answer, over their difference in length."""
        logits, caches = jax.block_until_ready(self.prefill_again())
        options: dict[str, Any] = {
            "max_new": self.work.max_new,
            "sampling": Sampling(stop_ids=()),
            "family": self.family,
        }

        def run(params: Any, logits: Any, caches: Any, limit: Any) -> Any:
            seeds = jnp.zeros(1, jnp.int32)
            return sampling.decode(params, self.work.config, logits, caches, seeds, limit=limit, **options)[:2]

        few, many = np.int32(1), np.int32(self.work.max_new)
        start = time.perf_counter()
        program = jax.jit(run).lower(self.params, logits, caches, many).compile()
        row = {"compile_s": time.perf_counter() - start}
        calls = {n: functools.partial(program, self.params, logits, caches, n) for n in (few, many)}
        seconds = timing.interleaved(calls, rounds=self.rounds)
        each = (timing.median_ms(seconds[many]) - timing.median_ms(seconds[few])) / int(many - few)
        return row | self.against_least("decode", each) | {"tokens": int(many)}

    def against_least(self, phase: str, ms: float) -> dict[str, Any]:
        """A time, and the roofline's where the device's peaks are known."""
        from hybridvlm.estimates.seconds import phases
        from hybridvlm.hardware import CHIPS

        device = jax.devices()[0]
        kind, found = KINDS.get(device.device_kind), peaks(device.device_kind)
        if kind is None or found is None:
            return {"ms": ms}
        least = phases(self.work, MeshSizes(), CHIPS[kind], found)[phase]
        return {"ms": ms, "least_ms": 1e3 * least.seconds, "of_least": 1e3 * least.seconds / ms, "bound": least.bound}


def _used() -> float | None:
    """Most memory of the device that was in use so far, GB."""
    try:
        stats = jax.devices()[0].memory_stats() or {}
    except Exception:  # a backend without such figures raises whatever it likes
        return None
    peak = stats.get("peak_bytes_in_use")
    return None if peak is None else peak * 1e-9


def _batch(work: Workload) -> Any:
    """A full prompt: the frames, then the question."""
    config, per_frame = work.config, work.config.tower.tokens_per_frame
    row = prompt(work.groups, per_frame, work.text, 0, config.vocab_size)
    if not isinstance(config, VambaConfig):
        return row
    ids, frame = row.input_ids[:, work.visual_tokens :], row.frame[:, : work.visual_tokens]
    index, ones = np.arange(work.visual_tokens, dtype=np.int32)[None], np.ones_like(ids)
    return VambaBatch(
        input_ids=ids,
        segment=ones,
        reads=ones,
        query=ones > 0,
        video_segment=np.ones_like(frame),
        frame=frame,
        index=index,
        own_index=index,
        frame_count=row.frame_count,
    )


def random_weights(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The parameters of a text side with noise of their size in them, made on the device an array at a time, without the tower."""
    family = vamba_family if isinstance(config, VambaConfig) else family_for(config)
    shapes = jax.eval_shape(lambda: family.init(config, jax.random.key(0)))
    shapes = {name: part for name, part in shapes.items() if name not in ("vision", "projector")}

    def make(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = path[-1].key
        kind = jnp.float32 if name in FLOAT32 else jnp.dtype(dtype)
        if name == "A_log":
            return jnp.broadcast_to(jnp.log(jnp.linspace(1.0, 16.0, leaf.shape[-1])), leaf.shape).astype(kind)
        if name == "dt_bias":
            return jnp.full(leaf.shape, -4.0, kind)
        if "norm" in name or name in ("D", "alpha"):
            return jnp.ones(leaf.shape, kind)
        if name.endswith("bias"):
            return jnp.zeros(leaf.shape, kind)
        return _noise(leaf.shape, 1 / math.sqrt(leaf.shape[-2] if len(leaf.shape) > 1 else 1), str(kind))

    return jax.tree_util.tree_map_with_path(lambda *leaf: row_major(make(*leaf), consume=True), shapes)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _noise(shape: tuple[int, ...], scale: float, dtype: str) -> jax.Array:
    """Uniform noise of standard deviation `scale`, a hash of each place: a generator would take memory beside the result."""
    h = jax.lax.iota(jnp.uint32, math.prod(shape)) * jnp.uint32(0x9E3779B1)
    h = (h ^ (h >> 15)) * jnp.uint32(0x846CA68B)
    unit = ((h ^ (h >> 16)) >> 8).astype(jnp.float32) * jnp.float32(2.0**-23) - 1.0
    return (unit * (scale * math.sqrt(3.0))).astype(dtype).reshape(shape)
