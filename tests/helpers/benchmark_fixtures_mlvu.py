"""MLVU, EgoSchema and NExT-QA as they are published, tiny."""

from __future__ import annotations

import collections
import csv
import pathlib

import pyarrow as pa
from helpers.benchmark_files import (
    LETTERS,
    SIDE,
    Collector,
    choice,
    colour,
    copied,
    dump,
    hub,
    parquet,
    tsv,
    write_video,
)

MLVU_TASKS = {
    "plotQA": ("1_plotQA", "plotQA"), "needle": ("2_needle", "findNeedle"), "ego": ("3_ego", "ego"),
    "count": ("4_count", "count"), "order": ("5_order", "order"), "anomaly_reco": ("6_anomaly_reco", "anomaly_reco"),
    "topic_reasoning": ("7_topic_reasoning", "topic_reasoning"),
}  # fmt: skip


def mlvu(root: pathlib.Path) -> None:
    """MLVU dev: seven JSON files and folders, an empty question, an answer that is no option, twins, one name in two folders."""
    out = Collector(root, {"official": "official/MLVU", "hf": "hf_home", "vlmevalkit": "vlmevalkit/MVLU"})
    base, table, lines = root / "official/MLVU", [], []
    for seed, (task, (folder, kind)) in enumerate(MLVU_TASKS.items()):
        name = "1.mp4" if task in ("plotQA", "topic_reasoning") else f"{task}_4.mp4"
        write_video(base / "video" / folder / name, 4 + seed, 10, seed)
        rows = []
        for place in range(2 if task in ("plotQA", "needle", "topic_reasoning") else 1):
            question, options, right = choice(seed, place, 4, seed)
            answer: str = options[right]
            gold: int | None = right
            if (task, place) == ("needle", 1):
                answer, gold = "a colour that is no option", None
            if (task, place) == ("plotQA", 1):
                options[(right + 1) % 4] = answer  # twins: the official code keeps the last of them
                gold = max(i for i, option in enumerate(options) if option == answer)
            if (task, place) == ("topic_reasoning", 1):
                question, options, answer, gold = "", ["", "", "", ""], "", None
            rows.append({
                "video": name, "duration": float(4 + seed) if seed % 2 else 4 + seed, "question": question,
                "candidates": options, "answer": answer, "question_type": kind,
            })  # fmt: skip
            lines.append({
                "task_type": task, "prefix": f"./MLVU/video/{folder}", "duration": rows[-1]["duration"], "video": name,
                "question": question, "answer": answer, "candidates": str(options), "index": len(lines),
            })  # fmt: skip
            copied(base / "video" / folder / name, root / "vlmevalkit/MVLU/MLVU/video" / folder / name)
            listed = question != ""
            if listed:
                text = question + "\n" + "".join(f"({LETTERS[i]}) {o}\n" for i, o in enumerate(options))
                table.append({
                    "video_name": f"{folder}_{name}", "duration": float(4 + seed), "question": text, "candidates": options,
                    "answer": "" if gold is None else LETTERS[gold], "task_type": task, "question_id": f"Q{len(table)}",
                })  # fmt: skip
                copied(base / "video" / folder / name, root / "hf_home/mlvu" / f"{folder}_{name}")
            files = {"official": f"video/{folder}/{name}", "vlmevalkit": f"MLVU/video/{folder}/{name}"}
            files |= {"hf": f"mlvu/{folder}_{name}"} if listed else {}
            out.add(f"{task}-{place}", "dev", f"{folder}/{name}", files, question, options, gold, task=task)
        dump(base / "json" / f"{folder}.json", rows)
    write_video(base / "video/8_sub_scene/subPlot_new_all_1.mp4", 3, 10, 9)
    write_video(base / "video/9_summary/1.mp4", 3, 10, 10)
    dump(base / "json/8_sub_scene.json", [{
        "video": "subPlot_new_all_1.mp4", "duration": 3.0, "question": "Describe the scene.", "answer": "A plain colour.",
        "question_type": "subPlot", "scoring_points": ["one colour", "no people"],
    }])  # fmt: skip
    dump(base / "json/9_summary.json", [{
        "video": "1.mp4", "duration": 3, "question": "Please summarize this video.", "answer": "Colours.",
        "question_type": "summary",
    }])  # fmt: skip
    tsv(root / "vlmevalkit/MVLU/MLVU_MCQ.tsv", lines)
    parquet(root / "made.parquet", table)
    hub(root / "hf_home", "sy1998/MLVU_dev", {"mlvu/test-00000-of-00001.parquet": root / "made.parquet"})
    (root / "made.parquet").unlink()
    out.problems += [
        "needle-1: its answer is none of its options; it counts as wrong whatever is replied, and has to be named",
        "topic_reasoning-1: an empty question with empty options; leave it out of the score and say so",
        "plotQA-1: two options are alike and right; the official letter is the last of them, a fair score takes either",
        "8_sub_scene and 9_summary are not multiple choice",
    ]
    scores = out.always_a("dev", "task")
    scores["note"] = (
        "needle-1 not counted here; official M-Avg is macro, with needle-1 counted as wrong: see expected_m_avg"
    )
    by = collections.defaultdict(list)
    for sample in out.samples:
        if sample["question"]:
            by[sample["groups"]["task"]].append(sample["answer"] == "A")
    scores["expected_m_avg"] = 100 * sum(sum(v) / len(v) for v in by.values()) / len(by)
    scores["expected_micro"] = 100 * sum(sum(v) for v in by.values()) / sum(len(v) for v in by.values())
    out.write(scores)


