"""Every published layout of every benchmark gives the questions that expected.json lists, and its numbers for always "A"."""

import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.benchmark_fixtures import TASKS, fixture
from helpers.benchmark_tasks import UNPACKED, scores, task

from hybridvlm.eval.benchmarks import MODULES, published
from hybridvlm.eval.benchmarks.layout import find, unpack_commands
from hybridvlm.eval.benchmarks.tables import split_options, without_letters
from hybridvlm.options import InputError

LAYOUTS = {
    "videomme": ("hf", "unzipped", "lmms-eval", "vlmevalkit"),
    "longvideobench": ("hf", "unpacked", "vlmevalkit"),
    "longvideobench-test": ("hf", "unpacked"),
    "lvbench": ("official", "shards", "hf", "flat"),
    "mlvu": ("official", "hf", "vlmevalkit"),
    "mlvu-test": ("official", "hf"),
    "egoschema": ("official", "hf"),
    "egoschema-subset": ("official", "hf"),
    "nextqa": ("official", "hf"),
    "nextqa-val": ("official", "hf"),
    "mvbench": ("main", "hf", "video", "vlmevalkit"),
    "hourvideo": ("official",),
    "tempcompass": ("official", "hf"),
    "perceptiontest": ("official", "hf"),
}


def loaded(name, base):
    benchmark = published(name)
    found = find(base, benchmark.markers, benchmark.title)
    return found, benchmark.load(found)


def same_file(path, wanted):
    there = path is not None and (path.is_dir() or path.stat().st_size > 0)
    return (path.resolve() if there else None) == (wanted.resolve() if wanted else None)


@pytest.mark.parametrize(("name", "layout"), [(name, layout) for name, own in LAYOUTS.items() for layout in own])
def test_every_layout_gives_the_same_questions(name, layout):
    folder, split = TASKS[name]
    root, expected = fixture(folder)
    assert set(expected["layouts"]) >= {layout}
    base = root / expected["layouts"][layout]
    wanted = [s for s in expected["samples"] if s["split"] == split and layout in s["files"]]
    if name == "egoschema-subset":
        wanted = [s for s in wanted if s["answer"]]
    _, questions = loaded(name, base)
    assert len(questions) == len(wanted)
    by_id = {q.id: q for q in questions}
    assert len(by_id) == len(questions)
    for place, sample in enumerate(wanted):
        no_ids = (name, layout) == ("videomme", "vlmevalkit")  # its table has none: video and place stand in
        q = questions[place] if no_ids else by_id[sample["id"]]
        file = sample["files"][layout]
        assert same_file(q.file, base / file if file else None), q.file
        assert (q.question, list(q.options)) == (sample["question"], sample["options"])
        hidden = (name, layout) == ("mlvu-test", "official")
        assert q.answer == (None if hidden else sample["answer"])
        for field, value in sample["groups"].items():
            if field in ("asked_with", "pictures") or (layout, field) == ("flat", "type"):
                continue
            mine = q.groups[field]
            assert (list(mine) if isinstance(mine, tuple) else mine) == (
                value if isinstance(value, list) else str(value)
            )
        subtitle = (sample["subtitle"] or {}).get(layout)
        assert same_file(q.subtitle, base / subtitle if subtitle else None)
        if (name, layout) != ("mvbench", "video"):
            assert q.video == sample["video"] or q.video.endswith("/" + sample["video"])
            assert q.start == sample["start"] and (q.end == sample["end"] or q.stop or name == "perceptiontest")
    assert sorted({q.row for q in questions})[0] == 0


def test_all_fixtures_are_covered():
    assert set(LAYOUTS) | {"videomme-subs"} == set(MODULES)


