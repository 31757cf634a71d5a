"""The embedded benchmark, rendered from the packaged images."""

from __future__ import annotations

import numpy as np

from hybridvlm.eval.tasks import Sample, Task, TaskOptions
from hybridvlm.tiny import needle, tiles

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
            for place, (text, answer, choices, kind) in enumerate(fields):
                identity = needle.question_id(video, place)
                samples.append(Sample(identity, name, text, answer, tuple(choices), kind, kind in needle.TWO_HOP))
        self.samples = tuple(samples[: options.limit or None])

    def seconds(self, video: str) -> list[float]:
        return [float(i) for i in range(self.count)]

    def frames(self, video: str) -> tuple[np.ndarray, list[float]]:
        return needle.render_video(self._videos[video]), self.seconds(video)

    def identity(self, video: str) -> str:
        return self._source
