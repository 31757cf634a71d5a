"""Names and shapes of published tensors, and where each lands in our parameters: tables and a function to follow them.

`RENAMES` brings the known spellings of a name to the one that the tables use (the published one, without the prefixes
that differ between releases), `SPLITS` cuts fused tensors, and a `Row` says which tensor makes which of our arrays. A
row whose source has {i} stacks one tensor per layer. Linear weights are [out,in] in checkpoints and [in,out] here.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from hybridvlm.config import ModelConfig, VisionConfig

Shape = tuple[int, ...]

RENAMES: tuple[tuple[str, str], ...] = (
    # the language model: text-only (`model.`, `backbone.`) or inside a VLM (`language_model.` before it)
    (r"^language_model\.", ""),
    (r"^model\.(?=layers\.|embeddings?\.|norm_f\.)", "backbone."),
    (r"^backbone\.embedding\.", "backbone.embeddings."),
    # the tower: in-memory names of transformers -> published names without `vision_model.radio_model.model.`
    (r"^vision_model\.", ""),
    (r"^radio_model\.(?:model\.)?", ""),
    (r"^embeddings\.patch_projection\.", "patch_generator.embedder."),
    (r"^embeddings\.video_patch_projection\.", "patch_generator.video_embedder."),
    (r"^embeddings\.position_embedding$", "patch_generator.pos_embed"),
    (r"^embeddings\.cls_register_token$", "patch_generator.cls_token.token"),
    (r"^encoder\.layer\.(\d+)\.", r"blocks.\1."),
    (r"^(blocks\.\d+)\.attention\.o_proj\.", r"\1.attn.proj."),
    (r"^(blocks\.\d+)\.attention\.", r"\1.attn."),
    (r"^(blocks\.\d+)\.(?:ls|layer_scale)([12])(?:\.gamma|\.lambda1)?$", r"\1.ls\2"),
    # the projector
    (r"^multi_modal_projector\.layer_norm\.", "mlp1.0."),
    (r"^multi_modal_projector\.linear_1\.", "mlp1.1."),
    (r"^multi_modal_projector\.linear_2\.", "mlp1.3."),
)

SPLITS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"^(blocks\.\d+\.attn)\.qkv\.", (r"\1.q_proj.", r"\1.k_proj.", r"\1.v_proj.")),
)


def _same(x: np.ndarray, c: Any) -> np.ndarray:
    return x


def _linear(x: np.ndarray, c: Any) -> np.ndarray:
    return x.T


def _conv(x: np.ndarray, c: ModelConfig) -> np.ndarray:
    return x[:, 0].T  # [channels,1,W] -> [W,channels]


def _square_table(x: np.ndarray, c: VisionConfig) -> np.ndarray:
    return x.reshape(c.position_rows, c.position_rows, c.width)


@dataclasses.dataclass(frozen=True)
class Row:
    """One of our arrays: its path in the parameters, the tensor it comes from, that tensor's shape, how it is turned.

    scale: a tensor that multiplies the outputs (LayerScale), folded in where the checkpoint has one. when: whether a
    config has this array at all.
    """

    target: str
    source: str
    shape: Callable[[Any], Shape]
    turn: Callable[[np.ndarray, Any], np.ndarray] = _same
    scale: str = ""
    when: Callable[[Any], bool] = lambda c: True


def _width(c: ModelConfig) -> Shape:
    return (c.width,)


_M, _A, _F, _L = "decoder/mamba/", "decoder/attention/", "decoder/mlp/", "backbone.layers.{i}."


def _attention_rows(name: str, heads: str) -> tuple[Row, ...]:
    """Projection, bias and norm of q, k or v; `heads` names the config's count of heads."""
    source = f"{_L}mixer.{name}"
    return (
        Row(f"{_A}{name}_proj", f"{source}_proj.weight", lambda c: (getattr(c, heads) * c.head_dim, c.width), _linear),
        Row(
            f"{_A}{name}_bias",
            f"{source}_proj.bias",
            lambda c: (getattr(c, heads) * c.head_dim,),
            when=lambda c: c.attention_bias,
        ),
        Row(
            f"{_A}{name}_norm",
            f"{source}_norm.weight",
            lambda c: (c.head_dim,),
            when=lambda c: c.qk_norm and name != "v",
        ),
    )


