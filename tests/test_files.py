"""Locks of folders, and JSON that means one thing only."""

import errno
import json
import os
import subprocess
import sys
import threading

import pytest

from hybridvlm import files
from hybridvlm.files import LOCK, FolderBusy, folder_lock, parse_json, runs, text_problem


def test_a_held_folder_names_its_holder(tmp_path):
    folder = tmp_path / "new" / "run"
    with folder_lock(folder, "an evaluation"):
        with pytest.raises(FolderBusy) as caught, folder_lock(folder, "another"):
            pytest.fail("two hold one folder")
        text = str(caught.value)
        assert "\n" not in text and str(folder) in text and "an evaluation" in text and f"process {os.getpid()}" in text
        assert str(folder / LOCK) in text
    assert not folder.exists()
    folder.mkdir()
    with folder_lock(folder, "the next"):
        assert json.loads((folder / LOCK).read_text())["what"] == "the next"
    assert list(folder.iterdir()) == []


def test_an_error_lets_go(tmp_path):
    with pytest.raises(ZeroDivisionError), folder_lock(tmp_path, "a training"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def write_lock(folder, age=0.0, **fields):
    held = files._holder("a training", "other") | fields
    (folder / LOCK).write_text(json.dumps(held))
    now = (folder / LOCK).stat().st_mtime
    os.utime(folder / LOCK, (now - age, now - age))


def dead():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.parametrize(
    ("age", "fields", "stale"),
    [
        (0, {"pid": None}, True),  # a process of this machine that is gone
        (0, {"born": 1}, True),  # the number is another process's now
        (99999, {}, False),  # this process, however long it stood still
        (0, {"host": "elsewhere pid:[1]"}, False),
        (files.SILENCE + 60, {"host": "elsewhere pid:[1]"}, True),
    ],
)
def test_stale_locks_are_taken_over(tmp_path, age, fields, stale):
    if "pid" in fields:
        fields = {"pid": dead()}
    if "born" in fields and files._born(os.getpid()) is None:
        pytest.skip("this system does not tell when a process began")
    write_lock(tmp_path, age, **fields)
    if stale:
        with folder_lock(tmp_path, "mine"):
            assert json.loads((tmp_path / LOCK).read_text())["what"] == "mine"
        assert not (tmp_path / LOCK).exists()
    else:
        with pytest.raises(FolderBusy, match="a training"), folder_lock(tmp_path, "mine"):
            pytest.fail("taken from a living holder")
        assert json.loads((tmp_path / LOCK).read_text())["token"] == "other"


@pytest.mark.parametrize("left", [None, "dead", "broken"])
def test_of_many_at_once_one_holds(tmp_path, left):
    if left == "dead":
        write_lock(tmp_path, pid=dead())
    if left == "broken":
        (tmp_path / LOCK).write_text("{")
        os.utime(tmp_path / LOCK, (1, 1))
    start, hold, taken, refused = threading.Barrier(8), threading.Event(), [], []

    def one():
        start.wait()
        try:
            with folder_lock(tmp_path, "one of eight"):
                taken.append(1)
                hold.wait(30)
        except FolderBusy:
            refused.append(1)
        if len(refused) == 7:
            hold.set()

    threads = [threading.Thread(target=one) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(taken), len(refused)) == (1, 7)
    assert list(tmp_path.iterdir()) == []


def test_a_holder_gives_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "BEAT", 0.01)
    with folder_lock(tmp_path, "mine"):
        os.utime(tmp_path / LOCK, (1, 1))
        for _ in range(1000):
            if (tmp_path / LOCK).stat().st_mtime > 1:
                break
            threading.Event().wait(0.01)
        else:
            pytest.fail("no sign of life")


def test_a_lock_that_somebody_else_holds_by_now_stays(tmp_path):
    with folder_lock(tmp_path, "mine"):
        write_lock(tmp_path)
    assert (tmp_path / LOCK).exists()


def test_runs():
    assert runs(os.getpid()) and not runs(dead())
    assert not any(map(runs, (0, -1, 2**31, 2**70)))


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EXDEV])
def test_file_systems_without_links_or_modes(tmp_path, monkeypatch, code):
    def fail(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", fail)
    monkeypatch.setattr(os, "chmod", fail)
    with folder_lock(tmp_path, "mine"):
        assert json.loads((tmp_path / LOCK).read_text())["what"] == "mine"
        with pytest.raises(FolderBusy, match="mine"), folder_lock(tmp_path, "another"):
            pytest.fail("two hold one folder")
    assert list(tmp_path.iterdir()) == []
    write_lock(tmp_path, pid=dead())
    with folder_lock(tmp_path, "the next"):
        assert json.loads((tmp_path / LOCK).read_text())["what"] == "the next"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "fields",
    [{"pid": pid} for pid in (2**70, 2**31, 0, -1, True, None, 1.5, "7")] + [{"host": h} for h in ("", "  ", None, 3)],
    ids=repr,
)
def test_locks_that_name_no_process(tmp_path, fields):
    write_lock(tmp_path, **fields)
    with pytest.raises(FolderBusy, match="held by an unknown process") as caught, folder_lock(tmp_path, "mine"):
        pytest.fail("taken from a holder that may live")
    assert "\n" not in str(caught.value) and str(tmp_path / LOCK) in str(caught.value)
    write_lock(tmp_path, files.SILENCE + 60, **fields)
    with folder_lock(tmp_path, "mine"):
        assert json.loads((tmp_path / LOCK).read_text())["what"] == "mine"


@pytest.mark.parametrize("kind", ["folder", "link to nowhere", "array", "empty"])
def test_locks_that_are_none(tmp_path, kind):
    lock = tmp_path / LOCK
    if kind == "folder":
        lock.mkdir()
    elif kind == "link to nowhere":
        lock.symlink_to("nowhere")
    else:
        lock.write_text("[1]" if kind == "array" else "")
    with pytest.raises(FolderBusy, match="held by an unknown process") as caught, folder_lock(tmp_path, "mine"):
        pytest.fail("taken over")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]


@pytest.mark.parametrize("value", ["a\ud800", ["b", {"c": "\udfff"}], {"\ud83d": 1}])
def test_half_a_surrogate_pair_is_no_text(value):
    assert "half a surrogate pair" in text_problem(value)
    assert text_problem(json.loads('["\\ud83d\\ude00", {"a": null, "b": 1.5}]')) is None


@pytest.mark.parametrize("text", ['{"a": 1, "a": 1}', '{"b": [{"a": 1, "c": 2, "a": null}]}'])
def test_a_key_stands_once(text):
    with pytest.raises(ValueError, match="'a' stands twice"):
        parse_json(text)


def test_json_with_a_mark_or_too_deep():
    assert parse_json(b'\xef\xbb\xbf{"a": "\xc3\xa9"}') == {"a": "é"}
    for broken in (b"\xff", "[" * 200000, "{"):
        with pytest.raises(ValueError):
            parse_json(broken)
