"""Checkpoint folders of three kinds, which `read_checkpoint` tells apart: the library's own, Orbax's, and published ones.

The library's own: a folder with config.json, model.safetensors and tokenizer.json. config.json is a family's config with
{"format": "hybridvlm", "version": 1, "family": ...} (nemotron_vl if it says nothing), "tokenizer": false for a model that
has none, and optional sections "reduction" (what the model was tuned under), "style" (the text around the frames) and
"buckets". Tensor names are the paths of the
parameters, joined by "/".
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from hybridvlm.checkpoints.atomic import whole_folder
from hybridvlm.checkpoints.hf import CONFIG, ShardingFor, check_finite, own_head, read_json, read_params
from hybridvlm.checkpoints.names import SETTINGS, resolve
from hybridvlm.checkpoints.orbax import ABOUT, is_orbax, read_about, restore_orbax, save_orbax
from hybridvlm.checkpoints.tensors import TensorFolder
from hybridvlm.config import Buckets, Reduction, from_dict, to_dict
from hybridvlm.errors import CheckpointError
from hybridvlm.models import nemotron_vl
from hybridvlm.models.config_fields import token_ids
from hybridvlm.models.family import Family, family_of, get_family
from hybridvlm.models.prompt import PromptStyle
from hybridvlm.models.weights import FLOAT32, flatten, unflatten
from hybridvlm.plain import shown
from hybridvlm.reduction import parse_method
from hybridvlm.tokenizers.published import TOKENIZER, PublishedTokenizer
from hybridvlm.tokenizers.word_level import WordLevel

FORMAT, VERSION = "hybridvlm", 1
WEIGHTS, PROCESSORS = "model.safetensors", "processor_config.json"
# a processor's part of processor_config.json, and the file that holds it where that one does not
PREPROCESSORS = {
    "preprocessor": ("image_processor", "preprocessor_config.json"),
    "video_preprocessor": ("video_processor", "video_preprocessor_config.json"),
}
STORAGE = ("float32", "float16")
SECTIONS = {"reduction": Reduction, "style": PromptStyle, "buckets": Buckets}
PUBLISHED_BUCKETS = Buckets(frames=(1, 2, 4, 8, 16, 32, 64, 128), text=(64, 256, 1024, 4096), max_new=256)


def expected_shapes(config: Any, kind: Family = nemotron_vl, where: str = "the config") -> dict[str, tuple[int, ...]]:
    """The shape of every parameter that a model of this config has, by flat name; nothing is allocated.

    CheckpointError, which begins with `where`, for sizes that no array can have.
    """
    try:
        params = jax.eval_shape(lambda key: kind.init(config, key), jax.random.key(0))
    except (ArithmeticError, TypeError, ValueError, MemoryError) as error:
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{where} has sizes that no model can have: {why:.200}") from error
    return {name: tuple(leaf.shape) for name, leaf in flatten(params).items()}


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


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds: the fields of a `hybridvlm.Model` by their names."""

    config: Any
    params: dict[str, Any]
    tokenizer: WordLevel | PublishedTokenizer | None
    name: str
    family: Family
    reduction: Reduction | None = None
    style: PromptStyle = PromptStyle()
    buckets: Buckets = Buckets()


class Savable(Protocol):
    """What is written of a model: a `hybridvlm.Model`, or a `Checkpoint`."""

    @property
    def config(self) -> Any: ...
    @property
    def params(self) -> dict[str, Any]: ...
    @property
    def tokenizer(self) -> Any: ...
    @property
    def family(self) -> Family: ...
    @property
    def reduction(self) -> Reduction | None: ...
    @property
    def style(self) -> PromptStyle: ...
    @property
    def buckets(self) -> Buckets: ...


# -- writing ----------------------------------------------------------------------------------------------------------


