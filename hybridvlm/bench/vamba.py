"""VAMBA-7B and Qwen2-VL-7B at true size in bf16, by the compiler of a TPU or GPU that need not be there.

In prefill both are laid out as well as the other: weights stacked and scanned, the row walked in pieces of --piece tokens (Qwen2-VL by
chunked prefill over its cache), logits for the last token. A training step is `hybridvlm.train`'s own, of all devices, on a video
each: float32 master weights, computed in bfloat16, every layer rematerialised, the tower frozen and its tokens given, the head
frozen. GB are 1e9 bytes, per device. With --measure a small pair runs on the device at hand instead.

weights (in training the parameters and AdamW's moments, in shards), caches, inputs and logits are counted from shapes; other_gb is
what the compiler needs beyond them: activations, gradients in flight, buffers, copies. decoder_tflops are counted as in
hybridvlm/reduction/cost.py, of all devices (a training step as three times its forward pass); tower_tflops is the vision
tower, the same in both and in no other column but for --phases video, which goes from the video's pixels to logits in one program.
cost_s are the compiler's seconds on a TPU, every loop counted as often as it runs (hybridvlm/bench/hlo.py). paper_ columns were
read off the plots of arXiv 2503.11579 (A800, eager PyTorch with FlashAttention); as_paper_tflops counts a prefill as those do: tower
and decoder, no attention products, logits of every token of the decoder's row.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable
from typing import Any

from hybridvlm.bench import timing
from hybridvlm.config import ModelConfig, VambaConfig
from hybridvlm.config_files import load_model_config

MODELS = {"vamba": "vamba_qwen2_vl_7b", "qwen2-vl": "qwen2_vl_7b"}
PHASES = ("prefill", "video", "train")
# frames of 640x360 -> (GB, TFLOPs) of prefill on one A800, and GB of a training step on eight (ZeRO-3, one video each)
PAPER: dict[str, dict[str, dict[int, tuple[float | None, float | None]]]] = {
    "prefill": {
        "vamba": {256: (33.5, 378), 512: (45.0, 750), 1024: (67.5, 1490)},
        "qwen2-vl": {256: (60.5, 745)},
    },
    "train": {"vamba": {256: (66.0, None), 512: (76.5, None)}, "qwen2-vl": {128: (75.0, None)}},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m hybridvlm.bench vamba`."""
    add = parser.add_argument
    add("--target", default="v5p:2x2x1", help="what prefill is compiled for: one device of it (default: v5p:2x2x1)")
    add("--train-target", default="v5p:2x2x2", help="what a training step is compiled for (default: v5p:2x2x2)")
    add(
        "--train-mesh",
        default="fsdp=-1",
        help="its mesh, of all devices, a video for each data x fsdp (default: fsdp=-1)",
    )
    add("--frames", type=int, nargs="+", default=[256, 512, 1024], help="frames of the video (default: 256 512 1024)")
    add("--size", type=int, nargs=2, default=[364, 644], help="height and width of a frame (default: 364 644)")
    add("--text", type=int, default=128, help="text tokens of a prompt (default: 128)")
    add("--piece", type=int, default=4096, help="tokens that are walked at once (default: 4096)")
    add("--models", nargs="+", choices=tuple(MODELS), default=list(MODELS))
    add("--phases", nargs="+", choices=PHASES, default=["prefill", "train"])
    add("--measure", action="store_true", help="run a small pair on the device at hand instead of compiling the 7B")
    add(
        "--tokens",
        type=int,
        nargs="+",
        default=[1024, 4096, 8192, 16384],
        help="with --measure: visual tokens of a video",
    )
    add("--layers", type=int, default=8, help="with --measure: layers of the pair (default: 8)")
    add("--width", type=int, default=512, help="with --measure: its width, a multiple of 256 (default: 512)")
    add("--repeats", type=int, default=3, help="with --measure: interleaved rounds (default: 3)")


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Compile, print, and return the rows."""
    if args.measure:
        from hybridvlm.bench import vamba_measure

        return vamba_measure.run(args)
    if min(args.frames) < 2 or args.text < 1 or args.piece < 8:
        raise ValueError(
            f"--frames, --text, --piece must be at least 2, 1 and 8, got {args.frames}, {args.text}, {args.piece}"
        )
    rows = []
    for phase in args.phases:
        for frames in args.frames:
            for model in args.models:
                timing.say(f"compiling {phase} of {frames} frames, {model}")
                rows.append(_row(args, phase, model, frames))
                timing.say(", ".join(f"{key} {value}" for key, value in rows[-1].items()))
    return rows


def _row(args: argparse.Namespace, phase: str, model: str, frames: int) -> dict[str, Any]:
    from hybridvlm import aot
    from hybridvlm.bench.hlo import program_cost
    from hybridvlm.reduction import cost as flops

    config = load_model_config(MODELS[model])
    config = dataclasses.replace(config, vision=dataclasses.replace(config.tower, image_size=tuple(args.size)))
    where = aot.target(args.train_target if phase == "train" else args.target)
    programs: dict[str, Callable[..., Any]] = {
        "prefill": prefill_program,
        "video": video_program,
        "train": train_program,
    }
    compiled, parts = programs[phase](where, config, frames, args)
    named = sum(parts.values())
    cost = None
    if where.platform == "tpu":
        cost = program_cost(compiled.executable.as_text(), where.chip)
    videos = _videos(_train_mesh(where, args)) if phase == "train" else 1
    paper = PAPER["train" if phase == "train" else "prefill"][model].get(frames, (None, None))
    return {
        "phase": phase,
        "model": model,
        "target": where.name,
        "frames": frames,
        "visual_tokens": visual_tokens(config, frames),
        **{f"{name}_gb": size * 1e-9 for name, size in parts.items()},
        "other_gb": (compiled.peak_bytes - named) * 1e-9,
        "needed_gb": compiled.peak_bytes * 1e-9,
        "fits_80gb": compiled.peak_bytes <= 80e9,
        "paper_gb": paper[0],
        "decoder_tflops": decoder_flops(config, frames, args.text) * videos * (3 if phase == "train" else 1) * 1e-12,
        "tower_tflops": flops.vision_flops(config.tower, _slices(config, frames), config.width) * videos * 1e-12,
        "as_paper_tflops": None if phase == "train" else papers_flops(config, frames, args.text) * 1e-12,
        "paper_tflops": paper[1],
        "cost_s": None if cost is None else cost.seconds,
        "moved_gb": None if cost is None else cost.bytes * 1e-9,
        "unread_loops": None if cost is None else cost.unread_loops,
        "compile_s": compiled.compile_seconds,
    }


# -- the two models -----------------------------------------------------------------------------------------------------


def _slices(config: ModelConfig, frames: int) -> int:
    """Frames of the tower: one for every two of the video's."""
    return -(-frames // config.tower.temporal_patch)


def visual_tokens(config: ModelConfig, frames: int) -> int:
    return _slices(config, frames) * config.tower.tokens_per_frame


def decoder_flops(config: ModelConfig, frames: int, text: int) -> int:
    """Operations of one prompt's prefill, as the plans count them."""
    from hybridvlm.reduction import cost as flops
    from hybridvlm.reduction.vamba import VambaReading

    row = visual_tokens(config, frames) + text
    counted: flops.Counted = VambaReading(config, text) if isinstance(config, VambaConfig) else config
    return flops.decoder_flops(counted, [row] * len(counted.pattern))


def papers_flops(config: ModelConfig, frames: int, text: int) -> int:
    """Operations of one prompt's prefill as a profiler counts them that does not look into FlashAttention."""
    from hybridvlm.reduction import cost as flops

    v, video, vamba = config.tower, visual_tokens(config, frames), isinstance(config, VambaConfig)
    row = text if vamba else video + text
    heads, layers = config.attention_heads * config.head_dim, config.count("*")
    products = layers * (2 * heads * row * row + (4 * heads * text * video if vamba else 0))
    patches = v.tokens_per_frame * v.downsample**2
    tower = flops.vision_flops(v, _slices(config, frames), config.width)
    tower -= _slices(config, frames) * v.layers * 4 * patches * patches * v.width
    return decoder_flops(config, frames, text) - products + tower + (row - 1) * flops.head_flops(config)


def shapes(config: ModelConfig, dtype: Any, tower: bool = False) -> dict[str, Any]:
    """The parameters as shapes, all of one dtype but for the few that stay in fp32."""
    import jax
    import jax.numpy as jnp

    from hybridvlm.models import qwen_vl, vamba
    from hybridvlm.models.weights import FLOAT32

    family = vamba if isinstance(config, VambaConfig) else qwen_vl
    tree = jax.eval_shape(lambda key: family.init(config, key), jax.random.key(0))
    tree = {name: part for name, part in tree.items() if tower or name not in ("vision", "projector")}
    return jax.tree_util.tree_map_with_path(
        lambda path, a: jax.ShapeDtypeStruct(a.shape, jnp.float32 if path[-1].key in FLOAT32 else dtype), tree
    )


def vamba_states(params, config: VambaConfig, visual, ids, piece: int):
    """visual [B,M,D], ids [B,T] -> final text states [B,T,D], and what is left in memory."""
    import jax.numpy as jnp

    from hybridvlm.nn import vamba
    from hybridvlm.ops.tokens import text_tokens

    video = text_tokens(visual, jnp.ones(visual.shape[:2], jnp.int32))
    text = text_tokens(jnp.take(params["embed"], ids, axis=0), jnp.ones(ids.shape, jnp.int32))
    memory, read, caches = vamba.prefill(params["decoder"], config, video, text, segment_tokens=piece)
    assert read is not None  # as text was given
    return read.x, (memory, caches)


def qwen_prefill(params, config: ModelConfig, visual, ids, piece: int):
    """Chunked prefill over a cache that is written in place: the text's final states [B,T,D] of the last piece, and the cache."""
    import jax
    import jax.numpy as jnp

    from hybridvlm.nn.mlp import mlp_layer
    from hybridvlm.nn.projections import join_heads, project_heads
    from hybridvlm.ops.attention import attention
    from hybridvlm.ops.norms import rms_norm

    c, layers = config, config.count("*")
    x = jnp.concatenate([visual, jnp.take(params["embed"], ids, axis=0)], axis=1)
    b, length, _ = x.shape
    pieces = -(-length // piece)
    size = 8 * -(-length // (8 * pieces))
    x = jnp.pad(x, ((0, 0), (0, pieces * size - length), (0, 0)))
    row_index = jnp.broadcast_to(jnp.arange(pieces * size, dtype=jnp.int32), (b, pieces * size))
    segment = (row_index < length).astype(jnp.int32)

    def cut(a):
        return a.reshape(b, pieces, size, *a.shape[2:]).swapaxes(0, 1)

    def walk(cache, part):
        x, at, mine = part

        def layer(carry, xs):
            x, k_all, v_all = carry
            index, p, mlp = xs
            q, k, v = project_heads(p, c, rms_norm(x, p["norm"], c.norm_eps), at)
            start = (index, 0, at[0, 0], 0, 0)
            k_all, v_all = (jax.lax.dynamic_update_slice(a, n[None], start) for a, n in ((k_all, k), (v_all, v)))
            k, v = (jax.lax.dynamic_index_in_dim(a, index, keepdims=False) for a in (k_all, v_all))
            out, _ = attention(q, k, v, q_segment=mine, kv_segment=segment, q_index=at, kv_index=row_index)
            return (mlp_layer(mlp, c, x + join_heads(p, out)), k_all, v_all), None

        stacks = (jnp.arange(layers), params["decoder"]["attention"], params["decoder"]["mlp"])
        (x, *cache), _ = jax.lax.scan(layer, (x, *cache), stacks)
        return tuple(cache), x

    empty = jnp.zeros((layers, b, pieces * size, c.kv_heads, c.head_dim), x.dtype)
    cache, last = jax.lax.scan(
        lambda cache, part: walk(cache, part), (empty, empty), (cut(x), cut(row_index), cut(segment))
    )
    end = length - (pieces - 1) * size
    x = rms_norm(last[-1], params["decoder"]["norm_f"], c.norm_eps)
    return x[:, max(0, end - ids.shape[1]) : end], cache


# -- what is compiled ---------------------------------------------------------------------------------------------------


def _bytes(tree: Any) -> int:
    import jax

    return sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(tree))


def _inputs(config: ModelConfig, frames: int, text: int, batch: int) -> tuple[Any, Any]:
    import jax
    import jax.numpy as jnp

    visual = jax.ShapeDtypeStruct((batch, visual_tokens(config, frames), config.width), jnp.bfloat16)
    return visual, jax.ShapeDtypeStruct((batch, text), jnp.int32)


def prefill_program(where, config: ModelConfig, frames: int, args: argparse.Namespace):
    """One prompt on one device, from visual tokens to last-token logits and caches: (Compiled, bytes by name)."""
    import jax.numpy as jnp

    return _prefill(where, config, args, shapes(config, jnp.bfloat16), *_inputs(config, frames, args.text, 1))


def video_program(where, config: ModelConfig, frames: int, args: argparse.Namespace):
    """As `prefill_program`, but from the video's pixels [1,F,2,h,w,3] uint8, the tower included."""
    import jax
    import jax.numpy as jnp

    shape = (1, _slices(config, frames), config.tower.temporal_patch, *args.size, 3)
    video = jax.ShapeDtypeStruct(shape, jnp.uint8)
    _, ids = _inputs(config, frames, args.text, 1)
    return _prefill(where, config, args, shapes(config, jnp.bfloat16, tower=True), video, ids)


def _prefill(where, config: ModelConfig, args: argparse.Namespace, params: Any, seen: Any, ids: Any):
    import jax
    import jax.numpy as jnp

    from hybridvlm import aot
    from hybridvlm.vision.model import encode_frames

    walk: Callable[..., tuple[Any, Any]] = vamba_states if isinstance(config, VambaConfig) else qwen_prefill
    whole = seen.ndim == 6

    def prefill(params, seen, ids):
        if whole:
            frame = jnp.zeros(seen.shape[1], jnp.int32)
            seen = encode_frames(params, config.tower, seen[0], frame, dtype=jnp.bfloat16, chunk=16)
            seen = seen.reshape(1, -1, config.width)
        x, kept = walk(params, config, seen, ids, args.piece)
        return jnp.matmul(x[:, -1], params["lm_head"], preferred_element_type=jnp.float32), kept

    compiled = aot.compile_for(where, prefill, params, seen, ids)
    logits, kept = jax.eval_shape(prefill, params, seen, ids)
    parts = {"weights": _bytes(params), "caches": _bytes(kept), "inputs": _bytes((seen, ids)), "logits": _bytes(logits)}
    return compiled, parts


def _train_mesh(where, args: argparse.Namespace):
    from hybridvlm.parallel.mesh import make_mesh, mesh_sizes

    return make_mesh(**mesh_sizes(args.train_mesh), devices=where.devices)


def _videos(mesh) -> int:
    return mesh.shape["data"] * mesh.shape["fsdp"]


def train_program(where, config: ModelConfig, frames: int, args: argparse.Namespace):
    """`hybridvlm.train`'s own step on every device's own video: (Compiled, bytes by name).

    `logits` is what the text's fp32 logits of one video take; they are among the compiler's temporaries, and taken out of `other`.
    """
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from hybridvlm import aot
    from hybridvlm.inference.model import Model
    from hybridvlm.models.family import family_for
    from hybridvlm.train.measure import random_row, step_settings
    from hybridvlm.train.step import Trainer

    mesh, answer = _train_mesh(where, args), args.text - 1
    videos, slices = _videos(mesh), _slices(config, frames)
    settings = step_settings(
        frames=slices,
        text=args.text,
        rows=videos,
        answer=answer,
        remat="layer",
        dtype="bfloat16",
        frozen=("^lm_head$",),
    )
    params = shapes(config, jnp.float32)
    trainer = Trainer(settings, Model(config, params, family=family_for(config)), mesh)
    state, fixed = trainer.start_shapes(params)
    rows = NamedSharding(mesh, P(("data", "fsdp")))
    row = random_row(config, slices, args.text, 1, answer, features=False)
    batch = jax.tree.map(lambda a: jax.ShapeDtypeStruct((videos, *a.shape[1:]), a.dtype, sharding=rows), row)
    shape = (videos, slices, config.tower.tokens_per_frame, config.width)
    batch = dataclasses.replace(batch, visual={"features": jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=rows)})
    compiled = aot.compile_for(
        where,
        lambda state, fixed, batch: trainer.update(state, fixed, batch, None),
        state,
        fixed,
        batch,
        donate_argnums=(0,),
    )
    held = _shard_bytes((state, fixed))
    return compiled, {
        "weights": held,
        "caches": 0,
        "inputs": _shard_bytes(batch),
        "logits": 4 * answer * config.vocab_size,
    }


def _shard_bytes(tree: Any) -> int:
    """Bytes of what one device holds of arrays that lie by their shardings."""
    import jax

    return sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in jax.tree.leaves(tree))