def mlvu_test(root: pathlib.Path) -> None:
    """MLVU test: one file without answers, six options, prefixes of ids; and the HF copy with answers up to F."""
    out = Collector(root, {"official": "official/MLVU_Test", "hf": "hf_home"})
    kinds = {
        "TR": "topic_reasoning", "AR": "anomaly_reco", "NQA": "needleQA", "ER": "ego", "PQA": "plotQA", "SQA": "sportsQA",
        "AO": "order", "AC": "count", "TQA": "tutorialQA",
    }  # fmt: skip
    rows, table = [], []
    for seed, (short, kind) in enumerate(kinds.items()):
        name = f"test_{kind}_1.mp4"
        write_video(root / "official/MLVU_Test/video" / name, 3, 10, seed)
        copied(root / "official/MLVU_Test/video" / name, root / "hf_home/mlvu_test" / name)
        question, options, _ = choice(seed, 1, 6, seed)
        right = options.index(colour(seed, 1))
        rows.append({
            "video": name, "duration": 3.0, "question": question, "candidates": options, "question_type": kind,
            "question_id": f"{short}_0",
        })  # fmt: skip
        table.append({
            "video_name": name, "duration": 3.0, "candidates": options, "answer": LETTERS[right], "task_type": kind,
            "question": question + "\n" + "".join(f"({LETTERS[i]}) {o}\n" for i, o in enumerate(options)),
            "question_id": f"{short}_0",
        })  # fmt: skip
        files = {"official": f"video/{name}", "hf": f"mlvu_test/{name}"}
        out.add(f"{short}_0", "test", name, files, question, options, right, task=kind)
    dump(root / "official/MLVU_Test/test_question.json", rows)
    parquet(root / "made.parquet", table)
    hub(root / "hf_home", "sy1998/MLVU_Test", {"mlvu_test/test-00000-of-00001.parquet": root / "made.parquet"})
    (root / "made.parquet").unlink()
    out.problems.append("layout official has no answers: replies can only be written for submission")
    out.write(out.always_a("test", "task"))