def save_folder(path: str | pathlib.Path, model: Savable, *, storage: str = "float32") -> pathlib.Path:
    """Write `model` as a checkpoint folder, whole or not at all; an older checkpoint at `path` is replaced.

    storage: "float32", or "float16" at half the bytes. ValueError for weights that are not finite in it, or a `path`
    that holds anything else than a checkpoint.
    """
    from safetensors.numpy import save_file

    if storage not in STORAGE:
        raise ValueError(f"storage must be one of {STORAGE}, got {storage!r}")
    path = pathlib.Path(path)
    tensors = {}
    for name, leaf in flatten(model.params).items():
        array = np.asarray(jax.device_get(leaf)).astype(np.float32)
        with np.errstate(over="ignore"):
            array = array.astype(storage)
        if not np.isfinite(array).all():
            raise ValueError(f"parameter {name} is not finite in {storage}; the checkpoint was not written")
        tensors[name] = np.ascontiguousarray(array)
    check_tensors({n: a.shape for n, a in tensors.items()}, expected_shapes(model.config, model.family), "the model")
    config = {"format": FORMAT, "version": VERSION, "family": model.family.NAME, **to_dict(model.config)}
    config |= _sections(model) | ({} if model.tokenizer is not None else {"tokenizer": False})

    with whole_folder(path, lambda old: (old / CONFIG).is_file()) as new:
        (new / CONFIG).write_text(json.dumps(config, indent=1) + "\n")
        save_file(tensors, new / WEIGHTS)
        (new / WEIGHTS).chmod(0o644)  # safetensors writes it for the owner alone; a checkpoint is shared like any file
        if model.tokenizer is not None:
            model.tokenizer.save(new / TOKENIZER)
    return path


def _sections(model: Savable) -> dict[str, Any]:
    sections = {"reduction": model.reduction, "style": model.style, "buckets": model.buckets}
    return {name: to_dict(value) for name, value in sections.items() if value is not None}


# -- reading ----------------------------------------------------------------------------------------------------------


def read_config(path: pathlib.Path, data: dict[str, Any]) -> tuple[Family, Any, dict[str, Any]]:
    """(family, config, {section: its dataclass}) of a folder in the library's own form; data: its config.json, parsed."""
    file = path / CONFIG
    version = data.get("version")
    if type(version) is not int or version != VERSION:
        raise CheckpointError(
            f"{file} has version {shown(version)}, this library reads version {VERSION}; update hybridvlm"
        )
    return built_config(
        file, {name: value for name, value in data.items() if name not in ("format", "version", "tokenizer")}
    )


def built_config(file: pathlib.Path, data: dict[str, Any]) -> tuple[Family, Any, dict[str, Any]]:
    """(family, config, {section: its dataclass}) of the table that `file` holds."""
    data = dict(data)
    sections = {name: data.pop(name, None) for name in SECTIONS}
    try:
        kind = get_family(data.pop("family", nemotron_vl.NAME))
        config: Any = from_dict(kind.Config, data)
        built: dict[str, Any] = {
            name: from_dict(cls, sections[name]) for name, cls in SECTIONS.items() if sections[name] is not None
        }
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: {error}") from error
    return kind, config, built


def read_weights(
    path: pathlib.Path,
    config: Any,
    dtype: Any = None,
    kind: Family = nemotron_vl,
    sharding_for: ShardingFor | None = None,
) -> dict[str, Any]:
    """The parameters of a folder in the library's own form, in `dtype` (default float32).

    Names and shapes are checked against the config before any data is read; NaN and infinite weights are refused.
    """
    file, dtype = path / WEIGHTS, jnp.dtype(dtype or jnp.float32)
    if not file.is_file():
        raise FileNotFoundError(f"{path} has no {WEIGHTS}; a checkpoint folder holds {CONFIG}, {WEIGHTS}, {TOKENIZER}")
    flat, tensors = {}, TensorFolder(file)
    check_tensors(tensors.shapes(), expected_shapes(config, kind, str(path / CONFIG)), str(file))
    for name, stored in tensors.dtypes().items():
        if str(stored) not in STORAGE:
            raise CheckpointError(f"{file}: {name} is stored as {stored}; this format holds {' or '.join(STORAGE)}")
        array = tensors[name]
        to = jnp.dtype(jnp.float32) if name.rsplit("/", 1)[-1] in FLOAT32 else dtype
        check_finite(array, f"{file}: {name}", to)
        if sharding_for is None:
            flat[name] = jnp.asarray(array, to)
        else:
            flat[name] = _on_mesh(array.astype(to), sharding_for(name, array.shape))
    return unflatten(flat)


def _on_mesh(array: np.ndarray, where: jax.sharding.Sharding) -> jax.Array:
    """An array of the host, of which every device is sent its own part alone."""
    return jax.make_array_from_callback(array.shape, where, lambda index: array[index])


def read_checkpoint(
    name_or_path: str | os.PathLike[str],
    *,
    mesh: jax.sharding.Mesh | None = None,
    dtype: Any = None,
    reduction: Reduction | None = None,
    buckets: Buckets | None = None,
    revision: str | None = None,
    cache: str | os.PathLike[str] | None = None,
) -> Checkpoint:
    """What a checkpoint folder (this library's, Orbax's or a published one) holds; arguments and errors as of `hybridvlm.load`."""
    if dtype is not None:
        dtype = _floating(dtype)
    path = resolve(name_or_path, revision)
    try:
        return _load(path, mesh, dtype, reduction, buckets, cache)
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            raise CheckpointError(
                f"{path}: its weights do not fit in memory; take dtype 'bfloat16', or a mesh of more devices"
            ) from error
        raise


