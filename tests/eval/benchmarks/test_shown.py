"""What of a video reaches a model: the frames themselves, told by the numbers that they carry."""

import json
import shutil

import numpy as np
import pytest
from helpers.benchmark_files import read_number, write_video
from helpers.benchmark_fixtures import fixture
from helpers.benchmark_tasks import answered, scores, task

from hybridvlm.eval.benchmarks.frames import Part
from hybridvlm.eval.tasks.identity import EDGE, identity
from hybridvlm.eval.tasks.shots import Shot, pieces, shuffled
from hybridvlm.models.media import Clip
from hybridvlm.video import decode_frames


def shown(built, sample):
    """Numbers of the frames of a sample as the file has them."""
    clip, _ = built.clip(sample.video, pixels=False)
    path = built.path(sample.video)
    if path.is_dir():
        return list(clip.numbers)
    return [read_number(frame) for frame in decode_frames(path, clip.numbers)]


def by_id(built, name):
    return next(s for s in built.samples if s.id == name)


def test_mvbench_shows_the_part_that_is_asked_about():
    built = task("mvbench")
    wanted = {
        "action_sequence-0": [22, 27, 32, 37],
        "action_prediction-0": [2, 7, 12, 17],
        "object_interaction-0": [42, 47, 52, 56],
        "episodic_reasoning-0": [6, 8, 9, 10],
    }
    for name, numbers in wanted.items():
        assert shown(built, by_id(built, name)) == numbers, name
    three = [by_id(built, name) for name in list(wanted)[:3]]
    assert len({s.video for s in three}) == 3 and len({s.cluster for s in three}) == 1
    assert len({built.identity(s.video) for s in three}) == 3
    clip, config = built.clip(by_id(built, "episodic_reasoning-0").video)
    assert clip.frames.shape[1:3] == config.vision.image_size and clip.seconds[0] == pytest.approx(5 / 3)


def test_cut_videos_are_shown_whole():
    built = task("mvbench", "video")
    numbers = shown(built, by_id(built, "action_sequence-0"))
    assert numbers == [2, 7, 12, 16] and numbers[-1] < 20
    assert len({s.cluster for s in built.samples if s.groups["task"] in ("action_sequence", "action_prediction")}) == 1


def test_nothing_of_the_future_is_shown():
    built = task("perceptiontest", frames=8)
    for sample in built.samples:
        top = 30 if sample.cluster == "video_1580" else 60
        numbers = shown(built, sample)
        assert max(numbers) < top and max(numbers) > top - 10
    built = task("hourvideo", frames=8)
    for sample in built.samples:
        clip, _ = built.clip(sample.video, pixels=False)
        assert (max(clip.seconds) < 6.0) == (sample.groups["task"] == "reasoning/predictive")


def test_a_cut_clip_is_not_sought_by_the_time_of_its_subtitles():
    built = task("longvideobench", frames=4)
    assert shown(built, by_id(built, "86Cxyz_FV9M_0")) == [0, 22, 44, 66]
    few = task("longvideobench", frames=None, most=64)
    assert len(shown(few, by_id(few, "86Cxyz_FV9M_0"))) == 9  # a frame a second at most


def test_names_as_people_have_them():
    built = task("videomme")
    assert {built.path(s.video).name for s in built.samples} == {
        "-aB3_xyz012.mp4", "Qw-9zz_kLMn.MP4", "_under_scor.mkv", "NoSubs00000.mp4",
    }  # fmt: skip
    mlvu = task("mlvu")
    names = [mlvu.path(s.video) for s in mlvu.samples if s.cluster.endswith("/1.mp4")]
    assert len({p.name for p in names}) == 1 and len(set(names)) == 2
    assert len({mlvu.identity(s.video) for s in mlvu.samples if s.cluster.endswith("/1.mp4")}) == 2


def test_fewer_frames_than_asked_are_all_of_them(tmp_path):
    write_video(tmp_path / "one.mp4", 0.1)
    write_video(tmp_path / "five.mp4", 0.5)
    from hybridvlm.video import probe

    for rule in ("slicer", "linspace", "vk.nframe", "vk.fps:1", "qwen:2", "lvb", "vamba", "hourvideo"):
        assert Shot(tmp_path / "one.mp4", Part()).numbers(rule, probe(tmp_path / "one.mp4"), 8).tolist() == [0]
    assert Shot(tmp_path / "five.mp4", Part()).numbers("vamba", probe(tmp_path / "five.mp4"), 8).tolist() == [
        0,
        1,
        2,
        3,
        4,
    ]


