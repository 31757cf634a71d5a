"""Least seconds of tower, prefill and a decoded token by a roofline, and what devices send one another.

Each is the longest of three: operations over the chip's peak, bytes of memory over its bandwidth, bytes sent over its links. No
program is faster; how near one comes is for measuring (hybridvlm/bench).
"""

from __future__ import annotations

import dataclasses
import math

from hybridvlm.config import ATTENTION, MAMBA, MOE, ModelConfig, VambaConfig
from hybridvlm.estimates.memory import memory
from hybridvlm.estimates.workload import MeshSizes, Workload, dealt_frames, local_batch, local_part, weight_bytes
from hybridvlm.hardware import Chip, Peaks


@dataclasses.dataclass(frozen=True)
class Phase:
    """One program on one device: operations, bytes of its memory that pass, bytes sent to other devices, and its least seconds."""

    flops: float
    moved: float
    sent: float
    seconds: float
    bound: str

    @classmethod
    def of(cls, flops: float, moved: float, sent: float, chip: Chip, peaks: Peaks, dtype: str) -> Phase:
        """The phase, with the longest of its three times."""
        times = {
            "compute": flops / peaks.flops[dtype],
            "memory": moved / peaks.bandwidth,
            "links": 2 * sent / chip.link,  # a link's figure counts both directions
        }
        bound = max(times, key=lambda name: times[name])
        return cls(flops, moved, sent, times[bound], bound)


def phases(work: Workload, mesh: MeshSizes, chip: Chip, peaks: Peaks) -> dict[str, Phase]:
    """ "tower", "prefill" and "decode" (of one token) on one device of a mesh; where there are frames, "further" too: the prefill
    of a further question on the same video. VAMBA's text reads the video through other layers, and has none."""
    rows, cost, held = local_batch(work, mesh), work.plan.cost, memory(work, mesh)
    item, spread = work.itemsize, mesh.tensor * mesh.sequence
    vision = weight_bytes(work.config, mesh, item, "vision/") + weight_bytes(work.config, mesh, item, "projector/")
    decoder = held.weights - vision
    made = {
        "prefill": (
            rows * (cost.decoder + cost.scoring) / spread,
            decoder + held.visual + held.caches + held.states,
            _prefill_sent(work, mesh),
        ),
        "decode": (
            rows * _token_flops(work) / spread,
            _read_weights(work, mesh, rows) + held.caches + 2 * held.states,
            _decode_sent(work, mesh),
        ),
    }
    if work.frames and not isinstance(work.config, VambaConfig):
        # it reads the residual stream that the first question left, or, with every layer shared, the caches alone
        stream = held.visual if work.plan.shared_layers < work.plan.layers else 0
        made["further"] = (
            rows * (work.plan.further_flops(work.config, work.question) + cost.scoring) / spread,
            decoder + stream + held.caches + held.states,
            _prefill_sent(work, mesh, work.plan.shared_layers),
        )
    if work.frames:
        dealt, frames = dealt_frames(work, mesh)
        visual = dealt * frames * work.config.vision.tokens_per_frame * work.config.width * work.planes * item
        # rows are gathered by the devices that took frames of one shard of them
        others = (mesh.tensor if work.batch >= mesh.batch else mesh.tensor * mesh.batch) - 1
        made["tower"] = (dealt * frames * cost.vision / work.groups, vision + visual, visual * others)
    return {name: Phase.of(*figures, chip, peaks, work.dtype) for name, figures in made.items()}


def _part(devices: int) -> float:
    """The share of an array that each device sends while all gather it, or sum it into parts."""
    return (devices - 1) / devices


