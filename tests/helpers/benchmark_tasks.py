"""Tasks of the fixtures, without a model that answers."""

from __future__ import annotations

import dataclasses

from helpers.benchmark_fixtures import TASKS, fixture
from helpers.micro_checkpoint import micro_model

from hybridvlm.config import Buckets
from hybridvlm.eval.tasks import Published, TaskOptions, build_task
from hybridvlm.eval.tasks.benchmark import BenchmarkTask

# where the videos of each fixture are unpacked
UNPACKED = {
    "videomme": "unzipped", "longvideobench": "unpacked", "lvbench": "official", "mlvu": "official", "mlvu_test": "hf",
    "egoschema": "official", "nextqa": "official", "mvbench": "main", "hourvideo": "official", "tempcompass": "official",
    "perceptiontest": "official",
}  # fmt: skip


def task(name: str, layout: str = "", *, frames: int | None = 4, most: int = 8, **changes) -> BenchmarkTask:
    """The task of a name on a layout of its fixture; `changes` go to TaskOptions or to Published."""
    folder, _ = TASKS[name]
    root, expected = fixture(folder)
    config = micro_model().config
    config = dataclasses.replace(config, vision=dataclasses.replace(config.vision, max_frames=64))
    own = {"data": root / expected["layouts"][layout or UNPACKED[folder]], "incomplete": True, "missing": "skip"}
    names = {f.name for f in dataclasses.fields(Published)}
    own |= {key: value for key, value in changes.items() if key in names}
    rest = {key: value for key, value in changes.items() if key not in names}
    buckets = Buckets(frames=(most,), text=(1024,))
    built = build_task(name, TaskOptions(config, frames, buckets, published=Published(**own), **rest))
    assert isinstance(built, BenchmarkTask)
    return built


def answered(built: BenchmarkTask, reply) -> dict[str, dict]:
    """Records of a reply (or of what a function makes of a sample) to every sample, as a run would leave them."""
    records = {}
    for sample in built.samples:
        if sample.id in built.unavailable:
            records[sample.id] = built.judged({"prediction": None, "failure": "gone", **built.details(sample)}, sample)
            continue
        text = reply(sample) if callable(reply) else reply
        records[sample.id] = built.judged({"prediction": text, **built.details(sample)}, sample)
    return records


def scores(built: BenchmarkTask, reply) -> dict:
    """The benchmark's own numbers for a reply to every question."""
    records = answered(built, reply)
    pairs = [(s, records[s.id]) for s in built.samples if records[s.id]["correct"] is not None]
    return built.summary(pairs)["scores"]
