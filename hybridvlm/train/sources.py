"""Sources of samples, each with random access: number -> the arrays of one sample (`rows.example` and its visual part).

A source is deterministic: sample number i is the same at every call, in every process and after every restart.
"""

from __future__ import annotations

import functools
import hashlib
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from hybridvlm.files import json_rows, text_problem
from hybridvlm.inference.model import Model
from hybridvlm.models.media import Clip, resize
from hybridvlm.tiny.assets import import_tfds
from hybridvlm.tokenizers.text import person
from hybridvlm.train.config import TrainConfig
from hybridvlm.train.features import FeatureCache
from hybridvlm.train.rows import Example, Shape, check, example, pad, sharing
from hybridvlm.video import VideoError, shown_clip

Turns = tuple[tuple[str, str], ...]  # question and answer, the earlier ones first


class Talk(NamedTuple):
    """What is said about a video; system: a message before all turns, "" for none."""

    turns: Turns
    system: str = ""


class Source(Protocol):
    """len(source) samples; name(i) for people; sample(i) raises VideoError or OSError for one that cannot be read."""

    shuffled: bool  # whether the order of the numbers means nothing already
    digest: str  # changes where the samples' numbers no longer mean the same

    def __len__(self) -> int: ...

    def name(self, number: int) -> str: ...

    def sample(self, number: int) -> Example: ...


def make_source(config: TrainConfig, model: Model) -> Source:
    """The source that a config names."""
    if config.data.source == "needle":
        return NeedleSource(config, model)
    if config.data.source == "jsonl":
        return JsonlSource(config, model)
    return TfdsSource(config, model)


def check_needle(config: TrainConfig, model: Model, shape: Shape, answer: int) -> None:
    """ValueError for what the source "needle" cannot do, without its bank of cells."""
    from hybridvlm.tiny import needle, tiles, vocabulary

    d, vision = config.data, model.config.vision
    if vision is None or tuple(vision.image_size) != (tiles.FRAME, tiles.FRAME):
        raise ValueError(
            f"source needle has frames of {tiles.FRAME}x{tiles.FRAME} pixels; model {model.name!r} takes others"
        )
    if d.split not in ("train", "val"):
        raise ValueError(f"Data.split of needle must be 'train' (or 'val'), got {d.split!r}: nobody trains on test")
    known, frames = needle.TYPES + needle.TWO_HOP, d.sample_frames or d.frames
    if not set(d.types) <= set(known):
        raise ValueError(f"Data.types of needle must be of {list(known)}, got {list(d.types)}")
    if not 2 <= frames <= needle.FRAMES:
        raise ValueError(f"a sample of needle has 2 to {needle.FRAMES} frames, got {frames}: set Data.sample_frames")
    _check_frames(config, model)
    clip, word = Clip(tuple(range(frames))), vocabulary.WORDS[vocabulary.CLASS]
    row = example(model, clip, " ".join([word] * 4), word)
    row = sharing([row] * d.questions) if d.questions > 1 else row
    check(row, shape, answer, frames, "every sample of needle")


def _check_frames(config: TrainConfig, model: Model) -> None:
    """A stem tower writes each frame's time into its tokens, and has a table of times."""
    d, vision = config.data, model.config.vision
    if vision is None:
        raise ValueError(f"model {model.name!r} has no vision tower; it cannot be trained on videos")
    if vision.kind != "stem":
        return
    if d.segments > 1 and d.features == "pixels":
        raise ValueError(
            "a stem tower writes each frame's time into its tokens: packed rows need Data.features 'cached'"
        )
    frames = d.frames if d.features == "pixels" else d.sample_frames or d.frames
    if frames > vision.max_frames:
        raise ValueError(f"model {model.name!r} knows the times of {vision.max_frames} frames, got {frames} in Data")


