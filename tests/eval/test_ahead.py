"""Decoding ahead: the next batch while one is computed, no further, and errors where they are asked for."""

import threading

import pytest

from hybridvlm.eval.ahead import Ahead
from hybridvlm.video import VideoError
from hybridvlm.video.errors import heard, warn

SIZE = {"a": 2, "b": 2, "c": 3, "d": 9, "e": 1, "x": 0}.__getitem__


class Films:
    """A task that notes what is decoded, and on which thread."""

    def __init__(self):
        self.seen, self.begun = [], {name: threading.Event() for name in "abcdefx"}

    def clip(self, video):
        self.seen.append((video, threading.current_thread().name))
        self.begun[video].set()
        if video == "x":
            raise VideoError("x: damaged")
        warn(f"{video}: remark", stacklevel=1)
        return video, None


def test_the_next_batch_is_decoded_meanwhile_and_no_further():
    task = Films()
    task.clip = quiet(task.clip)
    ahead = Ahead(task, SIZE)
    batches = [["a", "b"], ["b", "c"], ["d"], ["e"]]
    for place, batch in enumerate(ahead.over(batches, lambda batch: batch)):
        assert batch is batches[place]
        for video in batches[place + 1] if place + 1 < len(batches) else ():
            assert task.begun[video].wait(10)
        beyond = [video for later in batches[place + 2 :] for video in later if video not in "abc"]
        assert not any(task.begun[video].is_set() for video in beyond)
        assert [ahead.clip(video)[0] for video in batch] == batch
    assert [video for video, _ in task.seen].count("a") == 1
    assert all(thread.startswith("decode") for _, thread in task.seen)


def test_no_more_is_decoded_than_there_is_memory_for():
    task = Films()
    task.clip = quiet(task.clip)
    ahead = Ahead(task, SIZE, most=4)
    batches = ahead.over([["a", "b", "c"], ["d", "e"]], lambda batch: batch)
    next(batches)
    assert set(ahead._waiting) == {"a", "b"}
    assert ahead.clip("a") == ("a", None) and set(ahead._waiting) == {"b"}  # c and it are 5
    assert ahead.clip("b") == ("b", None) and set(ahead._waiting) == {"c"}
    # one of the next batch that is larger than all there is goes alone
    assert ahead.clip("c") == ("c", None) and set(ahead._waiting) == {"d"}
    assert task.begun["d"].wait(10) and not task.begun["e"].is_set()
    next(batches)
    # out of turn, it is decoded on the spot, and once
    assert ahead.clip("e") == ("e", None) and ahead.clip("d") == ("d", None) and not ahead._waiting
    assert list(batches) == [] and sorted(video for video, _ in task.seen) == list("abcde")


def test_seconds_that_the_caller_waits_are_counted():
    task, go = Films(), threading.Event()
    task.clip = lambda video: (go.wait(10), None)
    ahead = Ahead(task, SIZE)
    for batch in ahead.over([["a"]], lambda batch: batch):
        threading.Timer(0.2, go.set).start()
        ahead.clip(batch[0])
    assert 0.1 < ahead.waited < 10


def quiet(clip):
    def inner(video):
        with heard():
            return clip(video)

    return inner


def test_an_error_is_raised_where_the_clip_is_asked_for():
    ahead = Ahead(Films(), SIZE)
    for batch in ahead.over([["x"]], lambda batch: batch):
        with pytest.raises(VideoError, match="x: damaged"):
            ahead.clip(batch[0])


def test_what_nobody_asks_for_is_let_go():
    task = Films()
    task.clip = quiet(task.clip)
    ahead = Ahead(task, SIZE)
    batches = ahead.over([["a"], ["b"], ["c"]], lambda batch: batch)
    next(batches)
    batches.close()
    assert ahead._waiting == {} and not task.begun["c"].is_set()
    assert ahead.clip("c") == ("c", None)  # and is decoded at once where it is asked for after all


def test_each_thread_hears_its_own_remarks():
    found = {}

    def listen(name, start):
        with heard() as texts:
            start.wait(10)
            warn(f"{name}: remark", stacklevel=1)
            found[name] = list(texts)

    start = threading.Event()
    threads = [threading.Thread(target=listen, args=(name, start)) for name in "abc"]
    for thread in threads:
        thread.start()
    start.set()
    for thread in threads:
        thread.join()
    assert found == {name: [f"{name}: remark"] for name in "abc"}
    with pytest.warns(UserWarning, match="loud"):
        warn("loud", stacklevel=1)