def _load(
    path: pathlib.Path,
    mesh: jax.sharding.Mesh | None,
    dtype: Any,
    reduction: Reduction | None,
    buckets: Buckets | None,
    cache: str | os.PathLike[str] | None,
) -> Checkpoint:
    sharding_for = None if mesh is None else _placing(mesh)
    if is_orbax(path):
        return _load_orbax(path, dtype, sharding_for, reduction, buckets)
    data = read_json(path / CONFIG)
    if data.get("format") is None:
        return _load_published(path, data, dtype, sharding_for, reduction, buckets, cache)
    if cache is not None:
        raise ValueError("cache is for published checkpoints; this one is in the library's own form already")
    if data["format"] != FORMAT:
        raise CheckpointError(f'{path / CONFIG} is not a checkpoint of this library: it has no "format": "{FORMAT}"')
    kind, config, sections = read_config(path, data)
    if reduction is None:
        _check_method(path / CONFIG, sections)
    tokenizer = _tokenizer(path, config)
    if tokenizer is None and data.get("tokenizer") is not False:
        raise FileNotFoundError(f"no tokenizer at {path / TOKENIZER}")
    params = read_weights(path, config, dtype, kind, sharding_for)
    return _checkpoint(path.name, kind, config, params, tokenizer, sections, reduction, buckets)


def _check_method(file: pathlib.Path, sections: dict[str, Any]) -> None:
    """CheckpointError for a checkpoint's own method that is unknown here, before anything large is read."""
    tuned = sections.get("reduction")
    if tuned is None:
        return
    try:
        parse_method(tuned.method)
    except ValueError as error:
        raise CheckpointError(
            f"{file}: reduction.method: {error}. Import or install what registers it, or pass a reduction of your own"
        ) from error


def _floating(dtype: Any) -> np.dtype:
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or not jnp.issubdtype(found, jnp.floating):
        raise ValueError(f"dtype must name floating-point numbers, such as 'bfloat16' or 'float32', got {dtype!r}")
    return found


def _placing(mesh: jax.sharding.Mesh) -> ShardingFor:
    """The mesh's positions by the default rules."""
    from hybridvlm.sharding import auto_mesh, sharding_of, tensor_size

    mesh = auto_mesh(mesh)
    tensor_size(mesh)  # refuses an axis that no rule knows
    return functools.partial(sharding_of, mesh)


def _checkpoint(
    name: str,
    kind: Family,
    config: Any,
    params: dict[str, Any],
    tokenizer: Any,
    sections: Mapping[str, Any],
    reduction: Reduction | None,
    buckets: Buckets | None,
) -> Checkpoint:
    fields = dict(sections)
    if reduction is not None:
        fields["reduction"] = reduction
    if buckets is not None:
        fields["buckets"] = buckets
    if not config.name:
        config = dataclasses.replace(config, name=name)
    return Checkpoint(config, params, tokenizer, name=name, family=kind, **fields)


def _tokenizer(path: pathlib.Path, config: Any) -> WordLevel | PublishedTokenizer | None:
    """The tokenizer of a folder, None if it has none; refused if it has ids that the model has no rows for."""
    file = path / TOKENIZER
    if not file.is_file():
        return None
    model = read_json(file).get("model")
    closed = isinstance(model, dict) and model.get("type") == "WordLevel"
    tokenizer = WordLevel.from_file(file) if closed else PublishedTokenizer.from_folder(path)
    if tokenizer.size > config.vocab_size:
        raise CheckpointError(
            f"{file} has {tokenizer.size} words, more than the model's vocab_size {config.vocab_size}"
        )
    return tokenizer


def _load_orbax(
    path: pathlib.Path,
    dtype: Any,
    sharding_for: ShardingFor | None,
    reduction: Reduction | None,
    buckets: Buckets | None,
) -> Checkpoint:
    about = read_about(path)
    if not isinstance(about.get("model"), dict):
        raise CheckpointError(f"{path / ABOUT}: model must be a table, got {shown(about.get('model'))}")
    kind, config, sections = built_config(path / ABOUT, about["model"])
    if reduction is None:
        _check_method(path / ABOUT, sections)
    params = restore_orbax(
        path, expected_shapes(config, kind, str(path / ABOUT)), dtype=dtype, sharding_for=sharding_for
    )
    return _checkpoint(
        about.get("name", path.name), kind, config, params, _tokenizer(path, config), sections, reduction, buckets
    )