class NeedleSource:
    """The generator of the embedded benchmark; features "cached": out of a bank of cells that the frozen tower has seen.

    `table` [16,n,D]: the bank's tokens, None with pixels. `asked` questions per sample share its video in `shared`.
    """

    shuffled, digest = True, ""

    def __init__(self, config: TrainConfig, model: Model):
        from hybridvlm.tiny import needle
        from hybridvlm.tiny.bank import make_bank

        d = config.data
        self.config, self.model = config, model
        self.frames = d.sample_frames or d.frames
        self.types = d.types or needle.TYPES + needle.TWO_HOP
        self.bank = (
            make_bank(model.params, model.config, self.frames, d.bank, config.seed, d.split)
            if d.features == "cached"
            else None
        )
        self.table = None if self.bank is None else self.bank.tokens

    def __len__(self) -> int:
        return 1 << 40

    def name(self, number: int) -> str:
        return f"needle-{self.config.data.split}-{number}"

    def sample(self, number: int) -> Example:
        questions = self.config.data.questions
        visual, asked = self._draw(1, number, questions)
        rows = [self._row(asked, at) for at in range(questions)]
        return (sharing(rows) if questions > 1 else rows[0]) | visual

    def shared(self, number: int, questions: int) -> Example:
        """One video and many questions about it: the visual part, `prefix` [P] and `prefix_frame` [P] up to the last visual token,
        and what comes after it of every question: ids, label, question and segment (0: padding) [Q,T].

        T is what the longest takes; a question has four words. The end token, after which nothing is said, is left out.
        """
        visual, asked = self._draw(2, number, questions)
        rows = [self._row(asked, number) for number in range(questions)]
        cut = int(np.flatnonzero(rows[0]["frame"] >= 0)[-1]) + 1
        out = visual | {"prefix": rows[0]["ids"][:cut], "prefix_frame": rows[0]["frame"][:cut]}
        text = max(len(row["ids"]) for row in rows) - 1 - cut
        for row in rows:
            row["segment"] = np.ones(len(row["ids"]), np.int32)
        for name in ("ids", "label", "question", "segment"):
            out[name] = np.stack([pad(row[name][cut:-1], text) for row in rows])
        return out

    def _draw(self, purpose: int, number: int, questions: int) -> tuple[Example, Any]:
        from hybridvlm.tiny import needle, scenes
        from hybridvlm.tiny.bank import draw_videos

        rng = np.random.default_rng([self.config.seed, 1000, purpose, number])
        if self.bank is not None:
            drawn, asked = draw_videos(self.bank, self.frames, 1, questions, self.types, rng)
            return {"visual_cells": drawn.cells[0], "visual_time": np.arange(self.frames, dtype=np.int32)}, asked[0]
        # videos of the benchmark's own stream, each purpose with numbers of its own
        stream = (self.config.data.split, 2 * number + purpose - 1, self.frames, self.config.seed + 1)
        order = list(self.types)
        rng.shuffle(order)
        if self.config.data.scenes and rng.random() < self.config.data.scenes:
            lasting = scenes.make_video(*stream)
            kinds = [order[i % len(order)] for i in range(questions)]
            wanted = [scenes.MOMENTS[i] for i in rng.integers(2, size=questions)]
            return {"visual_pixels": scenes.render_video(lasting)}, scenes.make_questions(lasting, kinds, wanted, rng)
        video = needle.make_video(*stream)
        return {"visual_pixels": needle.render_video(video)}, needle.make_questions(video, questions, rng, order)

    def _row(self, asked: Any, number: int) -> Example:
        clip = Clip(tuple(float(t) for t in range(self.frames)))
        texts = asked.texts()[number], asked.answers()[number]
        return example(self.model, clip, *texts)


