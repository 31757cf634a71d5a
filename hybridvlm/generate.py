"""Prefill and decode as compiled programs of static shapes, and the model that people hold in their hands."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hybridvlm.config import Buckets, ModelConfig, Reduction
from hybridvlm.models.nemotron_vl import Batch, HybridVLM, Prefilled, prefill_prompt
from hybridvlm.models.prompt import Layout, PromptStyle, layout, make_batch
from hybridvlm.nn.caches import Cache
from hybridvlm.nn.decoder import step, unstack
from hybridvlm.ops.ssd.api import default_choice
from hybridvlm.reduction.plan import ReductionPlan, make_plan

_COMPILES = [0]


def _count_compiles(event: str, duration: float, **_: Any) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        _COMPILES[0] += 1


jax.monitoring.register_event_duration_secs_listener(_count_compiles)


def compile_count() -> int:
    """How many programs XLA has compiled in this process since hybridvlm.generate was imported."""
    return _COMPILES[0]


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: temperature 0 is greedy; top_p keeps the likeliest tokens that hold that much probability.

    stop_ids: tokens that end an answer; None takes the model's own (its eos_ids), () lets it run to the end."""

    temperature: float = 0.0
    top_p: float = 1.0
    stop_ids: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"Sampling.temperature must be at least 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"Sampling.top_p must lie in (0, 1], got {self.top_p}")


def choose(logits: jax.Array, keys: jax.Array, sampling: Sampling) -> jax.Array:
    """Next token of each example: logits [B,V] fp32, one key per example -> [B] int32."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    if sampling.top_p < 1:
        order = jnp.argsort(-logits, axis=-1)
        ranked = jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), order, axis=-1)
        before = jnp.cumsum(ranked, axis=-1) - ranked  # the likeliest token always stays: nothing lies before it
        rows = jnp.arange(logits.shape[0])[:, None]
        drop = jnp.zeros(logits.shape, bool).at[rows, order].set(before >= sampling.top_p)
        logits = jnp.where(drop, -jnp.inf, logits)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def decode(
    params: dict,
    config: ModelConfig,
    logits: jax.Array,
    caches: tuple[Cache, ...],
    seeds: jax.Array,
    *,
    max_new: int,
    sampling: Sampling,
) -> tuple[jax.Array, jax.Array]:
    """Generate up to `max_new` tokens: logits [B,V] after the prompt, caches with that much room, seeds [B] int32.

    Returns tokens [B,max_new] (pad_id behind the end) and lengths [B], the stop token not counted. An example's random numbers
    depend on its own seed and step alone, so it gets in a batch what it gets by itself. Ends early once all have stopped.
    """
    b = logits.shape[0]
    stops = jnp.asarray((config.eos_ids if sampling.stop_ids is None else sampling.stop_ids) or (-1,), jnp.int32)
    layers = unstack(params["decoder"], config)
    head = params["embed"].T if config.tie_embeddings else params["lm_head"]
    base = jax.vmap(jax.random.key)(seeds)

    def pick(n, logits, done, out):
        token = choose(logits, jax.vmap(jax.random.fold_in, (0, None))(base, n), sampling)
        done = done | jnp.any(token[:, None] == stops, axis=1)
        return token, done, out.at[:, n].set(jnp.where(done, config.pad_id, token))

    def body(state):
        n, token, done, out, length, caches = state
        x = jnp.take(params["embed"], token, axis=0)[:, None]
        x, caches = step(layers, params["decoder"]["norm_f"], config, x, caches)
        logits = jnp.matmul(x[:, 0], head.astype(x.dtype), preferred_element_type=jnp.float32)
        token, done, out = pick(n, logits, done, out)
        return n + 1, token, done, out, length + ~done, caches

    out = jnp.full((b, max_new), config.pad_id, jnp.int32)
    token, done, out = pick(0, logits, jnp.zeros((b,), bool), out)
    state = (jnp.int32(1), token, done, out, (~done).astype(jnp.int32), caches)
    state = jax.lax.while_loop(lambda s: (s[0] < max_new) & ~jnp.all(s[2]), body, state)
    return state[3], state[4]


@dataclasses.dataclass
class Timing:
    """Seconds of one generate(), device work awaited: compile (0 where the programs were there), prefill, decode."""

    compile: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0


@dataclasses.dataclass
class Generation:
    """What generate() gives: token ids and their text per example, the prefill's result, the plan, seconds per phase."""

    tokens: list[list[int]]
    text: list[str]
    prefilled: Prefilled
    plan: ReductionPlan | None
    timing: Timing


