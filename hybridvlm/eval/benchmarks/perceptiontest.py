"""Perception Test, multiple choice, validation split: three options; videos are shown up to where the answer comes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hybridvlm.eval.benchmarks import prompts
from hybridvlm.eval.benchmarks.definition import Benchmark, Protocol, Question
from hybridvlm.eval.benchmarks.layout import Found, Marker
from hybridvlm.eval.benchmarks.letters import ALPHABET
from hybridvlm.eval.benchmarks.tables import Fields, Row, mapping, read_json, rows
from hybridvlm.options import InputError

MARKERS = (
    Marker("mc_question_valid.json", "official"),
    Marker("mc_question_val/validation-00000-of-00001.parquet", "parquet", ("video_name", "question_id", "answer_id")),
)
FOLDERS = ("videos", "video", "perceptiontest_val/videos", "perceptiontest_val", "")
CUTS = "cut_frame_mapping_valid.json"


def load(found: Found) -> list[Question]:
    """Questions, with the frame at which each video is cut where the file of cuts is there."""
    path = next((p for base in found.bases() if (p := base / CUTS).is_file()), None)
    table = None if path is None else Fields(mapping(path), path, 0)
    cuts = {} if table is None else {video: int(table.number(video) or 0) for video in table.row}
    if path is None:
        found.notes.append(f"{CUTS} is not there: videos are shown whole, and some show the answer at their end")
    questions = []
    for number, row in enumerate(_rows(found)):
        fields = Fields(row, found.marker, number)
        video, options = fields.text("video_name"), fields.texts("options")
        groups: dict[str, Any] = {name: fields.text(name) for name in ("area", "reasoning") if name in fields}
        if "tag" in fields:
            groups["tag"] = tuple(fields.texts("tag"))
        questions.append(
            Question(
                id=f"{video}-{fields.text('question_id')}",
                video=video,
                file=found.file(video, FOLDERS),
                question=fields.text("question"),
                options=fields.choices("options", options),
                answer=fields.place("answer_id", len(options)),
                groups=groups,
                row=number,
                stop=cuts.get(video),
                extra={"question_id": fields.text("question_id")},
            )
        )
    return questions


def _rows(found: Found) -> Iterator[Row]:
    if found.kind == "parquet":
        yield from rows(found.marker)
        return
    try:
        for video, entry in read_json(found.marker).items():
            for item in entry["mc_question"]:
                yield {**item, "video_name": video, "question_id": item["id"]}
    except (AttributeError, TypeError, KeyError):
        raise InputError(f"{found.marker}: must hold {{video: {{mc_question: [questions with an id]}}}}") from None


def submit(
    questions: Sequence[Question], letters: Mapping[str, str | None], replies: Mapping[str, str]
) -> dict[str, Any]:
    """The list that the server takes."""
    return {
        "perceptiontest_submission.json": [
            {
                "video_name": q.video,
                "question": q.question,
                "question_id": q.extra["question_id"],
                "pred_id": ALPHABET.index(letters.get(q.id) or "A"),
            }
            for q in questions
        ]
    }


PROTOCOLS = (
    Protocol(
        "lmms-eval", prompts.LMMS, prompts.form(f"{{Q}}\n{{O.}}\n{prompts.LETTER}"),
        rule="linspace", frames=32, parser="lmms.mvb",
    ),
)  # fmt: skip
BENCHMARKS = {
    "perceptiontest": Benchmark(
        "perceptiontest", "Perception Test, multiple choice, validation split", MARKERS, load, PROTOCOLS, questions=19140,
        folders=FOLDERS, videos=None, groups=("area", "reasoning", "tag"), submission=submit,
        lmms=("perceptiontest_val_mc", "accuracy", 1.0),
    ),
}  # fmt: skip
