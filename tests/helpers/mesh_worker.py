"""Run by test_model_mesh.py in a process of its own, on 8 devices of the CPU: models on meshes against the same on one device.

`mesh_worker.py CASE...` (of `CASES`) prints one JSON line per case: {"case", "logits" and "extended" (max|difference| /
max|reference|), "kept", "tokens", "answers": whether these are the same, "step bytes": whether a decode step exchanges what
`decode_step_bytes` says}.
"""

import dataclasses
import json
import math
import re
import sys
import zlib
from typing import Any

import jax
import numpy as np

from hybridvlm.checkpoints import folder
from hybridvlm.config import Buckets, ModelConfig, QwenConfig, Reduction, Schedule, VambaConfig, VisionConfig
from hybridvlm.inference import functions
from hybridvlm.inference.model import Model
from hybridvlm.inference.placement import row_parts, to_host
from hybridvlm.inference.program_cache import ProgramCache
from hybridvlm.inference.sampling import Sampling
from hybridvlm.models.family import family_for
from hybridvlm.models.media import Clip
from hybridvlm.models.prompt import PromptStyle
from hybridvlm.parallel.step_bytes import decode_step_bytes
from hybridvlm.sharding import make_mesh
from hybridvlm.tokenizers.word_level import WordLevel

# 16 tokens: cut over any of the meshes here; 15 are whole everywhere
WORDS = ("red", "green", "blue", "what", "where", "?", "a", "b", "c", "d", "e", "f", "g")


class Words(WordLevel):
    """Words that are not in the vocabulary, as chat templates have them, are one of those that are."""

    def id(self, word: str) -> int:
        return self._id.get(word, 2 + zlib.crc32(word.encode()) % len(WORDS))


