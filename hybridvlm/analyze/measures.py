"""Measures of scores over visual tokens: concentration within a layer, agreement between rankings. Plain numpy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats

MASSES = ("relu", "abs", "softmax")


def mass(score: np.ndarray, how: str) -> np.ndarray:
    """Score [M] -> weights [M] >= 0 that sum to 1: how a signed score is read as an amount.

    relu: positive parts (evidence for a token). abs: magnitudes (influence either way). softmax: of the z-scored score, so that
    its scale plays no part. An attention layer's score is positive and already an amount: relu and abs leave it as it is. All
    equal where nothing is positive.
    """
    x = np.asarray(score, np.float64)
    if how == "softmax":
        z = (x - x.mean()) / (x.std() + 1e-12)
        x = np.exp(z - z.max())
    elif how == "relu":
        x = np.maximum(x, 0.0)
    elif how == "abs":
        x = np.abs(x)
    else:
        raise ValueError(f"mass: how must be one of {MASSES}, got {how!r}")
    total = x.sum()
    return x / total if total > 0 else np.full(len(x), 1 / len(x))


def tokens_holding(weights: np.ndarray, shares: Sequence[float]) -> list[float]:
    """The least share of the tokens that holds each of `shares` of the mass: weights [M] that sum to 1."""
    held = np.cumsum(np.sort(weights)[::-1])
    return [float(np.searchsorted(held, share - 1e-9) + 1) / len(weights) for share in shares]


def gini(weights: np.ndarray) -> float:
    """0 where all weights are equal, 1 - 1/M where one token holds everything."""
    m, ascending = len(weights), np.sort(weights)
    return float(2 * np.sum(np.arange(1, m + 1) * ascending) / (m * ascending.sum()) - (m + 1) / m)


def entropy(weights: np.ndarray) -> float:
    """Entropy over log M: 1 where all weights are equal, 0 where one token holds everything."""
    if len(weights) < 2:
        return 0.0
    return float(stats.entropy(weights) / np.log(len(weights)))


def count_of(share: float, m: int) -> int:
    """How many of m tokens a share of them is: at least one."""
    return max(1, round(share * m))


def top(score: np.ndarray, k: int) -> np.ndarray:
    """bool [M]: the k highest, ties to the earlier token, as a plan keeps them."""
    chosen = np.zeros(len(score), bool)
    chosen[np.argsort(-score, kind="stable")[:k]] = True
    return chosen


def jaccard(first: np.ndarray, second: np.ndarray) -> float:
    """Overlap of two bool sets over their union; 1 for two empty ones."""
    union = int((first | second).sum())
    return float((first & second).sum() / union) if union else 1.0


def chance_jaccard(k: int, m: int) -> float:
    """What two random sets of k of m tokens overlap by (expected intersection over its union)."""
    return k / (2 * m - k)


def chance_rbo(p: float, m: int) -> float:
    """What the rank-biased overlap of two random rankings of m is expected to be: d / m of the heads at depth d is shared."""
    return float(np.sum(p ** np.arange(m)) / m)


def above_chance(overlap: float, k: int, m: int) -> float:
    """A Jaccard overlap rescaled: 0 at chance, 1 for the same set."""
    chance = chance_jaccard(k, m)
    return (overlap - chance) / (1 - chance) if chance < 1 else 0.0


def kendall(first: np.ndarray, second: np.ndarray) -> float:
    """Kendall's tau-b of two score vectors; 0 where one of them is constant."""
    tau = stats.kendalltau(first, second).statistic
    return 0.0 if np.isnan(tau) else float(tau)


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    """Spearman's rank correlation; 0 where one of the two is constant."""
    a, b = stats.rankdata(first), stats.rankdata(second)
    if a.std() == 0 or b.std() == 0:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])


def rank_biased_overlap(first: np.ndarray, second: np.ndarray, p: float) -> float:
    """Overlap of two rankings weighted to their heads: sum over depths d of p^(d-1) (1-p) |top d of both| / d, completed by the
    overlap at full depth. 1/(1-p) is the depth that counts; score vectors [M], ties to the earlier token."""
    m = len(first)
    rank = np.empty((2, m), int)
    for row, score in zip(rank, (first, second), strict=True):
        row[np.argsort(-np.asarray(score), kind="stable")] = np.arange(m)
    depth = np.arange(1, m + 1)
    shared = np.cumsum(np.bincount(rank.max(0), minlength=m)) / depth
    weight = p ** np.arange(m) * (1 - p)
    return float(np.sum(shared * weight) + shared[-1] * p**m)


def correlation_interval(values: Sequence[float], videos: Sequence[str]) -> tuple[float, list[float] | None]:
    """(mean, 95% interval) of correlations, the interval by Fisher's z: it stays inside [-1, 1]. Clustered by video."""
    mean = float(np.mean(values))
    # arctanh of 1 is infinite; this is far beyond what a sample can tell from it.
    _, interval = mean_interval(np.arctanh(np.clip(values, -1 + 1e-6, 1 - 1e-6)).tolist(), videos)
    if interval is None:
        return mean, None
    low, high = np.tanh(interval)
    return mean, [float(min(low, mean)), float(max(high, mean))]


def mean_interval(values: Sequence[float], videos: Sequence[str]) -> tuple[float, list[float] | None]:
    """Mean and its 95% interval clustered by video (None with one video)."""
    from hybridvlm.eval import statistics

    mean, error, groups = statistics.cluster_se(values, videos)
    if groups < 2:
        return mean, None
    half = float(stats.t.ppf(0.5 + statistics.LEVEL / 2, groups - 1)) * error
    return mean, [mean - half, mean + half]
