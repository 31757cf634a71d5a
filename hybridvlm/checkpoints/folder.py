"""The library's own checkpoint: a folder with config.json, model.safetensors and tokenizer.json.

config.json is a ModelConfig with {"format": "hybridvlm", "version": 1}, and optional sections "reduction" (what the
model was tuned under), "style" (the text around the frames) and "buckets". Tensor names are the paths of the
parameters, joined by "/".
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hybridvlm.config import Buckets, ModelConfig, Reduction, from_dict, to_dict
from hybridvlm.generate import Model
from hybridvlm.models.nemotron_vl import Batch, HybridVLM
from hybridvlm.models.prompt import PromptStyle
from hybridvlm.models.wordlevel import WordLevel

FORMAT, VERSION = "hybridvlm", 1
CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"
STORAGE = ("float32", "float16")
SECTIONS = {"reduction": Reduction, "style": PromptStyle, "buckets": Buckets}
# what makes decays and steps stays in fp32 whatever the model's dtype: the scan's sums are fp32, and these are small
FLOAT32 = ("A_log", "D", "dt_bias")
_DATA = pathlib.Path(__file__).parent.parent / "tiny" / "data"
PACKAGED = {"tiny": _DATA / "tiny", "tiny-reduced": _DATA / "tiny-reduced"}


class CheckpointError(ValueError):
    """A checkpoint folder that cannot be used; the message names the file and what is wrong with it."""


def flatten(params: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested dict of parameters as {"decoder/mamba/in_proj": leaf, ...}."""
    flat: dict[str, Any] = {}
    for name, value in params.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}/")
        else:
            flat[prefix + name] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Undo `flatten`."""
    params: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, name = path.split("/")
        level = params
        for parent in parents:
            level = level.setdefault(parent, {})
        level[name] = value
    return params


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter that a model of this config has, by flat name; nothing is allocated."""
    places = config.vision.tokens_per_frame if config.vision is not None else 1
    row = jax.ShapeDtypeStruct((1, places), jnp.int32)
    batch = Batch(row, row, row, jax.ShapeDtypeStruct((1,), jnp.int32))
    pixels = None
    if config.vision is not None:
        pixels = jax.ShapeDtypeStruct((1, 1, *config.vision.image_size, 3), jnp.uint8)
    variables = jax.eval_shape(HybridVLM(config).init, jax.random.key(0), batch, pixels)
    return {name: tuple(leaf.shape) for name, leaf in flatten(variables["params"]).items()}


