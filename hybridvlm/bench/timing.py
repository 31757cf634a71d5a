"""Timing that survives a noisy machine: candidates take turns, and ratios are taken within a turn."""

from __future__ import annotations

import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from hybridvlm.console import progress

Key = TypeVar("Key")


def interleaved(candidates: Mapping[Key, Callable[[], Any]], *, rounds: int, warmup: int = 1) -> dict[Key, list[float]]:
    """Seconds of every call, by candidate: `warmup` unmeasured rounds, then `rounds` in which each is called once.

    A call counts as over when every array that it returned is ready. From round to round the order is turned by one
    position, so that nobody always goes first.
    """
    import jax

    if rounds < 1:
        raise ValueError(f"interleaved: rounds must be at least 1, got {rounds}")
    names = list(candidates)
    seconds: dict[Key, list[float]] = {name: [] for name in names}
    with progress((rounds + warmup) * len(names), "call", "measuring", delay=2, leave=False) as bar:
        for turn in range(-warmup, rounds):
            for offset in range(len(names)):
                name = names[(offset + turn) % len(names)]
                start = time.perf_counter()
                jax.block_until_ready(candidates[name]())
                if turn >= 0:
                    seconds[name].append(time.perf_counter() - start)
                bar.update()
    return seconds


def say(what: str) -> None:
    """One line on stderr about what is being done, so that a table can be piped without it."""
    print(f"bench: {what}", file=sys.stderr, flush=True)


def median_ms(seconds: list[float]) -> float:
    """Median in milliseconds."""
    return 1e3 * statistics.median(seconds)


def paired_ratio(seconds: list[float], baseline: list[float]) -> float:
    """Median over rounds of seconds / baseline; both lists come from the same `interleaved` call."""
    return statistics.median(mine / other for mine, other in zip(seconds, baseline, strict=True))


def available_bytes() -> int | None:
    """Main memory that a new allocation may take, or None where the system does not tell."""
    meminfo = pathlib.Path("/proc/meminfo")
    if meminfo.is_file():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    if "SC_AVPHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None
