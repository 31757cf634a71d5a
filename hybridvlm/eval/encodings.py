"""Visual tokens of an evaluation's videos, held for the questions to come, and what they took."""

from __future__ import annotations

import collections
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from hybridvlm.eval.variants import Bucket
from hybridvlm.inference.model import Model
from hybridvlm.inference.placement import to_host
from hybridvlm.reduction.pixels import PixelSelection

CACHE_BYTES = 1 << 29  # visual tokens of encoded videos that are held for the questions to come
# by what of a video was encoded: all (None), or what a plan chooses before the tower
Encodings = dict[PixelSelection | None, np.ndarray]


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
        self._clock: dict[tuple[str, int, PixelSelection | None], float] = {}
        self._warm: set[tuple[Bucket, PixelSelection | None]] = set()
        self._bytes = 0
        self._held: collections.OrderedDict[tuple[Any, ...], Encodings] = collections.OrderedDict()

    def ms(self, video: str, bucket: Bucket, keep: PixelSelection | None) -> float | None:
        """Milliseconds of an encoding; None where it was the first call of its program."""
        return self._clock.get((video, bucket.frames, keep))

    def get(self, video: str, bucket: Bucket, keeps: Sequence[PixelSelection | None]) -> Encodings | None:
        """Visual tokens [F,m,D] of a video in all these ways, F the bucket's frames; None where they are not held."""
        key = video, bucket.frames, tuple(keeps)
        if key in self._held:
            self._held.move_to_end(key)
        return self._held.get(key)

    def encode(
        self,
        video: str,
        bucket: Bucket,
        keeps: Sequence[PixelSelection | None],
        pixels: np.ndarray,
        frames: int,
        attention: bool,
    ) -> Encodings:
        """Encode a video in all these ways, and hold what comes.

        Args:
            video: its name.
            bucket: of its questions.
            keeps: what is encoded of it, each once.
            pixels: [1,F,...], as the model's family makes them.
            frames: how many of them are real.
            attention: whether a method ranks by the attention of the tower over the whole video.
        """
        tokens = {}
        for keep in keeps:
            options: dict[str, Any] = {"attention": attention}
            if keep is not None:
                options = {"keep": keep, "frame_count": [frames]}
            start = time.perf_counter()
            tokens[keep] = to_host(self.model.encode(pixels, **options))[0]
            if (bucket, keep) in self._warm:
                self._clock[video, bucket.frames, keep] = ms = 1e3 * (time.perf_counter() - start)
                self.whole_ms += [ms] if keep is None else []
            self._warm.add((bucket, keep))
        self._held[video, bucket.frames, tuple(keeps)] = tokens
        self._bytes += _size(tokens)
        while self._bytes > self._most and len(self._held) > self._least:
            self._bytes -= _size(self._held.popitem(last=False)[1])
        return tokens


def _size(tokens: Encodings) -> int:
    return sum(array.nbytes for array in tokens.values())
