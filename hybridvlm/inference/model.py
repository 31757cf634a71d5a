"""Prefill and decode as compiled programs of static shapes, and the model that people hold in their hands."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hybridvlm.config import Buckets, ModelConfig, Reduction
from hybridvlm.inference.conversation import Answer, Conversation, check_question
from hybridvlm.inference.thinking import ThinkBudget, Thought, opens, read_reply, think, think_budget
from hybridvlm.inference.thinking import begin as start_thought
from hybridvlm.models import nemotron_vl
from hybridvlm.models.family import Family, family_for
from hybridvlm.models.media import Clip
from hybridvlm.models.nemotron_vl.model import PrefillOutput
from hybridvlm.models.prompt import Batch, Layout, PromptStyle, user_message
from hybridvlm.nn.caches import Cache, check_capacity
from hybridvlm.reduction.methods import parse_method
from hybridvlm.reduction.plan import ReductionPlan

_COMPILES = [0]


def _count_compiles(event: str, duration: float, **_: Any) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        _COMPILES[0] += 1


jax.monitoring.register_event_duration_secs_listener(_count_compiles)


def compile_count() -> int:
    """How many programs XLA has compiled in this process since hybridvlm.inference.model was imported."""
    return _COMPILES[0]


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: temperature 0 is greedy; top_p keeps the likeliest tokens that hold that much probability.

    stop_ids: tokens that end an answer; None takes the model's own (its eos_ids), () lets it run to the end."""

    temperature: float = 0.0
    top_p: float = 1.0
    stop_ids: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"Sampling.temperature must be finite and at least 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"Sampling.top_p must lie in (0, 1], got {self.top_p}")
        if self.stop_ids is not None:
            object.__setattr__(self, "stop_ids", tuple(self.stop_ids))  # it is part of a program's key


def sample_token(logits: jax.Array, keys: jax.Array, sampling: Sampling) -> jax.Array:
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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """Where decoding stands: token [B], chosen and not yet in the caches; done [B]; place [], how many were chosen; caches;
    thought, where a budget for reasoning is kept."""

    token: jax.Array
    done: jax.Array
    place: jax.Array
    caches: Any
    thought: Thought | None = None


def decode(
    params: dict,
    config: ModelConfig,
    logits: jax.Array | None,
    caches: tuple[Cache, ...] | DecodeState,
    seeds: jax.Array,
    *,
    max_new: int,
    sampling: Sampling,
    limit: jax.Array | None = None,
    family: Family = nemotron_vl,
    budget: ThinkBudget | None = None,
    inside: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, DecodeState]:
    """Generate up to `max_new` tokens: logits [B,V] after the prompt, caches with that much room, seeds [B] int32.

    limit []: fewer of them, by a number that need not be known when this is compiled. budget: reasoning has tokens of its own,
    and `limit` counts those of the answer alone, over all pieces; inside [B] bool: the prompt opened the reasoning.
    Without logits, `caches` is the Decoding that an earlier call came to, and the answer goes on from there. Returns tokens
    [B,max_new] (pad_id behind the end), lengths [B], the stop token not counted, and where it stands. An example's random
    numbers depend on its own seed and step alone, so it gets in a batch what it gets by itself. Ends early once all have
    stopped.
    """
    b = seeds.shape[0]
    stops = jnp.asarray((config.eos_ids if sampling.stop_ids is None else sampling.stop_ids) or (-1,), jnp.int32)
    one = family.make_decode_step(params, config)
    base = jax.vmap(jax.random.key)(seeds)
    begin = jnp.int32(0) if logits is not None else caches.place

    answer = jnp.int32(max_new) if limit is None else limit

    def pick(place, logits, done, out, length, thought):
        token = sample_token(logits, jax.vmap(jax.random.fold_in, (0, None))(base, place), sampling)
        if budget is None:
            done = done | jnp.any(token[:, None] == stops, axis=1)
        else:
            token, thought, ended = think(budget, thought, token, stops)
            done = done | ended
        out = out.at[:, place - begin].set(jnp.where(done, config.pad_id, token))
        length = length + ~done
        if budget is not None:
            done = done | (thought.said >= answer)
        return token, done, out, length, thought

    def body(state):
        place, token, done, out, length, thought, caches = state
        logits, caches = one(token, caches)
        return place + 1, *pick(place, logits, done, out, length, thought), caches

    out, length = jnp.full((b, max_new), config.pad_id, jnp.int32), jnp.zeros((b,), jnp.int32)
    if logits is not None:
        thought = None
        if budget is not None:
            thought = start_thought(budget, jnp.zeros((b,), bool) if inside is None else jnp.asarray(inside))
        state = (begin + 1, *pick(begin, logits, jnp.zeros((b,), bool), out, length, thought), caches)
    else:
        state = (begin, caches.token, caches.done, out, length, caches.thought, caches.caches)
    steps = max_new if budget is not None else jnp.minimum(answer, max_new)
    state = jax.lax.while_loop(lambda s: (s[0] - begin < steps) & ~jnp.all(s[2]), body, state)
    place, token, done, out, length, thought, caches = state
    return out, length, DecodeState(token, done, place, caches, thought)


