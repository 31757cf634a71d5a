"""MVBench: twenty tasks of 200 questions on short videos, two to five options, five tasks about a part of the video."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter

from hybridvlm.eval.benchmarks import prompts
from hybridvlm.eval.benchmarks.definition import Benchmark, Protocol, Question
from hybridvlm.eval.benchmarks.layout import Found, Marker
from hybridvlm.eval.benchmarks.tables import Fields, letter_of, rows

STAR = ("star/Charades_v1_480", "star/Charades_segment")
CLEVRER = ("clevrer/video_validation",) * 2
PERCEPTION = ("perception/videos",) * 2
# task -> its folder among the whole videos (branch main) and among the cut ones (branch video)
TASKS = {
    "action_sequence": STAR,
    "action_prediction": STAR,
    "action_antonym": ("ssv2_video", "ssv2_video_mp4"),
    "fine_grained_action": ("Moments_in_Time_Raw/videos",) * 2,
    "unexpected_action": ("FunQA_test/test",) * 2,
    "object_existence": CLEVRER,
    "object_interaction": STAR,
    "object_shuffle": PERCEPTION,
    "moving_direction": CLEVRER,
    "action_localization": ("sta/sta_video", "sta/sta_video_segment"),
    "scene_transition": ("scene_qa/video",) * 2,
    "action_count": PERCEPTION,
    "moving_count": CLEVRER,
    "moving_attribute": CLEVRER,
    "state_change": PERCEPTION,
    "fine_grained_pose": ("nturgbd", "nturgbd_convert"),
    "character_order": PERCEPTION,
    "egocentric_navigation": ("vlnqa",) * 2,
    "episodic_reasoning": ("tvqa/frames_fps3_hq", "tvqa/video_fps3_hq_segment"),
    "counterfactual_inference": CLEVRER,
}
MARKERS = (
    Marker("json/action_sequence.json", "official"),
    Marker("test.json", "titles", beside="json"),
    Marker("MVBench.tsv", "vlmevalkit"),
    Marker("MVBench_MP4.tsv", "vlmevalkit"),
)
ROOTS = ("video", "", "mvbench_video", "video/data0613", "data0613")
FOLDER_FPS = 3.0
_CUT = re.compile(r"_[\d.]+_[\d.]+(?=\.\w+$)")  # the bounds in the name of a cut video


def load(found: Found) -> list[Question]:
    """Questions of the twenty files, or of VLMEvalKit's table; bounds hold for the whole videos alone."""
    questions = []
    if found.kind == "vlmevalkit":
        seen: Counter[str] = Counter()
        for number, row in enumerate(rows(found.marker)):
            fields = Fields(row, found.marker, number)
            task = re.sub("[ -]", "_", fields.text("task_type").lower())
            folder = fields.text("prefix").removeprefix("./").removeprefix("video/").strip("/")
            questions.append(dataclasses.replace(_question(found, fields, task, folder, seen[task]), row=number))
            seen[task] += 1
    else:
        bounded = any("start" in row for row in rows(found.root / "json" / "action_sequence.json"))
        for task, (whole, cut) in TASKS.items():
            path = found.root / "json" / f"{task}.json"
            if not path.is_file():
                found.notes.append(f"{path.name} is missing")
                continue
            for number, row in enumerate(rows(path)):
                questions.append(_question(found, Fields(row, path, number), task, whole if bounded else cut, number))
    if any(q.file is None and q.groups["task"] == "fine_grained_pose" for q in questions):
        found.notes.append(
            "videos of fine_grained_pose (NTU RGB+D) are no part of the download; ask for them at their authors'"
        )
    return questions


def _question(found: Found, fields: Fields, task: str, folder: str, number: int) -> Question:
    name, options = fields.text("video"), fields.texts("candidates")
    answer, remark = letter_of(fields.text("answer"), options)
    file = found.file(f"{folder}/{name}", ROOTS)
    return Question(
        id=f"{task}-{number}",
        video=f"{folder}/{_CUT.sub('', name) if 'segment' in folder else name}",
        file=file,
        question=fields.text("question"),
        options=fields.choices("candidates", options),
        answer=answer,
        groups={"task": task},
        row=number,
        start=fields.number("start"),
        end=fields.number("end"),
        folder_fps=FOLDER_FPS if file is not None and file.is_dir() else None,
        remark=remark,
    )


_HEAD = "Question: {Q}\nOptions:\n{O)}\nOnly give the best option."
_PREFIX = "Best option:("
PROTOCOLS = (
    Protocol(
        "official", "2024", prompts.form(_HEAD), system=prompts.MVBENCH_SYSTEM, prefix=_PREFIX,
        rule="mvbench", frames=16, parser="mvb.off",
    ),
    Protocol(
        "vlmevalkit", prompts.VLMEVALKIT, prompts.form(_HEAD), system=prompts.MVBENCH_SYSTEM, prefix=_PREFIX,
        rule="mvbench", frames=8, parser="mvb.off",
    ),
    Protocol(
        "lmms-eval", prompts.LMMS, prompts.form("Question:{Q}\nOption:\n{O)}\nOnly give the best option.\n"),
        rule="linspace", frames=32, parser="lmms.mvb",
    ),
    Protocol(
        "vamba", prompts.VAMBA, prompts.form(f"Question: {{Q}}\n{{O.}}\n{prompts.LETTER}"),
        rule="vamba", frames=512, parser="vamba",
    ),
)  # fmt: skip
BENCHMARKS = {
    "mvbench": Benchmark(
        "mvbench", "MVBench", MARKERS, load, PROTOCOLS, questions=4000, videos=None, groups=("task",), macro="task",
        folders=ROOTS, metric="mean over tasks", order={"task": tuple(TASKS)}, lmms=("mvbench", "mvbench_accuracy", 100.0),
    ),
}  # fmt: skip
