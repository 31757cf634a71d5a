"""VAMBA-7B and Qwen2-VL-7B at true size in bf16, by the compiler of a TPU or GPU that need not be there.

Both are laid out as well as the other: weights stacked and scanned, the row walked in pieces of --piece tokens (Qwen2-VL by chunked
prefill over its cache), logits for the last token in prefill and for the text alone in training, every layer
rematerialised in training. So what differs is what the models need, and not how they were written. GB are 1e9 bytes, per device.

weights (in training with AdamW's moments, all fp32 and sharded), caches, inputs and logits are counted from shapes; other_gb is
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
    add("--train-target", default="v5p:2x2x2", help="a training step: all of its devices, fsdp (default: v5p:2x2x2)")
    add("--frames", type=int, nargs="+", default=[256, 512, 1024], help="frames of the video (default: 256 512 1024)")
    add("--size", type=int, nargs=2, default=[364, 644], help="height and width of a frame (default: 364 644)")
    add("--text", type=int, default=128, help="text tokens of a prompt (default: 128)")
    add("--piece", type=int, default=4096, help="tokens that are walked at once (default: 4096)")
    add("--models", nargs="+", choices=tuple(MODELS), default=list(MODELS))
    add("--phases", nargs="+", choices=PHASES, default=["prefill", "train"])


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Compile, print, and return the rows."""
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
    videos = len(where.devices) if phase == "train" else 1
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


def vamba_states(params, config: VambaConfig, visual, ids, piece: int, **options):
    """visual [B,M,D], ids [B,T] -> final text states [B,T,D], and what is left in memory."""
    import jax.numpy as jnp

    from hybridvlm.nn import vamba
    from hybridvlm.ops.tokens import text_tokens

    video = text_tokens(visual, jnp.ones(visual.shape[:2], jnp.int32))
    text = text_tokens(jnp.take(params["embed"], ids, axis=0), jnp.ones(ids.shape, jnp.int32))
    memory, read, caches = vamba.prefill(params["decoder"], config, video, text, segment_tokens=piece, **options)
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


