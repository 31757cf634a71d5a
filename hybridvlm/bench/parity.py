"""Round trips with the reference classes: `python -m hybridvlm.bench.parity` (needs `pip install hybridvlm[parity]`).

Of every sample (tiny, random, in the published layout) two ways are walked, each to logits in float32: ours, written as
safetensors, read by transformers; and a reference model, saved by transformers, read by `hv.load`. Prefill and cached
decoding of ours stand against the reference's whole forward pass.
"""

from __future__ import annotations

import argparse
import copy
import pathlib
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from hybridvlm.checkpoints import samples
from hybridvlm.checkpoints.hf import read_json
from hybridvlm.inference.model import load
from hybridvlm.models.media import Clip

TOLERANCE = 1e-4  # on logits
DECODED = 3  # tokens after the prompt that are fed one by one
QUESTION = "What is this?"
# of VAMBA, transformers has no class: its numbers stand against recorded ones in the tests, and here its layout alone is walked
REFERENCES = ("nemotron_h", "nemotron_h_moe", "nemotron_nano_vl", "nemotron_omni", "qwen2_vl", "qwen3_vl")


def sample_clip(name: str, seed: int = 1) -> Clip | None:
    """What is shown to a sample: nothing to a text model, an image to Nemotron's, three frames to the others."""
    rng = np.random.default_rng(seed)
    if name in ("nemotron_h", "nemotron_h_moe"):
        return None
    if name.startswith("nemotron"):
        return Clip((0.0,), rng.integers(0, 256, (1, 32, 32, 3)).astype(np.uint8), "image", (32, 32))
    return Clip((0.0, 0.5, 1.0), rng.integers(0, 256, (3, 16, 24, 3)).astype(np.uint8), "video", (16, 24))


def ours(folder: pathlib.Path, name: str) -> tuple[np.ndarray, Any, np.ndarray]:
    """Logits [DECODED+1,V] of our model after the prompt and after each further token; its layout; ids of those tokens."""
    import dataclasses

    model = load(folder, dtype="float32")
    clip = sample_clip(name)
    clips, config = ([] if clip is None else [clip]), model.config
    if clip is not None:
        size = model.family.frame_size(config, *clip.size, len(clip.seconds), clip.kind)
        if clip.kind == "video":
            size = clip.size
        config = dataclasses.replace(config, vision=dataclasses.replace(config.tower, image_size=size))
    content = [*({"type": clip.kind} for clip in clips), {"type": "text", "text": QUESTION}]
    messages = [{"role": "user", "content": content}]
    layout = model.family.prompt(config, model.tokenizer, messages, clips, style=model.style)
    more = np.asarray([5, 60, 200][:DECODED], np.int32)
    batch, bucket, _ = model.family.make_batch(config, [layout], model.buckets)
    visual = model.encode(model.family.pixels(config, clips, bucket)) if clips else None
    out = model.prefill(batch, visual, None, DECODED)
    logits, caches = [out.logits], out.decoder.caches
    step = jax.jit(lambda params, token, caches: model.family.make_decode_step(params, model.config)(token, caches))
    for token in more:
        found, caches = step(model.params, np.asarray([token]), caches)
        logits.append(found)
    return np.concatenate([np.asarray(x) for x in logits]), layout, more


def theirs(model: Any, name: str, layout: Any, more: np.ndarray) -> np.ndarray:
    """The same logits by the reference class, in one pass."""
    import torch

    raw = samples.RAW[name]
    token = raw.get("video_token_id", raw.get("img_context_token_id", 0)) if "vision_config" in raw else 0
    visual = layout.frame >= 0
    ids = np.concatenate([np.where(visual, token, layout.ids), more])
    inputs: dict[str, Any] = {"input_ids": torch.from_numpy(ids[None].astype(np.int64))}
    clip = sample_clip(name)
    frames = None if clip is None else clip.frames
    if frames is not None and name.startswith("nemotron"):
        patches, sides = _patches(frames, raw["vision_config"])
        inputs |= {"pixel_values": torch.from_numpy(patches), "image_grid_hw": torch.tensor([sides])}
    elif frames is not None:
        rows, grid = _rows(frames, raw["vision_config"], 0.5 if name == "qwen3_vl" else None)
        kinds = np.concatenate([2 * visual, np.zeros(len(more))]).astype(np.int64)
        inputs |= {
            "pixel_values_videos": torch.from_numpy(rows),
            "video_grid_thw": torch.tensor([grid]),
            "mm_token_type_ids": torch.from_numpy(kinds[None]),
        }
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits
    return logits[0, len(layout.ids) - 1 :].float().numpy()


