"""Published benchmarks of long videos: what their files hold, how they are asked, and how they are scored.

A file per benchmark says where its questions and videos lie and how its authors and the harnesses ask and score them
(`Benchmark`); the shared parts are layouts (`layout`), tables (`tables`), prompts (`prompts`), frames (`frames`),
subtitles (`subtitles`), parsers (`letters`, `parity`) and metrics (`metrics`). `hybridvlm.eval.tasks.benchmark` makes a
task of one. Nothing here needs a model.
"""

from __future__ import annotations

import importlib

from hybridvlm.eval.benchmarks.definition import Benchmark

# name of a task -> the module that defines it, in its BENCHMARKS
MODULES = {
    "videomme": "videomme",
    "videomme-subs": "videomme",
    "longvideobench": "longvideobench",
    "longvideobench-test": "longvideobench",
    "lvbench": "lvbench",
    "mlvu": "mlvu",
    "mlvu-test": "mlvu",
    "egoschema": "egoschema",
    "egoschema-subset": "egoschema",
    "nextqa": "nextqa",
    "nextqa-val": "nextqa",
    "mvbench": "mvbench",
    "hourvideo": "hourvideo",
    "tempcompass": "tempcompass",
    "perceptiontest": "perceptiontest",
}


def published(name: str) -> Benchmark:
    """The benchmark of a task's name; KeyError for a name that is none."""
    module = importlib.import_module(f"hybridvlm.eval.benchmarks.{MODULES[name]}")
    return module.BENCHMARKS[name]


__all__ = ["MODULES", "Benchmark", "published"]
