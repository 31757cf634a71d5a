"""Several real processes on one machine, joined through `jax.distributed`, against a single one."""

import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from helpers.eval_world import build_world
from helpers.processes import run_both, start_both

from hybridvlm import distributed


@pytest.fixture(scope="module")
def evaluate(tmp_path_factory):
    """The evaluation command on a micro model, but for its output folder."""
    world = build_world(tmp_path_factory.mktemp("world"))
    options = ["--model", str(world / "micro"), "--tasks", str(world / "q.jsonl"), "--batch-size", "4"]
    return ["-m", "hybridvlm.eval", *options, "--methods", "str", "--budgets", "0.5", "--output"]


def test_a_process_alone_gathers_its_own():
    assert distributed.gather(b"alone") == [b"alone"]


@pytest.mark.slow
def test_evaluation_of_two_processes_is_that_of_one(evaluate, tmp_path):
    one = subprocess.run(
        [sys.executable, *evaluate, str(tmp_path / "one")], env=os.environ | {"JAX_PLATFORMS": "cpu"}, timeout=240
    )
    assert one.returncode == 0
    # each host has a disk of its own
    parts = [tmp_path / "a", tmp_path / "b"]
    ended = run_both([[*evaluate, str(folder)] for folder in parts])
    assert [code for code, _ in ended] == [0, 0], ended
    alone, both = (json.loads((f / "results.json").read_text()) for f in (tmp_path / "one", parts[0]))
    assert both["metadata"]["processes"] == 2
    for row, other in zip(alone["rows"], both["rows"], strict=True):
        for name in ("method", "n", "accuracy", "by_type", "retention_achieved"):
            assert row[name] == other[name], name
    answers = [json.loads(line) for line in (parts[0] / "samples.jsonl").read_text().splitlines()]
    assert len({(a["key"]) for a in answers}) == 2 * 18
    # three videos each, so nine questions, four at a time: the tail is filled up, and no number is used twice
    assert len({a["batch"] for a in answers}) == 6
    assert "process 1 of 2 (JAX's variables): 4 of 8 devices" in ended[1][1]
    assert not (parts[1] / "results.json").exists() and not list(parts[1].glob("samples-*"))


def test_one_failing_process_ends_both_with_its_reason(evaluate, tmp_path):
    file = tmp_path / "in-the-way"
    file.write_text("")
    ended = run_both([[*evaluate, str(tmp_path / "a")], [*evaluate, str(file)]])
    assert [code for code, _ in ended] == [2, 2], ended
    assert "process 1: InputError: --output" in ended[0][1]


@pytest.mark.slow
def test_processes_with_different_weights_are_refused(evaluate, tmp_path):
    """As where a host still has an older copy: the configurations are the same, and so is what each writes."""
    folder = pathlib.Path(evaluate[evaluate.index("--model") + 1])
    other = shutil.copytree(folder, tmp_path / "micro")
    (weights,) = other.glob("*.safetensors")
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    commands = [[*evaluate, str(tmp_path / name)] for name in "ab"]
    commands[1][commands[1].index(str(folder))] = str(other)
    ended = run_both(commands)
    assert [code for code, _ in ended] == [2, 2], ended
    assert all("the processes have different weights under this name" in text for _, text in ended)
    assert not list(tmp_path.glob("*/samples*"))


def answers(folder) -> list[dict]:
    """All that the parts of a run hold."""
    return [json.loads(line) for part in folder.glob("samples*.jsonl") for line in part.read_text().splitlines()]


# an evaluation that takes 4 s for each of 18 answers of a process: far longer than any of them may live once one has failed
SLOWLY = """
import sys, time
from hybridvlm import distributed
from hybridvlm.eval import runner
from hybridvlm.eval.__main__ import main
answer, failing = runner.Runner._answer, sys.argv.pop(1)
def slowly(self, *args):
    if failing == str(distributed.here().index) and self.store.records:
        raise OSError(28, "No space left on device")
    found = answer(self, *args)
    time.sleep(4)
    return found
runner.Runner._answer = slowly
distributed.leave(main(sys.argv[1:]))
"""


