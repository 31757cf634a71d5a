"""The analyses as commands, on small random checkpoints: what they write, that they resume, and what they refuse."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest

from hybridvlm.analyze import __main__ as analyze
from hybridvlm.analyze import ablate, ablate_checkpoints, controls, probe, rivals
from hybridvlm.analyze.common import load_model, write_figure
from hybridvlm.checkpoints.folder import save_folder
from hybridvlm.config import Buckets, Reduction, Schedule
from hybridvlm.config_files import load_model_config
from hybridvlm.eval import runner
from hybridvlm.eval.runner import Runner
from hybridvlm.models import nemotron_vl
from hybridvlm.models.prompt import PromptStyle
from hybridvlm.tiny import needle
from hybridvlm.tiny.resume import write_checkpoint


def write_random(root, **checkpoints):
    """{name: folder} of small random checkpoints, each of a pattern and a seed; seeds of one pattern share a program."""
    out, programs = {}, {}
    for name, (pattern, seed) in checkpoints.items():
        config = dataclasses.replace(load_model_config("tiny"), pattern=pattern, name=name)
        if pattern not in programs:
            programs[pattern] = jax.jit(lambda key, config=config: nemotron_vl.init(config, key))
        params = programs[pattern](jax.random.key(seed))
        write_checkpoint(root / name, config, params, name, Reduction("str", 0.5, schedule=Schedule(start=0)))
        out[name] = str(root / name)
    return out


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two seeds of a small hybrid, and one Transformer of as many layers."""
    return write_random(tmp_path_factory.mktemp("checkpoints"), h0=("M*M*", 0), h1=("M*M*", 1), t0=("****", 0))


def run(capsys, *argv):
    code = analyze.main([str(a) for a in argv])
    told = capsys.readouterr()
    return code, told.out, told.err


def test_help_and_what_is_refused(capsys, folders, tmp_path):
    assert run(capsys)[0] == 2 and run(capsys, "--help")[0] == 0
    assert "there are: sparsity, stability" in run(capsys, "sparsety")[2]
    for name in analyze.ANALYSES:
        with pytest.raises(SystemExit) as done:
            analyze.main([name, "--help"])
        assert done.value.code == 0 and f"hybridvlm.analyze {name}" in capsys.readouterr().out
    (tmp_path / "file").write_text("")
    for argv, words in (
        (["sparsity", "--model", "no/such"], "no/such"),
        (["sparsity", "--model", folders["h0"], "--video", "x.mp4"], "--question"),
        (["stability", "--model", folders["h0"], "--top", "2"], "--top"),
        (["stability", "--model", folders["h0"], "--videos", "0"], "--videos must be at least 1"),
        (["stability", "--model", folders["h0"], "--frames", "0"], "--frames must be at least 1"),
        (["deletion", "--model", folders["h0"], "--layers", "9"], "layer 9"),
        (["deletion", "--model", folders["h0"], "--videos", "0"], "--videos must be at least 1"),
        (["lookahead", "--model", "no/such", "--per-video", "1"], "at least 2 by --per-video"),
        (["lookahead", "--model", folders["h0"], "--top", "0"], "--top"),
        (["calibrate", "--model", "no/such", "--per-video", "1"], "at least 2 by --per-video"),
        (["calibrate", "--model", "no/such", "--compare", "-1"], "--compare"),
        (["calibrate", "--model", folders["h0"], "--budget", "2"], "budget"),
        (["sparsity", "--model", folders["h0"], "--output", "/proc/no/folder"], "/proc/no"),
        (["probe", "--model", folders["h0"], "--layers", "x"], "--layers"),
        (["ablate", "--models", folders["h0"], "--sets", "none"], "--sets"),
        (["ablate", "--models", folders["h0"], "--output", tmp_path / "file"], "is a file"),
        (["probe", "--model", folders["h0"], "--videos", "2"], "--videos"),
        (["rivals", "--models", folders["h0"], "--limit", "-1"], "--limit"),
        (["rivals", "--models", folders["h0"], "--tasks", "needle,videomme"], "'videomme'"),
        (["rivals", "--models", folders["h0"], "--tasks", "needle,needle"], "each once"),
        (["rivals", "--models", folders["h0"], "--methods", "str"], "'str'"),
        (["rivals", "--models", folders["h0"], "--methods", "evs,evs"], "each once"),
        (["rivals", "--models", folders["h0"], "--methods", "evs:0.5"], "did you mean 'evs'"),
        (["rivals", "--models", folders["h0"], "--methods", ","], "at least one"),
        (["rivals", "--models", "tiny-vamba"], "two streams"),
        (["rivals", "--models", folders["h0"], "--methods", "vidcom"], "vidcom2"),
    ):
        code, _, error = run(capsys, *argv)
        assert code == 2 and words in error, argv


