"""The input pipeline (Grain): numbers, cut over processes, shuffled; samples, packed into rows; batches, ahead of the step.

Its position is a small state that goes into the checkpoint: after a restart the same batches follow.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from typing import Any

import grain
import numpy as np

from hybridvlm.errors import disk_full
from hybridvlm.train.rows import Example, Shape, check, packed, single
from hybridvlm.train.sources import Source


class TooManyBad(RuntimeError):
    """More samples cannot be read than a run puts up with."""


class Reader:
    """Reads samples by number, passes over those that cannot be read or do not fit a row, and remembers them by name.

    seen: positions in the order of reading up to which samples were asked for; bad: position -> (name, reason).
    """

    def __init__(
        self,
        source: Source,
        check_row: Callable[[Example, str], None],
        bad_share: float,
        say: Callable[[str], None] = print,
    ):
        self.source, self.check_row, self.bad_share, self.say = source, check_row, bad_share, say
        self.seen, self.bad = 0, {}  # type: tuple[int, dict[int, tuple[str, str]]]
        self._lock = threading.Lock()

    def __call__(self, index: int, number: int) -> Example | None:
        name = self.source.name(number)
        try:
            row = self.source.sample(int(number))
            self.check_row(row, name)
        except (OSError, ValueError, EOFError) as error:
            # VideoError and TooLong among them: whatever a decoder finds wrong with one file
            if disk_full(error):  # of a cache or a scratch folder: no fault of the sample's
                raise
            self._pass_over(index, name, error)
            return None
        with self._lock:
            self.seen = max(self.seen, index + 1)
        return row

    def _pass_over(self, index: int, name: str, error: Exception) -> None:
        with self._lock:
            self.seen = max(self.seen, index + 1)
            if index not in self.bad:
                self.bad[index] = (name, str(error))
                self.say(f"skipped {name}: {error}")
            # of fewer than a hundred samples one may be bad, whatever share that is
            if len(self.bad) > self.bad_share * max(self.seen, 100):
                held = dict(self.bad.values())
                names = ", ".join(held)
                raise TooManyBad(
                    f"{len(self.bad)} of {self.seen} samples could not be used, more than {self.bad_share:.1%} "
                    f"(Data.bad_share): {names}; the first: {next(iter(held.values()))}"
                )

    def state(self) -> dict[str, Any]:
        with self._lock:
            return {"seen": self.seen, "bad": [[index, *what] for index, what in sorted(self.bad.items())]}

    def restore(self, state: dict[str, Any]) -> None:
        self.seen = state["seen"]
        self.bad = {index: (name, reason) for index, name, reason in state["bad"]}


def numbers(source_length: int, shuffled: bool, shuffle: bool, seed: int) -> grain.MapDataset:
    """Sample numbers of this process, without end, in an order that depends on the seed; shuffled anew in every pass."""
    shard = grain.sharding.ShardByJaxProcess(drop_remainder=True)
    if source_length < shard.shard_count:
        raise ValueError(f"{source_length} samples cannot be cut over {shard.shard_count} processes")
    share = source_length // shard.shard_count
    own = grain.MapDataset.range(shard.shard_index, share * shard.shard_count, shard.shard_count).seed(seed)
    return (own.shuffle() if shuffle and not shuffled else own).repeat(None)


def row_dataset(
    source: Source, reader: Reader, shape: Shape, rows: int, *, shuffle: bool, seed: int, threads: int, prefetch: int
) -> grain.IterDataset:
    """Batches of `rows` rows of this process."""
    samples = numbers(len(source), source.shuffled, shuffle, seed).map_with_index(reader)
    ahead = max(rows * shape.segments, 1)
    options = grain.ReadOptions(num_threads=min(threads, ahead), prefetch_buffer_size=ahead)
    stream = samples.to_iter_dataset(options)
    if shape.segments > 1:
        stream = stream.map(lambda row: row | {"text": np.zeros(int((row["frame"] < 0).sum()), np.int8)})
        stream = _pack(stream, shape, rows)
    else:
        stream = stream.map(lambda row: single(row, shape))
    stream = stream.batch(rows, drop_remainder=True)
    return grain.experimental.ThreadPrefetchIterDataset(stream, prefetch_buffer_size=prefetch) if prefetch else stream


def _pack(stream: grain.IterDataset, shape: Shape, bins: int) -> grain.IterDataset:
    """First-fit packing by Grain; the fields that samples have are only known from a sample."""
    first = next(iter(stream))
    lengths = {
        name: shape.length for name in ("ids", "frame", "label", "question", "position", "part") if name in first
    }
    lengths |= {name: shape.frames for name in first if name.startswith("visual")}
    stream = grain.experimental.FirstFitPackIterDataset(
        stream,
        length_struct=lengths | {"text": shape.own_text},
        num_packing_bins=bins,
        shuffle_bins=False,
        max_sequences_per_bin=shape.segments,
    )
    return stream.map(lambda row: packed(row, shape))


def shared_dataset(source: Any, videos: int, questions: int, *, threads: int, prefetch: int) -> grain.IterDataset:
    """Batches of `videos` videos with `questions` questions each (`NeedleSource.shared`)."""
    own = numbers(len(source), True, False, 0).map(lambda number: source.shared(int(number), questions))
    options = grain.ReadOptions(num_threads=min(threads, videos), prefetch_buffer_size=videos)
    stream = own.to_iter_dataset(options).batch(videos)
    return grain.experimental.ThreadPrefetchIterDataset(stream, prefetch_buffer_size=prefetch) if prefetch else stream


class Stream:
    """An iterator of batches that knows how long it let the step wait, and where it stands."""

    def __init__(self, dataset: grain.IterDataset, reader: Reader | None = None):
        self.iterator, self.reader, self.waited = iter(dataset), reader, 0.0

    def __next__(self) -> Example:
        start = time.perf_counter()
        try:
            return next(self.iterator)
        finally:
            self.waited += time.perf_counter() - start

    def state(self) -> str:
        """The position after the batch that was handed out last, as JSON."""
        return json.dumps(
            {"iterator": self.iterator.get_state(), "reader": self.reader.state() if self.reader else None}
        )

    def restore(self, state: str) -> None:
        held = json.loads(state)
        self.iterator.set_state(held["iterator"])
        if self.reader is not None:
            self.reader.restore(held["reader"])


def row_check(shape: Shape, answer: int) -> Callable[[Example, str], None]:
    """What a Reader asks of every sample: that it fits a row."""

    def checked(row: Example, name: str) -> None:
        frames = max((len(a) for key, a in row.items() if key.startswith("visual")), default=0)
        check(row, shape, answer, frames, name)

    return checked
