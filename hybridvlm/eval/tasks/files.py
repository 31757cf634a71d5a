"""What tasks on video and image files share: the choice of frames is settled once a video, and complaints are kept."""

from __future__ import annotations

import abc
import contextlib
import pathlib
from collections.abc import Iterator
from typing import Any

from hybridvlm.eval.tasks import Decoding, Task
from hybridvlm.models.family import Family
from hybridvlm.models.media import Clip
from hybridvlm.video import VideoError, shown_clip
from hybridvlm.video.clip import FrameRule
from hybridvlm.video.errors import heard, time_limit


class FileTask(Task):
    """A task whose videos are files.

    Args:
        family: of the model.
        config: of the model.
        count: most frames of a video.
        rule: which ones, see `video.sampling`.
        decoding: how the files are read.
    """

    def __init__(self, family: Family, config: Any, count: int, rule: str, decoding: Decoding | None = None):
        self._family, self._config, self._count, self._rule = family, config, count, rule
        self._decoding = decoding or Decoding()
        self._clips: dict[str, tuple[Clip, Any]] = {}
        self._remarks: dict[str, list[str]] = {}

    @abc.abstractmethod
    def path(self, video: str) -> pathlib.Path:
        """The file of a video."""

    def source(self, video: str, pixels: bool) -> pathlib.Path | Clip:
        """What `video.shown_clip` is given: the file, or frames that were read already."""
        return self.path(video)

    def frame_rule(self, video: str) -> str | FrameRule:
        """Which frames of a video are taken."""
        return self._rule

    def clip(self, video: str, pixels: bool = True) -> tuple[Clip, Any]:
        """As `Task.clip`; VideoError for a file that gives no pictures. The choice of frames is settled once per video."""
        if pixels:
            found = self._shown(video, True)
            planned, _ = self.clip(video, pixels=False)
            if found[0].seconds != planned.seconds:
                raise VideoError(
                    f"{self.path(video)}: gives {len(found[0].seconds)} frames where {len(planned.seconds)} were announced"
                )
            return found
        if video not in self._clips:
            self._clips[video] = self._shown(video, False)
        return self._clips[video]

    def _shown(self, video: str, pixels: bool) -> tuple[Clip, Any]:
        def read() -> tuple[Clip, Any]:
            source, rule = self.source(video, pixels), self.frame_rule(video)
            return shown_clip(self._family, self._config, source, frames=self._count, rule=rule, pixels=pixels)

        cache = self._decoding.cache if pixels else None
        # what is settled already of its frames is no part of a video's time
        planned = None if cache is None else self.clip(video, pixels=False)
        with self._listening(video), time_limit(self._decoding.seconds):
            if cache is None or planned is None or planned[0].kind != "video" or not self.path(video).is_file():
                return read()
            clip, config = planned
            asked = [clip.numbers, clip.seconds, config.vision.image_size]
            return cache.clip(self.path(video), asked, lambda: read()[0]), config

    @contextlib.contextmanager
    def _listening(self, video: str) -> Iterator[None]:
        """Keep what the decoder remarks on a video."""
        with heard() as told:
            try:
                yield
            finally:
                kept = self._remarks.setdefault(video, [])
                kept += [text for text in dict.fromkeys(told) if text not in kept]

    def remarks(self, video: str) -> list[str]:
        return list(self._remarks.get(video, ()))

    def gone(self, video: str) -> bool:
        """Whether the file is not there any more: that is no fault of the video."""
        return not self.path(video).exists()