@pytest.fixture(scope="module")
def stamped(folders, tmp_path_factory):
    """A checkpoint with text around each frame: 196 tokens in all of 64 frames, and 197 for a plan that counts 3 for each."""
    model = load_model(folders["h0"])
    style = PromptStyle(frame="none ?", after_frame="none")
    folder = tmp_path_factory.mktemp("stamped") / "h0"
    save_folder(folder, dataclasses.replace(model, style=style, buckets=Buckets((64,), (196, 320), 4)))
    return str(folder)


def test_cells_that_drop_text_are_planned_at_a_bucket_that_has_room_for_it(capsys, stamped, tmp_path, monkeypatch):
    monkeypatch.setattr(ablate, "_estimate", lambda *_: "")  # it compiles a dense pass
    argv = ["ablate", "--models", stamped, "--sets", "", "--budget", 0.5, "--limit", 2, "--dry-run"]
    model = load_model(stamped)
    for options, text in (([], 196), (["--cell", "fewer: drop_text=best-frames"], 320)):
        code, out, error = run(capsys, *argv, *options, "--output", tmp_path / str(text))
        assert code == 0, error
        for rule, cell in (("none", "str"), ("best-frames", "fewer"))[: 1 + bool(options)]:
            plan = model.plan(dataclasses.replace(model.reduction, drop_text=rule), 64, text)
            (row,) = (
                line.split() for line in out.splitlines() if line.count("|") > 2 and line.split("|")[2].strip() == cell
            )
            assert f"{plan.flop_ratio:.3f}" in row, (out, plan.flop_ratio)


@pytest.mark.slow
def test_cells_that_drop_text_answer_under_the_plans_that_were_shown(capsys, stamped, tmp_path):
    argv = ["ablate", "--models", stamped, "--sets", "", "--budget", 0.5, "--limit", 2, "--batch-size", 2]
    code, _, error = run(capsys, *argv, "--cell", "fewer: drop_text=best-frames", "--output", tmp_path)
    assert code == 0, error
    rows = {row["cell"]: row for row in json.loads((tmp_path / "ablation.json").read_text())["rows"]}
    assert rows["fewer"]["flops"] < rows["str"]["flops"] and rows["fewer"]["kept_mean"] == rows["str"]["kept_mean"]
    assert rows["dense"]["accuracy"] is not None


@pytest.mark.slow
def test_scores_of_a_hybrid_and_of_a_transformer(capsys, folders, tmp_path):
    few = ("--videos", 2, "--per-video", 2, "--frames", 8)
    for name in ("h0", "t0"):
        code, _, error = run(capsys, "sparsity", "--model", folders[name], *few, "--output", tmp_path / name)
        assert code == 0, error
        layers = json.loads((tmp_path / name / "sparsity.json").read_text())["layers"]
        assert [row["kind"] for row in layers] == list(load_model(folders[name]).config.pattern)
        for row in layers:
            held = list(row["abs"]["holding"].values())
            assert held == sorted(held) and 0 < held[0] <= held[-1] <= 1
        assert (tmp_path / name / "sparsity.png").stat().st_size > 1000
    code, out, error = run(capsys, "stability", "--model", folders["h0"], *few, "--output", tmp_path / "s")
    assert code == 0, error
    matrix = np.array(json.loads((tmp_path / "s" / "stability.json").read_text())["matrices"]["kendall"])
    np.testing.assert_allclose(np.diag(matrix), 1, atol=0.01)
    assert "M-*" in out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["h0", "t0"])
