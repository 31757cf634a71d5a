"""Minutes rather than seconds: round trips with the reference classes, every family on a video, what loading holds."""

import numpy as np
import pytest
from helpers.stamped import stamped

from hybridvlm import ask
from hybridvlm.bench import load_memory as memory
from hybridvlm.bench import parity
from hybridvlm.checkpoints import samples

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", parity.REFERENCES)
def test_round_trips(name, tmp_path):
    """ours -> published -> transformers and back, logits of prefill and decoding (needs the [parity] extra)."""
    pytest.importorskip("torch", reason="needs the [parity] extra")
    pytest.importorskip("transformers", reason="needs the [parity] extra")
    for way, apart in parity.round_trip(name, tmp_path).items():
        assert apart <= parity.TOLERANCE, way


@pytest.mark.parametrize("name", [name for name in samples.RAW if "vision_config" in samples.RAW[name]])
def test_every_family_answers(name, tmp_path, capsys):
    """A tiny random checkpoint in the published layout, on a video, dense and at 25%."""
    path, film = samples.write_sample(name, tmp_path / name), stamped(tmp_path / "film.mp4")
    for reduction in ("none", "str-attention" if name == "vamba" else "str"):
        arguments = [str(film), "What?", "--model", str(path), "--frames", "6", "--max-new", "3"]
        reduced = ["--reduction", reduction, "--budget", "0.4", "--show-kept", str(tmp_path / "kept.png")]
        assert ask.main([*arguments, *reduced]) == 0
    said = capsys.readouterr().err
    assert "6 frames" in said
    assert "predicted decoder FLOPs" in said
    assert (tmp_path / "kept.png").is_file()


def test_what_loading_holds_beside_the_model(tmp_path):
    """4.4 GB of bfloat16: the largest resident size less the final one, against the largest tensor and 1 GB."""
    largest = memory.write_synthetic(tmp_path / "synthetic", 4.6)
    found = memory.measure(tmp_path / "synthetic")
    assert found.weights > 4e9
    assert found.final > found.weights
    assert np.subtract(found.peak, found.final) <= largest + memory.ALLOWED
