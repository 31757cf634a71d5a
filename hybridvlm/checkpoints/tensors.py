"""Reading safetensors files as NumPy arrays, one tensor at a time."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator, Mapping

import numpy as np
from safetensors import SafetensorError, safe_open


class TensorFolder(Mapping[str, np.ndarray]):
    """The tensors of a checkpoint as a read-only mapping; a tensor is read from disk when it is asked for.

    path: a .safetensors file, or a folder that holds one or several (with or without model.safetensors.index.json).
    FileNotFoundError if there is none, or if the index names a file that is missing.
    """

    def __init__(self, path: str | pathlib.Path):
        path = pathlib.Path(path)
        index = path / "model.safetensors.index.json"
        if index.is_file():
            files = [path / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        else:
            files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
        missing = [str(file) for file in files if not file.is_file()]
        if missing or not files:
            raise FileNotFoundError(
                f"no safetensors checkpoint at {path}" + (f": missing {missing}" if missing else "")
            )
        self._open = {}
        for file in files:
            try:
                handle = safe_open(file, framework="numpy")
            except SafetensorError as error:
                raise ValueError(f"{file} is not a readable safetensors file: {error}") from error
            for name in handle.keys():  # noqa: SIM118 (a handle is not a mapping)
                self._open[name] = handle

    def __getitem__(self, name: str) -> np.ndarray:
        return self._open[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._open)

    def __len__(self) -> int:
        return len(self._open)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor, without reading the data."""
        return {name: tuple(handle.get_slice(name).get_shape()) for name, handle in self._open.items()}
