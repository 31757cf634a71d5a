"""Video-MME, LongVideoBench and LVBench as they are published, tiny."""

from __future__ import annotations

import pathlib
import shutil

from helpers.benchmark_files import (
    LETTERS,
    SIDE,
    Collector,
    Row,
    choice,
    copied,
    dump,
    hub,
    parquet,
    split_tar,
    tsv,
    write_video,
    zipped,
)


def videomme(root: pathlib.Path) -> None:
    """Video-MME: HF snapshot with zips, unzipped beside, by lmms-eval, by VLMEvalKit; .MP4, .mkv, "-" ids, subtitles."""
    layouts = {
        "hf": "hf/Video-MME", "unzipped": "unzipped/Video-MME", "lmms-eval": "hf_home", "vlmevalkit": "vlmevalkit/Video-MME",
    }  # fmt: skip
    out = Collector(root, layouts)
    videos = [  # number, id, extension, duration, seconds, subtitle
        ("001", "-aB3_xyz012", "mp4", "short", 4, "font"),
        ("301", "Qw-9zz_kLMn", "MP4", "medium", 6, "plain"),
        ("601", "_under_scor", "mkv", "long", 20, "bom"),
        ("602", "NoSubs00000", "mp4", "short", 3, None),
    ]
    made = root / "made"
    rows, table = [], []
    for seed, (number, name, ext, duration, seconds, kind) in enumerate(videos):
        write_video(made / "data" / f"{name}.{ext}", seconds, 10, seed)
        if kind:
            text = _srt(kind)
            (made / "subtitle").mkdir(exist_ok=True)
            (made / "subtitle" / f"{name}.srt").write_bytes(text)
        for place in range(3):
            question, options, right = choice(seed, place, 4, seed)
            options = [f"{o.capitalize()}." for o in options]
            lettered = [f"{LETTERS[i]}. {o}" for i, o in enumerate(options)]
            domain, sub = ("Knowledge", "Astronomy") if seed % 2 else ("Multilingual", "Multilingual")
            kind_of = ("Counting Problem", "OCR Problems", "Temporal Reasoning")[place]
            rows.append({
                "video_id": number, "duration": duration, "domain": domain, "sub_category": sub,
                "url": f"https://www.youtube.com/watch?v={name}", "videoID": name, "question_id": f"{number}-{place + 1}",
                "task_type": kind_of, "question": question, "options": lettered, "answer": LETTERS[right],
            })  # fmt: skip
            table.append({
                "index": len(table), "video": name, "video_path": f"./video/{name}.mp4", "duration": duration,
                "domain": domain, "candidates": str(lettered), "sub_category": sub, "task_type": kind_of,
                "subtitle_path": f"./subtitle/{name}.srt", "question": question, "answer": LETTERS[right],
            })  # fmt: skip
            files = {
                "hf": None, "unzipped": f"data/{name}.{ext}", "lmms-eval": f"videomme/data/{name}.{ext}",
                "vlmevalkit": f"video/{name}.{ext}",
            }  # fmt: skip
            subtitle = {
                "unzipped": f"subtitle/{name}.srt", "lmms-eval": f"videomme/subtitle/{name}.srt", "vlmevalkit": f"subtitle/{name}.srt",
            } if kind else None  # fmt: skip
            out.add(
                f"{number}-{place + 1}", "test", name, files, question, options, right, subtitle=subtitle,
                duration=duration, domain=domain, sub_category=sub, task_type=kind_of,
            )  # fmt: skip
    parquet(made / "test.parquet", rows)
    data = {f"data/{file.name}": file for file in sorted((made / "data").iterdir())}
    subs = {f"subtitle/{file.name}": file for file in sorted((made / "subtitle").iterdir())}
    snapshot = root / out.layouts["hf"]
    copied(made / "test.parquet", snapshot / "videomme/test-00000-of-00001.parquet")
    names = sorted(data)
    zipped(snapshot / "videos_chunked_01.zip", {n: data[n] for n in names[:2]})
    zipped(snapshot / "videos_chunked_02.zip", {n: data[n] for n in names[2:]})
    zipped(snapshot / "subtitle.zip", subs)
    copied(made / "test.parquet", root / layouts["unzipped"] / "videomme/test-00000-of-00001.parquet")
    for name, file in {**data, **subs}.items():
        copied(file, root / layouts["unzipped"] / name)
        copied(file, root / "hf_home/videomme" / name)
        copied(file, root / out.layouts["vlmevalkit"] / name.replace("data/", "video/"))
    hub(root / "hf_home", "lmms-lab/Video-MME", {"videomme/test-00000-of-00001.parquet": made / "test.parquet"})
    tsv(root / out.layouts["vlmevalkit"] / "Video-MME.tsv", table)
    shutil.rmtree(made)
    out.problems += [
        "layout hf: the videos lie in zips that nobody has unpacked (videos_chunked_01.zip, videos_chunked_02.zip, subtitle.zip)",
        "layout vlmevalkit: video_path says .mp4 where the file is .MP4 or .mkv",
        "12 of 2700 questions, 4 of 900 videos: not the whole benchmark",
    ]
    out.write(out.always_a("test", "duration", "domain", "sub_category", "task_type"))