def qwen_states(params, config: ModelConfig, visual, ids, piece: int, all_gather_params):
    """Whole rows, for training: attention over the row, everything else in pieces, each layer rematerialised -> [B,T,D]."""
    import jax
    import jax.numpy as jnp

    from hybridvlm.nn.attention import attention_layer
    from hybridvlm.nn.mlp import mlp_layer
    from hybridvlm.ops.norms import rms_norm

    c = config
    x = jnp.concatenate([visual, jnp.take(params["embed"], ids, axis=0)], axis=1)
    b, length, width = x.shape
    pieces = -(-length // piece)
    size = 8 * -(-length // (8 * pieces))
    x = jnp.pad(x, ((0, 0), (0, pieces * size - length), (0, 0)))
    row_index = jnp.broadcast_to(jnp.arange(pieces * size, dtype=jnp.int32), (b, pieces * size))
    segment = (row_index < length).astype(jnp.int32)
    policy = jax.checkpoint_policies.nothing_saveable

    def layer(x, p):
        p = all_gather_params(p)
        x, _, _ = attention_layer(p["attention"], c, x, segment, position=row_index)
        parts = x.reshape(b, pieces, size, width).swapaxes(0, 1)
        parts = jax.lax.map(jax.checkpoint(lambda part: mlp_layer(p["mlp"], c, part), policy=policy), parts)
        return parts.swapaxes(0, 1).reshape(x.shape), None

    stacks = {name: params["decoder"][name] for name in ("attention", "mlp")}
    x, _ = jax.lax.scan(jax.checkpoint(layer, policy=policy), x, stacks)
    x = x[:, length - ids.shape[1] : length]
    return rms_norm(x, params["decoder"]["norm_f"], c.norm_eps), None


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


def train_program(where, config: ModelConfig, frames: int, args: argparse.Namespace):
    """A step of AdamW on every device's own video: fp32 parameters and moments in shards, each layer gathered in bf16 as it is used.

    Next-token loss on the text. The tower is frozen, as in VAMBA's recipe, and its visual tokens are inputs. `logits` is what the
    text's fp32 logits of one video take; they are among the compiler's temporaries, and taken out of `other`.
    """
    import jax
    import jax.numpy as jnp
    import optax
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from hybridvlm import aot
    from hybridvlm.models.weights import FLOAT32

    devices = len(where.devices)
    mesh = where.mesh(fsdp=devices)
    walk: Callable[..., tuple[Any, Any]] = vamba_states if isinstance(config, VambaConfig) else qwen_states
    params = shapes(config, jnp.float32)
    optimizer = optax.adamw(5e-6, weight_decay=0.01)

    def axis(path, a) -> int:
        """The longest axis of an array that the devices divide, counted from the end; 0 for none. Layers are never parted."""
        layers = int(len(path) > 2)  # decoder/mlp/up_proj is a stack, decoder/norm_f is not
        able = [n for n in range(layers, a.ndim) if a.shape[n] % devices == 0]
        return max(able, key=lambda n: a.shape[n]) - a.ndim if able else 0

    axes = jax.tree_util.tree_map_with_path(axis, params)

    def spec(a, axis: int) -> P:
        return P(*("fsdp" if axis and n == a.ndim + axis else None for n in range(a.ndim)))

    def gather(path, a, axis: int):
        a = a if path[-1].key in FLOAT32 else a.astype(jnp.bfloat16)
        return jax.lax.all_gather(a, "fsdp", axis=a.ndim + axis, tiled=True) if axis else a

    def fetch(p):
        known = {name: {leaf: axes["decoder"][name][leaf] for leaf in part} for name, part in p.items()}
        return jax.tree_util.tree_map_with_path(gather, p, known)

    def loss(params, visual, ids):
        tops = {name: a for name, a in params.items() if name != "decoder"}
        tops = jax.tree_util.tree_map_with_path(gather, tops, {name: axes[name] for name in tops})
        decoder = params["decoder"] | {
            "norm_f": gather((jax.tree_util.DictKey("norm_f"),), params["decoder"]["norm_f"], axes["decoder"]["norm_f"])
        }
        x, _ = walk(tops | {"decoder": decoder}, config, visual, ids, args.piece, all_gather_params=fetch)
        logits = jnp.matmul(x[:, :-1], tops["lm_head"], preferred_element_type=jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean() / devices

    def step(params, moments, visual, ids):
        value, gradient = jax.value_and_grad(loss)(params, visual, ids)
        # gathered arrays give their gradients back in shards, already summed; the few whole ones are summed here
        gradient = jax.tree.map(lambda g, axis: g if axis else jax.lax.psum(g, "fsdp"), gradient, axes)
        updates, moments = optimizer.update(gradient, moments, params)
        return optax.apply_updates(params, updates), moments, jax.lax.psum(value, "fsdp")

    moments = jax.eval_shape(optimizer.init, params)
    specs = jax.tree.map(spec, params, axes)
    # the moments are trees like the parameters, but for the counter
    moment_specs = jax.tree.map(
        lambda part: P() if getattr(part, "ndim", None) == 0 else specs,
        moments,
        is_leaf=lambda t: isinstance(t, dict) or getattr(t, "ndim", None) == 0,
    )
    inputs = _inputs(config, frames, args.text, devices)
    specs_in = (specs, moment_specs, P("fsdp"), P("fsdp"))
    run_step = jax.shard_map(step, mesh=mesh, in_specs=specs_in, out_specs=(*specs_in[:2], P()), check_vma=False)
    shardings = jax.tree.map(lambda s: NamedSharding(mesh, s), specs_in, is_leaf=lambda s: isinstance(s, P))
    compiled = aot.compile_for(where, run_step, params, moments, *inputs, in_shardings=shardings, donate_argnums=(0, 1))
    logits = 4 * (args.text - 1) * config.vocab_size
    state = _bytes((params, moments)) // devices
    return compiled, {"weights": state, "caches": 0, "inputs": _bytes(inputs) // devices, "logits": logits}
