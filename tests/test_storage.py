"""Files of an object store: whole objects, parts per process, a lock without exclusive creation; and which folders are shared."""

import json
import os
import subprocess
import sys
import time
import types

import pytest
from helpers.eval_world import build_world
from helpers.object_store import OBJECTS, TIMES, WRITES

from hybridvlm import files, storage
from hybridvlm.checkpoints.describe import describe
from hybridvlm.checkpoints.names import resolve
from hybridvlm.distributed import Process
from hybridvlm.eval.__main__ import main
from hybridvlm.eval.deal import weights_fingerprint
from hybridvlm.eval.results import SampleStore
from hybridvlm.files import FolderBusy, folder_lock
from hybridvlm.inference.model import load
from hybridvlm.storage import GrowingFile, as_path, is_shared, is_url, make_folder, write_atomic
from hybridvlm.train.config import TrainConfig
from hybridvlm.train.loop import Run


@pytest.fixture(autouse=True)
def empty_store(monkeypatch):
    OBJECTS.clear()
    WRITES.clear()
    TIMES.clear()
    monkeypatch.setattr(storage, "SETTLE", 0.0)


def test_urls_are_told_from_paths(tmp_path):
    assert is_url("gs://bucket/x") and is_url("fake://b/x") and is_url(as_path("fake://b/x"))
    assert not is_url("results/x") and not is_url("/a://b") and not is_url(tmp_path) and not is_url("C:/x")
    assert str(as_path("fake://b/x") / "y.json") == "fake://b/x/y.json" and as_path("a/b").parts == ("a", "b")
    with pytest.raises(ValueError, match=r"gs://b/x: gs:// takes the package gcsfs"):
        as_path("gs://b/x")
    with pytest.raises(ValueError, match="no store is known as ftp://"):
        as_path("ftp://host/x")


def test_what_grows_in_a_store_is_objects_of_one_process(monkeypatch):
    monkeypatch.setattr(storage, "PART_BYTES", 10)
    path = as_path("fake://b/run/samples-3.jsonl")
    file = GrowingFile(path)
    for line in (b"first\n", b"second\n", b"third\n"):
        file.add(line)
    assert OBJECTS == {
        "fake://b/run/samples-3-0.jsonl": b"first\nsecond\n",
        "fake://b/run/samples-3-1.jsonl": b"third\n",
    }
    GrowingFile(path).add(b"later\n")  # another run writes over nothing
    assert OBJECTS["fake://b/run/samples-3-2.jsonl"] == b"later\n" and len(OBJECTS) == 3


def record(key: str) -> dict:
    return {"key": key, "correct": True}


def test_samples_of_a_store_are_found_by_any_number_of_processes():
    path = as_path("fake://b/run/samples.jsonl")
    for index in range(3):
        SampleStore(path, Process(index, 3)).append([record(f"{index}-{n}") for n in range(2)])
    alone = SampleStore(path)
    assert len(alone.records) == 6 and "2-1" in alone
    alone.append([record("new")])
    assert len(SampleStore(path, Process(1, 2)).records) == 7
    alone.finish()
    assert list(OBJECTS) == ["fake://b/run/samples.jsonl"]
    again = SampleStore(path)
    assert len(again.records) == 7
    again.finish()
    assert len(SampleStore(path).records) == 7


def test_a_store_is_held_by_one(monkeypatch):
    with folder_lock("fake://b/run", "an evaluation"):
        held = json.loads(OBJECTS["fake://b/run/.lock"])
        assert held["pid"] == os.getpid() and held["what"] == "an evaluation"
        with (
            pytest.raises(FolderBusy, match=f"process {os.getpid()}.*remove fake://b/run/.lock"),
            folder_lock("fake://b/run", "x"),
        ):
            pytest.fail("two hold one folder")
    assert not OBJECTS

    def leave(**changes):
        OBJECTS["fake://b/run/.lock"] = json.dumps(held | {"token": "other", "alive": time.time()} | changes).encode()

    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    # gone: a process of this machine that no longer runs, and one of another machine that has been silent
    for changes in ({"pid": process.pid}, {"host": "elsewhere x", "alive": time.time() - storage.SILENCE - 1}):
        leave(**changes)
        with folder_lock("fake://b/run", "the next"):
            assert json.loads(OBJECTS["fake://b/run/.lock"])["what"] == "the next"
    leave(host="elsewhere x")
    with pytest.raises(FolderBusy, match="on elsewhere"), folder_lock("fake://b/run", "x"):
        pytest.fail("taken from a live holder")
    # of two at the same moment, the one whose mark stands holds it
    OBJECTS.clear()
    monkeypatch.setattr(storage.time, "sleep", lambda seconds: leave(token="faster"))
    with pytest.raises(FolderBusy, match="at the same moment"), folder_lock("fake://b/run", "x"):
        pytest.fail("both hold it")


