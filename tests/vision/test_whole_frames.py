"""`frames:r`: the tower over the frames that stay, against the tower over all of them."""

import dataclasses

import numpy as np
import pytest
from helpers.compare import close_to_largest
from helpers.mesh_worker import CONFIGS, clip, random_model

from hybridvlm.config import Buckets, Reduction


@pytest.mark.parametrize("name", ["hybrid", pytest.param("qwen", marks=pytest.mark.slow)])
def test_frames_that_stay_are_encoded_as_among_all(name):
    """Two videos of several lengths: tokens, what the plan keeps, and an answer; other frames are no numbers."""
    model = dataclasses.replace(random_model(CONFIGS[name]), buckets=Buckets((8,), (64,), 4))
    clips = [clip(n, n, model.config) for n in (8, 5)]
    pixels = model.family.pixels(model.config, clips, 8)
    batch, plan = model.batch(["red", "a b"], [c.seconds for c in clips], Reduction("frames", 0.5))
    got = np.asarray(model.encode(pixels, keep=plan.pixel_selection, frame_count=np.array([8, 5])))
    want = np.asarray(model.encode(pixels))
    # evenly spread: four of eight, and of five the nearest to a half, upwards
    kept = [[0, 2, 4, 6], [0, 2, 4]]
    for row, frames in enumerate(kept):
        assert np.flatnonzero(got[row, :, 0, -1]).tolist() == frames
        close_to_largest(got[row, frames, :, :-1], want[row, frames])
        others = np.setdiff1d(np.arange(8), frames)
        assert np.isnan(got[row, others, :, :-1]).all() and not got[row, others, :, -1].any()
    out = model.prefill(batch, got, plan)
    seen, frame = np.asarray(out.decoder.tokens.visual), np.asarray(out.decoder.tokens.frame)
    assert [sorted(set(frame[row][seen[row]].tolist())) for row in range(2)] == kept
    assert np.isfinite(out.logits).all()
    with pytest.raises(ValueError, match="frames chooses by pixels, before the tower; encode with keep="):
        model.prefill(batch, want, plan)


def test_ask_shows_the_tower_what_stays():
    model = dataclasses.replace(random_model(CONFIGS["hybrid"]), buckets=Buckets((8,), (64,), 4))
    answer = model.ask(clip(8, 1, model.config), "red", reduction=Reduction("frames", 0.25))
    assert np.flatnonzero(answer.survivors.any((1, 2))).tolist() == [1, 5]
    assert answer.survivors[[1, 5]].all() and answer.stages[0][2] == 2 * 4
