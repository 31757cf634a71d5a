"""The real images after the embedded benchmark: Fashion-MNIST (Zalando SE, MIT), split so that nothing mixes.

Splits: `test` comes from the 10,000 test images only, `train` and `val` from the 60,000 training images: sorted by
the SHA-256 of their pixels, the last 6,000 are `val`. Sorting by content makes the splits, and the number of each
image, the same whichever source they were read from, and puts equal images on the same side. Only the kept classes of
`tiles` stay.

All of them ship with the package (`data/fashion_mnist.npz`, licence next to it), so that nothing has to be installed or
downloaded to train or to evaluate. `python -m hybridvlm.tiny.assets` makes that file again, from the Debian package
`dataset-fashion-mnist` or else through tensorflow-datasets.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gzip
import hashlib
import pathlib
from typing import Any

import numpy as np

from hybridvlm.tiny import tiles

SPLITS = ("train", "val", "test")
VALIDATION_IMAGES = 6000
PATH = pathlib.Path(__file__).parent / "data" / "fashion_mnist.npz"
DEBIAN = pathlib.Path("/usr/share/datasets/fashion-mnist")
_FILES = {"train": "train", "test": "t10k"}


@dataclasses.dataclass(frozen=True)
class Bank:
    """The images of one split, ordered by class, then by content.

    images uint8 [n,28,28]; label int [n] (index into `tiles.CLASS_WORDS`); start int [classes+1], class k holds the
    images start[k]..start[k+1]-1.
    """

    images: np.ndarray
    label: np.ndarray
    start: np.ndarray


class ImagesMissing(FileNotFoundError):
    """No source of Fashion-MNIST could be read."""


def check_split(split: str) -> None:
    """Refuse a split that is not one of SPLITS."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")


@functools.lru_cache(maxsize=3)
def load_bank(split: str) -> Bank:
    """The images of `split` ("train", "val" or "test"): the packaged ones where they fit, else from a source."""
    check_split(split)
    packaged = _read_packaged(split)
    return packaged if packaged is not None else read_source(split)


def read_source(split: str, directory: str | pathlib.Path | None = None) -> Bank:
    """The images of `split` from the Debian files in `directory` (default: where the package puts them), else tfds."""
    check_split(split)
    part = "test" if split == "test" else "train"
    where = pathlib.Path(directory) if directory is not None else DEBIAN
    name = _FILES[part]
    paths = [where / f"{name}-images-idx3-ubyte.gz", where / f"{name}-labels-idx1-ubyte.gz"]
    if all(path.is_file() for path in paths):
        images, labels = _read_idx(paths[0], 3), _read_idx(paths[1], 1)
    else:
        images, labels = _read_tfds(part, where)
    order = sorted(range(len(images)), key=lambda i: hashlib.sha256(images[i].tobytes()).digest())
    if split != "test":
        order = order[-VALIDATION_IMAGES:] if split == "val" else order[:-VALIDATION_IMAGES]
    chosen = [np.array([i for i in order if labels[i] == kept], np.int64) for kept in tiles.KEPT_LABELS]
    start = np.cumsum([0, *map(len, chosen)])
    return _bank(images[np.concatenate(chosen)], start)


def _bank(images: np.ndarray, start: np.ndarray) -> Bank:
    label = np.repeat(np.arange(len(start) - 1, dtype=np.int32), np.diff(start))
    for array in (images, label, start):
        array.flags.writeable = False  # the bank is cached and shared
    return Bank(images, label, start)


def _read_packaged(split: str) -> Bank | None:
    """The packaged images of `split`; None where the file is missing or lacks a class."""
    if not PATH.is_file():
        return None
    with np.load(PATH, allow_pickle=False) as stored:
        labels, images, start = stored["labels"].tolist(), stored[f"{split}_images"], stored[f"{split}_start"]
    if not set(tiles.KEPT_LABELS) <= set(labels):
        return None
    classes = [labels.index(kept) for kept in tiles.KEPT_LABELS]
    chosen = [images[start[k] : start[k + 1]] for k in classes]
    return _bank(np.concatenate(chosen), np.cumsum([0, *map(len, chosen)]))


def _read_idx(path: pathlib.Path, dims: int) -> np.ndarray:
    """One gzipped IDX file of unsigned bytes."""
    data = gzip.decompress(path.read_bytes())
    if data[:4] != bytes((0, 0, 8, dims)):
        raise ValueError(f"{path} is not an IDX file of {dims}-dimensional bytes; install dataset-fashion-mnist again")
    shape = np.frombuffer(data, ">u4", dims, 4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * dims).reshape(tuple(int(n) for n in shape))


def _read_tfds(part: str, where: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    missing = (
        f"Fashion-MNIST is not in {where} (Debian: `apt-get install dataset-fashion-mnist`) and tensorflow-datasets"
        " (`tfds.data_source('fashion_mnist')`, needs a network once) "
    )
    try:
        tfds = import_tfds()
    except ImportError as error:
        raise ImagesMissing(f"{missing}cannot be used: {error}") from error
    # tfds has no common base class: OSError covers network and disk, RuntimeError and ValueError its own refusals
    errors = (OSError, RuntimeError, ValueError, ImportError, AttributeError, tfds.core.DatasetNotFoundError)
    try:
        rows = list(tfds.data_source("fashion_mnist", split=part))
    except errors as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ImagesMissing(f"{missing}failed: {reason[:200]}") from error
    images = np.stack([np.asarray(row["image"], np.uint8).reshape(tiles.ITEM, tiles.ITEM) for row in rows])
    return images, np.array([int(row["label"]) for row in rows])


def import_tfds() -> Any:
    """The module tensorflow_datasets; ImportError that names what is missing, which is not always that package itself."""
    try:
        import tensorflow_datasets
    except ImportError as error:
        lacks = error.name or "tensorflow_datasets"
        if lacks == "tensorflow_datasets":
            raise ImportError("it is not installed (`pip install tensorflow-datasets`)", name=lacks) from error
        # some of its releases import packages that they do not declare, such as importlib_resources
        raise ImportError(f"it needs the package {lacks!r} (`pip install {lacks}`): {error}", name=lacks) from error
    return tensorflow_datasets


def write(path: pathlib.Path = PATH, directory: str | pathlib.Path | None = None) -> int:
    """Write the packaged images of all splits to `path`; returns the size in bytes."""
    arrays: dict[str, Any] = {"labels": np.array(tiles.KEPT_LABELS)}
    for split in SPLITS:
        bank = read_source(split, directory)
        arrays |= {f"{split}_images": bank.images, f"{split}_start": bank.start}
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **arrays)
    return path.stat().st_size


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m hybridvlm.tiny.assets", description=__doc__.splitlines()[0])
    parser.add_argument("--directory", help=f"folder of the IDX files (default: {DEBIAN}, else tensorflow-datasets)")
    parser.add_argument("--output", type=pathlib.Path, default=PATH, help="file to write (default: the packaged one)")
    options = parser.parse_args(argv)
    try:
        size = write(options.output, options.directory)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None
    print(f"{options.output}: {size:,} bytes")


if __name__ == "__main__":
    main()