def _load_published(
    path: pathlib.Path,
    raw: dict[str, Any],
    dtype: Any,
    sharding_for: ShardingFor | None,
    reduction: Reduction | None,
    buckets: Buckets | None,
    cache: str | os.PathLike[str] | None,
) -> Checkpoint:
    raw = raw | published_settings(path)
    try:
        kind = family_of(raw)
        tensors = TensorFolder(path)
        config = kind.config_from_hf(raw, tensors.shapes())
    except CheckpointError:
        raise
    except (ValueError, MemoryError) as error:
        raise CheckpointError(f"{path}: {str(error) or type(error).__name__}") from error
    if cache is not None and pathlib.Path(cache).exists() and not is_orbax(pathlib.Path(cache)):
        raise ValueError(f"cache {cache} exists and is not an Orbax copy of a checkpoint; choose another folder")
    name = path.name
    if path.parent.name == "snapshots":  # the hub's cache: .../models--owner--name/snapshots/commit
        name = path.parent.parent.name.removeprefix("models--").replace("--", "/")
    config = dataclasses.replace(config, name=config.name or name, eos_ids=_stops(path, config))
    if own_head(kind.weight_map(config), tensors):
        config = dataclasses.replace(config, tie_embeddings=False)
    table = kind.weight_map(config)
    tokenizer = _tokenizer(path, config)
    style = kind.style_for(config)
    sections = {"style": style, "buckets": PUBLISHED_BUCKETS}
    if cache is None:
        params = read_params(table, tensors, dtype=dtype, sharding_for=sharding_for, compared=True)
        return _checkpoint(name, kind, config, params, tokenizer, sections, reduction, buckets)
    copy, source = pathlib.Path(cache), _source(path, tensors, dtype)
    if not is_orbax(copy) or read_about(copy).get("source") != source:
        params = read_params(table, tensors, dtype=dtype, sharding_for=sharding_for, compared=True)
        about = {"family": kind.NAME, **to_dict(config), "style": to_dict(style), "buckets": to_dict(PUBLISHED_BUCKETS)}
        save_orbax(copy, params, {"name": name, "model": about, "source": source}, tokenizer)
        return _checkpoint(name, kind, config, params, tokenizer, sections, reduction, buckets)
    return _load_orbax(copy, None, sharding_for, reduction, buckets)


def published_settings(path: pathlib.Path) -> dict[str, Any]:
    """What a folder says of its image and video processors, in the order in which transformers looks for it."""
    whole = read_json(path / PROCESSORS) if (path / PROCESSORS).is_file() else {}
    found = {}
    for name, (part, file) in PREPROCESSORS.items():
        if isinstance(whole.get(part), dict):
            found[name] = whole[part]
        elif (path / file).is_file():
            found[name] = read_json(path / file)
    return found


def _stops(path: pathlib.Path, config: Any) -> tuple[int, ...]:
    """What ends an answer: config.json's tokens and those that generation_config.json adds."""
    file = path / "generation_config.json"
    given = read_json(file).get("eos_token_id") if file.is_file() else None
    try:
        more = token_ids("eos_token_id", given)
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from error
    if beyond := [id for id in more if id >= config.vocab_size]:
        raise CheckpointError(
            f"{file}: eos_token_id {beyond[0]} is beyond the model's vocabulary of {config.vocab_size}, so that it could "
            "end no answer; it is another model's file"
        )
    return tuple(dict.fromkeys([*config.eos_ids, *more]))


def _source(path: pathlib.Path, tensors: TensorFolder, dtype: Any) -> dict[str, Any]:
    """What a converted copy must share with a checkpoint to stand for it, and the dtype.

    Sizes and times of its weights, and the contents of every file next to them that a model may be read from, tokenizers and
    chat templates included: whatever appears, goes or changes makes a new copy.
    """
    stamps: dict[str, Any] = {}
    for name in tensors.files():
        about = os.stat(path / name)
        stamps[name] = [about.st_size, about.st_mtime_ns]
    for form in SETTINGS:
        for file in sorted(path.glob(form)):
            stamps[file.relative_to(path).as_posix()] = hashlib.sha256(file.read_bytes()).hexdigest()
    return {"path": str(path.resolve()), "files": stamps, "dtype": str(jnp.dtype(dtype)) if dtype is not None else None}
