"""`resolution:r`: the tower over smaller frames, and prompts with fewer tokens of each."""

import dataclasses

import numpy as np
import pytest
from helpers.compare import close_to_largest
from helpers.mesh_worker import CONFIGS, clip, random_model
from helpers.plans import model as hybrid
from helpers.plans import plan

from hybridvlm.config import Buckets, Reduction, VisionConfig
from hybridvlm.reduction import BudgetError

TOWER = VisionConfig(image_size=(128, 128), width=64, layers=2, heads=4, mlp_width=64)


def test_the_tower_costs_what_a_frame_of_that_size_does():
    config = hybrid(vision=TOWER)
    quarter, half = (plan("resolution", rate, config=config) for rate in (0.25, 0.5))
    assert quarter.pool_factors == (1, 2, 2) and half.pool_factors == (1, 1, 2)
    assert quarter.retention_mean == 0.25 and not quarter.merges and quarter.pixel_selection.shrinks == (2, 2)
    small = hybrid(vision=dataclasses.replace(TOWER, image_size=(64, 64)))
    own = plan("none", 1.0, config=small, m=4)
    # register tokens are as many in a small frame
    assert quarter.cost.vision == own.cost.vision < quarter.dense_cost.vision / 3.5
    matched = plan("resolution", quarter.total_flop_ratio, "total-flops", config=config)
    assert matched.pool_factors == (1, 2, 2)
    with pytest.raises(BudgetError, match=r"resolution merges whole blocks of a 4x4 grid and cannot keep 0\.7"):
        plan("resolution", 0.7, config=config)
    stem = VisionConfig(kind="stem", image_size=(16, 16), patch_size=8, width=4, downsample=1, max_frames=4)
    with pytest.raises(BudgetError, match="this model's stem has one size; take frames or avgpool"):
        plan("resolution", 0.25, config=hybrid(vision=stem), frames=4, m=4)


@pytest.mark.slow
def test_small_frames_are_what_a_model_of_that_size_sees():
    """Through ask, with M-RoPE: pixels averaged beforehand, and the config of that size, give the same features."""
    model = dataclasses.replace(random_model(CONFIGS["qwen"]), buckets=Buckets((8,), (64,), 4))
    video = clip(5, 5, model.config)
    batch, p = model.batch(["red a"], [video.seconds], Reduction("resolution", 0.25))
    assert batch.frame.shape[1] == 8 * 1 + 64 and p.decoder_tokens == 8
    pixels = model.family.pixels(model.config, [video], 8)
    got = np.asarray(model.encode(pixels, keep=p.pixel_selection, frame_count=[5]))
    assert got.shape[2] == 1 and (got[..., -1] == 1).all()
    b, f, t, h, w, c = pixels.shape
    small = pixels.reshape(b, f, t, h // 2, 2, w // 2, 2, c).mean((4, 6))
    exact = np.round(small).astype(np.uint8)
    flat = np.repeat(np.repeat(exact, 2, 3), 2, 4)  # blocks of one colour, so that rounding plays no part
    got = np.asarray(model.encode(flat, keep=p.pixel_selection, frame_count=[5]))
    vision = dataclasses.replace(model.config.vision, image_size=(16, 16))
    other = dataclasses.replace(model, config=dataclasses.replace(model.config, vision=vision))
    close_to_largest(got[..., :-1], np.asarray(other.encode(exact)))
    out = model.prefill(batch, got, p)
    assert np.isfinite(out.logits).all() and int(np.asarray(out.decoder.kept)[0].sum()) == 5
    answer = model.ask(video, "red a", reduction=Reduction("resolution:0.25+str:0.6"))
    assert answer.plan.input_method == "resolution" and answer.survivors.shape == (5, 2, 2)
    with pytest.raises(ValueError, match=r"encode with keep=plan\.pixel_selection"):
        model.prefill(batch, model.encode(pixels), p)