def test_looking_ahead_of_a_hybrid_and_of_a_transformer(capsys, folders, tmp_path, name):
    few = ("--videos", 2, "--per-video", 2, "--frames", 8)
    code, out, error = run(capsys, "lookahead", "--model", folders[name], *few, "--output", tmp_path)
    assert code == 0 and "follows the question most" in out, error
    layers = json.loads((tmp_path / "lookahead.json").read_text())["layers"]
    assert sorted({row["layer"] for row in layers}) == [0, 1, 2]
    assert all(
        0 <= row["held"] <= 1 and -1 <= row["rank"] <= 1 and row["recall"] in (0, 0.25, 0.5, 0.75, 1) for row in layers
    )
    assert (tmp_path / "lookahead.png").stat().st_size > 1000


@pytest.mark.slow
def test_an_ablation_resumes_and_compares_seeds(capsys, folders, tmp_path, monkeypatch):
    argv = ["ablate", "--models", f"hybrid={folders['h0']},{folders['h1']}", f"twin={folders['t0']}", "--sets", ""]
    argv += ["--cell", "mamba: method=oneshot-mamba match=on", "--budget", 0.5, "--limit", 4, "--batch-size", 2]
    argv += ["--output", tmp_path / "a"]
    with monkeypatch.context() as patch:
        patch.setattr(ablate, "_estimate", lambda *_: "")  # it compiles a dense pass, which the run below shares
        code, out, _ = run(capsys, *argv, "--dry-run")
    assert code == 0 and "answers to find" in out and not (tmp_path / "a" / "ablation.json").exists()

    answered, real = [], ablate_checkpoints.Checkpoint.run

    def stops(self, cell, progress):
        if len(answered) == 2:
            raise KeyboardInterrupt
        answered.append((self.name, getattr(cell, "name", "dense")))
        real(self, cell, progress)

    with monkeypatch.context() as patch:
        patch.setattr(ablate_checkpoints.Checkpoint, "run", stops)
        code, out, _ = run(capsys, *argv)
        assert code == 130 and "ms each when dense" in out
    kept = {path.name: path.read_text() for path in (tmp_path / "a" / "answers").iterdir()}
    assert sum(text.count("\n") for text in kept.values()) == 8

    with monkeypatch.context() as patch:
        patch.setattr(ablate, "_estimate", lambda *_: "")
        code, _, error = run(capsys, *argv)
    assert code == 0, error
    for name, text in kept.items():
        assert (tmp_path / "a" / "answers" / name).read_text().startswith(text)
    results = json.loads((tmp_path / "a" / "ablation.json").read_text())
    rows = {(r["group"], r["cell"]): r for r in results["rows"]}
    assert set(rows) == {(g, c) for g in ("hybrid", "twin") for c in ("dense", "str", "mamba")} - {("twin", "mamba")}
    assert len(rows["hybrid", "str"]["accuracy"]["each"]) == 2 and rows["twin", "str"]["accuracy"]["ci95_seeds"] is None
    assert any("mamba is left out" in line for line in results["notes"])
    assert rows["hybrid", "mamba"]["flops"] == pytest.approx(rows["hybrid", "str"]["flops"], rel=0.02)
    assert rows["hybrid", "dense"]["to_dense"] is None  # nothing to differ by, so no interval
    assert {(c["cell"], "loss to dense mean" in c) for c in results["between_groups"]} == {
        ("dense", False),
        ("str", True),
    }

    def nothing(self, cell, progress):
        raise AssertionError("a cell that is done is run again")

    monkeypatch.setattr(ablate_checkpoints.Checkpoint, "run", nothing)
    code, out, error = run(capsys, *argv)
    assert code == 0 and "nothing is left" in out, error


