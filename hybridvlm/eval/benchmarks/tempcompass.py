"""TempCompass, multiple choice: action, direction, speed, order and change of attributes in short clips."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from hybridvlm.eval.benchmarks import prompts
from hybridvlm.eval.benchmarks.definition import Benchmark, Protocol, Question
from hybridvlm.eval.benchmarks.layout import Found, Marker
from hybridvlm.eval.benchmarks.tables import Fields, Row, letter_of, read_json, rows, split_options
from hybridvlm.options import InputError

MARKERS = (
    Marker("questions/multi-choice.json", "official"),
    Marker("multi-choice/test-00000-of-00001.parquet", "parquet", ("video_id", "question", "answer", "dim")),
)
FOLDERS = ("videos", "video", "tempcompass/videos", "tempcompass", "")
ASPECTS = ("action", "direction", "speed", "order", "attribute_change")


def load(found: Found) -> list[Question]:
    """Questions by video and aspect, options in their text."""
    seen: Counter[tuple[str, str]] = Counter()
    questions = []
    for number, row in enumerate(_rows(found)):
        fields = Fields(row, found.marker, number)
        video, aspect, published = fields.text("video_id"), fields.text("dim"), fields.text("question")
        question, options = split_options(published, "A.")
        lettered = prompts.dotted_list(options)
        answer, remark = letter_of(fields.text("answer"), lettered)
        questions.append(
            Question(
                id=f"{video}-{aspect}-{seen[video, aspect]}",
                video=video,
                file=found.file(video, FOLDERS),
                question=question,
                options=fields.choices("question", options),
                answer=answer,
                groups={"dim": aspect},
                row=number,
                published=published,
                remark=remark,
            )
        )
        seen[video, aspect] += 1
    return questions


def _rows(found: Found) -> Iterator[Row]:
    if found.kind == "parquet":
        yield from rows(found.marker)
        return
    try:
        for video, aspects in read_json(found.marker).items():
            for aspect, items in aspects.items():
                for item in items:
                    yield {**item, "video_id": video, "dim": aspect}
    except (AttributeError, TypeError):
        raise InputError(f"{found.marker}: must hold {{video: {{aspect: [questions]}}}}") from None


PROTOCOLS = (
    Protocol(
        "official", "2024", prompts.form("{P}\nPlease directly give the best option:"),
        rule="linspace", frames=16, parser="tempcompass.off", note="no language model judges replies that do not parse",
    ),
)  # fmt: skip
BENCHMARKS = {
    "tempcompass": Benchmark(
        "tempcompass", "TempCompass, multiple choice", MARKERS, load, PROTOCOLS, questions=1580, videos=410, groups=("dim",),
        folders=FOLDERS, order={"dim": ASPECTS},
    ),
}  # fmt: skip