def test_identity_is_that_of_the_content(tmp_path):
    data = np.random.default_rng(0).integers(0, 255, 4 * EDGE, dtype=np.uint8).tobytes()
    for name in ("a", "deep/b"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    assert identity(tmp_path / "a") == identity(tmp_path / "deep/b")
    changed = bytearray(data)
    changed[2 * EDGE] ^= 1
    (tmp_path / "middle").write_bytes(changed)
    assert identity(tmp_path / "middle") == identity(tmp_path / "a")  # seen by all bytes alone
    assert identity(tmp_path / "middle", full=True) != identity(tmp_path / "a", full=True)
    changed[-1] ^= 1
    (tmp_path / "end").write_bytes(changed)
    assert identity(tmp_path / "end") != identity(tmp_path / "a")


def test_a_copy_is_the_same_and_another_video_of_the_name_is_not(tmp_path):
    root, _ = fixture("tempcompass")
    shutil.copytree(root / "official", tmp_path / "elsewhere")
    there, here = task("tempcompass"), task("tempcompass", data=tmp_path / "elsewhere")
    assert [there.identity(v) for v in there.videos] == [here.identity(v) for v in here.videos]
    write_video(tmp_path / "elsewhere/videos/1034419625.mp4", 3, 10, 5)
    again = task("tempcompass", data=tmp_path / "elsewhere")
    same = [there.identity(v) == again.identity(v) for v in there.videos]
    assert sorted(same) == [False, True]


def test_limits_take_whole_videos_evenly():
    built = task("videomme", limit_videos=2)
    assert list(dict.fromkeys(s.cluster for s in built.samples)) == ["-aB3_xyz012", "NoSubs00000"]
    assert [s.id for s in task("videomme", limit=5).samples] == ["001-1", "001-2", "001-3", "602-1", "602-2"]
    assert len(task("videomme", limit=0).samples) == 12 and len(task("videomme", limit=7).samples) == 7


def test_sanity_rows(tmp_path):
    blind = task("videomme-subs", sanity="no-video")
    assert blind.name == "videomme-subs-no-video" and blind.blind and blind.dense_only
    asked = blind.asked(blind.samples[0], None, task_style())
    assert asked.clips == [] and [part["type"] for part in asked.messages[-1]["content"]] == ["text"]
    assert "subtitles" not in blind.prompt(blind.samples[0])
    mixed, straight = task("videomme", sanity="shuffle-frames"), task("videomme")
    video = straight.samples[0].video
    (a, _), (b, _) = straight.clip(video), mixed.clip(video)
    assert a.seconds == b.seconds and not np.array_equal(a.frames, b.frames)
    assert np.array_equal(b.frames, a.frames[shuffled(video, len(a.seconds))])
    assert straight.identity(video) != mixed.identity(video)


def task_style():
    from hybridvlm.models.prompt import PromptStyle

    return PromptStyle()


def test_an_order_of_frames_is_one_and_never_the_old():
    for count in (2, 3, 8, 64):
        order = shuffled("x", count)
        assert sorted(order) == list(range(count)) and list(order) != list(range(count))
        assert np.array_equal(order, shuffled("x", count))
    assert shuffled("x", 1).tolist() == [0]


def test_pieces_hold_whole_patches():
    clip = Clip(tuple(map(float, range(6))), numbers=tuple(range(6)), fps=1.0)
    items = [0, "a", 1, 2, 3, "b", "c", 4, 5, "d"]
    parts = pieces(clip, items, 2)
    assert [p if isinstance(p, str) else p.numbers for p in parts] == [
        (0, 1),
        "\na\n",
        (2, 3),
        "\nb\nc\n",
        (4, 5),
        "\nd\n",
    ]
    assert [p if isinstance(p, str) else p.numbers for p in pieces(clip, items, 1)][:3] == [(0,), "\na\n", (1, 2, 3)]


# -- submissions and what stays out of them


def test_submission_files_have_every_question():
    ego = task("egoschema", missing="wrong")
    records = answered(ego, lambda s: "C" if s.id.startswith("001") else "no idea")
    files = ego.files(records)
    sent = json.loads(files["egoschema_submission.json"])
    assert list(sent) == sorted(sent) and len(sent) == 4 and set(map(type, sent.values())) == {int}
    assert sorted(sent.values()) == [0, 0, 0, 2]
    assert len(files["egoschema_submission.json.failed.txt"].splitlines()) == 3
    assert scores(ego, "C")["n"] == 2  # two of four answers are published

    test = task("longvideobench-test")
    files = test.files(answered(test, "The answer is B"))
    assert json.loads(files["longvideobench_submission.json"]) == {"testOnly-01_0": "B", "testOnly-01_1": "B"}
    assert json.loads(files["longvideobench_replies.json"])["testOnly-01_0"] == "The answer is B"

    mlvu = task("mlvu-test", "official")
    (first, *_) = json.loads(mlvu.files(answered(mlvu, "F"))["mlvu_test_submission.json"])
    assert first == {"question_id": "AC_0", "question_type": "count", "option": "F"}
    assert not scores(mlvu, "F")["n"]

    perception = task("perceptiontest")
    (first, *_) = json.loads(perception.files(answered(perception, "(C)"))["perceptiontest_submission.json"])
    assert first["pred_id"] == 2 and set(first) == {"video_name", "question", "question_id", "pred_id"}

    (video, *_) = json.loads(task("videomme").files(answered(task("videomme"), "A"))["videomme_official.json"])
    assert video["video_id"] == "001" and len(video["questions"]) == 3
    assert video["questions"][0]["options"][0] == "A. Red." and video["questions"][0]["response"] == "A"

    lvbench = task("lvbench", missing="wrong")
    files = lvbench.files(answered(lvbench, "A"))
    board = json.loads(files["lvbench_board.json"])
    assert board["Overall"] == pytest.approx(100 / 9) and set(board) <= {
        "KIR",
        "EU",
        "Sum",
        "ER",
        "Rea",
        "TG",
        "Overall",
    }
    assert files["lvbench_board.json.failed.txt"].split() == ["6", "7", "8"]


def test_the_canary_goes_nowhere():
    root, _ = fixture("hourvideo")
    path = root / "official/HourVideo/v1.0_release/json/dev_v1.0_annotations.json"
    assert "CANARY" in path.read_text()
    built = task("hourvideo")
    out = json.dumps([built.about(), built.notes(), answered(built, "A"), [built.prompt(s) for s in built.samples]])
    assert "CANARY" not in out.upper()
    assert any("pictures" in line for line in built.notes()) and len(built.samples) == 6
