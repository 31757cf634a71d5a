"""Model configs by name: the JSON files that come with the package, and files of the same form."""

from __future__ import annotations

import json
import pathlib

from hybridvlm.config import ModelConfig, QwenConfig, VambaConfig
from hybridvlm.plain import from_dict as from_dict
from hybridvlm.plain import to_dict as to_dict

_CONFIGS: dict[str, type[ModelConfig]] = {"nemotron_vl": ModelConfig, "vamba": VambaConfig, "qwen_vl": QwenConfig}


def config_names() -> list[str]:
    """Names of the configurations that come with the library."""
    return sorted(path.stem for path in config_folder().glob("*.json"))


def config_folder() -> pathlib.Path:
    """Where the configs that come with the package lie."""
    here = pathlib.Path(__file__).parent
    installed = here / "_configs"  # an installed wheel carries the repository's configs/ there
    return installed if installed.is_dir() else here.parent / "configs"


def load_model_config(name_or_path: str | pathlib.Path) -> ModelConfig:
    """A ModelConfig by the name of one of the files in `configs/` (such as "tiny"), or from a JSON file of the same form.

    The file's "family" says which kind of ModelConfig it is (none: the Nemotron VL family's). ValueError for an unknown one.
    """
    path = pathlib.Path(name_or_path)
    if path.suffix != ".json":
        path = config_folder() / f"{name_or_path}.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"no model config {str(name_or_path)!r}; give a JSON file or one of {', '.join(config_names())}"
        )
    data = json.loads(path.read_text())
    name = data.pop("family", "nemotron_vl")
    if name not in _CONFIGS:
        raise ValueError(f"{path}: no model family {name!r}; there are {', '.join(_CONFIGS)}")
    return from_dict(_CONFIGS[name], data)