HYBRID = ModelConfig(
    pattern="M*E-M-",
    width=32,
    vocab_size=16,
    mamba_heads=8,
    mamba_head_dim=4,
    ssm_groups=2,
    ssm_state=8,
    attention_heads=8,
    kv_heads=2,
    head_dim=8,
    mlp_width=48,
    experts=4,
    experts_per_token=2,
    expert_width=16,
    shared_width=16,
    mamba_bias=True,
    mlp_bias=True,
    eos_ids=(1,),
    vision=VisionConfig(
        kind="stem", image_size=(16, 16), patch_size=8, width=12, downsample=1, max_frames=8, stem_channels=(4,)
    ),
    name="hybrid",
)
TUBELETS = VisionConfig(
    kind="qwen",
    image_size=(32, 32),
    patch_size=8,
    width=16,
    downsample=2,
    temporal_patch=2,
    layers=2,
    heads=2,
    mlp_width=24,
    projector_width=64,
    deepstack=(0,),
    patch_bias=True,
    position_rows=4,
    activation="gelu_tanh",
)
QWEN = QwenConfig(
    pattern="*-*-*-",
    width=32,
    vocab_size=16,
    attention_heads=8,
    kv_heads=2,
    head_dim=8,
    mlp_width=48,
    qk_norm=True,
    rope_theta=10000.0,
    rope_sections=(2, 1, 1),
    rope_interleaved=True,
    mlp_gated=True,
    generation=3,
    tie_embeddings=True,
    image_pixels=(256, 4096),
    frame_pixels=(256, 4096),
    video_pixels=1 << 20,
    eos_ids=(1,),
    vision=TUBELETS,
    name="qwen",
)
VAMBA = VambaConfig(
    **{
        field.name: getattr(QWEN, field.name)
        for field in dataclasses.fields(QWEN)
        if field.name not in ("generation", "qk_norm", "rope_interleaved", "tie_embeddings", "vision", "name")
    }
    | {"mamba_heads": 4, "mamba_head_dim": 8, "ssm_state": 8, "longest_edge": 32, "shortest_edge": 16},
    vision=dataclasses.replace(TUBELETS, deepstack=(), position_rows=0, patch_bias=False),
    name="vamba",
)
CONFIGS = {
    "small": dataclasses.replace(HYBRID, pattern="M*"),
    "hybrid": HYBRID,
    "stamped": dataclasses.replace(HYBRID, pattern="M*-M*-", name="stamped"),  # text around each frame
    "odd vocabulary": dataclasses.replace(HYBRID, pattern="M*", vocab_size=15, tie_embeddings=True),
    "qwen": QWEN,
    "vamba": VAMBA,
}
BUCKETS = Buckets(frames=(4, 8), text=(16, 64), max_new=12)
REDUCED_TEXT = Reduction("str-attention", 0.6)
REDUCED = Reduction("str", 0.25, schedule=Schedule(floor=0.05))
LOOKAHEAD = Reduction("str-lookahead", 0.25, schedule=Schedule(floor=0.05))
AFTER_ATTENTION = Reduction("str-attention", 0.6, schedule=Schedule(floor=0.05))
BEST_FRAMES = dataclasses.replace(REDUCED, drop_text="best-frames")
EVS_PIXELS = Reduction("evs-pixels:0.5+str:0.6")
# name -> (config, sizes of the mesh, reduction, questions in a batch, whether conversations are held); those that begin with
# "memory" go on from a video memory on the mesh, and are compared with whole prompts on one device
CASES = {
    "small data=2 sequence=2 tensor=2": (
        "small",
        {"data": 2, "sequence": 2, "tensor": 2},
        Reduction("str", 0.6),
        1,
        False,
    ),
    "hybrid data=8": ("hybrid", {"data": 8}, REDUCED, 3, False),
    "hybrid tensor=8": ("hybrid", {"tensor": 8}, REDUCED, 2, False),
    "hybrid sequence=8": ("hybrid", {"sequence": 8}, REDUCED, 1, False),
    "hybrid data=2 sequence=2 tensor=2": ("hybrid", {"data": 2, "sequence": 2, "tensor": 2}, REDUCED, 3, True),
    "hybrid dense data=8": ("hybrid", {"data": 8}, None, 1, False),
    "hybrid dense tensor=8": ("hybrid", {"tensor": 8}, None, 1, False),
    "hybrid dense sequence=8": ("hybrid", {"sequence": 8}, None, 1, False),
    "hybrid dense sequence=4 tensor=2": ("hybrid", {"sequence": 4, "tensor": 2}, None, 1, True),
    "hybrid dense fsdp=2 tensor=4": ("hybrid", {"fsdp": 2, "tensor": 4}, None, 3, False),
    "hybrid fsdp=4 sequence=2": ("hybrid", {"fsdp": 4, "sequence": 2}, REDUCED, 3, False),
    "hybrid evs": ("hybrid", {"data": 2, "sequence": 2, "tensor": 2}, Reduction("evs", 0.5), 3, False),
    "stamped best-frames": ("stamped", {"data": 2, "sequence": 2, "tensor": 2}, BEST_FRAMES, 3, True),
    "stamped sequence=8": ("stamped", {"sequence": 8}, BEST_FRAMES, 1, False),
    "memory stamped": ("stamped", {"sequence": 4, "tensor": 2}, BEST_FRAMES, 2, False),
    "hybrid tome": ("hybrid", {"data": 2, "sequence": 2, "tensor": 2}, Reduction("tome", 0.5), 3, False),
    "hybrid sparsevlm": ("hybrid", {"data": 2, "sequence": 2, "tensor": 2}, Reduction("sparsevlm", 0.7), 3, False),
    "qwen visionzip": ("qwen", {"data": 2, "sequence": 2, "tensor": 2}, Reduction("visionzip", 0.5), 3, False),
    "hybrid lookahead": ("hybrid", {"data": 2, "sequence": 2, "tensor": 2}, LOOKAHEAD, 3, False),
    "qwen lookahead": ("qwen", {"sequence": 4, "tensor": 2}, LOOKAHEAD, 2, False),
    "hybrid avgpool": ("hybrid", {"data": 2, "sequence": 4}, Reduction("avgpool", 0.25), 3, False),
    "odd vocabulary": ("odd vocabulary", {"sequence": 2, "tensor": 4}, None, 1, False),
    "qwen data=8": ("qwen", {"data": 8}, REDUCED, 3, False),
    "qwen tensor=8": ("qwen", {"tensor": 8}, REDUCED, 1, False),
    "qwen sequence=8": ("qwen", {"sequence": 8}, REDUCED, 1, False),
    "qwen data=2 sequence=2 tensor=2": ("qwen", {"data": 2, "sequence": 2, "tensor": 2}, None, 3, True),
    "memory small data=2 sequence=2 tensor=2": (
        "small",
        {"data": 2, "sequence": 2, "tensor": 2},
        Reduction("str", 0.6),
        1,
        False,
    ),
    "memory hybrid data=2 sequence=2 tensor=2": ("hybrid", {"data": 2, "sequence": 2, "tensor": 2}, REDUCED, 3, True),
    "memory hybrid tensor=8": ("hybrid", {"tensor": 8}, AFTER_ATTENTION, 2, False),
    "memory hybrid sequence=8": ("hybrid", {"sequence": 8}, AFTER_ATTENTION, 1, False),
    "memory hybrid fsdp=4 sequence=2": ("hybrid", {"fsdp": 4, "sequence": 2}, LOOKAHEAD, 3, False),
    "memory qwen sequence=4 tensor=2": ("qwen", {"sequence": 4, "tensor": 2}, LOOKAHEAD, 2, False),
    "vamba data=2 tensor=4": ("vamba", {"data": 2, "tensor": 4}, REDUCED_TEXT, 3, False),
    "vamba data=8": ("vamba", {"data": 8}, None, 3, True),
    "vamba sequence=8": ("vamba", {"sequence": 8}, REDUCED_TEXT, 1, False),
    "vamba fsdp=4 sequence=2": ("vamba", {"fsdp": 4, "sequence": 2}, None, 3, False),
    "vamba data=2 sequence=2 tensor=2": ("vamba", {"data": 2, "sequence": 2, "tensor": 2}, REDUCED_TEXT, 3, True),
    "vamba dense sequence=4 tensor=2": ("vamba", {"sequence": 4, "tensor": 2}, None, 1, True),
    "hybrid evs-pixels": ("hybrid", {"data": 2, "sequence": 2, "tensor": 2}, EVS_PIXELS, 3, False),
    "qwen evs-pixels": ("qwen", {"data": 2, "sequence": 2, "tensor": 2}, EVS_PIXELS, 1, True),
    "vamba evs-pixels": ("vamba", {"data": 2, "sequence": 4}, Reduction("evs-pixels", 0.5), 3, False),
    "vamba evs": ("vamba", {"data": 2, "sequence": 4}, Reduction("evs", 0.5), 3, False),
    "vamba avgpool": ("vamba", {"data": 2, "sequence": 4}, Reduction("avgpool", 0.25), 3, False),
}


