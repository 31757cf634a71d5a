"""Linear probes: ridge regression whose strength is chosen by cross-validation, folds split by video."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from hybridvlm.analyze import measures

LAMBDAS = tuple(10.0**e for e in range(-3, 5))  # relative to the mean square of a feature
INNER = 3  # folds inside the training folds, for the choice of lambda


def folds_of(videos: Sequence[str], count: int, seed: int = 0) -> np.ndarray:
    """The fold of every sample, int [n]; all samples of a video share one."""
    names = sorted(set(videos))
    order = np.random.default_rng(seed).permutation(len(names))
    fold = {names[v]: i % min(count, len(names)) for i, v in enumerate(order)}
    return np.array([fold[v] for v in videos])


def solve(x: np.ndarray, y: np.ndarray, lambdas: Sequence[float]) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Ridge weights [d,k] for every lambda, and the means (of x [n,d], of y [n,k]) that they are to be used around."""
    mx, my = x.mean(0), y.mean(0)
    xc, yc = x - mx, y - my
    scale = max(float((xc**2).sum()) / x.shape[1], 1e-12)
    if x.shape[1] <= len(x):
        values, vectors = np.linalg.eigh(xc.T @ xc)
        turned = vectors.T @ (xc.T @ yc)
    else:  # the same weights from the n x n products of samples
        values, left = np.linalg.eigh(xc @ xc.T)
        vectors, turned = xc.T @ left, left.T @ yc
    return [vectors @ (turned / (np.maximum(values, 0) + scale * lam)[:, None]) for lam in lambdas], mx, my


def predict(x: np.ndarray, y: np.ndarray, videos: Sequence[str], folds: int = 4) -> np.ndarray:
    """Predictions [n,k] of every sample by probes that saw none of its video; scale and lambda come of the training folds alone.
    ValueError with fewer than two videos."""
    if len(set(videos)) < 2:
        raise ValueError("a probe is tested on videos that it did not see; give at least two")
    outer, out = folds_of(videos, folds), np.zeros(y.shape)
    for fold in np.unique(outer):
        train = np.flatnonzero(outer != fold)
        z = _scaled(x, train)
        inner = folds_of([videos[int(i)] for i in train], INNER, 1)
        errors = np.zeros(len(LAMBDAS))
        for hold in np.unique(inner):
            fit, check = train[inner != hold], train[inner == hold]
            weights, mx, my = solve(z[fit], y[fit], LAMBDAS)
            errors += [np.sum((y[check] - my - (z[check] - mx) @ w) ** 2) for w in weights]
        best, mx, my = solve(z[train], y[train], [LAMBDAS[int(np.argmin(errors))]])
        test = outer == fold
        out[test] = (z[test] - mx) @ best[0] + my
    return out


def _scaled(x: np.ndarray, train: np.ndarray) -> np.ndarray:
    """x [n,d] in the units of its training rows; a feature that is constant there is left as it is, so that it cannot explode."""
    spread = x[train].std(0)
    return (x - x[train].mean(0)) / np.where(spread > 1e-6 * np.abs(x[train]).max(0), spread, 1.0)


@dataclasses.dataclass(frozen=True)
class Probed:
    """r2: explained variance of features, in all their dimensions. labels: accuracy by name. Each with its 95% interval over videos."""

    r2: tuple[float, list[float] | None]
    labels: dict[str, tuple[float, list[float] | None]]

    def to_dict(self) -> dict[str, object]:
        out: dict[str, object] = {"features R2": self.r2[0], "features R2 ci95": self.r2[1]}
        for name, (mean, interval) in self.labels.items():
            out |= {name: mean, f"{name} ci95": interval}
        return out


def probe(x: np.ndarray, features: np.ndarray, labels: dict[str, np.ndarray], videos: Sequence[str]) -> Probed:
    """x [n,d] -> features [n,k] and labels (int [n] each, read as the largest of one regression per class)."""
    classes = {name: int(values.max()) + 1 for name, values in labels.items()}
    target = np.concatenate([features] + [np.eye(classes[name])[values] for name, values in labels.items()], axis=1)
    guess = predict(x, target, videos)
    at, accuracies = features.shape[1], {}
    for name, values in labels.items():
        right = guess[:, at : at + classes[name]].argmax(1) == values
        accuracies[name] = measures.mean_interval(right.astype(float), videos)
        at += classes[name]
    return Probed(explained(features, guess[:, : features.shape[1]], videos), accuracies)


def explained(y: np.ndarray, guess: np.ndarray, videos: Sequence[str]) -> tuple[float, list[float] | None]:
    """R2 of guess [n,k] over all dimensions, and its 95% interval: a bootstrap over videos."""
    names, group = np.unique(np.asarray(videos), return_inverse=True)
    wrong = np.bincount(group, weights=((y - guess) ** 2).sum(1))
    whole = np.bincount(group, weights=((y - y.mean(0)) ** 2).sum(1))
    value = float(1 - wrong.sum() / whole.sum())
    if len(names) < 2:
        return value, None
    drawn = np.random.default_rng(0).integers(len(names), size=(1000, len(names)))
    values = 1 - wrong[drawn].sum(1) / whole[drawn].sum(1)
    return value, [float(v) for v in np.quantile(values, (0.025, 0.975))]
