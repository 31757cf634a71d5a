"""Several real processes on one machine, joined through `jax.distributed`, against a single one."""

import json
import os
import socket
import subprocess
import sys

import pytest
from helpers.eval_world import build_world

from hybridvlm import distributed


@pytest.fixture(scope="module")
def evaluate(tmp_path_factory):
    """The evaluation command on a micro model, but for its output folder."""
    world = build_world(tmp_path_factory.mktemp("world"))
    options = ["--model", str(world / "micro"), "--tasks", str(world / "q.jsonl"), "--batch-size", "4"]
    return ["-m", "hybridvlm.eval", *options, "--methods", "str", "--budgets", "0.5", "--output"]


def start(args: list[str], address: str, index: int, count: int = 2, devices: int = 4) -> subprocess.Popen:
    """One process of `count`, with CPU devices of its own."""
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        distributed.ADDRESS: address,
        distributed.COUNT: str(count),
        distributed.INDEX: str(index),
    }
    return subprocess.Popen(
        [sys.executable, *args], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def run_both(args: list[list[str]], timeout: float = 240) -> list[tuple[int, str]]:
    """(exit code, output) of two processes; both are killed when one does not end."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    processes = [start(own, address, index) for index, own in enumerate(args)]
    try:
        return [(p.returncode, out) for p in processes for out in [p.communicate(timeout=timeout)[0]]]
    finally:
        for process in processes:
            process.kill()


def test_environment_is_checked():
    with pytest.raises(ValueError, match="go together"):
        distributed.initialize({distributed.COUNT: "2"})
    with pytest.raises(ValueError, match="go together"):
        distributed.initialize({distributed.ADDRESS: "a:1"})
    with pytest.raises(ValueError, match="whole numbers"):
        distributed.initialize({distributed.ADDRESS: "a:1", distributed.COUNT: "two", distributed.INDEX: "0"})
    with pytest.raises(ValueError, match=r"0\.\.JAX_NUM_PROCESSES-1 = 0\.\.1, got 2"):
        distributed.initialize({distributed.ADDRESS: "a:1", distributed.COUNT: "2", distributed.INDEX: "2"})
    assert distributed.initialize({}) == distributed.Process(0, 1)
    assert distributed.initialize({"SLURM_NTASKS": "8"}) == distributed.Process(
        0, 1
    )  # a batch script that starts its steps elsewhere
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
    assert len({a["batch"] for a in answers}) == 5  # 18 questions, four at a time: the tail is filled up
    assert not (parts[1] / "results.json").exists() and not list(parts[1].glob("samples-*"))


def test_one_failing_process_ends_both_with_its_reason(evaluate, tmp_path):
    file = tmp_path / "in-the-way"
    file.write_text("")
    ended = run_both([[*evaluate, str(tmp_path / "a")], [*evaluate, str(file)]])
    assert [code for code, _ in ended] == [2, 2], ended
    assert "process 1: InputError: --output" in ended[0][1]