def check_tensors(got: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Refuse missing, extra and misshapen tensors by name."""
    missing, extra = sorted(set(expected) - set(got)), sorted(set(got) - set(expected))
    shapes = [
        f"{n} {list(got[n])} instead of {list(expected[n])}"
        for n in sorted(expected)
        if n in got and got[n] != expected[n]
    ]
    wrong = [
        f"{what}: {_some(names)}"
        for what, names in (("missing", missing), ("not in the model", extra), ("shape", shapes))
        if names
    ]
    if wrong:
        raise CheckpointError(f"{where} does not fit its {CONFIG}; {'; '.join(wrong)}")


def _some(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


# -- writing ----------------------------------------------------------------------------------------------------------


def save_folder(path: str | pathlib.Path, model: Model, *, storage: str = "float32") -> pathlib.Path:
    """Write `model` as a checkpoint folder, whole or not at all; an older checkpoint at `path` is replaced.

    storage: "float32", or "float16" at half the bytes. ValueError for weights that are not finite in it, or a `path`
    that holds anything else than a checkpoint.
    """
    from safetensors.numpy import save_file

    if storage not in STORAGE:
        raise ValueError(f"storage must be one of {STORAGE}, got {storage!r}")
    path = pathlib.Path(path)
    if path.exists() and not (path / CONFIG).is_file():
        raise ValueError(f"{path} exists and is not a checkpoint folder; choose another path or remove it")
    tensors = {}
    for name, leaf in flatten(model.params).items():
        array = np.asarray(jax.device_get(leaf)).astype(np.float32)
        with np.errstate(over="ignore"):
            array = array.astype(storage)
        if not np.isfinite(array).all():
            raise ValueError(f"parameter {name} is not finite in {storage}; the checkpoint was not written")
        tensors[name] = np.ascontiguousarray(array)
    check_tensors({n: a.shape for n, a in tensors.items()}, expected_shapes(model.config), "the model")
    config = {"format": FORMAT, "version": VERSION, **to_dict(model.config)}
    sections = {"reduction": model.reduction, "style": model.style, "buckets": model.buckets}
    config |= {name: to_dict(value) for name, value in sections.items() if value is not None}

    path.parent.mkdir(parents=True, exist_ok=True)
    work = pathlib.Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        new = work / "new"
        new.mkdir()
        (new / CONFIG).write_text(json.dumps(config, indent=1) + "\n")
        save_file(tensors, new / WEIGHTS)
        (new / WEIGHTS).chmod(0o644)  # safetensors writes it for the owner alone; a checkpoint is shared like any file
        if model.tokenizer is not None:
            model.tokenizer.save(new / TOKENIZER)
        if path.exists():
            os.replace(path, work / "old")
        try:
            os.replace(new, path)
        except OSError:
            if (work / "old").exists():
                os.replace(work / "old", path)
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return path


# -- reading ----------------------------------------------------------------------------------------------------------


def resolve(name_or_path: str | pathlib.Path) -> pathlib.Path:
    """The folder of a packaged name (`tiny`, `tiny-reduced`) or of a path; FileNotFoundError names what there is."""
    packaged = PACKAGED.get(str(name_or_path))
    path = packaged or pathlib.Path(name_or_path)
    if not path.is_dir():
        known = ", ".join(PACKAGED)
        what = "is packaged but not installed" if packaged else "is neither a checkpoint folder nor a packaged name"
        raise FileNotFoundError(
            f"{str(name_or_path)!r} {what} (packaged: {known}; or the path of a folder with {CONFIG})"
        )
    return path


def read_config(path: pathlib.Path) -> tuple[ModelConfig, dict[str, Any]]:
    """(model config, {section: its dataclass}) of a checkpoint folder."""
    file = path / CONFIG
    if not file.is_file():
        raise FileNotFoundError(f"{path} has no {CONFIG}; a checkpoint folder holds {CONFIG}, {WEIGHTS}, {TOKENIZER}")
    try:
        data = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} is not JSON: {error}") from error
    if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
        raise CheckpointError(f'{file} is not a checkpoint of this library: it has no "format": "{FORMAT}"')
    version = data.pop("version", None)
    if version != VERSION:
        raise CheckpointError(f"{file} has version {version!r}, this library reads version {VERSION}; update hybridvlm")
    sections = {name: data.pop(name, None) for name in SECTIONS}
    try:
        config = from_dict(ModelConfig, data)
        built = {name: from_dict(cls, sections[name]) for name, cls in SECTIONS.items() if sections[name] is not None}
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: {error}") from error
    return config, built


def read_weights(path: pathlib.Path, config: ModelConfig, dtype: Any = None) -> dict[str, Any]:
    """The parameters of a checkpoint folder as a nested dict of arrays in `dtype` (default float32).

    Names and shapes are checked against the config before any data is read; NaN and infinite weights are refused.
    """
    from safetensors import SafetensorError, safe_open

    file, dtype = path / WEIGHTS, jnp.dtype(dtype or jnp.float32)
    if not file.is_file():
        raise FileNotFoundError(f"{path} has no {WEIGHTS}; a checkpoint folder holds {CONFIG}, {WEIGHTS}, {TOKENIZER}")
    flat = {}
    try:
        with safe_open(file, framework="numpy") as tensors:
            names = list(tensors.keys())
            check_tensors(
                {n: tuple(tensors.get_slice(n).get_shape()) for n in names}, expected_shapes(config), str(file)
            )
            for name in names:
                kind = tensors.get_slice(name).get_dtype()
                if kind not in ("F32", "F16"):
                    raise CheckpointError(f"{file}: {name} is stored as {kind}; this format holds F32 or F16")
                array = tensors.get_tensor(name)
                if not np.isfinite(array).all():
                    raise CheckpointError(
                        f"{file}: {name} holds {np.sum(~np.isfinite(array))} values that are not finite"
                    )
                keep = name.rsplit("/", 1)[-1] in FLOAT32
                flat[name] = jnp.asarray(array, jnp.float32 if keep else dtype)
    except SafetensorError as error:
        raise CheckpointError(f"{file} is not a readable safetensors file: {str(error).splitlines()[0]}") from error
    return unflatten(flat)


def load(
    name_or_path: str | pathlib.Path,
    *,
    dtype: Any = None,
    reduction: Reduction | None = None,
    buckets: Buckets | None = None,
) -> Model:
    """The model of a checkpoint folder, or of a packaged name: `tiny`, `tiny-reduced`.

    dtype: of the weights and so of the activations, e.g. "bfloat16" (default float32). reduction, buckets: instead of
    the checkpoint's own. FileNotFoundError for a missing file, CheckpointError (a ValueError) where one does not fit.
    """
    path = resolve(name_or_path)
    config, sections = read_config(path)
    tokenizer = WordLevel.from_file(path / TOKENIZER)
    if tokenizer.size > config.vocab_size:
        raise CheckpointError(
            f"{path / TOKENIZER} has {tokenizer.size} words, more than the model's vocab_size {config.vocab_size}"
        )
    params = read_weights(path, config, dtype)
    sections = {**sections, **({"reduction": reduction} if reduction is not None else {})}
    if buckets is not None:
        sections["buckets"] = buckets
    if not config.name:
        config = dataclasses.replace(config, name=path.name)
    return Model(config, params, tokenizer, name=path.name, **sections)