def random_model(config: ModelConfig) -> Model:
    """Weights that make every token depend on much of what was before it."""
    family = family_for(config)
    rng = np.random.default_rng(0)

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        leaf = name.rsplit("/", 1)[-1]
        if leaf in ("dt_bias", "A_log") or leaf.endswith("norm") or leaf == "norm_f":
            return rng.normal(0.5, 0.2, shape)
        return rng.normal(0, 1 / np.sqrt(shape[-2] if len(shape) > 1 else 4), shape)

    shapes = folder.expected_shapes(config, family)
    flat = {name: draw(name, shape).astype(np.float32) for name, shape in shapes.items()}
    words = WORDS[: config.vocab_size - 3]
    tokenizer = Words.from_words(words, special=("<pad>", "<eos>"))
    style = PromptStyle(question="what {question} ?") if family.NAME == "nemotron_vl" else family.style_for(config)
    if config.name == "stamped":
        style = dataclasses.replace(style, before="f", frame="a {number} b", after_frame="c", between="d")
    params = jax.tree.map(jax.numpy.asarray, folder.unflatten(flat))
    return Model(config, params, tokenizer, buckets=BUCKETS, style=style, family=family)


def clip(frames: int, seed: int, config: ModelConfig) -> Clip:
    rng = np.random.default_rng(seed)
    t = config.tower.temporal_patch
    pixels = rng.integers(0, 256, (frames * t, *config.tower.image_size, 3)).astype(np.uint8)
    return Clip(tuple(float(i) for i in range(frames * t)), pixels)


def difference(got: np.ndarray, want: np.ndarray) -> float:
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.max(np.abs(got - want)) / np.max(np.abs(want)))


def batch_of(model: Model, rows: int, reduction: Reduction | None):
    """Questions of several lengths about clips of several numbers of frames."""
    clips = [clip(frames, i, model.config) for i, frames in zip(range(rows), (5, 7, 6), strict=False)]
    questions = ["red a b c"[: 3 + 2 * i] for i in range(rows)]
    batch, plan = model.batch(questions, [c.seconds for c in clips], reduction)
    return batch, plan, model.family.pixels(model.config, clips, 8)


