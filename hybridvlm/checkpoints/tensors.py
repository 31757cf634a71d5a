"""Safetensors files, read a piece of a tensor at a time and written the same way.

The format is eight bytes of header length, a JSON header, and the data. It is read here with plain file reads: a memory map
would count towards the process's memory page by page, and a library that hands out whole tensors could not be stopped at a
few rows. Nothing in such a file can run code; files that can (pickles) are refused.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from hybridvlm.errors import CheckpointError
from hybridvlm.files import parse_object, read_object
from hybridvlm.plain import shown

INDEX, WHOLE = "model.safetensors.index.json", "model.safetensors"
ADAPTERS = "adapter*.safetensors"
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_KINDS = {dtype: kind for kind, dtype in DTYPES.items()}
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_MOST_HEADER = 100_000_000  # bytes; the format's own limit
_MOST_AXES = 32  # of a tensor; the product of more takes longer and longer


class _File:
    """One safetensors file: its header, checked as the format's own library checks it, and its tensors' positions."""

    def __init__(self, path: pathlib.Path):
        self.path, self.handle = path, path.open("rb", buffering=0)
        weakref.finalize(self, self.handle.close)  # a tensor may be asked for as long as this is there
        size = os.fstat(self.handle.fileno()).st_size
        length = int.from_bytes(self.handle.read(8), "little")
        if size < 8 or not 2 <= length <= min(size - 8, _MOST_HEADER):
            raise self._unreadable("its header is cut off or longer than the file")
        header = self._header(self.handle.read(length))
        self.begin = 8 + length
        self.entries: dict[str, tuple[np.dtype, tuple[int, ...], int]] = {}
        spans: list[tuple[int, int, str]] = []
        for name, entry in header.items():
            if not name.isprintable():
                raise self._unreadable(f"a tensor's name is no printable text: {shown(name)}")
            try:
                kind, shape, (first, last) = entry["dtype"], entry["shape"], entry["data_offsets"]
                if not isinstance(shape, list) or any(type(number) is not int for number in (*shape, first, last)):
                    raise ValueError("it holds what is no whole number")
            except (KeyError, TypeError, ValueError) as error:
                raise self._unreadable(f"the entry of {name:.200} is not dtype, shape and two offsets") from error
            if not isinstance(kind, str) or kind not in DTYPES:
                raise CheckpointError(
                    f"{path}: {name:.200} is stored as {kind!s:.40}; supported: {', '.join(DTYPES)}. "
                    "Take an unquantised checkpoint"
                )
            if len(shape) > _MOST_AXES:
                raise self._unreadable(f"{name:.200} has {len(shape)} axes; a tensor has {_MOST_AXES} at most")
            negative = min((0, *shape)) < 0 or first < 0
            if negative or max((0, *shape)) >= 1 << 63 or last - first != math.prod(shape) * DTYPES[kind].itemsize:
                raise self._unreadable(
                    f"{name:.200} of shape {shown(shape)} {kind} cannot fill bytes {shown(first)} to {shown(last)}"
                )
            spans.append((first, last, name))
            self.entries[name] = (DTYPES[kind], tuple(shape), self.begin + first)
        self._check_spans(sorted(spans), size - self.begin)

    def _header(self, data: bytes) -> dict[str, Any]:
        """The table of tensors; not JSON's other encodings, nor a name twice, nor metadata other than words."""

        try:
            if data[:1] != b"{":
                raise ValueError("it does not begin with {")
            header = parse_object(data)
            json.dumps(header, ensure_ascii=False).encode("utf-8")  # half a surrogate pair is no text
        except (ValueError, RecursionError, MemoryError) as error:
            why = str(error) or type(error).__name__
            raise self._unreadable(f"its header is not JSON: {why:.200}") from error
        words = header.pop("__metadata__", None)
        if words is not None and not (isinstance(words, dict) and all(isinstance(v, str) for v in words.values())):
            raise self._unreadable("its __metadata__ is not a table of words")
        return header

    def _check_spans(self, spans: list[tuple[int, int, str]], held: int) -> None:
        """Tensors lie one after another, from the first byte to the last: no holes, nothing shared, nothing after."""
        at, before = 0, "the header"
        for first, last, name in spans:
            if first != at:
                what = "overlaps with" if first < at else "leaves a hole after"
                raise self._unreadable(f"{name:.200} at bytes {first} to {last} {what} {before:.200}")
            at, before = last, name
        cut = sorted(name for _, last, name in spans if last > held)
        if cut:
            more = f" and {len(cut) - 4} more" if len(cut) > 4 else ""
            raise CheckpointError(f"{self.path} is truncated: it ends inside or before {', '.join(cut[:4])}{more}")
        if at < held:
            raise self._unreadable(f"{held - at} bytes after its last tensor belong to none")

    def _unreadable(self, why: str) -> CheckpointError:
        return CheckpointError(f"{self.path} is not a readable safetensors file: {why}")

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        dtype, shape, offset = self.entries[name]
        if shape and stop is not None:
            offset += start * math.prod(shape[1:]) * dtype.itemsize
            shape = (stop - start, *shape[1:])
        out = np.empty(shape, dtype)
        view = out.reshape(-1).view(np.uint8).data if out.size else memoryview(b"")
        done = 0
        while done < len(view):
            got = os.preadv(self.handle.fileno(), [view[done : done + (1 << 30)]], offset + done)
            if not got:
                raise CheckpointError(f"{self.path} ended while {name} was read; it was changed meanwhile")
            done += got
        return out


