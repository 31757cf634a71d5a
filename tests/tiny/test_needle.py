"""The embedded benchmark: splits, videos, questions, vocabulary, export."""

import json
import subprocess
import sys

import numpy as np
import pytest
from helpers.needle_answers import derive
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridvlm import video as video_files
from hybridvlm.tiny import assets, export, needle, tiles, vocabulary

SOURCE = assets.DEBIAN.is_dir()


def digests(split):
    return {image.tobytes() for image in assets.load_bank(split).images}


def assert_same(a, b):
    for name in a.__dataclass_fields__:
        x, y = getattr(a, name), getattr(b, name)
        assert np.array_equal(x, y), name


# --- images


def test_packaged_images_hold_all_splits():
    for split in assets.SPLITS:
        packaged = assets._read_packaged(split)
        assert packaged is not None, "python -m hybridvlm.tiny.assets makes the packaged images again"
        assert packaged.images.dtype == np.uint8
        assert packaged.images.shape[1:] == (28, 28)
        assert np.array_equal(packaged.label, np.sort(packaged.label))
        assert set(packaged.label) == set(range(tiles.CLASSES))
    assert np.diff(assets.load_bank("test").start).tolist() == [1000] * tiles.CLASSES
    licence = assets.PATH.with_name("LICENSE-fashion-mnist.txt").read_text()
    assert "Zalando SE" in licence
    assert "The MIT License" in licence
    assert assets.PATH.stat().st_size < 25e6  # the data that a wheel carries


def test_val_and_test_images_differ():
    assert not digests("val") & digests("test")


@pytest.mark.skipif(not SOURCE, reason="needs the Debian package dataset-fashion-mnist")
def test_splits_never_mix_and_packaged_equals_source():
    train, val, test = (digests(split) for split in assets.SPLITS)
    assert not train & val
    assert not train & test
    assert not val & test
    for split in assets.SPLITS:
        assert_same(assets.load_bank(split), assets.read_source(split))
    kept = sum(len(assets.load_bank(split).label) for split in ("train", "val"))
    assert kept == 6000 * tiles.CLASSES  # every kept training image is in one of both


@pytest.mark.skipif(not SOURCE, reason="needs the Debian package dataset-fashion-mnist")
def test_packaged_classes_are_those_of_the_labels():
    """The bank's class numbers mean what `tiles` says: checked against the label file, image by image."""
    images = assets._read_idx(assets.DEBIAN / "t10k-images-idx3-ubyte.gz", 3)
    labels = assets._read_idx(assets.DEBIAN / "t10k-labels-idx1-ubyte.gz", 1)
    label_of = {image.tobytes(): int(label) for image, label in zip(images, labels, strict=True)}
    bank = assets.load_bank("test")
    for image, label in zip(bank.images[::97], bank.label[::97], strict=True):
        assert tiles.CLASS_OF_LABEL[label_of[image.tobytes()]] == tiles.CLASS_WORDS[label]


class ShuffledDatasets:
    """Stands in for tensorflow-datasets: the same images in another order."""

    class core:
        class DatasetNotFoundError(Exception):
            pass

    @staticmethod
    def data_source(name, split):
        assert (name, split) == ("fashion_mnist", "test")
        images = assets._read_idx(assets.DEBIAN / "t10k-images-idx3-ubyte.gz", 3)
        labels = assets._read_idx(assets.DEBIAN / "t10k-labels-idx1-ubyte.gz", 1)
        order = np.random.default_rng(0).permutation(len(images))
        return [{"image": images[i, :, :, None], "label": labels[i]} for i in order]


