"""What the devices of a mesh exchange for one decoded token, in bytes."""

from __future__ import annotations

from hybridvlm.config import ATTENTION, MAMBA
from hybridvlm.parallel.tensor import LocalConfig, LocalVambaConfig


def decode_step_bytes(c: LocalConfig, rows: int, itemsize: int) -> dict[str, int]:
    """Bytes of what a device gets from the collectives of one greedy decode step, by the mesh axis they run over.

    A sum of n bytes over t devices that stand in a ring sends 2 (t - 1) / t n from each. Weights that fsdp cuts come on top: all
    matrices of a device, gathered in every step.

    Args:
        c: what a device holds.
        rows: examples of a device.
        itemsize: bytes of an activation's number.

    Returns:
        {"tensor": the residual stream once per layer and once for the embedding, square means of SSM groups that several devices hold,
        and the likeliest token of each device; "sequence": per attention layer the heads' outputs and twice their weight, in float32;
        "batch": whether all examples have ended}.
    """
    stream = rows * c.width * itemsize
    # a text layer of VAMBA sums self-attention, cross-attention and MLP, and has no Mamba block
    sums = 3 * c.layers if isinstance(c, LocalVambaConfig) else len(c.pattern)
    tensor = sums * stream if c.devices > 1 else 0
    if c.group_devices > 1:
        groups = c.devices // c.group_devices
        tensor += c.count(MAMBA) * rows * groups * 4
    if c.vocab_devices > 1:
        tensor += stream + c.vocab_devices * rows * (4 + 4)
    sequence = c.count(ATTENTION) * rows * c.attention_heads * (c.head_dim + 2) * 4 if c.shards > 1 else 0
    return {"tensor": tensor, "sequence": sequence, "batch": 4}