def run(model: Model, rows: int, reduction: Reduction | None, memory: bool = False):
    """What a model on one device and on a mesh must agree on: an answer, and what is drawn after a piece of text behind the prompt."""
    batch, plan, pixels = batch_of(model, rows, reduction)
    if plan is not None and plan.pixel_selection is not None:
        visual = model.encode(pixels, keep=plan.pixel_selection, frame_count=batch.frame_count)
    else:
        visual = model.encode(pixels, attention=plan is not None and plan.needs_attention)
    if memory:
        visual = model.build_video_memory(batch, visual, plan)
    generation = model.generate(batch, visual, plan, max_new=5)
    model.verify(generation)
    caches = model.prefill(batch, visual, plan).decoder.caches
    ids, real = np.asarray([[3, 4, 5, 0]] * rows, np.int32), np.asarray([[1, 1, 1, 0]] * rows, np.int32)
    extended, longer = model.extend(ids, real, caches)
    sampling = Sampling(1.0, 0.7, ())
    drawn, _, _ = model.decode(extended, longer, np.arange(rows, dtype=np.int32), max_new=4, sampling=sampling)
    out = generation.prefilled
    logits, extended, kept = to_host((out.logits, extended, out.decoder.kept))
    survivors = [index[:rows][visual[:rows]].tolist() for index, visual in to_host(out.decoder.survivors)]
    tokens = generation.tokens, drawn.tolist()
    return logits[:rows], extended[:rows], (kept[:, :rows].tolist(), survivors), tokens


def answers(model: Model, reduction: Reduction | None) -> list[Any]:
    """A conversation about a clip, with a further question, one about an image, and text alone, shown as it comes."""
    said: list[Any] = []
    for video in (clip(5, 7, model.config), clip(1, 3, model.config).frames[0], None):
        own = reduction if video is not None else None
        show = said.append if video is None else None
        answer = model.ask(video, "where red ?", reduction=own, decode_capacity=40, max_new=12, show=show)
        said += [answer.text, answer.survivors.tolist(), answer.stages]
        if isinstance(video, Clip):
            told = answer.conversation.ask("b c ?", max_new=12)
            said += [told.text, told.continued]
    return said


def step_bytes(model: Model) -> dict[str, int]:
    """Bytes that collectives give a device in one step of the compiled decode loop: over the batch alone, and over all other axes."""
    found = {"batch": 0, "others": 0}
    for (_, _, static, *_), program in model.programs._programs.items():
        phase = dict(static).get("phase")
        for line in program.as_text().splitlines() if phase is functions.decode_tokens else ():
            call = re.search(
                r"= (.*?) (?:all-reduce|all-gather|collective-permute)\(.*op_name=\"[^\"]*/body/(\w+)\"", line
            )
            if call:
                sizes = [[int(n) for n in size.split(",") if n] for size in re.findall(r"[fs]32\[([\d,]*)\]", call[1])]
                found["batch" if call[2] == "pmin" else "others"] += 4 * sum(map(math.prod, sizes))
    return found


def main(names: list[str]) -> None:
    jax.config.update("jax_default_matmul_precision", "highest")
    assert jax.device_count() == 8, jax.devices()
    models, wanted = {}, {}
    for name in names:
        kind, sizes, reduction, rows, talks = CASES[name]
        if kind not in models:
            models[kind] = random_model(CONFIGS[kind])
        model, key = models[kind], (kind, reduction, rows, talks)
        if key not in wanted:
            wanted[key] = run(model, rows, reduction), answers(model, reduction) if talks else []
        on_mesh = dataclasses.replace(model.to_mesh(make_mesh(**sizes)), programs=ProgramCache())
        want, said = wanted[key]
        got = run(on_mesh, rows, reduction, name.startswith("memory"))
        case = {
            "case": name,
            "logits": difference(got[0], want[0]),
            "extended": difference(got[1], want[1]),
            "kept": got[2] == want[2],
            "tokens": got[3] == want[3],
            "answers": (answers(on_mesh, reduction) if talks else []) == said,
        }
        part = on_mesh._part
        want_bytes = decode_step_bytes(part, -(-rows // row_parts(on_mesh.mesh)), 4)
        told = {"batch": want_bytes.pop("batch"), "others": sum(want_bytes.values())}
        # weights that fsdp cuts come on top, and VAMBA's layers are a loop of their own in that of the steps
        case["step bytes"] = (
            part.shared != () or kind == "vamba" or step_bytes(on_mesh) == told or [step_bytes(on_mesh), told]
        )
        print(json.dumps(case), flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or list(CASES)))