def _prefill_sent(work: Workload, mesh: MeshSizes, shared: int = 0) -> float:
    """Bytes that one device sends during the prefill; of a further question, which finds the first `shared` layers done but for
    its own text."""
    rows, item, plan = local_batch(work, mesh), work.itemsize, work.plan
    config = work.config
    width, layers = config.width, range(shared, plan.layers)
    pattern = plan.pattern
    sent = 2 * _part(mesh.tensor) * shared * work.question / mesh.sequence * rows * width * item
    if mesh.tensor > 1:  # every layer ends in a sum over the devices that hold parts of it
        lengths = [work.text if isinstance(config, VambaConfig) else plan.row_length(i) for i in layers]
        if isinstance(config, VambaConfig):
            lengths = [3 * work.text + plan.row_length(i) for i in layers]
        sent += 2 * _part(mesh.tensor) * sum(lengths) / mesh.sequence * rows * width * item
    if mesh.sequence > 1:
        part = local_part(config, mesh)
        mixers = pattern[shared:].count(MAMBA)
        if isinstance(config, VambaConfig):
            # the text's rows over each shard of the video are joined by their log-sum-exp, in float32; no key is sent
            mixers = plan.layers - 1
            joined = plan.layers * work.text * part.attention_heads * (part.head_dim + 1) * 4
            sent += 2 * _part(mesh.sequence) * rows * joined
        else:
            keys = sum(plan.row_length(i) for i in layers if pattern[i] == ATTENTION)
            sent += _part(mesh.sequence) * rows * keys * 2 * part.kv_heads * part.head_dim * item
        states = 4 * part.mamba_width * part.ssm_state * mixers
        sent += rows * states * (1 + math.ceil(math.log2(mesh.sequence)))
        dropped = sum(plan.row_length(i + 1) for i in plan.drops if shared - 1 <= i < plan.layers - 1)
        sent += _part(mesh.sequence) * rows * dropped * width * item
    return sent + _gathered_weights(work, mesh)


def _gathered_weights(work: Workload, mesh: MeshSizes) -> float:
    """Bytes of weights that one device sends while each layer's shares are put together."""
    return (mesh.fsdp - 1) * weight_bytes(work.config, mesh, work.itemsize, "decoder/") if mesh.fsdp > 1 else 0.0


def _decode_sent(work: Workload, mesh: MeshSizes) -> float:
    """Bytes that one device sends for one token of each of its prompts."""
    rows, item, config = local_batch(work, mesh), work.itemsize, work.config
    layers, attention = len(config.pattern), config.pattern.count(ATTENTION)
    sent = 2 * _part(mesh.tensor) * layers * rows * config.width * item if mesh.tensor > 1 else 0.0
    if mesh.sequence > 1:  # partial attention is joined by its log-sum-exp, in float32
        part = local_part(config, mesh)
        sent += 2 * _part(mesh.sequence) * attention * rows * part.attention_heads * (part.head_dim + 1) * 4
    return sent + _gathered_weights(work, mesh)


def _token_flops(work: Workload) -> float:
    """Operations of one decoded token: two per weight that it meets, and attention over the caches."""
    config: ModelConfig = work.config
    weights = _met_weights(config)
    row = 2 * config.attention_heads * config.head_dim * 2
    seen = sum(work.plan.row_length(i) for i in range(work.plan.layers) if work.plan.pattern[i] == ATTENTION)
    return 2 * weights + row * seen


def _met_weights(config: ModelConfig) -> float:
    """Weights that one token is multiplied with: of experts those chosen."""
    one = MeshSizes()
    weights = weight_bytes(config, one, 1, "decoder/")
    weights += config.width * config.vocab_size
    if MOE in config.pattern:
        weights -= _expert_weights(config) * (config.experts - config.experts_per_token)
    return weights


def _expert_weights(config: ModelConfig) -> int:
    """Weights of one expert, over all layers of experts."""
    return 2 * (config.expert_latent or config.width) * config.expert_width * config.pattern.count(MOE)


def _read_weights(work: Workload, mesh: MeshSizes, rows: int) -> float:
    """Bytes of weights that a decode step reads on one device: of experts at most one per token and choice."""
    config, item = work.config, work.itemsize
    whole = dataclasses.replace(mesh, fsdp=1)
    read = weight_bytes(config, whole, item, "decoder/") + config.width * config.vocab_size * item / mesh.tensor
    if MOE in config.pattern:
        idle = max(0, config.experts - rows * config.experts_per_token)
        read -= _expert_weights(config) * idle * item / mesh.tensor
    return read
