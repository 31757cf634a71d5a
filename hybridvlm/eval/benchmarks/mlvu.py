"""MLVU: seven tasks of four options (dev) and nine of six options (test) on videos of minutes to hours."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from hybridvlm.eval.benchmarks import prompts
from hybridvlm.eval.benchmarks.definition import Benchmark, Protocol, Question
from hybridvlm.eval.benchmarks.layout import Found, Marker
from hybridvlm.eval.benchmarks.tables import Fields, letter_of, rows, split_options

TASKS = {
    "plotQA": "1_plotQA", "needle": "2_needle", "ego": "3_ego", "count": "4_count", "order": "5_order",
    "anomaly_reco": "6_anomaly_reco", "topic_reasoning": "7_topic_reasoning",
}  # fmt: skip
TEST_TASKS = (
    "topic_reasoning",
    "order",
    "needleQA",
    "count",
    "ego",
    "plotQA",
    "tutorialQA",
    "anomaly_reco",
    "sportsQA",
)
_COLUMNS = ("video_name", "question", "candidates", "task_type")
DEV = (
    Marker("json/1_plotQA.json", "official"),
    Marker("data/1_plotQA.json", "official"),
    Marker("1_plotQA.json", "official"),
    Marker("MLVU_MCQ.tsv", "vlmevalkit"),
    Marker("mlvu/test-00000-of-00001.parquet", "parquet", _COLUMNS),
)
TEST = (
    Marker("test_question.json", "official"),
    Marker("mlvu_test/test-00000-of-00001.parquet", "parquet", _COLUMNS),
    Marker("*/test-00000-of-00001.parquet", "parquet", (*_COLUMNS, "question_id")),
)
FOLDERS = ("video", "MLVU/video", "videos", "../video", "mlvu", "mlvu/video", "")
TEST_FOLDERS = ("video", "videos", "MLVU_Test/video", "mlvu_test", "mlvu_test/video", "")


def load(found: Found) -> list[Question]:
    """Questions of the dev split; those of generation (sub_scene, summary) are left out."""
    if found.kind == "official":
        found.notes.append("8_sub_scene and 9_summary are not multiple choice and are left out")
        questions: list[Question] = []
        for task, folder in TASKS.items():
            path = found.marker.parent / f"{folder}.json"
            if not path.is_file():
                found.notes.append(f"{path.name} is missing")
                continue
            for number, row in enumerate(rows(path)):
                fields = Fields(row, path, number)
                questions.append(_written_out(found, fields, task, folder, number, len(questions)))
        return questions
    seen: Counter[str] = Counter()
    questions = []
    for number, row in enumerate(rows(found.marker)):
        fields = Fields(row, found.marker, number)
        task = fields.text("task_type")
        folder = TASKS.get(task, task)
        if found.kind == "vlmevalkit":
            questions.append(_written_out(found, fields, task, folder, seen[task], number))
        else:
            questions.append(_lettered(found, fields, task, folder, seen[task], number))
        seen[task] += 1
    return questions


def _written_out(found: Found, fields: Fields, task: str, folder: str, number: int, row: int) -> Question:
    """A question whose answer is an option's text; of equal options the official letter is that of the last."""
    name, question, options = fields.text("video"), fields.text("question"), fields.texts("candidates")
    answer, remark = letter_of(fields.text("answer"), options, last=True)
    blank = not question.strip() and not any(option.strip() for option in options)
    return Question(
        id=f"{task}-{number}",
        video=f"{folder}/{name}",
        file=found.file(f"{folder}/{name}", FOLDERS),
        question=question,
        options=tuple(options) if blank else fields.choices("candidates", options),
        answer=None if blank else answer,
        groups={"task": task},
        row=row,
        published=f"{question}\n{prompts.bracketed(options)}\n",
        scored=not blank,
        remark="its question and options are empty; it is left out" if blank else remark,
    )


