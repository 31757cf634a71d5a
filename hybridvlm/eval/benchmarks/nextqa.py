"""NExT-QA, multiple choice: why, when and what in short videos of VidOR, five options."""

from __future__ import annotations

from hybridvlm.eval.benchmarks import prompts
from hybridvlm.eval.benchmarks.definition import Benchmark, Protocol, Question
from hybridvlm.eval.benchmarks.layout import Found, Marker
from hybridvlm.eval.benchmarks.tables import Fields, mapping, rows

_COLUMNS = ("video", "qid", "type", "a0", "a4")
TEST = (
    Marker("test.csv", "official", _COLUMNS),
    Marker("MC/test-00000-of-00001.parquet", "parquet", _COLUMNS),
)
VAL = (
    Marker("val.csv", "official", _COLUMNS),
    Marker("MC/validation-00000-of-00001.parquet", "parquet", _COLUMNS),
)
FOLDERS = ("NExTVideo", "nextqa/NExTVideo", "videos", "video", "")
TYPES = ("CW", "CH", "TN", "TC", "DC", "DL", "DO")


def load(found: Found) -> list[Question]:
    """Questions of a CSV file or the hub's copy, where videos are numbers; type TP counts as TN, as the authors have it."""
    path = found.marker.parent / "map_vid_vidorID.json"
    folders = {str(video): str(place) for video, place in mapping(path).items()} if path.is_file() else {}
    questions = []
    for number, row in enumerate(rows(found.marker)):
        fields = Fields(row, found.marker, number)
        video, kind = fields.text("video"), fields.text("type")
        questions.append(
            Question(
                id=f"{video}_{fields.text('qid')}",
                video=video,
                file=found.file(folders.get(video, video), FOLDERS) or found.file(video, FOLDERS),
                question=fields.text("question"),
                options=tuple(fields.text(f"a{i}") for i in range(5)),
                answer=fields.place("answer", 5),
                groups={"group": kind[:1], "type": "TN" if kind == "TP" else kind},
                row=number,
            )
        )
    return questions


PROTOCOLS = (
    Protocol("lmms-eval", prompts.LMMS, prompts.form("{Q}\n{O.}"), rule="linspace", frames=32, parser="lmms.nextqa"),
    Protocol(
        "vamba",
        prompts.VAMBA,
        prompts.form(f"{prompts.SELECT_5}\n{{Q}}\n{{O.}}"),
        rule="vamba",
        frames=512,
        parser="vamba",
    ),
)
_ORDER = {"group": ("C", "T", "D"), "type": TYPES}
BENCHMARKS = {
    "nextqa": Benchmark(
        "nextqa", "NExT-QA, multiple choice, test split", TEST, load, PROTOCOLS, questions=8564, videos=1000,
        folders=FOLDERS, groups=("group", "type"), order=_ORDER, lmms=("nextqa_mc_test", "exact_match", 1.0),
    ),
    "nextqa-val": Benchmark(
        "nextqa-val", "NExT-QA, multiple choice, validation split", VAL, load, PROTOCOLS, questions=4996, videos=570,
        folders=FOLDERS, groups=("group", "type"), order=_ORDER,
    ),
}  # fmt: skip