@pytest.mark.slow
@pytest.mark.parametrize("name", ["t0", pytest.param("h0", marks=pytest.mark.slow)])
def test_what_is_read_of_a_dropped_token_is_what_a_prefill_leaves(folders, name):
    """The walk layer by layer against the decoder's own prefill, with the tokens dropped after layer 1."""
    from hybridvlm.analyze.deletion import Deletion
    from hybridvlm.nn.decoder import prefill
    from hybridvlm.nn.incremental import extend_shared
    from hybridvlm.tiny.bank import make_bank
    from hybridvlm.tiny.shared import video_tokens

    model = load_model(folders[name])
    bank = make_bank(model.params, model.config, probe.FRAMES, 4, 0, split="val")
    sample, chosen, _ = probe._targets(bank, probe.PART, 0)[0][0]
    doomed = np.zeros((probe.PART, probe.FRAMES * 16), bool)
    doomed[np.arange(probe.PART)[:, None], chosen] = True
    found = probe._read(model, bank, sample, chosen, [1])
    tokens = video_tokens(model.params, bank.tokens, sample["cells"])
    score = np.where(doomed, -1.0, 1.0)
    plan = Deletion(1, probe.TARGETS, tokens.length)

    def both(params, tokens, rows):
        out = prefill(params["decoder"], model.config, tokens, plan=plan, score_fn=lambda *_: score)
        x = params["embed"][rows]
        shared = extend_shared(params["decoder"], model.config, x, np.ones(rows.shape, np.int32), out.caches)
        return out.caches, shared.residual[3]

    caches, last = jax.jit(both)(model.params, tokens, sample["rows"])
    np.testing.assert_allclose(found[1]["text"][:, : last.shape[-1]], last[:, -1], atol=1e-4)
    assert list(found[1]["states"]) == [i for i, kind in enumerate(model.config.pattern) if kind == "M"]
    for j, state in found[1]["states"].items():
        np.testing.assert_allclose(state, caches[j].ssm, atol=1e-4)
    if name == "h0":
        assert not np.allclose(found[-1]["states"][0], found[None]["states"][0], atol=1e-4)
        np.testing.assert_array_equal(found[1]["states"][0], found[None]["states"][0])  # layer 0 saw the token


@pytest.mark.slow
def test_calibration_is_written_and_taken_by_a_plan(capsys, folders, tmp_path):
    out = tmp_path / "c"
    argv = [
        "calibrate",
        "--model",
        folders["h0"],
        "--videos",
        2,
        "--per-video",
        2,
        "--frames",
        8,
        "--skip",
        0,
        "--budget",
        0.6,
    ]
    code, told, error = run(capsys, *argv, "--output", out)
    assert code == 0, error
    data = json.loads((out / "calibration.json").read_text())
    assert len(data["layer_weights"]) == 4 and data["reduction"]["method"] == "str-calibrated"
    from hybridvlm.config import from_dict
    from hybridvlm.reduction import make_plan

    reduction = from_dict(Reduction, data["reduction"])
    plan = make_plan(reduction, load_model(folders["h0"]).config, visual_tokens=128, text_tokens=8, frames=8)
    assert plan.decoder_method == "str-calibrated" and plan.schedule.layer_weights == tuple(data["layer_weights"])
    assert f"layer_weights={','.join(f'{t:g}' for t in data['layer_weights'])}" in told


MEASURED = rivals._weights


@pytest.fixture
def uncalibrated(monkeypatch):
    """Layer weights of str-calibrated without the passes that measure them."""
    monkeypatch.setattr(rivals, "_weights", lambda named, notes: [0.0, 1.0, 1.0, 1.0])


@pytest.fixture
def planned(capsys, monkeypatch, tmp_path, uncalibrated):
    """planned(*argv) -> (checkpoints, cells by name, notes) of `rivals`, which stops before anything is answered."""
    seen = []

    def stop(asking):
        seen.extend(asking)
        raise ValueError("planned")

    monkeypatch.setattr(rivals, "_answer", stop)

    def plan(*argv):
        argv = ["rivals", *argv, "--tasks", "needle", "--limit", 4, "--output", tmp_path / "planned"]
        code, _, error = run(capsys, *argv)
        assert code == 2 and error.endswith("error: planned\n"), error
        _, checkpoints, cells = seen.pop()
        return checkpoints, {one.name: one for one in cells}, error

    return plan


def test_rivals_meet_the_share_and_the_flops_of_str(planned, folders):
    controls.register()
    assert not {"str", "none", controls.SECOND} & set(rivals.rivals()) and "visionzip" in rivals.rivals()
    argv = ["--models", folders["h0"], "--methods", "evs,tome,random,visionzip"]
    (checkpoint,), cells, notes = planned(*argv, "--budget", 0.5)
    assert list(cells) == [
        *("str", "str-lookahead", "str-calibrated", "evs", "tome", "random"),
        *("evs, FLOPs of str", "tome, FLOPs of str", "evs:0.7071+str:0.7071", "tome:0.7071+str:0.7071"),
    ]
    assert "left out: visionzip, visionzip, FLOPs of str, visionzip:0.7071+str:0.7071: visionzip ranks by" in notes
    # the schedule of str, and so its FLOPs
    assert cells["random"].set == rivals.BOTH and cells["evs"].set == rivals.MEAN
    own = checkpoint.plan(cells["str"])
    for name, one in cells.items():
        plan = checkpoint.plan(one)
        if one.set == rivals.FLOPS:
            assert plan.total_flop_ratio == pytest.approx(own.total_flop_ratio, rel=0.02) or f"{name}: its" in notes
        elif abs(plan.retention_mean / 0.5 - 1) > 0.02:
            assert (
                f"{name}: its mean share of visual tokens is {plan.retention_mean:.3f} where 0.5 was to be met" in notes
            )
    # 11 of 16 tokens a frame, in place of 0.7071 of them
    assert "tome:0.7071+str:0.7071: its mean share of visual tokens is 0.48" in notes


