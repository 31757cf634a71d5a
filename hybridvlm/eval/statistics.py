"""Accuracy with an honest interval: questions on one video are not independent, so everything is clustered by video."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

LEVEL = 0.95


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean of n values in `clusters` clusters, and its 95% interval (None and None with fewer than two clusters)."""

    mean: float
    low: float | None
    high: float | None
    n: int
    clusters: int

    @property
    def interval(self) -> list[float] | None:
        return None if self.low is None or self.high is None else [self.low, self.high]


def cluster_se(values: Sequence[float], clusters: Sequence[str]) -> tuple[float, float, int]:
    """(mean, its cluster-robust standard error, number of clusters); the error is NaN with fewer than two clusters.

    CR1: sqrt(g / (g - 1) * sum over clusters of (sum of residuals)^2) / n. With one value per cluster it is the plain
    standard error s / sqrt(n).
    """
    x = np.asarray(values, np.float64)
    if x.ndim != 1 or len(x) != len(clusters) or not len(x):
        raise ValueError(f"values and clusters must be equally long and not empty, got {x.shape} and {len(clusters)}")
    _, group = np.unique(np.asarray(clusters), return_inverse=True)
    sums = np.bincount(group, weights=x - x.mean())
    groups = len(sums)
    if groups < 2:
        return float(x.mean()), math.nan, groups
    return float(x.mean()), float(np.sqrt(groups / (groups - 1) * np.sum(sums**2)) / len(x)), groups


def quantile(groups: int) -> float:
    """Student's, of an interval of `LEVEL` over the means of so many groups."""
    from scipy import stats

    return float(stats.t.ppf(0.5 + LEVEL / 2, groups - 1))


def accuracy(correct: Sequence[bool], clusters: Sequence[str]) -> Estimate:
    """Accuracy and its interval: Wilson's, with the effective number of answers that the clustered error stands for.

    Wilson's stays inside [0, 1] and does not shrink to a point when everything is right; the quantile is Student's with
    clusters - 1 degrees of freedom. Where all answers are equal, so that no spread shows, clusters count as answers.
    """
    p, se, groups = cluster_se(correct, clusters)
    n = len(correct)
    if math.isnan(se):
        return Estimate(p, None, None, n, groups)
    effective = float(groups) if se == 0 else min(float(n), p * (1 - p) / se**2)
    z = quantile(groups)
    middle = (p + z**2 / (2 * effective)) / (1 + z**2 / effective)
    half = z / (1 + z**2 / effective) * math.sqrt(p * (1 - p) / effective + z**2 / (4 * effective**2))
    return Estimate(p, max(0.0, min(p, middle - half)), min(1.0, max(p, middle + half)), n, groups)


def difference(correct: Sequence[bool], reference: Sequence[bool], clusters: Sequence[str]) -> Estimate:
    """Mean of correct - reference on the same questions, with its paired clustered interval (Student's t).

    Where all clusters differ alike (the two never disagree, or always) no spread shows; the interval then reaches as far as
    it would if the share of clusters that differ otherwise, and show in none of these, were as large as it may be
    (Clopper-Pearson's upper bound).
    """
    if len(correct) != len(reference):
        raise ValueError(f"both must answer the same questions, got {len(correct)} and {len(reference)}")
    d = np.asarray(correct, np.float64) - np.asarray(reference, np.float64)
    mean, se, groups = cluster_se(d.tolist(), clusters)
    if math.isnan(se):
        return Estimate(mean, None, None, len(d), groups)
    if se > 0:
        half = quantile(groups) * se
        # of a handful of videos Student's quantile reaches beyond what a difference can be
        return Estimate(mean, max(-1.0, mean - half), min(1.0, mean + half), len(d), groups)
    half = (1 + abs(mean)) * (1 - (0.5 - LEVEL / 2) ** (1 / groups))
    return Estimate(mean, max(-1.0, mean - half), min(1.0, mean + half), len(d), groups)


def independent_difference(first: Estimate, second: Estimate) -> list[float] | None:
    """The interval of second - first, two accuracies of runs that are not paired: Newcombe's, of their own (Wilson's) intervals.

    It stays inside [-1, 1] and has a width where all answers of a run are equal; None where one of the two has no interval.
    """
    if first.low is None or first.high is None or second.low is None or second.high is None:
        return None
    delta = second.mean - first.mean
    down = math.hypot(second.mean - second.low, first.high - first.mean)
    up = math.hypot(second.high - second.mean, first.mean - first.low)
    return [delta - down, delta + up]


def mcnemar(correct: Sequence[bool], reference: Sequence[bool]) -> float:
    """Exact two-sided McNemar p: of the questions that only one of the two gets right, is a half a likely share?

    It takes questions as independent; the clustered interval of `difference` does not.
    """
    from scipy import stats

    a, b = np.asarray(correct, bool), np.asarray(reference, bool)
    gained, lost = int(np.sum(a & ~b)), int(np.sum(~a & b))
    return 1.0 if gained + lost == 0 else float(stats.binomtest(gained, gained + lost, 0.5).pvalue)


def median(values: Sequence[float]) -> float | None:
    """The median, None of nothing."""
    return float(np.median(values)) if len(values) else None
