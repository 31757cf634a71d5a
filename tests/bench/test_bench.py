"""The benches run end to end on a model of a few thousand parameters, and their rows hold what the table promises."""

import argparse
import importlib.util
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from hybridvlm.bench import prefill, vamba_measure, vs_transformers
from hybridvlm.bench.__main__ import main, table
from hybridvlm.config import Reduction
from hybridvlm.config_files import load_model_config
from hybridvlm.models.nemotron_vl.model import assemble
from hybridvlm.models.prompt import own_text

MICRO = {
    "name": "micro",
    "pattern": "M*",
    "width": 16,
    "vocab_size": 32,
    "mamba_heads": 2,
    "mamba_head_dim": 8,
    "ssm_groups": 1,
    "ssm_state": 8,
    "attention_heads": 2,
    "kv_heads": 1,
    "head_dim": 8,
    "mlp_width": 16,
}
VISION = {
    "kind": "stem",
    "image_size": [8, 8],
    "patch_size": 4,
    "width": 8,
    "downsample": 1,
    "max_frames": 8,
    "stem_channels": [4],
}


@pytest.fixture
def micro(tmp_path):
    path = tmp_path / "micro.json"
    path.write_text(json.dumps(MICRO | {"vision": VISION}))
    return path


def test_prefill(micro, tmp_path, capsys):
    """A row for each prompt and method, each with what the plan predicts; time stamps go with their frames."""
    out = tmp_path / "rows.json"
    options = ["--config", str(micro), "--visual", "16", "--text", "4", "--budget", "0.75", "--methods", "str"]
    options += ["--repeats", "1", "--no-vision", "--drop-text", "best-frames"]
    assert main(["prefill", *options, "--json", str(out)]) == 0
    dense, reduced, stamped, fewer = json.loads(out.read_text())
    assert [row["method"] for row in (dense, reduced, stamped, fewer)] == ["none", "str"] * 2
    assert (dense["budget"], dense["speedup"], dense["flop_speedup"]) == (1, 1, 1)
    wanted = {"config": "micro", "visual_tokens": 16, "text_tokens": 4, "budget": 0.75, "drop_text": "none"}
    assert {key: reduced[key] for key in wanted} == wanted
    assert reduced["flop_speedup"] > 1 and reduced["ms"] > 0 and reduced["compile_s"] > 0
    assert math.isclose(reduced["speedup"], dense["ms"] / reduced["ms"], rel_tol=1e-6)
    assert math.isclose(reduced["share_of_predicted"], reduced["speedup"] / reduced["flop_speedup"])
    assert "flop_speedup" in capsys.readouterr().out

    sizes = (load_model_config(micro), 4, 4, 4 + 4 * prefill.STAMP_TOKENS, prefill.STAMP_TOKENS)
    best, none = (
        prefill.bench_plan(Reduction("str", 0.75, drop_text=rule), *sizes) for rule in ("best-frames", "none")
    )
    assert best.text_left(1) == none.text_left(1) - (4 - -(-best.capacities[1] // 4)) * prefill.STAMP_TOKENS
    assert (fewer["prompt"], fewer["drop_text"]) == ("time stamps", "best-frames")
    assert fewer["flop_speedup"] == best.flop_speedup > none.flop_speedup


def test_prefill_from_pixels(micro, tmp_path):
    """A method that spares the tower is given the tower's time of what it lets in, and what it encoded."""
    out = tmp_path / "rows.json"
    options = ["--config", str(micro), "--visual", "16", "--text", "4", "--repeats", "1", "--no-real-prompt"]
    options += ["--budget", "0.75", "--methods", "str,frames:0.5+str:0.75,evs-pixels:0.5"]
    assert main(["prefill", *options, "--json", str(out)]) == 0
    dense, own, frames, pixels = json.loads(out.read_text())
    assert dense["from_pixels_speedup"] == dense["from_pixels_predicted"] == 1
    assert own["vision_ms"] == dense["vision_ms"] and own["budget"] == 0.75
    assert frames["budget"] == 0.375 and pixels["budget"] == 0.5
    for row in (own, frames, pixels):
        assert row["from_pixels_ms"] == row["vision_ms"] + row["ms"] > row["ms"]
        assert row["from_pixels_speedup"] == pytest.approx(dense["from_pixels_ms"] / row["from_pixels_ms"])
    # half of the frames: half of the tower's work, which `str` leaves whole
    assert frames["from_pixels_predicted"] > own["from_pixels_predicted"] > 1


@pytest.mark.slow
def test_prefill_of_a_method_that_reads_the_attention_of_the_tower(tmp_path):
    radio = {
        "kind": "radio",
        "image_size": [32, 32],
        "patch_size": 8,
        "width": 8,
        "layers": 1,
        "heads": 2,
        "mlp_width": 16,
    }
    radio |= {"position_rows": 8, "prefix_tokens": 2, "downsample": 2, "projector_width": 16}
    path, out = tmp_path / "radio.json", tmp_path / "rows.json"
    path.write_text(json.dumps(MICRO | {"vision": radio}))
    options = ["--config", str(path), "--visual", "16", "--text", "4", "--repeats", "1", "--no-real-prompt"]
    assert main(["prefill", *options, "--methods", "visionzip:0.5", "--json", str(out)]) == 0
    dense, found = json.loads(out.read_text())
    # the tower's time with its attention, and not that of dense
    assert found["from_pixels_ms"] == found["vision_ms"] + found["ms"] and found["vision_ms"] != dense["vision_ms"]


def test_prompts_have_the_places_that_they_promise(micro):
    config = load_model_config(micro)
    for stamps in (0, 3):
        batch = prefill.prompt(4, config.vision.tokens_per_frame, 5, stamps, config.vocab_size)
        tokens = assemble(config, jnp.zeros((config.vocab_size, config.width)), batch, None)
        assert batch.input_ids.shape == (1, 4 * (4 + stamps) + 5)
        assert int(tokens.visual.sum()) == 16 and int(tokens.query.sum()) == 5
        frames = np.asarray(tokens.frame[tokens.visual])
        np.testing.assert_array_equal(frames, np.repeat(np.arange(4), 4))
        assert bool(tokens.visual[0, 0]) == (stamps == 0)
        own = batch.frame[batch.frame < -1]
        np.testing.assert_array_equal(own_text(own), np.repeat(np.arange(4), stamps))


def test_plan_counts_at_the_chunk_that_runs(micro):
    config = load_model_config(micro)
    plan = prefill.bench_plan(Reduction("str", 0.75), config, 4, 4, 4)
    assert prefill.running_chunk(config) > 1
    assert plan.dense_cost.layers[0] > config.width * 2 * 20 * (config.in_proj_width + config.mamba_width)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--visual", "15"], "multiple of 4"),
        (["--methods", "sr"], "did you mean"),
        (["--schedule", "shape"], "key=value"),
        (["--config", "vs_transformers_56m"], "no vision side"),
        (["--repeats", "0"], "at least 1"),
        (["--drop-text", "best-frames", "--no-real-prompt"], "--drop-text best-frames is about time stamps"),
        (["--drop-text", "best-frames", "--methods", "avgpool"], "this one merges"),
    ],
)
def test_bad_options_are_one_line(micro, capsys, options, message):
    assert main(["prefill", "--config", str(micro), "--visual", "16", "--no-vision", *options]) == 2
    said = capsys.readouterr().err.strip()
    assert message in said and "\n" not in said


