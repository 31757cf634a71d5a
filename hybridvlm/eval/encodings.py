"""Visual tokens of an evaluation's videos, held for the questions to come, and what they took."""

from __future__ import annotations

import collections
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from hybridvlm.eval.variants import Bucket
from hybridvlm.inference.model import Model
from hybridvlm.inference.placement import to_host
from hybridvlm.reduction.pixels import PixelSelection

CACHE_BYTES = 1 << 29  # visual tokens of encoded videos that are held for the questions to come


class Encoding(NamedTuple):
    """What a method has the tower do: all of a video, or what its plan keeps of it; with the tower's attention or without."""

    keep: PixelSelection | None = None
    attention: bool = False


Encodings = dict[Encoding, np.ndarray]


class EncodedVideos:
    """Videos through the tower, once for every way in which methods want them.

    Args:
        model: whose tower it is.
        most: bytes that are held; beyond them the videos that were not asked for longest go.
        least: how many videos are held in any case.

    Attributes:
        whole_ms: milliseconds of every encoding of a whole video, without the first calls of a program.
    """

    def __init__(self, model: Model, most: int, least: int):
        self.model, self._most, self._least = model, most, least
        self.whole_ms: list[float] = []
        self._clock: dict[tuple[str, int, Encoding], float] = {}
        self._warm: set[tuple[Bucket, Encoding]] = set()
        self._bytes = 0
        self._held: collections.OrderedDict[tuple[Any, ...], Encodings] = collections.OrderedDict()

    def ms(self, video: str, bucket: Bucket, encoding: Encoding) -> float | None:
        """Milliseconds of an encoding; None where it was the first call of its program."""
        return self._clock.get((video, bucket.frames, encoding))

    def get(self, video: str, bucket: Bucket, encodings: Sequence[Encoding]) -> Encodings | None:
        """Visual tokens [F,m,D] of a video in all these ways, F the bucket's frames; None where they are not held."""
        key = video, bucket.frames, tuple(encodings)
        if key in self._held:
            self._held.move_to_end(key)
        return self._held.get(key)

    def encode(
        self,
        video: str,
        bucket: Bucket,
        encodings: Sequence[Encoding],
        pixels: np.ndarray,
        frames: int,
    ) -> Encodings:
        """Encode a video in all these ways, and hold what comes.

        Args:
            video: its name.
            bucket: of its questions.
            encodings: each once.
            pixels: [1,F,...], as the model's family makes them.
            frames: how many of them are real.
        """
        tokens = {}
        for encoding in encodings:
            options: dict[str, Any] = {"attention": encoding.attention}
            if encoding.keep is not None:
                options = {"keep": encoding.keep, "frame_count": [frames]}
            start = time.perf_counter()
            tokens[encoding] = to_host(self.model.encode(pixels, **options))[0]
            if (bucket, encoding) in self._warm:
                self._clock[video, bucket.frames, encoding] = ms = 1e3 * (time.perf_counter() - start)
                self.whole_ms += [ms] if encoding == Encoding() else []
            self._warm.add((bucket, encoding))
        self._held[video, bucket.frames, tuple(encodings)] = tokens
        self._bytes += _size(tokens)
        while self._bytes > self._most and len(self._held) > self._least:
            self._bytes -= _size(self._held.popitem(last=False)[1])
        return tokens


def _size(tokens: Encodings) -> int:
    return sum(array.nbytes for array in tokens.values())