class Files:
    """What the sources of files share: a clip's frames become pixels or cached features of the one size that rows have."""

    shuffled = False

    def __init__(self, config: TrainConfig, model: Model):
        _check_frames(config, model)
        vision = model.config.tower
        self.config, self.model = config, model
        self.patch, self.size = vision.temporal_patch, tuple(vision.image_size)
        self.frames = (config.data.sample_frames or config.data.frames) * self.patch
        self.cache = FeatureCache(config.data.cache, model) if config.data.features == "cached" else None

    def arrays(
        self, seconds: tuple[float, ...], identity: str, talks: Sequence[Talk], frames: Callable[[], np.ndarray]
    ) -> Example:
        """A sample of the frames at `seconds`: frames() gives them [F,h,w,3], where no cached features of `identity` stand in.

        talks: what is said about them; several share the video.
        """
        rows = []
        for talk in talks:
            *history, (question, answer) = talk.turns
            rows.append(example(self.model, Clip(seconds), question, answer, history, talk.system))
        row = sharing(rows) if self.config.data.questions > 1 else rows[0]
        patches = -(-len(seconds) // self.patch)

        def pixels() -> np.ndarray:
            return self.model.family.pixels(self.model.config, [Clip(seconds, frames())], patches)[0]

        if self.cache is None:
            return row | {"visual_pixels": pixels()}
        return row | {"visual_features": self.cache(identity, pixels)}


class JsonlSource(Files):
    """Lines {"video": path, "question", "answer"} or {"video": path, "conversations": [{"from": "human" | "gpt", "value"}, ...]},
    or one JSON array of them.

    Either may have a "system" text, which a conversation may also begin with ({"from": "system", "value"}): it becomes the system
    message. Paths are relative to the file. Every turn of a conversation is a sample of its own, with the earlier turns before it,
    as it is when the model is asked; with Data.questions above 1, so many samples that follow each other share one video, or as
    many as Data.text has room for.
    ValueError with the line for one that is not of this form; videos are only opened when read.
    """

    def __init__(self, config: TrainConfig, model: Model):
        super().__init__(config, model)
        path = pathlib.Path(config.data.path)
        if not path.is_file():
            raise FileNotFoundError(f"no training samples at {path}; give a JSONL file")
        self.folder = path.parent
        self.samples: list[tuple[str, list[Talk]]] = []
        own = config.data
        self.shape = Shape(own.frames, own.text, own.segments, model.config.tower.tokens_per_frame)
        self._bytes = self._around = 0  # bytes of the last sample's texts; text tokens of some sample
        # of the talks of one sample, which are asked for again with every one that joins them
        self._tokens = functools.lru_cache(maxsize=own.questions + 1)(self._count_tokens)
        self.digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        for _, where, parse in json_rows(path):
            try:
                video, talk = read_line(parse())
                self._fits(talk)
            except ValueError as error:  # what json and Unicode raise is one too
                raise ValueError(f"{path}, {where}: {error}") from None
            for n in range(len(talk.turns)):
                self._add(video, Talk(talk.turns[: n + 1], talk.system))
        if not self.samples:
            raise ValueError(f"{path} holds no samples")
        if own.questions > 1:  # which of them share a row depends on their tokens
            self.digest += f"-{len(self.samples)}"

    def _add(self, video: str, talk: Talk) -> None:
        """Another sample, or another question of the last one, as long as the row has room for its text."""
        size = len(talk.system.encode()) + sum(len(text.encode()) for turn in talk.turns for text in turn)
        if self.config.data.questions > 1 and self.samples and self.samples[-1][0] == video:
            last = self.samples[-1][1]
            if len(last) < self.config.data.questions and self._room(last, talk, self._bytes + size):
                last.append(talk)
                self._bytes += size
                return
        self.samples.append((video, [talk]))
        self._bytes = size

    def _room(self, talks: Sequence[Talk], more: Talk, size: int) -> bool:
        """Whether the text of `talks` and one more, of `size` bytes, fits a row."""
        # what stands around a turn is no longer than a whole sample, and no token of the texts is shorter than a byte
        self._around = self._around or self._tokens(more)
        turns = sum(len(talk.turns) + 1 for talk in (*talks, more))
        if size + turns * self._around <= self.shape.own_text:
            return True
        return sum(map(self._tokens, (*talks, more))) <= self.shape.own_text

    def _count_tokens(self, talk: Talk) -> int:
        """Text tokens of a sample."""
        *history, (question, answer) = talk.turns
        clip = Clip(tuple(float(t) for t in range(self.patch)))
        return int((example(self.model, clip, question, answer, history, talk.system)["frame"] < 0).sum())

    def _fits(self, talk: Talk) -> None:
        """ValueError for texts that are longer than a row, whatever the video: most that do not fit are known before the start."""
        d, turns = self.config.data, talk.turns
        if (talk.system or len(turns) > 1) and not hasattr(self.model.tokenizer, "chat"):
            raise ValueError(
                "this model knows no conversation: give one question and its answer, and no system message"
            )
        room, most = self.shape.own_text, d.answer or d.text
        if len(talk.system.encode()) + sum(len(text.encode()) for turn in turns for text in turn) <= min(room, most):
            return  # no token is shorter than a byte
        length = [[len(self.model.tokenizer.encode(person(text))) for text in turn] for turn in turns]
        whole = sum(map(sum, length)) + (len(self.model.tokenizer.encode(person(talk.system))) if talk.system else 0)
        if whole > room:
            raise ValueError(f"{whole} text tokens, and a row has room for {room} (Data.text)")
        said = max(answer for _, answer in length) + 1
        if said > most:
            raise ValueError(f"an answer of {said} tokens, and a row has room for {most} (Data.answer)")

    def __len__(self) -> int:
        return len(self.samples)

    def name(self, number: int) -> str:
        return self.samples[number][0]

    def sample(self, number: int) -> Example:
        video, talks = self.samples[number]
        path = self.folder / video
        look = functools.partial(
            shown_clip,
            self.model.family,
            self.model.config,
            path,
            frames=self.frames,
            rule=self.config.data.rule,
            size=self.size,
        )
        clip, _ = look(pixels=False)
        if clip.kind == "image":
            raise VideoError(f"{path}: is a still picture, not a video; training takes videos")
        status = path.stat()
        identity = f"{path.resolve()}:{status.st_size}:{status.st_mtime_ns}:{list(clip.numbers)}"

        def frames() -> np.ndarray:
            found = look()[0].frames
            assert found is not None  # asked for with its pixels
            return found

        return self.arrays(clip.seconds, identity, talks, frames)


def read_line(line: Any) -> tuple[str, Talk]:
    """(video, what is said about it) of one parsed line; ValueError for one of another form."""
    if not isinstance(line, dict) or not isinstance(line.get("video"), str) or not line["video"]:
        raise ValueError('needs "video", the path of a file')
    if "\0" in line["video"]:
        raise ValueError(f'"video" holds a zero byte, which no path has: {line["video"]!r}')
    if problem := text_problem(line):
        raise ValueError(problem)
    system = line.get("system") or ""
    if not isinstance(system, str):
        raise ValueError(f'"system" must be a text, got {system!r}')
    if "conversations" not in line:
        asked, told = line.get("question"), line.get("answer")
        if not (isinstance(asked, str) and asked.strip() and isinstance(told, str) and told.strip()):
            raise ValueError('needs "question" and "answer", texts that are not empty, or "conversations"')
        return line["video"], Talk(((asked, told),), system)
    spoken = line["conversations"]
    if not isinstance(spoken, list) or not spoken:
        raise ValueError(_ORDER)
    if not all(isinstance(turn, dict) and isinstance(turn.get("value"), str) for turn in spoken):
        raise ValueError('a turn of "conversations" must be {"from": ..., "value": text}')
    if spoken[0].get("from") == "system":
        if system:
            raise ValueError('has two system messages: "system", and the first turn of "conversations"')
        system, spoken = spoken[0]["value"], spoken[1:]
    if not spoken or len(spoken) % 2:
        raise ValueError(_ORDER)
    turns = []
    for human, model in zip(spoken[::2], spoken[1::2], strict=True):
        if human.get("from") not in ("human", "user") or model.get("from") not in ("gpt", "assistant"):
            raise ValueError(_ORDER)
        question = human["value"].replace("<video>", "").replace("<image>", "").strip()
        if not question or not model["value"].strip():
            raise ValueError('a turn of "conversations" is empty')
        turns.append((question, model["value"].strip()))
    return line["video"], Talk(tuple(turns), system.strip())


_ORDER = (
    '"conversations" must be turns of "human" and "gpt", one after the other, with at most one "system" before them'
)


class TfdsSource(Files):
    """A tensorflow-datasets `data_source`: records with "video" (frames [F,h,w,3] uint8) or "image", "question" and "answer".

    source: instead of the one that Data.path names, any object with len() and [number].
    """

    def __init__(self, config: TrainConfig, model: Model, source: Any = None):
        super().__init__(config, model)
        if source is None:
            try:
                tfds = import_tfds()
            except ImportError as error:
                raise ValueError(f"Data.source 'tfds' cannot use tensorflow-datasets: {error}") from error
            d = config.data
            source = tfds.data_source(d.path, split=d.split, data_dir=d.folder or None)
        if not len(source):
            raise ValueError(f"{config.data.path}:{config.data.split} holds no samples")
        self.source, self.digest = source, str(len(source))
        self._record(0)

    def __len__(self) -> int:
        return len(self.source)

    def name(self, number: int) -> str:
        return f"{self.config.data.path}:{self.config.data.split}:{number}"

    def sample(self, number: int) -> Example:
        record = self._record(number)
        shown = np.asarray(record["video"]) if "video" in record else np.asarray(record["image"])[None]
        if len(shown) > self.frames:
            shown = shown[np.linspace(0, len(shown) - 1, self.frames).round().astype(int)]
        seconds = tuple(float(t) for t in range(len(shown)))
        question, answer = (
            t.decode() if isinstance(t, bytes) else str(t) for t in (record["question"], record["answer"])
        )
        name = f"{self.name(number)}:{self.frames}"
        return self.arrays(seconds, name, [Talk(((question, answer),))], lambda: resize(shown, self.size))

    def _record(self, number: int) -> Any:
        record = self.source[number]
        missing = {"question", "answer"} - set(record)
        if missing or not {"video", "image"} & set(record):
            raise ValueError(f"{self.name(number)} must have video or image, question, answer; it has {sorted(record)}")
        return record
