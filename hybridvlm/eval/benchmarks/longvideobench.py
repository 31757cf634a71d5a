"""LongVideoBench: questions that refer to a moment of a video of up to an hour, two to five options, with subtitles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hybridvlm.eval.benchmarks import prompts
from hybridvlm.eval.benchmarks.definition import Benchmark, Protocol, Question
from hybridvlm.eval.benchmarks.layout import Found, Marker
from hybridvlm.eval.benchmarks.tables import Fields, rows

_COLUMNS = ("option0", "correct_choice", "starting_timestamp_for_subtitles")
VAL = (
    Marker("lvb_val.json", "official"),
    Marker("validation-00000-of-00001.parquet", "parquet", _COLUMNS),
    Marker("LongVideoBench.tsv", "vlmevalkit"),
)
TEST = (Marker("lvb_test_wo_gt.json", "official"), Marker("test-00000-of-00001.parquet", "parquet", _COLUMNS))
FOLDERS = ("videos", "video", "datasets/longvideobench/videos", "longvideobench/videos", "")
SUBTITLES = ("subtitles", "subtitle", "datasets/longvideobench/subtitles", "longvideobench/subtitles", "")
GROUPS = ("duration_group", "question_category", "level", "topic_category")
CATEGORIES = (
    *("S2E", "S2O", "S2A", "E2O", "O2E", "T2E", "T2O", "T2A", "E3E", "O3O"),
    *("SSS", "SOS", "SAA", "T3E", "T3O", "TOS", "TAA"),
)


def load(found: Found) -> list[Question]:
    """Questions of the JSON, the parquet (options in columns, "N/A" at the end for none) or VLMEvalKit's table."""
    questions = []
    for number, row in enumerate(rows(found.marker)):
        fields = Fields(row, found.marker, number)
        listed = "candidates" in fields
        found_options = fields.texts("candidates") if listed else _columns(fields)
        options = fields.choices("candidates" if listed else "option0", found_options)
        video = fields.text("video_path").rpartition("/")[2]
        questions.append(
            Question(
                id=fields.text("id"),
                video=fields.text("video_id"),
                file=found.file(video, FOLDERS),
                question=fields.text("question"),
                options=options,
                answer=fields.place("correct_choice", len(options)),
                groups={name: fields.text(name) for name in GROUPS if name in fields},
                row=number,
                subtitle=found.file(fields.text("subtitle_path"), SUBTITLES, (".json",)),
                subtitle_start=fields.number("starting_timestamp_for_subtitles") or 0.0,
                duration=fields.number("duration"),
            )
        )
    return questions


def _columns(fields: Fields) -> list[str]:
    options = [fields.text(f"option{i}", "N/A") for i in range(5)]
    while options and options[-1] == "N/A":
        options.pop()
    return options


_ASK = f"{{Q}}\n{{O.}}\n{prompts.LETTER}"
PROTOCOLS = (
    Protocol(
        "official", "2024", prompts.form(f"Question: {_ASK}"),
        rule="lvb", frames=256, subtitles="lvb", interleaved=True, parser="lmms.lvb",
    ),
    Protocol("lmms-eval", prompts.LMMS, prompts.form(f"{_ASK}\n"), rule="linspace", frames=32, parser="lmms.lvb"),
    Protocol(
        "lmms-eval-i", prompts.LMMS, prompts.form(f"\n{_ASK}\n"),
        rule="lvb", frames=16, subtitles="lvb", interleaved=True, parser="lmms.lvb",
        note="the harness times subtitles by another formula than its frames; here by the frames' own times",
    ),
    Protocol(
        "vlmevalkit", prompts.VLMEVALKIT, prompts.form(_ASK),
        rule="vk.nframe", frames=64, subtitles="lvb", interleaved=True, parser="vk.regex",
    ),
    Protocol(
        "vamba", prompts.VAMBA, prompts.form(f"{prompts.SELECT_4}\n{{Q}}\n{{O.}}"),
        rule="vamba", frames=512, parser="vamba",
    ),
)  # fmt: skip


def submit(
    questions: Sequence[Question], letters: Mapping[str, str | None], replies: Mapping[str, str]
) -> dict[str, Any]:
    """The letters by id for the server, and the replies as they are."""
    return {
        "longvideobench_submission.json": {q.id: letters.get(q.id) or "A" for q in questions},
        "longvideobench_replies.json": {q.id: replies.get(q.id, "") for q in questions},
    }


_ORDER = {"duration_group": ("15", "60", "600", "3600"), "question_category": CATEGORIES}
BENCHMARKS = {
    "longvideobench": Benchmark(
        "longvideobench", "LongVideoBench, validation split", VAL, load, PROTOCOLS, questions=1337, videos=752,
        folders=FOLDERS, groups=GROUPS, order=_ORDER, lmms=("longvideobench_val_v", "lvb_acc", 1.0),
        lmms_interleaved="longvideobench_val_i",
    ),
    "longvideobench-test": Benchmark(
        "longvideobench-test", "LongVideoBench, test split", TEST, load, PROTOCOLS, questions=5341, videos=None,
        folders=FOLDERS, groups=GROUPS, order=_ORDER, submission=submit, lmms=("longvideobench_test_v", "submission", 1.0),
        lmms_interleaved="longvideobench_test_i",
    ),
}  # fmt: skip