def test_vs_transformers_without_its_packages(monkeypatch, capsys):
    monkeypatch.setattr(vs_transformers.importlib.util, "find_spec", lambda name: None)
    assert main(["vs_transformers"]) == 2
    assert "hybridvlm[parity]" in capsys.readouterr().err


def test_peer_rows():
    """The table from two sides' raw figures: ratios are over transformers, shares over the side's own machine rates."""
    theirs = {"version": "t", "matmul": 100.0, "copy": 50.0, "prefill": {"8": 4.0, "16": 9.0}, "decode": 2.0}
    ours = {"version": "o", "matmul": 200.0, "prefill": {"8": 2.0, "16": 3.0}, "decode": 0.5}
    ours |= {"reduced": 1.0, "flop_speedup": 4.0, "flops": {"8": 160, "16": 480}, "decode_bytes": 10, "logits_error": 0}
    args = argparse.Namespace(tokens="8,16", budget=0.25)
    rows = vs_transformers.rows(
        args, load_model_config("vs_transformers_56m"), {"transformers": theirs, "hybridvlm": ours}
    )
    by = {(row["measure"], row["side"], row.get("tokens")): row for row in rows}
    assert by["prefill", "hybridvlm", 16]["speedup"] == 3 and by["prefill", "transformers", 16]["speedup"] == 1
    assert by["prefill", "hybridvlm", 16]["share_of_matmul"] == 0.8
    assert by["prefill", "transformers", 8]["share_of_matmul"] == 0.4
    assert by["prefill str:0.25", "hybridvlm", 16]["speedup"] == 9
    assert by["decode", "hybridvlm", 1]["speedup"] == 4 and by["decode", "hybridvlm", 1]["share_of_copy"] == 0.4
    assert "share_of_copy" in table(rows)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs the [parity] extra")
