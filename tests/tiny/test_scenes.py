"""The embedded benchmark on scenes that last: videos, moments, questions, and the task through the command."""

import itertools
import json

import numpy as np
import pytest
from helpers.needle_answers import derive
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridvlm.eval.__main__ import main as evaluate
from hybridvlm.tiny import assets, needle, scenes, tiles


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([1, 2, 8, 64]))
def test_videos_are_permutations_of_colours_that_mostly_stay(index, frames):
    video = scenes.make_video("val", index, frames)
    assert video.frames == frames
    assert np.array_equal(np.sort(video.border, axis=1), np.tile(np.arange(16), (frames, 1)))
    assert 0 <= video.number.min() <= video.number.max() < frames
    assert np.array_equal(assets.load_bank("val").label[video.image], video.label)
    assert video.onset[0].all()
    if frames == 64:
        assert 0.1 < video.onset.mean() < 0.35
        assert video.covered.mean() < 0.1


@pytest.mark.parametrize("index", range(6))
def test_an_onset_is_what_the_pixels_say(index):
    """Cells that are no onset differ from the frame before by camera noise alone, and onsets by more."""
    video = scenes.make_video("val", index)
    cells = tiles.split_cells(scenes.render_video(video)).reshape(64, 16, -1).astype(np.int16)
    change = np.abs(np.diff(cells, axis=0)).max(-1)
    assert np.array_equal(change > 2 * scenes.NOISE, video.onset[1:])
    assert (cells.reshape(64, 16, -1)[video.covered] <= scenes.PATCH + scenes.NOISE).all()


@pytest.mark.parametrize("event", ["replaced", "swapped", "covered", "moved", "cut"])
def test_every_event_happens(event):
    """Told from the pictures: how many cells of a frame change, and whether what was there is there still."""
    found = set()
    for index in range(12):
        video = scenes.make_video("val", index)
        code = np.where(video.covered, -1, video.image)
        for before, after in itertools.pairwise(code):
            changed = before != after
            if changed.all() and set(before) == set(after):
                found.add("moved")
            elif changed.all() and not set(before) & set(after) - {-1}:
                found.add("cut")
            elif changed.sum() == 2 and sorted(before[changed]) == sorted(after[changed]):
                found.add("swapped")
            elif changed.sum() == 1:
                found.add("covered" if -1 in after[changed] else "replaced" if -1 not in before[changed] else "shown")
    assert event in found


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([2, 16, 64]))
def test_answers_follow_from_what_can_be_seen(index, frames):
    video = scenes.make_video("val", index, frames)
    kinds = needle.TYPES * 2
    wanted = np.repeat(scenes.MOMENTS, len(needle.TYPES))
    try:
        questions = scenes.make_questions(video, kinds, wanted, np.random.default_rng(index))
    except ValueError as error:
        assert frames == 2 and "nothing of type 2" in str(error)
        return
    assert questions.type_names() == list(kinds)
    moments = scenes.moments(video, questions)
    for i, text in enumerate(questions.texts()):
        answer, hops = derive(video, text)
        assert questions.answers()[i] == answer
        assert (questions.hop1[i], questions.hop2[i]) == hops[:2]
        needed = [divmod(hop, 16) for hop in hops[:2] if hop >= 0]
        assert not any(video.covered[token] for token in needed)
        assert (moments[i] == "onset") == all(video.onset[token] for token in needed)
    if frames == 64:
        assert moments == list(wanted)


def test_the_list_is_balanced_and_repeatable():
    pairs = scenes.split_questions("test", 56)
    kinds = np.concatenate([questions.type for _, questions in pairs])
    assert np.bincount(kinds).tolist() == [32] * 7
    moments = np.array([m for video, questions in pairs for m in scenes.moments(video, questions)])
    assert [sum(moments == m) for m in scenes.MOMENTS] == [112, 112]
    again = scenes.split_questions("test", 9)
    for (video, questions), (same, asked) in zip(pairs, again, strict=False):
        assert np.array_equal(scenes.render_video(video), scenes.render_video(same))
        assert np.array_equal(questions.text, asked.text)
    assert not np.array_equal(scenes.make_video("test", 0).label, scenes.make_video("val", 0).label)


def test_a_video_that_nothing_later_can_be_asked_about():
    video = scenes.make_video("val", 0, 1)
    questions = scenes.make_questions(video, ["WHAT"], ["later"], np.random.default_rng(0))
    assert scenes.moments(video, questions) == ["onset"]
    with pytest.raises(ValueError, match="nothing of type 2G can be asked about a video of 1 frames"):
        scenes.make_questions(video, ["2G"], ["later"], np.random.default_rng(0))


@pytest.mark.slow
def test_dropping_what_repeats_keeps_onsets_and_loses_the_rest(tmp_path, capsys):
    """By the command: `evs` answers questions about onsets as dense does, and fails at the others; `str` loses neither."""
    evaluate(
        ["--model", "tiny-reduced", "--tasks", "needle-scenes", "--split", "val", "--limit", "56"]
        + ["--methods", "none,str,evs", "--output", str(tmp_path)]
    )
    assert "needle-scenes" in capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    by = {extra["method"]: extra["by_moment"] for extra in results["details"]}
    assert min(by["none"].values()) > 0.9
    assert min(by["str"].values()) > 0.9
    assert by["evs"]["onset"] > 0.9
    assert by["evs"]["later"] < 0.6
    assert "| accuracy % by moment | onset (n=28) | later (n=28) |" in (tmp_path / "report.md").read_text()