@pytest.mark.skipif(not SOURCE, reason="needs the Debian package dataset-fashion-mnist")
def test_both_sources_give_the_same_bank(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", ShuffledDatasets)
    assert_same(assets.read_source("test", tmp_path), assets.load_bank("test"))


def test_failing_download_is_one_line(tmp_path, monkeypatch):
    def refuse(name, split):
        raise OSError("no network\nmore text")

    monkeypatch.setattr(ShuffledDatasets, "data_source", refuse)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", ShuffledDatasets)
    with pytest.raises(assets.ImagesMissing, match=r"failed: no network$"):
        assets.read_source("train", tmp_path)


def test_missing_source_names_both_ways(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(assets.ImagesMissing, match=r"dataset-fashion-mnist.*tensorflow-datasets.*it is not installed"):
        assets.read_source("train", tmp_path)


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match="train, val, test"):
        needle.make_video("dev", 0)


# --- pixels


def test_render_and_read_back():
    video = needle.make_video("val", 3, frames=8)
    frames = needle.render_video(video)
    assert frames.shape == (8, 128, 128, 3)
    assert frames.dtype == np.uint8
    cells = tiles.split_cells(frames)
    assert np.array_equal(tiles.assemble(cells), frames)
    for read, made in zip(tiles.read_colours(cells), (video.border, video.tag1, video.tag2), strict=True):
        assert np.array_equal(read, made.reshape(-1))
    # the item in the middle of cell (frame 5, cell 9: row 2, column 1), below the tags
    image = assets.load_bank("val").images[video.image[5, 9]]
    assert np.array_equal(frames[5, 64 + 2 + 5 : 64 + 30, 32 + 2 : 32 + 30], np.repeat(image[5:, :, None], 3, 2))
    assert assets.load_bank("val").label[video.image[5, 9]] == video.label[5, 9]


def test_colours_are_far_apart():
    for table, least in ((tiles.BORDER_RGB, 127), (tiles.TAG_RGB, 255)):
        distance = np.linalg.norm(table[:, None].astype(float) - table[None], axis=-1)
        assert distance[~np.eye(len(table), dtype=bool)].min() >= least


def test_render_refuses_floats():
    with pytest.raises(ValueError, match="uint8"):
        tiles.render(np.zeros((1, 28, 28)), *(np.zeros(1, int),) * 3)


# --- videos and questions


def test_videos_are_deterministic_and_differ():
    assert_same(needle.make_video("test", 7), needle.make_video("test", 7))
    base = needle.make_video("test", 7)
    for other in (
        needle.make_video("test", 8),
        needle.make_video("val", 7),
        needle.make_video("test", 7, seed=1),
    ):
        assert not np.array_equal(base.label, other.label)
        assert not np.array_equal(base.border, other.border)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([1, 2, 3, 8, 24, 64]))
def test_video_invariants(index, frames):
    video = needle.make_video("val", index, frames)
    assert video.frames == frames
    assert np.array_equal(np.sort(video.border, axis=1), np.tile(np.arange(16), (frames, 1)))
    assert np.array_equal(np.take_along_axis(video.border, video.cell_of, 1), np.tile(np.arange(16), (frames, 1)))
    assert video.number.min() >= 0
    assert video.number.max() < frames
    assert max(video.tag1.max(), video.tag2.max()) < 8
    assert np.array_equal(assets.load_bank("val").label[video.image], video.label)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([2, 5, 16, 64]))
def test_answers_follow_from_the_cells(index, frames):
    video = needle.make_video("val", index, frames)
    questions = needle.make_questions(video, 35, np.random.default_rng(index))
    words = vocabulary.default()
    rows = zip(questions.texts(), questions.answers(), questions.options(), questions.type_names(), strict=True)
    for i, (text, answer, options, kind) in enumerate(rows):
        expected, hops = derive(video, text)
        assert answer == expected
        assert answer in options
        assert (questions.hop2[i] >= 0) == (kind in needle.TWO_HOP)
        got = (questions.hop1, questions.hop2, questions.target_frame, questions.target_cell, questions.target_colour)
        assert tuple(int(a[i]) for a in got) == hops
        assert words.encode(text) == questions.text[i].tolist()
        assert words.decode([questions.answer[i]]) == answer


def test_types_as_asked_and_balanced():
    video = needle.make_video("val", 0)
    questions = needle.make_questions(video, 10, np.random.default_rng(0), types=("2P", "WHAT"))
    assert questions.type_names() == ["2P", "WHAT"] * 5
    with pytest.raises(ValueError, match="WHAT, WHERE"):
        needle.make_questions(video, 1, np.random.default_rng(0), types=("WHY",))


def test_lengths_that_cannot_be_asked():
    with pytest.raises(ValueError, match=r"1\.\.64"):
        needle.make_video("val", 0, frames=65)
    single = needle.make_video("val", 0, frames=1)
    with pytest.raises(ValueError, match="another frame"):
        needle.make_questions(single, 7, np.random.default_rng(0))
    assert len(needle.make_questions(single, 5, np.random.default_rng(0), types=("WHAT", "WHERE"))) == 5