@pytest.mark.parametrize(
    "name", [n for n in TASKS if n not in ("videomme-subs", "longvideobench-test", "egoschema-subset")]
)
def test_always_a_scores_as_each_benchmark_defines_it(name):
    folder, _ = TASKS[name]
    wanted = fixture(folder)[1]["scores"]
    wanted = wanted.get("val", wanted) if name.endswith("-val") else wanted
    layout = {"mlvu-test": "hf", "mvbench": "video"}.get(name, UNPACKED[folder])
    built = task(name, layout, missing="wrong")
    found = scores(built, "A")
    if name == "hourvideo":  # two questions with pictures are left out: 2 of 6
        assert (found["micro"], found["n"]) == (pytest.approx(2 / 6), 6)
        return
    if name == "lvbench":  # a video is gone: as wrong, and left out
        assert found["micro"] == pytest.approx(wanted["missing"]["official"]["wrong"]) and found["n"] == 9
        skipped = scores(task(name, layout), "A")
        assert (skipped["micro"], skipped["n"]) == (pytest.approx(wanted["missing"]["official"]["skip"]), 6)
        whole = {f: {k: c["n"] for k, c in v.items()} for f, v in found["groups"].items()}["question_type"]
        assert sum(whole.values()) == 12 and found["n"] == 9  # several labels a question
        assert list(whole)[:2] == ["key information retrieval", "event understanding"]
        return
    if name == "mlvu":  # the answer that is no option is wrong; the blank question is out
        assert 100 * found["value"] == pytest.approx(wanted["expected_m_avg"]) and found["metric"] == "M-Avg"
        assert 100 * found["micro"] == pytest.approx(wanted["expected_micro"]) and found["n"] == 9
        return
    assert found["micro"] == pytest.approx(wanted["overall"])
    for field, values in wanted["groups"].items():
        mine = {value: cell["accuracy"] for value, cell in found["groups"][field].items()}
        assert mine == pytest.approx(values)
        assert found["macro"][field] == pytest.approx(wanted["macro"][field])


@pytest.mark.parametrize("layout", ["main", "vlmevalkit"])
def test_mvbench_without_the_task_that_is_not_distributed(layout):
    """The mean over the tasks that are there, and with the missing one as wrong."""
    wanted = fixture("mvbench")[1]["scores"]["missing"][layout]
    for rule in ("wrong", "skip"):
        found = scores(task("mvbench", layout, missing=rule), "A")
        assert found["value"] == pytest.approx(wanted[rule]) and found["n"] == (20 if rule == "wrong" else wanted["n"])
    built = task("mvbench", layout, missing="fail")
    assert [line for line in built.check() if "S001C001P001R001A008_rgb.avi (1)" in line and "--missing wrong" in line]
    assert any("fine_grained_pose" in line for line in built.notes())


def test_equal_options_are_equally_right_and_the_official_letter_is_the_last():
    built = task("mlvu")
    sample = next(s for s in built.samples if s.id == "plotQA-1")
    for reply, ours, theirs in (("B", True, False), ("C", True, True), ("green", True, False), ("A", False, False)):
        record = built.score(reply, sample)
        assert (record["correct"], record["parity"]["correct"]) == (ours, theirs)
    broken = next(s for s in built.samples if s.id == "needle-1")
    assert all(built.score(x, broken)["correct"] is False for x in "ABCD")
    assert any("needle-1" in line and "none of its options" in line for line in built.notes())
    assert any("topic_reasoning-1" in line and "left out" in line for line in built.notes())


def test_types_that_count_elsewhere():
    """NExT-QA: TP under TN and T; C over all its questions."""
    found = scores(task("nextqa"), "A")
    assert found["groups"]["type"]["TN"]["n"] == 2 and "TP" not in found["groups"]["type"]
    assert {k: c["n"] for k, c in found["groups"]["group"].items()} == {"C": 2, "T": 3, "D": 3}


def test_what_was_found_is_said():
    built = task("lvbench", "hf", missing="fail")
    assert any(
        "9 of 1,549 questions, 2 of 103 videos; missing: 1 videos of 3 questions" in line for line in built.notes()
    )
    (line,) = built.check()
    assert "GoneGone000 (3)" in line
    assert built.about()["questions"] == {"found": 9, "whole": 1549, "asked": 9}
    (reason, *_) = built.unavailable.values()
    assert "empty" in reason or "0 bytes" in reason or "no data" in reason, reason