def _srt(kind: str) -> bytes:
    """Subtitles: overlapping, over two lines, without tags, of no length, of spaces; with a byte order mark and CRLF."""
    tag = '<font color="white" size=".72c">{}</font>'
    lines = [
        ("00:00:00,000", "00:00:02,000", tag.format("first line")),
        ("00:00:01,500", "00:00:03,000", tag.format("second\npart two")),
        ("00:00:04,000", "00:00:05,000", "plain line" if kind != "font" else tag.format("third line")),
        ("00:00:05,000", "00:00:05,000", tag.format("no length")),
        ("00:00:05,500", "00:00:06,000", tag.format("  ")),
    ]
    text = "".join(f"{i}\n{a} --> {b}\n{t}\n\n" for i, (a, b, t) in enumerate(lines, 1))
    return b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode() if kind == "bom" else text.encode()


def longvideobench(root: pathlib.Path) -> None:
    """LongVideoBench: tar parts and parquet as published, and unpacked; both kinds of subtitles, cut clips, 2 to 5 options."""
    layouts = {
        "hf": "hf/LongVideoBench", "unpacked": "unpacked/LongVideoBench", "vlmevalkit": "vlmevalkit/LongVideoBench",
    }  # fmt: skip
    out = Collector(root, layouts)
    clips = [  # id, seconds, group, start of the subtitles, kind of subtitles, fps
        ("86Cxyz_FV9M", 9.0, 15, 1267, "timestamp", 10),
        ("-leadingDas", 18.5, 60, 0, "start", 10),
        ("_EUDabc9oXX", 20.0, 600, 0, "null", 5),
        ("testOnly-01", 8.0, 15, 0, "start", 10),
    ]
    made, entries = root / "made", {"val": [], "test": []}
    for seed, (name, seconds, group, start, kind, fps) in enumerate(clips):
        write_video(made / "videos" / f"{name}.mp4", seconds, fps, seed)
        subs: list[Row]
        if kind == "start":
            subs = [
                {"start": "00:00:00.100", "end": "00:00:00.300", "line": "before the first"},
                {"start": "00:00:01.900", "end": "00:00:02.100", "line": "short, widened to a second"},
                {"start": "00:00:03.000", "end": "00:00:05.500", "line": "long line"},
                {"start": "00:01:20.000", "end": "00:01:21.000", "line": "after the end"},
            ]
        else:
            subs = [
                {"timestamp": [start + 0.2, start + 1.0], "text": "s1"},
                {"timestamp": [start + 3.0, start + 4.9], "text": "s2"},
                {"timestamp": [start + 5.0, None if kind == "null" else start + 6.5], "text": "s3"},
                {"timestamp": [start + 6.0, int(start + 8)], "text": "s4, its end a whole number"},
            ]
        dump(made / "subtitles" / f"{name}_en.json", subs)
        split = "test" if name.startswith("test") else "val"
        for place in range(2):
            count = (5, 4, 3, 2)[(seed + place) % 4]
            question, options, right = choice(seed, place + 1, count, seed)
            category, level = (("T2A", "L1-Perception"), ("SSS", "L2-Relation"))[place]
            row = {
                "video_id": name, "question": question, "question_wo_referring_query": question, "candidates": options,
                "correct_choice": right, "position": [10 * place, 20], "topic_category": "NP-News-Programs",
                "question_category": category, "level": level, "id": f"{name}_{place}", "video_path": f"{name}.mp4",
                "subtitle_path": f"{name}_en.json", "duration_group": group, "starting_timestamp_for_subtitles": start,
                "duration": seconds, "view_count": 17,
            }  # fmt: skip
            if split == "test":
                del row["correct_choice"]
            entries[split].append(row)
            held = ["unpacked"] + (["vlmevalkit"] if split == "val" else [])
            out.add(
                row["id"], split, name, {"hf": None} | dict.fromkeys(held, f"videos/{name}.mp4"), question, options,
                right if split == "val" else None, subtitle=dict.fromkeys(held, f"subtitles/{name}_en.json"),
                duration_group=group, question_category=category, level=level,
            )  # fmt: skip
    for folder in (layouts["hf"], layouts["unpacked"]):
        dump(root / folder / "lvb_val.json", entries["val"])
        dump(root / folder / "lvb_test_wo_gt.json", entries["test"])
        for split, name in (("val", "validation"), ("test", "test")):
            flat = [
                {k: v for k, v in row.items() if k not in ("candidates", "position")}
                | {"correct_choice": row.get("correct_choice", -1)}
                | {f"option{i}": (row["candidates"] + ["N/A"] * 5)[i] for i in range(5)}
                for row in entries[split]
            ]
            parquet(root / folder / f"{name}-00000-of-00001.parquet", flat)
    split_tar(root / "hf/LongVideoBench", "videos", {"videos": made / "videos"}, 20_000)
    split_tar(root / "hf/LongVideoBench", "subtitles", {"subtitles": made / "subtitles"}, 0)
    for part in ("videos", "subtitles"):
        for layout in ("unpacked", "vlmevalkit"):
            shutil.copytree(made / part, root / layouts[layout] / part, dirs_exist_ok=True)
    shutil.rmtree(made)
    tsv(root / layouts["vlmevalkit"] / "LongVideoBench.tsv", [
        row | {"video_path": f"./videos/{row['video_path']}", "index": i, "video": row["video_id"]}
        for i, row in enumerate(entries["val"])
    ])  # fmt: skip
    out.problems.append("layout hf: videos.tar.part.aa ... must be joined and unpacked, subtitles.tar unpacked")
    out.write(out.always_a("val", "duration_group", "question_category"))


