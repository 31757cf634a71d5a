"""Training configs read from JSON, YAML or Python files, with changes from the command line."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import runpy
import types
import typing
from collections.abc import Sequence
from typing import Any

import yaml

from hybridvlm.config import from_dict
from hybridvlm.config_files import config_folder
from hybridvlm.files import parse_json
from hybridvlm.train.config import TrainConfig


def build(cls: type, data: dict[str, Any]) -> Any:
    """The dataclass `cls` of a plain dict, nested ones too; ValueError for a key that it does not have, with the nearest."""
    hints = typing.get_type_hints(cls)

    def value(key: str, given: Any) -> Any:
        kinds = typing.get_args(hints[key]) if isinstance(hints.get(key), types.UnionType) else (hints.get(key),)
        nested: list[Any] = [kind for kind in kinds if dataclasses.is_dataclass(kind)]
        return build(nested[0], given) if nested and isinstance(given, dict) else given

    return from_dict(cls, {key: value(key, given) for key, given in data.items()}, kinds=False)


class _Yaml(yaml.SafeLoader):
    """YAML of plain data, in which no key of a mapping stands twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: set[Any] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    problem = f"the key {key.value!r} stands twice"
                    raise yaml.constructor.ConstructorError(problem=problem, problem_mark=key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _parsed(path: pathlib.Path) -> Any:
    """What a config file holds, as plain data; a .py file is run."""
    if path.suffix == ".py":
        found = runpy.run_path(str(path)).get("config")
        if not isinstance(found, TrainConfig):
            raise ValueError(f"{path} must define config = TrainConfig(...), got {type(found).__name__}")
        return dataclasses.asdict(found)
    if path.suffix in (".yaml", ".yml"):
        return yaml.load(path.read_text(encoding="utf-8"), _Yaml)
    if path.suffix == ".json":
        return parse_json(path.read_bytes())
    raise ValueError(f"{path}: a training config is a .json, .yaml or .py file")


def packaged() -> dict[str, pathlib.Path]:
    """The training configs that come with the package, by name."""
    return {path.stem: path for path in sorted(config_folder().glob("train_*.yaml"))}


def _found(path: pathlib.Path) -> pathlib.Path:
    """The file that a path or a name means: the one there, else a packaged config of that name, with or without configs/ before it."""
    if path.is_file():
        return path
    held = packaged()
    by_name = path.parent in (pathlib.Path(), pathlib.Path("configs")) and path.suffix in ("", ".yaml")
    if by_name and path.stem in held:
        return held[path.stem]
    raise FileNotFoundError(
        f"no training config at {path}; give a .json, .yaml or .py file, or the name of a packaged one: {', '.join(held)}"
    )


def read(path: str | pathlib.Path, changes: Sequence[str] = ()) -> TrainConfig:
    """The config of a file, or of a packaged one by its name.

    Args:
        path: .json, .yaml, or .py that defines `config`, which is run as a program; or a name such as "train_tiny_reduced".
        changes: "key.key=value"; values are JSON or text.
    """
    path = _found(pathlib.Path(path))
    try:
        data = _parsed(path)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    except (UnicodeDecodeError, SyntaxError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    except ValueError as error:
        if path.suffix != ".json":
            raise
        raise ValueError(f"{path} cannot be read: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path} must hold the fields of TrainConfig, got {type(data).__name__}")
    for change in changes:
        keys, equals, text = change.partition("=")
        if not equals:
            raise ValueError(f"--set takes key=value, such as optimizer.rate=1e-4, got {change!r}")
        *owners, last = keys.split(".")
        table: dict[str, Any] = data
        default: Any = dataclasses.asdict(TrainConfig())
        for owner in owners:
            default = default.get(owner) if isinstance(default, dict) else None
            if table.get(owner) is None:
                table[owner] = dict(default) if isinstance(default, dict) else {} if default is None else default
            table = table[owner]
            if not isinstance(table, dict):
                raise ValueError(f"--set {change}: {owner} has no fields")
        try:
            table[last] = json.loads(text)
        except json.JSONDecodeError:
            table[last] = text
    try:
        return build(TrainConfig, data)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
