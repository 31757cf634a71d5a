"""Qwen2-VL and Qwen3-VL against transformers itself, at grids that are neither square nor the size of the position table."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybridvlm.checkpoints.hf import params_from_tensors
from hybridvlm.models import qwen_vl
from hybridvlm.models.qwen_vl import geometry
from hybridvlm.models.qwen_vl import model as qwen_vl_model
from hybridvlm.nn import decoder
from hybridvlm.vision import qwen_merge, qwen_tower

pytestmark = pytest.mark.slow
GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"
VIDEO, GRID = 91, (6, 8)


@pytest.mark.parametrize(("name", "reference"), [("qwen2_vl", "Qwen2VL"), ("qwen3_vl", "Qwen3VL")])
def test_logits_and_positions(name, reference):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    raw = json.loads((GOLDENS / name / "config.json").read_text())
    raw.pop("transformers_version")
    config_class = getattr(transformers, f"{reference}Config")
    model = getattr(transformers, f"{reference}ForConditionalGeneration")(config_class(**raw)).eval().float()
    torch.manual_seed(0)
    with torch.no_grad():
        for key, weight in model.named_parameters():  # its initialisation is so small that errors would not show
            weight.normal_(0, 0.2)
            if "norm" in key and key.endswith("weight"):
                weight.add_(1)
    tensors = {key: x.numpy() for key, x in model.state_dict().items()}
    config = qwen_vl.config_from_hf(raw, {key: x.shape for key, x in tensors.items()})
    params = jax.tree.map(jnp.asarray, params_from_tensors(qwen_vl.weight_map(config), tensors))

    frames, m = 3, GRID[0] * GRID[1] // 4
    rows = np.random.default_rng(0).normal(size=(frames, 4 * m, 96)).astype(np.float32)
    video = [92, *[VIDEO] * (frames * m), 93]
    if config.generation == 3:
        video = [place for i in range(frames) for place in (7, 20 + i, 92, *[VIDEO] * m, 93)]
    ids = np.asarray([[5, 6, *video, 8, 9, 10]])
    seen, grid = torch.tensor(ids), torch.tensor([[frames, *GRID]])
    kinds = (seen == VIDEO).int() * 2
    with torch.no_grad():
        pixels = torch.tensor(rows.reshape(-1, rows.shape[-1]))
        expected = model(
            input_ids=seen, pixel_values_videos=pixels, video_grid_thw=grid, mm_token_type_ids=kinds
        ).logits.numpy()
        places = model.model.get_rope_index(seen, kinds, video_grid_thw=grid)[0].numpy()

    visual = qwen_merge(
        params["projector"], config.vision, *qwen_tower(params["vision"], config.vision, jnp.asarray(rows), GRID)
    )
    frame = np.where(ids == VIDEO, (np.cumsum(ids == VIDEO, axis=1) - 1) // m, -1)
    position = geometry.rope_positions(frame[0], (GRID[0] // 2, GRID[1] // 2), apart=config.generation == 3)
    np.testing.assert_array_equal(position.T, places[:, 0])
    batch = qwen_vl_model.QwenBatch(ids, np.ones_like(ids), frame, np.asarray([frames]), position[None])
    tokens = qwen_vl_model.assemble(config, params["embed"], batch, visual[None])
    logits = decoder.prefill(params["decoder"], config, tokens).tokens.x @ params["lm_head"]
    assert np.abs(expected).max() > 2
    assert np.max(np.abs(np.asarray(logits) - expected)) <= 1e-4
