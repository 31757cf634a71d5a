"""Bytes of memory that one device needs, by part, counted from shapes: weights, caches, states, visual tokens, activations.

Inference is three programs (tower, prefill, decoding), each with its own arguments, results and temporaries; a device needs what the
largest of them needs. Weights, caches and states are exact. Activations are those of the layer that needs most: the compilers for
TPUs were found to keep about five copies of the residual stream, and of a layer its projections. Where memory is short, they
come by with half of that, by computing some of it again (hybridvlm/plan/README.md has the comparison).
"""

from __future__ import annotations

import dataclasses

from hybridvlm.config import ATTENTION, MAMBA, MLP, MOE, ModelConfig, VambaConfig, VisionConfig
from hybridvlm.estimates.workload import MeshSizes, Workload, dealt_frames, local_batch, local_part, weight_bytes
from hybridvlm.ops.pack import CHUNK
from hybridvlm.reduction import cost as flops
from hybridvlm.sharding import DEFAULT_RULES

RESIDUALS, LEAST_RESIDUALS = 5, 3  # copies of the residual stream, with memory to spare and without
EXCHANGED = 3  # copies of keys and values that shards gather
PROGRAMS = ("tower", "prefill", "decode")


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Attributes:
        weights: of tower and decoder.
        caches: keys and values after the prompt, with room for the answer.
        states: SSM and convolution states.
        visual: visual tokens, from the tower to the prefill.
        tower: pixels and activations of the tower.
        activations: of the prefill.
        least_activations: of the prefill where memory is short.
        decode: temporaries of decoding: the decoder's weights once more where they are copied before its loop.
    """

    weights: int
    caches: int
    states: int
    visual: int
    tower: int
    activations: int
    least_activations: int
    decode: int

    def program(self, name: str, *, least: bool = False) -> int:
        """Bytes of one of `PROGRAMS`, its arguments and results included."""
        if name == "tower":
            return self.weights + self.tower + self.visual
        if name == "prefill":
            inside = self.least_activations if least else self.activations
            return self.weights + self.visual + inside + self.caches + self.states
        return self.weights + self.caches + self.states + self.decode

    def peak(self, limit: int | None = None) -> int:
        """Bytes of the largest program; with `limit`, as a compiler makes it that has no more."""
        comfortable = max(self.program(name) for name in PROGRAMS)
        if limit is None or comfortable <= limit:
            return comfortable
        return max(self.program(name, least=True) for name in PROGRAMS)

    def fits(self, limit: int) -> bool:
        return self.peak(limit) <= limit

    @property
    def largest(self) -> str:
        """The program that needs most."""
        return max(PROGRAMS, key=self.program)


def memory(work: Workload, mesh: MeshSizes) -> Memory:
    """What one device of a mesh needs. ValueError for a mesh that the model cannot be cut over."""
    config, item, rows = work.config, work.itemsize, local_batch(work, mesh)
    vamba = isinstance(config, VambaConfig)
    part = config.mixer if vamba else local_part(config, mesh)
    lengths = [-(-work.plan.row_length(layer) // mesh.sequence) for layer in range(work.plan.layers)]
    caches, states = _caches(work, part, lengths, mesh)
    width = config.width * work.planes * item
    visual = rows * -(-work.visual_tokens // mesh.sequence) * width
    inside = _vamba_layer(work, config, mesh) if vamba else _layer(part, item)
    row = max(lengths) * rows
    head = config.vocab_size * config.width * item // mesh.tensor  # turned about for the product
    keys, drops = _row_exchange(work, part, mesh), _drops(work, lengths, rows)
    # keys and values of layers that run in a loop are one array until its end, from which they are cut layer by layer
    stacked = 0 if vamba else rows * caches
    activations, least = (
        head
        + stacked
        + max(row * (copies * config.width * item + inside) + keys, drops + 2 * row * config.width * item)
        for copies in (RESIDUALS, LEAST_RESIDUALS)
    )
    return Memory(
        weights=weight_bytes(config, mesh, item),
        caches=rows * caches,
        states=rows * states,
        visual=visual,
        tower=_tower(work, mesh) if work.frames else 0,
        activations=activations,
        least_activations=least,
        decode=_decode_copies(work, mesh),
    )


def _decode_copies(work: Workload, mesh: MeshSizes) -> int:
    """The decoder's weights once more, where they are brought together before a decode loop: see `nn.incremental.decode_layers`.

    A TPU's loop reads them where they lie, but for experts, of which its compiler copies every layer's out of the stack.
    """
    if mesh.fsdp == 1 and work.platform == "tpu" and not isinstance(work.config, VambaConfig):
        experts = ("decoder/moe/up", "decoder/moe/down") if MOE in work.config.pattern else ()
        return sum(weight_bytes(work.config, mesh, work.itemsize, name) for name in experts)
    return weight_bytes(work.config, dataclasses.replace(mesh, fsdp=1), work.itemsize, "decoder/")


def _caches(work: Workload, part: ModelConfig, lengths: list[int], mesh: MeshSizes) -> tuple[int, int]:
    """(bytes of keys and values, of states) of one prompt on one device."""
    item, counted = work.itemsize, work.plan.cost
    if isinstance(work.config, VambaConfig):
        return -(-counted.kv_bytes // (mesh.tensor * mesh.sequence)), -(-counted.state_bytes // mesh.tensor)
    slots = [length + work.max_new for length in lengths]
    return flops.kv_bytes(part, slots, item), flops.state_bytes(part, item)


def _layer(c: ModelConfig, item: int) -> int:
    """Bytes that the widest layer keeps of a token at once, besides the residual stream."""
    moe = c.experts_per_token * ((c.expert_latent or c.width) + c.expert_width) + 2 * c.shared_width
    widths = {
        MAMBA: 3 * c.mamba_width + 2 * c.conv_width,
        ATTENTION: 2 * (c.attention_heads + c.kv_heads) * c.head_dim,
        MLP: (3 if c.mlp_gated else 2) * c.mlp_width,
        MOE: moe,
    }
    return item * max(widths[kind] for kind in set(c.pattern))


def _vamba_layer(work: Workload, c: VambaConfig, mesh: MeshSizes) -> int:
    """The same of VAMBA: its video runs through Mamba blocks, its text through a Transformer."""
    return -(-_layer(c.mixer, work.itemsize) // mesh.tensor)


def _row_exchange(work: Workload, part: ModelConfig, mesh: MeshSizes) -> int:
    """What a device of a cut row holds of the others: keys and values of an attention layer, as they come and as they are read."""
    if mesh.sequence == 1 or ATTENTION not in part.pattern:
        return 0
    row = max(work.plan.row_length(layer) for layer in range(work.plan.layers))
    return EXCHANGED * local_batch(work, mesh) * 2 * row * part.kv_heads * part.head_dim * work.itemsize


def _drops(work: Workload, lengths: list[int], rows: int) -> int:
    """What is at hand while tokens are dropped: the shorter row, and of a cut one as much again that is on its way."""
    after = [lengths[site + 1] for site in work.plan.drops if site + 1 < len(lengths)]
    return 2 * rows * max(after, default=0) * work.config.width * work.itemsize


def _tower(work: Workload, mesh: MeshSizes) -> int:
    """Pixels and activations of a device's frames, a chunk at a time, and what is gathered of rows that are not its own."""
    v: VisionConfig = work.config.vision
    rows, each = dealt_frames(work, mesh)
    frames = rows * each
    others = rows - local_batch(work, mesh)
    gathered = others * -(-work.visual_tokens // mesh.sequence) * work.config.width * work.planes * work.itemsize
    height, width = v.image_size
    pixels = frames * v.temporal_patch * height * width * 3 * 5  # as bytes and as float32
    patches = (height // v.patch_size) * (width // v.patch_size) + v.prefix_tokens
    block = max(4 * v.width, 2 * v.width + v.mlp_width)
    merged = patches // v.downsample**2 * (v.width * v.downsample**2 + v.projector_width)
    inside = max(patches * (2 * v.width + block), merged) * work.itemsize
    if v.kind == "stem":
        inside = patches * (v.patch_size**2 * max(v.stem_channels, default=1) // 4 + 2 * v.width) * work.itemsize
    return pixels + min(frames, CHUNK) * inside + gathered


def training_memory(work: Workload, mesh: MeshSizes, trained: int, *, least: bool = False) -> int:
    """Bytes that a step of training needs on one device, with layers computed again in the backward pass.

    Args:
        work: rows of a step and their plan; its dtype is that of the computation.
        mesh: of the run.
        trained: parameters that are trained, of the whole model; float32 with AdamW's two moments and a gradient.
        least: where memory is short.
    """
    config, item, rows = work.config, work.itemsize, local_batch(work, mesh)
    part = config.mixer if isinstance(config, VambaConfig) else local_part(config, mesh)
    everything, text = weight_bytes(config, mesh, 1, "", DEFAULT_RULES), ("decoder/", "embed", "lm_head")
    whole, held = (sum(weight_bytes(config, m, 1, name, DEFAULT_RULES) for name in text) for m in (MeshSizes(), mesh))
    lengths = [-(-work.plan.row_length(layer) // mesh.sequence) for layer in range(work.plan.layers)]
    saved = rows * sum(lengths) * config.width * item * (1 if least else 2)
    inside = rows * max(lengths) * (RESIDUALS * config.width * item + _layer(part, item))
    embeddings = 2 * config.vocab_size * config.width * item // mesh.tensor  # gathered, as a step uses them
    share = min(1.0, trained / whole)  # the tower is frozen, as a rule
    weights = share * held * 16 + (everything - share * held) * item
    return int(weights + saved + inside * (1 if least else 2) + embeddings)
