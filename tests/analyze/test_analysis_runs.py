"""The analyses as commands, on small random checkpoints: what they write, that they resume, and what they refuse."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from hybridvlm.analyze import __main__ as analyze
from hybridvlm.analyze import ablate, ablate_checkpoints, probe, rivals
from hybridvlm.analyze.common import load_model
from hybridvlm.checkpoints.folder import save_folder
from hybridvlm.config import Buckets, Reduction, Schedule
from hybridvlm.config_files import load_model_config
from hybridvlm.eval.runner import Runner
from hybridvlm.models import nemotron_vl
from hybridvlm.models.prompt import PromptStyle
from hybridvlm.tiny.resume import write_checkpoint


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two seeds of a small hybrid, and one Transformer of as many layers."""
    root, out = tmp_path_factory.mktemp("checkpoints"), {}
    for name, pattern, seed in (("h0", "M*M*", 0), ("h1", "M*M*", 1), ("t0", "****", 0)):
        config = dataclasses.replace(load_model_config("tiny"), pattern=pattern, name=name)
        params = jax.jit(lambda key, config=config: nemotron_vl.init(config, key))(jax.random.key(seed))
        write_checkpoint(root / name, config, params, name, Reduction("str", 0.5, schedule=Schedule(start=0)))
        out[name] = str(root / name)
    return out


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


def test_rivals_are_compared_on_both_tasks_and_resume(capsys, folders, tmp_path, monkeypatch):
    output = tmp_path / "rivals"
    argv = ["rivals", "--models", f"hybrid={folders['h0']},{folders['h1']}", "--methods", "evs,visionzip"]
    argv += ["--budget", "0.5", "--limit", "4", "--batch-size", "4", "--output", output]
    code, out, error = run(capsys, *argv)
    assert code == 0, error
    assert "visionzip ranks by the attention of the vision tower" in error and (output / "rivals.png").stat().st_size
    results = json.loads((output / "rivals.json").read_text())
    cells = ["dense", "str", "str-lookahead", "str-calibrated", "evs", "evs, FLOPs of str", "evs:0.7071+str:0.7071"]
    rows = {(row["task"], row["cell"]): row for row in results["rows"]}
    assert list(rows) == [(task, cell) for task in ("needle", "needle-scenes") for cell in cells]
    for task in ("needle", "needle-scenes"):
        own, dense = rows[task, "str"], rows[task, "dense"]
        assert own["retention_mean"] == pytest.approx(0.5, abs=0.01) == rows[task, "evs"]["retention_mean"]
        assert rows[task, cells[-1]]["retention_mean"] == pytest.approx(0.5, abs=0.02)
        # equal from pixels: what evs saves before layer 0 is met by keeping more
        assert rows[task, cells[5]]["total_flop_speedup"] == pytest.approx(own["total_flop_speedup"], rel=0.02)
        assert dense["total_flop_speedup"] == 1.0 < own["total_flop_speedup"] and dense["changed"] == 0.0
        for cell in cells:
            row = rows[task, cell]
            assert len(row["accuracy"]["each"]) == 2 and row["prefill_ms"] > 0
            assert row["retention_achieved"] == pytest.approx(row["retention_mean"], abs=0.02)
            gap = row["accuracy"]["mean"] - own["accuracy"]["mean"]
            assert cell in ("dense", "str") or row["to_str"]["mean"] == pytest.approx(gap)
    assert out.splitlines()[2].startswith("* needle, hybrid: ")

    def nothing(self, *_):
        raise AssertionError("what is known was asked again")

    monkeypatch.setattr(Runner, "run", nothing)
    assert run(capsys, *argv)[0] == 0
    assert json.loads((output / "rivals.json").read_text())["rows"] == results["rows"]


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
    assert first == "* needle, g: **dart** (+2.0 [+1.0, +3.0] points) beat str."
    assert rivals.verdicts([row("evs", -0.1, 0.0)]) == "* needle, g: no cell beats str."
    over = {"mean": 0.02, "ci95_seeds": [-0.01, 0.05], "ci95_videos": [0.01, 0.03]}
    assert not rivals.beats(over) and not rivals.beats({"mean": 1.0} | intervals(None, None) | {"ci95_videos": None})