class Model:
    """A config, its parameters and a tokenizer, with one compiled program per bucket, plan and phase."""

    def __init__(
        self,
        config: ModelConfig,
        params: dict,
        tokenizer: Any = None,
        *,
        buckets: Buckets = Buckets(),
        reduction: Reduction | None = None,
        style: PromptStyle = PromptStyle(),
        name: str = "",
    ):
        self.config, self.params, self.tokenizer = config, params, tokenizer
        self.buckets, self.reduction, self.style, self.name = buckets, reduction, style, name or config.name
        self.module = HybridVLM(config)
        self._programs: dict[tuple, Any] = {}
        self.latest: dict[str, Any] = {}  # the compiled program that ran last, by phase: encode, prefill, decode

    # -- programs ---------------------------------------------------------------------------------------------------

    def program(self, name: str, function, static: tuple, *args):
        """The compiled program of `function(*args)` for these shapes; `static` tells apart programs of one name."""
        shapes = jax.tree.map(lambda a: (jnp.shape(a), str(jnp.result_type(a))), args)
        leaves, tree = jax.tree.flatten(shapes, is_leaf=lambda s: isinstance(s, tuple) and isinstance(s[-1], str))
        key = (name, static, tuple(leaves), tree)
        if key not in self._programs:
            self._programs[key] = jax.jit(function).lower(*args).compile()
        self.latest[name] = self._programs[key]
        return self._programs[key]

    def peak_bytes(self, programs: Iterable[Any] | None = None) -> int:
        """Most memory that a compiled program needs (arguments, outputs, temporaries, by the compiler): of all, or of `programs`."""
        most = 0
        for compiled in self._programs.values() if programs is None else programs:
            memory = compiled.memory_analysis()
            if memory is not None:
                total = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
                most = max(most, total)
        return most

    # -- from samples to arrays -----------------------------------------------------------------------------------

    def plan(self, reduction: Reduction | None, frames: int, text: int) -> ReductionPlan | None:
        """The static plan of a reduction for a bucket; None when there is nothing to reduce."""
        if reduction is None or reduction.method == "none":
            return None
        m = self.config.vision.tokens_per_frame
        return make_plan(
            reduction,
            self.config,
            visual_tokens=frames * m,
            text_tokens=text,
            frames=frames,
            chunk_size=self.config.chunk_size or default_choice().chunk_size,
            itemsize=self.params["embed"].dtype.itemsize,
        )

    def layout(self, question: str, seconds: Sequence[float], factors: tuple[int, int, int] = (1, 1, 1)) -> Layout:
        """One prompt of this model's style: frames at these time stamps, then the question."""
        m = self.config.vision.tokens_per_frame // (factors[1] * factors[2])
        return layout(question, seconds, m, self.tokenizer.encode, self.style, group=factors[0])

    def batch(
        self, questions: Sequence[str], seconds: Sequence[Sequence[float]], reduction: Reduction | None
    ) -> tuple[Batch, ReductionPlan | None]:
        """Questions, each with the time stamps of its frames, as the arrays of the smallest bucket; and the plan for it."""
        layouts = [self.layout(q, s) for q, s in zip(questions, seconds, strict=True)]
        batch, frames, text = make_batch(layouts, self.config, self.buckets)
        plan = self.plan(reduction, frames, text)
        if plan is not None and plan.pool_factors != (1, 1, 1):
            ft, fr, fc = plan.pool_factors
            layouts = [self.layout(q, s, plan.pool_factors) for q, s in zip(questions, seconds, strict=True)]
            m = self.config.vision.tokens_per_frame // (fr * fc)
            batch, _, _ = make_batch(layouts, self.config, dataclasses.replace(self.buckets, text=(text,)), m, group=ft)
        return batch, plan

    # -- running ----------------------------------------------------------------------------------------------------

    def encode(self, pixels: np.ndarray) -> jax.Array:
        """Frames [B,F,h,w,3] uint8 -> visual tokens [B,F,m,D]."""

        def run(params, pixels):
            return self.module.apply({"params": params}, pixels, method=HybridVLM.encode)

        return self.program("encode", run, (), self.params, pixels)(self.params, pixels)

    def prefill(
        self, batch: Batch, visual: jax.Array | None, plan: ReductionPlan | None = None, room: int | None = None
    ) -> Prefilled:
        """Prompts to last-token logits and caches with `room` for new tokens (default: the buckets' max_new)."""
        room = self.buckets.max_new if room is None else room
        return self._prefill_program(batch, visual, plan, room)(self.params, batch, visual)

    def _prefill_program(self, batch: Batch, visual: jax.Array | None, plan: ReductionPlan | None, room: int):
        def run(params, batch, visual):
            return prefill_prompt(params, self.config, batch, visual, plan, room)

        return self.program("prefill", run, (plan, room), self.params, batch, visual)

    def generate(
        self,
        batch: Batch,
        visual: jax.Array | None,
        plan: ReductionPlan | None = None,
        *,
        max_new: int | None = None,
        sampling: Sampling | None = None,
        seeds: Sequence[int] | None = None,
    ) -> Generation:
        """Answer a batch. visual [B,F,m,D] from encode(); seeds: one per example, for sampling (default: all 0)."""
        max_new = self.buckets.max_new if max_new is None else max_new
        if not 1 <= max_new <= self.buckets.max_new:
            raise ValueError(f"max_new must lie in 1..{self.buckets.max_new} (Buckets.max_new), got {max_new}")
        sampling = Sampling() if sampling is None else sampling
        seeds = np.zeros(len(batch.input_ids), np.int32) if seeds is None else np.asarray(seeds, np.int32)
        timing = Timing()
        start = time.perf_counter()
        prefill = self._prefill_program(batch, visual, plan, max_new)
        timing.compile = time.perf_counter() - start
        start = time.perf_counter()
        prefilled = jax.block_until_ready(prefill(self.params, batch, visual))
        timing.prefill = time.perf_counter() - start
        caches = prefilled.decoder.caches

        def run(params, logits, caches, seeds):
            return decode(params, self.config, logits, caches, seeds, max_new=max_new, sampling=sampling)

        args = (self.params, prefilled.logits, caches, seeds)
        start = time.perf_counter()
        program = self.program("decode", run, (max_new, sampling), *args)
        timing.compile += time.perf_counter() - start
        start = time.perf_counter()
        tokens, lengths = jax.device_get(program(*args))
        timing.decode = time.perf_counter() - start
        ids = [row[:n].tolist() for row, n in zip(tokens, lengths, strict=True)]
        text = [self.tokenizer.decode(row) if self.tokenizer is not None else "" for row in ids]
        return Generation(ids, text, prefilled, plan, timing)

    def verify(self, generation: Generation) -> None:
        """Raise if what the run kept is not what its plan says."""
        if generation.plan is not None:
            kept, counts = jax.device_get((generation.prefilled.decoder.kept, generation.prefilled.counts))
            drops = np.asarray(generation.plan.drops, int)
            entering = [int((drops < layer).sum()) for layer in range(generation.plan.layers)]
            generation.plan.verify(kept[entering, :, 0], counts[..., 0])