def test_test_split_is_balanced_and_repeatable():
    pairs = needle.split_questions()
    assert len(pairs) >= 250
    kinds = np.concatenate([questions.type for _, questions in pairs])
    counts = np.bincount(kinds, minlength=len(needle.TYPES))
    assert counts.sum() == 1024
    assert counts.max() - counts.min() <= 1
    answers = np.concatenate([questions.answer for _, questions in pairs])
    classes = np.bincount(answers[answers >= vocabulary.CLASS] - vocabulary.CLASS, minlength=tiles.CLASSES)
    assert classes.min() > 0.8 * classes.mean()
    for first, second in zip(pairs[:9], needle.split_questions(videos=9), strict=True):
        assert_same(first[0], second[0])
        assert_same(first[1], second[1])
    names = {needle.question_id(video, i) for video, questions in pairs for i in range(len(questions))}
    assert len(names) == 1024


# --- vocabulary


def test_packaged_tokenizer_is_the_built_one():
    words = vocabulary.default()
    assert words.size == vocabulary.SIZE == len(set(vocabulary.WORDS))
    assert words.tokenizer.to_str() == vocabulary.build().to_str()
    for i, word in enumerate(vocabulary.WORDS):
        assert words.id(word) == i
    assert (words.pad_id, words.video_id, words.eos_id) == (0, 1, 2)
    assert words.encode("Red@T12 none WHAT ?") == words.encode("red@t12 none what ?")


@pytest.mark.parametrize("text", ["rad@t12 none what ?", "red@t64 none what ?", "red@t12 none why ?", "<video>", ""])
def test_unknown_words_are_refused_by_name(text):
    words = vocabulary.default()
    with pytest.raises(ValueError) as caught:
        words.encode(text)
    bad = next((word for word in text.split() if word not in vocabulary.WORDS[vocabulary.NONE :]), "empty")
    assert bad in str(caught.value)


def test_near_words_are_listed():
    with pytest.raises(ValueError, match="red@t12"):
        vocabulary.default().encode("rad@t12 none what ?")


# --- export


def test_export_and_back(tmp_path):
    assert export.export(tmp_path, limit=7) == (2, 7)
    rows = [json.loads(line) for line in (tmp_path / "questions.jsonl").read_text().splitlines()]
    assert len({row["id"] for row in rows}) == len(rows) == 7
    pairs = needle.split_questions(videos=2)
    texts = [text for _, questions in pairs for text in questions.texts()][:7]
    assert [row["question"] for row in rows] == texts
    for row in rows:
        assert set(row) == {"id", "video", "question", "options", "answer", "type", "two_hop"}
        assert row["answer"] in row["options"]
    for (video, _), name in zip(pairs, dict.fromkeys(row["video"] for row in rows), strict=True):
        info = video_files.probe(tmp_path / name)
        assert (info.frames, info.width, info.height) == (64, 128, 128)
        indices = video_files.sample_indices(info, needle.FRAMES)
        assert indices.tolist() == list(range(64))
        frames = video_files.decode_frames(tmp_path / name, indices)
        for read, made in zip(
            tiles.read_colours(tiles.split_cells(frames)), (video.border, video.tag1, video.tag2), strict=True
        ):
            assert np.array_equal(read, made.reshape(-1))
        assert np.abs(frames.astype(int) - needle.render_video(video)).mean() < 2


def test_export_command(tmp_path):
    command = [sys.executable, "-m", "hybridvlm.tiny.export", "--output", str(tmp_path), "--limit"]
    done = subprocess.run([*command, "1", "--split", "val", "--frames", "4"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    row = json.loads((tmp_path / "questions.jsonl").read_text())
    assert video_files.probe(tmp_path / row["video"]).frames == 4
    lasting = subprocess.run([*command, "1", "--scenes"], capture_output=True, text=True)
    assert lasting.returncode == 0, lasting.stderr
    assert json.loads((tmp_path / "questions.jsonl").read_text())["id"] == "scenes-test-0000-0"
    refused = subprocess.run([*command, "-1"], capture_output=True, text=True)
    assert refused.returncode != 0
    assert refused.stderr.startswith("error: limit")
    assert len(refused.stderr.splitlines()) == 1
