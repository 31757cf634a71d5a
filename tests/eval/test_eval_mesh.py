"""The commands on a mesh, in a process of its own with eight devices."""

import os
import pathlib
import subprocess
import sys

import pytest
from helpers.eval_world import build_world

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.slow
def test_commands_on_a_mesh_answer_as_on_one_device(tmp_path):
    """Answers, what was kept, and the keys that a killed run is resumed by; an axis that there is not is refused beforehand."""
    world = build_world(tmp_path)
    code = f"""
import contextlib, io, json
from hybridvlm import ask
from hybridvlm.eval import __main__ as command

def evaluate(output, *more):
    asked = ["--model", {str(world / "micro")!r}, "--tasks", {str(world / "q.jsonl")!r}, "--methods", "str", "--budgets", "0.6"]
    assert command.main([*asked, "--limit", "6", "--batch-size", "3", "--output", {str(tmp_path)!r} + "/" + output, *more]) == 0
    lines = open({str(tmp_path)!r} + f"/{{output}}/samples.jsonl").read().splitlines()
    return {{row["key"]: (row["prediction"], row["retention"]) for row in map(json.loads, lines)}}

def answer(*more):
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        code = ask.main([{str(world / "v0.mp4")!r}, "red", "--model", {str(world / "micro")!r}, *more])
    return code, said.getvalue()

one = evaluate("one")
assert len(one) == 12 and evaluate("eight", "--mesh", "data=-1,tensor=2") == one
assert answer()[0] == 0 and answer("--mesh", "tensor=2,data=4") == answer()
assert answer("--mesh", "model=8")[0] == 2 and answer("--mesh", "tensor=4,data=4")[0] == 2
print("same")
"""
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    env["XLA_FLAGS"] = f"{env.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.endswith("same\n"), done.stderr[-3000:] + done.stdout[-2000:]
