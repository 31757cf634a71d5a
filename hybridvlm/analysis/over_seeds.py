"""Accuracies and differences over several training seeds: how far would another seed, or other videos, move them?"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from hybridvlm.eval import statistics


@dataclasses.dataclass(frozen=True)
class OverSeeds:
    """A mean over seeds and questions. seeds: Student's 95% interval of the seeds' means (None for one seed); videos: the
    interval clustered by video, of the answers averaged over seeds. each: the mean of every seed."""

    mean: float
    seeds: list[float] | None
    videos: list[float] | None
    each: list[float]

    @property
    def interval(self) -> list[float] | None:
        """The interval to show: over seeds where there are several, else over videos."""
        return self.seeds or self.videos

    def to_dict(self) -> dict[str, object]:
        return {"mean": self.mean, "ci95_seeds": self.seeds, "ci95_videos": self.videos, "each": self.each}


def _student(values: Sequence[float]) -> list[float] | None:
    if len(values) < 2:
        return None
    half = statistics._quantile(len(values)) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return [float(np.mean(values)) - half, float(np.mean(values)) + half]


def accuracy(correct: np.ndarray, videos: Sequence[str]) -> OverSeeds:
    """Accuracy of correct [S,n] bool: seeds and questions."""
    each = [float(row.mean()) for row in correct]
    if len(correct) == 1:
        interval = statistics.accuracy(correct[0], videos).interval
    else:
        interval = _clustered(correct.mean(0), videos)
    return OverSeeds(float(np.mean(each)), _student(each), interval, each)


def difference(correct: np.ndarray, reference: np.ndarray, videos: Sequence[str]) -> OverSeeds:
    """Mean of correct - reference, both [S,n] bool: the same seeds and the same questions, so paired in both."""
    if correct.shape != reference.shape:
        raise ValueError(
            f"difference: both must be the same seeds and questions, got {correct.shape} and {reference.shape}"
        )
    gap = correct.astype(float) - reference
    each = [float(row.mean()) for row in gap]
    if len(gap) == 1:
        interval = statistics.difference(correct[0], reference[0], videos).interval
    else:
        interval = _clustered(gap.mean(0), videos)
    return OverSeeds(float(np.mean(each)), _student(each), interval, each)


def between(first: np.ndarray, second: np.ndarray, videos: Sequence[str]) -> OverSeeds:
    """Mean of first [S,n] - second [S',n]: different trainings, so unpaired over seeds (Welch), paired over questions."""
    gap = first.astype(float).mean(0) - second.astype(float).mean(0)
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
        else:
            seeds = [mean, mean]
    return OverSeeds(mean, seeds, _clustered(gap, videos), [float(v) for v in a] + [-float(v) for v in b])


def _clustered(values: Any, videos: Sequence[str]) -> list[float] | None:
    mean, error, groups = statistics.cluster_se(values, videos)
    if math.isnan(error):
        return None
    half = statistics._quantile(groups) * error
    return [mean - half, mean + half]
