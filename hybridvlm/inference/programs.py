"""What a model runs: the tower, prefill, decoding, as compiled programs (program_cache.py)."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from hybridvlm.inference import frame_text, functions, placement
from hybridvlm.inference.generation import Generation, Timing
from hybridvlm.inference.program_cache import ProgramCache, peak_bytes
from hybridvlm.inference.prompts import ModelPrompts
from hybridvlm.inference.sampling import DecodeState, Sampling
from hybridvlm.inference.thinking import ThinkBudget, read_reply, think_budget
from hybridvlm.models.nemotron_vl.model import PrefillOutput
from hybridvlm.models.prompt import Batch, rest_length, rest_of
from hybridvlm.nn.caches import check_capacity
from hybridvlm.nn.prefix import Prefix
from hybridvlm.parallel.tensor import LocalConfig
from hybridvlm.reduction.pixels import PixelSelection
from hybridvlm.reduction.plan import ReductionPlan


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class ModelPrograms(ModelPrompts):
    """A model's prompts with the programs that run them; `Model` adds what people ask of it. It has these fields besides:

    Attributes:
        programs: what is compiled; copies by `dataclasses.replace` share it.
        mesh: the devices that `params` are laid out for, see `Model.to_mesh`; None for one device. Rows of padding that fill
            a batch up to come out even on a mesh stand at the end of what `prefill` and `extend` return.
    """

    _: dataclasses.KW_ONLY
    programs: ProgramCache = dataclasses.field(default_factory=ProgramCache)
    mesh: jax.sharding.Mesh | None = None

    @functools.cached_property
    def _part(self) -> LocalConfig:
        """What one device of the mesh holds."""
        assert self.mesh is not None
        return placement.part_of(self.config, self.params, self.mesh)

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
