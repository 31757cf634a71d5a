"""What a checkpoint says of its model without its weights: for estimates, and for refusing what cannot fit before it is read."""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from hybridvlm.checkpoints.folder import PUBLISHED_BUCKETS, built_config, published_settings, read_config
from hybridvlm.checkpoints.hf import CONFIG, read_json
from hybridvlm.checkpoints.names import DOWNLOADED, PACKAGED, resolve
from hybridvlm.checkpoints.orbax import ABOUT, held_arrays, is_orbax, read_about
from hybridvlm.checkpoints.tensors import TensorFolder
from hybridvlm.config import Buckets, Reduction
from hybridvlm.config_files import config_names, load_model_config
from hybridvlm.errors import CheckpointError
from hybridvlm.models.family import family_of

FLOATS = ("bfloat16", "float16", "float32")


@dataclasses.dataclass(frozen=True)
class Description:
    """What a model is, and what it is loaded with where nobody says otherwise.

    Attributes:
        config: of the model.
        buckets: lengths that programs are compiled for.
        reduction: the checkpoint's own.
        dtype: of weights and so of activations.
    """

    config: Any
    buckets: Buckets
    reduction: Reduction | None = None
    dtype: str = "bfloat16"


def describe(name_or_path: str | os.PathLike[str], revision: str | None = None) -> Description:
    """What `hybridvlm.load` would find, without reading weights; of the hub their files are not fetched.

    Also takes the names of `hybridvlm.config_names()` and JSON files of that form.

    Raises:
        FileNotFoundError: for a missing file.
        ValueError: for a config that does not fit.
    """
    name = os.fspath(name_or_path)
    packaged = name in config_names() and name not in PACKAGED and not pathlib.Path(name).is_dir()
    if packaged or (name.endswith(".json") and pathlib.Path(name).is_file()):
        return Description(load_model_config(name), PUBLISHED_BUCKETS)
    settings = tuple(pattern for pattern in DOWNLOADED if not pattern.endswith(".safetensors"))
    path = resolve(name_or_path, revision, patterns=settings)
    if is_orbax(path):
        about = read_about(path)
        _, config, sections = built_config(path / ABOUT, about.get("model") or {})
        held = {name: (leaf.shape, leaf.dtype) for name, leaf in held_arrays(path).items()}
        source = about.get("source")
        named = source.get("dtype") if isinstance(source, dict) else None
        return _own(config, sections, _stored(held, named))
    data = read_json(path / CONFIG)
    if data.get("format") is not None:
        _, config, sections = read_config(path, data)
        return _own(config, sections, "float32")
    raw = data | published_settings(path)
    try:
        tensors = TensorFolder(path) if any(path.glob("*.safetensors")) else None
        shapes = None if tensors is None else tensors.shapes()
        kinds = {} if tensors is None else tensors.dtypes()
        config = family_of(raw).config_from_hf(raw, shapes)
    except CheckpointError:
        raise
    except (ValueError, MemoryError) as error:
        raise CheckpointError(f"{path}: {str(error) or type(error).__name__}") from error
    dtype = _stored({name: (shape, kinds[name]) for name, shape in (shapes or {}).items()}, _named(raw))
    return Description(dataclasses.replace(config, name=config.name or path.name), PUBLISHED_BUCKETS, dtype=dtype)


def _own(config: Any, sections: dict[str, Any], dtype: str) -> Description:
    return Description(config, sections.get("buckets", Buckets()), sections.get("reduction"), dtype)


def _stored(arrays: Mapping[str, tuple[tuple[int, ...], Any]], named: Any) -> str:
    """The dtype that most numbers are stored in; of weights that are not at hand, the one that a config names, else bfloat16."""
    sizes: dict[str, int] = {}
    for shape, kind in arrays.values():
        name = jnp.dtype(kind).name
        # as JAX holds them
        name = "float32" if name == "float64" else name
        if name in FLOATS:
            sizes[name] = sizes.get(name, 0) + math.prod(shape)
    most = max(sizes, key=lambda name: sizes[name], default=None)
    return most or (named if named in FLOATS else "bfloat16")


def _named(raw: Mapping[str, Any]) -> Any:
    """The dtype that a published config names, of its own or of its decoder."""
    parts = [raw, *(part for key in ("text_config", "llm_config") if isinstance(part := raw.get(key), dict))]
    return next((part[key] for part in parts for key in ("dtype", "torch_dtype") if part.get(key)), None)