def lvbench(root: pathlib.Path) -> None:
    """LVBench: the meta file, videos by id, by shard (video2dataset) and gone; HF parquet; Vamba's flat JSONL; many labels."""
    layouts = {"official": "official", "shards": "shards", "hf": "hf_home", "flat": "flat"}
    out = Collector(root, layouts)
    kinds = [
        "key information retrieval", "event understanding", "summarization", "entity recognition", "reasoning",
        "temporal grounding",
    ]  # fmt: skip
    videos = [("-Cm73ma6Ibc", "cartoon", 12, True), ("t-RtDI2RWQs", "sport", 8, True), ("GoneGone000", "tv", 0, False)]
    meta, flat, table, uid = [], [], [], 0
    for seed, (key, kind, seconds, there) in enumerate(videos):
        if there:
            write_video(root / "official/videos" / f"{key}.mp4", seconds, 10, seed)
            copied(root / "official/videos" / f"{key}.mp4", root / "hf_home/lvbench/all_videos" / f"{key}.mp4")
            copied(root / "official/videos" / f"{key}.mp4", root / "flat" / f"{key}.mp4")
            copied(root / "official/videos" / f"{key}.mp4", root / "shards/videos/00000" / f"{seed:09d}.mp4")
        else:  # what a broken download leaves
            (root / "hf_home/lvbench/all_videos" / f"{key}.mp4").write_bytes(b"")
        dump(root / "shards/videos/00000" / f"{seed:09d}.json", {
            "url": f"https://www.youtube.com/watch?v={key}", "key": f"{seed:09d}",
            "status": "success" if there else "failed_to_download",
        })  # fmt: skip
        info = {"duration_minutes": seconds / 60, "fps": 10.0, "resolution": {"width": SIDE, "height": SIDE}}
        qa = []
        for place in range(3):
            question, options, right = choice(seed, place, 4, seed)
            if place == 1:
                question = (
                    "At 00:01 (B) or later, what colour is shown in second 1?"  # the stem has a bracket of its own
                )
            types = [kinds[(seed + place) % 6]] + ([kinds[5]] if place == 2 else [])
            text = question + "".join(f"\n({LETTERS[i]}) {o}" for i, o in enumerate(options))
            reference = f"00:0{place}-00:0{place + 2}"
            row = {
                "uid": str(uid), "question": text, "answer": LETTERS[right], "question_type": types,
                "time_reference": reference,
            }  # fmt: skip
            qa.append(row)
            table.append({**row, "key": key, "type": kind, "video_path": f"all_videos/{key}.mp4", "video_info": info})
            flat.append({
                "file_path": f"{key}.mp4", "question": text, "answer": LETTERS[right], "question_type": types,
            })  # fmt: skip
            files = {
                "official": f"videos/{key}.mp4", "shards": f"videos/00000/{seed:09d}.mp4",
                "hf": f"lvbench/all_videos/{key}.mp4", "flat": f"{key}.mp4",
            }  # fmt: skip
            if not there:
                files = dict.fromkeys(files)
            out.add(str(uid), "test", key, files, question, options, right, question_type=types, type=kind)
            uid += 1
        meta.append({"key": key, "type": kind, "video_info": info, "qa": qa})
    for layout in ("official", "shards"):
        dump(root / layouts[layout] / "data/video_info.meta.jsonl", meta, lines=True)
    parquet(root / "made.parquet", table)
    hub(root / "hf_home", "lmms-lab/LVBench", {"data/train-00000-of-00001.parquet": root / "made.parquet"})
    (root / "made.parquet").unlink()
    dump(root / "flat/lvbench_processed.jsonl", flat, lines=True)
    out.problems += [
        "video GoneGone000 is missing (layout hf: there is a file of no bytes): 3 questions cannot be asked",
        "layout flat has no uid: the number of the line stands in",
    ]
    out.write(out.always_a("test", "question_type"))
