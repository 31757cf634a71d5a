"""What a checkpoint says of its model without its weights: for estimates, and for refusing what cannot fit before it is read."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from typing import Any

from hybridvlm.checkpoints.folder import PUBLISHED_BUCKETS, built_config, published_settings, read_config
from hybridvlm.checkpoints.hf import CONFIG, read_json
from hybridvlm.checkpoints.names import DOWNLOADED, PACKAGED, resolve
from hybridvlm.checkpoints.orbax import ABOUT, is_orbax, read_about
from hybridvlm.checkpoints.tensors import TensorFolder
from hybridvlm.config import Buckets, Reduction
from hybridvlm.config_files import config_names, load_model_config
from hybridvlm.errors import CheckpointError
from hybridvlm.models.family import family_of


@dataclasses.dataclass(frozen=True)
class Description:
    """A model's config, and the buckets and the reduction of its own that it is loaded with."""

    config: Any
    buckets: Buckets
    reduction: Reduction | None = None


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
        _, config, sections = built_config(path / ABOUT, read_about(path).get("model") or {})
        return _own(config, sections)
    data = read_json(path / CONFIG)
    if data.get("format") is not None:
        _, config, sections = read_config(path, data)
        return _own(config, sections)
    raw = data | published_settings(path)
    try:
        shapes = TensorFolder(path).shapes() if any(path.glob("*.safetensors")) else None
        config = family_of(raw).config_from_hf(raw, shapes)
    except CheckpointError:
        raise
    except (ValueError, MemoryError) as error:
        raise CheckpointError(f"{path}: {str(error) or type(error).__name__}") from error
    return Description(dataclasses.replace(config, name=config.name or path.name), PUBLISHED_BUCKETS)


def _own(config: Any, sections: dict[str, Any]) -> Description:
    return Description(config, sections.get("buckets", Buckets()), sections.get("reduction"))
