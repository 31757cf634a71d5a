"""The evaluation loop: every batch of questions goes through dense and every reduced variant before the next one.

So the variants' clocks tick side by side, a video is decoded and encoded once, and a kill costs at most one batch. The
first call of each program is repeated and only the repetition is timed: compilation and warm-up are never on the clock.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import os
import statistics
import time
import uuid
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from hybridvlm.config import to_dict
from hybridvlm.console import progress as bar_of
from hybridvlm.distributed import Process, gather
from hybridvlm.eval.ahead import Ahead
from hybridvlm.eval.calls import Call, by_video, grouped, shared_part, whole
from hybridvlm.eval.deal import deal, weights_fingerprint
from hybridvlm.eval.encodings import CACHE_BYTES, EncodedVideos, Encoding, Encodings
from hybridvlm.eval.layouts import Asking, lay_out
from hybridvlm.eval.results import SampleStore, achieved, digest, failure_of, versions
from hybridvlm.eval.tasks import Sample, Task
from hybridvlm.eval.variants import DENSE, Bucket, Planner, Variant
from hybridvlm.inference.memories import VideoMemories
from hybridvlm.inference.model import Model
from hybridvlm.inference.placement import put_visual, row_parts
from hybridvlm.inference.program_cache import compile_count
from hybridvlm.inference.programs import Generation
from hybridvlm.inference.thinking import UNFINISHED, switch, think_budget
from hybridvlm.models.media import Clip
from hybridvlm.models.prompt import Batch, Layout, rest_length
from hybridvlm.parallel.mesh import spans_processes
from hybridvlm.reduction import ReductionPlan
from hybridvlm.video import VideoError

# Questions on a video from which on a hybrid shares the layers before the first drop: with 4, the second program that it takes cost
# what it saved (the embedded benchmark, dense along with it), with 16 it did not.
SHARED_FROM = 8


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
        self._running: Sequence[Variant] | None = None  # what `run` was asked for instead
        self.batch_size = batch_size
        # a model over the devices of all processes: each of them takes part in every batch, else each has videos of its own
        self.lockstep = spans_processes(model.mesh)
        self.share = Process(0, 1) if self.lockstep else store.process
        self.asking, self._switch = asking, switch(model, asking.thinking)
        think_budget(model, asking.think_tokens)
        self.run_id = f"{time.strftime('%Y%m%dT%H%M%S')}-{uuid.uuid4().hex[:6]}"
        template = getattr(model.tokenizer, "template", None) or getattr(model.family, "CHAT", "")
        self._common = {
            "model": to_dict(model.config) | {"name": ""},  # a folder's name is no part of what was asked
            "weights": weights or weights_fingerprint(None, model.whole_params()),
            "dtype": dtype,
            "buckets": to_dict(model.buckets),
            "style": to_dict(model.style),
            "task": task.name,
            "allow_special_tokens": bool(getattr(model.tokenizer, "allow_special_tokens", False)),
            "tokenizer": hashlib.sha256(model.tokenizer.tokenizer.to_str().encode()).hexdigest()
            if model.tokenizer
            else None,
            "template": template if hasattr(model.tokenizer, "chat") else None,
            "asking": dataclasses.asdict(asking),
            "library": versions()["hybridvlm"],
        }
        self._keys: dict[tuple[Variant, str], str] = {}
        self._settings: dict[tuple[Variant, Bucket], str] = {}
        self._warm: set[tuple[Variant, Bucket, int]] = set()
        self._compiled: collections.Counter[tuple[Variant, Bucket]] = collections.Counter()  # ahead of their answers
        self._videos = EncodedVideos(model, cache_bytes, batch_size)
        self._seen: dict[str, Encodings] = {}  # visual tokens of the samples of the batch at hand
        self._layouts: dict[tuple[str, tuple[int, int, int]], Layout] = {}  # of the batch at hand
        self._shared: dict[str, Hashable | None] = {}  # by sample, what its prompt has in common with others
        self._memories = VideoMemories()
        self._memory_seconds: dict[Hashable, float] = {}  # that they took
        self._unread: dict[str, dict[str, Any]] = {}  # video -> why it cannot be read, as a record has it
        self.seconds = 0.0  # of `run`
        self._frame_bytes: dict[str, int] = {}  # of a video's decoded frames
        self._frames: dict[str, int] = {}  # of a video, as prompts have them
        self._ahead = Ahead(task, lambda video: self._frame_bytes.get(video, 0))
        self.available = [sample for sample in task.samples if sample.id not in task.unavailable]
        self.buckets = {sample.id: self._bucket(sample) for sample in self.available}

    def _bucket(self, sample: Sample) -> Bucket:
        pick = self.model.buckets.pick
        try:
            layout = self.layout(sample)
            self._shared[sample.id] = shared_part(sample.video, layout)
            if self.task.blind:
                return Bucket(0, pick("text", layout.text), kind="text")
            clip, config = self.task.clip(sample.video, pixels=False)
            size = clip.size if clip.kind == "image" else config.tower.image_size
            self._frames[sample.video] = layout.frames
            self._frame_bytes[sample.video] = 3 * len(clip.seconds) * size[0] * size[1]
            frames = pick("frames", layout.frames)
            text = self.model.text_needed([layout], frames, self.planner.base)
            return Bucket(frames, pick("text", text), config.tower.image_size, clip.kind)
        except ValueError as error:
            raise ValueError(f"{self.task.name}, question {sample.id}: {error}") from error

    def layout(self, sample: Sample, factors: tuple[int, int, int] = (1, 1, 1)) -> Layout:
        """A sample's prompt, as `Conversation` lays out the first question on a video."""
        if (sample.id, factors) not in self._layouts:
            if len(self._layouts) > 4 * self.batch_size:
                self._layouts.clear()
            self._layouts[sample.id, factors] = self._layout(sample, factors)
        return self._layouts[sample.id, factors]

    def _layout(self, sample: Sample, factors: tuple[int, int, int]) -> Layout:
        return lay_out(self.model, self.task, sample, factors, self.asking, self._switch)

    def key(self, variant: Variant, sample: Sample) -> str:
        """What a stored answer must share with this run to stand for it: configuration, weights, plan, sample."""
        if (variant, sample.id) not in self._keys:
            if sample.id in self.task.unavailable:
                absent = [self._common, dataclasses.asdict(variant), sample.id, self.task.unavailable[sample.id]]
                return self._keys.setdefault((variant, sample.id), digest(absent))
            bucket = self.buckets[sample.id]
            if (variant, bucket) not in self._settings:
                _, plan = self.planner(variant, bucket)
                self._settings[variant, bucket] = digest(
                    [self._common, bucket, None if plan is None else plan.to_dict()]
                )
            fields = dataclasses.asdict(sample) | {"video": ""}
            for name in ("groups", "cluster"):  # no part of what was asked, like the video's name
                del fields[name]
            asked = [
                fields,
                self.task.prompt(sample),
                "" if self.task.blind else self.task.identity(sample.video),
            ]
            self._keys[variant, sample.id] = digest([self._settings[variant, bucket], asked])
        return self._keys[variant, sample.id]

    def plans(self, variant: Variant) -> dict[str, ReductionPlan | None]:
        """The plan of a variant for every sample that can be asked, by its id: that of the sample's bucket."""
        return {sample.id: self.planner(variant, self.buckets[sample.id])[1] for sample in self.available}

    def batches(self, samples: Sequence[Sample] | None = None) -> Iterator[tuple[Bucket, list[Sample]]]:
        """Samples (default: all that can be asked) of one bucket, `batch_size` at a time, the longest videos first."""
        asked = self.available if samples is None else samples
        for bucket in sorted({self.buckets[sample.id] for sample in asked}, reverse=True):
            own = grouped([sample for sample in asked if self.buckets[sample.id] == bucket], self._shared)
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
        self._running = variants
        variants = self.variants if variants is None else variants
        self._note_unavailable(variants, progress)
        began = time.perf_counter()
        self._memories.count = max(1, len(variants))
        for number, (bucket, samples), missing in self._ahead.over(self._missing(variants), self._unseen):
            read, unread, visual = samples, list[Sample](), dict[Encoding, Any]()
            if not self.task.blind:
                encoded = {sample.id: self._encoded(sample.video, bucket) for sample in samples}
                seen = {id: tokens for id, tokens in encoded.items() if tokens is not None}
                unread = [sample for sample in samples if sample.id not in seen]
                read = [sample for sample in samples if sample.id in seen]
            if read and not self.task.blind:
                self._seen, rows = seen, whole(read, self.batch_size)[0].rows
                visual = {e: self._put(np.stack([seen[s.id][e] for s in rows])) for e in self._encodings(bucket)}
            if read:
                self._compile([v for v in variants if missing[v] or v == DENSE], bucket, read, visual)
            for variant in variants:
                # dense goes along, so that every clock has its counterpart
                if missing[variant] or variant == DENSE:
                    records = [self._unanswered(variant, sample) for sample in unread]
                    if read:
                        records += self._answer(
                            variant, bucket, number, read, visual.get(self._encoding(variant, bucket))
                        )
                    # what is known already is not answered twice, but for dense and its clock
                    self.store.append(r for r in records if variant == DENSE or r["key"] not in self.store)
                    progress(len(missing[variant]), variant.label)
        self._memories.clear()
        self.seconds += time.perf_counter() - began

    @property
    def encode_ms(self) -> list[float]:
        """Milliseconds of the tower for every video, whole, without first calls of a program."""
        return self._videos.whole_ms

    @property
    def waited(self) -> float:
        """Seconds of `run` in which the devices waited for videos to be decoded."""
        return self._ahead.waited

    def _unseen(self, item: tuple[int, tuple[Bucket, list[Sample]], Any]) -> list[str]:
        """The videos of a batch that have to be decoded."""
        _, (bucket, samples), _ = item
        videos = [] if self.task.blind else dict.fromkeys(sample.video for sample in samples)
        encodings = self._encodings(bucket)
        return [v for v in videos if v not in self._unread and self._videos.get(v, bucket, encodings) is None]

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

    def _missing(
        self, variants: Sequence[Variant]
    ) -> list[tuple[int, tuple[Bucket, list[Sample]], dict[Variant, list[Sample]]]]:
        """Batches of this process's share of what is still to be found: (number, batch, samples by variant)."""
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
            (
                # numbers of no two processes are the same
                number * process.count + process.index,
                (bucket, samples),
                {v: [s for s in samples if s.id in ids[v]] for v in variants},
            )
            for number, (bucket, samples) in enumerate(self.batches(pending))
        ]

    def _compile(
        self,
        variants: Sequence[Variant],
        bucket: Bucket,
        read: Sequence[Sample],
        visual: Mapping[Encoding, Any],
    ) -> None:
        """Compile what a bucket's first batch needs, methods side by side: half of a compilation is the work of one thread."""
        cold = [variant for variant in variants if not any((variant, bucket) == warm[:2] for warm in self._warm)]
        if len(cold) < 2:
            return
        calls = [(variant, self._calls(variant, bucket, read)[-1]) for variant in cold]
        batches = [self._batch(variant, bucket, call.rows) for variant, call in calls]

        def compile_one(batch: Batch, given: Any, plan: ReductionPlan | None) -> int:
            before = compile_count(thread=True)
            self.model.compile_prefill(batch, given, plan, self.asking.think_tokens)
            return compile_count(thread=True) - before

        workers = min(len(cold), os.cpu_count() or 1, 4)
        with (
            bar_of(len(cold), "program", "compile", shown=self.store.process.first, leave=False) as bar,
            concurrent.futures.ThreadPoolExecutor(workers) as pool,
        ):
            started = {}
            for (variant, call), (batch, plan) in zip(calls, batches, strict=True):
                # programs run in this thread alone: of those over several devices two at once could wait for each other
                own = visual.get(self._encoding(variant, bucket))
                given = self._build(variant, bucket, call)[0] if call.videos else own
                started[pool.submit(compile_one, batch, given, plan)] = variant
            for done in concurrent.futures.as_completed(started):
                self._compiled[started[done], bucket] = done.result()
                bar.set_postfix_str(started[done].label)
                bar.update()

    def _calls(self, variant: Variant, bucket: Bucket, read: Sequence[Sample]) -> list[Call]:
        """How a batch is answered: under a plan by the question, those about one video go on from its memory; of a model whose video
        is a stream of its own, under any plan that has one."""
        _, plan = self.planner(variant, bucket)
        family = self.model.family
        shared = family.split_rows is not None or (plan is not None and plan.depends_on_query)
        if self.task.blind or not shared or not family.memory_serves(plan):
            return whole(read, self.batch_size)
        parts = 1 if self.model.mesh is None else row_parts(self.model.mesh)
        own = {s.id: self._shared[s.id] for s in self.available if self.buckets[s.id] == bucket}
        return by_video(read, own, self.batch_size, parts, 2 if family.split_rows is not None else SHARED_FROM)

    def _build(self, variant: Variant, bucket: Bucket, call: Call) -> tuple[Any, float]:
        """(the memory of a call's videos, the seconds that it took from visual tokens on the device, as those of a prefill are)."""
        batch, plan = self._batch(variant, bucket, call.videos)
        encoding = self._encoding(variant, bucket)
        batch, visual = self._put((batch, np.stack([self._seen[sample.id][encoding] for sample in call.videos])))
        if self.model.mesh is not None:
            visual = jax.block_until_ready(put_visual(visual, self.model.mesh))
        start = time.perf_counter()
        memory = jax.block_until_ready(self.model.build_video_memory(batch, visual, plan))
        return memory, time.perf_counter() - start

    def _memory(self, variant: Variant, bucket: Bucket, call: Call, plan: ReductionPlan | None) -> tuple[Any, float]:
        """(the memory of a call's videos, the seconds that it took for one of them, when it was made)."""
        parts = tuple(self._shared[sample.id] for sample in call.videos)
        # without a question in it the memory depends on all of the plan
        by_question = plan is not None and plan.depends_on_query
        made_of = (plan.prefix_key, plan.row_length(0)) if plan is not None and by_question else (plan, bucket)
        key, warm = (*made_of, parts), (*made_of, len(parts))

        def make() -> Any:
            if warm not in self._memory_seconds:
                self._build(variant, bucket, call)
                self._memory_seconds[warm] = 0.0
            memory, seconds = self._build(variant, bucket, call)
            self._memory_seconds[key] = seconds / len(parts)
            return memory

        memory, _ = self._memories.get(key, make)
        return memory, self._memory_seconds[key]

    def _put(self, arrays: Any) -> Any:
        """Arrays on the device; a mesh is sent its parts by the model, of the host's arrays."""
        return arrays if self.model.mesh is not None else jax.block_until_ready(jax.device_put(arrays))

    def _batch(self, variant: Variant, bucket: Bucket, rows: Sequence[Sample]) -> tuple[Batch, ReductionPlan | None]:
        reduction, _ = self.planner(variant, bucket)
        layouts = functools.partial(self._layouts_of, rows)
        # of the bucket that was planned for, also under a variant that a smaller one would do for
        buckets = dataclasses.replace(self.model.buckets, text=(bucket.text,))
        return self.model.batch_of(layouts, reduction, config=bucket.config(self.model), buckets=buckets)

    def _layouts_of(self, rows: Sequence[Sample], factors: tuple[int, int, int]) -> list[Layout]:
        return [self.layout(sample, factors) for sample in rows]

    def _answer(
        self,
        variant: Variant,
        bucket: Bucket,
        number: int,
        read: Sequence[Sample],
        visual: jax.Array | None,
    ) -> list[dict[str, Any]]:
        """Records of one batch under one variant."""
        compiled = compile_count() - self._compiled.pop((variant, bucket), 0)
        m = 0 if self.task.blind else bucket.config(self.model).vision.tokens_per_frame
        encoding = self._encoding(variant, bucket)
        out, prefill, decode, further, peak = [], 0.0, 0.0, list[float](), 0
        together = whole(read, self.batch_size)[0].rows
        for call in self._calls(variant, bucket, read):
            tokens = visual
            if not (call.videos or self.task.blind or call.rows == together):
                # the other questions of the batch go on from memories
                tokens = self._put(np.stack([self._seen[sample.id][encoding] for sample in call.rows]))
            generation, shared_seconds = self._generate(variant, bucket, call, tokens)
            shares = achieved(generation, [self.layout(sample).frames * m for sample in call.rows])
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
                    "encode_ms": self._videos.ms(sample.video, bucket, encoding),
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
            "run": self.run_id,
            "batch": number,
        }
        if further:
            clock["further_ms"] = 1e3 * statistics.median(further)
        return [record | clock for record in out]

    def _generate(self, variant: Variant, bucket: Bucket, call: Call, visual: Any) -> tuple[Generation, float]:
        """(what a call gives, the seconds that the memory of one of its videos took); its first run is repeated, and not timed."""
        batch, plan = self._batch(variant, bucket, call.rows)
        seconds, length = 0.0, 0
        if call.videos:
            visual, seconds = self._memory(variant, bucket, call, plan)
            # of two streams the text is whole in every prompt
            whole_text = self.model.family.split_rows is not None
            length = bucket.text if whole_text else self.model.buckets.pick("text", rest_length(batch))
        else:
            batch = self._put(batch)
        ask = functools.partial(self.model.generate, batch, visual, plan, think_tokens=self.asking.think_tokens)
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
        nothing = {"prediction": None, "retention": None, "run": self.run_id}
        reason = self.task.unavailable.get(sample.id)
        failure = {"failure": reason} if reason else self._unread[sample.video]
        return self._record(variant, sample) | nothing | failure

    def _encoding(self, variant: Variant, bucket: Bucket) -> Encoding:
        """What a variant has the tower do, and would if it ran alone."""
        _, plan = self.planner(variant, bucket)
        return Encoding() if plan is None else Encoding(plan.pixel_selection, plan.needs_attention)

    def _encodings(self, bucket: Bucket) -> tuple[Encoding, ...]:
        """The same of all variants that are run, each once."""
        return tuple(dict.fromkeys(self._encoding(variant, bucket) for variant in self._running or self.variants))

    def _encoded(self, video: str, bucket: Bucket) -> Encodings | None:
        """Visual tokens [F,m,D] of a video, F the bucket's frames, by `_encodings`; what is after its own frames is never looked at.

        None for a video that turns out damaged: its reason is kept, and its questions are not answered. A file that has gone
        meanwhile raises VideoError.
        """
        if video in self._unread:
            return None
        held = self._videos.get(video, bucket, self._encodings(bucket))
        if held is not None:
            return held
        read: tuple[Clip, Any] | None = None
        unread: dict[str, Any] = {}
        try:
            read = self._ahead.clip(video)
        except VideoError as error:
            if self.task.gone(video):
                raise
            unread = failure_of(error)
        if self.lockstep:
            # what one process cannot read, none of them encodes
            told = [json.loads(text) for text in gather(json.dumps(unread).encode())]
            unread = next(filter(None, told), {})
        if read is None or unread:
            self._unread[video] = unread
            return None
        clip, config = read
        pixels = self.model.family.pixels(config, [clip], bucket.frames)
        return self._videos.encode(video, bucket, self._encodings(bucket), pixels, self._frames[video])
