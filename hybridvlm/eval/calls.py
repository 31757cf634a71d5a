"""How the questions of a batch are answered under a plan: whole prompts together, or those about one video after its memory."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Hashable, Mapping, Sequence

import numpy as np

from hybridvlm.eval.tasks import Sample
from hybridvlm.models.prompt import Layout

PADDED = 1.25  # most rows that are computed, relative to those that are asked for, where questions share a video


@dataclasses.dataclass(frozen=True)
class Call:
    """One run of a model's programs.

    Attributes:
        rows: what is computed, some of it twice, for one shape.
        answered: which row answers which sample.
        videos: with questions that share videos, a sample about each of them, in their order; () for whole prompts.
    """

    rows: list[Sample]
    answered: list[tuple[int, Sample]]
    videos: tuple[Sample, ...] = ()


def shared_part(video: str, layout: Layout) -> Hashable | None:
    """What a prompt has in common with others about its video: all up to its last visual token. None without text behind it."""
    visual = np.flatnonzero(layout.frame >= 0)
    end = int(visual[-1]) + 1 if len(visual) else 0
    if not 0 < end < len(layout.ids):
        return None
    return video, hash((layout.ids[:end].tobytes(), layout.frame[:end].tobytes()))


def questions_at_once(counts: Sequence[int], batch_size: int) -> int:
    """How many questions on one video are answered at once, of videos with so many: in the fewest calls, then in the fewest rows,
    that do not compute much twice."""

    def calls_and_rows(n: int) -> tuple[int, int]:
        calls = sum(-(-count // n) for count in counts)
        return calls, calls * n

    fitting = [n for n in range(1, batch_size + 1) if calls_and_rows(n)[1] <= PADDED * sum(counts)]
    return min(fitting, key=calls_and_rows)


def videos_at_once(batch_size: int, each: int) -> int:
    """How many videos a call has, with so many questions on each: as many as leave no call of a full batch half empty."""
    pieces = -(-batch_size // each)
    return max(n for n in range(1, batch_size // each + 1) if pieces % n == 0)


def grouped(samples: Sequence[Sample], shared: Mapping[str, Hashable | None]) -> list[Sample]:
    """Samples in the order in which what they share first appears, so that the questions on one video are next to each other."""
    places: dict[Hashable, int] = {}
    for place, sample in enumerate(samples):
        places.setdefault(shared[sample.id], place)
    return sorted(samples, key=lambda sample: places[shared[sample.id]] if shared[sample.id] is not None else -1)


def whole(samples: Sequence[Sample], batch_size: int) -> list[Call]:
    """One call for a batch, filled up to its size."""
    rows = [*samples, *[samples[-1]] * (batch_size - len(samples))] if samples else []
    return [Call(rows, list(enumerate(samples)))] if samples else []


def by_video(
    samples: Sequence[Sample], shared: Mapping[str, Hashable | None], batch_size: int, parts: int, least: int = 2
) -> list[Call]:
    """The calls for a batch whose questions go on from memories of their videos, if any of them share one.

    Args:
        samples: of the batch.
        shared: of every sample of this bucket by its id, what its prompt has in common with others (`shared_part`).
        batch_size: rows of whole prompts.
        parts: that a batch is cut into; each has as many videos in a call.
        least: questions on a video from which on they share its memory.
    """
    counts = collections.Counter(part for part in shared.values() if part is not None)
    several = [count for count in counts.values() if count >= least]
    if not several or batch_size < parts:
        return whole(samples, batch_size)
    each = questions_at_once(several, batch_size // parts)
    videos = parts * videos_at_once(batch_size // parts, each)
    pieces: list[list[Sample]] = []
    groups: dict[Hashable, list[Sample]] = {}
    alone = [s for s in samples if counts[shared[s.id]] < least]
    for sample in samples:
        if counts[shared[sample.id]] >= least:
            groups.setdefault(shared[sample.id], []).append(sample)
    for group in groups.values():
        pieces += [group[start : start + each] for start in range(0, len(group), each)]
    calls = whole(alone, batch_size)
    for start in range(0, len(pieces), videos):
        own = pieces[start : start + videos]
        answered = [(place * each + i, s) for place, piece in enumerate(own) for i, s in enumerate(piece)]
        filled = [*own, *own[-1:] * (videos - len(own))]
        rows = [s for piece in filled for s in [*piece, *piece[-1:] * (each - len(piece))]]
        calls.append(Call(rows, answered, tuple(piece[0] for piece in filled)))
    return calls
