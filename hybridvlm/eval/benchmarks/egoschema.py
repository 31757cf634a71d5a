"""EgoSchema: 5,031 questions on three-minute videos of Ego4D, five options; the answers of 500 are published."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hybridvlm.eval.benchmarks import prompts
from hybridvlm.eval.benchmarks.definition import Benchmark, Protocol, Question
from hybridvlm.eval.benchmarks.layout import Found, Marker
from hybridvlm.eval.benchmarks.letters import ALPHABET
from hybridvlm.eval.benchmarks.tables import Fields, mapping, rows, without_letters

_COLUMNS = ("question_idx", "video_idx", "option")
FULL = (
    Marker("questions.json", "official", beside="subset_answers.json"),
    Marker("questions.json", "official", beside="uid_to_ego4d.json"),
    Marker("MC/test-00000-of-00001.parquet", "parquet", _COLUMNS),
)
SUBSET = (
    Marker("questions.json", "official", beside="subset_answers.json"),
    Marker("Subset/test-00000-of-00001.parquet", "parquet", _COLUMNS),
)
FOLDERS = ("videos", "video", "egoschema/videos", "egoschema", "good_clips_git", "")


def load(found: Found) -> list[Question]:
    """All questions, with the answers that are published."""
    known = _answers(found)
    questions = []
    for number, row in enumerate(rows(found.marker)):
        fields = Fields(row, found.marker, number)
        uid = fields.text("q_uid" if found.kind == "official" else "video_idx")
        if found.kind == "official":
            options = tuple(fields.text(f"option {i}") for i in range(5))
        else:
            options = fields.choices("option", without_letters(fields.texts("option")))
        questions.append(
            Question(
                id=uid,
                video=uid,
                file=found.file(uid, FOLDERS),
                question=fields.text("question"),
                options=options,
                answer=known.get(uid),
                row=number,
            )
        )
    return questions


def load_subset(found: Found) -> list[Question]:
    """The questions whose answers are published."""
    return [question for question in load(found) if question.answer is not None]


def _answers(found: Found) -> dict[str, str]:
    """Letter of the right option by question, as far as it is published."""
    if found.kind == "official":
        path = found.marker.parent / "subset_answers.json"
        if not path.is_file():
            return {}
        known = Fields(mapping(path), path, 0)
        return {uid: letter for uid in known.row if (letter := known.place(uid, 5))}
    path = found.root / "Subset/test-00000-of-00001.parquet"
    table = [Fields(row, path, number) for number, row in enumerate(rows(path) if path.is_file() else [])]
    return {fields.text("video_idx"): letter for fields in table if (letter := fields.place("answer", 5))}


def submit(
    questions: Sequence[Question], letters: Mapping[str, str | None], replies: Mapping[str, str]
) -> dict[str, Any]:
    """A number 0 to 4 for every question; the server takes no other, so 0 stands for no answer."""
    return {"egoschema_submission.json": {q.id: ALPHABET.index(letters.get(q.id) or "A") for q in questions}}


PROTOCOLS = (
    Protocol(
        "lmms-eval", prompts.LMMS, prompts.form(f"{{Q}}\n{{O.}}\n{prompts.LETTER}"),
        rule="linspace", frames=32, parser="lmms.ego",
    ),
)  # fmt: skip
BENCHMARKS = {
    "egoschema": Benchmark(
        "egoschema", "EgoSchema, all questions", FULL, load, PROTOCOLS, questions=5031, videos=5031, submission=submit,
        folders=FOLDERS, lmms=("egoschema", "submission", 1.0),
    ),
    "egoschema-subset": Benchmark(
        "egoschema-subset", "EgoSchema, the subset with answers", SUBSET, load_subset, PROTOCOLS, questions=500, videos=500,
        folders=FOLDERS, lmms=("egoschema_subset", "score", 1.0),
    ),
}  # fmt: skip
