"""Next to transformers' NemotronH: the same weights, float32, the same threads, one process after the other.

Two worker processes, so that neither sees the other's memory and thread pools. The transformers one makes the model,
measures, and leaves weights and the logits of a short prompt; ours loads those weights through the table of
checkpoint names, must give the same logits, and measures the same things: prefill in tokens per second, decoding in
milliseconds per token, and with them the rate of a 2048^3 matmul in that very process. The machine's copy bandwidth is
torch's between two allocated arrays; a jitted copy allocates its result and would time page faults.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from hybridvlm.bench import timing
from hybridvlm.config import ModelConfig, Reduction
from hybridvlm.config_files import load_model_config
from hybridvlm.options import split

SIDES = ("transformers", "hybridvlm")
CHECK_TOKENS = 200  # length of the prompt on which the two must agree
TOLERANCE = 1e-3  # of the largest logit
MATMUL = 2048
COPY_BYTES = 1 << 28
LAYER_TYPES = {"M": "linear_attention", "*": "full_attention", "-": "mlp"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m hybridvlm.bench vs_transformers`."""
    add = parser.add_argument
    add(
        "--config",
        default="vs_transformers_56m",
        help="name or JSON file of a text-only model config (default: vs_transformers_56m)",
    )
    add(
        "--tokens", default="4096,8192", help="comma list of prompt lengths; the last also reduced (default: 4096,8192)"
    )
    add("--text", type=int, default=128, help="text tokens of the reduced prompt (default: 128)")
    add("--budget", type=float, default=0.25, help="mean share of visual tokens that str keeps (default: 0.25)")
    add("--new", type=int, default=64, help="tokens decoded after the first prompt length (default: 64)")
    add("--repeats", type=int, default=3, help="runs of each (default: 3)")
    add("--threads", type=int, default=2, help="CPU threads of each side (default: 2)")
    add("--worker", choices=SIDES, help=argparse.SUPPRESS)
    add("--folder", type=pathlib.Path, help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Run both sides and return the rows; as --worker, measure one side into --folder."""
    if args.worker:
        measure = {"transformers": _transformers, "hybridvlm": _hybridvlm}[args.worker]
        found = measure(args, load_model_config(args.config))
        (args.folder / f"{args.worker}.json").write_text(json.dumps(found))
        return []
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"bench vs_transformers needs {' and '.join(missing)}: pip install 'hybridvlm[parity]'")
    with tempfile.TemporaryDirectory() as folder:
        found = {}
        for side in SIDES:
            _worker(side, args, folder)
            found[side] = json.loads((pathlib.Path(folder) / f"{side}.json").read_text())
    return rows(args, load_model_config(args.config), found)


def _worker(side: str, args: argparse.Namespace, folder: str) -> None:
    names = ("config", "tokens", "text", "budget", "new", "repeats", "threads")
    options = [f"--{name}={getattr(args, name)}" for name in names]
    program = [
        sys.executable,
        "-m",
        "hybridvlm.bench",
        "vs_transformers",
        *options,
        f"--worker={side}",
        f"--folder={folder}",
    ]
    cores = sorted(os.sched_getaffinity(0))[: args.threads] if hasattr(os, "sched_getaffinity") else None
    pin = (lambda: os.sched_setaffinity(0, cores)) if cores else None  # both sides take their thread count from it
    threads = str(args.threads)
    environment = os.environ | {"OMP_NUM_THREADS": threads, "JAX_PLATFORMS": "cpu", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(program, env=environment, preexec_fn=pin, check=False)
    if done.returncode:
        raise ValueError(f"the {side} side of bench vs_transformers ended with exit code {done.returncode}")


def _seconds(call: Callable[[], Any], repeats: int) -> float:
    """Median seconds of `repeats` calls that block, after one that is not counted."""
    laps = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        call()
        laps.append(time.perf_counter() - start)
    return statistics.median(laps[1:])


def _lengths(args: argparse.Namespace) -> list[int]:
    return sorted({int(n) for n in split(args.tokens, "--tokens")})


def _ids(config: ModelConfig, length: int) -> np.ndarray:
    return np.random.default_rng(length).integers(1, config.vocab_size, (1, length), np.int32)


# -- transformers -------------------------------------------------------------------------------------------------------


def _transformers(args: argparse.Namespace, config: ModelConfig) -> dict[str, Any]:
    import torch
    import transformers

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    c = config
    hf_config = transformers.NemotronHConfig(
        layers_block_type=[LAYER_TYPES[kind] for kind in c.pattern],
        hidden_size=c.width,
        vocab_size=c.vocab_size,
        mamba_num_heads=c.mamba_heads,
        mamba_head_dim=c.mamba_head_dim,
        n_groups=c.ssm_groups,
        ssm_state_size=c.ssm_state,
        conv_kernel=c.conv_kernel,
        use_conv_bias=c.conv_bias,
        num_attention_heads=c.attention_heads,
        num_key_value_heads=c.kv_heads,
        head_dim=c.head_dim,
        intermediate_size=c.mlp_width,
        layer_norm_epsilon=c.norm_eps,
        attention_bias=c.attention_bias,
        tie_word_embeddings=c.tie_embeddings,
        max_position_embeddings=1 << 17,
    )
    model = transformers.NemotronHForCausalLM(hf_config).float().eval()
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    np.savez(args.folder / "weights.npz", **weights)

    def ids(length: int):
        return torch.from_numpy(_ids(config, length)).long()

    with torch.inference_mode():
        logits = model(ids(CHECK_TOKENS), use_cache=True, logits_to_keep=1).logits[0, -1]
        np.savez(args.folder / "check.npz", logits=logits.numpy())
        left, right = torch.randn(MATMUL, MATMUL), torch.randn(MATMUL, MATMUL)
        source = torch.ones(COPY_BYTES // 4)
        target = torch.empty_like(source)
        found: dict[str, Any] = {
            "version": f"transformers {transformers.__version__}, torch {torch.__version__}",
            "dt_floor": hf_config.time_step_min,
            "matmul": 2 * MATMUL**3 / _seconds(lambda: left @ right, 7),
            "copy": 2 * COPY_BYTES / _seconds(lambda: target.copy_(source), 7),
            "prefill": {},
        }
        timing.say("transformers: prefill")
        for length in _lengths(args):
            prompt = ids(length)
            call = lambda prompt=prompt: model(prompt, use_cache=True, logits_to_keep=1).logits  # noqa: E731
            found["prefill"][str(length)] = _seconds(call, args.repeats)

        timing.say("transformers: decoding")
        out = model(ids(_lengths(args)[0]), use_cache=True, logits_to_keep=1)
        past, token = out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)
        laps = []
        for _ in range(args.new):
            start = time.perf_counter()
            out = model(token, past_key_values=past, use_cache=True)
            past, token = out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)
            laps.append(time.perf_counter() - start)
    return found | {"decode": float(np.median(laps))}


# -- ours ---------------------------------------------------------------------------------------------------------------


def _logits_error(folder: pathlib.Path, logits: np.ndarray) -> float:
    """Largest difference to the other side's logits, relative to the largest of them; ValueError where it is too large."""
    with np.load(folder / "check.npz") as stored:
        expected = stored["logits"]
    error = float(np.max(np.abs(logits - expected)) / np.max(np.abs(expected)))
    if not error <= TOLERANCE:
        raise ValueError(
            f"logits of the two sides differ by {error:.1e} of the largest one; at most {TOLERANCE} is allowed"
        )
    return error


def _hybridvlm(args: argparse.Namespace, config: ModelConfig) -> dict[str, Any]:
    import dataclasses

    import jax
    import jax.numpy as jnp

    from hybridvlm.bench.prefill import bench_plan, prompt, running_chunk
    from hybridvlm.checkpoints import params_from_hf
    from hybridvlm.inference.sampling import Sampling, decode
    from hybridvlm.models import nemotron_vl
    from hybridvlm.nn.caches import cache_bytes
    from hybridvlm.reduction.cost import decoder_flops

    theirs = json.loads((args.folder / "transformers.json").read_text())
    with np.load(args.folder / "weights.npz") as stored:
        params = jax.tree.map(jnp.asarray, params_from_hf(config, dict(stored)))
    jax.block_until_ready(params)

    def seconds(program: Callable, *inputs: Any) -> float:
        return _seconds(lambda: jax.block_until_ready(program(*inputs)), args.repeats)

    def program(config, batch, visual, plan, decode_capacity):
        def function(params, batch, visual):
            out = nemotron_vl.prefill(params, config, batch, visual, plan, decode_capacity)
            return out.logits, out.decoder.caches

        return jax.jit(function).lower(params, batch, visual).compile()

    def text(length: int):
        batch = prompt(0, 0, length, 0, config.vocab_size)
        return dataclasses.replace(batch, input_ids=_ids(config, length))

    check = text(CHECK_TOKENS)
    floored = dataclasses.replace(config, dt_floor=theirs["dt_floor"])  # their prefill floors dt, their decode does not
    logits = np.asarray(program(floored, check, None, None, 0)(params, check, None)[0])[0]
    error = _logits_error(args.folder, logits)
    left, right = (jax.random.normal(jax.random.key(i), (MATMUL, MATMUL)) for i in range(2))
    matmul = jax.jit(jnp.matmul)
    found: dict[str, Any] = {
        "version": f"jax {jax.__version__}",
        "logits_error": error,
        "matmul": 2 * MATMUL**3 / seconds(matmul, left, right),
        "prefill": {},
    }
    timing.say("hybridvlm: logits agree; prefill")
    for length in _lengths(args):
        batch = text(length)
        compiled = program(config, batch, None, None, 0)
        found["prefill"][str(length)] = seconds(compiled, params, batch, None)

    timing.say("hybridvlm: reduced prefill")
    length = _lengths(args)[-1]
    frames = next(n for n in range(64, 0, -1) if (length - args.text) % n == 0)
    per_frame = (length - args.text) // frames
    plan = bench_plan(Reduction("str", args.budget), config, frames, per_frame, args.text)
    batch = prompt(frames, per_frame, args.text, 0, config.vocab_size)
    visual = jax.random.normal(jax.random.key(1), (1, frames, per_frame, config.width))
    compiled = program(config, batch, visual, plan, 0)
    found["reduced"] = seconds(compiled, params, batch, visual)
    found["flop_speedup"] = plan.flop_speedup
    layers, chunk = len(config.pattern), running_chunk(config)
    found["flops"] = {str(n): decoder_flops(config, [n] * layers, chunk) for n in _lengths(args)}

    timing.say("hybridvlm: decoding")
    batch = text(_lengths(args)[0])
    logits, caches = jax.block_until_ready(program(config, batch, None, None, args.new)(params, batch, None))

    def generate(new: int):
        def function(params, logits, caches):
            return decode(params, config, logits, caches, jnp.zeros(1, jnp.int32), max_new=new, sampling=Sampling())[0]

        return seconds(jax.jit(function), params, logits, caches)

    # one program of the whole loop: the difference of two lengths is free of what happens once per call
    short = max(1, args.new // 4)
    found["decode"] = (generate(args.new) - generate(short)) / (args.new - short)
    moved = [a for name, a in params.items() if name != "embed" or config.tie_embeddings]
    found["decode_bytes"] = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(moved)) + cache_bytes(caches)
    return found


# -- the table ----------------------------------------------------------------------------------------------------------


def rows(args: argparse.Namespace, config: ModelConfig, found: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per side and measurement; `speedup` is over transformers' dense figure of the same measurement."""
    theirs, ours = found["transformers"], found["hybridvlm"]
    out = []

    def add(side: str, measure: str, tokens: int, seconds: float, base: float, **more: Any) -> None:
        row = {
            "config": config.name,
            "measure": measure,
            "side": side,
            "version": found[side]["version"],
            "tokens": tokens,
        }
        out.append(row | {"ms": 1000 * seconds, "speedup": base / seconds} | more)

    for length, seconds in theirs["prefill"].items():
        n = int(length)
        for side in SIDES:
            mine = found[side]["prefill"][length]
            rate = {"tokens_per_s": n / mine, "share_of_matmul": ours["flops"][length] / mine / found[side]["matmul"]}
            add(side, "prefill", n, mine, seconds, **rate)
    last = _lengths(args)[-1]
    more = {"tokens_per_s": last / ours["reduced"], "flop_speedup": ours["flop_speedup"]}
    add("hybridvlm", f"prefill str:{args.budget:g}", last, ours["reduced"], theirs["prefill"][str(last)], **more)
    for side in SIDES:
        share = ours["decode_bytes"] / found[side]["decode"] / theirs["copy"]
        add(side, "decode", 1, found[side]["decode"], theirs["decode"], share_of_copy=share)
    for side in SIDES:
        out.append(
            {
                "config": config.name,
                "measure": "machine",
                "side": side,
                "matmul_gflops": found[side]["matmul"] / 1e9,
                "copy_gb_s": theirs["copy"] / 1e9,
                "logits_error": ours["logits_error"],
            }
        )
    return out
