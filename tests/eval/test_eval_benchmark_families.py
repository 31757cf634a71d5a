"""The command on published benchmarks with tiny checkpoints of every family that compute: killed, resumed, and on two processes."""

import functools
import json

import pytest
from helpers.processes import run_both
from test_eval_benchmarks import FAMILIES, NAMES, arguments, run, world

from hybridvlm.eval import evaluate, report
from hybridvlm.eval.runner import Runner

__all__ = ["world"]  # the fixture of the checkpoints and the data


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_answers_every_benchmark(world, tmp_path, monkeypatch, capsys, name):
    """Dense and a quarter of every task: a run that is killed and goes on gives the answers of one of two processes, each once."""
    # one model, and so one set of programs, for the runs of this process; what pictures look like is no matter
    monkeypatch.setattr(evaluate, "load", functools.cache(evaluate.load))
    monkeypatch.setattr(report, "picture", lambda *args: b"")
    methods, more = "str", ["--limit", "4"]

    def answers(output):
        records = [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]
        assert len({r["key"] for r in records}) == len(records)
        return {(r["method"], r["task"], r["id"]): (r["prediction"], r.get("how"), r["retention"]) for r in records}

    answer, calls = Runner._answer, []

    def killed(self, *args):
        calls.append(args)
        if len(calls) > 12:
            raise KeyboardInterrupt
        return answer(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Runner, "_answer", killed)
        assert run(world, tmp_path / "out", *more, name=name, methods=methods) == 130
    kept = answers(tmp_path / "out")
    assert len({task for _, task, _ in kept}) > 2
    assert run(world, tmp_path / "out", *more, name=name, methods=methods) == 0, capsys.readouterr().err
    found = answers(tmp_path / "out")
    assert kept.items() < found.items() and {task for _, task, _ in found} == set(NAMES)
    rows = json.loads((tmp_path / "out/results.json").read_text())["rows"]
    assert len(rows) == 2 * len(NAMES)
    for row in rows:
        assert 0 < row["n"] <= 4 or row["task"] == "longvideobench-test"
        if row["method"] == "str" and row["n"]:
            assert row["retention_mean"] == pytest.approx(0.25, abs=0.08)
            assert row["retention_achieved"] == pytest.approx(row["retention_mean"], abs=0.08)
    before = (tmp_path / "out/samples.jsonl").read_bytes()
    assert run(world, tmp_path / "out", *more, name=name, methods=methods) == 0
    assert (tmp_path / "out/samples.jsonl").read_bytes() == before
    given = arguments(world, tmp_path / "two", name=name, methods=methods)
    ended = run_both([["-m", "hybridvlm.eval", *given, *more]] * 2, timeout=900, devices=1)
    assert [code for code, _ in ended] == [0, 0], ended
    assert answers(tmp_path / "two") == found