def test_rivals_say_which_checkpoint_cannot_take_a_method(planned, folders):
    both = [folders["h0"], folders["t0"]]
    # ranks after Mamba layers alone; a schedule that is written out, and layer weights that bend one
    written = ["--schedule", "shape=list", "values=1,0.7,0.5,0.3", "--budget", 0.6]
    _, cells, notes = planned("--models", *both, "--methods", "utrc,random", *written)
    assert list(cells) == ["str", "str-lookahead", "random"]
    assert "left out: utrc: utrc drops after M, and these 4 layers have no such site" in notes
    assert f"(of {folders['t0']})" in notes and "left out: str-calibrated: str-calibrated takes a schedule" in notes


def test_a_rival_is_one_cell_for_both_only_where_all_checkpoints_say_so(planned, folders):
    both = [folders["h0"], folders["t0"]]
    checkpoints, cells, _ = planned("--models", *both, "--methods", "evs", "--budget", 0.65)
    near = [c.plan(cells["evs"]).total_flop_ratio / c.plan(cells["str"]).total_flop_ratio > 0.98 for c in checkpoints]
    assert near == [True, False] and cells["evs"].set == rivals.MEAN and "evs, FLOPs of str" in cells


def test_rivals_have_the_flops_of_the_str_that_runs(planned, folders):
    """Where a schedule starts too late for the budget, all of it starts as early as it takes."""
    argv = ["--models", folders["h0"], "--methods", "frames,random", "--schedule", "start=2", "--budget", 0.7]
    (checkpoint,), cells, notes = planned(*argv)
    own, frames = (checkpoint.plan(cells[name]) for name in ("str", "frames, FLOPs of str"))
    assert "str: drops start after layer 1, to meet the budget" in notes and cells["random"].set == rivals.BOTH
    assert own.retention_mean == pytest.approx(0.7, rel=0.01)
    assert frames.total_flop_ratio == pytest.approx(own.total_flop_ratio, rel=0.02)


