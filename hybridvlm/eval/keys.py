"""The keys of stored answers: a killed or repeated run asks again only what has none under its own."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping

from hybridvlm.config import to_dict
from hybridvlm.eval.deal import weights_fingerprint
from hybridvlm.eval.layouts import Asking
from hybridvlm.eval.results import digest, versions
from hybridvlm.eval.tasks import Sample, Task
from hybridvlm.eval.variants import Bucket, Planner, Variant
from hybridvlm.inference.model import Model


class AnswerKeys:
    """(variant, sample) -> what a stored answer must share with a run to stand for it: configuration, weights, plan, sample.

    Args:
        model: that is asked.
        task: whose samples they are.
        planner: the plan of a variant and a bucket.
        buckets: of every sample that can be asked, by its id.
        asking: how questions are put.
        weights: which weights the model has (default: their fingerprint).
        dtype: that it computes in.
    """

    def __init__(
        self,
        model: Model,
        task: Task,
        planner: Planner,
        buckets: Mapping[str, Bucket],
        asking: Asking,
        *,
        weights: str,
        dtype: str,
    ):
        self.task, self.planner, self.buckets = task, planner, buckets
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

    def __call__(self, variant: Variant, sample: Sample) -> str:
        """The key of a sample's answer under a variant."""
        if (variant, sample.id) not in self._keys:
            self._keys[variant, sample.id] = self._key(variant, sample)
        return self._keys[variant, sample.id]

    def _key(self, variant: Variant, sample: Sample) -> str:
        if sample.id in self.task.unavailable:
            return digest([self._common, dataclasses.asdict(variant), sample.id, self.task.unavailable[sample.id]])
        bucket = self.buckets[sample.id]
        if (variant, bucket) not in self._settings:
            _, plan = self.planner(variant, bucket)
            self._settings[variant, bucket] = digest([self._common, bucket, None if plan is None else plan.to_dict()])
        fields = dataclasses.asdict(sample) | {"video": ""}
        # no part of what was asked, like the video's name
        for name in ("groups", "cluster"):
            del fields[name]
        asked = [fields, self.task.prompt(sample), "" if self.task.blind else self.task.identity(sample.video)]
        return digest([self._settings[variant, bucket], asked])