@pytest.mark.parametrize(
    ("name", "layout"), [("videomme", "hf"), ("longvideobench", "hf"), ("mvbench", "hf"), ("tempcompass", "hf")]
)
def test_archives_are_named_with_the_command_that_unpacks_them(name, layout):
    with pytest.raises(InputError, match="no video is unpacked") as caught:
        task(name, layout)
    lines = str(caught.value).splitlines()[1:]
    assert lines and all(line.startswith("cd ") for line in lines)
    if name == "longvideobench":
        assert [line for line in lines if "cat videos.tar.part.* | tar x" in line]


def test_the_commands_unpack(tmp_path):
    import subprocess

    root, expected = fixture("longvideobench")
    shutil.copytree(root / expected["layouts"]["hf"], tmp_path / "LongVideoBench")
    found, _ = loaded("longvideobench", tmp_path)
    for line in unpack_commands(found.archives(), found.root, published("longvideobench").folders):
        subprocess.run(line, shell=True, check=True)
    _, questions = loaded("longvideobench", tmp_path)
    assert all(q.file is not None and q.subtitle is not None for q in questions)


def test_incomplete_annotations_stop_unless_told():
    (line,) = task("nextqa", incomplete=False).check()
    assert "8 of 8,564 questions" in line and "--incomplete ok" in line
    assert task("nextqa").check() == []


def test_a_missing_field_is_named(tmp_path):
    (tmp_path / "json").mkdir()
    row = {"video": "a.mp4", "question": "q", "candidates": ["x", "y"], "answer": "x", "a field of tomorrow": 1}
    (tmp_path / "json/action_sequence.json").write_text(json.dumps([row, {**row, "question": None}]))
    with pytest.raises(InputError, match=r"action_sequence\.json, row 2: field 'question' is missing"):
        loaded("mvbench", tmp_path)


def test_nothing_there_names_what_was_looked_for(tmp_path):
    with pytest.raises(InputError, match=r"LVBench: nothing of it below .*video_info\.meta\.jsonl"):
        loaded("lvbench", tmp_path)
    with pytest.raises(InputError, match="is no folder"):
        loaded("lvbench", tmp_path / "x")
    with pytest.raises(InputError, match="mount the bucket"):
        import pathlib

        loaded("lvbench", pathlib.Path("gs://bucket/x"))


def test_several_benchmarks_below_one_folder(tmp_path):
    for name, layout in (("egoschema", "hf"), ("nextqa", "hf"), ("lvbench", "hf"), ("videomme", "lmms-eval")):
        root, expected = fixture(name)
        shutil.copytree(root / expected["layouts"][layout], tmp_path, dirs_exist_ok=True, symlinks=True)
    for name, count in (("egoschema", 4), ("nextqa", 8), ("lvbench", 9), ("videomme", 12)):
        _, questions = loaded(name, tmp_path)
        assert len(questions) == count and any(q.file is not None for q in questions)


def test_letters_come_off_only_where_all_have_their_own():
    assert without_letters(["A. red", "B. green"]) == ["red", "green"]
    names = ["A. Smith", "Jones", "C. Brown", "Lee"]
    assert without_letters(names) == names
    assert without_letters(["A. one\ntwo", 'B) "x"\ty']) == ["one\ntwo", '"x"\ty']


def test_options_are_cut_at_the_last_run_of_lines():
    text = "See (B) here\n(A) of old\n(A) red\n(B) green\nand more\n(C) blue"
    assert split_options(text, "(A)") == ("See (B) here\n(A) of old", ["red", "green\nand more", "blue"])
    assert split_options("no options", "(A)") == ("no options", [])


def test_na_is_dropped_at_the_end_alone(tmp_path):
    row = {f"option{i}": text for i, text in enumerate(["x", "N/A", "y", "N/A", "N/A"])} | {
        "video_id": "v", "question": "q", "correct_choice": 2, "id": "v_0", "video_path": "v.mp4", "subtitle_path": "v_en.json",
        "duration_group": 15, "starting_timestamp_for_subtitles": 0, "duration": 9.0, "question_category": "T2A", "level": "L1",
    }  # fmt: skip
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "validation-00000-of-00001.parquet")
    _, (question,) = loaded("longvideobench", tmp_path)
    assert question.options == ("x", "N/A", "y") and question.answer == "C"


