"""The evaluation loop: every batch of questions goes through dense and every reduced variant before the next one.

So the variants' clocks tick side by side, a video is decoded and encoded once, and a kill costs at most one batch. The
first call of each program is repeated and only the repetition is timed: compilation and warm-up are never on the clock.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import functools
import os
import statistics
import time
import uuid
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import jax

from hybridvlm.console import progress as bar_of
from hybridvlm.distributed import Process
from hybridvlm.eval.ahead import Ahead
from hybridvlm.eval.calls import Call, by_video, grouped, whole
from hybridvlm.eval.deal import deal
from hybridvlm.eval.encodings import CACHE_BYTES, EncodedBatch, EncodedVideos, Encoding
from hybridvlm.eval.keys import AnswerKeys
from hybridvlm.eval.layouts import Asking, Prompts
from hybridvlm.eval.results import SampleStore, achieved
from hybridvlm.eval.tasks import Sample, Task
from hybridvlm.eval.variants import DENSE, Bucket, Planner, Variant
from hybridvlm.inference.generation import Generation
from hybridvlm.inference.memories import VideoMemories
from hybridvlm.inference.model import Model
from hybridvlm.inference.placement import put_visual, row_parts
from hybridvlm.inference.program_cache import compile_count
from hybridvlm.inference.thinking import UNFINISHED, think_budget
from hybridvlm.models.prompt import Batch, Layout, rest_length
from hybridvlm.parallel.mesh import spans_processes
from hybridvlm.reduction import ReductionPlan

# Questions on a video from which on a hybrid shares the layers before the first drop: with 4, the second program that it takes cost
# what it saved (the embedded benchmark, dense along with it), with 16 it did not.
SHARED_FROM = 8
# Variants that are answered side by side: as many as a process on a CPU holds the programs of (`ProgramCache`), of 26 layers.
TOGETHER = 8


@dataclasses.dataclass(frozen=True)
class Pending:
    """A batch of questions of one bucket, some of whose answers are still to be found.

    Attributes:
        number: of the batch, no two processes' the same.
        bucket: of its questions.
        samples: the questions.
        missing: those whose answers are to be found, by variant.
    """

    number: int
    bucket: Bucket
    samples: list[Sample]
    missing: dict[Variant, list[Sample]]


class Runner:
    """Answers a task's questions under variants, resuming from what a store already holds."""

    def __init__(
        self,
        model: Model,
        task: Task,
        variants: Sequence[Variant],
        planner: Planner,
        store: SampleStore,
        *,
        batch_size: int = 8,
        weights: str = "",
        dtype: str = "float32",
        cache_bytes: int = CACHE_BYTES,
        asking: Asking = Asking(),
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.model, self.task, self.planner, self.store = model, task, planner, store
        self.variants = [DENSE, *(v for v in variants if v != DENSE)]
        self.batch_size, self.asking = batch_size, asking
        # a model over the devices of all processes: each of them takes part in every batch, else each has videos of its own
        self.lockstep = spans_processes(model.mesh)
        self.share = Process(0, 1) if self.lockstep else store.process
        think_budget(model, asking.think_tokens)
        self.run_id = f"{time.strftime('%Y%m%dT%H%M%S')}-{uuid.uuid4().hex[:6]}"
        self.prompts = Prompts(model, task, planner.base, asking, held=4 * batch_size)
        self.available, self.buckets = self.prompts.available, self.prompts.buckets
        self.key = AnswerKeys(model, task, planner, self.buckets, asking, weights=weights, dtype=dtype)
        self.seconds = 0.0  # of `run`
        self._groups = 0  # of variants that were answered side by side
        self._warm: set[tuple[Variant, Bucket, int]] = set()
        self._compiled: collections.Counter[tuple[Variant, Bucket]] = collections.Counter()  # ahead of their answers
        self._memories = VideoMemories()
        self._memory_seconds: dict[Hashable, float] = {}  # that they took
        self._ahead = Ahead(task, lambda video: self.prompts.frame_bytes.get(video, 0))
        self.videos = EncodedVideos(model, task, self._ahead, self.prompts.frames, cache_bytes, batch_size)

    def plans(self, variant: Variant) -> dict[str, ReductionPlan | None]:
        """The plan of a variant for every sample that can be asked, by its id: that of the sample's bucket."""
        return {sample.id: self.planner(variant, self.buckets[sample.id])[1] for sample in self.available}

    def batches(self, samples: Sequence[Sample] | None = None) -> Iterator[tuple[Bucket, list[Sample]]]:
        """Samples (default: all that can be asked) of one bucket, `batch_size` at a time, the longest videos first."""
        asked = self.available if samples is None else samples
        for bucket in sorted({self.buckets[sample.id] for sample in asked}, reverse=True):
            own = grouped([sample for sample in asked if self.buckets[sample.id] == bucket], self.prompts.shared)
            for start in range(0, len(own), self.batch_size):
                yield bucket, own[start : start + self.batch_size]

    def pending(self) -> int:
        """Answers that are still to be found: samples times variants, less what the store holds."""
        return sum(self.key(v, s) not in self.store for v in self.variants for s in self.task.samples)

    def run(
        self,
        progress: Callable[[int, str], None] = lambda count, text: None,
        variants: Sequence[Variant] | None = None,
    ) -> None:
        """Answer what is missing, of several processes each its share, or all of it together (`lockstep`).

        Args:
            progress: (count, label) is called after each batch of a variant with its new answers.
            variants: instead of all that this runner was made for.

        Raises:
            PlanMismatch: a run kept something else than its plan says; what was answered before is in the store.
        """
        variants = self.variants if variants is None else variants
        self._note_unavailable(variants, progress)
        began = time.perf_counter()
        dense, reduced = [v for v in variants if v == DENSE], [v for v in variants if v != DENSE]
        left = [v for v in reduced if any(self.key(v, sample) not in self.store for sample in self.available)]
        for start in range(0, max(1, len(left)), TOGETHER):
            self._warm.clear()  # programs of the group before may be gone
            self._run_together(dense + left[start : start + TOGETHER], progress)
            self._groups += 1
        self.seconds += time.perf_counter() - began

    @property
    def _clock(self) -> str:
        """The run by whose clock a record counts: each group of variants has dense along, what another one timed is no counterpart."""
        return f"{self.run_id}.{self._groups}" if self._groups else self.run_id

    def _run_together(self, variants: Sequence[Variant], progress: Callable[[int, str], None]) -> None:
        """Answer what is missing of these variants, batch by batch."""
        self._memories.count = max(1, len(variants))
        unseen = functools.partial(self._unseen, variants)
        for pending in self._ahead.over(self.missing(variants), unseen):
            batch = self._encoded_batch(pending, self._encodings(variants, pending.bucket))
            read = {sample.id for sample in batch.samples}
            unread = [sample for sample in pending.samples if sample.id not in read]
            # dense goes along, so that every clock has its counterpart
            run = [variant for variant in variants if pending.missing[variant] or variant == DENSE]
            if read:
                self._compile(run, batch)
            for variant in run:
                records = [self._unanswered(variant, sample) for sample in unread]
                records += self._answer(variant, batch) if read else []
                # what is known already is not answered twice, but for dense and its clock
                self.store.append(r for r in records if variant == DENSE or r["key"] not in self.store)
                progress(len(pending.missing[variant]), variant.label)
            # its visual tokens leave the devices before those of the next are made
            del batch
        self._memories.clear()

    @property
    def encode_ms(self) -> list[float]:
        """Milliseconds of the tower for every video, whole, without first calls of a program."""
        return self.videos.whole_ms

    @property
    def waited(self) -> float:
        """Seconds of `run` in which the devices waited for videos to be decoded."""
        return self._ahead.waited

    def _unseen(self, variants: Sequence[Variant], pending: Pending) -> list[str]:
        """The videos of a batch that have to be decoded for these variants."""
        videos = [] if self.task.blind else dict.fromkeys(sample.video for sample in pending.samples)
        return self.videos.undecoded(videos, pending.bucket, self._encodings(variants, pending.bucket))

    def _encoded_batch(self, pending: Pending, encodings: Sequence[Encoding]) -> EncodedBatch:
        """A batch with the visual tokens of its videos, without the questions on those that cannot be read."""
        number, bucket = pending.number, pending.bucket
        if self.task.blind:
            return EncodedBatch(number, bucket, pending.samples, {}, {})
        encoded = {s.id: self.videos.get(s.video, bucket, encodings) for s in pending.samples}
        tokens = {id: found for id, found in encoded.items() if found is not None}
        read = [sample for sample in pending.samples if sample.id in tokens]
        batch = EncodedBatch(number, bucket, read, tokens, {})
        if not read:
            return batch
        rows = whole(read, self.batch_size)[0].rows
        return dataclasses.replace(batch, visual={e: self._put(batch.stacked(rows, e)) for e in encodings})

    def _note_unavailable(self, variants: Sequence[Variant], progress: Callable[[int, str], None]) -> None:
        """Records of the samples that cannot be asked, made by the first process."""
        if not self.task.unavailable or not self.store.process.first:
            return
        for variant in variants:
            absent = [
                s for s in self.task.samples if s.id in self.task.unavailable and self.key(variant, s) not in self.store
            ]
            self.store.append(self._unanswered(variant, sample) for sample in absent)
            progress(len(absent), variant.label)

    def missing(self, variants: Sequence[Variant]) -> list[Pending]:
        """The batches of this process's share of what is still to be found."""
        absent = {v: [s for s in self.available if self.key(v, s) not in self.store] for v in variants}
        process, ids = self.share, {v: {s.id for s in samples} for v, samples in absent.items()}
        # of a video with all its questions: tokens of the tower once, of the decoder for each
        costs: dict[str, float] = {}
        for sample in self.available:
            count = sum(sample.id in missing for missing in ids.values())
            if count:
                costs[sample.video] = costs.get(sample.video, 1.0) + count * max(1, self.buckets[sample.id].frames)
        mine = set(deal(costs, process.count)[process.index])
        pending = [s for s in self.available if s.video in mine and any(s.id in missing for missing in ids.values())]
        return [
            Pending(
                number * process.count + process.index,
                bucket,
                samples,
                {v: [s for s in samples if s.id in ids[v]] for v in variants},
            )
            for number, (bucket, samples) in enumerate(self.batches(pending))
        ]

    def _compile(self, variants: Sequence[Variant], batch: EncodedBatch) -> None:
        """Compile what a bucket's first batch needs, methods side by side: half of a compilation is the work of one thread."""
        bucket = batch.bucket
        cold = [variant for variant in variants if not any((variant, bucket) == warm[:2] for warm in self._warm)]
        if len(cold) < 2:
            return
        calls = [(variant, self._calls(variant, batch)[-1]) for variant in cold]
        prompts = [self._batch(variant, bucket, call.rows) for variant, call in calls]

        def compile_one(prompts: Batch, given: Any, plan: ReductionPlan | None) -> int:
            before = compile_count(thread=True)
            self.model.compile_prefill(prompts, given, plan, self.asking.think_tokens)
            return compile_count(thread=True) - before

        workers = min(len(cold), os.cpu_count() or 1, 4)
        with (
            bar_of(len(cold), "program", "compile", shown=self.store.process.first, leave=False) as bar,
            concurrent.futures.ThreadPoolExecutor(workers) as pool,
        ):
            started = {}
            for (variant, call), (rows, plan) in zip(calls, prompts, strict=True):
                # programs run in this thread alone: of those over several devices two at once could wait for each other
                own = batch.visual.get(self._encoding(variant, bucket))
                given = self._build(variant, batch, call)[0] if call.videos else own
                started[pool.submit(compile_one, rows, given, plan)] = variant
            for done in concurrent.futures.as_completed(started):
                self._compiled[started[done], bucket] = done.result()
                bar.set_postfix_str(started[done].label)
                bar.update()

    def _calls(self, variant: Variant, batch: EncodedBatch) -> list[Call]:
        """How a batch is answered: under a plan by the question, those about one video go on from its memory; of a model whose video
        is a stream of its own, under any plan that has one."""
        _, plan = self.planner(variant, batch.bucket)
        family = self.model.family
        shared = family.split_rows is not None or (plan is not None and plan.depends_on_query)
        if self.task.blind or not shared or not family.memory_serves(plan):
            return whole(batch.samples, self.batch_size)
        parts = 1 if self.model.mesh is None else row_parts(self.model.mesh)
        own = {s.id: self.prompts.shared[s.id] for s in self.available if self.buckets[s.id] == batch.bucket}
        return by_video(batch.samples, own, self.batch_size, parts, 2 if family.split_rows is not None else SHARED_FROM)

    def _build(self, variant: Variant, batch: EncodedBatch, call: Call) -> tuple[Any, float]:
        """(the memory of a call's videos, the seconds that it took from visual tokens on the device, as those of a prefill are)."""
        prompts, plan = self._batch(variant, batch.bucket, call.videos)
        prompts, visual = self._put((prompts, batch.stacked(call.videos, self._encoding(variant, batch.bucket))))
        if self.model.mesh is not None:
            visual = jax.block_until_ready(put_visual(visual, self.model.mesh))
        start = time.perf_counter()
        memory = jax.block_until_ready(self.model.build_video_memory(prompts, visual, plan))
        return memory, time.perf_counter() - start

    def _memory(
        self, variant: Variant, batch: EncodedBatch, call: Call, plan: ReductionPlan | None
    ) -> tuple[Any, float]:
        """(the memory of a call's videos, the seconds that it took for one of them, when it was made)."""
        parts = tuple(self.prompts.shared[sample.id] for sample in call.videos)
        # without a question in it the memory depends on all of the plan
        by_question = plan is not None and plan.depends_on_query
        made_of = (plan.prefix_key, plan.row_length(0)) if plan is not None and by_question else (plan, batch.bucket)
        key, warm = (*made_of, parts), (*made_of, len(parts))

        def make() -> Any:
            if warm not in self._memory_seconds:
                self._build(variant, batch, call)
                self._memory_seconds[warm] = 0.0
            memory, seconds = self._build(variant, batch, call)
            self._memory_seconds[key] = seconds / len(parts)
            return memory

        memory, _ = self._memories.get(key, make)
        return memory, self._memory_seconds[key]

    def _put(self, arrays: Any) -> Any:
        """Arrays on the device; a mesh is sent its parts by the model, of the host's arrays."""
        return arrays if self.model.mesh is not None else jax.block_until_ready(jax.device_put(arrays))

    def _batch(self, variant: Variant, bucket: Bucket, rows: Sequence[Sample]) -> tuple[Batch, ReductionPlan | None]:
        reduction, _ = self.planner(variant, bucket)

        def layouts(factors: tuple[int, int, int]) -> list[Layout]:
            return [self.prompts.layout(sample, factors) for sample in rows]

        # of the bucket that was planned for, also under a variant that a smaller one would do for
        buckets = dataclasses.replace(self.model.buckets, text=(bucket.text,))
        return self.model.batch_of(layouts, reduction, config=bucket.config(self.model), buckets=buckets)

    def _answer(self, variant: Variant, batch: EncodedBatch) -> list[dict[str, Any]]:
        """Records of one batch under one variant."""
        bucket = batch.bucket
        compiled = compile_count() - self._compiled.pop((variant, bucket), 0)
        m = 0 if self.task.blind else bucket.config(self.model).vision.tokens_per_frame
        encoding = self._encoding(variant, bucket)
        out, prefill, decode, further, peak = [], 0.0, 0.0, list[float](), 0
        together = whole(batch.samples, self.batch_size)[0].rows
        for call in self._calls(variant, batch):
            visual = batch.visual.get(encoding)
            if not (call.videos or self.task.blind or call.rows == together):
                # the other questions of the batch go on from memories
                visual = self._put(batch.stacked(call.rows, encoding))
            generation, shared_seconds = self._generate(variant, batch, call, visual)
            shares = achieved(generation, [self.prompts.layout(sample).frames * m for sample in call.rows])
            rows, peak = len(call.rows), max(peak, generation.peak_bytes)
            # as if every question were the first on its video, so that methods and dense can be compared
            prefill += len(call.answered) * (generation.timing.prefill / rows + shared_seconds)
            decode += len(call.answered) * generation.timing.decode / rows
            further += [generation.timing.prefill / rows] * bool(call.videos)
            for row, sample in call.answered:
                text = None if generation.unfinished[row] else generation.text[row]
                record = self._record(variant, sample) | {
                    "prediction": generation.text[row],
                    **self.task.score(text, sample),
                    "retention": shares[row],
                    "encode_ms": self.videos.ms(sample.video, bucket, encoding),
                }
                if generation.thinking[row]:
                    record["thinking"] = generation.thinking[row]
                if generation.unfinished[row]:
                    record["no_answer"] = UNFINISHED
                out.append(record)
        clock = {
            "prefill_ms": 1e3 * prefill / len(out),
            "decode_ms": 1e3 * decode / len(out),
            "compiles": compile_count() - compiled,
            "peak_bytes": peak,
            "run": self._clock,
            "batch": batch.number,
        }
        if further:
            clock["further_ms"] = 1e3 * statistics.median(further)
        return [record | clock for record in out]

    def _generate(self, variant: Variant, batch: EncodedBatch, call: Call, visual: Any) -> tuple[Generation, float]:
        """(what a call gives, the seconds that the memory of one of its videos took); its first run is repeated, and not timed."""
        bucket = batch.bucket
        prompts, plan = self._batch(variant, bucket, call.rows)
        seconds, length = 0.0, 0
        if call.videos:
            visual, seconds = self._memory(variant, batch, call, plan)
            # of two streams the text is whole in every prompt
            whole_text = self.model.family.split_rows is not None
            length = bucket.text if whole_text else self.model.buckets.pick("text", rest_length(prompts))
        else:
            prompts = self._put(prompts)
        ask = functools.partial(self.model.generate, prompts, visual, plan, think_tokens=self.asking.think_tokens)
        if (variant, bucket, length) not in self._warm:
            ask()
            self._warm.add((variant, bucket, length))
        generation = ask()
        self.model.verify(generation)
        self._memories.spill()
        return generation, seconds

    def _record(self, variant: Variant, sample: Sample) -> dict[str, Any]:
        """What is known of an answer before it is given."""
        record = {
            "key": self.key(variant, sample),
            "task": self.task.name,
            "method": variant.method,
            "budget": variant.budget,
            "id": sample.id,
            "video": sample.video,
            "type": sample.type,
            "answer": sample.answer,
            **self.task.details(sample),
        }
        if sample.groups:
            record |= {"groups": dict(sample.groups), "cluster": sample.whole}
        remarks = self.task.remarks(sample.video)
        return record | {"remarks": remarks} if remarks else record

    def _unanswered(self, variant: Variant, sample: Sample) -> dict[str, Any]:
        """The record of a question whose video cannot be read; whether that is wrong is settled by `Task.judged`."""
        nothing = {"prediction": None, "retention": None, "run": self._clock}
        reason = self.task.unavailable.get(sample.id)
        failure = {"failure": reason} if reason else self.videos.unread[sample.video]
        return self._record(variant, sample) | nothing | failure

    def _encoding(self, variant: Variant, bucket: Bucket) -> Encoding:
        """What a variant has the tower do, and would if it ran alone."""
        _, plan = self.planner(variant, bucket)
        return Encoding() if plan is None else Encoding(plan.pixel_selection, plan.needs_attention)

    def _encodings(self, variants: Sequence[Variant], bucket: Bucket) -> tuple[Encoding, ...]:
        """The same of all these variants, each once."""
        return tuple(dict.fromkeys(self._encoding(variant, bucket) for variant in variants))
