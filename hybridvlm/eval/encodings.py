"""Videos of an evaluation through the tower: visual tokens, held for the questions to come, and what they took."""

from __future__ import annotations

import collections
import dataclasses
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from hybridvlm.distributed import gather
from hybridvlm.eval.ahead import Ahead
from hybridvlm.eval.results import failure_of
from hybridvlm.eval.tasks import Sample, Task
from hybridvlm.eval.variants import Bucket
from hybridvlm.inference.model import Model
from hybridvlm.inference.placement import to_host
from hybridvlm.models.media import Clip
from hybridvlm.parallel.mesh import spans_processes
from hybridvlm.reduction.pixels import PixelSelection
from hybridvlm.video import VideoError

CACHE_BYTES = 1 << 29  # visual tokens of encoded videos that are held for the questions to come


class Encoding(NamedTuple):
    """What a method has the tower do: all of a video, or what its plan keeps of it; with the tower's attention or without."""

    keep: PixelSelection | None = None
    attention: bool = False


Encodings = dict[Encoding, np.ndarray]


@dataclasses.dataclass(frozen=True)
class EncodedBatch:
    """The questions of a batch whose videos could be read, with what the tower makes of these.

    Attributes:
        number: of the batch.
        bucket: of its questions.
        samples: the questions.
        tokens: visual tokens of every question's video on the host, by its id; {} where no frames are shown.
        visual: those of the whole batch where they are needed, by encoding.
    """

    number: int
    bucket: Bucket
    samples: list[Sample]
    tokens: Mapping[str, Encodings]
    visual: Mapping[Encoding, Any]

    def stacked(self, samples: Sequence[Sample], encoding: Encoding) -> np.ndarray:
        """Visual tokens [B,F,m,D] of these of its questions, on the host."""
        return np.stack([self.tokens[sample.id][encoding] for sample in samples])


class EncodedVideos:
    """A task's videos, decoded and put through the tower once for every way in which methods want them.

    Args:
        model: whose tower it is. Over the devices of several processes, what one of them cannot read none of them encodes.
        task: whose videos they are.
        ahead: their decoded frames.
        frames: of every video, how many prompts have.
        most: bytes of visual tokens that are held; beyond them the videos that were not asked for longest go.
        least: how many videos are held in any case.

    Attributes:
        whole_ms: milliseconds of every encoding of a whole video, without the first calls of a program.
        unread: why a video turned out damaged, as a record has it.
    """

    def __init__(self, model: Model, task: Task, ahead: Ahead, frames: Mapping[str, int], most: int, least: int):
        self.model, self.task = model, task
        self._ahead, self._frames, self._most, self._least = ahead, frames, most, least
        self.whole_ms: list[float] = []
        self.unread: dict[str, dict[str, Any]] = {}
        self._clock: dict[tuple[str, int, Encoding], float] = {}
        self._warm: set[tuple[Bucket, Encoding]] = set()
        self._bytes = 0
        self._held: collections.OrderedDict[tuple[Any, ...], Encodings] = collections.OrderedDict()

    def ms(self, video: str, bucket: Bucket, encoding: Encoding) -> float | None:
        """Milliseconds of an encoding; None where it was the first call of its program."""
        return self._clock.get((video, bucket.frames, encoding))

    def undecoded(self, videos: Iterable[str], bucket: Bucket, encodings: Sequence[Encoding]) -> list[str]:
        """Those videos whose frames it takes to have them encoded in all these ways."""
        missing = []
        for video in videos:
            key = video, bucket.frames, tuple(encodings)
            if key in self._held:
                # about to be asked for: others go before it
                self._held.move_to_end(key)
            elif video not in self.unread:
                missing.append(video)
        return missing

    def get(self, video: str, bucket: Bucket, encodings: Sequence[Encoding]) -> Encodings | None:
        """Visual tokens [F,m,D] of a video, F the bucket's frames, in all these ways; what is after its own frames is never looked at.

        None for a video that turns out damaged: its reason is kept, and its questions are not answered. A file that has gone
        meanwhile raises VideoError.
        """
        key = video, bucket.frames, tuple(encodings)
        if key in self._held:
            self._held.move_to_end(key)
            return self._held[key]
        read = None if video in self.unread else self._read(video)
        if read is None:
            return None
        clip, config = read
        tokens = self._encode(video, bucket, encodings, self.model.family.pixels(config, [clip], bucket.frames))
        self._held[key] = tokens
        self._bytes += _size(tokens)
        while self._bytes > self._most and len(self._held) > self._least:
            self._bytes -= _size(self._held.popitem(last=False)[1])
        return tokens

    def _read(self, video: str) -> tuple[Clip, Any] | None:
        """A video's clip, and the model's config for it; None for one that cannot be read."""
        read: tuple[Clip, Any] | None = None
        unread: dict[str, Any] = {}
        try:
            read = self._ahead.clip(video)
        except VideoError as error:
            if self.task.gone(video):
                raise
            unread = failure_of(error)
        if spans_processes(self.model.mesh):
            told = [json.loads(text) for text in gather(json.dumps(unread).encode())]
            unread = next(filter(None, told), {})
        if read is None or unread:
            self.unread[video] = unread
            return None
        return read

    def _encode(self, video: str, bucket: Bucket, encodings: Sequence[Encoding], pixels: Any) -> Encodings:
        """A video in all these ways, of pixels [1,F,...] as the model's family makes them."""
        tokens = {}
        for encoding in encodings:
            options: dict[str, Any] = {"attention": encoding.attention}
            if encoding.keep is not None:
                options = {"keep": encoding.keep, "frame_count": [self._frames[video]]}
            start = time.perf_counter()
            tokens[encoding] = to_host(self.model.encode(pixels, **options))[0]
            if (bucket, encoding) in self._warm:
                self._clock[video, bucket.frames, encoding] = ms = 1e3 * (time.perf_counter() - start)
                self.whole_ms += [ms] if encoding == Encoding() else []
            self._warm.add((bucket, encoding))
        return tokens


def _size(tokens: Encodings) -> int:
    return sum(array.nbytes for array in tokens.values())
