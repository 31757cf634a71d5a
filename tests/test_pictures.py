"""The pictures of `ask` and `analyze`: captions, proportions, intervals."""

import types

import numpy as np
import pytest
from PIL import Image

from hybridvlm import ask
from hybridvlm.analyze import measures, sparsity
from hybridvlm.config_files import load_model_config
from hybridvlm.models.media import Clip
from hybridvlm.video.sheet import contact_sheet


def test_a_sheet_has_its_caption_above_and_the_sources_proportions(tmp_path):
    frames, survivors = np.full((2, 32, 32, 3), 200, np.uint8), np.ones((2, 2, 2), bool)
    sizes = []
    for options in ({}, {"aspect": 16 / 9}, {"aspect": 16 / 9, "caption": ["question: what?", "answer: a"]}):
        contact_sheet(frames, survivors, tmp_path / "sheet.png", **options)
        sheet = np.asarray(Image.open(tmp_path / "sheet.png").convert("L"), int)
        sizes.append(sheet.shape)
    assert sizes[0] == (192 + 12, 2 * 192 + 18)
    assert sizes[1] == (108 + 12, 2 * 192 + 18)
    assert sizes[2][1] == sizes[1][1] and sizes[2][0] > sizes[1][0] + 3 * 18 - 1
    above = sheet[: sizes[2][0] - sizes[1][0]]
    assert (above > 150).any() and (above < 40).mean() > 0.8


def test_a_long_caption_is_cut_to_the_sheet(tmp_path):
    frames, survivors = np.zeros((1, 32, 32, 3), np.uint8), np.ones((1, 2, 2), bool)
    for text in ("word " * 60, "x" * 300):
        contact_sheet(frames, survivors, tmp_path / "sheet.png", caption=[text])
        sheet = Image.open(tmp_path / "sheet.png")
        assert sheet.width == 204 and sheet.height > 204 + 8 * 18
        # the margin on the right stays free of letters
        assert np.asarray(sheet.convert("L"), int)[:-204, -6:].max() < 60


def test_intervals_of_correlations_stay_in_range():
    rng = np.random.default_rng(0)
    values = np.tanh(rng.normal(0.1, 2.0, 6)).tolist()
    videos = ["a", "a", "b", "b", "c", "c"]
    mean, (low, high) = measures.correlation_interval(values, videos)
    assert mean == pytest.approx(np.mean(values)) and -1 <= low <= mean <= high <= 1
    assert measures.mean_interval(values, videos)[1][1] > 1, "this sample has to be one that needs it"
    assert measures.correlation_interval([1.0, 1.0], ["a", "b"])[0] == 1.0
    assert measures.correlation_interval([0.5], ["a"]) == (0.5, None)


def test_the_picture_of_sparsity_names_its_bars_and_writes_percents_out():
    layer = {"holding": dict.fromkeys(map(str, sparsity.SHARES), 0.02), "gini": 0.5, "entropy": 0.5}
    rows = [
        {"layer": i, "kind": kind, "softmax": layer}
        | {f"position_{name}": {"mean": 0.1, "ci95": None} for name in ("plain", "decay")}
        for i, kind in enumerate("M*M*")
    ]
    fig = sparsity.picture(rows, "softmax")
    first = fig.axes[0]
    fig.canvas.draw()
    texts = [label.get_text() for label in first.get_yticklabels()]
    assert texts and not any("10^" in text for text in texts)
    assert [text.get_text() for text in first.get_legend().get_texts()].count("attention layer") == 1


@pytest.mark.parametrize(
    ("clip", "warns"),
    [(("video", (128, 128)), False), (("video", (720, 1280)), True), (("image", (128, 128)), True)],
)
def test_the_embedded_model_says_that_it_guesses_about_other_videos(clip, warns):
    model = types.SimpleNamespace(name="tiny-reduced", config=load_model_config("tiny"))
    note = ask.foreign(model, [Clip((0.0,), np.zeros((1, 8, 8, 3), np.uint8), clip[0], size=clip[1])])
    assert bool(note) == warns
    other = types.SimpleNamespace(name="other", config=load_model_config("qwen3_vl_8b"))
    assert ask.foreign(other, [Clip((0.0,), np.zeros((1, 8, 8, 3), np.uint8), "video", size=(720, 1280))]) == ""
