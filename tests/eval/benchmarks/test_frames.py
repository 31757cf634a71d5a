"""Frame rules of the harnesses, to the frame; parts of videos and folders."""

import numpy as np
import pytest

from hybridvlm.eval.benchmarks.frames import RULES, Part, Source, bounds, choose, known, numbers, span_numbers

HUNDRED, FIVE, QUARTER = Source(100, 10.0, 10.0), Source(5, 10.0, 0.5), Source(250, 25.0, 10.0)


@pytest.mark.parametrize(
    ("rule", "hundred", "five", "quarter"),
    [
        ("linspace", "0 14 28 42 56 70 84 99", "0 0 1 1 2 2 3 4", "0 83 166 249"),
        ("round", "0 14 28 42 57 71 85 99", "0 1 1 2 2 3 3 4", "0 83 166 249"),
        ("vk.nframe", "11 22 33 44 55 66 77 88", "0 1 1 2 2 3 3 4", "50 100 150 200"),
        ("slicer", "6 18 31 43 56 68 80 93", "0 0 1 2 2 2 3 4", "31 93 155 218"),
        ("vamba", "6 18 31 43 56 68 81 93", "0 1 2 3 4", "31 93 156 218"),
    ],
)
def test_counted_rules(rule, hundred, five, quarter):
    for video, n, wanted in ((HUNDRED, 8, hundred), (FIVE, 8, five), (QUARTER, 4, quarter)):
        assert numbers(rule, video, n) == [int(k) for k in wanted.split()], (rule, video)


def test_mvbench_and_slicer_are_two_rules():
    video = Source(58, 10.0, 5.8)
    assert 32 in numbers("slicer", video, 8) and 31 in numbers("mvbench", video, 8)
    differ = [
        numbers("slicer", Source(total, 1.0, total), n) != numbers("mvbench", Source(total, 1.0, total), n)
        for total in range(20, 120)
        for n in (4, 8, 16)
    ]
    assert 0.2 < np.mean(differ) < 0.9


def test_rated_rules():
    assert numbers("vk.fps:1", HUNDRED, 8) == list(range(0, 100, 10))
    assert numbers("vk.fps:1", QUARTER, 4) == list(range(0, 250, 25))
    assert numbers("vk.fps:1", FIVE, 8) == [0]  # the harness takes none
    assert numbers("qwen:2", HUNDRED, 768)[:5] == [0, 5, 10, 16, 21] and len(numbers("qwen:2", HUNDRED, 768)) == 20
    assert numbers("qwen:2", FIVE, 768) == [0, 1, 3, 4]
    assert numbers("hourvideo", Source(200, 29.97, 200 / 29.97), 0) == [0, 59, 118, 177]
    assert numbers("hourvideo", Source(3, 0.3, 10.0), 0) == [0, 1, 2]


def test_longvideobench():
    video = Source(260, 25.0, 10.4)
    assert numbers("lvb", video, 4) == [0, 65, 130, 195]
    assert numbers("lvb", video, 16) == list(range(0, 260, 26))
    assert numbers("lvb", Source(10, 25.0, 0.4), 4) == [0]
    assert numbers("lvb", Source(90, 10.0, 9.0), 4) == [0, 22, 44, 66]


@pytest.mark.parametrize(
    ("start", "end", "wanted"),
    [(2, 6, "22 27 32 37 42 47 52 57"), (8, 20, "81 83 86 88 91 93 95 98"), (0, 0.5, "0 1 1 2 2 3 4 4")],
)
def test_bounds_of_a_video(start, end, wanted):
    assert span_numbers(*bounds(start, end, 10.0, 0, 99), 8) == [int(k) for k in wanted.split()]


@pytest.mark.parametrize(("start", "end", "wanted"), [(1, 5, "3 5 6 7 9 11 12 13"), (0, 100, "2 6 9 13 16 20 24 27")])
def test_bounds_of_a_folder(start, end, wanted):
    found = choose("mvbench", Source(30, 3.0, 10.0), 8, Part(start, end), first=1)
    assert found.tolist() == [int(k) for k in wanted.split()]


def test_three_questions_on_one_video():
    """MVBench's questions on ZS9XR.mp4, 60 frames at 10 a second."""
    video = Source(60, 10.0, 6.0)
    for part, wanted in (((2, 4), [22, 27, 32, 37]), ((0, 2), [2, 7, 12, 17]), ((4, 6), [42, 47, 52, 56])):
        assert choose("mvbench", video, 4, Part(*part)).tolist() == wanted
    assert choose("mvbench", Source(18, 3.0, 6.0), 4, Part(2, 4), first=1).tolist() == [6, 8, 9, 10]


@pytest.mark.parametrize("rule", [*RULES, "vk.fps:1", "uniform", "qwen:2"])
def test_what_is_shown_rises_and_stays_inside(rule):
    assert known(rule) and not known("fancy")
    for total in (1, 2, 3, 7, 98, 100):
        video = Source(total, 10.0, total / 10)
        for n in (1, 4, 8):
            whole = choose(rule, video, n, Part())
            assert len(whole) >= 1 and whole[-1] < total and np.all(np.diff(whole) > 0) and len(whole) <= n
            assert choose(rule, video, n, Part(end=3.0)).max() < max(1, 30)
            assert choose(rule, video, n, Part(stop=3)).max() < 3
    with pytest.raises(ValueError, match="rule must be one of"):
        numbers("fancy", HUNDRED, 4)


def test_the_end_goes_by_time_stamps():
    """Of a video that stops for a while, frames after the end are never shown, whatever the mean rate says."""
    seconds = np.concatenate([np.arange(10) / 10, 5 + np.arange(10) / 10])
    video = Source(20, 20 / 5.9, 5.9)
    assert choose("vamba", video, 20, Part(end=3.0), seconds).max() == 9
