"""The embedded benchmark, rendered from the packaged images, and the same questions on scenes that last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hybridvlm.eval.tasks import Sample, Task, TaskOptions
from hybridvlm.models.family import family_for
from hybridvlm.models.media import Clip
from hybridvlm.tiny import needle, scenes, tiles
from hybridvlm.video import shown_clip

VIDEOS, PER_VIDEO = 256, 4


class Needle(Task):
    """Questions of `tiny.needle`, split "test" or "val"; every frame of a video is shown, one a second."""

    name = "needle"
    source: Any = needle

    def __init__(self, options: TaskOptions):
        vision = options.config.vision
        if vision is None or tuple(vision.image_size) != (tiles.FRAME, tiles.FRAME):
            size = "has no vision tower" if vision is None else "takes {}x{}".format(*vision.image_size)
            raise ValueError(
                f"task {self.name} has frames of {tiles.FRAME}x{tiles.FRAME} pixels, the model {size}; use --tasks FILE.jsonl"
            )
        self._config, self._family = options.config, family_for(options.config)
        self.count = options.frames or needle.FRAMES
        self._source = f"{options.split}:{self.count}"
        videos = min(VIDEOS, -(-options.limit // PER_VIDEO)) if options.limit else VIDEOS
        listed = self.source.split_questions(options.split, videos, PER_VIDEO, self.count)
        self._videos = {f"{video.split}-{video.index:04d}": video for video, _ in listed}
        samples = []
        for name, (video, questions) in zip(self._videos, listed, strict=True):
            fields = zip(
                questions.texts(), questions.answers(), questions.options(), questions.type_names(), strict=True
            )
            groups = self.groups(video, questions)
            for number, (text, answer, choices, kind) in enumerate(fields):
                identity = self.source.question_id(video, number)
                two_hop = kind in needle.TWO_HOP
                samples.append(Sample(identity, name, text, answer, tuple(choices), kind, two_hop, groups[number]))
        self.samples = tuple(samples[: options.limit or None])

    def groups(self, video: Any, questions: needle.Questions) -> list[dict[str, str]]:
        """What `Sample.groups` holds of every question."""
        return [{}] * len(questions)

    def clip(self, video: str, pixels: bool = True) -> tuple[Clip, Any]:
        frames = self.source.render_video(self._videos[video]) if pixels else None
        seconds = tuple(float(i) for i in range(self.count))
        source = Clip(seconds, frames, size=(tiles.FRAME, tiles.FRAME))
        return shown_clip(self._family, self._config, source, frames=self.count, pixels=pixels)

    def identity(self, video: str) -> str:
        return self._source


class NeedleScenes(Needle):
    """Questions of `tiny.scenes`: most tokens repeat the frame before them."""

    name = "needle-scenes"
    source = scenes

    def groups(self, video: Any, questions: needle.Questions) -> list[dict[str, str]]:
        return [{"moment": moment} for moment in scenes.moments(video, questions)]

    def identity(self, video: str) -> str:
        return f"scenes:{super().identity(video)}"

    def summary(self, answers: Sequence[tuple[Sample, Mapping[str, Any]]]) -> dict[str, Any]:
        """`by_moment`: the accuracy of questions about onsets and of the others, `n_by_moment`: how many there are."""
        rights: dict[str, list[bool]] = {moment: [] for moment in scenes.MOMENTS}
        for sample, record in answers:
            if record["correct"] is not None:
                rights[sample.groups["moment"]].append(record["correct"])
        asked = {moment: right for moment, right in rights.items() if right}
        return {
            "by_moment": {moment: sum(right) / len(right) for moment, right in asked.items()},
            "n_by_moment": {moment: len(right) for moment, right in asked.items()},
        }