DECODER: dict[str, tuple[Row, ...]] = {
    "M": (
        Row(_M + "norm", _L + "norm.weight", _width),
        Row(_M + "in_proj", _L + "mixer.in_proj.weight", lambda c: (c.in_proj_width, c.width), _linear),
        Row(_M + "conv_weight", _L + "mixer.conv1d.weight", lambda c: (c.conv_width, 1, c.conv_kernel), _conv),
        Row(_M + "conv_bias", _L + "mixer.conv1d.bias", lambda c: (c.conv_width,), when=lambda c: c.conv_bias),
        Row(_M + "A_log", _L + "mixer.A_log", lambda c: (c.mamba_heads,)),
        Row(_M + "D", _L + "mixer.D", lambda c: (c.mamba_heads,)),
        Row(_M + "dt_bias", _L + "mixer.dt_bias", lambda c: (c.mamba_heads,)),
        Row(_M + "gate_norm", _L + "mixer.norm.weight", lambda c: (c.mamba_width,)),
        Row(_M + "out_proj", _L + "mixer.out_proj.weight", lambda c: (c.width, c.mamba_width), _linear),
    ),
    "*": (
        Row(_A + "norm", _L + "norm.weight", _width),
        *_attention_rows("q", "attention_heads"),
        *_attention_rows("k", "kv_heads"),
        *_attention_rows("v", "kv_heads"),
        Row(_A + "o_proj", _L + "mixer.o_proj.weight", lambda c: (c.width, c.attention_heads * c.head_dim), _linear),
    ),
    "-": (
        Row(_F + "norm", _L + "norm.weight", _width),
        Row(_F + "up_proj", _L + "mixer.up_proj.weight", lambda c: (c.mlp_width, c.width), _linear),
        Row(_F + "down_proj", _L + "mixer.down_proj.weight", lambda c: (c.width, c.mlp_width), _linear),
    ),
}

TOP: tuple[Row, ...] = (
    Row("embed", "backbone.embeddings.weight", lambda c: (c.vocab_size, c.width)),
    Row("decoder/norm_f", "backbone.norm_f.weight", lambda c: (c.width,)),
    Row("lm_head", "lm_head.weight", lambda c: (c.vocab_size, c.width), _linear, when=lambda c: not c.tie_embeddings),
)


def _merged(c: ModelConfig) -> int:
    return c.vision.width * c.vision.downsample**2


PROJECTOR: tuple[Row, ...] = (
    Row("projector/norm", "mlp1.0.weight", lambda c: (_merged(c),)),
    Row("projector/up_proj", "mlp1.1.weight", lambda c: (c.vision.projector_width, _merged(c)), _linear),
    Row("projector/down_proj", "mlp1.3.weight", lambda c: (c.width, c.vision.projector_width), _linear),
)

RADIO_TOP: tuple[Row, ...] = (
    Row("vision/patch_embed", "patch_generator.embedder.weight", lambda c: (c.width, 3 * c.patch_size**2), _linear),
    Row(
        "vision/video_patch_embed",
        "patch_generator.video_embedder.weight",
        lambda c: (c.width, c.temporal_patch * 3 * c.patch_size**2),
        _linear,
        when=lambda c: c.temporal_patch > 1,
    ),
    Row("vision/position", "patch_generator.pos_embed", lambda c: (1, c.position_rows**2, c.width), _square_table),
    Row("vision/prefix", "patch_generator.cls_token.token", lambda c: (c.prefix_tokens, c.width)),
)


def _block_rows(name: str, source: str, out: str, into: str = "", scale: str = "") -> tuple[Row, Row]:
    """Weight and bias of one part of a transformer block; without `into` a LayerNorm, else a linear map."""
    stem = name.removesuffix("_proj") if into else name
    weight = Row(
        f"vision/blocks/{name}",
        f"blocks.{{i}}.{source}.weight",
        (lambda c: (getattr(c, out), getattr(c, into))) if into else (lambda c: (getattr(c, out),)),
        _linear if into else _same,
        scale,
    )
    bias = Row(f"vision/blocks/{stem}_bias", f"blocks.{{i}}.{source}.bias", lambda c: (getattr(c, out),), scale=scale)
    return weight, bias


RADIO_BLOCK: tuple[Row, ...] = (
    *_block_rows("norm1", "norm1", "width"),
    *_block_rows("q_proj", "attn.q_proj", "width", "width"),
    *_block_rows("k_proj", "attn.k_proj", "width", "width"),
    *_block_rows("v_proj", "attn.v_proj", "width", "width"),
    *_block_rows("o_proj", "attn.proj", "width", "width", "blocks.{i}.ls1"),
    *_block_rows("norm2", "norm2", "width"),
    *_block_rows("fc1", "mlp.fc1", "mlp_width", "width"),
    *_block_rows("fc2", "mlp.fc2", "width", "mlp_width", "blocks.{i}.ls2"),
)