def _normalised(frames: np.ndarray, flat: float | None = None) -> np.ndarray:
    from hybridvlm.config import VisionConfig

    mean, std = (VisionConfig.pixel_mean, VisionConfig.pixel_std) if flat is None else ((flat,) * 3, (flat,) * 3)
    return ((frames.astype(np.float32) / 255 - np.asarray(mean)) / np.asarray(std)).astype(np.float32)


def _patches(frames: np.ndarray, vision: dict[str, Any]) -> tuple[np.ndarray, tuple[int, int]]:
    """RADIO's: patches [rows*cols, 3*p*p] of one image, channel-major, and its grid."""
    p = vision["patch_size"]
    x = _normalised(frames)[0]
    rows, cols = x.shape[0] // p, x.shape[1] // p
    return x.reshape(rows, p, cols, p, 3).transpose(0, 2, 4, 1, 3).reshape(rows * cols, -1), (rows, cols)


def _rows(frames: np.ndarray, vision: dict[str, Any], flat: float | None) -> tuple[np.ndarray, tuple[int, int, int]]:
    """Qwen's: rows [t*h*w, 3*2*p*p] with the patches of one cell one after another, and the grid (t, h, w)."""
    p, m, pair = vision["patch_size"], vision["spatial_merge_size"], vision["temporal_patch_size"]
    x = _normalised(frames, flat)
    x = np.concatenate([x, np.repeat(x[-1:], -len(x) % pair, axis=0)])
    t, h, w = len(x) // pair, x.shape[1] // p, x.shape[2] // p
    x = x.reshape(t, pair, h // m, m, p, w // m, m, p, 3).transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)
    return np.ascontiguousarray(x.reshape(t * h * w, -1)), (t, h, w)


def reference_config(name: str) -> dict[str, Any]:
    """The config.json under which transformers reads a sample's weights; Nemotron Nano VL has no class of its own there, and is
    Omni with a dense pattern and frames by themselves."""
    raw = samples.raw_config(name)
    if name != "nemotron_nano_vl":
        return raw
    return copy.deepcopy(samples.RAW["nemotron_omni"]) | {"text_config": samples.raw_config("nemotron_h")}


def _read(folder: pathlib.Path) -> Any:
    import torch
    import transformers

    name = read_json(folder / "config.json")["architectures"][0]
    return getattr(transformers, name).from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def _fresh(name: str, seed: int) -> Any:
    """A reference model with random weights, none at a value that a class starts with."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        path = samples.write_sample(name, pathlib.Path(folder) / name, seed=seed, raw=reference_config(name))
        model = _read(path)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def round_trip(name: str, folder: pathlib.Path, seed: int = 0) -> dict[str, float]:
    """Largest difference of logits, both ways: {"ours -> reference": ..., "reference -> ours": ...}."""
    ours_path = samples.write_sample(name, folder / "ours", seed=seed)
    found, layout, more = ours(ours_path, name)
    as_theirs = samples.write_sample(name, folder / "as_theirs", seed=seed, raw=reference_config(name))
    apart = {"ours -> reference": _apart(found, theirs(_read(as_theirs), name, layout, more))}
    if name == "nemotron_nano_vl":  # transformers can save it under Omni's config alone
        return apart
    model = _fresh(name, seed + 1)
    saved = folder / "theirs"
    model.save_pretrained(saved)
    samples.write_text_files(name, saved)
    found, layout, more = ours(saved, name)
    return apart | {"reference -> ours": _apart(found, theirs(model, name, layout, more))}


def _apart(a: np.ndarray, b: np.ndarray) -> float:
    if a.shape != b.shape:
        raise ValueError(f"logits of shapes {a.shape} and {b.shape}")
    return float(np.abs(a.astype(np.float64) - b).max())


def main(arguments: Sequence[str] | None = None, say: Callable[[str], None] = print) -> int:
    """Print a line per sample and way; 1 if one is over the tolerance."""
    parser = argparse.ArgumentParser(prog="python -m hybridvlm.bench.parity", description=__doc__.splitlines()[0])
    parser.add_argument("--samples", default=",".join(REFERENCES), help="of %(default)s")
    args = parser.parse_args(arguments)
    jax.config.update("jax_default_matmul_precision", "highest")
    over = 0
    for name in args.samples.split(","):
        if name not in REFERENCES:
            print(f"no reference for {name!r}; there are {', '.join(REFERENCES)}", file=sys.stderr)
            return 2
        with tempfile.TemporaryDirectory() as folder:
            for way, apart in round_trip(name, pathlib.Path(folder)).items():
                over += apart > TOLERANCE
                say(f"{name:<18} {way:<18} largest difference of logits {apart:.2e}")
    return int(over > 0)


if __name__ == "__main__":
    raise SystemExit(main())
