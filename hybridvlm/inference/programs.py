"""What a model runs: prompts to arrays, prefill, decoding, as compiled programs (program_cache.py)."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from hybridvlm.config import Buckets, Reduction
from hybridvlm.inference import frame_text, functions, placement
from hybridvlm.inference.generation import Generation as Generation
from hybridvlm.inference.generation import Timing
from hybridvlm.inference.program_cache import ProgramCache, peak_bytes
from hybridvlm.inference.sampling import DecodeState, Sampling
from hybridvlm.inference.thinking import ThinkBudget, opens, read_reply, think_budget
from hybridvlm.models import nemotron_vl
from hybridvlm.models.family import Family
from hybridvlm.models.media import Clip
from hybridvlm.models.nemotron_vl.model import PrefillOutput
from hybridvlm.models.prompt import Batch, Layout, PromptStyle, rest_length, rest_of, user_message
from hybridvlm.nn.caches import check_capacity
from hybridvlm.nn.prefix import Prefix
from hybridvlm.parallel.tensor import LocalConfig
from hybridvlm.reduction.methods import named_reduction
from hybridvlm.reduction.pixels import PixelSelection
from hybridvlm.reduction.plan import ReductionPlan


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class ModelPrograms:
    """A config, its parameters and a tokenizer, with the programs that run them; `Model` adds what people ask of it.

    Attributes:
        config: of the family.
        params: a nested dict of arrays.
        tokenizer: text to ids and back; None takes and gives ids alone.
        buckets: lengths that programs are compiled for.
        reduction: what the checkpoint was tuned under.
        style: the text around frames and question.
        name: for people (default: the config's).
        family: whose functions do the work.
        programs: what is compiled; copies by `dataclasses.replace` share it.
        mesh: the devices that `params` are laid out for, see `Model.to_mesh`; None for one device. Rows of padding that fill
            a batch up to come out even on a mesh stand at the end of what `prefill` and `extend` return.
    """

    config: Any
    params: dict[str, Any]
    tokenizer: Any = None
    _: dataclasses.KW_ONLY
    buckets: Buckets = Buckets()
    reduction: Reduction | None = None
    style: PromptStyle = PromptStyle()
    name: str = ""
    family: Family = nemotron_vl
    programs: ProgramCache = dataclasses.field(default_factory=ProgramCache)
    mesh: jax.sharding.Mesh | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.name or self.config.name)

    @functools.cached_property
    def _part(self) -> LocalConfig:
        """What one device of the mesh holds."""
        assert self.mesh is not None
        return placement.part_of(self.config, self.params, self.mesh)

    # -- from samples to arrays -----------------------------------------------------------------------------------

    def plan(self, reduction: Reduction | None, frames: int, text: int, *, config: Any = None) -> ReductionPlan | None:
        """The static plan of a reduction for a bucket; None when there is nothing to reduce.

        Args:
            reduction: method and budget.
            frames: frame bucket.
            text: text bucket, in tokens.
            config: where frames have another size than the model's own.
        """
        if reduction is None:
            return None
        config = self.config if config is None else config
        own = self.frame_text(frames, reduction)
        return self.family.make_plan(config, reduction, frames, text, self.params["embed"].dtype.itemsize, own)

    def frame_text(self, frames: int, reduction: Reduction | None) -> int:
        """Most text tokens that one of so many frames of a video has of its own; 0 under a reduction that drops none of it."""
        if reduction is None or reduction.drop_text == "none" or not frames or self.config.vision is None:
            return 0
        if frames not in self._frame_text:
            stamps = frame_text.late_stamps(frames * self.config.vision.temporal_patch)
            self._frame_text[frames] = self.layout("", stamps).frame_text
        return self._frame_text[frames]

    @functools.cached_property
    def _frame_text(self) -> dict[int, int]:
        return {}

    def text_needed(self, layouts: Sequence[Layout], frames: int, reduction: Reduction | None) -> int:
        """Text tokens that a bucket of `frames` has to have room for, for prompts under a reduction."""
        return frame_text.bucket_needed(layouts, frames, self.frame_text(frames, reduction))

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
        return self.batch_of(lambda factors: [self.layout(q, s, factors) for q, s in asked], reduction)

    def batch_of(
        self,
        layouts: Callable[[tuple[int, int, int]], Sequence[Layout]],
        reduction: Reduction | None,
        *,
        config: Any = None,
        buckets: Buckets | None = None,
    ) -> tuple[Batch, ReductionPlan | None]:
        """Prompts as the arrays of the smallest bucket, and the plan for it.

        Args:
            layouts: prompts by the factors (frames, rows, columns) that a plan merges by; called a second time if it merges.
            reduction: method and budget.
            config: where frames have another size than the model's own.
            buckets: instead of the model's own.
        """
        config = self.config if config is None else config
        buckets = self.buckets if buckets is None else buckets
        whole = layouts((1, 1, 1))
        batch, frames, text = self.family.make_batch(config, whole, buckets)
        if (needed := self.text_needed(whole, frames, reduction)) > text:
            buckets = dataclasses.replace(buckets, text=(buckets.pick("text", needed),))
            batch, frames, text = self.family.make_batch(config, whole, buckets)
        plan = self.plan(reduction, frames, text, config=config)
        if plan is not None and plan.pool_factors != (1, 1, 1):
            buckets = dataclasses.replace(buckets, text=(text,))
            batch, _, _ = self.family.make_batch(config, layouts(plan.pool_factors), buckets, plan.pool_factors)
        return batch, plan

    def reduction_for(
        self,
        method: str,
        budget: float | None = None,
        kind: str | None = None,
        first_drop: int | None = None,
        drop_text: str | None = None,
    ) -> Reduction | None:
        """The Reduction of a method's name, under the checkpoint's own schedule, score options and seed; None for "none".

        Args:
            method: a name such as "str", or a composition such as "evs:0.5+str:0.5".
            budget: share of the visual tokens (default: 0.25).
            kind: how it is counted, of `BUDGET_KINDS` (default: the checkpoint's own).
            first_drop: the schedule's `start`: no drop before that layer has run (default: the checkpoint's own).
            drop_text: which text of frames' own goes at a drop, of `DROP_TEXT` (default: the checkpoint's own).

        Raises:
            ValueError: for an unknown method (with near names) or a budget outside (0, 1].
        """
        return named_reduction(self.reduction, method, budget, kind, first_drop, drop_text)

    def opened(self, batch: Batch) -> list[bool]:
        """Of each prompt, whether it ends inside reasoning that the reply has to end."""
        if not hasattr(self.tokenizer, "chat"):
            return [False] * len(batch.input_ids)
        ids, segment = jax.device_get((batch.input_ids, batch.segment))
        return [opens(self.tokenizer, row[real > 0]) for row, real in zip(ids, segment, strict=True)]

    # -- running ----------------------------------------------------------------------------------------------------

    def encode(
        self,
        pixels: Any,
        *,
        attention: bool = False,
        keep: PixelSelection | None = None,
        frame_count: Any = None,
    ) -> Any:
        """What the family's `pixels` gives (frames [B,F,h,w,3] uint8) -> visual tokens [B,F,m,D].

        Frames are filled up with black ones to their bucket: no prompt has an index for those.

        Args:
            pixels: of every example.
            attention: the tokens carry the tower's, for plans that rank by it (`ReductionPlan.needs_attention`); other plans pass
                over it.
            keep: of a plan that chooses before the tower, its `pixel_selection`: these tokens alone are encoded, for that plan.
            frame_count: with `keep`, the real frames [B] of each example, as its batch has them (default: all of pixels).

        Raises:
            ValueError: for `attention` together with `keep`.
        """
        if keep is not None and attention:
            raise ValueError("encode: attention is of no use to a plan that chooses before the tower; leave out one")
        counts = () if keep is None else (placement.frame_counts(pixels, frame_count),)
        if not isinstance(pixels, dict | tuple | list):
            spare = self.buckets.pick("frames", pixels.shape[1]) - pixels.shape[1]
            if spare:
                # on the host: on the device every number of frames would compile a padding of its own
                pixels = np.pad(np.asarray(pixels), ((0, 0), (0, spare)) + ((0, 0),) * (pixels.ndim - 2))
        options: dict[str, Any] = {"attention": attention, "keep": keep}
        if self.mesh is None:
            return self._run(functions.encode, self.params, pixels, *counts, **options)
        if isinstance(pixels, dict | tuple | list):
            raise TypeError(f"encode: on a mesh pixels are one array [B,F,...], got {type(pixels).__name__}")
        dealt, part = placement.put_frames(np.asarray(pixels), self.mesh, self._part)
        given = [placement.put_counts(count, self.mesh) for count in counts]
        options |= {"config": part, "frames": pixels.shape[1]}
        return self._run(functions.encode, self.params, dealt, *given, **options)

    def prefill(
        self,
        batch: Batch,
        visual: Any,
        plan: ReductionPlan | None = None,
        decode_capacity: int | None = None,
        *,
        return_scores: bool = False,
        return_hidden_states: bool = False,
    ) -> PrefillOutput:
        """Prompts to last-token logits and caches.

        Args:
            batch: prompts, of `batch`.
            visual: [B,F,m,D] from `encode`, or None for text alone; or of `build_video_memory` under this plan, what the questions
                of the batch share: Q of them for each of its videos, next to each other (one, where videos do not fill the mesh).
            plan: what is dropped where.
            decode_capacity: cache slots for new tokens (default: the buckets' max_new).
            return_scores: also the score [B,L] of every mixer layer, in `decoder.scores`: the plan's own, or the one of
                "str" without a plan.
            return_hidden_states: also the residual stream [B,L,D] after every layer, in `decoder.hidden_states`, and after the
                final norm, in `decoder.tokens.x` (else [B,0,D]). L is that layer's row; after a drop `decoder.survivors` says
                which tokens it holds.

        Raises:
            ValueError: where visual tokens do not fit the batch, or the family has no such scores or states.
        """
        batch, visual = self._placed(batch, visual, plan)
        return self._prefill_program(batch, visual, plan, decode_capacity, return_scores, return_hidden_states)(
            self.params, batch, visual
        )

    def shares_video(self, batch: Batch, plan: ReductionPlan | None) -> bool:
        """Whether `build_video_memory` can be made for prompts under a plan: what all questions about their videos share."""
        if not self.family.memory_serves(plan):
            return False
        return not isinstance(batch, Batch) or rest_length(batch) > 0

    def _questions(self, batch: Batch, memory: Any) -> Batch:
        """Questions for a video memory: as many rows for each of its own; of prompts that it is a Prefix of, the text that is left, at
        the smallest text bucket."""
        rows, videos = len(batch.input_ids), memory.videos or memory.rows
        if rows % videos:
            raise ValueError(
                f"batch: expected as many questions for each of the memory's {videos} videos, got {rows} rows"
            )
        if rows != videos != memory.rows:
            raise ValueError(
                f"batch: {rows} questions, and the memory is of {videos} videos in the {memory.rows} rows that this mesh takes: one "
                "question each; give build_video_memory a video for every row (the last one again) to ask more on each"
            )
        if isinstance(memory, Prefix):
            if not (longest := rest_length(batch)):
                raise ValueError("batch: a prompt has no text behind its video, so nothing goes on from a memory")
            batch = rest_of(batch, self.buckets.pick("text", longest))
        return jax.tree.map(lambda a: placement.fill(a, 0, memory.rows), batch)

    def _placed(self, batch: Batch, visual: Any, plan: ReductionPlan | None) -> tuple[Batch, Any]:
        """A batch and its visual tokens where the mesh needs them, once they have proved to fit each other and the plan."""
        placement.check_visual(batch, visual, self.mesh)
        if plan is not None and plan.drop_text != "none":
            frame_text.check(batch, plan)
        if hasattr(visual, "videos"):
            batch, visual = self._questions(batch, visual), dataclasses.replace(visual, videos=None, peak_bytes=0)
        if self.mesh is None:
            return batch, visual
        if hasattr(visual, "shape"):
            visual = placement.put_visual(visual, self.mesh)
        return placement.put_rows(batch, self.mesh), visual

    def _prefill_program(
        self,
        batch: Batch,
        visual: Any,
        plan: ReductionPlan | None,
        decode_capacity: int | None,
        scores: bool = False,
        hidden_states: bool = False,
    ) -> Any:
        static = {"plan": plan, "decode_capacity": self.buckets.max_new if decode_capacity is None else decode_capacity}
        collected = {"scores": scores, "hidden_states": hidden_states}
        return self._program(functions.prefill, self.params, batch, visual, **static, **collected)

    def generate(
        self,
        batch: Batch,
        visual: Any,
        plan: ReductionPlan | None = None,
        *,
        max_new: int | None = None,
        sampling: Sampling | None = None,
        seeds: Sequence[int] | None = None,
        think_tokens: int | None = None,
    ) -> Generation:
        """Answer a batch.

        Args:
            batch: prompts, of `batch`.
            visual: as of `prefill`.
            plan: what is dropped where.
            max_new: most tokens of an answer (default: Buckets.max_new).
            sampling: how tokens are chosen (default: greedy).
            seeds: one per example, for sampling (default: all 0).
            think_tokens: most tokens of reasoning, in addition to those of the answer (default: max_new is for both).
        """
        max_new = self.check_max_new(max_new)
        sampling = Sampling() if sampling is None else sampling
        budget = think_budget(self, think_tokens)
        opened = self.opened(batch)
        rows = len(batch.input_ids)
        drawn = np.zeros(rows, np.int32) if seeds is None else np.asarray(seeds, np.int32)
        before = getattr(visual, "peak_bytes", 0)
        batch, visual = self._placed(batch, visual, plan)
        timing = Timing()
        start = time.perf_counter()
        most = self._decode_capacity(budget)
        prefill = self._prefill_program(batch, visual, plan, most)
        timing.compile = time.perf_counter() - start
        start = time.perf_counter()
        prefilled = jax.block_until_ready(prefill(self.params, batch, visual))
        timing.prefill = time.perf_counter() - start
        rest = self._decoding(drawn, max_new, None if budget is None else opened)
        args = (self.params, prefilled.logits, prefilled.decoder.caches, *rest)
        start = time.perf_counter()
        decode = self._program(functions.decode_tokens, *args, max_new=most, sampling=sampling, budget=budget)
        timing.compile += time.perf_counter() - start
        start = time.perf_counter()
        tokens, lengths = placement.to_host(decode(*args))
        timing.decode = time.perf_counter() - start
        ids = [row[:n].tolist() for row, n in zip(tokens[:rows], lengths[:rows], strict=True)]
        replies = [read_reply(self.tokenizer, *row) for row in zip(ids, opened, strict=True)]
        text, thinking, unfinished = (list(part) for part in zip(*replies, strict=True))
        peak = max(peak_bytes(prefill), peak_bytes(decode), before)
        return Generation(ids, text, prefilled, plan, timing, thinking, unfinished, peak)

    def compile_prefill(
        self, batch: Batch, visual: Any, plan: ReductionPlan | None = None, think_tokens: int | None = None
    ) -> None:
        """Compile what `generate` runs first for arrays of these shapes, if that was not done before.

        Several threads may call this at once, for batches that differ in shape or plan.
        """
        batch, visual = self._placed(batch, visual, plan)
        self._prefill_program(batch, visual, plan, self._decode_capacity(think_budget(self, think_tokens)))

    def _decode_capacity(self, budget: ThinkBudget | None) -> int:
        return self.buckets.max_new + (0 if budget is None else budget.decode_capacity)

    def check_max_new(self, max_new: int | None) -> int:
        """The most tokens of an answer (default: the buckets' own); ValueError where they have fewer."""
        max_new = self.buckets.max_new if max_new is None else max_new
        if not 1 <= max_new <= self.buckets.max_new:
            raise ValueError(f"max_new must lie in 1..{self.buckets.max_new} (Buckets.max_new), got {max_new}")
        return max_new

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
        """Decode up to `max_new` tokens, and return a DecodeState to resume from; see `hybridvlm.inference.sampling.decode`.

        Args:
            logits: [B,V]; None goes on from a DecodeState.
            caches: may not be used again: their memory goes over to the new ones.
            seeds: [B] int32.
            max_new: most tokens.
            sampling: how they are chosen (default: greedy).
            budget: of reasoning.
            inside: which prompts opened it.
            answer: with a budget, most tokens after the reasoning, over all pieces.
        """
        sampling = Sampling() if sampling is None else sampling
        # the last sampled token is not written to the caches; a resumed call writes the one of the call before
        check_capacity(caches, max_new - (logits is not None), "decode puts in")
        opened = None
        if budget is not None and logits is not None:
            opened = [False] * len(seeds) if inside is None else inside
        rest = self._decoding(seeds, max_new if answer is None else answer, opened, begins=logits is not None)
        tokens, lengths, state = self._run(
            functions.decode,
            self.params,
            logits,
            caches,
            *rest,
            max_new=max_new,
            sampling=sampling,
            budget=budget,
            donate=(2,),
        )
        tokens, lengths = placement.to_host((tokens, lengths))
        return tokens[: len(seeds)], lengths[: len(seeds)], state

    def _decoding(
        self, seeds: np.ndarray, limit: int, inside: Sequence[bool] | None, begins: bool = True
    ) -> tuple[Any, ...]:
        """The arguments of `functions.decode` after the caches."""
        opened = None if inside is None else np.asarray(inside, bool)
        if self.mesh is None:
            return seeds, np.int32(limit), opened
        real = np.ones(len(seeds), bool) if begins else None
        seeds, opened, real = placement.put_rows((np.asarray(seeds, np.int32), opened, real), self.mesh)
        return seeds, np.int32(limit), opened, real

    def extend(self, ids: np.ndarray, segment: np.ndarray, caches: Any) -> tuple[jax.Array, Any]:
        """Text after what the caches hold, ids and segment [B,T] -> logits [B,V] after it, and the longer caches.

        ValueError where they have fewer than T slots free: prefill(decode_capacity=...) says how many there are.
        """
        check_capacity(caches, ids.shape[1], "extend takes")
        if self.mesh is not None:
            ids, segment = placement.put_rows((ids, segment), self.mesh)
        return self._run(functions.extend, self.params, ids, segment, caches, donate=(3,))

    def build_video_memory(self, batch: Batch, visual: Any, plan: ReductionPlan | None) -> Any:
        """What every question needs of these videos under a plan (`shares_video`), to be given to `prefill` as `visual`."""
        videos = len(batch.input_ids)
        batch, visual = self._placed(batch, visual, plan)
        args = (self.params, batch, visual)
        program = self._program(functions.build_video_memory, *args, plan=plan)
        # questions belong to videos, not to the rows that fill a mesh up
        return dataclasses.replace(program(*args), videos=videos, peak_bytes=peak_bytes(program))

    def verify(self, generation: Generation) -> None:
        """Raise PlanMismatch if what the run kept is not what its plan says."""
        if generation.plan is not None:
            kept, counts = placement.to_host((generation.prefilled.decoder.kept, generation.prefilled.counts))
            drops = np.asarray(generation.plan.drops, int)
            entering = [int((drops < layer).sum()) for layer in range(generation.plan.layers)]
            generation.plan.verify(kept[entering, :, 0], counts[..., 0])

    def _program(self, function: Callable[..., Any], *args: Any, **static: Any) -> Any:
        if self.mesh is None:
            return self.programs.get(function, *args, family=self.family, config=self.config, **static)
        static = {"config": self._part, **static}
        return self.programs.get(
            placement.over_mesh,
            *args,
            phase=function,
            results=functions.RESULTS[function],
            mesh=self.mesh,
            specs=placement.arguments_specs(args),
            family=self.family,
            **static,
        )

    def _run(self, function: Callable[..., Any], *args: Any, **static: Any) -> Any:
        return self._program(function, *args, **static)(*args)