def _lettered(found: Found, fields: Fields, task: str, folder: str, number: int, row: int) -> Question:
    """A question of the hub's copy: options in its text, a letter for the answer, all videos in one folder."""
    name, published, options = fields.text("video_name"), fields.text("question"), fields.texts("candidates")
    answer, remark = fields.lettered("answer", len(options)) if "answer" in fields else (None, "")
    return Question(
        id=f"{task}-{number}",
        video=f"{folder}/{name.removeprefix(folder + '_')}",
        file=found.file(name, FOLDERS) or found.file(f"{folder}/{name}", FOLDERS),
        question=split_options(published, "(A)")[0],
        options=fields.choices("candidates", options),
        answer=answer,
        groups={"task": task},
        row=row,
        published=published,
        remark=remark,
    )


def load_test(found: Found) -> list[Question]:
    """Questions of the test split, with answers where the copy has them."""
    questions = []
    for number, row in enumerate(rows(found.marker)):
        fields = Fields(row, found.marker, number)
        official = found.kind == "official"
        name, options = fields.text("video" if official else "video_name"), fields.texts("candidates")
        text = fields.text("question")
        answer, remark = fields.lettered("answer", len(options)) if "answer" in fields else (None, "")
        questions.append(
            Question(
                id=fields.text("question_id"),
                video=name,
                file=found.file(name, TEST_FOLDERS),
                question=text if official else split_options(text, "(A)")[0],
                options=fields.choices("candidates", options),
                answer=answer,
                remark=remark,
                groups={"task": fields.text("question_type" if official else "task_type")},
                row=number,
                published=f"{text}\n{prompts.bracketed(options)}\n" if official else text,
            )
        )
    return questions


_HEAD = "Question: {Q}\nOptions:\n{O)}"
_ASSISTANT: dict[str, Any] = {"system": prompts.MLVU_SYSTEM, "prefix": "Best Option: (", "parser": "mlvu.off"}
_VAMBA = Protocol(
    "vamba", prompts.VAMBA, prompts.form(f"{prompts.SELECT_4}\n{{Q}}\n{{O.}}"), rule="vamba", frames=512, parser="vamba"
)
_VLMEVALKIT = Protocol(
    "vlmevalkit", prompts.VLMEVALKIT, prompts.form(f"{_HEAD}\nOnly give the best option."),
    system=prompts.MLVU_SYSTEM, rule="vk.nframe", frames=64, parser="vk.infer",
)  # fmt: skip
PROTOCOLS = (
    Protocol("official", "2024", prompts.form(f"{_HEAD}Only give the best option."), rule="linspace", frames=32, **_ASSISTANT),
    Protocol(
        "lmms-eval", prompts.LMMS, prompts.form("{P}\nOnly give the best option.\nBest option: ("),
        rule="linspace", frames=32, parser="lmms.mcq",
    ),
    _VLMEVALKIT,
    _VAMBA,
)  # fmt: skip
TEST_PROTOCOLS = (
    Protocol(
        "official",
        "2025",
        prompts.form(f"{_HEAD}\nOnly give the best option."),
        rule="linspace",
        frames=32,
        **_ASSISTANT,
    ),
    Protocol("lmms-eval", prompts.LMMS, prompts.form("{P}"), rule="linspace", frames=32, parser="lmms.mcq"),
    _VLMEVALKIT,
    _VAMBA,
)


def submit(
    questions: Sequence[Question], letters: Mapping[str, str | None], replies: Mapping[str, str]
) -> dict[str, Any]:
    """The list that the board of the test split takes."""
    return {
        "mlvu_test_submission.json": [
            {"question_id": q.id, "question_type": q.groups["task"], "option": letters.get(q.id) or "A"}
            for q in questions
        ]
    }


BENCHMARKS = {
    "mlvu": Benchmark(
        "mlvu", "MLVU, dev split", DEV, load, PROTOCOLS, questions=2175, videos=None, groups=("task",), macro="task",
        metric="M-Avg", order={"task": tuple(TASKS)}, lmms=("mlvu_dev", "mlvu_percetion_score", 100.0), folders=FOLDERS,
    ),
    "mlvu-test": Benchmark(
        "mlvu-test", "MLVU, test split", TEST, load_test, TEST_PROTOCOLS, questions=502, videos=None, groups=("task",),
        macro="task", metric="M-Avg", order={"task": TEST_TASKS}, submission=submit,
        lmms=("mlvu_test", "mlvu_percetion_score", 100.0), folders=TEST_FOLDERS,
    ),
}  # fmt: skip