def test_vs_transformers(tmp_path, capfd):
    path, out = tmp_path / "micro.json", tmp_path / "rows.json"
    path.write_text(json.dumps(MICRO | {"pattern": "M-*M-"}))
    options = ["--config", str(path), "--tokens", "24,40", "--text", "8", "--new", "4", "--repeats", "1"]
    assert main(["vs_transformers", *options, "--json", str(out)]) == 0
    rows = json.loads(out.read_text())
    assert [row["measure"] for row in rows] == ["prefill"] * 4 + ["prefill str:0.25"] + ["decode"] * 2 + ["machine"] * 2
    assert rows[-1]["logits_error"] < 1e-5


def test_lengths_of_as_many_frames_are_measured_once(monkeypatch, capsys):
    asked = []

    def measured(phase, configs, frames, args):
        asked.append((phase, frames))
        return {name: {"seconds": 1.0, "visual_tokens": 64 * frames, "exponent": None} for name in configs}

    monkeypatch.setattr(vamba_measure, "_measure", measured)
    assert main(["vamba", "--measure", "--phases", "train", "--tokens", "128", "100", "64", "128"]) == 0
    assert asked == [("train", 1), ("train", 2)]
    capsys.readouterr()
    for wrong, said in (
        (["--phases", "video"], "--measure runs --phases of train, prefill"),
        (["--width", "100"], "--width"),
    ):
        assert main(["vamba", "--measure", *wrong]) == 2
        assert said in capsys.readouterr().err


@pytest.mark.slow
def test_vamba_is_measured_beside_its_transformer(tmp_path):
    """Both phases at two lengths: every row has seconds and bytes, the longer ones an exponent, VAMBA a further question's seconds."""
    file = tmp_path / "rows.json"
    small = ["--layers", "1", "--width", "256", "--tokens", "64", "128", "--text", "16", "--repeats", "1"]
    assert main(["vamba", "--measure", *small, "--json", str(file)]) == 0
    rows = json.loads(file.read_text())
    assert [(r["phase"], r["model"], r["visual_tokens"]) for r in rows] == [
        (phase, model, tokens)
        for phase in ("train", "prefill")
        for tokens in (64, 128)
        for model in ("vamba", "transformer")
    ]
    assert all(row["seconds"] > 0 and row["compiler_gb"] > 0 for row in rows)
    assert all((row["exponent"] is None) == (row["visual_tokens"] == 64) for row in rows)
    assert [row["further_s"] is not None for row in rows] == [False] * 4 + [True, False] * 2