# -- annotation files that somebody has damaged

DAMAGED = {
    "longvideobench": "unpacked/LongVideoBench/lvb_val.json",
    "lvbench": "official/data/video_info.meta.jsonl",
    "mlvu": "official/MLVU/json/1_plotQA.json",
    "mlvu-test": "official/MLVU_Test/test_question.json",
    "egoschema": "official/EgoSchema/questions.json",
    "egoschema-subset": "official/EgoSchema/subset_answers.json",
    "nextqa": "official/dataset/nextqa/map_vid_vidorID.json",
    "mvbench": "main/MVBench/json/action_sequence.json",
    "hourvideo": "official/HourVideo/v1.0_release/json/dev_v1.0_annotations.json",
    "tempcompass": "official/questions/multi-choice.json",
    "perceptiontest": "official/mc_question_valid.json",
}


def spots(value, path=()):
    """Every place in a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from spots(inner, (*path, key))


def changed(value, path, new):
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = changed(value[path[0]], path[1:], new)
    return copy


@pytest.mark.parametrize("name", DAMAGED)
def test_whatever_a_file_holds_is_read_or_refused_in_one_line(name, tmp_path):
    root = fixture(TASKS[name][0])[0]
    source = root / DAMAGED[name]
    top = DAMAGED[name].split("/")[0]
    for path in (root / top).rglob("*"):
        if path.suffix in (".json", ".jsonl", ".csv"):
            (tmp_path / path.relative_to(root)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, tmp_path / path.relative_to(root))
    lines = source.suffix == ".jsonl"
    text = source.read_text()
    value = [json.loads(line) for line in text.splitlines()] if lines else json.loads(text)
    places = [place for place in spots(value) if len(place) < 5]
    refused = 0
    for number, place in enumerate(places[:: max(1, len(places) // 40)]):
        new = (None, 7, "text", [], {}, -3, 99, [None], "\x00", True)[number % 10]
        found = changed(value, place, new)
        out = "\n".join(json.dumps(row) for row in found) if lines and isinstance(found, list) else json.dumps(found)
        (tmp_path / DAMAGED[name]).write_text(out)
        try:
            loaded(name, tmp_path / top)
        except InputError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused
    (tmp_path / DAMAGED[name]).write_bytes(b"\xff\xfe{")
    with pytest.raises(InputError, match=r"\.(json|jsonl)"):
        loaded(name, tmp_path / top)


def test_a_snapshot_alone_finds_the_videos_beside_the_hub(tmp_path):
    """`--data` may be the snapshot; of two owners of one data set one is taken, and that is said."""
    root, expected = fixture("videomme")
    shutil.copytree(root / expected["layouts"]["lmms-eval"], tmp_path / "home", symlinks=True)
    (snapshot,) = (tmp_path / "home/hub").glob("*/snapshots/*")
    _, questions = loaded("videomme", snapshot)
    assert all(q.file is not None for q in questions)
    shutil.copytree(
        tmp_path / "home/hub/datasets--lmms-lab--Video-MME",
        tmp_path / "home/hub/datasets--lmms-eval--Video-MME",
        symlinks=True,
    )
    found, questions = loaded("videomme", tmp_path / "home")
    assert len(questions) == 12 and any("also there" in note and "lmms-lab" in note for note in found.notes)


# -- downloads that are not whole, and answers that are none


def copied(name, layout, to):
    root, expected = fixture(name)
    shutil.copytree(root / expected["layouts"][layout], to, symlinks=True)
    return to


def test_a_link_that_leads_nowhere_is_a_missing_video(tmp_path):
    base = copied("lvbench", "official", tmp_path / "data")
    _, before = loaded("lvbench", base)
    gone = next(q for q in before if q.file is not None and q.file.stat().st_size)
    gone.file.unlink()
    gone.file.symlink_to(tmp_path / "blobs/none")
    _, after = loaded("lvbench", base)
    assert [q.file for q in after if q.video == gone.video] == [None] * sum(q.video == gone.video for q in before)
    assert [q.file for q in after if q.video != gone.video] == [q.file for q in before if q.video != gone.video]


def test_options_that_do_not_parse_are_named(tmp_path):
    base = copied("lvbench", "official", tmp_path / "data")
    file = base / "data/video_info.meta.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines[1]["qa"][0]["question"] = "Which?\n(A) the only one"
    file.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    with pytest.raises(InputError, match=r"meta\.jsonl, row 2: field 'question' must hold 2 to 26 options, 0 found in"):
        loaded("lvbench", base)
    (tmp_path / "json").mkdir()
    row = {"video": "a.mp4", "question": "q", "candidates": ["x"], "answer": "x"}
    (tmp_path / "json/action_sequence.json").write_text(json.dumps([row]))
    with pytest.raises(InputError, match=r"row 1: field 'candidates' must hold 2 to 26 options, 1 found in \['x'\]"):
        loaded("mvbench", tmp_path)


@pytest.mark.parametrize(
    ("name", "layout", "field"),
    [
        ("lvbench", "hf", "answer"),
        ("videomme", "unzipped", "answer"),
        ("mlvu", "hf", "answer"),
        ("mlvu_test", "hf", "answer"),
    ],
)
def test_a_published_answer_that_is_no_option_is_wrong_and_named(tmp_path, name, layout, field):
    base = copied(name, layout, tmp_path / "data")
    task_name = name.replace("_", "-")
    found, questions = loaded(task_name, base)
    table = pq.read_table(found.marker).to_pylist()
    table[0][field] = "None of them"
    pq.write_table(pa.Table.from_pylist(table), found.marker)
    _, changed_questions = loaded(task_name, base)
    assert questions[0].answer and not questions[0].remark
    assert changed_questions[0].answer is None
    assert changed_questions[0].remark == "its answer 'None of them' is no option; it counts as wrong"


def test_separators_in_a_jsonl_file_are_no_line_ends(tmp_path):
    base = copied("lvbench", "official", tmp_path / "data")
    file = base / "data/video_info.meta.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines[0]["qa"][0]["question"] = "Which\u2028one?\n(A) red\n(B) green\u0085"
    file.write_text("\ufeff" + "".join(json.dumps(line, ensure_ascii=False) + "\r\n" for line in lines))
    assert loaded("lvbench", base)[1][0].question == "Which\u2028one?"


def test_a_bare_zip_goes_where_the_benchmark_looks_for_videos(tmp_path):
    import subprocess
    import zipfile

    base = copied("nextqa", "hf", tmp_path / "data")
    found, questions = loaded("nextqa", base)
    file = next(q.file for q in questions if q.file is not None)
    with zipfile.ZipFile(found.root / "videos.zip", "w") as archive:
        archive.write(file, file.name)
    for q in questions:
        if q.file is not None:
            q.file.unlink(missing_ok=True)
    (line,) = unpack_commands([found.root / "videos.zip"], found.root, published("nextqa").folders)
    subprocess.run(line, shell=True, check=True)
    assert {q.file for q in loaded("nextqa", base)[1]} == {None, found.root / "NExTVideo" / file.name}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", r"is a Git LFS pointer; run `git lfs pull`"),
        (b"", "is empty; is the download complete"),
        (b"PAR1 half of it", "is no parquet file; is the download complete"),
        (None, "is a link that leads nowhere"),
    ],
)
def test_a_marker_that_cannot_be_read_is_not_called_absent(tmp_path, content, words):
    base = copied("videomme", "unzipped", tmp_path / "data")
    (marker,) = base.rglob("test-*.parquet")
    marker.unlink()
    if content is None:
        marker.symlink_to(tmp_path / "none")
    else:
        marker.write_bytes(content)
    with pytest.raises(InputError, match=rf"Video-MME .*test-00000-of-00001\.parquet (is there but )?{words}"):
        loaded("videomme", base)
    json_marker = copied("longvideobench", "unpacked", tmp_path / "lvb")
    (marker,) = json_marker.rglob("lvb_val.json")
    if content and content.startswith(b"version"):
        marker.write_bytes(content)
        with pytest.raises(InputError, match=r"lvb_val\.json: is a Git LFS pointer"):
            loaded("longvideobench", json_marker)
