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
import importlib.metadata
import json
import os
import platform
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from hybridvlm.config import Reduction, to_dict
from hybridvlm.eval.deal import deal, weights_fingerprint
from hybridvlm.eval.results import SampleStore
from hybridvlm.eval.tasks import Sample, Task
from hybridvlm.inference.model import Model
from hybridvlm.inference.program_cache import compile_count
from hybridvlm.inference.programs import Generation
from hybridvlm.inference.thinking import UNFINISHED, switch, think_budget
from hybridvlm.models.prompt import Batch, Layout, user_message
from hybridvlm.reduction import ReductionPlan, parse_method
from hybridvlm.video import VideoError

CACHE_BYTES = 1 << 29  # visual tokens of encoded videos that are held for the questions to come
MATCHED = 0.02  # relative error of predicted FLOPs up to which --match-flops counts as met


class Bucket(NamedTuple):
    """The static shape of a batch: frames and text tokens, (height, width) of the frames, and whether of videos or images."""

    frames: int
    text: int
    size: tuple[int, int] = (0, 0)
    kind: str = "video"

    def config(self, model: Model) -> Any:
        """The model's config for clips of this size."""
        vision = model.config.vision
        if vision is None or self.size in ((0, 0), tuple(vision.image_size)):
            return model.config
        return dataclasses.replace(model.config, vision=dataclasses.replace(vision, image_size=self.size))


@dataclasses.dataclass(frozen=True)
class Variant:
    """One row of the table: a method and its nominal budget; `fixed` where the method itself says every rate."""

    method: str
    budget: float
    fixed: bool = False

    @property
    def product(self) -> float:
        """The budget of all parts together: what `evs+str` at 0.5 leaves is 0.25."""
        if self.method == "none" or self.fixed:
            return self.budget
        return float(np.prod([self.budget if rate is None else rate for _, rate in parse_method(self.method)]))

    @property
    def label(self) -> str:
        return self.method if self.fixed or self.method == "none" else f"{self.method} at {self.budget:g}"


DENSE = Variant("none", 1.0)


def expand(methods: Sequence[str], budgets: Sequence[float]) -> list[Variant]:
    """Methods x budgets, dense first and always; a method with rates of its own (`evs:0.5+str:0.5`) makes one row.

    ValueError for an unknown method (with near names) or a budget outside (0, 1].
    """
    for budget in budgets:
        Reduction(budget=budget)
    variants = [DENSE]
    for method in methods:
        parts = parse_method(method)
        if method == "none":
            continue
        rates = [rate for _, rate in parts if rate is not None]
        if len(rates) == len(parts):
            variants.append(Variant(method, float(np.prod(rates)), fixed=True))
        else:
            variants += [Variant(method, float(budget)) for budget in budgets]
    return list(dict.fromkeys(variants))


