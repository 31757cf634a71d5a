"""Accuracies and differences over several training seeds: how far would another seed, or other videos, move them?"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from hybridvlm.eval import statistics


@dataclasses.dataclass(frozen=True)
class OverSeeds:
    """A mean over seeds and questions. seeds: Student's 95% interval of the seeds' means: how far would other trainings move it? None
    for one seed, and where all seeds agree to the last answer, which shows no spread. videos: the interval clustered by video, of
    the answers averaged over seeds: how far would other videos? each: the mean of every seed."""

    mean: float
    seeds: list[float] | None
    videos: list[float] | None
    each: list[float]

    def to_dict(self) -> dict[str, object]:
        return {"mean": self.mean, "ci95_seeds": self.seeds, "ci95_videos": self.videos, "each": self.each}


def _student(values: Sequence[float]) -> list[float] | None:
    if len(values) < 2 or np.ptp(values) < 1e-9:
        return None
    half = statistics.quantile(len(values)) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return [float(np.mean(values)) - half, float(np.mean(values)) + half]


def accuracy(correct: np.ndarray, videos: Sequence[str]) -> OverSeeds:
    """Accuracy of correct [S,n] bool: seeds and questions."""
    each = [float(row.mean()) for row in correct]
    seeds = _student(each)
    if seeds is not None:
        seeds = [max(0.0, seeds[0]), min(1.0, seeds[1])]
    return OverSeeds(float(np.mean(each)), seeds, statistics.accuracy(correct.mean(0), videos).interval, each)


def difference(correct: np.ndarray, reference: np.ndarray, videos: Sequence[str]) -> OverSeeds:
    """Mean of correct - reference, both [S,n] bool: the same seeds and the same questions, so paired in both."""
    if correct.shape != reference.shape:
        raise ValueError(
            f"difference: both must be the same seeds and questions, got {correct.shape} and {reference.shape}"
        )
    gap = correct.astype(float) - reference
    each = [float(row.mean()) for row in gap]
    interval = statistics.difference(correct.mean(0), reference.mean(0), videos).interval
    return OverSeeds(float(np.mean(each)), _student(each), interval, each)


def between(first: np.ndarray, second: np.ndarray, videos: Sequence[str]) -> OverSeeds:
    """Mean of first [S,n] - second [S',n]: different trainings, so unpaired over seeds (Welch), paired over questions."""
    a, b = first.mean(1), second.mean(1)
    mean = float(a.mean() - b.mean())
    seeds = None
    if min(len(a), len(b)) >= 2:
        from scipy import stats

        parts = [float(np.var(x, ddof=1)) / len(x) for x in (a, b)]
        total = sum(parts)
        if total > 0:
            freedom = total**2 / sum(p**2 / (len(x) - 1) for p, x in zip(parts, (a, b), strict=True))
            half = float(stats.t.ppf(0.5 + statistics.LEVEL / 2, freedom)) * math.sqrt(total)
            seeds = [mean - half, mean + half]
    interval = statistics.difference(first.mean(0), second.mean(0), videos).interval
    return OverSeeds(mean, seeds, interval, [float(v) for v in a] + [-float(v) for v in b])