@dataclasses.dataclass
class Timing:
    """Seconds of one generate(), device work awaited: compile (0 where the programs were there), prefill, decode."""

    compile: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0


@dataclasses.dataclass
class Generation:
    """What generate() gives: token ids and their text per example, the prefill's result, the plan, seconds per phase.

    text is the answer alone; thinking: the reasoning before it, per example; unfinished: whether that never came to an end,
    so that there is no answer, and text is all that was said."""

    tokens: list[list[int]]
    text: list[str]
    prefilled: PrefillOutput
    plan: ReductionPlan | None
    timing: Timing
    thinking: list[str] = dataclasses.field(default_factory=list)
    unfinished: list[bool] = dataclasses.field(default_factory=list)


class Model:
    """A config, its parameters and a tokenizer, with one compiled program per bucket, plan and phase.

    family: the module of `hybridvlm.models` whose functions do the work. style: the text around frames and question.
    """

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
        family: Family = nemotron_vl,
    ):
        self.config, self.params, self.tokenizer = config, params, tokenizer
        self.buckets, self.reduction, self.style, self.name = buckets, reduction, style, name or config.name
        self.family, self.module = family, family.module(config)
        self._programs: dict[tuple, Any] = {}
        self.compile_seconds = 0.0  # that this model's programs took to compile
        self.latest: dict[str, Any] = {}  # the compiled program that ran last, by phase: encode, prefill, decode

    def __repr__(self) -> str:
        leaves = jax.tree.leaves(self.params)
        count = sum(leaf.size for leaf in leaves)
        size = sum(leaf.nbytes for leaf in leaves)
        return (
            f"Model({self.name or 'unnamed'!r}, family {self.family.NAME}, {len(self.config.pattern)} layers, {count:,} parameters, "
            f"{size / 1e9:.2f} GB, frames up to {self.buckets.frames[-1]})"
        )

    # -- programs ---------------------------------------------------------------------------------------------------

    def program(self, name: str, function, static: tuple, *args, donate: tuple[int, ...] = ()):
        """The compiled program of `function(*args)` for these shapes; `static` tells apart programs of one name.

        donate: arguments whose memory the results may take; they are gone after the call."""
        leaves, tree = jax.tree.flatten(args)
        key = (name, static, tuple((jnp.shape(a), str(jnp.result_type(a))) for a in leaves), tree)
        if key not in self._programs:
            start = time.perf_counter()
            self._programs[key] = jax.jit(function, donate_argnums=donate).lower(*args).compile()
            self.compile_seconds += time.perf_counter() - start
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
        return self.plan_for(self.config, reduction, frames, text)

    def plan_for(
        self, config: ModelConfig, reduction: Reduction | None, frames: int, text: int
    ) -> ReductionPlan | None:
        """As `plan`, under a config whose frames have another size than the model's own."""
        if reduction is None:
            return None
        return self.family.make_plan(config, reduction, frames, text, self.params["embed"].dtype.itemsize)

    def layout(self, question: str, seconds: Sequence[float], factors: tuple[int, int, int] = (1, 1, 1)) -> Layout:
        """One prompt of this model's style: frames at these time stamps, then the question."""
        clips = [Clip(tuple(seconds))] if len(seconds) else []
        messages = [user_message(question, self.style, [clip.kind for clip in clips])]
        return self.family.prompt(self.config, self.tokenizer, messages, clips, style=self.style, factors=factors)

    def batch(
        self, questions: Sequence[str], seconds: Sequence[Sequence[float]], reduction: Reduction | None
    ) -> tuple[Batch, ReductionPlan | None]:
        """Questions, each with the time stamps of its frames, as the arrays of the smallest bucket; and the plan for it."""
        asked = list(zip(questions, seconds, strict=True))
        return self.batch_for(self.config, lambda factors: [self.layout(q, s, factors) for q, s in asked], reduction)

    def batch_for(
        self,
        config: ModelConfig,
        layouts: Callable[[tuple[int, int, int]], list[Layout]],
        reduction: Reduction | None,
        buckets: Buckets | None = None,
    ) -> tuple[Batch, ReductionPlan | None]:
        """Arrays and plan of prompts that are laid out anew where a plan merges frames, rows and columns by such factors."""
        buckets = self.buckets if buckets is None else buckets
        batch, frames, text = self.family.make_batch(config, layouts((1, 1, 1)), buckets)
        plan = self.plan_for(config, reduction, frames, text)
        if plan is not None and plan.pool_factors != (1, 1, 1):
            buckets = dataclasses.replace(buckets, text=(text,))
            batch, _, _ = self.family.make_batch(config, layouts(plan.pool_factors), buckets, plan.pool_factors)
        return batch, plan

    def reduction_for(self, method: str, budget: float | None = None, kind: str | None = None) -> Reduction | None:
        """The Reduction of a method's name, under the checkpoint's own schedule, score options and seed; None for "none".

        Args:
            method: a name such as "str", or a composition such as "evs:0.5+str:0.5".
            budget: share of the visual tokens (default: 0.25).
            kind: how it is counted, of `BUDGET_KINDS` (default: the checkpoint's own).

        Raises:
            ValueError: for an unknown method (with near names) or a budget outside (0, 1].
        """
        parse_method(method)
        if method == "none":
            return None
        own = self.reduction or Reduction()
        budget = 0.25 if budget is None else budget
        return dataclasses.replace(own, method=method, budget=budget, kind=kind or own.kind)

    def ask(
        self,
        video: Any,
        question: str,
        *,
        frames: int | None = None,
        rule: str = "uniform",
        clock: str = "exact",
        reduction: Reduction | str | None = None,
        budget: float | None = None,
        system: str = "",
        decode_capacity: int = 0,
        thinking: bool | None = None,
        think_tokens: int | None = None,
        max_new: int | None = None,
        sampling: Sampling | None = None,
        seed: int = 0,
        show: Callable[[str], None] | None = None,
    ) -> Answer:
        """Answer a question about a video or an image; the Answer's `conversation` takes further questions.

        Args:
            video: a path, frames [F,h,w,3] uint8 (an array, or a list of frames), a Clip, or None for text alone.
            question: one text.
            frames: most frames of a file to look at (default: 32, or what the model was made for).
            rule: which frames of a file, see `hybridvlm.video.sample_indices`.
            clock: time stamps of a file, "exact" or "milliseconds".
            reduction: what to drop: a `Reduction`, or a method's name such as "str" (see `reduction_for`).
            budget: share of the visual tokens, with a method's name (default: 0.25).
            system: a system message, for models that know conversations.
            room: cache slots for later turns, beside those of the answer.
            thinking: True or False turns reasoning on or off, where the chat template has a switch for it.
            think_tokens: most tokens of reasoning, beside the answer's own.
            max_new: most tokens of the answer (default: Buckets.max_new).
            sampling: how tokens are chosen (default: greedy).
            seed: of sampling.
            show: called with each new piece of text as it comes.
        """
        check_question(question)
        conversation = Conversation(
            self,
            video,
            frames=frames,
            rule=rule,
            clock=clock,
            reduction=reduction,
            budget=budget,
            system=system,
            decode_capacity=decode_capacity,
            thinking=thinking,
            think_tokens=think_tokens,
        )
        return conversation.ask(question, max_new=max_new, sampling=sampling, seed=seed, show=show)

    # -- running ----------------------------------------------------------------------------------------------------

    def encode(self, pixels: Any) -> Any:
        """What the family's `pixels` gives (frames [B,F,h,w,3] uint8) -> visual tokens [B,F,m,D].

        Frames are filled up with black ones to the bucket that they lie in: no prompt has a place for those."""
        if not isinstance(pixels, dict | tuple | list):
            spare = self.buckets.pick("frames", pixels.shape[1]) - pixels.shape[1]
            if spare:  # on the host: on the device every number of frames would compile a padding of its own
                pixels = np.pad(np.asarray(pixels), ((0, 0), (0, spare)) + ((0, 0),) * (pixels.ndim - 2))

        def run(params, pixels):
            return self.family.encode(params, self.config, pixels)

        return self.program("encode", run, (), self.params, pixels)(self.params, pixels)

    def prefill(
        self,
        batch: Batch,
        visual: jax.Array | None,
        plan: ReductionPlan | None = None,
        decode_capacity: int | None = None,
    ) -> PrefillOutput:
        """Prompts to last-token logits and caches with `decode_capacity` for new tokens (default: the buckets' max_new)."""
        decode_capacity = self.buckets.max_new if decode_capacity is None else decode_capacity
        return self._prefill_program(batch, visual, plan, decode_capacity)(self.params, batch, visual)

    def _prefill_program(
        self, batch: Batch, visual: jax.Array | None, plan: ReductionPlan | None, decode_capacity: int
    ):
        frames = int(np.max(np.asarray(batch.frame_count), initial=0))
        if visual is None and frames:
            raise ValueError(f"visual is None, but the batch has places for {frames} frames; pass encode(frames)")
        if visual is not None and hasattr(visual, "shape"):
            rows = len(batch.input_ids)
            if visual.shape[0] != rows or visual.shape[1] < frames:
                raise ValueError(
                    f"visual must be [B,F,m,D] with B = {rows} and at least {frames} frames, as the batch has places for, "
                    f"got {visual.shape}"
                )

        def run(params, batch, visual):
            return self.family.prefill(params, self.config, batch, visual, plan, decode_capacity)

        return self.program("prefill", run, (plan, decode_capacity), self.params, batch, visual)

    def generate(
        self,
        batch: Batch,
        visual: jax.Array | None,
        plan: ReductionPlan | None = None,
        *,
        max_new: int | None = None,
        sampling: Sampling | None = None,
        seeds: Sequence[int] | None = None,
        think_tokens: int | None = None,
    ) -> Generation:
        """Answer a batch. visual [B,F,m,D] from encode(); seeds: one per example, for sampling (default: all 0).

        think_tokens: the most tokens of reasoning, beside the max_new of the answer (default: max_new is for both)."""
        max_new = self.buckets.max_new if max_new is None else max_new
        if not 1 <= max_new <= self.buckets.max_new:
            raise ValueError(f"max_new must lie in 1..{self.buckets.max_new} (Buckets.max_new), got {max_new}")
        sampling = Sampling() if sampling is None else sampling
        budget = think_budget(self, think_tokens)
        opened = self.opened(batch)
        seeds = np.zeros(len(batch.input_ids), np.int32) if seeds is None else np.asarray(seeds, np.int32)
        timing = Timing()
        start = time.perf_counter()
        most = self.buckets.max_new + (0 if budget is None else budget.decode_capacity)
        prefill = self._prefill_program(batch, visual, plan, most)
        timing.compile = time.perf_counter() - start
        start = time.perf_counter()
        prefilled = jax.block_until_ready(prefill(self.params, batch, visual))
        timing.prefill = time.perf_counter() - start
        args = (self.params, prefilled.logits, prefilled.decoder.caches, seeds, np.int32(max_new))
        args += () if budget is None else (np.asarray(opened),)
        start = time.perf_counter()
        program = self._decode_program(*args, max_new=most, sampling=sampling, budget=budget)
        timing.compile += time.perf_counter() - start
        start = time.perf_counter()
        tokens, lengths = jax.device_get(program(*args))
        timing.decode = time.perf_counter() - start
        ids = [row[:n].tolist() for row, n in zip(tokens, lengths, strict=True)]
        replies = [read_reply(self.tokenizer, *row) for row in zip(ids, opened, strict=True)]
        text, thinking, unfinished = (list(part) for part in zip(*replies, strict=True))
        return Generation(ids, text, prefilled, plan, timing, thinking, unfinished)

    def opened(self, batch: Batch) -> list[bool]:
        """Of each prompt, whether it ends inside reasoning that the reply has to end."""
        if not hasattr(self.tokenizer, "chat"):
            return [False] * len(batch.input_ids)
        ids, segment = jax.device_get((batch.input_ids, batch.segment))
        return [opens(self.tokenizer, row[real > 0]) for row, real in zip(ids, segment, strict=True)]

    def warm_up(
        self,
        reduction: Reduction | None = None,
        *,
        batch: int = 1,
        frames: Sequence[int] | None = None,
        text: Sequence[int] | None = None,
        sampling: Sampling | None = None,
        think_tokens: int | None = None,
    ) -> float:
        """Compile what answers of these buckets take (default: all of them), and return the seconds it took to compile.

        Black frames are asked an empty question, `batch` times over. After it, questions of those buckets, reduction,
        batch and sampling compile nothing. A text bucket that is too short for the text between so many frames is passed over.
        """
        before = self.compile_seconds
        for f in self.buckets.frames if frames is None else frames:
            height, width = self.family.frame_size(self.config, *self.config.vision.image_size, f, "video")
            group = self.config.vision.temporal_patch
            stamps = tuple(float(t) for t in range(f * group))
            clips = [Clip(stamps, np.zeros((f * group, height, width, 3), np.uint8))] * batch
            visual = self.encode(self.family.pixels(self.config, clips, f))
            for t in self.buckets.text if text is None else text:
                if self.layout("", stamps).text > t:
                    continue
                own = dataclasses.replace(self.buckets, frames=(f,), text=(t,))
                layouts = lambda factors, stamps=stamps: [self.layout("", stamps, factors)] * batch  # noqa: E731
                rows, plan = self.batch_for(self.config, layouts, reduction, own)
                self.generate(rows, visual, plan, sampling=sampling, think_tokens=think_tokens)
        return self.compile_seconds - before

    def _decode_program(
        self, *args, max_new: int, sampling: Sampling, whole: bool = True, budget: ThinkBudget | None = None
    ):
        """whole: tokens and lengths alone, without the caches behind them."""

        def run(params, logits, caches, seeds, limit, inside=None):
            out = decode(
                params,
                self.config,
                logits,
                caches,
                seeds,
                max_new=max_new,
                limit=limit,
                sampling=sampling,
                family=self.family,
                budget=budget,
                inside=inside,
            )
            return out[:2] if whole else out

        return self.program("decode", run, (max_new, sampling, whole, budget), *args, donate=() if whole else (2,))

    def decode(
        self,
        logits: jax.Array | None,
        caches: Any,
        seeds: np.ndarray,
        *,
        max_new: int,
        sampling: Sampling | None = None,
        budget: ThinkBudget | None = None,
        inside: Sequence[bool] | None = None,
        answer: int | None = None,
    ) -> tuple[np.ndarray, np.ndarray, DecodeState]:
        """Up to `max_new` tokens, and where decoding then stands: see `decode` of this file. For answers in pieces.

        With a budget, `answer` is the most tokens behind the reasoning, over all pieces, and `inside` says which prompts opened it.
        `caches` may not be used again: their memory goes over to the new ones."""
        sampling = Sampling() if sampling is None else sampling
        # the token that is chosen last does not go in, that of an earlier call does
        check_capacity(caches, max_new - (logits is not None), "decode puts in")
        args = (self.params, logits, caches, seeds, np.int32(max_new if answer is None else answer))
        if budget is not None and logits is not None:
            args += (np.asarray([False] * len(seeds) if inside is None else inside, bool),)
        program = self._decode_program(*args, max_new=max_new, sampling=sampling, whole=False, budget=budget)
        tokens, lengths, state = program(*args)
        return *jax.device_get((tokens, lengths)), state

    def extend(self, ids: np.ndarray, segment: np.ndarray, caches: Any) -> tuple[jax.Array, Any]:
        """Text behind what the caches hold, ids and segment [B,T] -> logits [B,V] after it, and the caches in their place.

        ValueError where they have fewer than T places free: prefill(room=...) says how many there are."""
        check_capacity(caches, ids.shape[1], "extend takes")

        def run(params, ids, segment, caches):
            return self.family.extend(params, self.config, ids, segment, caches)

        args = (self.params, ids, segment, caches)
        return self.program("extend", run, (), *args, donate=(3,))(*args)

    def build_video_memory(self, batch: Batch, visual: Any, plan: ReductionPlan | None) -> Any:
        """Of a family that can make it: what every question needs of these videos, to be given to prefill as `visual`."""

        def run(params, batch, visual):
            return self.family.build_video_memory(params, self.config, batch, visual, plan)

        args = (self.params, batch, visual)
        return self.program("build_video_memory", run, (plan,), *args)(*args)

    def verify(self, generation: Generation) -> None:
        """Raise if what the run kept is not what its plan says."""
        if generation.plan is not None:
            kept, counts = jax.device_get((generation.prefilled.decoder.kept, generation.prefilled.counts))
            drops = np.asarray(generation.plan.drops, int)
            entering = [int((drops < layer).sum()) for layer in range(generation.plan.layers)]
            generation.plan.verify(kept[entering, :, 0], counts[..., 0])


def init(config: ModelConfig, seed: int = 0, *, tokenizer: Any = None, buckets: Buckets = Buckets()) -> Model:
    """A model of one's own with random parameters.

    Args:
        config: a family's config, such as a `ModelConfig`, or one of `load_model_config`.
        seed: of the parameters.
        tokenizer: what turns text into ids and back; without one the model takes and gives ids alone.
        buckets: lengths that programs are compiled for.
    """
    family = family_for(config)
    params = family.init(config, jax.random.key(seed))
    return Model(config, params, tokenizer, buckets=buckets, style=family.style_for(config), family=family)