def egoschema(root: pathlib.Path) -> None:
    """EgoSchema: questions and the answers of a part of them; HF configs with letters in the options and answers as texts."""
    out = Collector(root, {"official": "official/EgoSchema", "hf": "hf_home"})
    base = root / "official/EgoSchema"
    uids = [f"00{i}934bb-81bd-4cd8-a574-0472ef3f667{i}" for i in range(4)]
    questions, answers, source, full, subset = [], {}, {}, [], []
    for seed, uid in enumerate(uids):
        ext = "MP4" if seed == 3 else "mp4"
        write_video(base / "videos" / f"{uid}.{ext}", 6, 10, seed)
        copied(base / "videos" / f"{uid}.{ext}", root / "hf_home/egoschema/videos" / f"{uid}.{ext}")
        question, options, right = choice(seed, 2, 5, seed)
        options = [f"C sees {o}, then stops." for o in options]
        questions.append(
            {"q_uid": uid, "google_drive_id": f"drive{seed}", "question": question}
            | {f"option {i}": o for i, o in enumerate(options)}
        )
        source[uid] = {"video_uid": f"ego-{seed}", "starting_sec": 180 * seed, "ending_sec": 180 * (seed + 1)}
        known = seed < 2
        if known:
            answers[uid] = right
        row = {
            "question_idx": f"{seed:05d}", "question": question, "video_idx": uid,
            "option": [f"{LETTERS[i]}. {o}" for i, o in enumerate(options)],
        }  # fmt: skip
        full.append(row | {"answer": None})
        if known:
            subset.append(row | {"answer": str(right)})
        files = {"official": f"videos/{uid}.{ext}", "hf": f"egoschema/videos/{uid}.{ext}"}
        out.add(uid, "full", uid, files, question, options, right if known else None)
    dump(base / "questions.json", questions)
    dump(base / "subset_answers.json", answers)
    dump(base / "uid_to_ego4d.json", source)
    text = [(n, pa.string()) for n in ("question_idx", "question", "video_idx")]
    schema = pa.schema([*text, ("option", pa.list_(pa.string())), ("answer", pa.string())])
    parquet(root / "full.parquet", full, schema)
    parquet(root / "subset.parquet", subset, schema)
    hub(root / "hf_home", "lmms-lab/egoschema", {
        "MC/test-00000-of-00001.parquet": root / "full.parquet", "Subset/test-00000-of-00001.parquet": root / "subset.parquet",
    })  # fmt: skip
    for name in ("full", "subset"):
        (root / f"{name}.parquet").unlink()
    out.problems.append("2 of 4 answers are not published: a score for the subset, a submission file for all")
    out.write(out.always_a("full"))


def nextqa(root: pathlib.Path) -> None:
    """NExT-QA: csv and VidOR folders; HF parquet with numbers as video names; texts with commas and quotes; twins; type TP.

    The validation split asks about the second video alone.
    """
    out = Collector(root, {"official": "official", "hf": "hf_home"})
    videos = [(4010069381, "0101"), (2435100235, "1025")]
    types = ["CW", "CH", "TN", "TC", "TP", "DC", "DL", "DO"]
    for seed, (video, folder) in enumerate(videos):
        file = root / "official/NExTVideo" / folder / f"{video}.mp4"
        write_video(file, 5, 10, seed)
        copied(file, root / "hf_home/nextqa/NExTVideo" / f"{video}.mp4")
    path, tables = root / "official/dataset/nextqa", {}
    path.mkdir(parents=True, exist_ok=True)
    for split, name, turn in (("test", "test", 0), ("val", "validation", 1)):
        rows = []
        for seed, (video, folder) in list(enumerate(videos))[turn:]:
            for place in range(4):
                kind = types[4 * (seed - turn) + place]
                question, options, right = choice(seed, place, 5, seed + turn)
                question = question.lower().rstrip("?")
                if place == 1:
                    question = 'what happens, "at first", in second 1'
                if place == 2:
                    options[(right + 1) % 5] = options[(right + 2) % 5]  # twins among the wrong ones
                rows.append(
                    {
                        "video": video, "frame_count": 50, "width": SIDE, "height": SIDE, "question": question, "answer": right,
                        "qid": place, "type": kind,
                    }
                    | {f"a{i}": o for i, o in enumerate(options)}
                )  # fmt: skip
                files = {"official": f"NExTVideo/{folder}/{video}.mp4", "hf": f"nextqa/NExTVideo/{video}.mp4"}
                out.add(
                    f"{video}_{place}", split, str(video), files, question, options, right,
                    type="TN" if kind == "TP" else kind, group=kind[0],
                )  # fmt: skip
        with open(path / f"{split}.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        tables[f"MC/{name}-00000-of-00001.parquet"] = root / f"{split}.parquet"
        parquet(root / f"{split}.parquet", rows)
    dump(path / "map_vid_vidorID.json", {str(video): f"{folder}/{video}" for video, folder in videos})
    hub(root / "hf_home", "lmms-lab/NExTQA", tables)
    for table in tables.values():
        table.unlink()
    out.problems.append("qid counts inside a video: video_qid is the id")
    out.write(out.always_a("test", "type", "group") | {"val": out.always_a("val", "type", "group")})
