"""The embedded benchmark, rendered from the packaged images."""

from __future__ import annotations

from typing import Any

from hybridvlm.eval.tasks import Sample, Task, TaskOptions
from hybridvlm.models.family import family_for
from hybridvlm.models.media import Clip
from hybridvlm.tiny import needle, tiles
from hybridvlm.video import shown_clip

VIDEOS, PER_VIDEO = 256, 4


class Needle(Task):
    """Questions of `tiny.needle`, split "test" or "val"; every frame of a video is shown, one a second."""

    name = "needle"

    def __init__(self, options: TaskOptions):
        vision = options.config.vision
        if vision is None or tuple(vision.image_size) != (tiles.FRAME, tiles.FRAME):
            size = "has no vision tower" if vision is None else "takes {}x{}".format(*vision.image_size)
            raise ValueError(
                f"task needle has frames of {tiles.FRAME}x{tiles.FRAME} pixels, the model {size}; use --tasks FILE.jsonl"
            )
        self._config, self._family = options.config, family_for(options.config)
        self.count = options.frames or needle.FRAMES
        self._source = f"{options.split}:{self.count}"
        videos = min(VIDEOS, -(-options.limit // PER_VIDEO)) if options.limit else VIDEOS
        listed = needle.split_questions(options.split, videos, PER_VIDEO, self.count)
        self._videos = {f"{video.split}-{video.index:04d}": video for video, _ in listed}
        samples = []
        for name, (video, questions) in zip(self._videos, listed, strict=True):
            fields = zip(
                questions.texts(), questions.answers(), questions.options(), questions.type_names(), strict=True
            )
            for number, (text, answer, choices, kind) in enumerate(fields):
                identity = needle.question_id(video, number)
                samples.append(Sample(identity, name, text, answer, tuple(choices), kind, kind in needle.TWO_HOP))
        self.samples = tuple(samples[: options.limit or None])

    def clip(self, video: str, pixels: bool = True) -> tuple[Clip, Any]:
        frames = needle.render_video(self._videos[video]) if pixels else None
        seconds = tuple(float(i) for i in range(self.count))
        source = Clip(seconds, frames, size=(tiles.FRAME, tiles.FRAME))
        return shown_clip(self._family, self._config, source, frames=self.count, pixels=pixels)

    def identity(self, video: str) -> str:
        return self._source