def test_rivals_are_compared_on_both_tasks_and_resume(capsys, tmp_path, monkeypatch, uncalibrated):
    """Two seeds of two layers, short videos, and without the cells that are planned like others: each compiles two programs."""
    cells_of = rivals.cells_of
    monkeypatch.setattr(needle, "FRAMES", 8)
    monkeypatch.setattr(runner, "TOGETHER", 2)  # of three cells, two with a dense of their own
    monkeypatch.setattr(
        rivals, "cells_of", lambda *given: [c for c in cells_of(*given) if c.name not in rivals.OWN[1:]]
    )
    seeds, output = write_random(tmp_path, s0=("M*", 0), s1=("M*", 1)), tmp_path / "rivals"
    argv = ["rivals", "--models", f"hybrid={seeds['s0']},{seeds['s1']}", "--methods", "evs"]
    argv += ["--budget", "0.64", "--limit", "8", "--batch-size", "4", "--output", output]
    code, _, error = run(capsys, *argv)
    assert code == 0, error
    assert (output / "rivals.png").stat().st_size
    results = json.loads((output / "rivals.json").read_text())
    cells = ["dense", "str", "evs", "evs:0.8+str:0.8"]
    rows = {(row["task"], row["cell"]): row for row in results["rows"]}
    assert list(rows) == [(task, cell) for task in rivals.TASKS for cell in cells]
    for (task, cell), row in rows.items():
        own, dense = rows[task, "str"], rows[task, "dense"]
        assert row["retention_mean"] == pytest.approx(1.0 if cell == "dense" else 0.64, abs=0.02)
        assert row["retention_achieved"] == pytest.approx(row["retention_mean"], abs=0.02)
        assert len(row["accuracy"]["each"]) == 2 and row["ttft_ms"] > row["prefill_ms"] > 0 and row["ttft_speedup"] > 0
        for other, name in ((own, "to_str"), (dense, "to_dense")):
            gap = row["accuracy"]["mean"] - other["accuracy"]["mean"]
            assert cell in ("dense", other["cell"]) or row[name]["mean"] == pytest.approx(gap)
        assert dense["total_flop_speedup"] == 1.0 < own["total_flop_speedup"] and dense["changed"] == 0.0
    for task in rivals.TASKS:
        assert f"* {task}, hybrid: of 2 cells, " in (output / "rivals.md").read_text()

    def nothing(self, *_):
        raise AssertionError("what is known was asked again")

    monkeypatch.setattr(Runner, "run", nothing)
    assert run(capsys, *argv)[0] == 0
    assert json.loads((output / "rivals.json").read_text())["rows"] == results["rows"]

    # later, slower runs, such as ones that answer further cells, have dense along: they say nothing of the cells of the first. Two of
    # them that had half of the questions each are less than the first, one that had all is the latest of equals.
    for runs, dense_ms in ((("8", "9"), None), (("9",), 2e5)):
        for path in (output / "answers").iterdir():
            known = [json.loads(line) for line in path.read_text().splitlines()]
            dense = list(
                {r["key"]: r | {"prefill_ms": 1e5, "encode_ms": 1e5} for r in known if r["method"] == "none"}.values()
            )
            slow = [r | {"run": runs[n % len(runs)]} for n, r in enumerate(dense)]
            path.write_text(path.read_text() + "".join(json.dumps(r) + "\n" for r in slow))
        assert run(capsys, *argv)[0] == 0
        for row in json.loads((output / "rivals.json").read_text())["rows"]:
            first = rows[row["task"], row["cell"]]
            later = dense_ms if row["cell"] == "dense" else None
            assert (row["ttft_ms"], row["ttft_speedup"]) == (later or first["ttft_ms"], first["ttft_speedup"]), row[
                "cell"
            ]


def test_rivals_without_times_are_drawn(capsys):
    """Of one video no time from pixels is known: its encoding is the first call of the tower's program."""
    known = {"mean": 0.5, "ci95_seeds": None, "ci95_videos": None}
    rows = [
        {"task": "needle", "group": "g", "cell": name, "set": set_, "accuracy": known, "ttft_speedup": None}
        for name, set_ in (("dense", ""), ("str", rivals.OURS))
    ]
    write_figure(pathlib.Path("/dev/null"), rivals.picture({"rows": rows}))


def test_the_report_names_what_beats_str_first():
    def row(cell, low, high):
        return {
            "task": "needle",
            "group": "g",
            "cell": cell,
            "to_str": {"mean": (low + high) / 2} | intervals(low, high),
        }

    def intervals(low, high):
        return {"ci95_seeds": None, "ci95_videos": [low, high]}

    first = rivals.verdicts([row("evs", -0.1, -0.02), row("dart", 0.01, 0.03), row("tome", -0.01, 0.03)])
    assert first == "* needle, g: of 3 cells, **dart** (+2.0 [+1.0, +3.0] points) beat str."
    assert rivals.verdicts([row("evs", -0.1, 0.0)]) == "* needle, g: of 1 cells, none beats str."
    over = {"mean": 0.02, "ci95_seeds": [-0.01, 0.05], "ci95_videos": [0.01, 0.03]}
    assert not rivals.beats(over) and not rivals.beats({"mean": 1.0} | intervals(None, None) | {"ci95_videos": None})


@pytest.mark.slow
def test_rivals_measure_the_layer_weights_of_the_first_checkpoint(planned, monkeypatch):
    monkeypatch.setattr(rivals, "_weights", MEASURED)
    _, cells, notes = planned("--models", "tiny-reduced", "--methods", "random")
    weights = cells["str-calibrated"].reduction.schedule.layer_weights
    pattern = load_model("tiny-reduced").config.pattern
    assert len(weights) == len(pattern) and 0 < sum(weights) < sum(kind in "M*" for kind in pattern)
    assert "trusts all layers" not in notes