def canonical(name: str) -> tuple[str, ...]:
    """The tables' spelling of a tensor's name (several for a fused tensor, in order); an unknown one stays as it is."""
    for pattern, to in RENAMES:
        name = re.sub(pattern, to, name)
    for pattern, parts in SPLITS:
        if re.match(pattern, name):
            return tuple(re.sub(pattern, part, name) for part in parts)
    return (name,)


def _idle(name: str, config: ModelConfig | VisionConfig) -> bool:
    """Tensors that a checkpoint may hold unused: constants of the config, a tied head, a video patch embedding."""
    vision = config if isinstance(config, VisionConfig) else config.vision
    if name == "lm_head.weight":
        return isinstance(config, ModelConfig) and config.tie_embeddings
    if name == "patch_generator.video_embedder.weight":
        return vision is not None and vision.temporal_patch == 1
    return re.match(r"^(?:input_conditioner\.\w+|summary_idxs)$", name) is not None


def _jobs(config: ModelConfig | VisionConfig) -> list[tuple[Any, Row, list[int] | None]]:
    """(config that the row's shape asks, row, layer numbers to stack or None) for every array that `config` has."""
    jobs: list[tuple[Any, Row, list[int] | None]] = []
    vision = config if isinstance(config, VisionConfig) else config.vision
    if isinstance(config, ModelConfig):
        jobs += [(config, row, None) for row in TOP]
        for kind, rows in DECODER.items():
            layers = [i for i, letter in enumerate(config.pattern) if letter == kind]
            jobs += [(config, row, layers) for row in rows if layers]
        jobs += [(config, row, None) for row in PROJECTOR if vision is not None]
    if vision is not None:
        if vision.kind != "radio":
            raise ValueError(f"only towers of kind 'radio' have published names, got kind {vision.kind!r}")
        jobs += [(vision, row, None) for row in RADIO_TOP]
        jobs += [(vision, row, list(range(vision.layers))) for row in RADIO_BLOCK]
    return [job for job in jobs if job[1].when(job[0])]


def params_from_hf(
    config: ModelConfig | VisionConfig, tensors: Mapping[str, np.ndarray], *, dtype: Any = None
) -> dict[str, Any]:
    """Our parameters (nested dict of NumPy arrays) from a checkpoint's tensors, under any of their published names.

    A ModelConfig takes embeddings, decoder and head, and with `config.vision` the tower and the projector; a
    VisionConfig takes a RADIO tower alone and gives what lies under params["vision"]. dtype: cast to it (default: as
    stored).
    ValueError lists every tensor that is missing, has another shape than the config says, or has no place to go.
    """
    jobs = _jobs(config)
    sources: dict[str, tuple[str, int, int]] = {}  # the tables' name -> name in the checkpoint, part, parts
    for stored in tensors:
        names = canonical(stored)
        sources.update({name: (stored, part, len(names)) for part, name in enumerate(names)})
    used: set[str] = set()
    faults: dict[str, None] = {}  # in order, each once

    def fetch(name: str, shape: Shape) -> np.ndarray | None:
        if name not in sources:
            faults[f"missing: {name} {shape}"] = None
            return None
        stored, part, parts = sources[name]
        used.add(stored)
        x = np.asarray(tensors[stored])
        whole = (shape[0] * parts, *shape[1:])
        if x.shape != whole:
            faults[f"wrong shape: {stored} should be {whole}, is {x.shape}"] = None
            return None
        return x[part * shape[0] : (part + 1) * shape[0]]

    def build(c: Any, row: Row, layer: int | None) -> np.ndarray | None:
        shape = row.shape(c)
        x = fetch(row.source.format(i=layer), shape)
        scale = row.scale.format(i=layer)
        if scale in sources:
            factor = fetch(scale, shape[:1])
            if x is not None and factor is not None:
                x = x * factor.reshape(-1, *(1,) * (x.ndim - 1))
        if x is None:
            return None
        x = row.turn(x, c)
        return x if dtype is None else x.astype(dtype)

    params: dict[str, Any] = {}
    for c, row, layers in jobs:
        built = [build(c, row, layer) for layer in ([None] if layers is None else layers)]
        arrays = [x for x in built if x is not None]
        if len(arrays) < len(built):
            continue
        *path, leaf = row.target.split("/")
        node = params
        for key in path:
            node = node.setdefault(key, {})
        node[leaf] = np.ascontiguousarray(arrays[0]) if layers is None else np.stack(arrays)
    for name, (stored, _, _) in sources.items():
        if stored not in used and not _idle(name, config):
            faults[f"no place for: {stored}"] = None
    if faults:
        who = getattr(config, "name", "") or type(config).__name__
        raise ValueError(f"the checkpoint does not fit the config {who}:\n  " + "\n  ".join(faults))
    return params["vision"] if isinstance(config, VisionConfig) else params