def wait_for_answers(folder) -> None:
    until = time.monotonic() + 200
    while not any(part.stat().st_size for part in folder.glob("samples*.jsonl")) and time.monotonic() < until:
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_while_answering_ends_both_at_once(evaluate, tmp_path, failing):
    shared = tmp_path / "shared"
    command = ["-c", SLOWLY, str(failing), *evaluate[2:], str(shared), "--batch-size", "1"]
    both = start_both([command, command])
    try:
        wait_for_answers(shared)
        began = time.monotonic()
        out = [process.communicate(timeout=100)[0] for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [1, 1], out
    assert time.monotonic() - began < 30
    assert f"process {failing}: OSError: [Errno 28] No space left" in out[1 - failing]
    assert "No space left on device" in out[failing] and not (shared / ".lock").exists()


@pytest.mark.slow
def test_a_run_that_was_told_to_end_goes_on_with_another_number_of_processes(evaluate, tmp_path):
    """SIGTERM to one of two ends both with 143; another number of processes and another batch size goes on; the end is the same."""
    shared, alone = tmp_path / "shared", tmp_path / "alone"
    slowly = ["-c", SLOWLY, "none", *evaluate[2:], str(shared), "--batch-size", "1"]
    both = start_both([slowly, slowly])
    try:
        wait_for_answers(shared)
        both[1].send_signal(signal.SIGTERM)
        began = time.monotonic()
        out = [process.communicate(timeout=100)[0] for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [143, 143], out
    assert time.monotonic() - began < 20 and not (shared / ".lock").exists()
    assert "process 1: Terminated" in out[0] and "the same command goes on" in out[1]
    before = answers(shared)
    assert 0 < len(before) < 36 and not (shared / "results.json").exists()

    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    for folder in (shared, alone):
        assert subprocess.run([sys.executable, *evaluate, str(folder)], env=env, timeout=240).returncode == 0
    after, whole = answers(shared), answers(alone)
    assert not (shared / ".lock").exists() and [p.name for p in shared.glob("samples*")] == ["samples.jsonl"]
    # nothing that was answered is asked again, but for dense where its clock goes along
    keys = [answer["key"] for answer in after if answer["method"] != "none"]
    assert len(keys) == len(set(keys)) == 18
    said = lambda found: {a["key"]: (a["prediction"], a["correct"], a["method"]) for a in found}  # noqa: E731
    assert said(after) == said(whole) and set(said(before)) <= set(said(after))
    rows, other = (json.loads((folder / "results.json").read_text())["rows"] for folder in (shared, alone))
    for row, same in zip(rows, other, strict=True):
        for name in ("method", "n", "accuracy", "by_type", "retention_achieved", "predictions_changed"):
            assert row.get(name) == same.get(name), name


STUCK = """
import ctypes, threading
from hybridvlm import distributed
distributed.LAST = 0.5
with distributed.ends_on_sigterm():
    # by then it is stuck
    threading.Timer(1.0, print, ("in",), {"flush": True}).start()
    # locked by whoever waits for it: as in XLA, no signal brings the main thread back to Python
    mutex = (ctypes.c_char * 128)()
    ctypes.CDLL(None).pthread_mutex_lock(mutex)
    ctypes.CDLL(None).pthread_mutex_lock(mutex)
"""


def test_a_main_thread_that_never_returns_to_python_is_ended():
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ
    )
    try:
        assert process.stdout.readline() == "in\n"
        process.terminate()
        assert process.wait(30) == 143
        assert "told to end by SIGTERM, and ended while at work" in process.stderr.read()
    finally:
        process.kill()


def test_who_listened_to_signals_before_goes_on_hearing_them():
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    reader.settimeout(10)
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    signal.signal(signal.SIGUSR1, lambda number, frame: None)
    before = signal.set_wakeup_fd(writer.fileno())
    try:
        with distributed.ends_on_sigterm(), distributed.ends_on_sigterm():
            signal.raise_signal(signal.SIGUSR1)
            assert reader.recv(8) == bytes([signal.SIGUSR1])
        assert signal.getsignal(signal.SIGTERM) == handlers[0]
        found = []
        with distributed.ends_on_sigterm():
            other = threading.Thread(target=lambda: found.append(distributed.ends_on_sigterm().__enter__()))
            other.start()
            other.join()
        assert found == [None] and signal.set_wakeup_fd(writer.fileno()) == writer.fileno()
    finally:
        signal.set_wakeup_fd(before)
        signal.signal(signal.SIGUSR1, handlers[1])
        reader.close()
        writer.close()


FORKS = """
import os, signal, time
from hybridvlm import distributed
distributed.LAST = 0.2
with distributed.ends_on_sigterm():
    child = os.fork()
    if not child:
        signal.signal(signal.SIGTERM, lambda *_: os._exit(7))
        time.sleep(30)
    time.sleep(0.5)
    os.kill(child, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    time.sleep(1)
"""


def test_the_end_of_a_forked_child_is_not_that_of_its_parent():
    ended = subprocess.run([sys.executable, "-c", FORKS], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr


WAITS = """
import time
from hybridvlm import distributed
me = distributed.initialize()
with distributed.ends_on_sigterm(), distributed.together():
    distributed.gather(b"both are there")
    print("in", flush=True)
    if me.index == 0:
        time.sleep(100)
    distributed.gather(b"waits for process 0")
"""


@pytest.mark.slow
def test_sigterm_in_a_collective_ends_both():
    both = start_both([["-c", WAITS]] * 2)
    try:
        for process in both:
            while process.stdout.readline() not in ("in\n", ""):
                pass
        time.sleep(1)
        both[1].send_signal(signal.SIGTERM)
        began = time.monotonic()
        out = [process.communicate(timeout=60)[0] for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [143, 143], out
    assert time.monotonic() - began < 20 and "process 1: Terminated" in out[0]


@pytest.mark.slow
def test_one_process_told_to_end_leaves_nothing_held(evaluate, tmp_path):
    process = subprocess.Popen(
        [sys.executable, *evaluate, str(tmp_path / "out"), "--batch-size", "1"],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stderr=subprocess.PIPE,
        text=True,
    )
    until = time.monotonic() + 200
    while not (tmp_path / "out" / "samples.jsonl").exists() and time.monotonic() < until:
        time.sleep(0.01)
    process.terminate()
    assert process.wait(60) == distributed.TERMINATED == 143
    assert "told to end by SIGTERM" in process.stderr.read()
    assert not (tmp_path / "out" / ".lock").exists() and answers(tmp_path / "out")


@pytest.mark.slow
def test_a_model_over_two_processes_answers_as_on_one_device(evaluate, tmp_path):
    """One mesh of both processes' devices, a damaged video that only one of them has, and a run that was killed on the way."""
    world = pathlib.Path(evaluate[evaluate.index("--tasks") + 1]).parent
    one, both = tmp_path / "one", tmp_path / "both"
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    assert subprocess.run([sys.executable, *evaluate, str(one)], env=env, timeout=240).returncode == 0
    command = [*evaluate, str(both), "--mesh", "sequence=4,tensor=2"]
    ended = run_both([command, command])
    assert [code for code, _ in ended] == [0, 0], ended
    assert "2 processes run one model over the devices of all of them (mesh sequence=4,tensor=2)" in ended[0][1]
    said = lambda folder: {a["key"]: (a["prediction"], a["correct"], a["method"]) for a in answers(folder)}  # noqa: E731
    assert said(one) == said(both) and len(said(one)) == 36
    assert [p.name for p in both.glob("samples*")] == ["samples.jsonl"]
    # half of the answers are lost, and the rest is found again: dense of them once more, for its clock
    lines = (both / "samples.jsonl").read_text().splitlines()
    (both / "samples.jsonl").write_text("\n".join(lines[:20]) + "\n")
    ended = run_both([command, command])
    assert [code for code, _ in ended] == [0, 0], ended
    assert said(one) == said(both)
    # hosts with different files are told before anything is answered
    other = shutil.copytree(world, tmp_path / "other")
    shutil.copy(other / "v0.mp4", other / "v1.mp4")
    commands = [[*evaluate, str(tmp_path / name), "--mesh", "sequence=4,tensor=2"] for name in ("c", "d")]
    commands[1][commands[1].index("--tasks") + 1] = str(other / "q.jsonl")
    ended = run_both(commands)
    assert [code for code, _ in ended] == [2, 2], ended
    assert all("processes 0 and 1 have different videos under the name 'v1.mp4'" in text for _, text in ended)


# the second process cannot read one of the videos, as where its disk fails
UNREAD = """
import sys
from hybridvlm import distributed
from hybridvlm.eval.__main__ import main
from hybridvlm.eval.tasks import files
from hybridvlm.video import VideoError
clip = files.FileTask.clip
def failing(self, video, pixels=True):
    if pixels and distributed.here().index == 1 and video == "v1.mp4":
        raise VideoError("v1.mp4: the disk gave up")
    return clip(self, video, pixels)
files.FileTask.clip = failing
distributed.leave(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_video_that_one_of_two_cannot_read_is_asked_by_neither(evaluate, tmp_path):
    command = ["-c", UNREAD, *evaluate[2:], str(tmp_path / "a"), "--mesh", "data=4,tensor=2"]
    ended = run_both([command, command])
    assert [code for code, _ in ended] == [0, 0], ended
    failed = {a["video"]: a["failure"] for a in answers(tmp_path / "a") if "failure" in a}
    assert failed == {"v1.mp4": "v1.mp4: the disk gave up"}
    assert len({a["key"] for a in answers(tmp_path / "a")}) == 36
