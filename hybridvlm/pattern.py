"""Pattern strings of layers, as programs see them: units that repeat are compiled once, whatever their number."""

from __future__ import annotations

import functools

# What a kind of layer takes to compile, about, in units of an MLP: by the TPU compiler's CPU time of a layer of the 12B model,
# 15 s for M, 10 s for * and 4 s for - (libtpu 0.0.42).
_WEIGHTS = {"M": 4, "*": 2, "-": 1, "E": 2}


def repeats(pattern: str, start: int, stop: int) -> list[tuple[int, int, int]]:
    """Layers start..stop-1 as runs (first layer, unit length, times): those that take least to compile, and of those the fewest."""
    runs, at = [], start
    for unit, times in _cut(pattern[start:stop])[1]:
        runs.append((at, unit, times))
        at += unit * times
    return runs


def compile_weight(pattern: str, start: int, stop: int) -> int:
    """What layers start..stop-1 take to compile as `repeats` cuts them, units in units included; see `_WEIGHTS`."""
    return _cut(pattern[start:stop])[0]


@functools.lru_cache(maxsize=1 << 16)
def _cut(layers: str) -> tuple[int, tuple[tuple[int, int], ...]]:
    """(what they take to compile, (unit length, times) of each run) of layers, least first and then fewest runs."""
    # best[n]: of the first n layers
    best: list[tuple[int, int, tuple[tuple[int, int], ...]]] = [(0, 0, ())]
    for end in range(1, len(layers) + 1):
        found = None
        for begin in range(end):
            weight, runs, cut = best[begin]
            for unit, each in _as_one_run(layers[begin:end]):
                candidate = (weight + each, runs + 1, (*cut, (unit, (end - begin) // unit)))
                if found is None or candidate[:2] < found[:2]:
                    found = candidate
        assert found is not None  # a layer by itself is a run
        best.append(found)
    return best[-1][0], best[-1][2]


@functools.lru_cache(maxsize=1 << 16)
def _as_one_run(layers: str) -> tuple[tuple[int, int], ...]:
    """(unit length, what the unit takes to compile) of the ways in which these layers are one run."""
    if len(layers) == 1:
        return ((1, _WEIGHTS.get(layers, 1)),)
    size = len(layers)
    units = (n for n in range(1, size // 2 + 1) if size % n == 0 and layers[:n] * (size // n) == layers)
    # the shortest unit takes least, and units of several of it no less
    return tuple((n, _cut(layers[:n])[0]) for n in list(units)[:1])