class Planner:
    """Reductions and plans of variants, per bucket, settled once.

    base: kind, schedule, score options and seed that all variants share. match: a method whose predicted FLOPs, at the
    same nominal budget, every other one is solved to.
    """

    def __init__(self, model: Model, base: Reduction, match: str | None = None):
        self.model, self.base, self.match = model, base, match
        self._plans: dict[tuple[Variant, Bucket], tuple[Reduction, ReductionPlan | None]] = {}

    def __call__(self, variant: Variant, bucket: Bucket) -> tuple[Reduction, ReductionPlan | None]:
        """(reduction, plan); ValueError where the method cannot meet the budget."""
        if (variant, bucket) not in self._plans:
            reduction = dataclasses.replace(
                self.base, method=variant.method, budget=1.0 if variant.fixed else variant.budget
            )
            if self.match not in (None, variant.method) and variant != DENSE and not variant.fixed:
                _, goal = self(Variant(self.match, variant.budget), bucket)
                if goal is not None:
                    reduction = dataclasses.replace(reduction, kind="flops", budget=goal.flop_ratio)
            config = bucket.config(self.model)
            self._plans[variant, bucket] = (
                reduction,
                self.model.plan(reduction, bucket.frames, bucket.text, config=config),
            )
        return self._plans[variant, bucket]

    def unmatched(self, variant: Variant, bucket: Bucket) -> str | None:
        """What a reader must know where a plan misses the FLOPs that it was to match."""
        if self.match in (None, variant.method) or variant == DENSE:
            return None
        if variant.fixed:
            return f"{variant.label} was not matched: its rates are written out"
        _, plan = self(variant, bucket)
        _, goal = self(Variant(self.match, variant.budget), bucket)
        if plan is None or goal is None or abs(plan.flop_ratio / goal.flop_ratio - 1) <= MATCHED:
            return None
        found = f"predicted FLOPs are {plan.flop_ratio:.3f} of dense where {self.match} has {goal.flop_ratio:.3f}"
        return f"{variant.label} could not be matched: its {found}"


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    import hybridvlm

    found = {"hybridvlm": hybridvlm.__version__, "python": platform.python_version()}
    for package in ("jax", "jaxlib", "flax", "numpy", "scipy", "av", "tokenizers"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


@dataclasses.dataclass(frozen=True)
class Asking:
    """How questions are put, in addition to their text: a system message, the template's switch for reasoning (None: as it is), and
    the most tokens of reasoning (None: one limit for it and the answer)."""

    system: str = ""
    thinking: bool | None = None
    think_tokens: int | None = None


def achieved(generation: Generation, own: Sequence[int]) -> list[float]:
    """Per example, the share of its video's `own` tokens [B] that really entered each layer, averaged over layers."""
    plan = generation.plan
    if plan is None:
        return [1.0] * len(own)
    kept = np.asarray(jax.device_get(generation.prefilled.decoder.kept), np.float64)[..., 0]  # [1 + drops, B]
    edges = [0, *(site + 1 for site in plan.drops), plan.layers]
    return (np.repeat(kept, np.diff(edges), axis=0).mean(axis=0) / np.asarray(own)).tolist()


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


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
        self.batch_size, self.cache_bytes = batch_size, cache_bytes
        self.asking, self._switch = asking, switch(model, asking.thinking)
        think_budget(model, asking.think_tokens)
        self.run_id = f"{time.strftime('%Y%m%dT%H%M%S')}-{uuid.uuid4().hex[:6]}"
        self.encode_ms: list[float] = []
        template = getattr(model.tokenizer, "template", None) or getattr(model.family, "CHAT", "")
        self._common = {
            "model": to_dict(model.config) | {"name": ""},  # a folder's name is no part of what was asked
            "weights": weights or weights_fingerprint(None, model.params),
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
        self._warm: set[tuple[Variant, Bucket]] = set()
        self._compiled: collections.Counter[tuple[Variant, Bucket]] = collections.Counter()  # ahead of their answers
        self._warm_encode: set[Bucket] = set()
        self._visual: collections.OrderedDict[tuple[str, int], np.ndarray] = collections.OrderedDict()
        self._layouts: dict[tuple[str, tuple[int, int, int]], Layout] = {}  # of the batch at hand
        self._unread: dict[str, str] = {}  # video -> why it cannot be read
        self._held = 0
        self.buckets = {sample.id: self._bucket(sample) for sample in task.samples}

    def _bucket(self, sample: Sample) -> Bucket:
        try:
            clip, config = self.task.clip(sample.video, pixels=False)
            layout = self.layout(sample)
            pick = self.model.buckets.pick
            return Bucket(pick("frames", layout.frames), pick("text", layout.text), config.tower.image_size, clip.kind)
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
        model, (clip, config) = self.model, self.task.clip(sample.video, pixels=False)
        system = [{"role": "system", "content": self.asking.system}] if self.asking.system else []
        asked = user_message(self.task.prompt(sample), model.style, [clip.kind])
        return model.family.prompt(
            config,
            model.tokenizer,
            self._switch.messages([*system, asked]),
            [clip],
            style=model.style,
            factors=factors,
            template_options=self._switch.options,
        )

    def key(self, variant: Variant, sample: Sample) -> str:
        """What a stored answer must share with this run to stand for it: configuration, weights, plan, sample."""
        if (variant, sample.id) not in self._keys:
            bucket = self.buckets[sample.id]
            if (variant, bucket) not in self._settings:
                _, plan = self.planner(variant, bucket)
                self._settings[variant, bucket] = _digest(
                    [self._common, bucket, None if plan is None else plan.to_dict()]
                )
            asked = [
                dataclasses.asdict(sample) | {"video": ""},
                self.task.prompt(sample),
                self.task.identity(sample.video),
            ]
            self._keys[variant, sample.id] = _digest([self._settings[variant, bucket], asked])
        return self._keys[variant, sample.id]

    def plans(self, variant: Variant) -> dict[str, ReductionPlan | None]:
        """The plan of a variant for every sample, by its id: that of the sample's bucket."""
        return {sample.id: self.planner(variant, self.buckets[sample.id])[1] for sample in self.task.samples}

    def batches(self, samples: Sequence[Sample] | None = None) -> Iterator[tuple[Bucket, list[Sample]]]:
        """Samples (default: all) of one bucket, `batch_size` at a time, the longest videos first."""
        asked = self.task.samples if samples is None else samples
        for bucket in sorted({self.buckets[sample.id] for sample in asked}, reverse=True):
            own = [sample for sample in asked if self.buckets[sample.id] == bucket]
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
        """Answer what is missing, of several processes each its share.

        Args:
            progress: (count, label) is called after each batch of a variant with its new answers.
            variants: instead of all that this runner was made for.

        Raises:
            PlanMismatch: a run kept something else than its plan says; what was answered before is in the store.
        """
        variants = self.variants if variants is None else variants
        for number, (bucket, samples), missing in self._missing(variants):
            encoded = {sample.id: self._encoded(sample.video, bucket) for sample in samples}
            seen = {id: tokens for id, tokens in encoded.items() if tokens is not None}
            unread = [sample for sample in samples if sample.id not in seen]
            read = [sample for sample in samples if sample.id in seen]
            if read:
                rows = read + read[-1:] * (self.batch_size - len(read))  # one shape, so one program
                visual = jax.block_until_ready(jax.device_put(np.stack([seen[sample.id] for sample in rows])))
                self._compile([v for v in variants if missing[v] or v == DENSE], bucket, rows, visual)
            for variant in variants:
                # dense goes along, so that every clock has its counterpart
                if missing[variant] or variant == DENSE:
                    records = [self._unanswered(variant, sample) for sample in unread]
                    if read:
                        records += self._answer(variant, bucket, number, read, rows, visual)
                    # what is known already is not answered twice, but for dense and its clock
                    self.store.append(r for r in records if variant == DENSE or r["key"] not in self.store)
                    progress(len(missing[variant]), variant.label)

    def _missing(
        self, variants: Sequence[Variant]
    ) -> list[tuple[int, tuple[Bucket, list[Sample]], dict[Variant, list[Sample]]]]:
        """Batches of this process's share of what is still to be found: (number, batch, samples by variant)."""
        absent = {v: [s for s in self.task.samples if self.key(v, s) not in self.store] for v in variants}
        process, ids = self.store.process, {v: {s.id for s in samples} for v, samples in absent.items()}
        costs: dict[
            str, float
        ] = {}  # of a video with all its questions: tokens of the tower once, of the decoder for each
        for sample in self.task.samples:
            count = sum(sample.id in missing for missing in ids.values())
            if count:
                costs[sample.video] = costs.get(sample.video, 1.0) + count * max(1, self.buckets[sample.id].frames)
        mine = set(deal(costs, process.count)[process.index])
        pending = [s for s in self.task.samples if s.video in mine and any(s.id in missing for missing in ids.values())]
        return [
            (
                # numbers of no two processes are the same
                number * process.count + process.index,
                (bucket, samples),
                {v: [s for s in samples if s.id in ids[v]] for v in variants},
            )
            for number, (bucket, samples) in enumerate(self.batches(pending))
        ]

    def _compile(self, variants: Sequence[Variant], bucket: Bucket, rows: Sequence[Sample], visual: jax.Array) -> None:
        """Compile what a bucket's first batch needs, methods side by side: half of a compilation is the work of one thread."""
        cold = [variant for variant in variants if (variant, bucket) not in self._warm]
        if len(cold) < 2:
            return
        batches = [self._batch(variant, bucket, rows) for variant in cold]

        def compile_one(batch: Batch, plan: ReductionPlan | None) -> int:
            before = compile_count(thread=True)
            self.model.compile_prefill(batch, visual, plan, self.asking.think_tokens)
            return compile_count(thread=True) - before

        with concurrent.futures.ThreadPoolExecutor(min(len(cold), os.cpu_count() or 1, 4)) as pool:
            counts = pool.map(compile_one, *zip(*batches, strict=True))
            self._compiled.update({(variant, bucket): n for variant, n in zip(cold, counts, strict=True)})

    def _batch(self, variant: Variant, bucket: Bucket, rows: Sequence[Sample]) -> tuple[Batch, ReductionPlan | None]:
        reduction, _ = self.planner(variant, bucket)
        layouts = functools.partial(self._layouts_of, rows)
        return self.model.batch_of(layouts, reduction, config=bucket.config(self.model))

    def _layouts_of(self, rows: Sequence[Sample], factors: tuple[int, int, int]) -> list[Layout]:
        return [self.layout(sample, factors) for sample in rows]

    def _answer(
        self,
        variant: Variant,
        bucket: Bucket,
        number: int,
        samples: Sequence[Sample],
        rows: Sequence[Sample],
        visual: jax.Array,
    ) -> list[dict[str, Any]]:
        """Records of one batch under one variant: `rows` is what is computed, its first ones are the `samples`."""
        compiled = compile_count() - self._compiled.pop((variant, bucket), 0)
        config, think_tokens = bucket.config(self.model), self.asking.think_tokens
        batch, plan = self._batch(variant, bucket, rows)
        batch = jax.block_until_ready(jax.device_put(batch))
        if (variant, bucket) not in self._warm:
            self.model.generate(batch, visual, plan, think_tokens=think_tokens)
            self._warm.add((variant, bucket))
        generation = self.model.generate(batch, visual, plan, think_tokens=think_tokens)
        self.model.verify(generation)
        m = config.vision.tokens_per_frame
        shares = achieved(generation, [self.layout(sample).frames * m for sample in rows])
        per = 1e3 / len(rows)
        clock = {
            "prefill_ms": generation.timing.prefill * per,
            "decode_ms": generation.timing.decode * per,
            "compiles": compile_count() - compiled,
            "peak_bytes": generation.peak_bytes,
            "run": self.run_id,
            "batch": number,
        }
        out = []
        for row, sample in enumerate(samples):
            parsed = None if generation.unfinished[row] else self.task.parse(generation.text[row], sample)
            record = self._record(variant, sample) | {
                "prediction": generation.text[row],
                "parsed": parsed,
                "correct": self.task.correct(parsed, sample),
                "retention": shares[row],
                **clock,
            }
            if generation.thinking[row]:
                record["thinking"] = generation.thinking[row]
            if generation.unfinished[row]:
                record["no_answer"] = UNFINISHED
            out.append(record)
        return out

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
        }
        remarks = self.task.remarks(sample.video)
        return record | {"remarks": remarks} if remarks else record

    def _unanswered(self, variant: Variant, sample: Sample) -> dict[str, Any]:
        """The record of a question whose video cannot be read: it is neither right nor wrong."""
        nothing = {"prediction": None, "parsed": None, "correct": None, "retention": None, "run": self.run_id}
        return self._record(variant, sample) | nothing | {"failure": self._unread[sample.video]}

    def _encoded(self, video: str, bucket: Bucket) -> np.ndarray | None:
        """Visual tokens [F,m,D] of a video, F the bucket's frames; what is after its own frames is never looked at.

        None for a video that turns out damaged: its reason is kept, and its questions are not answered. A file that has gone
        meanwhile raises VideoError.
        """
        if video in self._unread:
            return None
        if (video, bucket.frames) in self._visual:
            self._visual.move_to_end((video, bucket.frames))
            return self._visual[video, bucket.frames]
        try:
            clip, config = self.task.clip(video)
        except VideoError as error:
            if self.task.gone(video):
                raise
            self._unread[video] = str(error)
            return None
        pixels = self.model.family.pixels(config, [clip], bucket.frames)
        start = time.perf_counter()
        tokens = np.asarray(jax.device_get(self.model.encode(pixels)))[0]
        if bucket in self._warm_encode:
            self.encode_ms.append(1e3 * (time.perf_counter() - start))
        self._warm_encode.add(bucket)
        self._visual[video, bucket.frames] = tokens
        self._held += tokens.nbytes
        while self._held > self.cache_bytes and len(self._visual) > self.batch_size:
            self._held -= self._visual.popitem(last=False)[1].nbytes
        return tokens
