"""The embedded model in bfloat16 against float32, on questions of the embedded benchmark (validation split).

The checkpoint's own reduction with the method and budget asked for. One row per drop layer of the plan, over all questions:
kept        share of the video's visual tokens that are left after the layer
agree       share of the video's visual tokens of which both say the same, stays or goes
overlap     share of what float32 keeps that bfloat16 keeps too; by chance it would be `kept`
Differences of earlier layers are part of both. Then the answers, dense and reduced: accuracy of each, and how often they are
the same.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import numpy as np

from hybridvlm.bench.op_bench import positive
from hybridvlm.config import Reduction
from hybridvlm.console import progress
from hybridvlm.reduction.plan import ReductionPlan

DTYPES = ("float32", "bfloat16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", default="tiny-reduced", help="packaged name or checkpoint folder (default: tiny-reduced)")
    add("--method", default="str", help="reduction method (default: str)")
    add("--budget", type=float, default=0.25, help="share of visual tokens to keep (default: 0.25)")
    add("--limit", type=positive, default=96, help="first N questions (default: 96)")
    add("--frames", type=positive, help="frames of a video (default: all that the benchmark has)")
    add("--batch-size", type=positive, default=8, help="questions per batch (default: 8)")


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows for the drop layers, then for the answers."""
    from hybridvlm.eval.tasks import TaskOptions, build_task
    from hybridvlm.inference.model import load

    models = {dtype: load(args.model, dtype=dtype) for dtype in DTYPES}
    task = build_task(
        "needle", TaskOptions(models["float32"].config, frames=args.frames, split="val", limit=args.limit)
    )
    own = models["float32"].reduction or Reduction()
    reductions = {"dense": None, args.method: dataclasses.replace(own, method=args.method, budget=args.budget)}
    correct = {(kind, dtype): 0 for kind in reductions for dtype in DTYPES}
    same = dict.fromkeys(reductions, 0)
    drops: list[np.ndarray] = []  # of every batch [drops, both, own], agreed and kept tokens
    samples = task.samples
    plan: ReductionPlan | None = None
    with progress(len(samples), "question", "answering", delay=2, leave=False) as bar:
        for start in range(0, len(samples), args.batch_size):
            asked = samples[start : start + args.batch_size]
            rows = asked + asked[-1:] * (args.batch_size - len(asked))  # one shape, so one program
            for kind, reduction in reductions.items():
                answers, kept = {}, {}
                for dtype, model in models.items():
                    generation = _generate(model, task, rows, reduction)
                    texts = generation.text[: len(asked)]
                    parsed = [task.parse(text, sample) for text, sample in zip(texts, asked, strict=True)]
                    answers[dtype] = parsed
                    correct[kind, dtype] += sum(map(task.correct, parsed, asked))
                    if generation.plan is not None:
                        plan = generation.plan
                        kept[dtype] = _survivors(generation, len(asked))
                same[kind] += sum(a == b for a, b in zip(*answers.values(), strict=True))
                if kept:
                    tokens = _video_tokens(models["float32"], task, asked)
                    ours, theirs = kept.values()
                    drops.append(_agreement(ours, theirs, tokens))
            bar.update(len(asked))
    agreed, overlap, share = np.concatenate(drops, axis=1).mean(axis=1).T
    assert plan is not None  # the method's, as the drops
    pattern = models["float32"].config.pattern
    table = [
        {"what": f"layer {layer} ({pattern[layer]})", "kept": float(k), "agree": float(a), "overlap": float(o)}
        for layer, k, a, o in zip(plan.drops, share, agreed, overlap, strict=True)
    ]
    n = len(samples)
    for kind in reductions:
        label = "answers, dense" if kind == "dense" else f"answers, {kind} at {args.budget:g}"
        accuracy = {dtype: correct[kind, dtype] / n for dtype in DTYPES}
        table.append({"what": label, "agree": same[kind] / n, **accuracy, "questions": n})
    return table


def _generate(model, task, rows, reduction):
    import jax

    seconds = [task.seconds(sample.video) for sample in rows]
    batch, plan = model.batch([task.prompt(sample) for sample in rows], seconds, reduction)
    frames = batch.frame_count.max()
    videos: dict[str, Any] = {sample.video: None for sample in rows}
    for video in videos:
        pixels, _ = task.frames(video)
        padded = np.zeros((1, model.buckets.pick("frames", int(frames)), *pixels.shape[1:]), np.uint8)
        padded[0, : len(pixels)] = pixels
        videos[video] = model.encode(padded)[0]
    visual = jax.numpy.stack([videos[sample.video] for sample in rows])
    return model.generate(batch, visual, plan)


def _video_tokens(model, task, samples) -> np.ndarray:
    return np.array([len(task.seconds(sample.video)) * model.config.vision.tokens_per_frame for sample in samples])


def _survivors(generation, count: int) -> list[list[set[int]]]:
    """Of every drop and example, the positions (in the unreduced prompt) of the visual tokens after it."""
    import jax

    sets = []
    for index, visual in jax.device_get(generation.prefilled.decoder.survivors):
        sets.append([set(index[row][visual[row]].tolist()) for row in range(count)])
    return sets


def _agreement(ours: list[list[set[int]]], theirs: list[list[set[int]]], tokens: np.ndarray) -> np.ndarray:
    """[drops, examples, 3]: share of tokens that both treat alike, of the first's that both keep, and that the first keeps."""
    out = np.zeros((len(ours), len(tokens), 3))
    for drop, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        for row, (a, b) in enumerate(zip(mine, other, strict=True)):
            out[drop, row] = 1 - len(a ^ b) / tokens[row], len(a & b) / max(len(a), 1), len(a) / tokens[row]
    return out