@pytest.mark.parametrize("url", [False, True])
def test_a_process_that_ends_hard_holds_nothing(tmp_path, url):
    """What `os._exit` would leave is let go of before it, once, and nothing of who comes after."""
    folder = "fake://b/run" if url else tmp_path / "run"
    lock = as_path(folder) / ".lock"
    with folder_lock(folder, "an evaluation"):
        storage.release_all()
        assert not lock.exists()
        make_folder(as_path(folder))
        lock.write_bytes(b"{}")
    assert lock.exists()


def test_shared_folders(tmp_path):
    mounts = tmp_path / "mounts"
    mounts.write_text(
        "/dev/sda1 / ext4 rw 0 0\nserver:/export /net nfs4 rw 0 0\n/dev/sdb1 /net/scratch xfs rw 0 0\n"
        "b /mnt/my\\040b fuse.gcsfuse rw 0 0\n"
    )
    asked = {
        "/home/me/results": False,
        "/net/results": True,
        "/net/scratch/run": False,
        "/mnt/my b/run": True,
        "gs://b/x": True,
    }
    assert {path: is_shared(path, str(mounts)) for path in asked} == asked
    assert not is_shared("/net/results", str(tmp_path / "nothing"))


def test_a_training_is_refused_a_store():
    with pytest.raises(ValueError, match="gcsfuse"):
        Run(TrainConfig(model="tiny", steps=1, output="gs://bucket/run"))


def test_a_checkpoint_in_a_store(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    world = build_world(tmp_path / "world")
    for file in (world / "micro").iterdir():
        OBJECTS[f"fake://b/ckpt/micro/{file.name}"] = file.read_bytes()
    assert describe("fake://b/ckpt/micro").config.name == "micro"
    assert not list((tmp_path / "cache").rglob("*.safetensors"))  # no weights for a description
    model = load("fake://b/ckpt/micro")
    assert model.config == load(world / "micro").config and resolve("fake://b/ckpt/micro/").is_relative_to(
        tmp_path / "cache"
    )
    with pytest.raises(FileNotFoundError, match="no folder of that store"):
        load("fake://b/ckpt/other")


def test_a_checkpoint_that_was_replaced_is_copied_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    one, two, extra = (f"fake://b/ckpt/{name}" for name in ("a.safetensors", "sub/b.safetensors", "c.safetensors"))
    OBJECTS.update({one: b"aaaa", two: b"bbbb", extra: b"cccc"})
    first, folder = weights_fingerprint("fake://b/ckpt", {}), resolve("fake://b/ckpt")
    read = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert [path.name for path in sorted(read)] == ["a.safetensors", "c.safetensors", "b.safetensors"]
    assert resolve("fake://b/ckpt") == folder and all(path.stat().st_mtime_ns == time for path, time in read.items())
    # as large as before, and another one
    OBJECTS[one], TIMES[one] = b"AAAA", 2
    assert weights_fingerprint("fake://b/ckpt", {}) != first and (folder / "a.safetensors").read_bytes() == b"AAAA"
    # what somebody else has put there is not what was copied
    (folder / "a.safetensors").write_bytes(b"####")
    del OBJECTS[extra], OBJECTS[two]
    resolve("fake://b/ckpt")
    assert [path.read_bytes() for path in folder.rglob("*") if path.is_file()] == [b"AAAA"]


def test_versions_of_a_store_without_times():
    import fsspec

    system = fsspec.filesystem("memory")

    class Item:
        def __fspath__(self):
            return "memory://versions/x"

        def stat(self):
            return types.SimpleNamespace(length=system.info("/versions/x")["size"], mtime=0)

    found = []
    for content in (b"a", b"b"):
        system.pipe("/versions/x", content)
        found += [storage._version(Item()), storage._version(Item())]
    assert found[0] == found[1] != found[2] == found[3]


@pytest.mark.slow
def test_an_evaluation_into_a_store(tmp_path):
    world = build_world(tmp_path / "world")
    options = ["--model", str(world / "micro"), "--tasks", str(world / "q.jsonl"), "--batch-size", "4"]
    options += ["--methods", "str", "--budgets", "0.5", "--output"]
    assert main([*options, str(tmp_path / "local")]) == 0
    assert main([*options, "fake://b/run"]) == 0
    assert set(OBJECTS) == {f"fake://b/run/{file.name}" for file in (tmp_path / "local").iterdir()}
    rows, stored = (
        json.loads(text)["rows"]
        for text in ((tmp_path / "local/results.json").read_text(), OBJECTS["fake://b/run/results.json"])
    )
    assert [row["accuracy"] for row in rows] == [row["accuracy"] for row in stored]
    answers = OBJECTS["fake://b/run/samples.jsonl"]
    assert len(answers.splitlines()) == 36
    # everything is there already
    assert main([*options, "fake://b/run"]) == 0 and OBJECTS["fake://b/run/samples.jsonl"] == answers


def test_write_atomic_leaves_the_old_file_where_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    write_atomic(path, "old")
    monkeypatch.setattr(files.os, "replace", lambda a, b: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        write_atomic(path, "new")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_folders_are_made_on_a_disk_alone(tmp_path):
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    make_folder(as_path("fake://b/run/submissions"))
    assert not OBJECTS