class TensorFolder(Mapping[str, np.ndarray]):
    """The tensors of a checkpoint as a read-only mapping; a tensor is read from disk when it is asked for.

    path: a .safetensors file, or a folder that holds one, or several with model.safetensors.index.json. A whole
    model.safetensors is what counts, whatever lies next to it, as transformers has it; an adapter is never applied, and a
    warning says so. FileNotFoundError if there is none, or if the index or a file that it names is missing; CheckpointError
    for a file that cannot be read.
    """

    def __init__(self, path: str | pathlib.Path):
        path = pathlib.Path(path)
        index, promised = path / INDEX, {}
        adapters = sorted(file.name for file in path.glob(ADAPTERS)) if path.is_dir() else []
        if path.is_file():
            files = [path]
        elif (path / WHOLE).is_file():
            files = [path / WHOLE]
        elif index.is_file():
            promised = _read_index(index)
            files = [path / name for name in sorted(set(promised.values()))]
        else:
            files = sorted(file for file in path.glob("*.safetensors") if file.name not in adapters)
            if len(files) > 1:
                raise FileNotFoundError(
                    f"{path} holds {len(files)} safetensors files and no {INDEX}, which says what belongs together"
                )
        missing = [str(file) for file in files if not file.is_file()]
        if adapters and not files:
            raise CheckpointError(
                f"{path} holds an adapter alone ({', '.join(adapters[:4])}): merge it into its base model and save that"
            )
        if adapters:
            warnings.warn(
                f"{path}: {', '.join(adapters[:4])} is an adapter, which is not applied; the model is "
                f"{', '.join(file.name for file in files[:4])} alone. Merge it first if it is wanted",
                stacklevel=2,
            )
        if missing or not files:
            pickles = sorted(file.name for form in _PICKLES for file in path.glob(form)) if path.is_dir() else []
            if pickles and not missing:
                raise CheckpointError(
                    f"{path} holds its weights as {', '.join(pickles[:4])}: pickles can run code and are refused; "
                    "take a checkpoint in safetensors"
                )
            raise FileNotFoundError(
                f"no safetensors checkpoint at {path}" + (f": missing {', '.join(missing)}" if missing else "")
            )
        self._home: dict[str, _File] = {}
        for file in files:
            if file.suffix != ".safetensors":
                raise CheckpointError(f"{file} is not a .safetensors file; other weights are refused")
            opened = _File(file)
            for name in opened.entries:
                if name in self._home:
                    raise CheckpointError(f"{name} is in {self._home[name].path.name} and again in {file.name}")
                self._home[name] = opened
        lost = sorted(name for name, file in promised.items() if self._file_name(name) != file)
        if lost:
            more = f" and {len(lost) - 4} more" if len(lost) > 4 else ""
            raise CheckpointError(f"{index} promises tensors that its files do not hold: {', '.join(lost[:4])}{more}")

    def _file_name(self, name: str) -> str:
        return self._home[name].path.name if name in self._home else ""

    def __getitem__(self, name: str) -> np.ndarray:
        return self._home[name].read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._home)

    def __len__(self) -> int:
        return len(self._home)

    def files(self) -> list[str]:
        """Names of the files that hold the tensors."""
        return sorted({file.path.name for file in self._home.values()})

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows start..stop-1 along the first axis of a tensor."""
        return self._home[name].read(name, start, stop)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor, without reading the data."""
        return {name: file.entries[name][1] for name, file in self._home.items()}

    def dtypes(self) -> dict[str, np.dtype]:
        """The dtype of every tensor, without reading the data."""
        return {name: file.entries[name][0] for name, file in self._home.items()}


def _read_index(path: pathlib.Path) -> dict[str, str]:
    found = read_object(path, CheckpointError, "an index of tensors").get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(file, str) for file in found.values()):
        raise CheckpointError(
            f"{path} is not an index of tensors: its weight_map must give a file's name for every tensor"
        )
    odd = [file for file in found.values() if pathlib.Path(file).name != file]
    if odd:
        raise CheckpointError(f"{path} names files outside its folder: {shown(odd[0])}")
    return found


def write_tensors(
    path: pathlib.Path,
    tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
    pieces: Callable[[str], Iterator[np.ndarray]],
) -> None:
    """Write a safetensors file of `tensors` (dtype and shape by name), whose data `pieces(name)` gives in order, row by row."""
    header, at = {}, 0
    for name, (dtype, shape) in tensors.items():
        size = math.prod(shape) * np.dtype(dtype).itemsize
        header[name] = {"dtype": _KINDS[np.dtype(dtype)], "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, (dtype, shape) in tensors.items():
            left = math.prod(shape)
            for piece in pieces(name):
                array = np.ascontiguousarray(piece, dtype)
                file.write(array.reshape(-1).view(np.uint8).data if array.size else b"")
                left -= array.size
            if left:
                raise ValueError(f"{name}: the pieces given are {left} values short of {shape}")
        file.flush()
        os.fsync(file.fileno())
